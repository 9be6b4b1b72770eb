"""DMVAE's neighbours as the package `multivae` has them, on this library's networks, trained and judged as its models.

The rows are data like all others; the package, which is optional, is needed to build, train or load their models.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn

from dmvae_lib.distributions import bernoulli
from dmvae_lib.errors import DMVAEError
from dmvae_lib.models import Posterior, Terms
from dmvae_lib.models.base import Batch, Observed
from dmvae_lib.paper.data import DataSet, Splits
from dmvae_lib.paper.rows import digits
from dmvae_lib.paper.rows.polymnist import HOW, MVAE_ROW, annealed, tuples, with_missing
from dmvae_lib.paper.rows.row import Row

MIXTURES = ("MMVAE", "MMVAEPlus")  # whose shared code is drawn from one of the given modalities' posteriors


class Point(NamedTuple):
    """All that a probe needs of a posterior."""

    mean: Tensor


class Successor(nn.Module):
    """A model of `multivae` with what this library trains and measures models by: `loss`, `infer`, `cross_generate`,
    `sample`, `log_likelihood`, as `dmvae_lib.models.MultimodalVAE` has them.

    kind: the class in `multivae.models`, made with its <kind>Config of `settings`; networks: {name: (encoder, decoder)}
    of this library; likelihood: "bernoulli", whose decoders return logits, or "laplace", means.
    """

    def __init__(
        self,
        kind: str,
        networks: Mapping[str, tuple[nn.Module, nn.Module]],
        shapes: Mapping[str, tuple[int, ...]],
        shared_dim: int,
        private_dim: int,
        weights: Mapping[str, float],
        likelihood: str,
        settings: Mapping[str, Any],
    ):
        super().__init__()
        self.kind, self.names, self.logits = kind, tuple(networks), likelihood == "bernoulli"
        self.shared_dim, self.private_dim = shared_dim, private_dim
        self.about: dict[str, Any] = {}
        models = _multivae()
        how = {"n_modalities": len(networks), "latent_dim": shared_dim, "input_dims": dict(shapes)}
        how |= {"uses_likelihood_rescaling": True, "rescale_factors": dict(weights)} | dict(settings)
        how["decoders_dist"] = dict.fromkeys(networks, likelihood)
        how["decoder_dist_params"] = {} if self.logits else {name: {"scale": digits.SCALE} for name in networks}
        if private_dim:
            how["modalities_specific_dim"] = private_dim
        self.inner = getattr(models, kind)(
            getattr(models, f"{kind}Config")(**how),
            {name: encoder_of(encoder, shared_dim, private_dim) for name, (encoder, _) in networks.items()},
            {name: decoder_of(decoder, shared_dim, private_dim) for name, (_, decoder) in networks.items()},
        )
        if self.logits:  # its own refuses grey levels
            self.inner.recon_log_probs = dict.fromkeys(networks, bernoulli().log_prob)

    def loss(self, batch: Batch, observed: Observed | None = None, beta: float = 1.0) -> Terms:
        """Their objective, the mean over the batch, as "loss"; beta anneals MVAE's KLs and is for no other."""
        if self.kind == "MVAE":
            self.inner.beta = beta
        np.random.seed(int(torch.randint(2**31, ()).item()))  # some draw from NumPy: so by the run's seed
        found = self.inner(self._inputs(batch, observed)).loss
        size = len(next(iter(batch.values()))) if self.kind in MIXTURES else 1  # theirs is the batch's sum
        return Terms(others={"loss": found / size})

    def infer(self, batch: Batch, observed: Observed | None = None) -> Posterior:
        """The means of the posteriors given a complete batch; `experts` and `targets` are empty."""
        statistics = {name: self.inner.encoders[name](x) for name, x in batch.items()}
        private: dict[str, Any] = {
            name: Point(found.style_embedding if self.private_dim else found.embedding[:, :0])
            for name, found in statistics.items()
        }
        shared = {name: Point(found.embedding) for name, found in statistics.items()}
        joint = self.inner.encode(self._inputs(batch), list(batch), return_mean=True).z
        return Posterior(private, shared, Point(joint), {}, {})

    @torch.no_grad()
    def cross_generate(self, batch: Batch, target: str, n: int = 1, generator: Generator | None = None) -> Tensor:
        """(n, B, ...) means of the target given what the batch has, private codes as they draw them."""
        filled = dict(batch)
        for name in self.names:  # MoPoE encodes all, and takes what is asked for
            filled.setdefault(name, torch.zeros_like(next(iter(batch.values()))))
        drawn = []
        with self._drawing(generator):
            for _ in range(n):
                given = list(batch)
                if self.kind in MIXTURES:
                    given = [given[int(torch.randint(len(given), ()))]]
                code = self.inner.encode(self._inputs(filled), given)
                drawn.append(self._means(self.inner.decode(code, target)[target]))
        return torch.stack(drawn)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None) -> dict[str, Tensor]:
        """{name: (n, ...)} means from their priors."""
        with self._drawing(generator):
            found = self.inner.decode(self.inner.generate_from_prior(n))
        return {name: self._means(found[name]) for name in self.names}

    @torch.no_grad()
    def log_likelihood(self, batch: Batch, samples: int = 1_000, generator: Generator | None = None) -> Tensor:
        """(B,) their importance-weighted estimates of log p(x) in nats."""
        found = []
        with self._drawing(generator):
            for i in range(len(next(iter(batch.values())))):
                one = {name: x[i : i + 1] for name, x in batch.items()}
                # MMVAE+ takes the last modality out to count the items: give it one that nobody misses.
                inputs = self._inputs(one | {"none": torch.zeros(1)} if self.kind == "MMVAEPlus" else one)
                found.append(-self.inner.compute_joint_nll(inputs, samples, samples).reshape(()))
        return torch.stack(found)

    def _means(self, found: Tensor) -> Tensor:
        return found.sigmoid() if self.logits else found

    def _inputs(self, batch: Batch, observed: Observed | None = None):
        from multivae.data.datasets import IncompleteDataset, MultimodalBaseDataset

        if observed is None:
            return MultimodalBaseDataset(dict(batch))
        return IncompleteDataset(dict(batch), dict(observed))

    @contextmanager
    def _drawing(self, generator: Generator | None):
        """Theirs draw from the global generators: here by a number from `generator`."""
        device = next(self.parameters()).device
        seed = int(torch.randint(2**31, (), generator=generator, device=device if generator else None))
        state = np.random.get_state()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            np.random.seed(seed)
            yield
        np.random.set_state(state)


