"""MVAE: a product of Gaussian experts with the prior, trained on sub-sampled bounds (Wu & Goodman 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from dmvae_lib.distributions import DiagonalGaussian, product_of_experts
from dmvae_lib.errors import DMVAEError
from dmvae_lib.models.base import Batch, Modality, Observed, SharedVAE, Terms

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

    Of an item with the modalities O observed, the full set is O; modalities alone and random sets count where they are
    part of O, each set once: an item with one modality has one bound. The mean is over all items of the batch.

    Each expert's log-variance is clamped to LOGVAR_RANGE.
    """

    def __init__(self, modalities: Mapping[str, Modality], shared_dim: int, random_subsets: int = 0):
        super().__init__(modalities, shared_dim)
        available = max(2 ** len(self.names) - len(self.names) - 2, 0)
        if not 0 <= random_subsets <= available:
            expected = f"0 to {available}, the subsets besides the single modalities and the full set"
            raise DMVAEError(f"MVAE: random_subsets={random_subsets}; expected {expected}.")
        self.random_subsets = self.arguments["random_subsets"] = random_subsets

    def posteriors(self, name: str, statistics: Tensor) -> tuple[DiagonalGaussian, DiagonalGaussian]:
        """The expert of one modality, its log-variance clamped; no private part."""
        private, expert = super().posteriors(name, statistics)
        return private, DiagonalGaussian(expert.mean, expert.logvar.clamp(*LOGVAR_RANGE))

    def joint(self, experts: Sequence[DiagonalGaussian], observed: Sequence[Tensor] | None = None) -> DiagonalGaussian:
        """The product of the experts and the prior."""
        return product_of_experts(experts, prior=True, observed=observed)

    def alone(self, expert: DiagonalGaussian) -> DiagonalGaussian:
        """q(z | x_i), the prior expert included."""
        return self.joint([expert])

    def loss(self, batch: Batch, observed: Observed | None = None, beta: float | Tensor = 1.0) -> Terms:
        """The negated sum of bounds. ELBO(S) has the log-likelihoods "name<-S" and the KL "S", where S is "joint" for
        the full set, a name, or names joined by commas, as in "svhn<-mnist,svhn"."""
        posterior = self.infer_all(batch, observed)
        bounds = {("joint", self.names): (posterior.joint, posterior.several())}
        if len(self.names) > 1:
            bounds |= {(name, (name,)): (q, posterior.present(name)) for name, q in posterior.shared.items()}
        for subset in self._draw_subsets():
            q, mask = self.joint([posterior.experts[name] for name in subset]), posterior.present(*subset)
            if posterior.masks is not None:  # where it is all that the item has, it is the full set
                mask = mask & (torch.stack(list(posterior.masks.values())).sum(0) > len(subset))
            bounds[",".join(subset), subset] = (q, mask)
        terms = Terms(beta=beta)
        for (source, targets), (q, mask) in bounds.items():
            log_likelihoods, kls = self.elbo(source, q, posterior, targets, mask)
            terms.log_likelihoods.update(log_likelihoods)
            terms.kls.update(kls)
        return terms

    def _draw_subsets(self) -> list[tuple[str, ...]]:
        subsets = [s for size in range(2, len(self.names)) for s in combinations(self.names, size)]
        return [subsets[i] for i in torch.randperm(len(subsets))[: self.random_subsets].tolist()]
