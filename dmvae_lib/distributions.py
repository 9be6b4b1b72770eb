"""The distributions of Sec. 3 and 4.2: Gaussian and Laplace posteriors, products of experts, likelihoods.

Latent codes lie along the last axis; every log-density and divergence is summed over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from dmvae_lib.errors import DMVAEError


@dataclass(frozen=True)
class DiagonalGaussian:
    """N(mean, diag(exp(logvar))) over the last axis; `mean` and `logvar` are (..., d), d may be 0.
    Raises DMVAEError if the two shapes differ."""

    mean: Tensor
    logvar: Tensor

    def __post_init__(self):
        if self.mean.shape != self.logvar.shape:
            shapes = f"mean has shape {tuple(self.mean.shape)} and logvar {tuple(self.logvar.shape)}"
            raise DMVAEError(f"DiagonalGaussian: {shapes}; give both the same shape (..., d).")

    @classmethod
    def standard(cls, *shape: int, like: Tensor | None = None) -> DiagonalGaussian:
        """N(0, I) of the given shape, with the dtype and device of `like`."""
        zeros = torch.zeros(shape) if like is None else like.new_zeros(shape)
        return cls(zeros, zeros)

    def rsample(self, generator: Generator | None = None, n: int | None = None) -> Tensor:
        """Reparameterised sample, (..., d), or (n, ..., d) if `n` is given."""
        shape = self.mean.shape if n is None else (n, *self.mean.shape)
        noise = torch.randn(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + noise * (0.5 * self.logvar).exp()

    def log_prob(self, z: Tensor) -> Tensor:
        """log N(z), (...): summed over the last axis; `z` broadcasts against the parameters."""
        squared = (z - self.mean).square() * (-self.logvar).exp()
        return -0.5 * (squared + self.logvar + math.log(2 * math.pi)).sum(-1)

    def kl(self, other: DiagonalGaussian | None = None) -> Tensor:
        """KL(self || other), (...), in nats; `other` is N(0, I) by default (Eq. 1)."""
        if other is None:
            return 0.5 * (self.mean.square() + self.logvar.exp() - 1 - self.logvar).sum(-1)
        ratio = self.logvar - other.logvar
        squared = (self.mean - other.mean).square() * (-other.logvar).exp()
        return 0.5 * (squared + ratio.exp() - 1 - ratio).sum(-1)


@dataclass(frozen=True)
class Laplace:
    """Independent Laplace(mean, scale) over the last axis: MMVAE's experts and prior; both (..., d)."""

    mean: Tensor
    scale: Tensor

    def rsample(self, generator: Generator | None = None, n: int | None = None) -> Tensor:
        """Reparameterised sample, (..., d), or (n, ..., d) if `n` is given."""
        shape = self.mean.shape if n is None else (n, *self.mean.shape)
        uniform = torch.rand(shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device) - 0.5
        tail = (1 - 2 * uniform.abs()).clamp_min(torch.finfo(uniform.dtype).tiny)
        return self.mean - self.scale * uniform.sign() * tail.log()

    def log_prob(self, z: Tensor) -> Tensor:
        """log density, (...): summed over the last axis; `z` broadcasts against the parameters."""
        return -((z - self.mean).abs() / self.scale + (2 * self.scale).log()).sum(-1)


