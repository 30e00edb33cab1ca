"""Gaussian process surrogates: exact to a few thousand answers, sparse variational beyond."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from botorch.models import SingleTaskGP
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import Standardize
from botorch.optim.fit import fit_gpytorch_mll_scipy
from gpytorch.constraints import GreaterThan
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import AdditiveKernel, Kernel, LinearKernel, MaternKernel, ScaleKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood, GaussianLikelihood
from gpytorch.mlls import ExactMarginalLogLikelihood
from gpytorch.priors import GammaPrior, LogNormalPrior
from linear_operator.operators import to_linear_operator
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Generator, Tensor, nn

from tiltopt.errors import SurrogateError
from tiltopt.surrogates.data import Data, device_only
from tiltopt.surrogates.linear import GaussianPosterior, SampledFunction

EXACT_LIMIT = 8192  # answers beyond which an exact GP does not fit a laptop


class Project(InputTransform, nn.Module):
    """x -> (x - shift) / scale, then, if there are axes, onto them: standardised features of mean square norm 1.

    The mean squared distance of two points comes out as about 2 whatever d is, which fixes the scale of the
    length-scale prior. Without axes no direction is lost, so that a point off the span of the answers stays uncertain.

    Args:
        shift, scale: (d,); axes: (d, k), orthonormal principal axes, or None to keep all directions.
    """

    shift: Tensor
    scale: Tensor
    axes: Tensor | None

    def __init__(self, shift: Tensor, scale: Tensor, axes: Tensor | None = None) -> None:
        super().__init__()
        for name, value in (("shift", shift), ("scale", scale), ("axes", axes)):
            self.register_buffer(name, None if value is None else value.detach().contiguous().clone())
        self.transform_on_train, self.transform_on_eval, self.transform_on_fantasize = True, True, True
        self.is_one_to_many = False

    @classmethod
    def learn(cls, X: Tensor, max_dim: int | None, relevance: Tensor | None = None) -> Project:
        """From features (n, d), keeping at most `max_dim` principal axes (all directions if None or at least d).

        Args:
            relevance: (d,), factors on the standardised features, mean square 1; None: all alike.
        """
        shift, scale = X.mean(dim=0), X.std(dim=0)
        varies = scale > 1e-9 * X.abs().amax(dim=0)
        if not varies.any():
            raise SurrogateError("no feature varies between the answers: a GP has nothing to learn from; check them.")
        scale = torch.where(varies, scale, scale[varies].log().mean().exp()) * varies.sum().sqrt()
        scale = scale if relevance is None else scale / relevance
        if max_dim is None or max_dim >= X.shape[1]:
            return cls(shift, scale)
        z = (X - shift) / scale
        return cls(shift, scale, torch.linalg.eigh(z.T @ z)[1][:, -max_dim:])

    @property
    def dim(self) -> int:
        """k, the directions that are kept."""
        return len(self.shift) if self.axes is None else self.axes.shape[1]

    def transform(self, X: Tensor) -> Tensor:
        """(..., d) -> (..., k)."""
        z = (X - self.shift) / self.scale
        return z if self.axes is None else z @ self.axes

    def equals(self, other: InputTransform) -> bool:
        """Whether the other one is the same map."""
        if not isinstance(other, Project) or (self.axes is None) != (other.axes is None):
            return False
        pairs = [(self.shift, other.shift), (self.scale, other.scale), (self.axes, other.axes)]
        return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)


class GPModel(SingleTaskGP):
    """Exact GP on projected features: constant mean, linear + Matern-5/2 covariance, standardised answers.

    Where the error `sem` of each answer is known it is the likelihood's noise, and nothing is inferred beside it.
    """

    kind: ClassVar[str] = "gp"
    outcome_transform: Any
    input_transform: Any
    likelihood: Any
    covar_module: Any
    mean_module: Any

    def __init__(self, data: Data, project: Project, ard: bool = False) -> None:
        self.data = data  # plain, not a buffer: BoTorch must neither transform nor cast it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # BoTorch wants unit-cube inputs; ours are standardised and projected
            super().__init__(
                data.X,
                data.y[:, None],
                train_Yvar=None if data.sem is None else _floored(data)[:, None],
                likelihood=noise_model() if data.sem is None else None,
                covar_module=covariance(project.dim if ard else None),
                outcome_transform=Standardize(1),
                input_transform=project,
            )

    @classmethod
    def fit(
        cls,
        data: Data,
        *,
        generator: Generator,
        max_dim: int | None = None,
        fit_size: int = 1024,
        max_iterations: int = 100,
        ard_dims: int = 32,
    ) -> GPModel:
        """Hyper-parameters by marginal likelihood on at most `fit_size` random answers, then all answers as data.

        Args:
            generator: chooses the answers for the hyper-parameters when there are more than `fit_size`.
            max_dim: principal axes kept; None keeps every direction.
            fit_size: answers used to find the hyper-parameters; each iteration costs O(fit_size^3).
            max_iterations: of L-BFGS-B.
            ard_dims: with no more features than these (or axes kept), each gets a length-scale of its own
                (automatic relevance determination); with more, all share one.

        Raises:
            SurrogateError: beyond 8192 answers; `SparseGPModel` or `linear` go further.
        """
        if len(data) > EXACT_LIMIT:
            raise SurrogateError(
                f"an exact GP takes at most {EXACT_LIMIT} answers, got {len(data)}; lower `sparse_above`."
            )
        project = Project.learn(data.X, max_dim, data.relevance)
        part = data
        if len(data) > fit_size:
            part = data.select(torch.randperm(len(data), generator=generator)[:fit_size].to(data.y.device))
        ard = project.dim <= ard_dims
        model = cls(part, project, ard).to(data.X)
        mll = ExactMarginalLogLikelihood(model.likelihood, model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a stopped line search still leaves the best point found
            fit_gpytorch_mll_scipy(mll, options={"maxiter": max_iterations})
        if part is not data:
            full = cls(data, project, ard).to(data.X)
            _copy_hyperparameters(model, full)
            model = full
        return model.requires_grad_(False).eval()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPModel:
        """Moves between devices but stays in float64."""
        return super()._apply(device_only(fn))

    def posterior(  # type: ignore[override]  # the signature of BoTorch's multi-output GPs
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> GaussianPosterior:
        """Joint Gaussian over the q points of each batch, X (b) x q x d, in reward units.

        Solved against one factor of K + V that is kept: gpytorch's own road copies all answers once per batch, which
        for 64 particles and 4,096 answers takes gigabytes. Points get a gradient, hyper-parameters none.
        """
        z = self.input_transform.transform(X.to(self.train_targets))
        train, factor, coefficients = self._solution
        k = cross_covariance(self.covar_module, z, train)  # (b) x q x n
        mean = self.mean_module.constant + k @ coefficients
        flat = k.reshape(-1, k.shape[-1])
        v = torch.linalg.solve_triangular(factor, flat.T, upper=False).T.reshape(k.shape)
        joint = self.covar_module(z).to_dense() - v @ v.mT
        if isinstance(observation_noise, Tensor):
            joint = joint + torch.diag_embed(observation_noise.squeeze(-1).expand_as(mean))
        elif observation_noise:
            joint = joint + torch.diag_embed(self.likelihood.noise.mean().expand_as(mean))
        shift, scale = self.outcome_transform.means.squeeze(), self.outcome_transform.stdvs.squeeze()
        mvn = MultivariateNormal(shift + scale * mean, to_linear_operator(scale**2 * joint))
        posterior = GaussianPosterior(mvn)
        return posterior if posterior_transform is None else posterior_transform(posterior)

    @property
    def _solution(self) -> tuple[Tensor, Tensor, Tensor]:
        """Projected answers (n, k), Cholesky factor of K + V (n, n), and (K + V)^-1 (y - c) (n,); computed once."""
        known = self.__dict__.get("_solved")
        if known is None or known[0].device != self.train_targets.device:
            with torch.no_grad():
                z = self.input_transform.transform(self.data.X.to(self.train_targets))
                K = self.covar_module(z).to_dense()
                K.diagonal().add_(self.likelihood.noise.reshape(-1).expand(len(z)))
                factor = psd_safe_cholesky(K)
                target = self.standardised(self.data.y.to(z)) - self.mean_module.constant
                known = (z, factor, torch.cholesky_solve(target[:, None], factor)[:, 0])
            self.__dict__["_solved"] = known
        return known

    @property
    def noise_variance(self) -> Tensor:
        """Noise of an answer beyond its known error, reward units squared, ()."""
        if self.fixed:
            return torch.zeros_like(self.train_targets[0])
        return (self.likelihood.noise.squeeze() * self.outcome_transform.stdvs.squeeze() ** 2).detach()

    def standardised(self, y: Tensor) -> Tensor:
        """Answers (n,) in the units the GP works in."""
        return (y - self.outcome_transform.means.squeeze()) / self.outcome_transform.stdvs.squeeze()

    @property
    def fixed(self) -> bool:
        """Whether the error of each answer was given."""
        return isinstance(self.likelihood, FixedNoiseGaussianLikelihood)

    def sample_function(self, generator: Generator, features: int = 2048) -> SampledFunction:
        """One draw f of the whole function, a deterministic BoTorch model; for Thompson sampling.

            f(x) = g(x) + k(x, X) (K + V)^-1 (y - g(X) - e), g a draw of the prior, e one of the noise

        Exact but for the Matern part of g, which is drawn from `features` random Fourier features.
        Source: Matheron's rule; Wilson et al. 2020, arXiv 2002.09309, eq. 12.
        """
        with torch.no_grad():
            z, factor, _ = self._solution
            g = draw_prior(self.covar_module, z.shape[1], generator, features, like=z)
            noise = self.likelihood.noise.reshape(-1).expand(len(z))
            error = noise.sqrt() * torch.randn(len(z), generator=generator, dtype=z.dtype).to(z.device)
            target = self.standardised(self.data.y.to(z)) - self.mean_module.constant - g(z) - error
            coefficients = torch.cholesky_solve(target[:, None], factor)[:, 0]

        def value(X: Tensor) -> Tensor:
            new = self.input_transform.transform(X.to(z))
            update = cross_covariance(self.covar_module, new, z) @ coefficients
            transform = self.outcome_transform
            constant = self.mean_module.constant
            return transform.means.squeeze() + transform.stdvs.squeeze() * (constant + g(new) + update)

        return SampledFunction(value)

    def settings(self) -> dict[str, Any]:
        """Nothing beside the tensors."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Answers, input map and hyper-parameters: what `restore` needs."""
        out = {f"data.{k}": v for k, v in vars(self.data).items() if isinstance(v, Tensor)}  # the moments follow from X
        out |= {f"project.{k}": v for k, v in self.input_transform.state_dict().items()}
        for part in ("covar_module", "mean_module", "likelihood"):
            if part != "likelihood" or not self.fixed:
                out |= {f"{part}.{k}": v for k, v in getattr(self, part).state_dict().items()}
        return out

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> GPModel:
        """The model that `settings` and `tensors` came from, bit for bit."""

        def group(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        ard = tensors["covar_module.kernels.1.base_kernel.raw_lengthscale"].shape[-1] > 1
        known = group("data.")
        data = Data(known["X"], known["y"], known.get("sem"), known.get("relevance"))
        model = cls(data, Project(**group("project.")), ard)
        for part in ("covar_module", "mean_module", "likelihood"):
            if group(f"{part}."):
                getattr(model, part).load_state_dict(group(f"{part}."))
        return model.requires_grad_(False).eval()

    def leave_one_out(self, data: Data) -> Tensor:
        """log p(y_i | all other answers) at the fitted hyper-parameters, (n,), nats, reward units; exact, no refit.

        Source: Rasmussen and Williams 2006, eq. 5.10-5.12.
        """
        with torch.no_grad():
            scale = self.outcome_transform.stdvs.squeeze()
            y = self.standardised(data.y)
            known = self.noise_variance / scale**2 if data.sem is None else _floored(data) / scale**2
            x = self.input_transform.transform(data.X)
            K = self.covar_module(x).to_dense() + torch.diag_embed(known.expand(len(y)))
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(K))
            residual = y - self.mean_module(x)
            variance = 1 / inverse.diagonal()
            z = (inverse @ residual) * variance
            return torch.distributions.Normal(0.0, variance.sqrt()).log_prob(z) - scale.log()


