"""Settings of a run: frozen, checked before any model is loaded, and written to `config.json`.

A configuration is a nested mapping (an `ml_collections.ConfigDict`, a plain dict, or the content of a `config.json`).
`Settings.from_config` turns it into frozen dataclasses; an unknown key, a wrong type or an impossible value is a
`ConfigError` that names the key. What only the tables of samplers, surrogates, acquisitions and rewards can tell, such
as whether an option exists, is checked by `tiltopt.online.settings.validation`.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

from tiltopt.errors import ConfigError
from tiltopt.kinds import DEFAULT_KIND, parse_kind
from tiltopt.online.settings.renamed import refuse_old_names
from tiltopt.options import Range, above, at_least, between, check_fields, ranged, unknown_key

T = TypeVar("T", bound="Section")


@dataclass(frozen=True)
class Section:
    """Keys that are checked when they are set. Those of a section with `options` that it does not know belong to what
    its `name` names."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_fields(self, self.section)


def _is_size(value: Any) -> bool:
    if isinstance(value, int):
        return value >= 0
    return len(value) == 2 and all(type(v) is int and v > 0 for v in value)


@dataclass(frozen=True)
class PriorSettings(Section):
    """The diffusion model. `path` is "embedded", a pipeline's folder, or a hub id; levers as in docs/priors.md."""

    section: ClassVar[str] = "prior"
    path: str = "embedded"  # "embedded", the folder of a pipeline of diffusers, or a hub id
    fingerprint: str = ""  # of a prior that was handed over in Python, which no path leads to
    num_steps: int = ranged(25, at_least(1))  # denoising steps
    eta: float = ranged(1.0, between(0, 1))  # 0 = deterministic DDIM, 1 = ancestral; guided samplers need eta > 0
    guidance_scale: float = ranged(4.0, at_least(0))  # classifier-free guidance; 1 = none
    negative_prompt: str = ""  # what guidance leads away from
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the network; latents stay float32
    vae_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the decoder
    renoise: bool = False  # the kernels of a consistency model (LCM); eta then means nothing
    size: int | tuple = ranged(
        0, Range(_is_size, "a number of pixels, (height, width), or 0")
    )  # a picture's side in pixels, or (height, width); 0 = as the network was trained
    variant: str = ""  # of the weight files, for example "fp16"
    lora: str = ""  # a LoRA of the same base: folder, file or hub id
    guidance_decoder: str = ""  # folder of an AutoencoderTiny: decodes every look but the last
    memory: Literal["as_set", "auto"] = "as_set"  # auto: micro_batch and levers are fitted to the device
    gradient_checkpointing: bool = False  # less memory in the backward pass, more time
    channels_last: bool = False  # memory format of convolutions; faster on CUDA in half precision
    compile: bool = False  # torch.compile the network; the first call takes minutes
    tf32: bool = False  # CUDA may round float32 products to TensorFloat-32
    vae_slicing: bool = False  # decode one picture at a time
    vae_tiling: bool = False  # decode in overlapping tiles, which changes pixels
    offload: bool = False  # what drawing does not need stays on the CPU: text encoders, the encoder of the VAE

    def arguments(self) -> dict[str, Any]:
        """Everything but which prior, as `load_prior` takes it: an empty text and size 0 are None there."""
        which = ("path", "fingerprint", "memory")
        named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in which}
        optional = ("size", "variant", "lora", "guidance_decoder")
        return {name: (value or None) if name in optional else value for name, value in named.items()}


@dataclass(frozen=True)
class FeatureSettings(Section):
    """What the surrogate sees of an image: a CLIP image tower, by folder or hub id, and the prior's autoencoder."""

    section: ClassVar[str] = "features"
    path: str = "embedded"  # "embedded", the folder of a CLIP model, or a hub id
    kind: str = DEFAULT_KIND  # blocks joined by "+", or a short name; see docs/surrogates.md
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the CLIP model; features stay float32
    prompt_features: bool = False  # append the prompt's text embedding, so that one surrogate tells prompts apart

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_kind(self.kind)


