"""A denoiser of one's own as a prior: an unconditional DDPM, a scientific diffusion model, audio.

    prior = TorchPrior(model, alphas_cumprod=abar, event_shape=(1, 16000), prediction="v", num_steps=50)

`model(x, t)` answers at x (n, *event) and the index t (n,) of the noise level in the table that it was trained on.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Generator, Tensor, nn

from tiltopt.digest import content_digest
from tiltopt.errors import PriorError
from tiltopt.notebook import Shown
from tiltopt.samplers.chain import GaussianChain, Prediction, Schedule, exploding, flow, preserving
from tiltopt.samplers.prior import Reverse, check_prompts
from tiltopt.types import Conditioning

_KINDS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample", "edm": "sample", "flow": "flow"}


class TorchPrior(Shown):
    """Any denoiser over any event shape, on the Gaussian chain of its noise levels.

    Args:
        model: model(x (n, *event), t (n,) int64) -> (n, *event), in the units of `prediction`; t are indices into the
            table below. With `encode_cond` it is called as model(x, t, embeds). A module is put in inference mode.
        alphas_cumprod: signal powers abar of the T training levels, falling: x = sqrt(abar) x0 + sqrt(1 - abar) eps.
        sigmas: instead, noise levels of the T training levels, rising or falling: x = x0 + sigma eps. For
            prediction="flow" they are the times: x = (1 - t) x0 + t eps.
        event_shape: of one event, without the batch.
        prediction: "epsilon", "v" (sqrt(abar) eps - sqrt(1 - abar) x0), "sample" (x0), "edm" (what a preconditioned
            network returns, D(x; sigma) of arXiv 2206.00364, eq. 7, which is x0), "flow" (eps - x0).
        num_steps: K <= T kernels, evenly through the table from its noisiest level on; the last ends without noise.
        eta: in [0, 1]: 1 ancestral, 0 deterministic.
        decode: clean events (n, *event) -> designs (n, ...); None: events are designs.
        encode_cond: B prompts -> a tensor, or a nested tuple, list or dict of tensors, with B rows.
        clip: x0 is clipped to [-clip, clip]; None for no clipping.
        device: where events live; None: where the model's parameters are.
        dtype: of events.
    Raises:
        PriorError: the table, the prediction or a number cannot make a chain.
    """

    def __init__(
        self,
        model: Callable[..., Tensor],
        *,
        alphas_cumprod: Any = None,
        sigmas: Any = None,
        event_shape: Sequence[int],
        prediction: Literal["epsilon", "v", "sample", "edm", "flow"] = "epsilon",
        num_steps: int,
        eta: float = 1.0,
        decode: Callable[[Tensor], Tensor] | None = None,
        encode_cond: Callable[[Sequence[str]], Any] | None = None,
        clip: float | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if prediction not in _KINDS:
            raise PriorError(f"`prediction` must be one of {', '.join(_KINDS)}, got {prediction!r}")
        if (alphas_cumprod is None) == (sigmas is None):
            raise PriorError("expected either `alphas_cumprod` or `sigmas`, the noise levels of the model's training")
        if sigmas is None and prediction in ("edm", "flow"):
            raise PriorError(f"prediction={prediction!r} needs `sigmas` instead of `alphas_cumprod`")
        if sigmas is not None and prediction == "v":
            raise PriorError("prediction='v' is defined for variance-preserving noise; give `alphas_cumprod`")
        self.model, self.event_shape = model, torch.Size(event_shape)
        if sigmas is None:
            table = _table(alphas_cumprod, "alphas_cumprod")
            indices = _spread(np.argsort(-table, kind="stable"), num_steps)
            if table.min() < 0 or table.max() > 1 or (np.diff(table) >= 0).any():
                raise PriorError("`alphas_cumprod` must fall within [0, 1], from the cleanest level to the noisiest")
            chain = preserving([*table[indices].tolist(), 1.0], eta)
        else:
            table = _table(sigmas, "sigmas")
            order = np.argsort(table, kind="stable")
            indices = _spread(order[table[order] > 0], num_steps)
            if table.min() < 0 or (prediction == "flow" and table.max() > 1):
                raise PriorError(f"`sigmas` must be >= 0 (and <= 1 for a flow), got {table.min()} .. {table.max()}")
            chain = (flow if prediction == "flow" else exploding)([*table[indices].tolist(), 0.0], eta)
        family = "preserving" if sigmas is None else "flow" if prediction == "flow" else "exploding"
        times = tuple(float(i) for i in indices)
        self.schedule = Schedule(chain, times, Prediction(_KINDS[prediction], clip), family)  # type: ignore[arg-type]
        self.chain: GaussianChain = chain
        self.num_steps, self.dtype = chain.num_steps, dtype
        self._decode, self._encode = decode, encode_cond
        self._design_shape: torch.Size | None = None
        if isinstance(model, nn.Module):
            model.eval().requires_grad_(False)
            device = device or next((p.device for p in model.parameters()), None)
        self.device = torch.device(device or "cpu")

    def about(self) -> dict[str, object]:
        events = "x".join(map(str, self.event_shape))
        return {"steps": self.num_steps, "eta": f"{self.chain.eta:g}", "events": events, "device": self.device}

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts through `encode_cond`; without it they mean nothing.

        Raises:
            PriorError: `encode_cond` returned something else than tensors with a row for each prompt.
        """
        checked = check_prompts(prompts)
        embeds = None if self._encode is None else self._encode(checked)
        for leaf in _leaves(embeds):
            if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != len(checked):
                got = f"shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise PriorError(f"`encode_cond` must return tensors with {len(checked)} rows, one a prompt, got {got}")
        return Conditioning(checked, embeds)

    def initial(self, n: int, generator: Generator) -> Tensor:
        """(n, *event) of the chain's first standard deviation, drawn on the generator's device."""
        noise = torch.randn(n, *self.event_shape, generator=generator, device=generator.device, dtype=self.dtype)
        return (self.chain.initial_std * noise).to(self.device)

    def std(self, k: int) -> float:
        """Standard deviation of kernel k."""
        return self.chain.std[k]

    def reverse(self, k: int, x: Tensor, cond: Conditioning) -> Reverse:
        """Mean of kernel k and the estimate of the clean event, (n, *event); one call of the model."""
        t = torch.full((len(x),), int(self.schedule.times[k]), device=x.device, dtype=torch.int64)
        output = self.model(x, t) if self._encode is None else self.model(x, t, cond.embeds)
        if not isinstance(output, Tensor) or output.shape != x.shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise PriorError(
                f"`model(x, t)` must return a tensor of the shape of x, {tuple(x.shape)}, got {got}; a diffusers UNet "
                "returns an object: pass lambda x, t: unet(x, t).sample"
            )
        return Reverse(*self.schedule.step(k, output.to(x.dtype), x))

    def decode(self, x0: Tensor) -> Tensor:
        """Designs (n, ...) of clean events.

        Raises:
            PriorError: the decoder returned another number of rows, another shape than before, or NaN.
        """
        if self._decode is None:
            return x0
        designs = self._decode(x0)
        got = tuple(designs.shape) if isinstance(designs, Tensor) else type(designs).__name__
        if not isinstance(designs, Tensor) or designs.ndim == 0 or len(designs) != len(x0):
            raise PriorError(f"`decode` must return one design per event, a tensor ({len(x0)}, ...), got {got}")
        self._design_shape = self._design_shape or designs.shape[1:]
        if designs.shape[1:] != self._design_shape:
            raise PriorError(
                f"`decode` must return designs of one shape, {tuple(self._design_shape)} so far, got {got}"
            )
        if not bool(torch.isfinite(designs).all()):
            raise PriorError("`decode` must return finite designs, got NaN or infinity; half precision can overflow")
        return designs

    @cached_property
    def fingerprint(self) -> str:
        """12 hexadecimal digits over noise levels, eta and the weights of every module that `model`, `decode` and
        `encode_cond` are or name. What a function computes without modules is not in it."""
        found = (module for given in (self.model, self._decode, self._encode) for module in _modules(given))
        modules = {id(module): module for module in found}.values()
        levels = json.dumps([self.chain.a, self.chain.b, self.schedule.times])
        eta = [] if self.chain.eta == 1.0 else [f"eta {self.chain.eta}"]
        return content_digest(modules, levels, repr(self.schedule.prediction), *eta)