def cross_covariance(kernel: Any, z: Tensor, train: Tensor) -> Tensor:
    """k(z, train), (b) x q x n, for points (b) x q x k and answers (n, k), without a copy of the answers per batch."""
    return kernel(z.reshape(-1, z.shape[-1]), train).to_dense().reshape(*z.shape[:-1], len(train))


def draw_prior(
    kernel: AdditiveKernel, dim: int, generator: Generator, features: int, like: Tensor
) -> Callable[[Tensor], Tensor]:
    """One function from the zero-mean prior of `covariance`, z (..., k) -> (...): exact linear part, Fourier features.

    Source: Rahimi and Recht 2007; the Matern-5/2 spectral density is a multivariate Student t with 5 degrees of
    freedom.
    """
    linear, matern = kernel.kernels

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=like.dtype).to(like.device)

    radius = normal(features, 5).square().mean(dim=1).sqrt()
    frequency = normal(features, dim) / radius[:, None] / matern.base_kernel.lengthscale
    phase = 2 * math.pi * torch.rand(features, generator=generator, dtype=like.dtype).to(like.device)
    amplitude = normal(features) * (2 * matern.outputscale / features).sqrt()
    slope = normal(dim) * linear.variance.squeeze().sqrt()
    return lambda z: torch.cos(z @ frequency.T + phase) @ amplitude + z @ slope