@dataclass(frozen=True)
class Mixture:
    """The equal-weight mixture of distributions of the same shape (MMVAE's joint posterior).
    observed: for each component (...) bool, where it takes part (at least one everywhere); None: all do."""

    components: Sequence[Any]
    observed: Sequence[Tensor] | None = None

    @property
    def mean(self) -> Tensor:
        means = torch.stack([component.mean for component in self.components])
        share = self._taking_part(means.shape[:-1])
        return (means * share[..., None]).sum(0) / share.sum(0)[..., None]

    def rsample(self, generator: Generator | None = None, n: int | None = None) -> Tensor:
        """A sample of one component per element, (..., d), or (n, ..., d) if `n` is given."""
        samples = torch.stack([component.rsample(generator, n) for component in self.components])
        shape = samples.shape[1:-1]
        if self.observed is None:
            chosen = torch.randint(len(self.components), shape, generator=generator, device=samples.device)
        else:
            share = self._taking_part(samples.shape[:-1]).float().movedim(0, -1)
            chosen = torch.multinomial(share.flatten(0, -2), 1, generator=generator).view(shape)
        return samples.gather(0, chosen[None, ..., None].expand(1, *samples.shape[1:]))[0]

    def log_prob(self, z: Tensor) -> Tensor:
        """log of the mean of the components' densities, (...)."""
        stacked = torch.stack([component.log_prob(z) for component in self.components])
        share = self._taking_part(stacked.shape)
        return stacked.masked_fill(~share, -math.inf).logsumexp(0) - share.sum(0).to(stacked).log()

    def _taking_part(self, shape: Sequence[int]) -> Tensor:
        if self.observed is None:
            return torch.ones(shape, dtype=torch.bool, device=self.components[0].mean.device)
        masks = torch.stack(list(self.observed))
        return masks.view(len(masks), *(1,) * (len(shape) - masks.dim()), *masks.shape[1:]).expand(shape)


def product_of_experts(
    experts: Sequence[DiagonalGaussian], prior: bool = True, observed: Sequence[Tensor] | None = None
) -> DiagonalGaussian:
    """The normalised product of Gaussian experts, Eq. 2; with `prior` the expert N(0, I) is multiplied in.

    C^-1 = sum_i C_i^-1 and mean = C sum_i C_i^-1 mean_i, computed with log-precisions: each expert's weight
    in the mean is a softmax, so no precision overflows or vanishes. observed: for each expert (...) bool, where it
    takes part; elsewhere its precision is zero, whatever its (finite) parameters.

    Raises DMVAEError for no expert or experts of different shapes.
    """
    if not experts:
        raise DMVAEError("product_of_experts: no expert given; give at least one DiagonalGaussian.")
    shapes = {tuple(expert.mean.shape) for expert in experts}
    if len(shapes) > 1:
        raise DMVAEError(f"product_of_experts: experts of shapes {sorted(shapes)}; all must have the same shape.")
    log_precisions, means = [-expert.logvar for expert in experts], [expert.mean for expert in experts]
    if observed is not None:
        log_precisions = [p.masked_fill(~mask[..., None], -math.inf) for p, mask in zip(log_precisions, observed)]
    if prior:
        log_precisions, means = ([*parts, torch.zeros_like(parts[0])] for parts in (log_precisions, means))
    log_precision = torch.stack(log_precisions)
    mean = (log_precision.softmax(0) * torch.stack(means)).sum(0)
    return DiagonalGaussian(mean, -log_precision.logsumexp(0))


class Likelihood(NamedTuple):
    """p(x | z) given a decoder's output.

    `log_prob(params, x)` returns log p per element, of the shape of `params` (DMVAE sums it over all but the
    leading axes); `mean(params)` returns E[x]. `unit` says that x must lie in [0, 1]. `name` stands in a saved
    model's configuration.
    """

    log_prob: Callable[[Tensor, Tensor], Tensor]
    mean: Callable[[Tensor], Tensor] = lambda params: params
    unit: bool = False
    name: str = "custom"


def bernoulli() -> Likelihood:
    """Bernoulli with logits; grey levels in [0, 1] count as probabilities, as in the paper's experiments."""

    def log_prob(logits: Tensor, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")

    return Likelihood(log_prob, torch.sigmoid, True, "bernoulli")


def gaussian(scale: float = 1.0) -> Likelihood:
    """Gaussian with fixed standard deviation `scale`."""
    constant = math.log(scale) + 0.5 * math.log(2 * math.pi)
    return Likelihood(lambda mean, x: -0.5 * ((x - mean) / scale).square() - constant, name=f"gaussian({scale:g})")


def laplace(scale: float = 1.0) -> Likelihood:
    """Laplace with fixed scale (MMVAE: 0.75)."""
    constant = math.log(2 * scale)
    return Likelihood(lambda mean, x: -(x - mean).abs() / scale - constant, name=f"laplace({scale:g})")
