"""Train the autoencoder: 64 px pictures <-> 16 × 16 × 4 latents (AutoencoderTiny, a fourth of the side).

Loss: |x̂ - x| + |x̂ - x|² + ½ |∇x̂ - ∇x| + ¼ |dec(pool(z)) - pool(x)| + 0.1 channel moments, with noise of up to 0.12 on
the latents, so that the decoder forgives what a sampler leaves behind. `--freeze-encoder` refines the decoder alone:
latents, and every denoiser trained on them, stay valid.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from tiltopt.embedded.recipe.common import (
    EMBEDDED,
    Average,
    Clock,
    cosine,
    load_state,
    log,
    parser,
    pixels,
    save_state,
    stream,
    torch_stream,
    training_options,
)
from tiltopt.embedded.recipe.compose import Pool

CONFIG = {
    "encoder_block_out_channels": (32, 32, 32), "decoder_block_out_channels": (32, 32, 32), "latent_channels": 4,
    "num_encoder_blocks": (1, 2, 3), "num_decoder_blocks": (3, 3, 1), "scaling_factor": 1.0,
}  # fmt: skip
NOISE = 0.12


def edges(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference of the finite differences, both directions."""
    return (a.diff(dim=2) - b.diff(dim=2)).abs().mean() + (a.diff(dim=3) - b.diff(dim=3)).abs().mean()


def objective(vae: AutoencoderTiny, x: Tensor, generator: torch.Generator, encoder: bool) -> tuple[Tensor, Tensor]:
    """(loss, mean squared error) of a batch (n, 3, 64, 64) in [-1, 1]."""
    with torch.autocast(x.device.type, torch.bfloat16), torch.set_grad_enabled(encoder):
        z = vae.encode(x).latents.float()
    amount = torch.rand(len(z), 1, 1, 1, generator=generator).to(x.device) * NOISE
    noisy = z + torch.randn(z.shape, generator=generator).to(x.device) * amount
    with torch.autocast(x.device.type, torch.bfloat16):
        y = vae.decode(noisy).sample.float()
    square = (y - x).square().mean()
    loss = (y - x).abs().mean() + square + 0.5 * edges(y, x)
    if encoder:
        half = len(x) // 2
        with torch.autocast(x.device.type, torch.bfloat16):
            small = vae.decode(F.avg_pool2d(z[:half], 2)).sample.float()
        moments = z.mean((0, 2, 3)).square().mean() + (z.std((0, 2, 3)) - 1).square().mean()
        outside = F.relu(z.abs() - 2.5).square().mean()
        loss = loss + 0.25 * (small - F.avg_pool2d(x[:half], 2)).abs().mean() + 0.1 * (moments + 0.1 * outside)
    return loss, square.detach()


@torch.no_grad()
def psnr(vae: AutoencoderTiny, x: Tensor) -> float:
    """Peak signal-to-noise ratio of reconstructions of (n, 3, 64, 64) in [-1, 1], dB."""
    out = torch.cat([vae.decode(vae.encode(p).latents).sample.clamp(-1, 1) for p in x.split(64)])
    return 10 * math.log10(4 / (out - x).square().mean().item())


def initial_vae(folder: Path | None, seed: int) -> AutoencoderTiny:
    """The weights in `folder`, or random ones that depend on `seed` alone."""
    if folder is not None:
        return AutoencoderTiny.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        return AutoencoderTiny(**CONFIG)


def train(options: argparse.Namespace) -> AutoencoderTiny:
    """Run, or go on with, the training; writes the averaged weights to work/vae/average."""
    pool = Pool.open(options.work / "pools" / options.pool)
    held_out = pixels(Pool.open(options.work / "pools" / options.held_out).images[:256]) * 2 - 1
    vae = initial_vae(options.init, options.seed).to(options.device, memory_format=torch.channels_last).train()
    vae.encoder.requires_grad_(not options.freeze_encoder)
    trained = [p for p in vae.parameters() if p.requires_grad]
    average = Average(trained, 0.998)
    optimiser = torch.optim.AdamW(trained, lr=options.lr, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    path, step, spent = options.work / "vae" / "state.pt", 0, 0.0
    if (state := load_state(path)) is not None:
        vae.load_state_dict(state["vae"])
        optimiser.load_state_dict(state["optimiser"])
        average.values = [v.to(options.device) for v in state["average"]]
        step, spent = state["step"], state["seconds"]
    clock, saved, began, errors = Clock(options.steps, options.minutes, spent), time.monotonic(), step, []

    def save() -> None:
        parts = {"vae": vae.state_dict(), "average": average.values, "optimiser": optimiser.state_dict()}
        save_state(path, step=step, seconds=clock.seconds(), **parts)

    while (progress := clock.progress(step)) < 1 and step - began < (options.stop_after or float("inf")):
        for group in optimiser.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / 100) * cosine(progress)
        key = ("vae", options.seed, step)
        index = np.sort(stream(*key).integers(0, len(pool.images), options.batch))
        x = (pixels(pool.images[index]) * 2 - 1).to(options.device, memory_format=torch.channels_last)
        loss, square = objective(vae, x, torch_stream(*key), encoder=not options.freeze_encoder)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        step += 1
        average.update(trained, step)
        errors.append(square.item())
        if step % options.log_every == 0:
            log("vae", step=step, seconds=int(clock.seconds()), psnr=10 * math.log10(4 / float(np.mean(errors))))
            errors = []
        if time.monotonic() - saved > options.save_every:
            save()
            saved = time.monotonic()
    save()
    average.copy_to(trained)
    if not options.freeze_encoder:
        with torch.no_grad():
            spread = vae.eval().encode(held_out.to(options.device)).latents.std().item()
        vae.register_to_config(scaling_factor=1 / spread)
    log("vae", held_out_psnr=psnr(vae.eval(), held_out.to(options.device)))
    vae.save_pretrained(options.work / "vae" / "average")
    return vae


def arguments() -> argparse.ArgumentParser:
    out = parser(__doc__)
    training_options(out, steps=6_000, batch=24, lr=2e-3)
    out.add_argument("--init", type=Path, help=f"start from these weights, for example {EMBEDDED / 'pipeline/vae'}")
    out.add_argument("--freeze-encoder", action="store_true", help="train the decoder alone")
    out.add_argument("--held-out", default="held_out", help="pool of pictures never trained on")
    out.add_argument("--log-every", type=int, default=100)
    out.add_argument("--stop-after", type=int, help="pause after this many steps of this call")
    return out


if __name__ == "__main__":
    train(arguments().parse_args())
