"""Types that every folder shares. This module imports nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What a batch of chains is conditioned on: B prompts and what the prior made of them.

    Args:
        prompts: the B prompts, as text.
        embeds: whatever `Prior.encode` produced: None, a tensor with leading dimension B, or a (nested) tuple, list
            or dict of such tensors.
    """

    prompts: tuple[str, ...]
    embeds: Any = None

    def __len__(self) -> int:
        return len(self.prompts)

    def repeat(self, num_particles: int) -> Conditioning:
        """Every prompt `num_particles` times in a row: B rows become B * P, particles of a prompt adjacent."""
        prompts = tuple(p for p in self.prompts for _ in range(num_particles))
        return Conditioning(prompts, _map(self.embeds, lambda t: t.repeat_interleave(num_particles, dim=0)))

    def select(self, index: Sequence[int] | slice) -> Conditioning:
        """The prompts at `index`, in that order."""
        rows = list(range(len(self.prompts)))[index] if isinstance(index, slice) else list(index)
        picked = torch.as_tensor(rows, dtype=torch.long)
        return Conditioning(tuple(self.prompts[i] for i in rows), _map(self.embeds, lambda t: t[picked.to(t.device)]))

    @staticmethod
    def join(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of one after those of the other; their embeds are of one structure."""
        return Conditioning(tuple(p for part in parts for p in part.prompts), _join([part.embeds for part in parts]))


Potential = Callable[[Tensor, Conditioning], Tensor]
"""Designs (n, *design) and their conditioning (n rows) -> log G, shape (n,), in nats."""


def _map(tree: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """`fn` applied to every tensor of a nested structure; None stays None."""
    if tree is None:
        return None
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, dict):
        return {k: _map(v, fn) for k, v in tree.items()}
    if isinstance(tree, (tuple, list)):
        mapped = [_map(v, fn) for v in tree]
        return type(tree)(*mapped) if hasattr(tree, "_fields") else type(tree)(mapped)
    raise TypeError(f"`embeds` must hold tensors, tuples, lists, dicts or None, got {type(tree).__name__}")


def _join(trees: Sequence[Any]) -> Any:
    """Tensors in the same places of nested structures, one after the other; None stays None."""
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(list(trees))
    if isinstance(first, dict):
        return {key: _join([tree[key] for tree in trees]) for key in first}
    joined = [_join(list(column)) for column in zip(*trees, strict=True)]
    return type(first)(*joined) if hasattr(first, "_fields") else type(first)(joined)
