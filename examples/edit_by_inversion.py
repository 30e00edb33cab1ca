"""A cat becomes a dog: the ODE backwards under one prompt, forwards under another.

python examples/edit_by_inversion.py [FOLDER]      # a temporary one by default
"""

import sys
import tempfile
from pathlib import Path

import torch

from tiltopt.designs import to_images
from tiltopt.samplers import ode
from tiltopt.samplers.diffusers_prior import load_prior

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="tiltopt-"))
prior = load_prior("embedded", num_steps=25, guidance_scale=3.0)
cat, dog = prior.encode(["a cat"]), prior.encode(["a dog"])
generators = [torch.Generator().manual_seed(0)]
before = ode.odeint(prior, ode.noise(prior, generators), cat, steps=20)
after = ode.edit(prior, before, cat, dog, generators, strength=0.9, steps=30)
mixed = ode.compose(prior, [("a cat", 2.0), ("a plain red background", 1.5)])
red = ode.edit(prior, before, cat, mixed, generators, strength=0.9, steps=30)
for name, x in {"before": before, "dog": after, "red": red}.items():
    to_images(ode.latent_to_image(prior, x))[0].save(folder / f"{name}.png")
    print(f"drew {folder / f'{name}.png'}")
