"""Weight files of rewards: a local file, or owner/repository/file on the hub; read as tensors, never run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltopt.errors import RewardError
from tiltopt.rewards.base import require
from tiltopt.vision import no_progress_bar, why_not, with_words

SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
HUB_FILE = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+/[\w.+/-]+")


def check_file(option: str, value: str) -> None:
    """Raises `RewardOptionError` unless `value` is a local weight file or may be one on the hub; fetches nothing."""
    require(
        Path(value).suffix in SUFFIXES and "://" not in value,
        f"`{option}` must be a file ending in {', '.join(SUFFIXES)}, got {value!r}; download it and give its path.",
    )
    require(
        Path(value).is_file() or (HUB_FILE.fullmatch(value) is not None and not Path(value).parent.is_dir()),
        f"`{option}` must be a local file or owner/repository/file on the hub, and {value!r} does not exist; "
        "check the path.",
    )


def read_tensors(option: str, value: str) -> tuple[Mapping[str, Tensor], str]:
    """The tensors of a weight file by name, and where it lies.

    A state dict that stands alone under `state_dict` in the file is taken out of it.

    Raises:
        RewardError: the file cannot be fetched or read, or holds something else than named tensors.
    """
    path = Path(value) if Path(value).is_file() else _fetch(option, value)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own; whichever it is, the file is of no use
        raise RewardError(
            f"`{option}`: expected a PyTorch or safetensors file of tensors, but {path} cannot be read "
            f"({type(error).__name__}: {str(error)[:200]}); download it again."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    pairs = content.items() if isinstance(content, Mapping) else [(type(content).__name__, None)]
    for name, tensor in pairs:
        if not isinstance(tensor, Tensor):
            raise RewardError(
                f"`{option}`: expected named tensors in {path}, got {name!r} of type {type(tensor).__name__}; give the "
                "state dict of the model alone."
            )
    return content, str(path)


def build(option: str, source: str, cls: Any, config: Any, state: Mapping[str, Tensor], **options: Any) -> Any:
    """A transformers model of `cls` with the tensors of a file, renamed for it; frozen, in float32.

    Args:
        options: of the constructor, beside the configuration.

    Raises:
        RewardError: a tensor is missing, strange, or of another shape than the configuration asks for.
    """
    with torch.device("meta"):
        wanted = cls(config, **options).state_dict()
    missing, strange = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    if missing or strange:
        firsts = [
            f"{len(names)} {what} (first {names[0]})"
            for names, what in ((missing, "are missing"), (strange, "are strange"))
            if names
        ]
        raise RewardError(
            f"`{option}`: expected the weights of a {cls.__name__} in {source}, of which {' and '.join(firsts)}; give "
            "the published checkpoint."
        )
    for name, tensor in wanted.items():
        if tensor.shape != state[name].shape:
            raise RewardError(
                f"`{option}`: expected {name} of shape {tuple(tensor.shape)} in {source}, got "
                f"{tuple(state[name].shape)}; give the published checkpoint."
            )
    floats = {name: tensor.float().contiguous() for name, tensor in state.items()}
    with no_progress_bar():
        model = cls.from_pretrained(None, config=config, state_dict=floats, dtype=torch.float32, **options)
    return model.eval().requires_grad_(False)


def check_words(tokenizer: Any, known: int, source: str) -> None:
    """Raises RewardError where a tokenizer has more tokens than the model that it belongs to."""
    if len(tokenizer) > known:
        raise RewardError(
            f"`tokenizer`: expected at most the {known} tokens that the model in {source} knows, got {len(tokenizer)}; "
            "give the tokenizer that the model was taught with."
        )


def check_heads(widths: Mapping[int, int]) -> None:
    """Raises ValueError unless each width of a transformer is a multiple of its number of heads."""
    for width, heads in widths.items():
        if width % heads:
            raise ValueError(f"a width of {width} is no multiple of {heads} heads")


def misfit(option: str, source: str, expected: str, file: str, error: Exception) -> RewardError:
    """What is told of tensors that are not those of the model they should be; `file` is the published one."""
    why = f"it lacks {error}" if isinstance(error, KeyError) else f"its tensors have other shapes ({error})"
    return RewardError(f"`{option}`: expected {expected} in {source}, but {why}; give {file}.")


def load_tokenizer(cls: Any, source: str) -> Any:
    """A tokenizer of the transformers class `cls`, from a folder or a hub id.

    Raises:
        RewardError: there is none.
    """
    try:
        return with_words(cls.from_pretrained(source))
    except (OSError, ValueError, TypeError) as error:
        raise RewardError(
            f"`tokenizer`: expected a {cls.__name__} at {source}, but it cannot be loaded: {why_not(source, error)}; a "
            f"folder saved by {cls.__name__}.save_pretrained does as well."
        ) from error


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many layers there are: one more than the largest number in place of N in `pattern`, 0 without any."""
    numbered = re.compile(re.escape(pattern).replace("N", r"(\d+)"))
    return 1 + max((int(match[1]) for name in state if (match := numbered.match(name))), default=-1)


def _fetch(option: str, value: str) -> Path:
    """The local copy of owner/repository/file from the hub."""
    from huggingface_hub import constants, hf_hub_download

    owner, repository, filename = value.split("/", 2)
    repo = f"{owner}/{repository}"
    try:
        return Path(hf_hub_download(repo, filename))
    except (OSError, ValueError) as error:
        raise RewardError(
            f"`{option}`: expected {filename} of the hub repository {repo}, but it is not in the cache "
            f"{constants.HF_HUB_CACHE} and cannot be fetched ({type(error).__name__}); where there is a network, "
            f"download https://huggingface.co/{repo}/resolve/main/{filename}, bring it here and set `{option}` to its "
            "path."
        ) from error