@dataclass(frozen=True)
class RewardSettings(Section):
    """The black box and how it is called. Keys that are not listed here go to the reward itself."""

    section: ClassVar[str] = "reward"
    name: str = ""  # "" = none: answers are told from Python, or given by a person
    concurrency: int = ranged(1, at_least(1))  # calls in flight at once
    timeout_s: float | None = ranged(None, above(0))  # of one call
    retries: int = ranged(2, at_least(0))  # further attempts after a call that raised
    backoff_s: float = ranged(1.0, at_least(0))  # before the first retry; doubles
    requests_per_minute: float | None = ranged(None, above(0))  # at most
    max_queries: int | None = ranged(None, above(0))  # answers paid for in the whole run; then it stops cleanly
    max_calls: int | None = ranged(None, above(0))  # the same with every retry counted
    max_seconds: float | None = ranged(None, above(0))  # wall-clock budget of the whole run
    grace_s: float = ranged(30.0, at_least(0))  # for which calls in flight are still awaited after a stop
    stop_after: int = ranged(5, at_least(1))  # so many dead calls in a row end the asking
    on_unknown: Literal["ask", "leave"] = "ask"  # queries handed out to a process that died: ask again, or leave failed
    options: Mapping[str, Any] = field(default_factory=dict)


MOST = 10_000
"""Queries that are asked at once."""
BUDGET = 48.0
"""Nats that a query may cost where nothing else is said."""
INSTEAD = {"sampler.alpha": "sampler.budget_nats", "sampler.budget_nats": "sampler.alpha"}
"""Keys of which one given by hand takes back what a preset says of the other."""


@dataclass(frozen=True)
class SamplerSettings(Section):
    """How designs are drawn. Keys that are not listed here go to the sampler's constructor."""

    section: ClassVar[str] = "sampler"
    name: str = "das"  # das, tds, fk_steering, best_of_n, guidance, prior_only, demon
    num_particles: int = ranged(4, at_least(1))  # per query
    alpha: float | None = ranged(None, above(0))  # price of leaving the prior: reward units per nat
    budget_nats: float | None = ranged(None, above(0))  # or nats that a query may cost; BUDGET where neither is given
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None and self.budget_nats is not None:
            raise ConfigError(
                "`sampler.alpha`: expected one of alpha (reward units per nat) and sampler.budget_nats (nats per "
                f"query, from which alpha follows), got alpha = {self.alpha:g} and budget_nats = {self.budget_nats:g}."
            )
        if self.alpha is None and self.budget_nats is None:
            object.__setattr__(self, "budget_nats", BUDGET)


@dataclass(frozen=True)
class ModelSettings(Section):
    """The surrogate. Keys that are not listed here go to `tiltopt.surrogates.fit`."""

    section: ClassVar[str] = "model"
    name: str = "last_layer"  # linear, last_layer, ensemble, gp, seiko, auto, pairwise (comparisons)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class AcquisitionSettings(Section):
    """What the surrogate is asked to maximise."""

    section: ClassVar[str] = "acquisition"
    name: str = "ucb"  # ucb, log_ei, thompson, max_member, mean; see docs/surrogates.md
    beta: float = ranged(1.0, at_least(0))  # of ucb: mean + sqrt(beta) posterior standard deviations
    adapt: bool = False  # grow cautious when predictions turn out too high (see docs/surrogates.md)
    feasibility: bool = False  # learn from failed queries where not to go


OPERATORS = ("global", "restart", "pool")


def _are_operators(value: str) -> bool:
    names = value.split("+")
    return all(name in OPERATORS for name in names) and len(set(names)) == len(names)


