"""Colourful animals from the embedded prior: exact sampling of p(x) exp(colourfulness / 5).

python examples/direct_sampling.py [FOLDER]      # a temporary one by default
"""

import sys
import tempfile
from pathlib import Path

import torch

import tiltopt
from tiltopt.designs import to_images
from tiltopt.rewards.differentiable import make_differentiable
from tiltopt.samplers import DAS
from tiltopt.samplers.diffusers_prior import load_prior

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="tiltopt-"))
prior = load_prior("embedded", num_steps=25, guidance_scale=4.0)
names = ["cat", "fish"]
samples = tiltopt.draw(
    prior,
    make_differentiable("colorfulness"),
    [f"a {name}" for name in names],
    alpha=5.0,  # units of reward per nat
    num_particles=4,
    sampler=DAS(pilot_chains=16),
)
chosen = samples.pick("draw", [torch.Generator().manual_seed(seed) for seed in (0, 1)])[:, 0]
for b, image in enumerate(to_images(samples.designs[torch.arange(2), chosen])):
    place = folder / f"{names[b]}.png"
    image.save(place)
    print(f"drew {place}: {samples.ess[b]:.1f} effective particles of 4, log Z {samples.log_z[b]:.2f} nats")
