"""What every multimodal VAE here shares: modalities, posteriors, named terms, inference and synthesis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from dmvae_lib.distributions import DiagonalGaussian, Likelihood, bernoulli, gaussian, laplace
from dmvae_lib.errors import DMVAEError
from dmvae_lib.models.saving import Saved

Batch = Mapping[str, Tensor]
Observed = Mapping[str, Tensor]  # {name: (B,) bool}: which items of a modality are there; all, where a name is absent
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
                known = f"{', '.join(LIKELIHOODS)}, a Likelihood, or a function log_prob(params, x)"
                raise DMVAEError(f"Modality: unknown likelihood {self.likelihood!r}; expected one of {known}.")
            self.likelihood = LIKELIHOODS[self.likelihood]()
        elif not isinstance(self.likelihood, Likelihood):
            self.likelihood = Likelihood(self.likelihood, name=getattr(self.likelihood, "__name__", "custom"))
        if self.private_dim < 0 or self.weight < 0:
            raise DMVAEError(f"Modality: private_dim={self.private_dim}, weight={self.weight}; none may be negative.")


@dataclass(frozen=True)
class Terms:
    """The terms of an objective, each a scalar, the mean over the batch.

    log_likelihoods: "target<-source", lambda_i included; kls: by what they are of, before beta; others: added to the
    loss as they are, their weights included (Eq. 4, divergences between posteriors, losses that are no bound).
    """

    log_likelihoods: dict[str, Tensor] = field(default_factory=dict)
    kls: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)
    beta: float | Tensor = 1.0

    @cached_property
    def total(self) -> Any:
        """The scalar to minimise: beta * (sum of KLs) - (sum of log-likelihoods) + (sum of the others)."""
        return self.beta * sum(self.kls.values()) - sum(self.log_likelihoods.values()) + sum(self.others.values())

    def flat(self) -> dict[str, Tensor]:
        """Every term by one name: "total", "log_likelihood(svhn<-mnist)", "kl(svhn<-mnist/private)", and the others."""
        log_likelihoods = {f"log_likelihood({name})": value for name, value in self.log_likelihoods.items()}
        kls = {f"kl({name})": value for name, value in self.kls.items()}
        return {"total": self.total, **log_likelihoods, **kls, **self.others}


class Posterior(NamedTuple):
    """q(z | x) for the modalities that were observed, all with (B, d) parameters and `rsample`.

    private[name], shared[name]: each modality's own posteriors; joint: the shared posterior given all that was
    observed; experts[name]: the shared part as the encoder gives it (`shared` but for MVAE). targets[name]: what the
    decoder reconstructs, x or features(x), of the items that are there. masks[name]: (B,) bool, which these are; None
    if all are. Where an item is missing, its posteriors are those of all-zero statistics, which no
    objective counts.
    """

    private: dict[str, DiagonalGaussian]
    shared: dict[str, Any]
    joint: Any
    targets: dict[str, Tensor]
    experts: dict[str, Any]
    masks: dict[str, Tensor] | None = None

    def present(self, *names: str) -> Tensor | None:
        """(B,) bool: the items that have all of these modalities; None for all items."""
        return None if self.masks is None else torch.stack([self.masks[name] for name in names]).all(0)

    def several(self) -> Tensor | None:
        """(B,) bool: the items with two modalities or more, whose joint posterior is one of its own; None for all."""
        return None if self.masks is None else torch.stack(list(self.masks.values())).sum(0) >= min(2, len(self.masks))


def batch_mean(values: Tensor, *masks: Tensor | None) -> Tensor:
    """The sum of values (..., B) over the items where all masks hold (None: all items), divided by B."""
    for mask in masks:
        values = values if mask is None else values * mask
    return values.sum(-1) / values.shape[-1]


class MultimodalVAE(Saved):
    """Encoders, decoders, and what follows from them; a model adds `loss` and `joint`.
    arguments: what its constructor takes besides networks, as JSON; about: whatever else should be known of it, as
    JSON. `save` writes both."""

    def __init__(self, modalities: Mapping[str, Modality], shared_dim: int):
        super().__init__()
        if not modalities:
            raise DMVAEError(f"{type(self).__name__}: no modality given; give a mapping from name to Modality.")
        if shared_dim < 1:
            raise DMVAEError(f"{type(self).__name__}: shared_dim={shared_dim}; expected at least 1.")
        self.names = tuple(modalities)
        self.shared_dim = shared_dim
        self.arguments: dict[str, Any] = {"shared_dim": shared_dim}
        self.about: dict[str, Any] = {}
        self.private_dims = {name: modality.private_dim for name, modality in modalities.items()}
        self.weights = {name: modality.weight for name, modality in modalities.items()}
        self.likelihoods: dict[str, Any] = {name: modality.likelihood for name, modality in modalities.items()}
        self.encoders = nn.ModuleDict({name: modality.encoder for name, modality in modalities.items()})
        self.decoders = nn.ModuleDict({name: modality.decoder for name, modality in modalities.items()})
        self.features = nn.ModuleDict({name: m.features for name, m in modalities.items() if m.features is not None})

    # --- inference -------------------------------------------------------------------------------------------

    def infer(self, batch: Batch, observed: Observed | None = None) -> Posterior:
        """Posteriors given any non-empty subset of the modalities, {name: (B, ...)}.

        observed: {name: (B,) bool}, for modalities of which some items are missing: the networks do not see these, and
        their values, NaN or not, do not matter.

        Raises DMVAEError for unknown names, unequal batch sizes, masks of another form, and, on the CPU, items of which
        nothing is observed and what `check` raises for.
        """
        size, masks = self._checked(batch, observed or {})
        private, shared, targets = {}, {}, {}
        for name, x in batch.items():
            rows = None if masks is None else masks[name].nonzero().flatten()
            x = x if rows is None else x[rows]
            if x.device.type == "cpu":  # elsewhere every look at a value would wait for the device
                self._check_values(name, x)
            x, statistics = self._encoded(name, x)
            if rows is not None:
                statistics = statistics.new_zeros(size, statistics.shape[1]).index_copy(0, rows, statistics)
            private[name], shared[name] = self.posteriors(name, statistics)
            # As targets, features are constants: they could otherwise collapse to what is easy to reconstruct.
            targets[name] = x.detach() if name in self.features else x
        names = [name for name in self.names if name in batch]
        joint = self.joint([shared[name] for name in names], None if masks is None else [masks[n] for n in names])
        return Posterior(private, {name: self.alone(q) for name, q in shared.items()}, joint, targets, shared, masks)

    def posteriors(self, name: str, statistics: Tensor) -> tuple[Any, Any]:
        """(q(z_p | x), the shared expert q(z_s | x)) of one modality from its encoder's (B, 2 p + 2 s) statistics."""
        p, s = self.private_dims[name], self.shared_dim
        private_mean, private_logvar, shared_mean, shared_logvar = statistics.split([p, p, s, s], -1)
        return DiagonalGaussian(private_mean, private_logvar), DiagonalGaussian(shared_mean, shared_logvar)

    def joint(self, experts: Sequence[Any], observed: Sequence[Tensor] | None = None) -> Any:
        """The shared posterior given the modalities' experts; observed: for each, (B,) bool, where it takes part."""
        raise NotImplementedError

    def alone(self, expert: Any) -> Any:
        """The shared posterior given one modality alone, from its expert."""
        return expert

    def _encoded(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """(what stands for x: features(x), or x itself for a modality without features; the encoder's statistics)."""
        p, s = self.private_dims[name], self.shared_dim
        if not len(x):  # nothing of this modality in the batch: some networks take no empty one
            return x, self._like().new_zeros(0, 2 * p + 2 * s)
        if name in self.features:
            x = self._output(f"features of {name!r} reject", self.features[name], x)
        statistics = self._output(f"encoder of {name!r} rejects", self.encoders[name], x)
        if tuple(statistics.shape) != (len(x), 2 * p + 2 * s):
            raise DMVAEError(
                f"encoder of {name!r} returned shape {tuple(statistics.shape)}, expected {(len(x), 2 * p + 2 * s)}: "
                f"private mean and log-variance ({p} each), then shared mean and log-variance ({s} each)."
            )
        return x, statistics

    def _output(self, rejects: str, network: nn.Module, x: Tensor) -> Tensor:
        try:  # networks may compute in lower precision; what follows does not
            return network(x).to(self._like().dtype)
        except RuntimeError as error:  # torch's message names neither the modality nor the input's shape
            raise DMVAEError(f"{rejects} input of shape {tuple(x.shape)}: {error}") from error

    # --- synthesis -------------------------------------------------------------------------------------------

    def decode(self, name: str, private: Tensor, shared: Tensor) -> Tensor:
        """Likelihood parameters (..., *x.shape[1:]) from codes (..., p) and (..., s); leading axes broadcast."""
        self._known(name)
        leading = torch.broadcast_shapes(private.shape[:-1], shared.shape[:-1])
        code = torch.cat([private.expand(*leading, -1), shared.expand(*leading, -1)], -1)
        return self.decoders[name](code.reshape(-1, code.shape[-1])).to(code.dtype).unflatten(0, leading)

    def mean(self, name: str, private: Tensor, shared: Tensor) -> Tensor:
        """E[x | z_p, z_s], or of the features that stand for x, shaped as `decode`."""
        return self.likelihoods[name].mean(self.decode(name, private, shared))

    def prior_distribution(self) -> Any:
        """p(z_s), of shape (s,): N(0, I)."""
        return DiagonalGaussian.standard(self.shared_dim, like=self._like())

    def prior(self, n: int, generator: Generator | None = None) -> Tensor:
        """(n, s) shared codes from the prior."""
        return self.prior_distribution().rsample(generator, n)

    def private_prior(self, name: str, *shape: int, generator: Generator | None = None) -> Tensor:
        """(*shape, p) private codes from N(0, I)."""
        self._known(name)
        return DiagonalGaussian.standard(*shape, self.private_dims[name], like=self._like()).rsample(generator)

    def cross_generate(
        self,
        batch: Batch,
        target: str,
        n: int = 1,
        private: Tensor | None = None,
        generator: Generator | None = None,
        observed: Observed | None = None,
    ) -> Tensor:
        """E[x_target] for z_s ~ q(z_s | observed) and z_p ~ p(z_p) (Sec. 4.3), (n, B, *x_target.shape[1:]).
        private: (n, p) codes to use instead of samples, one for each of the n syntheses (Fig. 4's rows); observed: as of
        `infer`."""
        self._known(target)
        shared = self.infer(batch, observed).joint.rsample(generator, n)
        if private is None:
            private = self.private_prior(target, *shared.shape[:-1], generator=generator)
        elif tuple(private.shape) != (expected := (n, self.private_dims[target])):
            raise DMVAEError(f"private codes of shape {tuple(private.shape)}; expected (n, private_dim) = {expected}.")
        else:
            private = private[:, None]
        return self.mean(target, private, shared)

    def reconstruct(
        self,
        batch: Batch,
        target: str,
        source: str = "joint",
        generator: Generator | None = None,
        observed: Observed | None = None,
    ) -> Tensor:
        """E[x_target], (B, ...), with z_p ~ q(z_p | x_target) and z_s from `source` (Sec. 4.3).
        source: "joint" for q(z_s | x), the target's name for self-reconstruction, another name for cross; observed: as
        of `infer`. What is missing of an item is filled in from "joint", its private code from N(0, I)."""
        posterior = self.infer(batch, observed)
        for name in {target, source} - {"joint", *posterior.private}:
            raise DMVAEError(f"{name!r} is not in the batch; it holds {', '.join(posterior.private)}.")
        shared = posterior.joint if source == "joint" else posterior.shared[source]
        return self.mean(target, posterior.private[target].rsample(generator), shared.rsample(generator))

    def sample(self, n: int, generator: Generator | None = None) -> dict[str, Tensor]:
        """E[x] of every modality, (n, ...), from one shared code for all and private codes, all from the priors."""
        shared = self.prior(n, generator)
        return {name: self.mean(name, self.private_prior(name, n, generator=generator), shared) for name in self.names}

    # --- likelihood and objective ----------------------------------------------------------------------------

    def log_prob(self, name: str, params: Tensor, x: Tensor) -> Tensor:
        """log p(x | z), summed over pixels and channels: params (..., B, *x.shape[1:]) -> (..., B), unweighted."""
        if params.shape[params.dim() - x.dim() :] != x.shape:
            found, expected = tuple(params.shape[params.dim() - x.dim() + 1 :]), tuple(x.shape[1:])
            raise DMVAEError(f"decoder of {name!r} returns items of shape {found}; the data's have {expected}.")
        return self.likelihoods[name].log_prob(params, x).sum(tuple(range(1 - x.dim(), 0)))

    def reconstruction(
        self, name: str, posterior: Posterior, private: Tensor, shared: Tensor, counted: Tensor | None = None
    ) -> Tensor:
        """log p(x | z_p, z_s) of the batch that `posterior` came from, codes (..., B, p) and (..., B, s): (..., B),
        zero and not decoded where the item is missing, or `counted`, (..., B) bool, is False."""
        if posterior.masks is None:
            return self.log_prob(name, self.decode(name, private, shared), posterior.targets[name])
        there = posterior.masks[name]
        leading = torch.broadcast_shapes(private.shape[:-1], shared.shape[:-1])
        where = (there if counted is None else there & counted).expand(leading).nonzero(as_tuple=True)
        found = shared.new_zeros(leading)
        if not len(where[-1]):  # some networks take no empty batch
            return found
        params = self.decode(name, *(code.expand(*leading, -1)[where] for code in (private, shared)))
        x = posterior.targets[name][(there.cumsum(0) - 1)[where[-1]]]  # which has the items that are there alone
        return found.index_put(where, self.log_prob(name, params, x))

    @torch.no_grad()
    def log_likelihood(
        self,
        batch: Batch,
        samples: int = 1_000,
        observed: Observed | None = None,
        generator: Generator | None = None,
        at_once: int = 10,
    ) -> Tensor:
        """(B,) importance-weighted estimate of log p(x) in nats, x what is observed of `batch` (Burda et al. 2016),

            log 1/K sum_k p(x | z_k) p(z_k) / q(z_k | x),    z_k ~ q(z_s | x) prod_i q(z_pi | x_i),

        which is below log p(x) on average and rises to it with K = `samples`. The lambda_i do not enter. at_once: samples
        that are decoded together; more take more memory.
        """
        posterior, found = self.infer(batch, observed), []
        prior = self.prior_distribution()
        for k in (min(at_once, samples - done) for done in range(0, samples, at_once)):
            shared = posterior.joint.rsample(generator, k)
            log_w = prior.log_prob(shared) - posterior.joint.log_prob(shared)
            for name, q in posterior.private.items():
                private = q.rsample(generator, k)
                standard = DiagonalGaussian.standard(*q.mean.shape, like=q.mean)  # where the item is missing, q itself
                log_w = log_w + standard.log_prob(private) - q.log_prob(private)
                log_w = log_w + self.reconstruction(name, posterior, private, shared)
            found.append(log_w)
        return torch.cat(found).logsumexp(0) - math.log(samples)

    def loss(self, batch: Batch, observed: Observed | None = None, beta: float | Tensor = 1.0) -> Terms:
        """The objective; `beta` weighs every KL (1 in the papers, annealed by some). observed: as of `infer`."""
        raise NotImplementedError

    def infer_all(self, batch: Batch, observed: Observed | None = None) -> Posterior:
        """`infer`, which for an objective needs every modality in the batch, whole or with items missing."""
        missing = [name for name in self.names if name not in batch]
        if missing:
            raise DMVAEError(
                f"the objective needs every modality; the batch lacks {', '.join(missing)}. Give a modality of which "
                "items are missing all the same, with a mask: loss(batch, observed={name: (B,) bool})."
            )
        return self.infer({name: batch[name] for name in self.names}, observed)

    # --- checks ----------------------------------------------------------------------------------------------

    def check(self, batch: Batch, observed: Observed | None = None) -> None:
        """Raises DMVAEError for observed values of the batch that are not finite, or outside a Bernoulli's [0, 1]."""
        masks = self._checked(batch, observed or {})[1]
        for name, x in batch.items():
            self._check_values(name, x if masks is None else x[masks[name]])

    def _like(self) -> Tensor:
        return next(self.parameters())

    def _known(self, name: str) -> None:
        if name not in self.names:
            raise DMVAEError(f"unknown modality {name!r}; this model has {', '.join(self.names)}.")

    def _checked(self, batch: Batch, observed: Observed) -> tuple[int, dict[str, Tensor] | None]:
        """(B, a mask for every modality of the batch, or None if no item is said to be missing)."""
        if not batch:
            raise DMVAEError(f"no modality observed; give at least one of {', '.join(self.names)}.")
        for name, x in batch.items():
            self._known(name)
            if not isinstance(x, Tensor):
                raise DMVAEError(f"{name!r} is a {type(x).__name__}; expected a tensor, as PairedData.batch gives it.")
            if x.dim() < 2:
                raise DMVAEError(f"{name!r} has shape {tuple(x.shape)}; expected (B, ...), single features as (B, 1).")
            if x.dtype != self._like().dtype:
                expected = f"{self._like().dtype}, the model's: x.to({self._like().dtype}), images scaled to [0, 1]"
                raise DMVAEError(f"{name!r} has dtype {x.dtype}; expected {expected}.")
        if len({len(x) for x in batch.values()}) > 1:
            sizes = {name: len(x) for name, x in batch.items()}
            raise DMVAEError(f"modalities of one batch must have the same length, found {sizes}.")
        for name, mask in observed.items():
            if name not in batch:
                raise DMVAEError(f"observed: {name!r} is not in the batch, which holds {', '.join(batch)}.")
            if mask.dtype != torch.bool or tuple(mask.shape) != (len(x),):
                found = f"shape {tuple(mask.shape)} and {mask.dtype}"
                raise DMVAEError(f"observed[{name!r}] has {found}; expected ({len(x)},), torch.bool.")
        if not observed:
            return len(x), None
        full = torch.ones(len(x), dtype=torch.bool, device=x.device)
        masks = {name: observed.get(name, full) for name in batch}
        if x.device.type == "cpu" and len(nothing := (~torch.stack(list(masks.values())).any(0)).nonzero()):
            raise DMVAEError(f"nothing is observed of {len(nothing)} items, first item {int(nothing[0])}; drop them.")
        return len(x), masks

    def _check_values(self, name: str, x: Tensor) -> None:
        low, high = (bound.item() for bound in x.aminmax()) if x.numel() else (0.0, 0.0)
        if not math.isfinite(low + high):  # aminmax propagates NaN
            raise DMVAEError(f"{name!r} holds values that are not finite; remove or replace them before training.")
        if self.likelihoods[name].unit and not 0 <= low <= high <= 1:
            repair = "divide by the largest value there can be (images of 8 bits: 255), or choose another likelihood"
            raise DMVAEError(
                f"{name!r} holds values in [{low:g}, {high:g}]; a Bernoulli likelihood needs [0, 1]: {repair}."
            )


class SharedVAE(MultimodalVAE):
    """One code z for all modalities and no private ones: what the baselines have in common."""

    def __init__(self, modalities: Mapping[str, Modality], shared_dim: int):
        super().__init__(modalities, shared_dim)
        if private := {name: dim for name, dim in self.private_dims.items() if dim}:
            raise DMVAEError(
                f"{type(self).__name__} has no private codes, found private_dim {private}; set private_dim=0 and let "
                "the encoder return (B, 2 * shared_dim) statistics, or use DMVAE."
            )

    def weighted(self, name: str, posterior: Posterior, z: Tensor, counted: Tensor | None = None) -> Tensor:
        """lambda_i log p(x_i | z) of codes z (..., B, s): (..., B), zero where `reconstruction` is."""
        return self.weights[name] * self.reconstruction(name, posterior, z[..., :0], z, counted)

    def elbo(
        self, source: str, q: DiagonalGaussian, posterior: Posterior, targets: Sequence[str], mask: Tensor | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(log-likelihoods "target<-source", KLs "source") of E_q[sum_i lambda_i log p(x_i | z)] - KL(q || p), i over
        `targets`, from one sample of q; mask: the items (B,) that have this bound, None for all."""
        z = q.rsample()
        return (
            {f"{name}<-{source}": batch_mean(self.weighted(name, posterior, z, mask)) for name in targets},
            {source: batch_mean(q.kl(), mask)},
        )
