"""MVAE: a product of Gaussian experts with the prior, trained on sub-sampled bounds (Wu & Goodman 2018)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations

import torch
from torch import Tensor

from dmvae_lib.distributions import DiagonalGaussian, product_of_experts
from dmvae_lib.errors import DMVAEError
from dmvae_lib.models.base import Batch, Modality, Posterior, SharedVAE, Terms

# Standard deviations from 0.0067 to 148: below, an expert is surer than any data justifies; above, its share in the
# product with the prior is nil. With product_of_experts working in log-precisions, this keeps MVAE finite.
LOGVAR_RANGE = (-10.0, 10.0)


class MVAE(SharedVAE):
    """Multimodal VAE: for any subset S of the modalities,

        q(z | x_S)  ~  p(z) prod_{i in S} q(z | x_i),      p(z) = N(0, I),
        ELBO(S)     =  E_{q(z | x_S)}[sum_{i in S} lambda_i log p(x_i | z)] - beta KL(q(z | x_S) || p).

    The prior is an expert always, for a single modality too. The objective is the sum of
    ELBO(S) over the full set, every modality alone, and `random_subsets` sets of 2 to N - 1 modalities, drawn
    anew (without replacement) at each call; N = 2 has none of these. beta is annealed from 0 to 1 by the training.

    Each expert's log-variance is clamped to LOGVAR_RANGE.
    """

    def __init__(self, modalities: Mapping[str, Modality], shared_dim: int, random_subsets: int = 0):
        super().__init__(modalities, shared_dim)
        available = max(2 ** len(self.names) - len(self.names) - 2, 0)
        if not 0 <= random_subsets <= available:
            raise DMVAEError(
                f"MVAE: random_subsets={random_subsets}; {len(self.names)} modalities have {available} subsets besides "
                "the single ones and the full set."
            )
        self.random_subsets = self.arguments["random_subsets"] = random_subsets

    def encode(self, name: str, x: Tensor) -> tuple[DiagonalGaussian, DiagonalGaussian]:
        """The expert of one modality, its log-variance clamped; no private part."""
        private, expert = super().encode(name, x)
        return private, DiagonalGaussian(expert.mean, expert.logvar.clamp(*LOGVAR_RANGE))

    def joint(self, experts: Iterable[DiagonalGaussian]) -> DiagonalGaussian:
        """The product of the experts and the prior."""
        return product_of_experts(list(experts), prior=True)

    def infer(self, batch: Batch) -> Posterior:
        """As for every model; shared[name] is q(z | x_name), the prior expert included."""
        posterior = super().infer(batch)
        return posterior._replace(shared={name: self.joint([q]) for name, q in posterior.shared.items()})

    def loss(self, batch: Batch, beta: float | Tensor = 1.0) -> Terms:
        """The negated sum of bounds. ELBO(S) has the terms "elbo(S)/log_likelihood(name)" and "elbo(S)/kl", with S
        the names joined by commas, as in "elbo(mnist,svhn)/log_likelihood(svhn)" and "elbo(mnist)/kl"."""
        posterior = self.infer_all(batch)
        posteriors = {self.names: posterior.joint} | {(name,): posterior.shared[name] for name in self.names}
        for subset in self._draw_subsets():
            posteriors[subset] = self.infer({name: batch[name] for name in subset}).joint
        parts: dict[str, Tensor] = {}
        for subset, q in posteriors.items():
            parts |= self.elbo(f"elbo({','.join(subset)})", q, {name: posterior.targets[name] for name in subset})
        return Terms(self.negative(parts, beta), parts)

    def _draw_subsets(self) -> list[tuple[str, ...]]:
        if not self.random_subsets:
            return []
        subsets = [s for size in range(2, len(self.names)) for s in combinations(self.names, size)]
        return [subsets[i] for i in torch.randperm(len(subsets))[: self.random_subsets].tolist()]
