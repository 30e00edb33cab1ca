"""tiltopt: find inputs that a costly black box scores highly, by sampling a diffusion model tilted toward reward."""
