"""A denoiser of one's own: points on a ring, learnt in 20 lines, then drawn again with the right side preferred.

    python examples/own_denoiser.py [FOLDER]      # a temporary one by default

Draws the data, the prior's samples, and samples of the prior times exp(x / alpha) beside each other.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

import tiltopt
from tiltopt.samplers import PriorOnly, TorchPrior

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="tiltopt-"))
source = torch.Generator().manual_seed(0)
angle = 2 * torch.pi * torch.rand(20_000, 1, generator=source)
data = torch.cat([angle.cos(), angle.sin()], 1) * 1.2 + 0.1 * torch.randn(20_000, 2, generator=source)
abar = torch.cumprod(1 - torch.linspace(1e-4, 0.08, 200), 0)


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        signal = abar[t, None]
        return self.layers(torch.cat([x, signal.sqrt(), (1 - signal).sqrt()], 1))


model = Denoiser()
optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
for _ in range(3000):
    x0, t = data[torch.randint(len(data), (512,), generator=source)], torch.randint(200, (512,), generator=source)
    signal, eps = abar[t, None], torch.randn(512, 2, generator=source)
    loss = (model(signal.sqrt() * x0 + (1 - signal).sqrt() * eps, t) - eps).square().mean()
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()

prior = TorchPrior(model, alphas_cumprod=abar, event_shape=(2,), prediction="epsilon", num_steps=100)
prompts = ["no prompt"] * 1000  # an unconditional prior counts them
plain = tiltopt.draw(prior, lambda x, _: x[:, 0], prompts, alpha=0.5, num_particles=4, sampler=PriorOnly())
tilted = tiltopt.draw(prior, lambda x, _: x[:, 0], prompts, alpha=0.5, num_particles=4)
chosen = tilted.pick("draw", [torch.Generator().manual_seed(i) for i in range(1000)])
clouds = (data[:1000], plain.x0[:, 0], tilted.x0[torch.arange(1000), chosen[:, 0]])

panels = []
for points in clouds:
    y, x = points.numpy().T[::-1]
    counts = np.histogram2d(y, x, bins=80, range=[[-2, 2]] * 2)[0]
    panels.append(255 - 255 * np.minimum(counts[::-1], 2) / 2)
picture = Image.fromarray(np.hstack(panels).astype(np.uint8))
picture.resize((1200, 400), Image.Resampling.NEAREST).save(folder / "points.png")
print(f"drew {folder / 'points.png'}")
print("mean x of the data, the prior, the tilted prior:", [round(float(points[:, 0].mean()), 2) for points in clouds])
truth = (data[:, 0] / 0.5).exp().mean().log()
print(f"log E[exp(x / alpha)]: {truth:.2f} over the data, {tilted.log_z.exp().mean().log():.2f} by the sampler")
