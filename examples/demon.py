"""Smaller JPEG files by Sampling Demon: the black box is asked for numbers only, never for a gradient.

python examples/demon.py [FOLDER]      # a temporary one by default
"""

import sys
import tempfile
from pathlib import Path

import tiltopt
from tiltopt.designs import to_images
from tiltopt.rewards import make_reward
from tiltopt.samplers.demon import Demon
from tiltopt.samplers.diffusers_prior import load_prior

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp(prefix="tiltopt-"))
prior = load_prior("embedded", num_steps=12, guidance_scale=3.0)
size = make_reward("jpeg_compressibility")
demon = Demon(num_noises=8)
samples = tiltopt.draw(prior, size, ["a tiger"], alpha=0.1, num_particles=1, black_box=True, sampler=demon)
[picture] = to_images(samples.designs[:, 0])
picture.save(folder / "tiger.png")
print(f"drew a tiger of {-size([picture], ['a tiger'])[0]:.2f} kB: {folder / 'tiger.png'}")
