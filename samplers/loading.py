"""From a name to a pipeline: the embedded pipeline, a local folder, or a model on the Hugging Face hub.

Every network of a pipeline is loaded by itself and must find all of its weights and no others: loaders would fill a gap
with random numbers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn
from transformers.utils import logging as transformers_logging

from tiltopt.errors import PriorError
from tiltopt.vision import why_not, with_words

EMBEDDED = "embedded"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SUPPORTED = (
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "LatentConsistencyModelPipeline",
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "DDPMPipeline",
    "DDIMPipeline",
)
_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # no picture is drawn with them
_BUFFERS = ("position_ids",)  # older releases stored them; computed today
_DAMAGE = (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError)
"""What loaders raise at files that are not whole."""


def load_pipeline(path: str | Path, *, dtype: str = "float32", variant: str | None = None) -> Any:
    """The diffusers pipeline at `path`: network and text encoders in `dtype`, the VAE in float32.

    Args:
        path: "embedded", a folder, or a hub id.
        dtype: a name of `DTYPES`.
        variant: of the weight files, for example "fp16".
    Raises:
        PriorError: nothing can be loaded from `path`, it is none of `SUPPORTED`, or a part lacks weights.
    """
    precision = torch_dtype(dtype)
    source = str(resources.files("tiltopt.embedded") / "pipeline") if str(path) == EMBEDDED else str(path)
    name = str(_index(source).get("_class_name"))
    if name not in SUPPORTED:
        raise PriorError(
            f"expected a pipeline of class {', '.join(SUPPORTED)}, got {name} at {source!r}; wrap a denoiser of "
            "another kind in tiltopt.samplers.TorchPrior"
        )
    folder = _folder(source, variant)
    index = _index(str(folder))
    with _quiet():
        parts: dict[str, Any] = {p: None for p, entry in index.items() if p in _LEFT_OUT or entry == [None, None]}
        if "requires_safety_checker" in index:
            parts["requires_safety_checker"] = False
        for part, library, kind in _networks(index):
            if part not in _LEFT_OUT:
                place = folder / part if (folder / part).is_dir() else folder  # early DDPMs lie beside the index
                loaded_as = torch.float32 if part == "vae" else precision
                parts[part] = _load_network(library, kind, place, part, loaded_as, variant)
        for part, entry in index.items():
            if part.startswith("tokenizer") and entry != [None, None]:
                _config_of(folder / part / "tokenizer_config.json", part)
        if (folder / "scheduler").is_dir() and "_class_name" not in _config_of(
            folder / "scheduler" / "scheduler_config.json", "scheduler"
        ):
            raise PriorError(f"`scheduler` at {source!r} names no class; save it again, or download it anew")
        try:
            made = getattr(diffusers, name).from_pretrained(folder, **parts)
            for part in made.components.values():
                if isinstance(part, transformers.PreTrainedTokenizerBase):
                    with_words(part)
            return made
        except _DAMAGE as error:
            raise PriorError(f"the pipeline at {source!r} is incomplete or damaged: {_first_line(error)}") from error


def load_decoder(path: str | Path) -> Any:
    """The autoencoder at `path`, a folder of an AutoencoderTiny, in float32.

    Raises:
        PriorError: there is none, or it lacks weights.
    """
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise PriorError(
            f"`guidance_decoder` must be a folder of an AutoencoderTiny with config.json, got {str(path)!r}"
        )
    with _quiet():
        return _load_network(diffusers, diffusers.AutoencoderTiny, folder, "guidance_decoder", torch.float32, None)


def add_lora(pipe: Any, path: str | Path) -> None:
    """Load the LoRA at `path` (a folder, a file or a hub id) into the pipeline's network and text encoders.

    Raises:
        PriorError: PEFT is missing, or the LoRA was made for another model.
    """
    if not diffusers.utils.is_peft_available():
        raise PriorError("a LoRA needs the package peft: pip install peft")
    kind, file = type(pipe).__name__, Path(path).expanduser()
    if not hasattr(pipe, "load_lora_weights"):
        raise PriorError(f"a {kind} takes no LoRA, got {str(path)!r}; leave `lora` out")
    where, name = (file.parent, {"weight_name": file.name}) if file.is_file() else (path, {})
    source = {"pretrained_model_name_or_path_or_dict": str(where), "local_files_only": _offline(), **name}
    try:
        with _quiet():
            pipe.load_lora_weights(**source)
            found = pipe.lora_state_dict(**source)
    except (*_DAMAGE, AttributeError, IndexError) as error:
        raise PriorError(
            f"the LoRA at {str(path)!r} does not fit this {kind}, or is damaged; it must be made for the same base "
            f"model: {_first_line(error)}"
        ) from error
    stored = found[0] if isinstance(found, tuple) else found
    wanted = sum(tensor.ndim > 1 for tensor in stored.values())  # matrices: scales and biases have other names inside
    parts = (part for part in pipe.components.values() if isinstance(part, nn.Module))
    loaded = sum("lora_" in key and value.ndim > 1 for part in parts for key, value in part.named_parameters())
    if loaded < wanted:
        raise PriorError(
            f"the LoRA at {str(path)!r} was made for another base model: of its {wanted} matrices, {wanted - loaded} "
            f"belong to layers that this {kind} does not have"
        )


def on_this_machine(path: str | Path, file: str = "model_index.json") -> bool:
    """Whether a model is here without the network: the embedded one, a folder, or a hub id whose `file` is cached."""
    if str(path) == EMBEDDED or Path(path).expanduser().is_dir():
        return True
    return isinstance(huggingface_hub.try_to_load_from_cache(str(path), file), str)


def torch_dtype(name: str, key: str = "dtype") -> torch.dtype:
    """The precision called `name`; `key` is the setting that a PriorError blames."""
    if name not in DTYPES:
        raise PriorError(f"`{key}` must be one of {sorted(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _index(source: str) -> Mapping[str, Any]:
    """What model_index.json says, from a folder or the hub."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        path = folder / "model_index.json"
        if not path.is_file():
            raise PriorError(
                f"expected a diffusers pipeline folder with model_index.json, got {source!r} without one; save one "
                "with `pipe.save_pretrained(folder)`"
            )
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise PriorError(f"{path} is not a diffusers model index; save the pipeline again") from error
        if not isinstance(index, dict):
            raise PriorError(f"{path} is not a diffusers model index; save the pipeline again")
        return index
    if folder.exists() or folder.is_absolute() or source.startswith((".", "~")) or source.count("/") != 1:
        raise PriorError(
            f"expected 'embedded', a pipeline folder, or a hub id 'owner/name', got {source!r}, which is no folder here"
        )
    try:
        return dict(DiffusionPipeline.load_config(source, local_files_only=_offline()))
    except (OSError, ValueError) as error:
        remedy = "HF_HUB_OFFLINE is set, which keeps the hub out" if _offline() else "check its name and the network"
        raise PriorError(
            f"{source!r} is neither a folder here nor reachable on the Hugging Face hub; {remedy}: "
            f"{why_not(source, error)}; or use 'embedded'"
        ) from error


