"""Smaller JPEG files by Sampling Demon: the black box is asked for numbers only, never for a gradient."""

import torch

from tiltopt.designs import to_images
from tiltopt.online.direct.run import BlackBoxPotential
from tiltopt.rewards import make_reward
from tiltopt.samplers.demon import Demon
from tiltopt.samplers.diffusers_prior import load_prior

prior = load_prior("embedded", num_steps=12, guidance_scale=3.0)
potential = BlackBoxPotential(make_reward("jpeg_compressibility"), alpha=0.1)
generators = [torch.Generator().manual_seed(0)]
samples = Demon(num_noises=8).sample(
    prior, potential, prior.encode(["a tiger"]), num_particles=1, generators=generators
)
to_images(samples.designs[:, 0])[0].save("demon_tiger.png")
print("kilobytes", -0.1 * float(potential(samples.designs[:, 0], prior.encode(["a tiger"]))))
