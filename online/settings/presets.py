"""The presets that the files in `config/` build on: paper-scale experiments and the demo on the embedded prior.

A preset is a locked `ml_collections.ConfigDict`, so that `--config.sampler.num_particles=8` changes a known key and
`--config.sampler.num_particels=8` is refused.
"""

from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from tiltopt.errors import ConfigError
from tiltopt.online.settings.run import Settings
from tiltopt.options import did_you_mean

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
CLIP_VIT_L14 = "openai/clip-vit-large-patch14"


def base() -> ConfigDict:
    """Every key with its default, plus the sampler's options; unlocked."""
    config = ConfigDict(Settings().to_dict(), convert_dict=True)
    config.sampler.update(
        {
            "tempering": "calibrated",
            "gamma": 0.008,
            "ess_threshold": 0.5,
            "resampling": "systematic",
            "gradient": "full",
            "gradient_every": 1,
            "potential_every": 1,
            "select": "draw",
        }
    )
    for section, key, kind in (
        ("reward", "timeout_s", float),
        ("reward", "requests_per_minute", float),
        ("reward", "max_queries", int),
        ("reward", "max_calls", int),
        ("reward", "max_seconds", float),
        ("sampler", "alpha", float),
        ("sampler", "kappa", float),
    ):
        if key in config[section]:  # a key's type is fixed by its first value
            del config[section][key]
        config[section][key] = _empty(kind)
    del config.reference_samples
    config.reference_samples = _empty(int)
    return config


def _empty(kind: type) -> object:
    from ml_collections import config_dict

    return config_dict.placeholder(kind)


def demo() -> ConfigDict:
    """The main job in minutes on two CPU cores: embedded prior, JPEG compressibility, 60 + 3 x 12 queries."""
    config = base()
    config.run_dir = "checkpoints/demo"
    config.prompts = "demo_animals"
    config.rounds = 3
    config.batch_size = 12
    config.initial_batch_size = 60
    config.reward.name = "jpeg_compressibility"
    config.free_reference_samples = 256  # where answers are free, the report can show the prior in full
    config.prior.num_steps = 12
    config.sampler.num_particles = 2  # at so low a price, gradients lead further than more particles to choose from
    config.micro_batch = 6  # four groups of a round, which several processes share evenly
    config.sampler.gradient_every = 2  # the weights stay exact, at half of the backward passes
    config.sampler.potential_every = 4
    config.sampler.kappa = 20.0  # guides earlier than the fitted tempering, which is careful at so low a price
    config.acquisition.adapt = True
    return config


def smoke() -> ConfigDict:
    """The demo cut to about a minute, to see that an installation works."""
    config = demo()
    config.run_dir = "checkpoints/smoke"
    config.rounds = 2
    config.batch_size = 4
    config.initial_batch_size = 12
    config.free_reference_samples = 12
    config.prior.num_steps = 8
    return config


def demo_evaluate() -> ConfigDict:
    """A saved surrogate of a demo run, on animals it never saw."""
    config = demo()
    config.run_dir = "checkpoints/demo_evaluate"
    config.prompts = "held_out_animals"
    config.acquisition.name = "mean"
    config.batch_size = 20
    config.free_reference_samples = 0
    return config


def paper() -> ConfigDict:
    """What the published online experiments share (SEIKO's loop with DAS as the sampler): 256 rounds of 16 queries
    after a first one, of 16 queries for UCB (here) and 256 for the bootstrap (`config/bootstrap.py`).

    Differences from the published settings, and why:
    - `sampler.tempering`: published is "exp" with gamma = .008. "calibrated" learns the schedule from round 0;
      `--config.sampler.tempering=exp` restores the published one.
    - `sampler.resampling`: published is "ssp", from a generator that no seed reaches; "systematic" is as low in
      variance, and reproducible here, as is our "ssp".
    - `sampler.select`: published takes the particle of largest weight, which is biased and less diverse; "draw" is a
      sample of the target.
    - `features.kind`: the projection, as published. The patch mean predicts more rewards better.
    """
    config = base()
    config.prior.path = STABLE_DIFFUSION
    config.prior.num_steps = 100
    config.prior.eta = 1.0
    config.prior.guidance_scale = 7.5
    config.prior.dtype = "bfloat16"
    config.prior.memory = "auto"
    config.features.path = CLIP_VIT_L14
    config.features.kind = "projection"
    config.rounds = 256
    config.batch_size = 16
    config.initial_batch_size = 16
    config.answer_noise = 0.1
    config.good_prompt_fraction = 0.25
    config.sampler.num_particles = 4
    config.sampler.max_shift = _empty(float)  # no bound on the drift, as published
    del config.sampler.budget_nats
    config.sampler.budget_nats = _empty(float)  # each experiment has its published alpha
    config.micro_batch = 4
    config.tracker = "wandb"
    return config


def aesthetic() -> ConfigDict:
    """LAION aesthetic predictor v2 on Stable Diffusion 1.5; alpha = .005 points per nat as published."""
    config = paper()
    config.run_dir = "checkpoints/aesthetic"
    config.reward.name = "aesthetic"
    config.reward.clip = CLIP_VIT_L14
    config.reward.head = ""
    config.sampler.alpha = 0.005
    config.good_prompt_template = "A stunning beautiful oil painting of a {}, cinematic lighting, golden hour light."
    return config


def jpeg() -> ConfigDict:
    """JPEG compressibility in kilobytes on Stable Diffusion 1.5; alpha = .1 kB per nat as published."""
    config = paper()
    config.run_dir = "checkpoints/jpeg"
    config.reward.name = "jpeg_compressibility"
    config.sampler.alpha = 0.1
    config.good_prompt_template = "A {} with smooth textures, minimal detail, and a clean, plain background."
    return config


def evaluate() -> ConfigDict:
    """A saved surrogate of an aesthetic run, on the held-out animals of the published experiments."""
    config = aesthetic()
    config.run_dir = "checkpoints/evaluate"
    config.prompts = "held_out_animals"
    config.acquisition.name = "mean"
    config.batch_size = 100
    config.answer_noise = 0.0
    config.good_prompt_fraction = 0.0
    return config


PRESETS: dict[str, Callable[[], ConfigDict]] = {
    "demo": demo,
    "smoke": smoke,
    "demo_evaluate": demo_evaluate,
    "aesthetic": aesthetic,
    "jpeg": jpeg,
    "evaluate": evaluate,
}


def preset(name: str) -> ConfigDict:
    """The preset called `name`, unlocked; the files in `config/` adjust it and lock it.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}, as in config/ucb.py:demo."
            f"{did_you_mean(name, PRESETS)}"
        )
    return PRESETS[name]()
