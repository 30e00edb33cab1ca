"""Encode a pool once: pictures -> VAE latents, distinct captions -> text states. The UNet then trains on tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny
from numpy.lib.format import open_memmap
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from tiltopt.embedded.recipe.clip import text_encoder
from tiltopt.embedded.recipe.common import EMBEDDED, batches, log, parser, pixels
from tiltopt.embedded.recipe.compose import Pool


@dataclass(frozen=True)
class Tables:
    """What the UNet trains on; `latents` are already multiplied by the VAE's scaling factor."""

    latents: np.ndarray  # (n, 4, 16, 16) float16
    states: np.ndarray  # (m, 24, d) float16, text states of the distinct captions; row 0 is the empty caption
    caption: np.ndarray  # (n,) row of `states`

    @staticmethod
    def open(folder: Path) -> Tables:
        read = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("latents", "states", "caption")}
        return Tables(**read)


@torch.no_grad()
def encode_images(vae: AutoencoderTiny, pool: Pool, out: Path, *, batch: int, device: str) -> None:
    """Write `out`/latents.npy; resumes at the batch where an earlier call stopped."""
    vae = vae.eval().to(device, memory_format=torch.channels_last)
    shape = (len(pool.images), vae.config.latent_channels, 16, 16)
    mark, path = out / "latents.partial", out / "latents.npy"
    done = int(mark.read_text()) if mark.exists() and path.exists() else 0
    table = open_memmap(path, mode="r+" if done else "w+", dtype=np.float16, shape=shape)
    for part in batches(len(pool.images), batch):
        if part.stop <= done:
            continue
        x = pixels(pool.images[part]).mul(2).sub(1).to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):
            z = vae.encode(x).latents
        table[part] = (z.float() * vae.config.scaling_factor).cpu().numpy()
        mark.write_text(str(part.stop))
    table.flush()
    mark.unlink(missing_ok=True)


@torch.no_grad()
def encode_captions(
    text: CLIPTextModel, tokenizer: CLIPTokenizer, pool: Pool, out: Path, *, batch: int, device: str
) -> int:
    """Write `out`/states.npy and `out`/caption.npy; returns the number of distinct captions."""
    distinct = ["", *sorted(set(pool.captions) - {""})]
    row = {c: i for i, c in enumerate(distinct)}
    length = tokenizer.model_max_length
    states = np.empty((len(distinct), length, text.config.hidden_size), np.float16)
    text = text.eval().to(device)
    for part in batches(len(distinct), batch):
        tokens = tokenizer(
            distinct[part], padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        states[part] = text(tokens.input_ids.to(device))[0].float().cpu().numpy()
    np.save(out / "states.npy", states)
    np.save(out / "caption.npy", np.array([row[c] for c in pool.captions], np.int32))
    return len(distinct)


def main() -> None:
    args = parser(__doc__)
    args.add_argument("--pool", default="train")
    args.add_argument("--vae", type=Path, default=EMBEDDED / "pipeline" / "vae", help="folder of the autoencoder")
    args.add_argument("--clip", type=Path, default=EMBEDDED / "clip", help="CLIPModel folder, for its text tower")
    args.add_argument("--batch", type=int, default=250)
    args.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = args.parse_args()
    pool = Pool.open(options.work / "pools" / options.pool)
    text = text_encoder(CLIPModel.from_pretrained(options.clip))
    text.set_attn_implementation("eager")
    tokenizer = CLIPTokenizer.from_pretrained(options.clip)
    count = encode_captions(text, tokenizer, pool, pool.folder, batch=options.batch, device=options.device)
    log("latents", captions=count)
    vae = AutoencoderTiny.from_pretrained(options.vae)
    encode_images(vae, pool, pool.folder, batch=options.batch, device=options.device)
    sample = np.asarray(Tables.open(pool.folder).latents[:5000], np.float32)
    log("latents", pictures=len(pool.images), mean=float(sample.mean()), std=float(sample.std()))
    (pool.folder / "latents.json").write_text(json.dumps({"std": float(sample.std()), "count": len(pool.images)}))


if __name__ == "__main__":
    main()
