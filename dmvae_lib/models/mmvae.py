"""MMVAE: a mixture of Laplace experts trained with the DReG estimator of the IWAE bound (Shi et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dmvae_lib.distributions import DiagonalGaussian, Laplace, Mixture
from dmvae_lib.errors import DMVAEError
from dmvae_lib.models.base import Batch, Modality, SharedVAE, Terms


def laplace_scale(logits: Tensor) -> Tensor:
    """The softmax over the d dimensions times d: scales (..., d) whose mean is one, so none can collapse alone."""
    return logits.softmax(-1) * logits.shape[-1]


class MMVAE(SharedVAE):
    """Mixture-of-experts multimodal VAE with q(z | x_1..x_N) = 1/N sum_m q(z | x_m), all Laplace.

    The objective averages one importance-weighted bound per modality ("looser": the average is outside the log),

        1/N sum_m E_{z_1..z_K ~ q(z | x_m)} [log 1/K sum_k w(z_k)],
        log w(z) = sum_i lambda_i log p(x_i | z) + beta (log p(z) - log q(z | x_1..x_N)),

    and its gradient is DReG's (Tucker et al. 2019): with w~_k = w_k / sum_j w_j and the parameters of q held
    constant in log w, the decoders and the prior get sum_k w~_k d log w_k, the encoders, which log w_k sees
    through z_k alone, sum_k w~_k^2 (d log w_k / d z_k) (d z_k / d encoder). This is the paper's estimator. For the
    encoders it is unbiased with one modality or one particle; otherwise it counts the particles of each expert as
    drawn from the mixture, and is off the bound's gradient by a few percent on average (small linear cases).

    encoder(x) -> (B, 2 s): the mean, then the logits of the scale, laplace_scale(logits) + 1e-6.
    The prior is Laplace(0, laplace_scale(prior_logits)), learnt. particles: K, per modality.
    """

    def __init__(self, modalities: Mapping[str, Modality], shared_dim: int, particles: int = 30):
        super().__init__(modalities, shared_dim)
        if particles < 1:
            raise DMVAEError(f"MMVAE: particles={particles}; expected at least 1.")
        self.particles = self.arguments["particles"] = particles
        self.prior_logits = nn.Parameter(self._like().new_zeros(shared_dim))

    def encode(self, name: str, x: Tensor) -> tuple[DiagonalGaussian, Laplace]:  # type: ignore[override]
        """The Laplace expert of one modality; no private part."""
        private, statistics = super().encode(name, x)  # whose second half is here the scale's logits
        return private, Laplace(statistics.mean, laplace_scale(statistics.logvar) + 1e-6)

    def joint(self, experts: Iterable[Laplace]) -> Laplace | Mixture:  # type: ignore[override]
        """The equal-weight mixture of the observed experts; one expert alone is its own mixture."""
        experts = list(experts)
        return experts[0] if len(experts) == 1 else Mixture(experts)

    def prior_distribution(self) -> Laplace:
        """p(z), of shape (s,)."""
        return Laplace(torch.zeros_like(self.prior_logits), laplace_scale(self.prior_logits))

    def prior(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, s) codes from the learnt prior."""
        return self.prior_distribution().rsample(generator, n)

    def loss(self, batch: Batch, beta: float | Tensor = 1.0) -> Terms:
        """total = -bound, with DReG's gradient. Terms: "bound", the objective above; "log_likelihood(name)", with its
        weight, and "kl", the Monte Carlo log q - log p, both plain means over particles and modalities, so that
        sum of log-likelihoods - beta * kl is an ELBO, at most the bound."""
        posterior = self.infer_all(batch)
        experts: Iterable[Any] = posterior.shared.values()  # Laplace
        targets = posterior.targets
        z = torch.stack([q.rsample(n=self.particles) for q in experts])  # (N, K, B, s)
        log_likelihoods = {name: self.weighted_log_likelihood(name, z, targets[name]) for name in self.names}
        constant = Mixture([Laplace(q.mean.detach(), q.scale.detach()) for q in experts])
        kl = constant.log_prob(z) - self.prior_distribution().log_prob(z)
        log_w = sum(log_likelihoods.values()) - beta * kl  # (N, K, B)
        bound = (log_w.logsumexp(1) - math.log(self.particles)).mean()
        if z.requires_grad:  # the gradient of logsumexp holds w~ once; z's gets it a second time
            weight = log_w.detach().softmax(1)[..., None]
            z.register_hook(lambda gradient: weight * gradient)
        parts = {f"log_likelihood({name})": value.mean() for name, value in log_likelihoods.items()}
        return Terms(-bound, {"bound": bound, **parts, "kl": kl.mean()})
