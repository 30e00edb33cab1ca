"""Settings and presets of direct sampling: one known reward, no loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ml_collections import ConfigDict, config_dict

from tiltopt.errors import ConfigError
from tiltopt.online.settings.presets import CLIP_VIT_L14, STABLE_DIFFUSION
from tiltopt.online.settings.prompts import BUILT_IN, fill, load_prompts
from tiltopt.online.settings.run import (
    PriorSettings,
    RewardSettings,
    SamplerSettings,
    Section,
    build,
    check_text,
    plain,
    prompts_as_text,
)
from tiltopt.options import above, at_least, did_you_mean, ranged


@dataclass(frozen=True)
class DirectSampler(SamplerSettings):
    """How designs are drawn, at a price by hand: there are no rounds that could show what the next should cost."""

    alpha: float | None = ranged(0.02, above(0))  # price of leaving the prior: reward units per nat

    def __post_init__(self) -> None:
        if self.alpha is None or self.budget_nats is not None:
            raise ConfigError(
                "`sampler.alpha`: direct sampling takes a price in reward units per nat; sampler.budget_nats is for "
                f"the loop. Got alpha = {self.alpha!r} and budget_nats = {self.budget_nats!r}."
            )
        super().__post_init__()


@dataclass(frozen=True)
class DirectSettings(Section):
    """Everything that determines what direct sampling draws."""

    job: Literal["direct"] = "direct"  # what these settings are of; those of a run of the loop say "loop"
    run_dir: str = "checkpoints/direct"  # folder of what is drawn
    seed: int = ranged(0, at_least(0))  # of everything random
    num_images: int = ranged(0, at_least(0))  # 0 = one per prompt of the list; more go through it again with new noise
    reference_samples: int | None = ranged(None, at_least(0))  # plain ones beside; None: as many, if answers are free
    prompts: str = "simple_animals"  # a built-in list, a text file with one prompt a line, or texts: a cat | a bear
    prompt_template: str = "a {}"  # built-in lists hold nouns
    micro_batch: int = ranged(16, at_least(1))  # rows (queries x particles) per network call
    tracker: Literal["none", "wandb", "tensorboard", "trackio"] = "none"  # none, wandb, tensorboard or trackio
    project: str = "tiltopt"  # of the tracker
    device: str = "auto"  # "auto" = what accelerate gives the process
    prior: PriorSettings = field(default_factory=PriorSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    sampler: DirectSampler = field(default_factory=DirectSampler)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", prompts_as_text(self.prompts))
        super().__post_init__()
        check_text(self)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DirectSettings:
        """Settings from a nested mapping; ConfigError for an unknown key, a wrong type or an impossible value."""
        return build(cls, config)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict; options stand beside the named keys, as in a configuration."""
        return plain(self)

    def all_prompts(self) -> list[str]:
        """The prompt of every image, in order."""
        words = load_prompts(self.prompts)
        if self.prompts in BUILT_IN and self.prompt_template:
            words = tuple(fill(self.prompt_template, word) for word in words)
        return [words[i % len(words)] for i in range(self.num_images or len(words))]

    def plain_images(self) -> int:
        """How many images get a plain sample of the same prompt and seed beside them, which is scored too."""
        from tiltopt.rewards import is_free  # whose table loads torch

        images = len(self.all_prompts())
        if self.reference_samples is not None:
            return min(images, self.reference_samples)
        return images if is_free(self.reward.name, self.reward.options) else 0


def base() -> ConfigDict:
    """Every key with its default, without those of the loop alone; unlocked."""
    config = ConfigDict(DirectSettings().to_dict(), convert_dict=True)
    for section, names in (
        ("reward", ("concurrency", "timeout_s", "retries", "backoff_s", "requests_per_minute")),
        ("reward", ("max_queries", "max_calls", "max_seconds", "grace_s", "stop_after", "on_unknown")),
        ("sampler", ("budget_nats",)),
    ):
        for name in names:
            del config[section][name]
    del config.reference_samples
    config.reference_samples = config_dict.placeholder(int)
    return config


