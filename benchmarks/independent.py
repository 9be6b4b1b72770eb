"""`make independent`: DMVAE and MMVAE trained by an implementation that is not ours, the package `multivae`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Dataset

from dmvae_lib import DMVAE, MMVAE, DMVAEError, PairedData, Schedule
from dmvae_lib.distributions import bernoulli
from dmvae_lib.paper import published
from dmvae_lib.paper.rows.digits import TABLE1
from dmvae_lib.paper.rows.row import Row
from dmvae_lib.paper.rows.successors import decoder_of, encoder_of
from dmvae_lib.paper.runs import Run, Setting, setting
from dmvae_lib.paper.tables import Results, table
from dmvae_lib.paper.workers import train_all
from dmvae_lib.training import batches, resolve_device

OURS = {name: TABLE1[name] for name in ("DMVAE", "MMVAE")}


def theirs(row: Row, place: Setting) -> Row:
    """The row's networks, pairs, updates and learning rate, trained by MultiVae: `multivae-dmvae`, `multivae-mmvae`."""
    title = f"{row.title}, MultiVae {version('multivae')}"
    trained = partial(fit, row.schedule(place.profile), resolve_device(place.device))
    return replace(row, name=f"multivae-{row.name}", title=title, fit=trained)


def fit(plan: Schedule, device: torch.device, model: DMVAE | MMVAE, data: PairedData, seed: int) -> None:
    """One epoch of MultiVae's trainer over `Pairs`."""
    settings = {"learning_rate": plan.learning_rate, "seed": seed}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        multivae_trainer(model, Pairs(data, plan, seed), plan.batch_size, device, **settings).train_step(1)


class Pairs(Dataset):
    """The pairs that `train` would take from `data` by this schedule and seed, in the form that MultiVae expects."""

    def __init__(self, data: PairedData, plan: Schedule, seed: int):
        self.data = data
        self.rows = torch.cat(list(islice(batches(data, plan.batch_size, seed, 0), plan.steps)))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int):
        from multivae.data.datasets.base import DatasetOutput

        return DatasetOutput(data={name: x[0] for name, x in self.data.batch(self.rows[i : i + 1]).items()})


def multivae_trainer(model: DMVAE | MMVAE, pairs: Dataset, batch_size: int, device: torch.device, **training: Any):
    """MultiVae's trainer for its own DMVAE or MMVAE around the encoders and decoders of `model`, trained in place.

    pairs: what its data loader takes. training: further settings of its `BaseTrainerConfig`.
    """
    from multivae.models import DMVAE as TheirDMVAE
    from multivae.models import MMVAE as TheirMMVAE
    from multivae.models import DMVAEConfig, MMVAEConfig
    from multivae.trainers import BaseTrainer, BaseTrainerConfig

    dims = model.private_dims
    networks = (
        {name: encoder_of(model.encoders[name], model.shared_dim, dims[name]) for name in model.names},
        {name: decoder_of(model.decoders[name], model.shared_dim, dims[name]) for name in model.names},
    )
    common = {"n_modalities": len(model.names), "latent_dim": model.shared_dim, "rescale_factors": model.weights}
    common |= {"input_dims": {name: tuple(pairs[0].data[name].shape) for name in model.names}}
    common |= {"uses_likelihood_rescaling": True}
    if isinstance(model, MMVAE):
        common |= {"decoders_dist": dict.fromkeys(model.names, "laplace")}
        common |= {"decoder_dist_params": {name: {"scale": 0.75} for name in model.names}}
        made = TheirMMVAE(MMVAEConfig(K=model.particles, **common), *networks)
        made.prior_log_var = model.prior_logits
    else:
        # It counts KL(q(z_s | source) || p) once per source, Eq. 3 once per source and target.
        common |= {"modalities_specific_dim": dims, "beta": len(model.names)}
        made = TheirDMVAE(DMVAEConfig(**common), *networks)
        made.recon_log_probs = dict.fromkeys(model.names, bernoulli().log_prob)  # its own refuses grey levels
    settings = {"learning_rate": 1e-3, "num_epochs": 1, "output_dir": tempfile.mkdtemp()} | training
    plan = BaseTrainerConfig(per_device_train_batch_size=batch_size, no_cuda=device.type == "cpu", **settings)
    return BaseTrainer(made, pairs, None, plan)


def command_line(description: str | None, **defaults: str | int) -> argparse.ArgumentParser:
    """A parser of `setting`'s parameters, as the Makefile gives them."""
    parser = argparse.ArgumentParser(description=description)
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", default=default, type=type(default))
    return parser


def need_multivae() -> None:
    """Raises DMVAEError without the package multivae."""
    if find_spec("multivae") is None:
        raise DMVAEError("the package multivae is not installed; `pip install multivae` brings it.")


def main() -> None:
    options = command_line(__doc__, profile="quick", seeds=1, device="auto", data="data").parse_args()
    try:
        need_multivae()
        place = setting(**vars(options))
        rows = {made.title: made for row in OURS.values() for made in (row, theirs(row, place))}
        train_all([Run(row, seed, place) for row in rows.values() for seed in range(place.seeds)])
        beside = {title: published.TABLE1[title.split(",")[0]] for title in rows}
        caption = "The same networks, pairs, updates and evaluation, trained by this library and by MultiVae."
        results = Results(place, "benchmarks/independent.py")
        shown = results.table("independent", table(rows, place, beside), f"Independent: {caption}")
    except DMVAEError as error:
        sys.exit(f"\n{error}")
    print(shown.to_string())


if __name__ == "__main__":
    main()