def _leaves(tree: Any) -> Iterator[Any]:
    """What a nested structure of embeddings holds."""
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from _leaves(branch)
    elif tree is not None:
        yield tree


def _modules(thing: Any, depth: int = 3) -> Iterator[nn.Module]:
    """The modules that a function reaches by name: itself, what it is bound to, what its closure, its globals and the
    attributes of these hold (a pipeline's network, say)."""
    if isinstance(thing, nn.Module):
        yield thing
    elif depth and thing is not None and not isinstance(thing, type) and not inspect.ismodule(thing):
        reached: list[Any] = []
        if isinstance(thing, partial):
            reached = [thing.func, *thing.args, *thing.keywords.values()]
        elif inspect.ismethod(thing):
            reached = [thing.__self__, thing.__func__]
        elif inspect.isfunction(thing):
            named = inspect.getclosurevars(thing)
            reached = [*named.nonlocals.values(), *named.globals.values(), *(thing.__defaults__ or ())]
        elif hasattr(thing, "__dict__"):
            reached = list(vars(thing).values())
        for one in reached:
            yield from _modules(one, depth - 1)


def _table(values: Any, name: str) -> np.ndarray:
    """Noise levels as a vector of float64."""
    table = np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=np.float64)
    if table.ndim != 1 or len(table) == 0 or not np.isfinite(table).all():
        raise PriorError(f"`{name}` must be a vector of finite numbers, got shape {table.shape}")
    return table


def _spread(indices: np.ndarray, num_steps: int) -> np.ndarray:
    """`num_steps` of the indices (cleanest level first), noisiest first; the noisiest is always among them."""
    if not 1 <= num_steps <= len(indices):
        raise PriorError(f"`num_steps` must lie in 1 .. {len(indices)} (the noise levels), got {num_steps}")
    at = np.round(len(indices) * (1 - np.arange(num_steps) / num_steps)).astype(int) - 1
    return indices[at]
