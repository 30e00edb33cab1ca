"""Compose captioned 64 px pictures: one glyph, slightly turned, over a background, in a style.

Picture i of a pool is a pure function of (pool name, seed, i): `compose` draws nothing from anywhere else. Besides the
caption it keeps what would also have been true to say, so that a contrastive loss never punishes a true caption.
Profile glyphs are never mirrored: a network that sees both sides of a shark learns a blend of the two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from tiltopt.embedded.recipe.common import WORK, batches, log, parser, stream, with_article
from tiltopt.embedded.recipe.glyphs import SIDE, Glyph, load

SIZE = 64
COLOURS = {
    "red": (215, 38, 38), "orange": (240, 140, 30), "yellow": (245, 215, 50), "green": (50, 165, 70),
    "blue": (45, 90, 215), "purple": (130, 60, 180), "pink": (240, 140, 185), "brown": (130, 85, 50),
    "white": (247, 247, 247), "black": (18, 18, 20), "gray": (128, 128, 130), "teal": (35, 160, 165),
    "cyan": (110, 215, 240), "beige": (230, 215, 180),
}  # fmt: skip
COLOUR_NAMES = tuple(COLOURS)
STYLES = ("vivid", "pale", "muted", "dark", "bright")
# kind -> (probability, phrases that are true of it; {0} and {1} are its colours)
BACKGROUNDS: dict[str, tuple[float, tuple[str, ...]]] = {
    "plain": (0.27, ("plain {0}", "{0}", "plain", "simple")),
    "gradient": (0.20, ("gradient", "{0} and {1} gradient", "simple gradient", "simple")),
    "striped": (0.16, ("striped", "busy striped", "{0} and {1} striped", "busy")),
    "checkered": (0.12, ("checkered", "busy checkered", "{0} and {1} checkered", "busy")),
    "cloudy": (0.13, ("cloudy", "{0} and {1} cloudy", "{0} cloudy")),
    "noisy": (0.12, ("noisy", "busy noisy", "{0} noisy", "busy")),
}
KINDS = tuple(BACKGROUNDS)
_KIND_CDF = np.cumsum([p for p, _ in BACKGROUNDS.values()])
_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Look:
    """How pictures vary: glyph size (pixels), rotation (standard deviation, degrees), share of each tier, mirroring."""

    size: tuple[float, float] = (42.0, 61.0)
    rotation: float = 7.0
    tiers: tuple[float, float, float] = (0.80, 0.05, 0.15)  # animal, other, object
    mirror_animals: float = 0.0
    mirror_objects: float = 0.5


@dataclass(frozen=True)
class Picture:
    """One picture with everything that is true of it."""

    image: np.ndarray  # (64, 64, 3) uint8
    caption: str
    glyph: int  # index into the glyph table
    noun: str  # as said in the caption
    phrase: str  # background as said, "" if not said
    phrases: tuple[str, ...]  # backgrounds that would be true to say
    style: str  # of the picture, "" for none
    style_said: str
    kind: str  # of the background


class Composer:
    """Composes pictures from a glyph table; `look` fixes the distribution, `name` and `seed` the draw."""

    def __init__(self, glyphs: tuple[np.ndarray, list[Glyph]], look: Look = Look(), *, name: str, seed: int) -> None:
        self.sprites, self.glyphs = [Image.fromarray(p) for p in glyphs[0]], glyphs[1]
        self.look, self.name, self.seed = look, name, seed
        weight = np.array([g.weight for g in self.glyphs])
        for tier, share in zip(("animal", "other", "object"), look.tiers, strict=True):
            member = np.array([g.tier == tier for g in self.glyphs])
            if member.any():
                weight[member] *= share / weight[member].sum()
        self.cdf = np.cumsum(weight) / weight.sum()

    def __call__(self, index: int, glyph: int | None = None) -> Picture:
        """Picture `index`; `glyph` overrides which glyph it shows."""
        rng = stream(self.name, self.seed, index)
        drawn = min(int(np.searchsorted(self.cdf, rng.random())), len(self.glyphs) - 1)
        glyph = drawn if glyph is None else glyph
        what = self.glyphs[glyph]
        sprite = self._place(rng, glyph)
        kind, ground, phrases = background(rng)
        alpha = sprite[..., 3:] / 255.0
        style = STYLES[rng.integers(len(STYLES))] if rng.random() < 0.30 else ""
        image = stylise(rng, ground * (1 - alpha) + sprite[..., :3] * alpha, style)
        style_said = style if style and rng.random() < 0.8 else ""
        # a narrower noun is said more often of the rarer drawings of a class
        narrow = what.specific and rng.random() < (0.8 if what.weight < 0.3 else 0.3)
        noun = what.specific if narrow else what.noun
        phrase = phrases[rng.integers(len(phrases))] if rng.random() < 0.5 else ""
        said = caption(rng, noun, style_said) + (f" on a {phrase} background" if phrase else "")
        said = said.replace(" a orange", " an orange")
        return Picture(
            np.clip(image + 0.5, 0, 255).astype(np.uint8), said, glyph, noun, phrase, phrases, style, style_said, kind
        )

    def _place(self, rng: np.random.Generator, glyph: int) -> np.ndarray:
        """The glyph scaled, turned and shifted: (64, 64, 4) float32."""
        look, animal = self.look, self.glyphs[glyph].tier == "animal"
        size = rng.uniform(*look.size)
        angle = np.deg2rad(np.clip(rng.normal(0, look.rotation), -2.6 * look.rotation, 2.6 * look.rotation))
        slack = (SIZE - size) / 2 + 1
        x, y = SIZE / 2 + rng.uniform(-slack, slack, 2)
        mirror = -1.0 if rng.random() < (look.mirror_animals if animal else look.mirror_objects) else 1.0
        c, s, half = np.cos(angle) * SIDE / size, np.sin(angle) * SIDE / size, SIDE / 2
        inverse = (mirror * c, mirror * s, half - mirror * (c * x + s * y), -s, c, half - (-s * x + c * y))
        moved = self.sprites[glyph].transform((SIZE, SIZE), Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
        return np.asarray(moved).astype(np.float32)


def _colour(rng: np.random.Generator, other_than: str = "") -> tuple[str, np.ndarray]:
    names = [n for n in COLOUR_NAMES if n != other_than]
    name = names[rng.integers(len(names))]
    return name, np.clip(np.array(COLOURS[name]) + rng.normal(0, 12, 3), 0, 255).astype(np.float32)


def _stretch(values: np.ndarray, resample: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize((SIZE, SIZE), resample))


def background(rng: np.random.Generator) -> tuple[str, np.ndarray, tuple[str, ...]]:
    """(kind, (64, 64, 3) float32 in [0, 255], phrases that are true of it)."""
    kind = KINDS[min(int(np.searchsorted(_KIND_CDF, rng.random() * _KIND_CDF[-1])), len(KINDS) - 1)]
    name1, colour1 = _colour(rng)
    name2, colour2 = _colour(rng, name1)
    phrases = tuple(p.format(name1, name2) for p in BACKGROUNDS[kind][1])
    if kind == "noisy":
        return kind, _noise(rng, colour1), phrases
    blend = {"plain": _plain, "gradient": _gradient, "striped": _stripes, "checkered": _checks, "cloudy": _clouds}
    t = np.clip(blend[kind](rng), 0, 1)[..., None]
    return kind, colour1 * (1 - t) + colour2 * t, phrases


def _plain(rng: np.random.Generator) -> np.ndarray:
    return np.zeros((SIZE, SIZE), np.float32)


def _gradient(rng: np.random.Generator) -> np.ndarray:
    angle = rng.random() * 2 * np.pi
    return ((_COLUMNS - 32) * np.cos(angle) + (_ROWS - 32) * np.sin(angle)) / 80 + 0.5


def _stripes(rng: np.random.Generator) -> np.ndarray:
    angle, period = rng.choice([0, np.pi / 2, np.pi / 4, -np.pi / 4]), rng.uniform(6, 14)
    phase = (_COLUMNS * np.cos(angle) + _ROWS * np.sin(angle)) / period + rng.random()
    return np.sin(phase * 2 * np.pi) * period * 0.35 + 0.5


def _checks(rng: np.random.Generator) -> np.ndarray:
    side = int(rng.integers(4, 10))
    dx, dy = rng.integers(0, side, 2)
    return ((_COLUMNS + dx) // side + (_ROWS + dy) // side) % 2


def _clouds(rng: np.random.Generator) -> np.ndarray:
    cells = int(rng.integers(4, 7))
    return (_stretch(rng.random((cells, cells)), Image.Resampling.BICUBIC) - 0.5) * 1.5 + 0.5


def _noise(rng: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    cells, strength = int(rng.choice([22, 32])), rng.uniform(25, 60)
    resample = Image.Resampling.BILINEAR if rng.random() < 0.5 else Image.Resampling.NEAREST
    grey = _stretch(rng.normal(0, 1, (cells, cells)), resample)[..., None]
    tint = np.stack([_stretch(rng.normal(0, 1, (16, 16)), Image.Resampling.BILINEAR) for _ in range(3)], -1)
    return np.clip(colour * 0.8 + 25 + grey * strength + tint * strength * 0.35, 0, 255)


def stylise(rng: np.random.Generator, image: np.ndarray, style: str) -> np.ndarray:
    """Change saturation, brightness and whiteness; without a style only a little."""
    saturation, brightness, white = rng.uniform(0.75, 1.2), rng.uniform(0.88, 1.08), 0.0
    if style == "vivid":
        saturation, brightness = rng.uniform(1.6, 2.0), rng.uniform(0.95, 1.1)
    elif style == "pale":
        saturation, white = rng.uniform(0.5, 0.7), rng.uniform(0.35, 0.5)
    elif style == "muted":
        saturation = rng.uniform(0.2, 0.4)
    elif style == "dark":
        brightness = rng.uniform(0.4, 0.58)
    elif style == "bright":
        brightness, saturation = rng.uniform(1.25, 1.45), rng.uniform(1.0, 1.25)
    luma = (image @ _LUMA)[..., None]
    return (luma + (image - luma) * saturation) * brightness * (1 - white) + 255 * white


def caption(rng: np.random.Generator, noun: str, style: str) -> str:
    """What is shown, without the background: 'a cat', 'a photo of a pale cat', 'a vivid drawing of an ant', ..."""
    medium = ("photo", "picture", "drawing")[rng.integers(3)]
    form, inside = rng.random(), rng.random() < 0.6
    if style and not inside:
        return f"a {style} {medium} of {with_article(noun)}"
    thing = f"{style} {noun}" if style else noun
    if form < 0.5:
        return with_article(thing)
    if form < 0.65:
        return thing
    if form < 0.85:
        return "a photo of " + with_article(thing)
    return f"{with_article(('drawing', 'picture', 'image')[rng.integers(3)])} of {with_article(thing)}"


@dataclass(frozen=True)
class Pool:
    """A pool of pictures on disk: images (n, 64, 64, 3) uint8, memory-mapped, and codes into small vocabularies."""

    folder: Path
    images: np.ndarray
    captions: list[str]
    codes: dict[str, np.ndarray]  # glyph, noun, nouns (n, 2), phrase, phrases (n, 4), style, style_said, kind
    words: list[str]  # what noun, phrase and style codes stand for; words[0] == ""

    @staticmethod
    def open(folder: Path) -> Pool:
        meta = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
        with np.load(folder / "codes.npz") as data:
            codes = dict(data)
        images = np.load(folder / "images.npy", mmap_mode="r")
        return Pool(folder, images, meta["captions"], codes, meta["words"])


def encode_labels(pictures: Sequence[Picture], glyphs: list[Glyph]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Turn the words of `pictures` into codes."""
    index = {"": 0}

    def code(word: str) -> int:
        return index.setdefault(word, len(index))

    def padded(words: Sequence[str]) -> list[int]:
        return [code(w) for w in (list(words) + [words[0]] * 4)[:4]]

    codes = {
        "glyph": np.array([p.glyph for p in pictures], np.int32),
        "noun": np.array([code(p.noun) for p in pictures], np.int32),
        "nouns": np.array([[code(glyphs[p.glyph].noun), code(glyphs[p.glyph].specific or p.noun)] for p in pictures]),
        "phrase": np.array([code(p.phrase) for p in pictures], np.int32),
        "phrases": np.array([padded(p.phrases) for p in pictures], np.int32),
        "style": np.array([code(p.style) for p in pictures], np.int32),
        "style_said": np.array([code(p.style_said) for p in pictures], np.int32),
        "kind": np.array([KINDS.index(p.kind) for p in pictures], np.int32),
    }
    return codes, list(index)


