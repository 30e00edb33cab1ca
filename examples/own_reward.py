"""A reward of your own: how green a picture is, in percent of its light.

tiltopt run --config config/ucb.py:demo --config.reward.name=examples/own_reward.py:greenness
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image


def greenness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """One float per image, higher is better; float("nan") would mean that the measurement failed."""
    light = [np.asarray(image.convert("RGB"), dtype=float).mean((0, 1)) for image in images]
    return [float(100 * rgb[1] / max(rgb.sum(), 1.0)) for rgb in light]
