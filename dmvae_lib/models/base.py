"""What every multimodal VAE here shares: modalities, posteriors, named terms, inference and synthesis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmvae_lib.distributions import DiagonalGaussian, Likelihood, bernoulli, gaussian, laplace
from dmvae_lib.errors import DMVAEError
from dmvae_lib.models.saving import Saved

Batch = Mapping[str, Tensor]
LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {"bernoulli": bernoulli, "gaussian": gaussian, "laplace": laplace}


@dataclass
class Modality:
    """One view of the data.

    encoder: x -> (B, 2 * private_dim + 2 * shared_dim), the private mean and log-variance, then the shared ones.
    decoder: z = [private, shared], (B, private_dim + shared_dim) -> the likelihood's parameters, shaped like x.
    weight: lambda_i of Eq. 3.
    likelihood: "bernoulli" (the decoder returns logits), "gaussian", "laplace", a `Likelihood`, or a function
        log_prob(params, x) -> elementwise log-density, whose mean is taken to be `params` itself.
    features: a network whose output stands for x (Sec. 5.2: the max-pooled LSTM states of a caption): the encoder
        reads features(x), the decoder reconstructs features(x). It learns through the encoder alone.
    """

    encoder: nn.Module
    decoder: nn.Module
    private_dim: int
    weight: float = 1.0
    likelihood: str | Likelihood | Callable[[Tensor, Tensor], Tensor] = "bernoulli"
    features: nn.Module | None = None

    def __post_init__(self):
        if isinstance(self.likelihood, str):
            if self.likelihood not in LIKELIHOODS:
                raise DMVAEError(
                    f"Modality: unknown likelihood {self.likelihood!r}; expected one of {', '.join(LIKELIHOODS)}, "
                    "a Likelihood, or a function log_prob(params, x)."
                )
            self.likelihood = LIKELIHOODS[self.likelihood]()
        elif not isinstance(self.likelihood, Likelihood):
            self.likelihood = Likelihood(self.likelihood, name=getattr(self.likelihood, "__name__", "custom"))
        if self.private_dim < 0 or self.weight < 0:
            raise DMVAEError(
                f"Modality: private_dim={self.private_dim}, weight={self.weight}; neither may be negative."
            )


class Posterior(NamedTuple):
    """q(z | x) for the modalities that were observed.

    private[name], shared[name]: each observed modality's own posteriors; joint: the shared posterior given all
    that was observed. All have (B, d) parameters and `rsample`. targets[name]: what the decoder reconstructs, x or
    features(x).
    """

    private: dict[str, DiagonalGaussian]
    shared: dict[str, DiagonalGaussian]
    joint: DiagonalGaussian
    targets: dict[str, Tensor]


@dataclass
class Terms:
    """The terms of an objective: `total` is the scalar to minimise, `parts` every term by name, mean over the batch.

    Log-likelihoods in `parts` carry their weight lambda_i; total = -(sum of log-likelihoods - sum of KLs).
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.parts[name]


