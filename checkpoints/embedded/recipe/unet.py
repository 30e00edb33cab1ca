"""Train the denoiser on latents: v-prediction, epsilon-like loss weight, averaged weights.

    python -m tiltopt.embedded.recipe.unet                        # one process
    torchrun --nproc-per-node 2 -m tiltopt.embedded.recipe.unet   # two; on two busy cores far better than two threads

With x_t = sqrt(ab) z + sqrt(1 - ab) n and v = sqrt(ab) n - sqrt(1 - ab) z the loss is w(t) |v̂(x_t, t, c) - v|² with
w = min(1, 6 / (snr + 1)): the high-noise steps, where the shape is decided, keep their full share. Every draw of a
step is a function of (seed, step, rank), so a resumed run repeats the uninterrupted one exactly (with --steps).
On a CPU set MALLOC_MMAP_THRESHOLD_=2147483648 and MALLOC_TRIM_THRESHOLD_=8589934592: it halves the system time.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from tiltopt.embedded.recipe.common import (
    EMBEDDED,
    Average,
    Clock,
    cosine,
    load_state,
    log,
    parser,
    save_state,
    stream,
    torch_stream,
    training_options,
)
from tiltopt.embedded.recipe.latents import Tables

CONFIG = {
    "sample_size": 16, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 128, "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 16, "layers_per_block": 1,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "block_out_channels": (96, 160),
}  # fmt: skip
SCHEDULE = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """One training batch: clean latents, text states, noise (n, 4, 16, 16), and time steps (n,)."""

    latents: Tensor
    states: Tensor
    noise: Tensor
    steps: Tensor


def draw(tables: Tables, size: int, *keys: int | str, dropout: float = 0.1, horizon: int = 1000) -> Batch:
    """The batch that belongs to `keys`: stratified time steps, `dropout` of the captions replaced by the empty one."""
    rng, generator = stream(*keys), torch_stream(*keys)
    index = np.sort(rng.integers(0, len(tables.latents), size))
    row = np.where(rng.random(size) < dropout, 0, tables.caption[index])
    steps = ((rng.permutation(size) + rng.random(size)) / size * horizon).astype(np.int64)
    latents = torch.from_numpy(tables.latents[index].astype(np.float32))
    return Batch(
        latents,
        torch.from_numpy(tables.states[row].astype(np.float32)),
        torch.randn(latents.shape, generator=generator),
        torch.from_numpy(steps.clip(max=horizon - 1)),
    )


class Objective:
    """The weighted squared error of v, and the plain one for the log."""

    def __init__(self, scheduler: DDIMScheduler, device: str) -> None:
        self.scheduler, self.device = scheduler, torch.device(device)
        ab = scheduler.alphas_cumprod
        weight = (6 / (ab / (1 - ab) + 1)).clamp(max=1.0)
        self.weight = (weight / weight.mean()).to(device)

    def __call__(self, unet: UNet2DConditionModel, batch: Batch) -> tuple[Tensor, Tensor]:
        z, n, t = (v.to(self.device) for v in (batch.latents, batch.noise, batch.steps))
        target = self.scheduler.get_velocity(z, n, t)
        with torch.autocast(self.device.type, torch.bfloat16):
            noisy = self.scheduler.add_noise(z, n, t)
            out = unet(noisy, t, encoder_hidden_states=batch.states.to(self.device)).sample
        error = (out.float() - target).square().mean((1, 2, 3))
        return (error * self.weight[t]).mean(), error.detach().mean()


def average_gradients(parameters: list[Tensor], world: int) -> None:
    """Replace every gradient by its mean over the processes."""
    flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
    dist.all_reduce(flat)
    flat /= world
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


class Run:
    """A training run: weights, average, optimiser, clock, and where it is kept."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rank, self.world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.device = f"cuda:{self.rank}" if options.device == "cuda" else options.device
        torch.set_num_threads(1 if self.world > 1 else torch.get_num_threads())
        self.path: Path = options.work / "unet" / "state.pt"
        self.unet = initial_unet(options.init, options.seed).to(self.device).train()
        if self.device == "cpu":
            self.unet.set_attn_processor(AttnProcessor())
        self.parameters = list(self.unet.parameters())
        self.average = Average(self.parameters, options.ema)
        betas = (0.9, 0.98)
        self.optimiser = torch.optim.AdamW(self.parameters, lr=options.lr, weight_decay=0.01, betas=betas, fused=True)
        self.step, spent = 0, 0.0
        if (state := load_state(self.path)) is not None:
            self.unet.load_state_dict(state["unet"])
            self.average.values = [v.to(self.device) for v in state["average"]]
            self.optimiser.load_state_dict(state["optimiser"])
            self.step, spent = state["step"], state["seconds"]
        self.clock = Clock(options.steps, options.minutes, spent)
        self.objective = Objective(DDIMScheduler(**SCHEDULE), self.device)

    def progress(self) -> float:
        """In [0, 1]; the first process's clock is everyone's."""
        value = torch.tensor([self.clock.progress(self.step)], dtype=torch.float64)
        if self.world > 1:
            dist.broadcast(value, 0)
        return value.item()

    def update(self, tables: Tables, progress: float) -> tuple[float, float]:
        """One optimiser step; returns the loss and the mean squared error of v."""
        rate = self.options.lr * min(1.0, (self.step + 1) / 100) * cosine(progress)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        batch = draw(tables, self.options.batch, "unet", self.options.seed, self.step, self.rank)
        loss, error = self.objective(self.unet, batch)
        self.optimiser.zero_grad()
        loss.backward()
        if self.world > 1:
            average_gradients(self.parameters, self.world)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.step += 1
        self.average.update(self.parameters, self.step)
        return loss.item(), error.item()

    def save(self) -> None:
        """Write the state; only the first process does."""
        if self.rank == 0:
            state = {"unet": self.unet.state_dict(), "average": self.average.values}
            save_state(
                self.path,
                optimiser=self.optimiser.state_dict(),
                step=self.step,
                seconds=self.clock.seconds(),
                world=self.world,
                **state,
            )


