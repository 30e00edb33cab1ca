"""A short name for a network's weights."""

from __future__ import annotations

import hashlib
from typing import Any


def weights_digest(module: Any, *extra: str) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a module's tensors by name, as float32, and of `extra`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    for text in extra:
        digest.update(text.encode())
    return digest.hexdigest()[:12]
