"""Sequences of tokens under a first-order Markov model, as a prior whose denoiser is exact and needs no weights.

A sequence s_1 .. s_L over S tokens is the event of its one-hot rows, (L, S). With noise x = a z + b eps on it, the
likelihood of token s at place l is proportional to exp(a x_ls / b^2), so that the sequence given x is a hidden Markov
model: its marginals, E[z | x], come from the forward-backward recursion, and exact draws of it from forward filtering
and backward sampling. So every kernel of the chain is right, and `draw_clean` needs none of them.

Sources: Rabiner (1989) for the recursions; Fruhwirth-Schnatter (1994) for the draws. The noise on one-hot vectors is
that of Strudel et al., "Self-conditioned embedding diffusion" (arXiv 2211.04236), with the identity as the embedding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from tiltopt.errors import PriorError
from tiltopt.samplers.chain import GaussianChain
from tiltopt.samplers.prior import Reverse, check_prompts
from tiltopt.types import Conditioning


class MarkovPrior:
    """A Gaussian chain over the one-hot rows of Markov sequences, with the exact denoiser.

    Args:
        initial: (S,), probabilities of the first token.
        transition: (S, S), rows are probabilities of the next token; 0 forbids it.
        length: L.
        num_steps: K. The noise share b^2 falls evenly in log odds from .999 to .01, then to 0.
        eta: 0 deterministic, 1 ancestral.

    Raises:
        PriorError: these are no probabilities, or the length is not positive.
    """

    def __init__(
        self, initial: Tensor, transition: Tensor, length: int, *, num_steps: int = 20, eta: float = 1.0
    ) -> None:
        size = len(initial)
        if initial.ndim != 1 or tuple(transition.shape) != (size, size) or length < 1:
            raise PriorError(
                f"expected `initial` (S,), `transition` (S, S) and a length of at least 1, got "
                f"{tuple(initial.shape)}, {tuple(transition.shape)} and {length}."
            )
        for name, table in (("initial", initial[None]), ("transition", transition)):
            if not (torch.isfinite(table).all() and (table >= 0).all() and ((table.sum(1) - 1).abs() < 1e-4).all()):
                raise PriorError(f"`{name}` must hold probabilities that sum to 1.")
        self.log_initial, self.log_transition = initial.double().log(), transition.double().log()
        self.event_shape = torch.Size([length, size])
        odds = torch.linspace(math.log(0.999 / 0.001), math.log(0.01 / 0.99), num_steps, dtype=torch.float64)
        noise = [*torch.sigmoid(odds).tolist(), 0.0]
        self.chain = GaussianChain(tuple((1 - q) ** 0.5 for q in noise), tuple(q**0.5 for q in noise), eta)
        self.num_steps = num_steps
        self.device = torch.device("cpu")

    @classmethod
    def learn(
        cls, sequences: Tensor, size: int, *, pseudo: float = 0.1, num_steps: int = 20, eta: float = 1.0
    ) -> MarkovPrior:
        """The model of largest posterior mean under sequences (n, L) of tokens 0 .. S - 1.

        Args:
            size: S.
            pseudo: counts added to every first token and every transition, seen or not; > 0.
        """
        check_tokens(sequences, size)
        if not pseudo > 0:
            raise PriorError(f"`pseudo` must be > 0, got {pseudo}.")
        first = torch.full((size,), float(pseudo), dtype=torch.float64)
        first += torch.bincount(sequences[:, 0], minlength=size)
        pairs = sequences[:, :-1] * size + sequences[:, 1:]
        counts = pseudo + torch.bincount(pairs.flatten(), minlength=size**2).view(size, size).double()
        return cls(
            first / first.sum(), counts / counts.sum(1, keepdim=True), sequences.shape[1], num_steps=num_steps, eta=eta
        )

    # ---- the prior

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompts mean nothing to this prior."""
        return Conditioning(check_prompts(prompts))

    def initial(self, n: int, generator: Generator) -> Tensor:
        """Normal noise, (n, L, S) float64."""
        noise = torch.randn(n, *self.event_shape, generator=generator, dtype=torch.float64)
        return self.chain.initial_std * noise

    def std(self, k: int) -> float:
        """s_k."""
        return self.chain.std[k]

    def reverse(self, k: int, x: Tensor, cond: Conditioning) -> Reverse:
        """The exact posterior mean, the marginals of the tokens, and the chain's mean."""
        a, b = self.chain.a[k], self.chain.b[k]
        x0 = self.marginals(a / b**2 * x)
        return Reverse(self.chain.mean(k, x0, (x - a * x0) / b), x0)

    def decode(self, x0: Tensor) -> Tensor:
        """Events are designs; `tokens_of` reads them, as a run does whose setting `design` is tokens:S."""
        return x0

    @property
    def fingerprint(self) -> str:
        """Names the model and its chain; a run goes on with no other."""
        tables = torch.cat([self.log_initial[None], self.log_transition]).contiguous()
        said = f"{tuple(self.event_shape)} {self.chain!r} ".encode()
        return hashlib.sha256(said + tables.numpy().tobytes()).hexdigest()[:16]

    def describe(self) -> dict[str, object]:
        """What it is, for a run's record."""
        length, size = self.event_shape
        return {"model": type(self).__name__, "length": length, "tokens": size, "num_steps": self.num_steps}

    # ---- the hidden Markov model

    def marginals(self, evidence: Tensor) -> Tensor:
        """P(token | evidence) at every place, (n, L, S), differentiable.

        Args:
            evidence: (n, L, S), log-likelihood of each token at each place, up to a constant per place.
        """
        forward = self._forward(evidence)
        table = self.log_transition.to(evidence)
        beta = torch.zeros_like(evidence[:, 0])
        after = [beta]
        for place in range(evidence.shape[1] - 1, 0, -1):
            beta = _logsumexp(table + (evidence[:, place] + beta)[:, None, :], dim=2)
            after.append(beta)
        return torch.softmax(torch.stack(forward, 1) + torch.stack(after[::-1], 1), dim=-1)

    def log_likelihood(self, tokens: Tensor) -> Tensor:
        """log p of sequences (n, L), nats; -inf where a transition is forbidden."""
        check_tokens(tokens, self.event_shape[1], self.event_shape[0])
        steps = self.log_transition[tokens[:, :-1], tokens[:, 1:]].sum(1)
        return self.log_initial[tokens[:, 0]] + steps

    def draw_clean(self, x: Tensor, a: float, b: float, generator: Generator) -> Tensor:
        """Exact draws of the sequence given x = a z + b eps: (n, L, S) -> tokens (n, L)."""
        evidence = x.double() * (a / b**2)
        forward = self._forward(evidence)
        table, rows = self.log_transition, []
        logits = forward[-1]
        for place in range(len(forward) - 1, -1, -1):
            token = torch.multinomial(torch.softmax(logits, dim=1), 1, generator=generator).squeeze(1)
            rows.append(token)
            if place:
                logits = forward[place - 1] + table[:, token].T
        return torch.stack(rows[::-1], dim=1)

    def draw(self, n: int, generator: Generator) -> Tensor:
        """n sequences of the model, tokens (n, L)."""
        return self.draw_clean(torch.zeros(n, *self.event_shape, dtype=torch.float64), 0.0, 1.0, generator)

    def _forward(self, evidence: Tensor) -> list[Tensor]:
        """log P(s_l, evidence up to l), (n, S) for each place, up to a constant."""
        table = self.log_transition.to(evidence)
        alpha = self.log_initial.to(evidence) + evidence[:, 0]
        found = [alpha]
        for place in range(1, evidence.shape[1]):
            alpha = _logsumexp(alpha[:, :, None] + table, dim=1) + evidence[:, place]
            found.append(alpha)
        return found