def _folder(source: str, variant: str | None) -> Path:
    """The pipeline's files on this machine; a hub id is downloaded, safetensors only."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    try:
        with _quiet():
            files = DiffusionPipeline.download(
                source, use_safetensors=True, variant=variant, local_files_only=_offline(), safety_checker=None
            )
    except (OSError, ValueError) as error:
        raise PriorError(
            f"the weights of {source!r} cannot be had as safetensors"
            f"{f' of variant {variant!r}' if variant else ''}: {_first_line(error)}"
        ) from error
    return Path(files)


def _networks(index: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(part, library, class) of every part of a pipeline that has weights."""
    for part, entry in index.items():
        if not (isinstance(entry, list) and len(entry) == 2 and entry[1]):
            continue
        library = {"diffusers": diffusers, "transformers": transformers}.get(entry[0])
        kind = getattr(library, entry[1], None)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            yield part, library, kind


def _load_network(library: Any, kind: Any, place: Path, part: str, dtype: torch.dtype, variant: str | None) -> Any:
    """One network from its folder, with all of its weights.

    Raises:
        PriorError: no safetensors, or they do not fill the configuration exactly.
    """
    _check_files(place, part, variant)
    options: dict[str, Any] = {"ignore_mismatched_sizes": True} if library is transformers else {}
    try:
        module, info = kind.from_pretrained(
            place, torch_dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True, **options
        )
    except _DAMAGE as error:
        raise PriorError(f"`{part}` at {str(place)!r} is incomplete or damaged: {_first_line(error)}") from error
    for what, fault in (
        ("missing_keys", "lacks weights that its config.json asks for"),
        ("unexpected_keys", "holds weights that its config.json has no place for"),
        ("mismatched_keys", "holds weights of other shapes than its config.json"),
    ):
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in info.get(what) or ())
        names = [key for key in names if not key.endswith(_BUFFERS)]
        if names:
            raise PriorError(
                f"`{part}` at {str(place)!r} {fault}: {len(names)} tensors, {', '.join(names[:3])}"
                f"{', ...' if len(names) > 3 else ''}; save it again as it was made, or download it anew"
            )
    return module


def _check_files(place: Path, part: str, variant: str | None) -> None:
    """That `place` holds safetensors of `variant`; a PriorError says what is there instead."""
    if not place.is_dir():
        return  # from_pretrained says so
    names = [p.name for p in place.iterdir()]
    # model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
    stems = [n.removesuffix(".safetensors") for n in names if n.endswith(".safetensors")]
    variants = {stem.split(".")[1].split("-")[0] if "." in stem else None for stem in stems}
    if variant in variants:
        return
    if variants:
        raise PriorError(
            f"`{part}` at {str(place)!r} has no weights of variant {variant!r}; pass variant="
            f"{' or '.join(sorted(map(repr, variants)))}"
        )
    if any(n.endswith((".bin", ".pt", ".ckpt")) for n in names):
        raise PriorError(
            f"`{part}` at {str(place)!r} has pickled weights only (.bin), and only safetensors are loaded; convert it "
            "with `pipe.save_pretrained(folder, safe_serialization=True)`"
        )


def _config_of(path: Path, part: str) -> dict[str, Any]:
    """What a part's configuration says. PriorError where there is none: loaders make a part of defaults then."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise PriorError(f"`{part}`: {path} is missing or damaged ({_first_line(error)}); download it anew") from error


def _offline() -> bool:
    """Whether the environment forbids the hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _first_line(error: Exception) -> str:
    """The start of an error's message, for one line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inside, loaders report errors only: no progress bars, no notice that the VAE is an AutoencoderTiny."""
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = diffusers_logging.is_progress_bar_enabled(), transformers_logging.is_progress_bar_enabled()
    for module in (diffusers_logging, transformers_logging):
        module.set_verbosity(logging.ERROR)
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers renames torch_dtype; old versions need it
            yield
    finally:
        for module, level, bar in zip((diffusers_logging, transformers_logging), levels, bars, strict=True):
            module.set_verbosity(level)
            if bar:
                module.enable_progress_bar()