@dataclass(frozen=True)
class SearchSettings(Section):
    """Where the queries of a tilted round start from: noise ("global"), the re-noised latents of answered designs of
    their prompt ("restart"), or such without guidance, a pool of which the surrogate keeps the best ("pool")."""

    section: ClassVar[str] = "search"
    operators: str = ranged(
        "global", Range(_are_operators, f"names joined by +, of {', '.join(OPERATORS)}", OPERATORS)
    )  # mixed
    parents: Literal["rank", "thompson"] = "rank"  # weight exp(-rank / 3), or the best of a posterior draw
    low_strength: float = ranged(0.3, between(0.01, 1))  # of a restart's noise, 1 = noise alone: drawn from this ...
    high_strength: float = ranged(0.7, between(0.01, 1))  # ... to this
    pool: int = ranged(32, at_least(1))  # designs of a pool
    floor: float = ranged(0.1, between(0, 1))  # of each operator's probability
    fallback: bool = True  # once the answers show that guidance is blind: the best answers re-noised, plain pools

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low_strength > self.high_strength:
            raise ConfigError(
                "`search.low_strength`: expected at most search.high_strength, got "
                f"{self.low_strength:g} > {self.high_strength:g}."
            )
        number = len(self.operators.split("+"))
        if self.floor * number > 1:
            raise ConfigError(
                f"`search.floor`: expected at most {1 / number:.3g}, a share for each of {number} operators, got "
                f"{self.floor:g}."
            )


NEWEST, ALL = "newest", "all"
"""Which of a run's surrogates are evaluated."""


def _are_rounds(value: str) -> bool:
    return value in (NEWEST, ALL) or all(part.strip().isdecimal() for part in value.split(","))


@dataclass(frozen=True)
class EvaluateSettings(Section):
    """Saved surrogates to evaluate on the settings' prompts, in place of the loop."""

    section: ClassVar[str] = "evaluate"
    surrogate: str = ""  # its folder, such as checkpoints/<run>/round_004, or that of its run; "" = run the loop
    rounds: str = ranged(
        "newest", Range(_are_rounds, f"{NEWEST}, {ALL}, or numbers joined by commas")
    )  # of a run's surrogates
    seeds: int = ranged(1, at_least(1))  # independent sets of pairs, which the intervals are over
    seen: str = ""  # prompts that taught it, as `prompts`: as many pairs of these beside; "" = none

    @property
    def numbers(self) -> tuple[int, ...]:
        """The rounds that `rounds` lists; () where it lists none."""
        return () if self.rounds in (NEWEST, ALL) else tuple(map(int, self.rounds.split(",")))


