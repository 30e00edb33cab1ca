"""Draw the glyphs of Noto Color Emoji (OFL-1.1) and give each the nouns that captions may use for it.

Three tiers: `animal` (the animals that the prior is for), `other` (further animals) and `object`. Within a class the
glyphs share the class's weight. Noto has no cheetah: the leopard glyph stands for it, and captions use both words.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tiltopt.embedded.recipe.common import log, parser

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
STRIKE = 109  # the only bitmap size in the font
SIDE = 72

SIMPLE = tuple(
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle "
    "ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig fly llama "
    "camel".split()
)
HELD_OUT = tuple("snail hippopotamus cheetah crocodile lobster octopus bat gorilla hedgehog kangaroo".split())
ANIMALS = SIMPLE + HELD_OUT

# class -> ((code point, share within the class, a more specific noun or ""), ...)
ANIMAL_GLYPHS: dict[str, tuple[tuple[int, float, str], ...]] = {
    "cat": ((0x1F408, 3, ""), (0x1F431, 3, ""), (0x1F638, 0.3, "grinning cat")),
    "dog": ((0x1F415, 3, ""), (0x1F436, 3, ""), (0x1F429, 0.6, "poodle"), (0x1F9AE, 0.6, "guide dog")),
    "horse": ((0x1F40E, 3, ""), (0x1F434, 3, "")),
    "monkey": ((0x1F412, 2, ""), (0x1F435, 3, "")),
    "rabbit": ((0x1F407, 2, "bunny"), (0x1F430, 3, "")),
    "zebra": ((0x1F993, 1, ""),),
    "spider": ((0x1F577, 1, ""),),
    "bird": ((0x1F426, 4, ""), (0x1F54A, 0.5, "dove"), (0x1F985, 0.5, "eagle"), (0x1F99C, 0.7, "parrot")),
    "sheep": ((0x1F411, 4, "ewe"), (0x1F40F, 0.6, "ram")),
    "deer": ((0x1F98C, 1, ""),),
    "cow": ((0x1F404, 3, ""), (0x1F42E, 3, ""), (0x1F402, 0.4, "ox")),
    "goat": ((0x1F410, 1, ""),),
    "lion": ((0x1F981, 1, ""),),
    "tiger": ((0x1F405, 2, ""), (0x1F42F, 3, "")),
    "bear": ((0x1F43B, 4, ""), (0x1F9F8, 0.5, "teddy bear")),
    "raccoon": ((0x1F99D, 1, ""),),
    "fox": ((0x1F98A, 1, ""),),
    "wolf": ((0x1F43A, 1, ""),),
    "lizard": ((0x1F98E, 1, ""),),
    "beetle": ((0x1FAB2, 3, ""), (0x1F41E, 1.5, "ladybug")),
    "ant": ((0x1F41C, 1, ""),),
    "butterfly": ((0x1F98B, 1, ""),),
    "fish": ((0x1F41F, 3, ""), (0x1F420, 2, "tropical fish"), (0x1F421, 0.4, "blowfish")),
    "shark": ((0x1F988, 1, ""),),
    "whale": ((0x1F40B, 2, ""), (0x1F433, 3, "spouting whale")),
    "dolphin": ((0x1F42C, 1, ""),),
    "squirrel": ((0x1F43F, 1, "chipmunk"),),
    "mouse": ((0x1F401, 3, ""), (0x1F42D, 3, "")),
    "rat": ((0x1F400, 1, ""),),
    "snake": ((0x1F40D, 1, ""),),
    "turtle": ((0x1F422, 1, "tortoise"),),
    "frog": ((0x1F438, 1, ""),),
    "chicken": ((0x1F414, 3, "hen"), (0x1F413, 2, "rooster"), (0x1F424, 0.6, "baby chick")),
    "duck": ((0x1F986, 1, ""),),
    "goose": ((0x1FABF, 1, ""),),
    "bee": ((0x1F41D, 1, "honeybee"),),
    "pig": ((0x1F416, 3, ""), (0x1F437, 3, ""), (0x1F417, 0.4, "boar")),
    "fly": ((0x1FAB0, 1, ""),),
    "llama": ((0x1F999, 1, ""),),
    "camel": ((0x1F42B, 3, ""), (0x1F42A, 1.5, "dromedary")),
    "snail": ((0x1F40C, 1, ""),),
    "hippopotamus": ((0x1F99B, 1, ""),),
    "cheetah": ((0x1F406, 1, "leopard"),),
    "crocodile": ((0x1F40A, 1, ""),),
    "lobster": ((0x1F99E, 1, ""),),
    "octopus": ((0x1F419, 1, ""),),
    "bat": ((0x1F987, 1, ""),),
    "gorilla": ((0x1F98D, 1, ""),),
    "hedgehog": ((0x1F994, 1, ""),),
    "kangaroo": ((0x1F998, 1, ""),),
    "turkey": ((0x1F983, 1, ""),),
}
# animals that a first version drew badly or hardly knew are shown more often
EMPHASIS = {
    **dict.fromkeys(("kangaroo", "shark", "fish", "cheetah", "hippopotamus", "crocodile", "snail", "lobster"), 2.2),
    **dict.fromkeys(("octopus", "deer", "whale", "goat", "fly"), 1.7),
    **dict.fromkeys(("dolphin", "cow", "turtle", "lizard", "snake", "llama", "horse", "chicken", "bee"), 1.3),
    **dict.fromkeys(("rat", "ant", "squirrel", "camel", "gorilla", "cat", "dog", "pig"), 1.2),
    "turkey": 0.5,
}
OTHER_GLYPHS = {
    0x1F403: "buffalo", 0x1F418: "elephant", 0x1F41B: "caterpillar", 0x1F427: "penguin", 0x1F428: "koala",
    0x1F432: "dragon", 0x1F439: "hamster", 0x1F43C: "panda", 0x1F980: "crab", 0x1F982: "scorpion", 0x1F984: "unicorn",
    0x1F989: "owl", 0x1F98F: "rhinoceros", 0x1F990: "shrimp", 0x1F991: "squid", 0x1F992: "giraffe",
    0x1F995: "dinosaur", 0x1F996: "t rex", 0x1F997: "cricket", 0x1F99A: "peacock", 0x1F99F: "mosquito",
    0x1F9A1: "badger", 0x1F9A2: "swan", 0x1F9A3: "mammoth", 0x1F9A4: "dodo", 0x1F9A5: "sloth", 0x1F9A6: "otter",
    0x1F9A7: "orangutan", 0x1F9A8: "skunk", 0x1F9A9: "flamingo", 0x1F9AB: "beaver", 0x1F9AC: "bison", 0x1F9AD: "seal",
    0x1FAB1: "worm", 0x1FAB3: "cockroach", 0x1FACE: "moose", 0x1FACF: "donkey", 0x1FABC: "jellyfish", 0x1F41A: "shell",
}  # fmt: skip
OBJECT_RANGES = (
    (0x1F301, 0x1F309), (0x1F30A, 0x1F30E), (0x1F31C, 0x1F31F), (0x1F330, 0x1F384), (0x1F388, 0x1F393),
    (0x1F3A0, 0x1F3BE), (0x1F3C0, 0x1F3C9), (0x1F3CD, 0x1F3F0), (0x1F3F8, 0x1F3FA), (0x1F451, 0x1F462),
    (0x1F479, 0x1F480), (0x1F48D, 0x1F49C), (0x1F4A1, 0x1F4A3), (0x1F4BB, 0x1F4BC), (0x1F4D5, 0x1F4DA),
    (0x1F4F7, 0x1F4FB), (0x1F511, 0x1F511), (0x1F525, 0x1F52E), (0x1F600, 0x1F610), (0x1F618, 0x1F62D),
    (0x1F680, 0x1F6A4), (0x1F6B2, 0x1F6B2), (0x1F6F4, 0x1F6FC), (0x1F916, 0x1F916), (0x1F920, 0x1F921),
    (0x1F940, 0x1F945), (0x1F950, 0x1F96F), (0x1F9C0, 0x1F9CB), (0x1F9E0, 0x1F9E6), (0x1FA80, 0x1FA85),
    (0x1FAD0, 0x1FAD9), (0x26C4, 0x26C5), (0x26F2, 0x26F5), (0x2744, 0x2744),
)  # fmt: skip
NOT_A_THING = re.compile(
    r"sign|symbol|squared|arrow|clock|flag|^no |musical|score|level|card|man\b|woman|runner|surfer|horse|note|cinema|"
    r"ticket|clapper|information|silhouette|emoji modifier"
)


@dataclass(frozen=True)
class Glyph:
    """One drawing: `noun` names its class, `specific` is a narrower noun or empty, `weight` its share of its tier."""

    code: int
    noun: str
    specific: str
    weight: float
    tier: str


def inventory() -> list[Glyph]:
    """All glyphs that the recipe would like to draw, in a fixed order."""
    out = []
    for noun, members in ANIMAL_GLYPHS.items():
        total = sum(share for _, share, _ in members)
        weight = EMPHASIS.get(noun, 1.0) * (1.25 if len(members) > 1 else 1.0)
        out += [Glyph(code, noun, specific, weight * share / total, "animal") for code, share, specific in members]
    out += [Glyph(code, noun, "", 1.0, "other") for code, noun in OTHER_GLYPHS.items()]
    used = {g.code for g in out}
    for first, last in OBJECT_RANGES:
        for code in range(first, last + 1):
            name = unicodedata.name(chr(code), "").lower()
            if code not in used and name and not NOT_A_THING.search(name):
                out.append(Glyph(code, _plain(name), "", 1.0, "object"))
    return out


def _plain(name: str) -> str:
    name = re.sub(r"^(black|white|heavy) ", "", name.replace("-", " "))
    if re.match(r"(grinning|smiling|crying|angry|kissing|winking|face|sleep)", name):
        return name
    return re.sub(r" (face|sign|symbol)$", "", name)


def draw(font: ImageFont.FreeTypeFont, code: int) -> np.ndarray | None:
    """One glyph, cropped to its ink and centred in a square: (SIDE, SIDE, 4) uint8, or None if the font lacks it."""
    canvas = Image.new("RGBA", (STRIKE + 47, STRIKE + 47), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((4, 4), chr(code), font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        return None
    ink = canvas.crop(box)
    side = max(ink.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def build(font_path: Path, out: Path) -> list[Glyph]:
    """Draw the whole inventory into `out` (an .npz of pixels and one JSON table); returns what the font had."""
    from fontTools.ttLib import TTFont

    if not font_path.exists():
        raise FileNotFoundError(
            f"no font at {font_path}; install Noto Color Emoji (Debian: fonts-noto-color-emoji) or pass --font"
        )
    known = set(TTFont(font_path).getBestCmap())
    font = ImageFont.truetype(str(font_path), STRIKE)
    glyphs, pictures = [], []
    for glyph in inventory():
        picture = draw(font, glyph.code) if glyph.code in known else None
        if picture is None:
            log("glyphs", missing=hex(glyph.code), noun=glyph.noun)
            continue
        glyphs.append(glyph)
        pictures.append(picture)
    out.parent.mkdir(parents=True, exist_ok=True)
    table = json.dumps([asdict(g) for g in glyphs])
    np.savez_compressed(out, pictures=np.stack(pictures), table=np.frombuffer(table.encode(), np.uint8))
    return glyphs


def load(path: Path) -> tuple[np.ndarray, list[Glyph]]:
    """Pixels (n, SIDE, SIDE, 4) uint8 and table, as `build` wrote them."""
    with np.load(path) as data:
        return data["pictures"], [Glyph(**g) for g in json.loads(data["table"].tobytes())]


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--font", type=Path, default=FONT)
    options = args.parse_args()
    glyphs = build(options.font, options.work / "glyphs.npz")
    log("glyphs", **{tier: sum(g.tier == tier for g in glyphs) for tier in ("animal", "other", "object")})


if __name__ == "__main__":
    main()
