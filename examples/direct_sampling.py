"""Colourful animals from the embedded prior: exact sampling of p(x) exp(colourfulness / 5)."""

import torch

from tiltopt.designs import to_images
from tiltopt.rewards.differentiable import make_differentiable
from tiltopt.samplers import DAS
from tiltopt.samplers.diffusers_prior import load_prior

prior = load_prior("embedded", num_steps=25, guidance_scale=4.0)
reward = make_differentiable("colorfulness")
generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
samples = DAS(pilot_chains=16).sample(
    prior,
    lambda designs, cond: reward(designs, cond.prompts) / 5.0,  # log G: 5 units of reward per nat
    prior.encode(["a cat", "a fish"]),
    num_particles=4,
    generators=generators,
)
best = samples.pick("draw", generators)[:, 0]
for name, image in zip(("cat", "fish"), to_images(samples.designs[torch.arange(2), best]), strict=True):
    image.save(f"direct_{name}.png")
print("effective particles", samples.ess.tolist(), "log Z", samples.log_z.tolist())
