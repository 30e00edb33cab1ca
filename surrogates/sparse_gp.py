"""A sparse variational Gaussian process for many answers, with the optimal variational posterior in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from botorch.models.model import Model
from gpytorch.distributions import MultivariateNormal
from linear_operator.operators import to_linear_operator
from torch import Generator, Tensor, nn

from tiltopt.errors import SurrogateError
from tiltopt.notebook import Shown
from tiltopt.surrogates.data import Data, Float64Module
from tiltopt.surrogates.gp import GPModel
from tiltopt.surrogates.kernels import Project, covariance, draw_matern, matern
from tiltopt.surrogates.linear import GaussianPosterior, SampledFunction

CHUNK = 4096
CANDIDATES = 4096  # answers among which the inducing points are chosen
TOLERANCE = 1e-6  # conditional variance, relative to the largest, below which a point adds nothing but rounding
AXES = 2048  # directions of the linear part beyond which only the principal ones are kept


class SparseGPModel(Shown, Float64Module, Model):
    """The covariance of `GPModel`, its linear part v z'z' exactly and its Matern part k through m inducing points Z.

    With R R' = k(Z, Z), a(z) = R^-1 k(Z, z), phi(z) = [sqrt(v) z, a(z)], rows phi(z_i)' of F, V = diag(noise_i) and
    B = I + F' V^-1 F:

        mean(z) = c + phi(z)' w,  w = B^-1 F' V^-1 (y - c)
        cov(z, z') = k(z, z') - a(z)'a(z') + phi(z)' B^-1 phi(z')

    a Bayesian linear model on d + m features plus what the inducing points leave unknown. This is the variational
    posterior of Titsias where the linear part, which d features represent in full, needs no inducing points. Fitting
    costs O(n (d + m)^2), predicting O((d + m)^2), whatever n is. Hyper-parameters are those of an exact GP on a random
    part of the answers.

    Buffers: `Z` (m, d); `R` (m, m); `L` (d + m, d + m), Cholesky factor of B; `weights` (d + m,), w;
    `noise_variance` (), reward units squared, beyond `sem`.

    Source: Titsias 2009, "Variational learning of inducing variables in sparse Gaussian processes", eq. 6 and 10.
    """

    kind: ClassVar[str] = "sparse_gp"
    num_outputs = 1
    batch_shape = torch.Size()
    project: Any
    kernel: Any
    Z: Tensor
    R: Tensor
    L: Tensor
    weights: Tensor
    constant: Tensor
    y_mean: Tensor
    y_scale: Tensor
    noise_variance: Tensor

    def __init__(self, project: Project, kernel: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.project, self.kernel = project, kernel.requires_grad_(False)
        for name, value in tensors.items():
            self.register_buffer(name, value.detach().clone(memory_format=torch.contiguous_format))
        self.eval()

    @classmethod
    def fit(
        cls,
        data: Data,
        *,
        generator: Generator,
        inducing: int | None = None,
        max_dim: int | None = None,
        fit_size: int = 1024,
        max_iterations: int = 100,
        ard_dims: int = 32,
    ) -> SparseGPModel:
        """Hyper-parameters from `fit_size` answers, `inducing` points from the answers, then all answers at once.

        Args:
            generator: chooses the answers for the hyper-parameters and the candidates for inducing points.
            inducing: m, at most; the points are those least known from each other among 4,096 answers. None: as many as
                make d + m 1,280, but at least 512 and at most 1,024.
            max_dim: principal axes kept; None keeps every direction up to 2,048 of them.
            fit_size, max_iterations, ard_dims: see `GPModel.fit`.
        """
        exact = GPModel.tune(
            data,
            generator=generator,
            max_dim=min(data.X.shape[1], AXES) if max_dim is None else max_dim,
            fit_size=fit_size,
            max_iterations=max_iterations,
            ard_dims=ard_dims,
        )
        candidates = torch.randperm(len(data), generator=generator)[:CANDIDATES].to(data.y.device)
        with torch.no_grad():
            y_mean, y_scale = exact.outcome_transform.means.squeeze(), exact.outcome_transform.stdvs.squeeze()
            if data.sem is None:
                noise = exact.likelihood.noise.squeeze().expand(len(data))
            else:
                noise = (data.sem / y_scale).square().clamp_min(1e-6)
            constant = exact.mean_module.constant.detach()
            parts = _Parts.of(exact.covar_module)
            z = exact.input_transform.transform(data.X[candidates])
            Z = _choose(z, parts, min(max(1280 - z.shape[1], 512), 1024) if inducing is None else inducing)
            R = torch.linalg.cholesky(parts.matern(Z, Z))
            target = (data.y - y_mean) / y_scale - constant
            L, weights = _condition(data.X, target, noise, exact.input_transform, parts, Z, R)
        tensors = {"Z": Z, "R": R, "L": L, "weights": weights, "constant": constant, "y_mean": y_mean}
        tensors |= {"y_scale": y_scale, "noise_variance": exact.noise_variance}
        return cls(exact.input_transform, exact.covar_module, tensors)

    @property
    def _operators(self) -> tuple[_Parts, Tensor, Tensor]:
        """The covariance, R^-1 (m, m), and B^-1 less the identity of the a's, (d + m, d + m); computed once."""
        known = self.__dict__.get("_known")
        if known is None or known[1].device != self.R.device:
            with torch.no_grad():
                eye = torch.eye(len(self.R), dtype=self.R.dtype, device=self.R.device)
                inverse = torch.linalg.solve_triangular(self.R, eye, upper=False)
                form = torch.cholesky_inverse(self.L)
                form.diagonal()[-len(eye) :] -= 1.0
                known = (_Parts.of(self.kernel), inverse, form)
            self.__dict__["_known"] = known
        return known

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> GaussianPosterior:
        """Joint Gaussian over the q points of each batch, X (b) x q x d, in reward units."""
        z = self.project.transform(X.to(self.Z))
        parts, inverse, form = self._operators
        phi = parts.features(z, self.Z, inverse)
        mean = self.constant + phi @ self.weights
        prior = parts.matern(z, z) if z.shape[-2] > 1 else parts.outputscale
        joint = prior + QuadraticForm.apply(phi, form)
        if isinstance(observation_noise, Tensor):
            joint = joint + torch.diag_embed(observation_noise.squeeze(-1).expand_as(mean))
        elif observation_noise:
            joint = joint + torch.diag_embed((self.noise_variance / self.y_scale**2).expand_as(mean))
        mvn = MultivariateNormal(self.y_mean + self.y_scale * mean, to_linear_operator(self.y_scale**2 * joint))
        posterior = GaussianPosterior(mvn)
        return posterior if posterior_transform is None else posterior_transform(posterior)

    def sample_function(self, generator: Generator, features: int = 2048) -> SampledFunction:
        """One draw of the whole function, for Thompson sampling: of w ~ N(w, B^-1), and of what phi leaves unknown,

            f(z) = c + phi(z)'w + g(z) - a(z)' R^-1 g(Z)

        with g a draw of the Matern prior from `features` random Fourier features.
        Source: Wilson et al. 2020, arXiv 2002.09309, eq. 13.
        """
        with torch.no_grad():
            parts, inverse, _ = self._operators
            g = draw_matern(self.kernel.kernels[1], self.Z.shape[1], generator, features, like=self.Z)
            white = torch.randn(len(self.L), generator=generator, dtype=self.L.dtype).to(self.L.device)
            w = self.weights + torch.linalg.solve_triangular(self.L.mT, white[:, None], upper=True)[:, 0]
            w[-len(self.Z) :] -= inverse @ g(self.Z)

        def value(X: Tensor) -> Tensor:
            z = self.project.transform(X.to(self.Z))
            return self.y_mean + self.y_scale * (self.constant + parts.features(z, self.Z, inverse) @ w + g(z))

        return SampledFunction(value)

    def leave_one_out(self, data: Data) -> Tensor:
        """log p(y_i | all other answers) at the fitted hyper-parameters and inducing points, (n,), nats, reward units.

        Exact for the linear model on phi: with h_i = phi_i' B^-1 phi_i / v_i, the left-out error is
        residual_i / (1 - h_i) and its variance v_i / (1 - h_i), plus what phi leaves unknown.
        Source: Rasmussen and Williams 2006, eq. 5.10-5.12.
        """
        with torch.no_grad():
            known = self.noise_variance if data.sem is None else (data.sem**2).clamp_min(1e-6 * self.y_scale**2)
            v = known.expand_as(data.y) / self.y_scale**2
            parts, inverse, form = self._operators
            scores = []
            for X, y, noise in zip(data.X.split(CHUNK), data.y.split(CHUNK), v.split(CHUNK), strict=True):
                phi = parts.features(self.project.transform(X), self.Z, inverse)
                whitened = phi[:, -len(self.Z) :].square().sum(dim=1)
                leverage = ((phi @ form) * phi).sum(dim=1) + whitened
                left = (1 - leverage / noise).clamp_min(1e-10)
                variance = noise / left + (parts.outputscale - whitened).clamp_min(0)
                error = ((y - self.y_mean) / self.y_scale - self.constant - phi @ self.weights) / left
                scores.append(torch.distributions.Normal(0.0, variance.sqrt()).log_prob(error) - self.y_scale.log())
            return torch.cat(scores)

    def about(self) -> dict[str, object]:
        return {"inducing points": len(self.Z), "noise sd": f"{float(self.noise_variance.sqrt()):.3g}"}

    def settings(self) -> dict[str, Any]:
        """Nothing beside the tensors."""
        return {}

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> SparseGPModel:
        """The model that `settings` and `state_dict` came from, bit for bit.

        Raises:
            SurrogateError: for tensors of an earlier layout, whose linear part was seen through inducing points.
        """
        if "weights" not in tensors:
            raise SurrogateError(
                "this sparse GP was saved before its linear part was kept exactly (tensor `weights` is missing); "
                "fit it anew from its answers, or use the version that wrote it."
            )

        def group(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        lengths = tensors["kernel.kernels.1.base_kernel.raw_lengthscale"].shape[-1]
        kernel = covariance(lengths if lengths > 1 else None).to(torch.float64)
        kernel.load_state_dict(group("kernel."))
        own = {k: v for k, v in tensors.items() if not k.startswith(("kernel.", "project."))}
        return cls(Project(**group("project.")), kernel, own)


class QuadraticForm(torch.autograd.Function):
    """phi M phi', (..., q, q), for points phi (..., q, p) and a symmetric M (p, p), which gets no gradient.

    The gradient in phi is (G + G') phi M, and phi M is at hand from the value: half the work of plain autograd, where
    these products are nearly all that a posterior costs.
    """

    @staticmethod
    def forward(ctx: Any, phi: Tensor, M: Tensor) -> Tensor:
        """The form."""
        product = phi @ M
        ctx.save_for_backward(phi, M, product)
        return product @ phi.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Differentiable in its turn where autograd asks for that."""
        phi, M, product = ctx.saved_tensors
        product = phi @ M if torch.is_grad_enabled() else product
        return (gradient + gradient.mT) @ product, None


class _Parts(NamedTuple):
    """Numbers of the covariance: v, (), of the linear part, length-scale (1, 1 or d) and scale () of the Matern one."""

    variance: Tensor
    lengthscale: Tensor
    outputscale: Tensor

    @classmethod
    def of(cls, kernel: Any) -> _Parts:
        linear, bent = kernel.kernels
        values = linear.variance.squeeze(), bent.base_kernel.lengthscale, bent.outputscale.squeeze()
        return cls(*(v.detach() for v in values))

    def matern(self, z: Tensor, other: Tensor) -> Tensor:
        return matern(z, other, self.lengthscale, self.outputscale)

    def features(self, z: Tensor, Z: Tensor, inverse: Tensor) -> Tensor:
        """phi, (..., d + m), of projected points z (..., d); `inverse` is R^-1."""
        flat = z.reshape(-1, z.shape[-1])
        a = self.matern(flat, Z) @ inverse.mT
        return torch.cat([self.variance.sqrt() * flat, a], dim=-1).reshape(*z.shape[:-1], -1)


def _choose(z: Tensor, parts: _Parts, count: int) -> Tensor:
    """At most `count` inducing points (m, d) among the points z."""
    diagonal = parts.outputscale.expand(len(z))
    return z[greedy(lambda i: parts.matern(z, z[i : i + 1])[:, 0], diagonal, count)]


def _condition(
    X: Tensor, target: Tensor, noise: Tensor, project: Project, parts: _Parts, Z: Tensor, R: Tensor
) -> tuple[Tensor, Tensor]:
    """L, (d + m, d + m), and the posterior mean of the weights, (d + m,), from all answers, a chunk at a time."""
    inverse = torch.linalg.solve_triangular(R, torch.eye(len(R), dtype=R.dtype, device=R.device), upper=False)
    B = torch.eye(Z.shape[1] + len(Z), dtype=Z.dtype, device=Z.device)
    b = torch.zeros_like(B[0])
    for x, t, v in zip(X.split(CHUNK), target.split(CHUNK), noise.split(CHUNK), strict=True):
        phi = parts.features(project.transform(x), Z, inverse) / v.sqrt()[:, None]
        B.addmm_(phi.T, phi)
        b += phi.T @ (t / v.sqrt())
    L = torch.linalg.cholesky(B)
    return L, torch.cholesky_solve(b[:, None], L)[:, 0]


def greedy(row: Callable[[int], Tensor], diagonal: Tensor, count: int) -> Tensor:
    """Each next point is the one least known from those before: the pivots of an incomplete Cholesky factor.

    O(n count^2) beside `count` rows of the covariance. Stops early where nothing is left to be known, so that the
    covariance of the chosen points has a Cholesky factor without jitter.

    Args:
        row: covariance of point i with all n points, (n,).
        diagonal: (n,), variances.
        count: points wanted.

    Returns:
        Indices of the points, at most `count`, long.

    Source: Burt, Rasmussen and van der Wilk 2020, "Convergence of sparse variational inference in Gaussian processes
    regression", section 4.
    """
    n, count = len(diagonal), min(count, len(diagonal))
    left, floor = diagonal.clone(), TOLERANCE * diagonal.max()
    factor = torch.zeros(count, n, dtype=diagonal.dtype, device=diagonal.device)
    chosen: list[int] = []
    for j in range(count):
        i = int(left.argmax())
        if not left[i] > floor:
            break
        factor[j] = (row(i) - factor[:j, i] @ factor[:j]) / left[i].sqrt()
        left -= factor[j].square()
        left[i] = 0.0
        chosen.append(i)
    return torch.tensor(chosen, dtype=torch.long, device=diagonal.device)