def _multivae() -> Any:
    try:
        import multivae.models
    except ImportError as error:
        raise DMVAEError("the package multivae is not installed; `pip install multivae` brings it.") from error
    return multivae.models


def encoder_of(network: nn.Module, shared_dim: int, private_dim: int) -> nn.Module:
    """An encoder of this library, (B, 2 private_dim + 2 shared_dim) statistics, in the form that MultiVae expects."""
    from multivae.models.base import ModelOutput
    from multivae.models.nn.base_architectures import BaseEncoder, BaseMultilatentEncoder

    base: Any = BaseMultilatentEncoder if private_dim else BaseEncoder

    class Encoder(base):
        def __init__(self):
            super().__init__()
            self.network, self.latent_dim, self.style_dim = network, shared_dim, private_dim

        def forward(self, x: Tensor):
            sizes = [private_dim, private_dim, shared_dim, shared_dim]
            names = ("style_embedding", "style_log_covariance", "embedding", "log_covariance")
            # Copies, since MultiVae writes into them where items are missing.
            parts = [part.clone() for part in self.network(x).split(sizes, -1)]
            return ModelOutput(**{name: part for name, part in zip(names, parts) if part.shape[1]})

    return Encoder()


def decoder_of(network: nn.Module, shared_dim: int, private_dim: int) -> nn.Module:
    """A decoder of this library in the form that MultiVae expects; its code is [shared, private], ours the reverse."""
    from multivae.models.base import BaseDecoder, ModelOutput

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.network, self.latent_dim = network, private_dim + shared_dim

        def forward(self, z: Tensor):
            return ModelOutput(reconstruction=self.network(z.roll(-shared_dim, -1) if private_dim else z))

    return Decoder()


def successor(
    data: DataSet,
    splits: Splits,
    *,
    kind: str,
    shared_dim: int,
    weights: Mapping[str, float],
    width: float,
    initialise: str,
    private_dim: int = 0,
    likelihood: str = "laplace",
    settings: Mapping[str, Any],
) -> Successor:
    """`Successor` for a data set. Raises DMVAEError without the package multivae."""
    private_dims = dict.fromkeys(data.modalities, private_dim)
    of = digits.modalities(data, *digits.LIKELIHOODS[likelihood], shared_dim, private_dims, weights, width, initialise)
    shapes = {name: tuple(items.shape[1:]) for name, items in splits.train.items.items()}
    networks = {name: (modality.encoder, modality.decoder) for name, modality in of.items()}
    return Successor(kind, networks, shapes, shared_dim, private_dim, weights, likelihood, settings)


def _row(kind: str, title: str, **options: Any) -> Row:
    """Of PolyMNIST: their authors' settings; one code of 64 dimensions."""
    return replace(
        MVAE_ROW,
        name=f"polymnist-multivae-{kind.lower()}",
        title=title,
        build=successor,
        schedule=annealed if kind == "MVAE" else tuples,
        options={"kind": kind, "shared_dim": 64, **HOW, **options},
    )


SUCCESSORS = {
    row.title: row
    for row in (
        # beta 2.5, MVTCAE's alpha 5/6: their authors' on PolyMNIST
        _row("MoPoE", "MoPoE", settings={"beta": 2.5}),
        _row("MVTCAE", "MVTCAE", settings={"beta": 2.5, "alpha": 5 / 6}),
        _row("MMVAEPlus", "MMVAE+", shared_dim=32, private_dim=32, settings={"K": 1, "beta": 2.5}),
        _row("MVAE", "MVAE, MultiVae", settings={"k": 1, "warmup": 0}),
        _row("MMVAE", "MMVAE, MultiVae", settings={"K": 1}),
    )
}
SUCCESSORS_MISSING = {
    of.title: of
    for title in ("MoPoE", "MVTCAE")
    for of in (with_missing(SUCCESSORS[title], 0.2), with_missing(SUCCESSORS[title], 0.5))
}
