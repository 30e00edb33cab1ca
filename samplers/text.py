"""Prompts into what a UNet is conditioned on: one CLIP text tower (Stable Diffusion), or two (SDXL)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiltopt.errors import PriorError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextTowers:
    """Tokenizers and text encoders, in the order in which their outputs are concatenated.

    Args:
        tokenizers: one per encoder.
        encoders: CLIPTextModel, for SDXL also a CLIPTextModelWithProjection as the last.
        pooled: False for Stable Diffusion (last hidden state of the one encoder), True for SDXL (penultimate hidden
            states of all, and the projected output of the last).
        zero_negative: an empty prompt is encoded as zeros when it serves as the negative (SDXL's convention).
    """

    tokenizers: tuple[Any, ...]
    encoders: tuple[Any, ...]
    pooled: bool = False
    zero_negative: bool = False

    def encode(self, prompts: Sequence[str]) -> Any:
        """B prompts -> (B, L, c), or {"text": (B, L, c), "pooled": (B, p)} when `pooled`. Rows are independent."""
        unique = list(dict.fromkeys(prompts))
        rows = [unique.index(p) for p in prompts]
        with torch.no_grad():
            outputs = [self._run(i, unique) for i in range(len(self.encoders))]
        text = torch.cat([hidden for hidden, _ in outputs], dim=-1)[rows]
        return {"text": text, "pooled": outputs[-1][1][rows]} if self.pooled else text

    def negative(self, prompt: str) -> Any:
        """The negative prompt, as `encode` gives it, with one row."""
        encoded = self.encode([prompt])
        if not (self.zero_negative and prompt == ""):
            return encoded
        return {k: torch.zeros_like(v) for k, v in encoded.items()} if self.pooled else torch.zeros_like(encoded)

    def _run(self, i: int, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """(hidden states, pooled output) of encoder i."""
        tokenizer, encoder = self.tokenizers[i], self.encoders[i]
        device = next(encoder.parameters()).device
        length = tokenizer.model_max_length
        batch = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        for prompt, ids in zip(prompts, tokenizer(prompts)["input_ids"], strict=True):
            if len(ids) > length:
                log.warning("prompt of %d tokens cut to %d: %r", len(ids), length, prompt)
        mask = batch.attention_mask.to(device) if getattr(encoder.config, "use_attention_mask", False) else None
        out = encoder(batch.input_ids.to(device), attention_mask=mask, output_hidden_states=self.pooled)
        return (out.hidden_states[-2], out[0]) if self.pooled else (out[0], out[0])


def check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """The prompts as a tuple.

    Raises:
        PriorError: a single string, an empty list, or something that is not text.
    """
    if isinstance(prompts, str):
        raise PriorError(f"`prompts` must be a list of texts, got one text {prompts!r}; write [{prompts!r}]")
    if len(prompts) == 0:
        raise PriorError("`prompts` must hold at least one text, got an empty list")
    wrong = [p for p in prompts if not isinstance(p, str)]
    if wrong:
        raise PriorError(f"`prompts` must be texts, got {type(wrong[0]).__name__}: {wrong[0]!r}")
    return tuple(prompts)
