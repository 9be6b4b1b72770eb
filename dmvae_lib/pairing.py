"""Observations of several modalities: paired by class (MMVAE's protocol, Shi et al. 2019, Sec. 5.1) or aligned."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dmvae_lib.errors import DMVAEError

Labels: TypeAlias = Tensor | np.ndarray | Sequence[int]
Items: TypeAlias = Tensor | np.ndarray
BLOCK = 2**24  # bytes of a modality that are looked at together


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
    of_class: dict[str, dict[int, Tensor]] = {}  # the indices of each class
    for name, given in labels.items():
        values = _integers(f"the labels of {name!r}", given).cpu()
        classes, sizes = values.unique(return_counts=True)
        of_class[name] = dict(zip(classes.tolist(), values.argsort(stable=True).split(sizes.tolist())))

    generator = torch.Generator().manual_seed(seed)
    index: dict[str, list[Tensor]] = {name: [] for name in labels}
    for label in sorted(set().union(*of_class.values())):
        counts = {name: len(found.get(label, ())) for name, found in of_class.items()}
        if 0 in counts.values():
            listed = ", ".join(f"{count} in {name!r}" for name, count in counts.items())
            repair = "drop the class, or add items of it where it is missing"
            raise DMVAEError(
                f"pairing: class {label} has {listed} items; every class must be in every data set: {repair}."
            )
        n = min(max_per_class, *counts.values())
        for name, found in of_class.items():
            # Sorting random numbers makes all permutations at once; float64 has no ties to speak of.
            order = torch.rand(permutations, n, generator=generator, dtype=torch.float64).argsort(-1)
            index[name].append(found[label][order].flatten())
    return {name: torch.cat(parts) for name, parts in index.items()}


@dataclass(frozen=True, eq=False)
class PairedData:
    """Items of several modalities, each stored once, and the P tuples of them that count as observations.

    items: {name: (N_name, ...)}, uint8 images (N_name, C, H, W) or floating point. Tensors, or NumPy arrays, which
        stay as they are: of a memory map only the rows of a batch are read.
    index: {name: (P,) int64}; observation p has the items items[name][index[name][p]].
    item_labels: {name: (N_name,) int64}, the class of each item, the same for all items of an observation; or None.
    observed: {name: (P,) bool}, False where the item is missing and its values, which may be NaN, count for nothing;
        a modality that is not named is always there. None: nothing is missing.

    Raises DMVAEError if the modalities, lengths, dtypes or labels do not fit together, an index is out of range, an
    observation has no item at all, or a value of an observed item is not finite.
    """

    items: dict[str, Items]
    index: dict[str, Tensor]
    item_labels: dict[str, Tensor] | None = None
    observed: Mapping[str, Tensor] | None = None

    def __post_init__(self):
        _check_kinds(self.items)
        device = _device(self.items)
        for part in ("index", "item_labels"):
            if (given := getattr(self, part)) is None:
                continue
            if set(given) != set(self.items):
                named = f"items of {sorted(self.items)}, {part} of {sorted(given)}"
                raise DMVAEError(f"PairedData: {named}; both must name the same modalities.")
            values = {}
            for name, n in ((name, len(x)) for name, x in self.items.items()):
                what = f"PairedData: the {part.removeprefix('item_')} of {name!r}"
                values[name] = _integers(what, given[name], n if part == "index" else None).to(device)
                if part == "item_labels" and len(values[name]) != n:
                    lengths = f"{len(values[name])} and {n}"
                    raise DMVAEError(f"{what}: labels and items of different length, {lengths}; give one per item.")
            object.__setattr__(self, part, values)
        lengths = {name: len(index) for name, index in self.index.items()}
        if len(set(lengths.values())) > 1:
            raise DMVAEError(f"PairedData: indices of length {lengths}; all must have one length.")
        for name in self.names[1:] if self.item_labels is not None else ():
            wrong = (self.item_labels[name][self.index[name]] != self.labels).nonzero().flatten()
            if len(wrong):
                where = f"in {len(wrong)} of {len(self)} pairs, first in pair {int(wrong[0])}"
                raise DMVAEError(
                    f"PairedData: {self.names[0]!r} and {name!r} disagree on the class {where}; pair by class."
                )
        # Every modality gets its mask, or none has one: what is missing is written in one way.
        object.__setattr__(self, "observed", _masks(self.observed, self.index))
        for name, items in self.items.items():
            needed = torch.zeros(len(items), dtype=torch.bool, device=device)
            needed[self.index[name] if self.observed is None else self.index[name][self.observed[name]]] = True
            _check_finite(name, items, needed)

    @classmethod
    def pair(
        cls,
        items: Mapping[str, Items],
        item_labels: Mapping[str, Labels],
        permutations: int = 30,
        max_per_class: int = 10_000,
        seed: int = 0,
    ) -> PairedData:
        """The items paired by `pair_many`; same arguments and errors, and those of PairedData."""
        _check_kinds(items)
        return cls(dict(items), pair_many(item_labels, permutations, max_per_class, seed), dict(item_labels))

    @classmethod
    def aligned(
        cls, items: Mapping[str, Items], labels: Labels | None = None, observed: Mapping[str, Tensor] | None = None
    ) -> PairedData:
        """Observations whose items stand in the same row of every modality; errors as PairedData's.
        items: {name: (P, ...)}; labels: (P,) integers, the class of each observation: coherence needs them, training
        does not; observed: {name: (P,) bool}, False where the item is missing, for the modalities that have gaps."""
        _check_kinds(items)
        lengths = {name: len(values) for name, values in items.items()}
        if len(set(lengths.values())) > 1:
            raise DMVAEError(
                f"PairedData.aligned: {lengths} rows; row i of every modality must be one observation. Fill missing "
                "rows and name them in `observed`; for unpaired items of known classes see PairedData.pair."
            )
        rows = torch.arange(next(iter(lengths.values())))
        item_labels = None if labels is None else dict.fromkeys(items, labels)
        return cls(dict(items), dict.fromkeys(items, rows), item_labels, observed)

    def __len__(self) -> int:
        return len(self.index[self.names[0]])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.items)

    @property
    def device(self) -> torch.device:
        """Where batches are made and tensors lie; arrays stay in the machine's memory or in their file."""
        return self.index[self.names[0]].device

    @property
    def labels(self) -> Tensor | None:
        """(P,), the class of each observation, or None."""
        return None if self.item_labels is None else self.item_labels[self.names[0]][self.index[self.names[0]]]

    def batch(self, rows: Labels) -> dict[str, Tensor]:
        """The observations `rows`, (B,) integers: {name: (B, ...) float32}; uint8 images scaled to [0, 1].
        A missing item is all zeros. Raises DMVAEError for what are no integers and, on the CPU, for rows out of range;
        on an accelerator looking at them would make every training step wait."""
        rows = _integers("batch: rows", rows, len(self) if self.device.type == "cpu" else None)
        batch = {name: _take(items, self.index[name][rows]).to(self.device) for name, items in self.items.items()}
        batch = {name: x.float() / 255 if x.dtype == torch.uint8 else x.float() for name, x in batch.items()}
        for name, there in (self.masks(rows) or {}).items():
            batch[name] = batch[name].masked_fill(~there.view(-1, *[1] * (batch[name].dim() - 1)), 0.0)
        return batch

    def masks(self, rows: Tensor) -> dict[str, Tensor] | None:
        """{name: (B,) bool}, which items of the observations `rows` are there; None if nothing is missing anywhere."""
        return None if self.observed is None else {name: mask[rows] for name, mask in self.observed.items()}

    def to(self, device: str | torch.device) -> PairedData:
        """The same data on `device`, images still uint8; arrays stay where they are, and `batch` moves its rows."""
        return self._with(lambda x: x.to(device) if isinstance(x, Tensor) else x)

    def select(self, rows: Tensor) -> PairedData:
        """The observations `rows`, (B,) integers or (P,) bool, over the same items; not checked again."""
        return self._with(lambda x: x[rows.to(x.device)], "items", "item_labels")

    def split(
        self, shares: Sequence[float], seed: int = 0, groups: Labels | Sequence[str] | None = None
    ) -> list[PairedData]:
        """The observations divided at random into parts of the given shares, e.g. (0.8, 0.1, 0.1), over the same items.

        groups: (P,) numbers or strings; observations of one group (one patient's, the captions of one picture) stay
        together, and shares are met as nearly as the groups' sizes allow. No item is ever in two parts.

        Raises DMVAEError for shares that are not positive or do not sum to 1, for a part that would be empty, and for
        an item of several observations that are not of one group, as in pairs made by class: divide the items of each
        modality first and pair each part.
        """
        shares = [float(share) for share in shares]
        if not shares or not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
            raise DMVAEError(f"split: shares {shares}; expected positive numbers whose sum is 1, as (0.8, 0.1, 0.1).")
        unit = torch.arange(len(self))
        if groups is not None:
            names = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
            if names.shape != (len(self),):
                raise DMVAEError(f"split: groups of shape {names.shape}; expected ({len(self)},), one per observation.")
            unit = torch.from_numpy(np.unique(names, return_inverse=True)[1])
        for name, index in self.index.items():
            there = slice(None) if self.observed is None else self.observed[name].cpu()
            rows, units = index.cpu()[there], unit[there]
            owner = torch.zeros(len(self.items[name]), dtype=torch.int64)
            owner[rows] = units
            shared = rows[owner[rows] != units]
            if len(shared):
                where = (
                    f"item {int(shared[0])} of {name!r} is in several {'observations' if groups is None else 'groups'}"
                )
                raise DMVAEError(
                    f"split: {where} and could come into several parts. Divide the items of each modality first and "
                    "pair each part, or give groups that keep them together."
                )
        sizes = unit.bincount()
        order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
        middle = sizes[order].cumsum(0) - sizes[order] / 2  # of each unit in that order, counted in observations
        part = torch.empty_like(order)
        part[order] = torch.bucketize(middle.double(), torch.tensor(shares).double().cumsum(0)[:-1] * len(self))
        part = part[unit]
        found = part.bincount(minlength=len(shares)).tolist()
        if 0 in found:
            whole = f"shares {shares} of {len(self)} observations" + f" in {len(sizes)} groups" * (groups is not None)
            raise DMVAEError(
                f"split: {whole} make parts of {found}; give larger shares, or fewer, for one in every part."
            )
        return [self.select(part == number) for number in range(len(shares))]

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of all names, shapes, dtypes, values and masks.
        Neither the device matters nor whether items are a tensor, an array or a memory map."""
        digest = hashlib.sha256()
        parts = {"items": self.items, "labels": self.item_labels, "index": self.index, "observed": self.observed}
        for part, values in parts.items():
            for name, x in sorted((values or {}).items()):
                digest.update(f"{part} {name} {tuple(x.shape)} {_take(x, slice(0, 0)).dtype}\n".encode())
                for _, block in _blocks(x):
                    digest.update(block.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def _with(self, change: Callable, *kept: str) -> PairedData:
        """`change` made to all fields but those kept; not checked again, which would read all of a memory map."""
        data = object.__new__(PairedData)
        for part in fields(self):
            values = getattr(self, part.name)
            if values is not None and part.name not in kept:
                values = {name: change(x) for name, x in values.items()}
            vars(data)[part.name] = values
        vars(data)["observed"] = _masks(data.observed, data.index)
        return data


def _described(value) -> str:
    if not isinstance(value, Tensor | np.ndarray):
        return type(value).__name__
    return f"{type(value).__name__} {tuple(value.shape)} of {value.dtype}"


def _device(items: Mapping[str, Items]) -> torch.device:
    return next((values.device for values in items.values() if isinstance(values, Tensor)), torch.device("cpu"))


def _integers(what: str, values: Labels, n: int | None = None) -> Tensor:
    """(N,) int64, or DMVAEError for anything else and, unless n is None, for values outside 0 to n - 1."""
    try:
        found = values if isinstance(values, Tensor) else torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError) as error:
        advice = "number names by np.unique(names, return_inverse=True)[1]"
        raise DMVAEError(f"{what} are no array of integers ({str(error)[:60]} …); {advice}.") from error
    if (
        found.dim() != 1
        or not len(found)
        or found.dtype == torch.bool
        or found.is_floating_point()
        or found.is_complex()
    ):
        raise DMVAEError(f"{what}: {found.dtype} of shape {tuple(found.shape)}; expected integers (N,), at least 1.")
    found = found.long()
    if n is not None and not 0 <= int(found.min()) <= int(found.max()) < n:
        raise DMVAEError(f"{what}: from {int(found.min())} to {int(found.max())}; expected 0 to {n - 1}.")
    return found


def _masks(observed: Mapping[str, Tensor] | None, index: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """A mask (P,) for every modality, or None if nothing is missing; DMVAEError for masks that are none."""
    if observed is None:
        return None
    if unknown := set(observed) - set(index):
        raise DMVAEError(f"PairedData: observed names {sorted(unknown)}; the modalities are {sorted(index)}.")
    masks = {name: torch.ones_like(rows, dtype=torch.bool) for name, rows in index.items()}
    for name, mask in observed.items():
        mask = torch.as_tensor(mask)
        if mask.dtype != torch.bool or mask.shape != masks[name].shape:
            expected = f"expected ({len(masks[name])},) of bool, True where the item is there"
            raise DMVAEError(f"PairedData: observed of {name!r}: {_described(mask)}; {expected}.")
        masks[name] = mask.to(masks[name].device)
    empty = (~torch.stack(list(masks.values())).any(0)).nonzero().flatten()
    if len(empty):
        first = int(empty[0])
        raise DMVAEError(f"PairedData: {len(empty)} observations have no item, first observation {first}; drop them.")
    return None if all(mask.all() for mask in masks.values()) else masks


def _check_kinds(items: Mapping[str, Items]) -> None:
    """DMVAEError for what is no {name: numbers (N, ...)} that an encoder takes, with what to pass instead."""
    if not isinstance(items, Mapping) or not items:
        expected = "expected {name: tensor or array (N, ...)}, at least one modality."
        raise DMVAEError(f"PairedData: items are a {type(items).__name__}; {expected}{_advice(items)}")
    for name, values in items.items():
        found = f"PairedData: items of {name!r}: {_described(values)}"
        if not isinstance(values, Tensor | np.ndarray) or isinstance(values, np.ma.MaskedArray):
            raise DMVAEError(f"{found}; expected a tensor or an array (N, ...).{_advice(values)}")
        try:
            dtype = _take(values, slice(0, 0)).dtype
        except (IndexError, TypeError) as error:
            raise DMVAEError(f"{found}; expected numbers (N, ...), one row for each item.") from error
        if values.ndim != 4 if dtype == torch.uint8 else not dtype.is_floating_point:
            raise DMVAEError(
                f"{found}; expected floating point, or uint8 images (N, C, H, W), which are divided by 255. Pass other "
                "images of integers divided by the largest value there can be (x / 255, x / 65535), grey uint8 images "
                "(N, H, W) as x[:, None], classes as one_hot(x).float() (torch.nn.functional), all else as x.float(), "
                "or x.astype('float32') of an array."
            )


def _advice(value) -> str:
    if isinstance(value, DataLoader | Dataset):
        return " Stack the data set's items into one tensor or array, as torch.stack([item for item, _ in data_set])."
    if isinstance(value, np.ma.MaskedArray):
        return " Pass x.data, and observed={name: ~np.ma.getmaskarray(x).any(1)}."
    if type(value).__module__.startswith("pandas"):
        return " Pass frame.to_numpy()."
    return " Stack them: torch.stack(items) or np.stack(items)." if isinstance(value, list | tuple) else ""


def _check_finite(name: str, items: Items, needed: Tensor) -> None:
    """DMVAEError if a value of the items that are needed, (N,) bool, is not finite."""
    count, first = 0, 0
    if _take(items, slice(0, 0)).is_floating_point():
        for start, block in _blocks(items):
            chosen = needed[start : start + len(block)].to(block.device)
            values = block if chosen.all() else block[chosen]
            # aminmax passes NaN on and copies nothing
            if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
                wrong = (~block.isfinite().reshape(len(block), -1)).sum(1) * chosen
                first = first if count else start + int(wrong.nonzero()[0])
                count += int(wrong.sum())
    if count:
        repair = "repair or remove those items, or name them as missing: observed={name: np.isfinite(x).all(1)}"
        raise DMVAEError(f"PairedData: {count} values of {name!r} are not finite, first in item {first}; {repair}.")


def _take(items: Items, rows: Tensor | slice) -> Tensor:
    """The rows as a tensor; of an array a copy in memory, in this machine's byte order."""
    if isinstance(items, Tensor):
        return items[rows]
    chosen = items[rows].copy() if isinstance(rows, slice) else items[rows.cpu().numpy()]  # which is a copy already
    mapped = getattr(items, "_mmap", None)
    # Pages that were read stay in the system's cache but leave this process; a private map ("c") may hold changes.
    if mapped is not None and items.mode != "c" and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_DONTNEED)
    return torch.from_numpy(np.asarray(chosen).astype(items.dtype.newbyteorder("="), copy=False))


def _blocks(items: Items) -> Iterator[tuple[int, Tensor]]:
    """All rows in order, some BLOCK bytes at a time: (number of the first row, rows)."""
    step = max(1, BLOCK * len(items) // max(1, items.nbytes))
    for start in range(0, len(items), step):
        yield start, _take(items, slice(start, start + step))
