"""DMVAE: private and shared latent spaces, a product of experts, every cross-reconstruction (Sec. 4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from dmvae_lib.distributions import DiagonalGaussian, product_of_experts
from dmvae_lib.errors import DMVAEError
from dmvae_lib.models.base import Batch, Modality, MultimodalVAE, Observed, Posterior, Terms, batch_mean


class DMVAE(MultimodalVAE):
    """Private-shared disentangled multimodal VAE for N >= 1 modalities.

    The objective, Eq. 3, is one evidence lower bound for every target i and source s of the shared code,

        x_i <- s:   lambda_i E[log p(x_i | z_pi, z_s)] - KL(q(z_pi | x_i) || p) - KL(q(z_s | s) || p),

    where s is "joint" (the product of all experts with the prior, Eq. 2), i itself, or any other modality.
    Each carries its own KLs; one sample of z_pi serves all reconstructions of x_i.

    Of an item with the modalities O observed, i and s run over O, and the joint posterior is the product over O with
    the prior. With one modality observed the joint posterior is that modality's expert (end of Sec. 4.2), and the item
    has one bound, its self-reconstruction. The mean is over all items of the batch.

    without: bounds to leave out by name ("svhn<-mnist", "mnist<-joint", …), or one term of them by the name that
        `Terms.flat` gives it ("log_likelihood(svhn<-joint)"): this is how Table 3 is made.
    """

    def __init__(self, modalities: Mapping[str, Modality], shared_dim: int, without: Iterable[str] = ()):
        super().__init__(modalities, shared_dim)
        self.without = frozenset(without)
        self.arguments["without"] = sorted(self.without)
        bounds = [f"{target}<-{source}" for target in self.names for source in ("joint", *self.names)]
        known = {name for bound in bounds for name in (bound, *terms_of(bound))}
        if unknown := self.without - known:
            expected = f"names among {', '.join(bounds)}, or one of their terms, as in {', '.join(terms_of(bounds[0]))}"
            raise DMVAEError(f"DMVAE: unknown terms {sorted(unknown)}; expected {expected}.")

    def joint(self, experts: Sequence[DiagonalGaussian], observed: Sequence[Tensor] | None = None) -> DiagonalGaussian:
        """Eq. 2 with the prior expert; a single observed modality out of several stands alone (end of Sec. 4.2)."""
        if len(experts) == 1 < len(self.names):
            return experts[0]
        product = product_of_experts(experts, prior=True, observed=observed)
        if observed is None or len(experts) == 1:
            return product
        masks = torch.stack(list(observed))[..., None]  # (N, B, 1)
        alone = masks.sum(0) == 1

        def chosen(part: str) -> Tensor:
            own = (torch.stack([getattr(q, part) for q in experts]) * masks).sum(0)
            return torch.where(alone, own, getattr(product, part))

        return DiagonalGaussian(chosen("mean"), chosen("logvar"))

    def loss(self, batch: Batch, observed: Observed | None = None, beta: float | Tensor = 1.0) -> Terms:
        """Eq. 3, negated. Log-likelihoods "target<-source", KLs "target<-source/private" and "target<-source/shared".
        Shared codes are sampled once per source, private codes once per target."""
        return self.bounds(self.infer_all(batch, observed), beta)

    def bounds(self, posterior: Posterior, beta: float | Tensor = 1.0) -> Terms:
        """Eq. 3, negated, from the posterior given the batch, as `loss`."""
        shared = {"joint": posterior.joint, **posterior.shared}
        there = {"joint": posterior.several(), **{name: posterior.present(name) for name in posterior.shared}}
        codes = {source: q.rsample() for source, q in shared.items()}
        kl_shared = {source: q.kl() for source, q in shared.items()}
        terms = Terms(beta=beta)
        for target in self.names:
            private, kl_private = posterior.private[target], posterior.private[target].kl()
            reconstructed = [s for s in shared if self._keeps(f"log_likelihood({target}<-{s})")]
            if reconstructed:  # all reconstructions of this target in one pass of its decoder
                stacked = torch.stack([codes[source] for source in reconstructed])
                counted = None if posterior.masks is None else torch.stack([there[s] for s in reconstructed])
                values = self.reconstruction(target, posterior, private.rsample(), stacked, counted)
                for source, value in zip(reconstructed, self.weights[target] * values):
                    terms.log_likelihoods[f"{target}<-{source}"] = batch_mean(value)
            for source in shared:
                bound, both = f"{target}<-{source}", (there[target], there[source])
                for part, kl in (("private", kl_private), ("shared", kl_shared[source])):
                    if self._keeps(f"kl({bound}/{part})"):
                        terms.kls[f"{bound}/{part}"] = batch_mean(kl, *both)
        return terms

    def _keeps(self, term: str) -> bool:
        bound = term.partition("(")[2].rstrip(")").partition("/")[0]
        return bound not in self.without and term not in self.without


def terms_of(bound: str) -> tuple[str, str, str]:
    """The names in `Terms.flat` of a bound's three terms."""
    return f"log_likelihood({bound})", f"kl({bound}/private)", f"kl({bound}/shared)"
