"""Where designs fail: the probability that a query comes back with an answer, learnt from those that did not.

    P(answer | x) = sigmoid(f(x)),   f(x) = b + w'z(x),   b ~ N(0, 3^2),   w ~ N(0, tau2 / d I)

z are standardised features. The posterior of f is Laplace's; tau2 maximises its evidence on a grid. With no failure
the probability is 1 everywhere. A sampler tilted by exp(a / alpha) P(answer | x) avoids what is known to fail, and
unknown regions are neither sought nor shunned for it.

Sources: Rasmussen and Williams 2006, algorithms 3.1 and 3.2; MacKay 1992, "The evidence framework applied to
classification networks", for the average of the sigmoid; Gelbart et al. 2014, arXiv 1403.5607, for weighing an
acquisition with the probability of feasibility.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tiltopt.errors import SurrogateError

INTERCEPT_VAR = 9.0
TAU2 = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
LIMIT = 2048
"""Answered queries that are used, the newest; failures are all used, up to as many."""


class FeasibilityModel(nn.Module):
    """P(answer | features); float64, differentiable.

    Buffers: `log_evidence` () nats and `tau2` () of the fit.
    """

    mean: Tensor
    scale: Tensor
    known: Tensor
    slope: Tensor
    factor: Tensor
    root_weight: Tensor
    tau2: Tensor
    log_evidence: Tensor

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name, value.detach().clone())

    @classmethod
    def fit(cls, answered: Tensor, failed: Tensor) -> FeasibilityModel:
        """The classifier of answered (n, d) and failed (m, d) queries' features, oldest first; n, m >= 1.

        Raises:
            SurrogateError: one of them is empty, or features are not finite.
        """
        if len(answered) == 0 or len(failed) == 0:
            raise SurrogateError(
                f"a feasibility model needs answered and failed queries, got {len(answered)} and {len(failed)}."
            )
        X = torch.cat([answered[-LIMIT:], failed[-LIMIT:]]).to(torch.float64)
        if not torch.isfinite(X).all():
            raise SurrogateError("features of answered and failed queries must be finite; check the feature map.")
        labels = torch.ones(len(X), dtype=X.dtype, device=X.device)
        labels[len(answered[-LIMIT:]) :] = -1.0
        mean, scale = X.mean(dim=0), X.std(dim=0)
        scale = torch.where(scale > 1e-9 * X.abs().amax(dim=0), scale, torch.ones_like(scale)) * X.shape[1] ** 0.5
        Z = (X - mean) / scale
        inner = Z @ Z.T
        fits = [(_laplace(tau2 * inner + INTERCEPT_VAR, labels), tau2) for tau2 in TAU2]
        (evidence, slope, root_weight, factor), tau2 = max(fits, key=lambda fit: float(fit[0][0]))
        return cls(
            {
                "mean": mean, "scale": scale, "known": Z, "slope": slope, "factor": factor,
                "root_weight": root_weight, "tau2": torch.tensor(tau2, dtype=X.dtype), "log_evidence": evidence,
            }
        )  # fmt: skip

    def log_probability(self, X: Tensor) -> Tensor:
        """(..., d) -> (...) log P(answer | x), nats, <= 0."""
        z = (X.to(device=self.mean.device, dtype=self.mean.dtype) - self.mean) / self.scale
        cross = self.tau2 * (z @ self.known.T) + INTERCEPT_VAR
        mean = cross @ self.slope
        solved = torch.linalg.solve_triangular(self.factor, (cross * self.root_weight).mT, upper=False)
        prior = self.tau2 * z.square().sum(dim=-1) + INTERCEPT_VAR
        variance = (prior - solved.square().sum(dim=-2)).clamp_min(0)
        return F.logsigmoid(mean / (1 + math.pi * variance / 8).sqrt())


def _laplace(K: Tensor, labels: Tensor, steps: int = 100) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mode of the posterior of f at the data, for the logistic likelihood of labels -1, 1 and covariance K (n, n).

    Returns:
        Log evidence, gradient of the log likelihood at the mode (n,), square root of its negative curvature (n,), and
        the Cholesky factor of I + W^1/2 K W^1/2.
    """
    target = (labels + 1) / 2
    f = torch.zeros_like(labels)
    a = torch.zeros_like(labels)
    eye = torch.eye(len(labels), dtype=K.dtype, device=K.device)
    objective = -math.inf
    for _ in range(steps):
        p = torch.sigmoid(f)
        root = (p * (1 - p)).sqrt()
        L = torch.linalg.cholesky(eye + root[:, None] * K * root)
        b = root.square() * f + target - p
        step = b - root * torch.cholesky_solve((root * (K @ b))[:, None], L)[:, 0] - a
        size = 1.0
        while True:  # halve Newton's step until the objective does not fall; it is concave, so this ends
            trial = a + size * step
            g = K @ trial
            value = float(-0.5 * trial @ g + F.logsigmoid(labels * g).sum())
            if value >= objective or size < 1e-6:
                break
            size /= 2
        done = value - objective < 1e-10 * (1 + abs(value))
        a, f, objective = trial, g, value
        if done:
            break
    p = torch.sigmoid(f)
    root = (p * (1 - p)).sqrt()
    L = torch.linalg.cholesky(eye + root[:, None] * K * root)
    evidence = torch.as_tensor(objective, dtype=K.dtype) - L.diagonal().log().sum()
    return evidence, target - p, root, L
