"""A sparse variational Gaussian process for many answers, with the optimal variational posterior in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from botorch.models.model import Model
from gpytorch.distributions import MultivariateNormal
from linear_operator.operators import to_linear_operator
from torch import Generator, Tensor, nn

from tiltopt.surrogates.data import Data, device_only
from tiltopt.surrogates.gp import GPModel, Project, covariance, cross_covariance, draw_prior
from tiltopt.surrogates.linear import GaussianPosterior, SampledFunction

CHUNK = 8192
JITTER = 1e-6


class SparseGPModel(Model):
    """The covariance of `GPModel`, seen through m inducing points Z.

    With R R' = K_ZZ, a(x) = R^-1 k(Z, x), A = a(X) and B = I + A V^-1 A', V = diag(noise_i):

        mean(x) = c + a(x)' B^-1 A V^-1 (y - c)
        cov(x, x') = k(x, x') - a(x)'a(x') + a(x)' B^-1 a(x')

    Fitting costs O(n m^2), predicting O(m^2 + m d), whatever n is. Hyper-parameters are those of an exact GP on a
    random part of the answers; the inducing points are a random part too.

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
    coefficients: Tensor
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
        cls, data: Data, *, generator: Generator, inducing: int = 512, fit_size: int = 1024, **options: Any
    ) -> SparseGPModel:
        """Hyper-parameters from `fit_size` answers, `inducing` points from the answers, then all answers at once."""
        order = torch.randperm(len(data), generator=generator).to(data.y.device)
        exact = GPModel.fit(data.select(order[:fit_size]), generator=generator, **options)
        with torch.no_grad():
            project, kernel = exact.input_transform, exact.covar_module
            y_mean, y_scale = exact.outcome_transform.means.squeeze(), exact.outcome_transform.stdvs.squeeze()
            constant = exact.mean_module.constant.detach()
            if data.sem is None:
                noise = exact.likelihood.noise.squeeze().expand(len(data))
            else:
                noise = (data.sem / y_scale).square().clamp_min(1e-6)
            Z = project.transform(data.X[order[:inducing]])
            K = kernel(Z).to_dense()
            K.diagonal().add_(JITTER * K.diagonal().mean())
            R = torch.linalg.cholesky(K)
            B, b = torch.eye(len(Z), dtype=Z.dtype, device=Z.device), torch.zeros_like(Z[:, 0])
            target = (data.y - y_mean) / y_scale - constant
            for rows in torch.arange(len(data), device=Z.device).split(CHUNK):
                A = torch.linalg.solve_triangular(R, kernel(Z, project.transform(data.X[rows])).to_dense(), upper=False)
                B += (A / noise[rows]) @ A.T
                b += A @ (target[rows] / noise[rows])
            L = torch.linalg.cholesky(B)
            tensors = {
                "x_mean": project.shift,
                "Z": Z,
                "R": R,
                "L": L,
                "coefficients": torch.cholesky_solve(b[:, None], L)[:, 0],
                "constant": constant,
                "y_mean": y_mean,
                "y_scale": y_scale,
                "noise_variance": exact.noise_variance,
            }
        return cls(project, kernel, tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseGPModel:
        """Moves between devices but stays in float64."""
        return super()._apply(device_only(fn), recurse)

    def _whitened(self, z: Tensor) -> Tensor:
        """a(x), (b) x m x q, of projected points z, (b) x q x k."""
        k = cross_covariance(self.kernel, z, self.Z)
        flat = torch.linalg.solve_triangular(self.R, k.reshape(-1, k.shape[-1]).T, upper=False)
        return flat.T.reshape(k.shape).mT

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: Any = None,
    ) -> GaussianPosterior:
        """Joint Gaussian over the q points of each batch, X (b) x q x d, in reward units."""
        z = self.project.transform(X.to(self.Z))
        a = self._whitened(z)
        mean = self.constant + (a.mT @ self.coefficients[:, None]).squeeze(-1)
        flat = a.mT.reshape(-1, a.shape[-2]).T  # (m, b q): one solve for all batches
        w = torch.linalg.solve_triangular(self.L, flat, upper=False).T.reshape(a.mT.shape).mT
        covariance_ = self.kernel(z).to_dense() - a.mT @ a + w.mT @ w
        if isinstance(observation_noise, Tensor):
            covariance_ = covariance_ + torch.diag_embed(observation_noise.squeeze(-1).expand_as(mean))
        elif observation_noise:
            covariance_ = covariance_ + torch.diag_embed((self.noise_variance / self.y_scale**2).expand_as(mean))
        mvn = MultivariateNormal(self.y_mean + self.y_scale * mean, to_linear_operator(self.y_scale**2 * covariance_))
        posterior = GaussianPosterior(mvn)
        return posterior if posterior_transform is None else posterior_transform(posterior)

    def sample_function(self, generator: Generator, features: int = 2048) -> SampledFunction:
        """One draw of the whole function: a draw of the prior, corrected at the inducing points; for Thompson sampling.

        Source: Wilson et al. 2020, arXiv 2002.09309, eq. 13.
        """
        with torch.no_grad():
            prior = draw_prior(self.kernel, self.Z.shape[1], generator, features, like=self.Z)
            white = torch.randn(len(self.Z), generator=generator, dtype=self.Z.dtype).to(self.Z.device)
            # u in whitened coordinates ~ N(B^-1 b, B^-1)
            u = self.coefficients + torch.linalg.solve_triangular(self.L.mT, white[:, None], upper=True)[:, 0]
            u = u - torch.linalg.solve_triangular(self.R, prior(self.Z)[:, None], upper=False)[:, 0]

        def value(X: Tensor) -> Tensor:
            z = self.project.transform(X.to(self.Z))
            return self.y_mean + self.y_scale * (
                self.constant + prior(z) + (self._whitened(z).mT @ u[:, None]).squeeze(-1)
            )

        return SampledFunction(value)

    def settings(self) -> dict[str, Any]:
        """Nothing beside the tensors."""
        return {}

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> SparseGPModel:
        """The model that `settings` and `state_dict` came from, bit for bit."""

        def group(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        lengths = tensors["kernel.kernels.1.base_kernel.raw_lengthscale"].shape[-1]
        kernel = covariance(lengths if lengths > 1 else None).to(torch.float64)
        kernel.load_state_dict(group("kernel."))
        own = {k: v for k, v in tensors.items() if not k.startswith(("kernel.", "project."))}
        return cls(Project(**group("project.")), kernel, own)
