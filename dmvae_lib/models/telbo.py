"""JVAE trained with the triple ELBO: a bound for all modalities together and one for each (Vedantam et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call

from dmvae_lib.errors import DMVAEError
from dmvae_lib.models.base import Batch, Modality, Terms
from dmvae_lib.models.jmvae import JointNetworkVAE


class TELBO(JointNetworkVAE):
    """JVAE with the triple ELBO (triple for two modalities, N + 1 bounds in general): the objective is

        E_{q(z | x)}[sum_i lambda_i log p(x_i | z)] - beta KL(q(z | x) || p)
        + sum_i ( E_{q(z | x_i)}[gamma_i log p(x_i | z)] - beta KL(q(z | x_i) || p) ),      x = x_1..x_N.

    The decoders learn from the first bound alone. The paper trains in two stages, and the second fits the unimodal
    networks to decoders that stay fixed; here both are taken in one step, the decoders' parameters being constants
    in the unimodal bounds. That is exact for the first stage, and the second follows the decoders as they move.

    unimodal_weights: gamma_i by name; each lambda_i (Modality.weight) where not given.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        shared_dim: int,
        joint_encoder: nn.Module,
        unimodal_weights: Mapping[str, float] | None = None,
    ):
        super().__init__(modalities, shared_dim, joint_encoder)
        self.unimodal_weights = self.weights | dict(unimodal_weights or {})
        self.arguments["unimodal_weights"] = self.unimodal_weights
        if set(self.unimodal_weights) != set(self.names) or min(self.unimodal_weights.values()) < 0:
            raise DMVAEError(
                f"TELBO: unimodal_weights={unimodal_weights}; expected weights >= 0 for {', '.join(self.names)}."
            )

    def loss(self, batch: Batch, beta: float | Tensor = 1.0) -> Terms:
        """The objective, negated. Terms: "elbo(joint)/log_likelihood(name)", "elbo(joint)/kl", and for each modality
        "elbo(name)/log_likelihood(name)", "elbo(name)/kl"."""
        posterior = self.infer_all(batch)
        parts = self.elbo("elbo(joint)", posterior.joint, posterior.targets)
        for name, q in posterior.shared.items():
            fixed = {key: value.detach() for key, value in self.decoders[name].named_parameters()}
            params = functional_call(self.decoders[name], fixed, q.rsample())
            log_likelihood = self.log_likelihood(name, params, posterior.targets[name]).mean()
            parts[f"elbo({name})/log_likelihood({name})"] = self.unimodal_weights[name] * log_likelihood
            parts[f"elbo({name})/kl"] = q.kl().mean()
        return Terms(self.negative(parts, beta), parts)