class MultimodalVAE(nn.Module, Saved):
    """Encoders, decoders, and what follows from them; a model adds `loss` and, where it differs, `joint`.

    arguments: what its constructor takes besides networks, as JSON, and experiment: what `build` made it from, if it
    did; `save` writes both.
    """

    def __init__(self, modalities: Mapping[str, Modality], shared_dim: int):
        super().__init__()
        if not modalities:
            raise DMVAEError(f"{type(self).__name__}: no modality given; give a mapping from name to Modality.")
        if shared_dim < 1:
            raise DMVAEError(f"{type(self).__name__}: shared_dim={shared_dim}; expected at least 1.")
        self.names = tuple(modalities)
        self.shared_dim = shared_dim
        self.arguments: dict[str, Any] = {"shared_dim": shared_dim}
        self.experiment: dict[str, Any] | None = None
        self.private_dims = {name: modality.private_dim for name, modality in modalities.items()}
        self.weights = {name: modality.weight for name, modality in modalities.items()}
        self.likelihoods: dict[str, Any] = {name: modality.likelihood for name, modality in modalities.items()}
        self.encoders = nn.ModuleDict({name: modality.encoder for name, modality in modalities.items()})
        self.decoders = nn.ModuleDict({name: modality.decoder for name, modality in modalities.items()})
        self.features = nn.ModuleDict({name: m.features for name, m in modalities.items() if m.features is not None})

    # --- inference -------------------------------------------------------------------------------------------

    def observe(self, name: str, x: Tensor) -> Tensor:
        """What stands for x: features(x), or x itself for a modality without features."""
        self._known(name)
        if name not in self.features:
            return x
        try:
            return self.features[name](x)
        except RuntimeError as error:
            raise DMVAEError(f"features of {name!r} reject input of shape {tuple(x.shape)}: {error}") from error

    def encode(self, name: str, x: Tensor) -> tuple[DiagonalGaussian, DiagonalGaussian]:
        """(q(z_p | x), q(z_s | x)) of one modality, from the encoder's (B, 2 p + 2 s) statistics; x as observed."""
        self._check(name, x)
        private_dim = self.private_dims[name]
        try:
            statistics = self.encoders[name](x)
        except RuntimeError as error:  # torch's message names neither the modality nor the input's shape
            raise DMVAEError(f"encoder of {name!r} rejects input of shape {tuple(x.shape)}: {error}") from error
        expected = (len(x), 2 * private_dim + 2 * self.shared_dim)
        if tuple(statistics.shape) != expected:
            raise DMVAEError(
                f"encoder of {name!r} returned shape {tuple(statistics.shape)}, expected {expected}: private mean and "
                f"log-variance ({private_dim} each), then shared mean and log-variance ({self.shared_dim} each)."
            )
        sizes = [private_dim, private_dim, self.shared_dim, self.shared_dim]
        private_mean, private_logvar, shared_mean, shared_logvar = statistics.split(sizes, -1)
        return DiagonalGaussian(private_mean, private_logvar), DiagonalGaussian(shared_mean, shared_logvar)

    def joint(self, experts: Iterable[DiagonalGaussian]) -> DiagonalGaussian:
        """The shared posterior given the observed modalities' experts."""
        raise NotImplementedError

    def infer(self, batch: Batch) -> Posterior:
        """Posteriors given any non-empty subset of the modalities, {name: (B, ...)}.

        Raises DMVAEError for unknown names, unequal batch sizes, values outside a Bernoulli's [0, 1] or not finite.
        """
        if not batch:
            raise DMVAEError(f"no modality observed; give at least one of {', '.join(self.names)}.")
        sizes = {name: len(x) for name, x in batch.items()}
        if len(set(sizes.values())) > 1:
            raise DMVAEError(f"modalities of one batch must have the same length, found {sizes}.")
        observed = {name: self.observe(name, x) for name, x in batch.items()}
        encoded = {name: self.encode(name, x) for name, x in observed.items()}
        private = {name: pair[0] for name, pair in encoded.items()}
        shared = {name: pair[1] for name, pair in encoded.items()}
        joint = self.joint([shared[name] for name in self.names if name in shared])
        # As targets, features are constants: they could otherwise collapse to what is easy to reconstruct.
        targets = {name: x.detach() if name in self.features else x for name, x in observed.items()}
        return Posterior(private, shared, joint, targets)

    # --- synthesis -------------------------------------------------------------------------------------------

    def decode(self, name: str, private: Tensor, shared: Tensor) -> Tensor:
        """Likelihood parameters (..., *x.shape[1:]) from codes (..., p) and (..., s); leading axes broadcast."""
        self._known(name)
        leading = torch.broadcast_shapes(private.shape[:-1], shared.shape[:-1])
        code = torch.cat([private.expand(*leading, -1), shared.expand(*leading, -1)], -1)
        return self.decoders[name](code.reshape(-1, code.shape[-1])).unflatten(0, leading)

    def mean(self, name: str, private: Tensor, shared: Tensor) -> Tensor:
        """E[x | z_p, z_s], or of the features that stand for x, shaped as `decode`."""
        return self.likelihoods[name].mean(self.decode(name, private, shared))

    def log_likelihood(self, name: str, params: Tensor, x: Tensor) -> Tensor:
        """log p(x | z), summed over pixels and channels: params (..., B, *x.shape[1:]) -> (..., B), unweighted."""
        if params.shape[params.dim() - x.dim() :] != x.shape:
            raise DMVAEError(
                f"decoder of {name!r} returns items of shape {tuple(params.shape[params.dim() - x.dim() + 1 :])}, "
                f"the data has {tuple(x.shape[1:])}; both must be the same."
            )
        return self.likelihoods[name].log_prob(params, x).sum(tuple(range(1 - x.dim(), 0)))

    def prior(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, s) shared codes from the prior, N(0, I)."""
        return DiagonalGaussian.standard(n, self.shared_dim, like=self._like()).rsample(generator)

    def private_prior(self, name: str, *shape: int, generator: torch.Generator | None = None) -> Tensor:
        """(*shape, p) private codes from N(0, I)."""
        self._known(name)
        return DiagonalGaussian.standard(*shape, self.private_dims[name], like=self._like()).rsample(generator)

    def cross_generate(
        self,
        batch: Batch,
        target: str,
        n: int = 1,
        private: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """E[x_target] for z_s ~ q(z_s | observed) and z_p ~ p(z_p) (Sec. 4.3), (n, B, *x_target.shape[1:]).

        private: (n, p) codes to use instead of samples, one for each of the n syntheses (Fig. 4's rows).
        """
        self._known(target)
        shared = self.infer(batch).joint.rsample(generator, n)
        if private is None:
            private = self.private_prior(target, *shared.shape[:-1], generator=generator)
        elif tuple(private.shape) != (n, self.private_dims[target]):
            raise DMVAEError(
                f"private codes of shape {tuple(private.shape)}; expected (n, private_dim) = "
                f"{(n, self.private_dims[target])} for {target!r}."
            )
        else:
            private = private[:, None]
        return self.mean(target, private, shared)

    def reconstruct(
        self, batch: Batch, target: str, source: str = "joint", generator: torch.Generator | None = None
    ) -> Tensor:
        """E[x_target], (B, ...), with z_p ~ q(z_p | x_target) and z_s from `source` (Sec. 4.3).

        source: "joint" for q(z_s | x), the target's name for self-reconstruction, another name for cross.
        """
        posterior = self.infer(batch)
        for name in {target, source} - {"joint", *posterior.private}:
            raise DMVAEError(f"{name!r} is not in the batch; it holds {', '.join(posterior.private)}.")
        shared = posterior.joint if source == "joint" else posterior.shared[source]
        return self.mean(target, posterior.private[target].rsample(generator), shared.rsample(generator))

    def sample(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """E[x] of every modality, (n, ...), from one shared code for all and private codes, all from the priors."""
        shared = self.prior(n, generator)
        return {name: self.mean(name, self.private_prior(name, n, generator=generator), shared) for name in self.names}

    # --- objective -------------------------------------------------------------------------------------------

    def loss(self, batch: Batch, beta: float | Tensor = 1.0) -> Terms:
        """The objective on a complete batch; `beta` weighs every KL (1 in the papers, annealed by some)."""
        raise NotImplementedError

    def infer_all(self, batch: Batch) -> Posterior:
        """`infer`, which for an objective needs every modality."""
        missing = [name for name in self.names if name not in batch]
        if missing:
            raise DMVAEError(f"the objective needs every modality; the batch lacks {', '.join(missing)}.")
        return self.infer({name: batch[name] for name in self.names})

    # --- checks ----------------------------------------------------------------------------------------------

    def _like(self) -> Tensor:
        return next(self.parameters())

    def _known(self, name: str) -> None:
        if name not in self.names:
            raise DMVAEError(f"unknown modality {name!r}; this model has {', '.join(self.names)}.")

    def _check(self, name: str, x: Tensor) -> None:
        self._known(name)
        if x.dim() < 2:
            raise DMVAEError(f"{name!r} has shape {tuple(x.shape)}; expected (B, ...): give single features as (B, 1).")
        if not x.is_floating_point():
            raise DMVAEError(f"{name!r} has dtype {x.dtype}; expected floating point (images: scaled to [0, 1]).")
        if x.is_cuda and torch.cuda.get_sync_debug_mode():  # whoever calls must not wait for the GPU's values
            return
        low, high = (bound.item() for bound in x.aminmax()) if x.numel() else (0.0, 0.0)
        if not math.isfinite(low + high):  # aminmax propagates NaN
            raise DMVAEError(f"{name!r} holds values that are not finite; remove or replace them before training.")
        if self.likelihoods[name].unit and not 0 <= low <= high <= 1:
            raise DMVAEError(
                f"{name!r} holds values in [{low:g}, {high:g}]; a Bernoulli likelihood needs [0, 1]: "
                "divide 8-bit images by 255, or choose another likelihood."
            )


class SharedVAE(MultimodalVAE):
    """One code z for all modalities and no private ones: what the baselines have in common."""

    def __init__(self, modalities: Mapping[str, Modality], shared_dim: int):
        super().__init__(modalities, shared_dim)
        private = {name: dim for name, dim in self.private_dims.items() if dim}
        if private:
            raise DMVAEError(
                f"{type(self).__name__} has no private codes, found private_dim {private}; set private_dim=0 and let "
                "the encoder return (B, 2 * shared_dim) statistics, or use DMVAE."
            )

    def weighted_log_likelihood(self, name: str, z: Tensor, x: Tensor) -> Tensor:
        """lambda_i log p(x_i | z) of codes z (..., B, s): (..., B)."""
        return self.weights[name] * self.log_likelihood(name, self.decode(name, z[..., :0], z), x)

    def elbo(self, bound: str, q: DiagonalGaussian, batch: Batch) -> dict[str, Tensor]:
        """The terms of E_q[sum_i lambda_i log p(x_i | z)] - KL(q || p), i over `batch`, from one sample of q.

        They are named "bound/log_likelihood(name)" and "bound/kl".
        """
        z = q.rsample()
        log_likelihoods = {name: self.weighted_log_likelihood(name, z, x).mean() for name, x in batch.items()}
        parts = {f"{bound}/log_likelihood({name})": value for name, value in log_likelihoods.items()}
        return parts | {f"{bound}/kl": q.kl().mean()}

    @staticmethod
    def negative(parts: Mapping[str, Tensor], beta: float | Tensor) -> Tensor:
        """beta * (sum of KLs) - (sum of log-likelihoods) of one or several bounds' terms."""
        return sum(beta * value if name.endswith("/kl") else -value for name, value in parts.items())