@lru_cache(maxsize=1)
def _glyphs(path: Path) -> tuple[np.ndarray, list[Glyph]]:
    return load(path)


def _chunk(work: Path, look: Look, name: str, seed: int, start: int, stop: int) -> list[Picture]:
    composer = Composer(_glyphs(work / "glyphs.npz"), look, name=name, seed=seed)
    return [composer(i) for i in range(start, stop)]


def make_pool(work: Path, name: str, count: int, *, seed: int, look: Look = Look(), workers: int = 1) -> Pool:
    """Compose pictures 0 .. count - 1 of pool `name` into `work`/pools/`name`; `workers` changes nothing else."""
    folder = work / "pools" / name
    folder.mkdir(parents=True, exist_ok=True)
    spans = [(s.start, s.stop) for s in batches(count, 1000)]
    if workers > 1:
        with ProcessPoolExecutor(workers) as executor:
            jobs = [executor.submit(_chunk, work, look, name, seed, *span) for span in spans]
            pictures = [p for job in jobs for p in job.result()]
    else:
        pictures = [p for span in spans for p in _chunk(work, look, name, seed, *span)]
    codes, words = encode_labels(pictures, _glyphs(work / "glyphs.npz")[1])
    np.save(folder / "images.npy", np.stack([p.image for p in pictures]))
    np.savez(folder / "codes.npz", **codes)  # type: ignore[arg-type]
    meta = {"captions": [p.caption for p in pictures], "words": words, "seed": seed, "count": count}
    (folder / "captions.json").write_text(json.dumps(meta), encoding="utf-8")
    return Pool.open(folder)


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--name", default="train", help="name of the pool")
    args.add_argument("--count", type=int, default=100_000)
    args.add_argument("--seed", type=int, default=1)
    args.add_argument("--workers", type=int, default=2)
    args.add_argument("--size", type=float, nargs=2, default=Look.size, help="glyph size, pixels")
    args.add_argument("--rotation", type=float, default=Look.rotation, help="standard deviation, degrees")
    args.add_argument("--mirror-animals", type=float, default=Look.mirror_animals, help="probability")
    options = args.parse_args()
    look = Look(tuple(options.size), options.rotation, mirror_animals=options.mirror_animals)
    pool = make_pool(options.work, options.name, options.count, seed=options.seed, look=look, workers=options.workers)
    log("compose", pool=options.name, pictures=len(pool.captions), captions=len(set(pool.captions)), work=str(WORK))


if __name__ == "__main__":
    main()
