"""Surrogates of a costly reward: BoTorch models over features, each with an honest posterior."""

from tiltopt.surrogates.registry import NAMES, fit

__all__ = ["NAMES", "fit"]
