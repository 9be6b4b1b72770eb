"""What a data set is: one object that says its name, modalities, loader, networks and weights.

`dmvae_lib.paper.data.digits.MNIST_SVHN` and `dmvae_lib.paper.data.flowers.FLOWERS` are the paper's two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.pairing import PairedData

SOURCES = ("embedded", "subset", "full")
EVALUATIONS = ("test", "validation")
ELSEWHERE = (  # what helps where a file is missing
    "If the files are elsewhere, name their folder, `make reproduce DATA=folder` or the notebook's `data`. Profile quick "
    "needs no download."
)


def check_asked(loader: str, source: str, evaluation: str) -> None:
    """Raises DMVAEError, in the loader's name, for an unknown source or evaluation."""
    for what, value, known in (("source", source, SOURCES), ("evaluation", evaluation, EVALUATIONS)):
        if value not in known:
            raise DMVAEError(f"{loader}: unknown {what} {value!r}; expected one of {', '.join(known)}.")


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set as loaded from one source.

    train, test: what to train on and what to evaluate on; `test` is a held-out part of the training data where the
    loader was asked for evaluation="validation". titles: what each modality really is, {"mnist": "scikit-learn
    digits"}. facts: what a data set has beside this (flowers: class names, backbone, text model, pictures, ...).
    """

    train: PairedData
    test: PairedData
    titles: dict[str, str]
    source: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet:
    """A data set: its loader and what the paper's rows build their models from. Two of one name are equal.

    load(source, root, evaluation, cache=None, device="cpu", permutations=30) -> Splits. source: one of SOURCES;
        root: the folder with the files; evaluation: one of EVALUATIONS, "validation" holding out a part of the
        training data as `test`; cache, device: for what is computed from the files, where anything is.
        Raises DMVAEError for files that are missing or damaged; no source stands in for another.
    networks(family, modality, private_dim, shared_dim, width, initialise) -> (encoder, decoder). family: "dmvae" for
        DMVAE and whatever has Gaussian experts, "mmvae" for MMVAE's own architecture, whose decoders return means in
        [0, 1]; width: scales the hidden layers; initialise: as `dmvae_lib.paper.networks.initialise` takes it.
    joint_encoder(shared_dim, width, initialise) -> the network of all modalities together that JMVAE and TELBO need.
    weights: {source: {modality: lambda}}, DMVAE's weights of the log-likelihoods.
    classifier(modality) -> an untrained evaluation classifier of that modality's images.
    """

    name: str
    modalities: tuple[str, ...]
    load: Callable[..., Splits] = field(compare=False)
    networks: Callable[[str, str, int, int, float, str], tuple[nn.Module, nn.Module]] | None = field(
        default=None, compare=False
    )
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict, compare=False)
    classifier: Callable[[str], nn.Module] | None = field(default=None, compare=False)
    joint_encoder: Callable[[int, float, str], nn.Module] | None = field(default=None, compare=False)
