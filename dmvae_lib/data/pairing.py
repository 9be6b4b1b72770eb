"""Paired data from unpaired labelled data: the MMVAE protocol (Shi et al. 2019), used in Sec. 5.1."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from dmvae_lib.errors import DMVAEError

Labels: TypeAlias = Tensor | np.ndarray | Sequence[int]


def pair_by_class(
    labels_a: Labels, labels_b: Labels, permutations: int = 30, max_per_class: int = 10_000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """`pair_many` of two data sets, labels (A,) and (B,): (index_a, index_b), each (P,)."""
    index = pair_many({"a": labels_a, "b": labels_b}, permutations, max_per_class, seed)
    return index["a"], index["b"]


def pair_many(
    labels: Mapping[str, Labels], permutations: int = 30, max_per_class: int = 10_000, seed: int = 0
) -> dict[str, Tensor]:
    """Tuples of indices of one class, one index per data set (Shi et al. 2019, for any number of data sets).

    For every class, n is the smallest of the class's counts and `max_per_class`; each data set gives its first n
    indices of the class; `permutations` independent random orders of each list are put side by side.

    labels: {name: (N_name,) integers}. Returns {name: (P,) LongTensor}, P = permutations * (sum of n over classes),
    class by class; the same seed gives the same pairs.

    Raises DMVAEError for labels that are empty, not integers or not 1-D, for a class that a data set lacks, for
    counts below 1 and for a negative seed.
    """
    for name, value, least in (
        ("permutations", permutations, 1),
        ("max_per_class", max_per_class, 1),
        ("seed", seed, 0),
    ):
        if not isinstance(value, Integral) or value < least:
            raise DMVAEError(f"pairing: {name}={value!r}; expected a whole number, at least {least}.")
    if not labels:
        raise DMVAEError("pair_many: no labels; give a mapping from each data set's name to its labels.")
    tensors = {name: _as_labels(name, values) for name, values in labels.items()}
    counts = {name: _counts(values) for name, values in tensors.items()}
    for label in sorted(set().union(*counts.values())):
        found = {name: counts[name].get(label, 0) for name in tensors}
        if 0 in found.values():
            listed = ", ".join(f"{count} in {name!r}" for name, count in found.items())
            raise DMVAEError(
                f"pairing: class {label} has {listed} items; every class must be in every data set. "
                "Drop the class, or add items of it where it is missing."
            )

    generator = torch.Generator().manual_seed(seed)
    by_class = {
        name: dict(zip(counts[name], values.argsort(stable=True).split(list(counts[name].values())), strict=True))
        for name, values in tensors.items()
    }
    index: dict[str, list[Tensor]] = {name: [] for name in tensors}
    for label in counts[next(iter(tensors))]:
        n = min(max_per_class, *(counts[name][label] for name in tensors))
        for name in tensors:
            # Sorting random numbers makes all permutations at once; float64 has no ties to speak of.
            order = torch.rand(permutations, n, generator=generator, dtype=torch.float64).argsort(-1)
            index[name].append(by_class[name][label][order].flatten())
    return {name: torch.cat(parts) for name, parts in index.items()}


@dataclass(frozen=True, eq=False)
class PairedData:
    """Items of several modalities, each stored once, and the tuples of them that count as observations.

    items: {name: (N_name, ...)}, uint8 images (N_name, C, H, W) or floating point; item_labels: {name: (N_name,)};
    index: {name: (P,)}, the items of pair p are items[name][index[name][p]], all of one class.

    Raises DMVAEError if the modalities, lengths, dtypes or labels do not fit together, an index is out of range, or a
    value is not finite.
    """

    items: dict[str, Tensor]
    item_labels: dict[str, Tensor]
    index: dict[str, Tensor]

    def __post_init__(self):
        if not self.items or not (set(self.items) == set(self.item_labels) == set(self.index)):
            raise DMVAEError(
                f"PairedData: items are of {sorted(self.items)}, labels of {sorted(self.item_labels)}, indices of "
                f"{sorted(self.index)}; all three must name the same modalities, at least one."
            )
        for part, values in (("items", self.items), ("labels", self.item_labels), ("index", self.index)):
            for name, tensor in values.items():
                if not isinstance(tensor, Tensor):
                    raise DMVAEError(f"PairedData: the {part} of {name!r}: {type(tensor).__name__}; expected a tensor.")
        for name, items in self.items.items():
            labels, index = self.item_labels[name], self.index[name]
            _check_items(name, items)
            for what, values in (("labels", labels), ("index", index)):
                if values.dtype != torch.int64 or values.dim() != 1:
                    raise DMVAEError(
                        f"PairedData: the {what} of {name!r}: shape {tuple(values.shape)} and {values.dtype}; expected "
                        "1-D and torch.int64."
                    )
            if len(labels) != len(items):
                raise DMVAEError(
                    f"PairedData: labels and images of different length: {name!r} has {len(labels)} labels and "
                    f"{len(items)} items; give one label per item."
                )
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(items):
                raise DMVAEError(
                    f"PairedData: the index of {name!r} runs from {int(index.min())} to {int(index.max())}; expected "
                    f"0 to {len(items) - 1}, the items there are."
                )
        lengths = {name: len(index) for name, index in self.index.items()}
        if len(set(lengths.values())) > 1 or 0 in lengths.values():
            raise DMVAEError(f"PairedData: indices of length {lengths}; all must have one length, at least 1.")
        for name in self.names[1:]:
            wrong = (self.item_labels[name][self.index[name]] != self.labels).nonzero().flatten()
            if len(wrong):
                raise DMVAEError(
                    f"PairedData: {self.names[0]!r} and {name!r} disagree on the class in {len(wrong)} of {len(self)} "
                    f"pairs, first in pair {int(wrong[0])}; pair items of one class, as PairedData.pair does."
                )

    @classmethod
    def pair(
        cls,
        items: Mapping[str, Tensor],
        item_labels: Mapping[str, Labels],
        permutations: int = 30,
        max_per_class: int = 10_000,
        seed: int = 0,
    ) -> PairedData:
        """The items paired by `pair_many`; same arguments and errors, and those of PairedData."""
        labels = {name: _as_labels(name, values) for name, values in item_labels.items()}
        index = pair_many(labels, permutations, max_per_class, seed)
        place = {name: items[name].device if name in items else "cpu" for name in labels}
        return cls(
            dict(items),
            {name: values.to(place[name]) for name, values in labels.items()},
            {name: values.to(place[name]) for name, values in index.items()},
        )

    def __len__(self) -> int:
        return len(self.index[self.names[0]])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.items)

    @property
    def labels(self) -> Tensor:
        """(P,), the class of each pair."""
        return self.item_labels[self.names[0]][self.index[self.names[0]]]

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """The pairs `rows`, (B,) LongTensor: {name: (B, ...) float32}, uint8 images scaled to [0, 1].

        Raises DMVAEError for rows of another dtype and, on the CPU, out of range; on an accelerator looking at them
        would make every training step wait.
        """
        if rows.dtype != torch.int64 or rows.dim() != 1:
            raise DMVAEError(
                f"batch: rows of shape {tuple(rows.shape)} and {rows.dtype}; expected 1-D and torch.int64."
            )
        if rows.device.type == "cpu" and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(self):
            raise DMVAEError(
                f"batch: rows from {int(rows.min())} to {int(rows.max())}; expected 0 to {len(self) - 1}, the pairs "
                "there are."
            )
        chosen = {name: items[self.index[name][rows]] for name, items in self.items.items()}
        return {name: x.float() / 255 if x.dtype == torch.uint8 else x.float() for name, x in chosen.items()}

    def to(self, device: str | torch.device) -> PairedData:
        """The same data on `device`; images stay uint8 there."""
        parts = (self.items, self.item_labels, self.index)
        return PairedData(*({name: values.to(device) for name, values in part.items()} for part in parts))

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of all names, shapes, dtypes and values; the device does not matter."""
        digest = hashlib.sha256()
        for part, values in (("items", self.items), ("labels", self.item_labels), ("index", self.index)):
            for name in sorted(values):
                tensor = values[name].detach().cpu().contiguous()
                digest.update(f"{part} {name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]


def _as_labels(name: str, labels: Labels) -> Tensor:
    """(N,) int64 on the CPU, or DMVAEError."""
    try:
        values = torch.as_tensor(labels if isinstance(labels, Tensor) else np.asarray(labels))
    except (TypeError, ValueError) as error:
        raise DMVAEError(f"the labels of {name!r} are no array of integers ({error}); give one per item.") from error
    if values.dim() != 1:
        raise DMVAEError(f"the labels of {name!r} have shape {tuple(values.shape)}; expected (N,), one per item.")
    if len(values) == 0:
        raise DMVAEError(f"the labels of {name!r} are empty; give one per item.")
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
        raise DMVAEError(f"the labels of {name!r} have dtype {values.dtype}; expected integers, one per item.")
    return values.cpu().long()


def _counts(labels: Tensor) -> dict[int, int]:
    """{class: how many}, in ascending order of the classes."""
    classes, counts = labels.unique(return_counts=True)
    return dict(zip(classes.tolist(), counts.tolist(), strict=True))


def _check_items(name: str, items: Tensor) -> None:
    if items.dtype == torch.uint8:
        if items.dim() != 4:
            raise DMVAEError(f"PairedData: uint8 images of {name!r}: {tuple(items.shape)}; expected (N, C, H, W).")
    elif not items.is_floating_point() or items.dim() == 0:
        raise DMVAEError(
            f"PairedData: items of {name!r} have shape {tuple(items.shape)} and {items.dtype}; expected (N, ...), "
            "uint8 or floating point."
        )
    elif items.numel() and not torch.stack(items.aminmax()).isfinite().all():  # aminmax propagates NaN, copies nothing
        count = int((~items.isfinite()).sum())
        raise DMVAEError(f"PairedData: {count} values of {name!r} are not finite; remove or repair those items.")