def _paper() -> ConfigDict:
    """Stable Diffusion 1.5, 100 steps, 4 particles, as published; the tempering is ours (there: `exp`, gamma .008)."""
    config = base()
    config.prior.path = STABLE_DIFFUSION
    config.prior.num_steps = 100
    config.prior.guidance_scale = 5.0
    config.prior.dtype = "bfloat16"
    config.prior.memory = "auto"
    config.micro_batch = 4
    config.sampler.tempering = "calibrated"
    config.sampler.select = "draw"
    return config


def aesthetic() -> ConfigDict:
    """LAION aesthetic predictor, alpha = .005 points per nat."""
    config = _paper()
    config.reward = ConfigDict({"name": "aesthetic", "clip": CLIP_VIT_L14})
    config.sampler.alpha = 0.005
    return config


def clip() -> ConfigDict:
    """CLIP score times 20, alpha = .01 per nat."""
    config = _paper()
    config.reward = ConfigDict({"name": "clip", "clip": CLIP_VIT_L14, "scale": 20.0})
    config.sampler.alpha = 0.01
    return config


def pick() -> ConfigDict:
    """PickScore, alpha = .0001 per nat."""
    config = _paper()
    config.reward = ConfigDict({"name": "pick"})
    config.sampler.alpha = 0.0001
    return config


def multi() -> ConfigDict:
    """Aesthetic + CLIP score, weighted so that a nat costs what it does in `aesthetic` and in `clip`."""
    config = _paper()
    config.reward = ConfigDict({"name": "weighted", "parts": "aesthetic, 0.5 clip"})
    config.sampler.alpha = 0.005
    return config


def jpeg() -> ConfigDict:
    """JPEG compressibility, alpha = .1 kB per nat; no gradient, so FK steering."""
    config = _paper()
    config.reward = ConfigDict({"name": "jpeg_compressibility"})
    config.sampler = ConfigDict({"name": "fk_steering", "num_particles": 8, "alpha": 0.1, "select": "draw"})
    config.micro_batch = 8
    return config


def sdxl() -> ConfigDict:
    """The aesthetic predictor on Stable Diffusion XL, 1024 px."""
    config = aesthetic()
    config.prior.path = "stabilityai/stable-diffusion-xl-base-1.0"
    config.prior.num_steps = 40
    config.prior.vae_dtype = "bfloat16"  # in float16 its decoder overflows
    config.prior.gradient_checkpointing = True
    return config


def lcm() -> ConfigDict:
    """The aesthetic predictor on a latent consistency model: 8 steps of its own kernels."""
    config = aesthetic()
    config.prior.path = "SimianLuo/LCM_Dreamshaper_v7"
    config.prior.num_steps = 8
    config.prior.renoise = True
    config.prior.guidance_scale = 8.0
    return config


def sd3() -> ConfigDict:
    """The aesthetic predictor on Stable Diffusion 3.5 medium, a flow-matching model."""
    config = sdxl()
    config.prior.path = "stabilityai/stable-diffusion-3.5-medium"
    config.prior.num_steps = 28
    config.prior.guidance_scale = 4.5
    return config


def flux() -> ConfigDict:
    """The aesthetic predictor on FLUX.1 dev, which is told its guidance scale."""
    config = sdxl()
    config.prior.path = "black-forest-labs/FLUX.1-dev"
    config.prior.num_steps = 28
    config.prior.guidance_scale = 3.5
    return config


def demo() -> ConfigDict:
    """Colourfulness on the embedded prior: a minute on two CPU cores."""
    config = base()
    config.num_images = 8
    config.reward = ConfigDict({"name": "colorfulness"})
    config.sampler.alpha = 5.0
    config.sampler.tempering = "calibrated"
    config.sampler.pilot_chains = 16
    config.sampler.select = "draw"
    return config


PRESETS: dict[str, Callable[[], ConfigDict]] = {
    "aesthetic": aesthetic,
    "clip": clip,
    "pick": pick,
    "multi": multi,
    "jpeg": jpeg,
    "sdxl": sdxl,
    "lcm": lcm,
    "sd3": sd3,
    "flux": flux,
    "demo": demo,
}


def direct_preset(name: str) -> ConfigDict:
    """The preset called `name`, locked. ConfigError for an unknown one."""
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset {name!r}: expected one of {', '.join(PRESETS)}, as in config/das.py:demo."
            f"{did_you_mean(name, PRESETS)}"
        )
    config = PRESETS[name]()
    config.run_dir = f"checkpoints/direct_{name}"
    return config.lock()