def initial_unet(folder: Path | None, seed: int) -> UNet2DConditionModel:
    """The weights in `folder`, or random ones that depend on `seed` alone."""
    if folder is not None:
        return UNet2DConditionModel.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.random.default_generator.manual_seed(seed)
        return UNet2DConditionModel(**CONFIG)


def train(options: argparse.Namespace) -> Run:
    """Run, or go on with, the training that `options` describe, and write the averaged UNet to work/unet/average."""
    run, tables = Run(options), Tables.open(options.work / "pools" / options.pool)
    history: list[tuple[float, float]] = []
    saved, began = time.monotonic(), run.step
    while (progress := run.progress()) < 1 and run.step - began < (options.stop_after or float("inf")):
        history.append(run.update(tables, progress))
        if run.rank == 0 and (run.step % options.log_every == 0):
            loss, error = np.mean(history, 0)
            log("unet", step=run.step, seconds=int(run.clock.seconds()), loss=float(loss), v_error=float(error))
            history = []
        if time.monotonic() - saved > options.save_every:
            run.save()
            saved = time.monotonic()
    run.save()
    if run.rank == 0:
        export(run.path, options.work / "unet" / "average")
    return run


def export(state_path: Path, out: Path) -> None:
    """Write the averaged weights of a checkpoint as a diffusers folder (float32)."""
    state = load_state(state_path)
    if state is None:
        raise FileNotFoundError(f"no training state at {state_path}; train first")
    unet = UNet2DConditionModel(**CONFIG)
    with torch.no_grad():
        for p, value in zip(unet.parameters(), state["average"], strict=True):
            p.copy_(value)
    unet.save_pretrained(out)


def arguments() -> argparse.ArgumentParser:
    out = parser(__doc__)
    training_options(out, steps=20_000, batch=32, lr=1e-3)
    out.add_argument("--init", type=Path, help=f"start from these weights, for example {EMBEDDED / 'pipeline/unet'}")
    out.add_argument("--ema", type=float, default=0.9985, help="decay of the averaged weights")
    out.add_argument("--log-every", type=int, default=100)
    out.add_argument("--stop-after", type=int, help="pause after this many steps of this call")
    out.add_argument("--export", action="store_true", help="only write the averaged weights of the last checkpoint")
    return out


def main() -> None:
    options = arguments().parse_args()
    if options.export:
        export(options.work / "unet" / "state.pt", options.work / "unet" / "average")
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    train(options)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