@dataclass(frozen=True)
class Settings(Section):
    """Everything that determines a run."""

    job: Literal["loop"] = "loop"  # what these settings are of; those of direct sampling say "direct"
    run_dir: str = "checkpoints/run"  # folder of the run
    seed: int = ranged(0, at_least(0))  # of everything random
    rounds: int = ranged(4, at_least(0))  # after round 0
    batch_size: int = ranged(16, between(1, MOST))  # queries per round
    initial_batch_size: int = ranged(64, between(2, MOST))  # queries of round 0, plain samples; a surrogate needs data
    design: str = "image"  # what is drawn: image, tokens:20 or tokens:ACGT, or tensor; see tiltopt/designs.py
    prompts: str = "simple_animals"  # a built-in list, a text file with one prompt a line, or texts: a cat | a bear
    prompt_template: str = "a {}"  # built-in lists hold nouns; "an" before a vowel is put right
    good_prompt_template: str = ""  # a second template ...
    good_prompt_fraction: float = ranged(0.0, between(0, 1))  # ... and the share of queries that use it
    comparisons_per_query: int = ranged(2, at_least(1))  # at least so many, where answers are comparisons
    objectives: str | tuple = ""  # several numbers per answer, as "speed, beauty, clip > 0.25"; see docs/loop.md
    reference_point: tuple = ()  # what hypervolume is measured from, one number per maximised objective; () = inferred
    answer_noise: float = ranged(0.0, at_least(0))  # sd of noise added to each answer (published experiments use 0.1)
    reference_samples: int | None = ranged(
        None, at_least(0)
    )  # plain samples scored for the report only; each is a query
    free_reference_samples: int = ranged(
        0, at_least(0)
    )  # the same where reference_samples is None and answers are free
    micro_batch: int = ranged(16, at_least(1))  # rows (queries x particles) per network call
    tracker: Literal["none", "wandb", "tensorboard", "trackio"] = "none"  # none, wandb, tensorboard or trackio
    project: str = "tiltopt"  # of the tracker
    device: str = "auto"  # "auto" = what accelerate gives the process
    prior: PriorSettings = field(default_factory=PriorSettings)
    features: FeatureSettings = field(default_factory=FeatureSettings)
    reward: RewardSettings = field(default_factory=RewardSettings)
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    acquisition: AcquisitionSettings = field(default_factory=AcquisitionSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", prompts_as_text(self.prompts))
        super().__post_init__()
        check_text(self)
        check_template("good_prompt_template", self.good_prompt_template)

    @property
    def pairwise(self) -> bool:
        """Whether answers are comparisons of two queries; otherwise they are values."""
        return self.model.name == "pairwise"

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Settings) -> Settings:
        """Settings from a nested mapping; absent keys take their defaults.

        Raises:
            ConfigError: unknown key, wrong type or impossible value, named with its path.
        """
        return config if isinstance(config, Settings) else build(cls, config)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict; options stand beside the named keys, as in a configuration."""
        return plain(self)


def differences(old: Settings, new: Settings) -> list[str]:
    """Dotted keys whose values differ, as `key: old -> new`."""
    a, b = flat(old.to_dict()), flat(new.to_dict())
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted({*a, *b}) if a.get(k) != b.get(k)]


def prompts_as_text(prompts: Any) -> Any:
    """A list of texts as the JSON that the setting `prompts` keeps; anything else as it is."""
    return json.dumps(list(prompts), ensure_ascii=False) if isinstance(prompts, (list, tuple)) else prompts


def check_text(settings: Any) -> None:
    """`run_dir`, `prompts` and `prompt_template`, which the settings of every job have. Raises ConfigError."""
    if not settings.run_dir:
        raise ConfigError("`run_dir`: expected a folder, got ''.")
    if not settings.prompts:
        raise ConfigError(
            "`prompts`: expected the name of a prompt list, a text file with one prompt a line, or texts, got ''."
        )
    if any("\ud800" <= letter <= "\udfff" for letter in settings.prompts):
        raise ConfigError(f"`prompts`: expected texts, got one with half of a surrogate pair: {settings.prompts!r}.")
    check_template("prompt_template", settings.prompt_template)


def check_template(key: str, template: str) -> None:
    """A template is empty, or has a place for the noun. Raises ConfigError."""
    try:
        fine = not template or ("{}" in template and bool(template.format("cat")))
    except (LookupError, ValueError):  # of another place, or of a single brace
        fine = False
    if not fine:
        raise ConfigError(f"`{key}`: expected a template that contains {{}} and no other braces, got {template!r}.")


def build(cls: type[T], config: Mapping[str, Any]) -> T:
    """Settings of the class from a nested mapping. Raises ConfigError."""
    if not hasattr(config, "items"):
        raise ConfigError(f"expected a configuration mapping, got {type(config).__name__}")
    tree = plain(config)
    refuse_old_names(tree)
    return _build(cls, tree, list(flat(plain(cls()))))


def _build(cls: type[T], tree: Mapping[str, Any], known: list[str]) -> T:
    """One section, with its own sections. `known`: every dotted key of the whole, for what may have been meant."""
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)} - {"options"}
    values: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in tree.items():
        if key in names and dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(f"`{dotted(cls.section, key)}`: expected a section with keys, got {value!r}.")
            values[key] = _build(hints[key], value, known)  # type: ignore[arg-type]
        elif key in names:
            values[key] = value
        elif "options" in hints:
            options[key] = value
        else:
            raise unknown_key(dotted(cls.section, key), known)
    return cls(**values, **({"options": options} if options else {}))


def dotted(section: str, key: str) -> str:
    """`section.key`; the key alone where there is no section."""
    return f"{section}.{key}" if section else key


def plain(value: Any) -> Any:
    """Settings or a configuration as plain dicts, lists and values; options stand beside the named keys."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "options"}
        out.update(plain(getattr(value, "options", {})))
        return out
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of settings with the keys of another in the place of its own, and of those that these are instead of."""
    out, given = _merged(below, above), flat(above)
    for key, other in INSTEAD.items():
        section, _, last = other.rpartition(".")
        if given.get(key) is not None and other not in given and last in out[section]:
            out[section] = {**out[section], last: None}
    return out


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out


def flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A tree of settings on one level: `{"sampler.alpha": .1, ...}`."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out.update(flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value})
    return out


KEYS = tuple(flat(Settings().to_dict()))
"""Every dotted key that a configuration of the loop has, without the options of what it names."""