def covariance(ard: int | None = None) -> Kernel:
    """Linear plus Matern-5/2, with weak priors at the scale of `Project`; `ard` length-scales, one for all if None."""
    linear = LinearKernel(variance_prior=GammaPrior(1.5, 1.0))
    base = MaternKernel(nu=2.5, ard_num_dims=ard, lengthscale_prior=LogNormalPrior(0.5, 1.0))
    return AdditiveKernel(linear, ScaleKernel(base, outputscale_prior=GammaPrior(1.5, 1.0)))


def noise_model() -> GaussianLikelihood:
    """Homoscedastic noise, standardised units: a prior around a tenth of the variance, wide enough to be overruled."""
    prior = LogNormalPrior(-2.0, 1.5)
    return GaussianLikelihood(noise_prior=prior, noise_constraint=GreaterThan(1e-6, initial_value=0.1))


def _floored(data: Data) -> Tensor:
    """Known variances, floored at a millionth of the variance of the answers so that the GP stays solvable."""
    assert data.sem is not None
    return data.sem.square().clamp_min(1e-6 * data.y.var())


def _copy_hyperparameters(source: GPModel, target: GPModel) -> None:
    """Kernel, mean and noise of `source`, rescaled from the units its answers were standardised in."""
    target.covar_module.load_state_dict(source.covar_module.state_dict())
    target.mean_module.load_state_dict(source.mean_module.state_dict())
    if not source.fixed:
        target.likelihood.load_state_dict(source.likelihood.state_dict())