def one_hot(tokens: Tensor, size: int) -> Tensor:
    """Tokens (n, L) -> events (n, L, S) float64."""
    check_tokens(tokens, size)
    return torch.nn.functional.one_hot(tokens, size).double()


def tokens_of(events: Tensor) -> Tensor:
    """The likeliest token of each place: (n, L, S) -> (n, L)."""
    return events.argmax(dim=-1)


def check_tokens(tokens: Tensor, size: int, length: int | None = None) -> None:
    """Refuse what is no table of tokens.

    Raises:
        PriorError: not (n, L) integers in 0 .. S - 1, or of another length; it names the first bad sequence.
    """
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or (length is not None and tokens.shape[1] != length):
        wanted = "L" if length is None else str(length)
        raise PriorError(
            f"sequences must be (n, {wanted}) integers, got {tuple(tokens.shape)} of {str(tokens.dtype)[6:]}."
        )
    bad = ((tokens < 0) | (tokens >= size)).any(dim=1).nonzero()
    if len(bad):
        row = int(bad[0])
        raise PriorError(f"tokens must lie in 0 to {size - 1}; sequence {row} is {tokens[row].tolist()}.")


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient is 0, not NaN, where every term is -inf."""
    peak = x.amax(dim=dim, keepdim=True)
    dead = peak == -math.inf
    safe = torch.where(dead, torch.zeros_like(peak), peak).detach()
    total = (x - safe).exp().sum(dim=dim)
    return torch.where(dead.squeeze(dim), -math.inf, total.clamp_min(1e-300).log() + safe.squeeze(dim))
