"""The pairing protocol (Shi et al. 2019) and what PairedData promises: by class, aligned, with items missing."""

import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from dmvae_lib.errors import DMVAEError
from dmvae_lib.pairing import PairedData, pair_by_class, pair_many

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=30)
SEEDS = st.integers(0, 2**31)
A = torch.tensor([2, 0, 1, 0, 2, 2, 0, 1, 0])  # 4 zeros, 2 ones, 3 twos
B = torch.tensor([1, 1, 2, 0, 2, 1, 0])  # 2 zeros, 3 ones, 2 twos
C = torch.tensor([0, 2, 1, 1, 0, 2, 2])  # 2 zeros, 2 ones, 3 twos


def items_of(labels):
    """One 2-pixel image per label, which holds the item's own index."""
    return torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 1, 2).contiguous()


def paired(**changes):
    fields = {
        "items": {"a": items_of(A), "b": items_of(B).float()},
        "item_labels": {"a": A, "b": B},
        "index": dict(zip("ab", pair_by_class(A, B, permutations=2), strict=True)),
    }
    for field, parts in changes.items():
        fields[field] = {**fields.get(field, {}), **parts}
    return PairedData(**fields)


# --- the protocol ----------------------------------------------------------------------------------------------


def test_number_of_pairs_is_permutations_times_the_classes_smaller_counts():
    assert len(pair_by_class(A, B, permutations=7)[0]) == 7 * (2 + 2 + 2)
    assert len(pair_by_class(A, B, permutations=7, max_per_class=1)[0]) == 7 * 3


def test_each_permutation_uses_the_first_items_of_the_class_once():
    index_a, index_b = pair_by_class(A, B, permutations=5)
    # First 2 of each class in A by position: 0 -> 1, 3; 1 -> 2, 7; 2 -> 0, 4. In B: 0 -> 3, 6; 1 -> 0, 1; 2 -> 2, 4.
    assert torch.equal(index_a.bincount(minlength=9), torch.tensor([5, 5, 5, 5, 5, 0, 0, 5, 0]))
    assert torch.equal(index_b.bincount(minlength=7), torch.tensor([5, 5, 5, 5, 5, 0, 5]))
    for index in (index_a, index_b):  # class by class, permutation by permutation
        blocks = index.view(3, 5, 2)
        assert (blocks.sort(-1).values == blocks[:, :1].sort(-1).values).all()


def test_both_lists_are_permuted_and_independently():
    labels = torch.zeros(200, dtype=torch.int64)
    index_a, index_b = (index.view(30, 200) for index in pair_by_class(labels, labels))
    in_order = torch.arange(200)
    for left, right in ((index_a, in_order), (index_b, in_order), (index_a, index_b), (index_a[1:], index_a[:-1])):
        # Two independent permutations of 200 agree in about one place.
        assert (left == right).double().mean() < 0.05


def test_same_seed_same_pairs_other_seed_other_pairs():
    labels = torch.arange(10).repeat(20)
    first, again, other = (pair_by_class(labels, labels, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(
    "convert",
    [
        torch.Tensor.tolist,
        lambda labels: labels.to(torch.uint8),
        *(lambda labels, kind=kind: labels.numpy().astype(kind) for kind in (np.uint8, np.uint16, np.int32, np.int64)),
    ],
)
def test_labels_may_be_lists_arrays_or_tensors_of_any_integers(convert):
    assert all(
        torch.equal(x, y) for x, y in zip(pair_by_class(convert(A), convert(B)), pair_by_class(A, B), strict=True)
    )


def test_classes_need_not_be_consecutive():
    index_a, index_b = pair_by_class([-3, 500, 500], [500, -3], permutations=1)
    assert sorted(zip(index_a.tolist(), index_b.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_paper_sized_pairing_takes_seconds():
    labels = torch.arange(60_000) % 10
    start = time.perf_counter()
    index, _ = pair_by_class(labels, labels[torch.randperm(60_000)])
    assert len(index) == 1_800_000
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (([0, 1, 1], [0, 0]), {}, "class 1 has 2 in 'a', 0 in 'b' items"),
        (([0], [0, 5]), {}, "class 5 has 0 in 'a', 1 in 'b' items"),
        (([], [0]), {}, r"'a': torch.float.* of shape \(0,\)"),
        ((torch.zeros(2, 2, dtype=torch.int64), [0]), {}, r"shape \(2, 2\)"),
        ((3, [0]), {}, r"shape \(\)"),
        (([0.5], [0]), {}, "expected integers"),
        ((["x"], [0]), {}, "no array of integers"),
        (([0, [1, 2]], [0]), {}, "no array of integers"),
        (([0], [0]), {"permutations": 0}, "permutations=0"),
        (([0], [0]), {"permutations": 1.5}, "permutations=1.5"),
        (([0], [0]), {"max_per_class": 0}, "max_per_class=0"),
        (([0], [0]), {"seed": -1}, "seed=-1"),
    ],
)
def test_bad_input_is_named(labels, options, message):
    with pytest.raises(DMVAEError, match=message):
        pair_by_class(*labels, **options)


def test_no_data_set_is_an_error():
    with pytest.raises(DMVAEError, match="no labels"):
        pair_many({})


@given(st.lists(LABELS, min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 5), SEEDS)
def test_pairs_agree_on_their_class_and_use_each_item_once_in_a_permutation(labels, permutations, most, seed):
    labels = {str(number): torch.tensor(values) for number, values in enumerate(labels)}
    classes = [set(values.tolist()) for values in labels.values()]
    if any(one != classes[0] for one in classes):
        with pytest.raises(DMVAEError, match="every class must be in every data set"):
            pair_many(labels, permutations, most, seed)
        return
    index = pair_many(labels, permutations, most, seed)
    assert {rows.dtype for rows in index.values()} == {torch.int64}
    seen = [values[index[name]] for name, values in labels.items()]
    assert all(torch.equal(one, seen[0]) for one in seen)
    smallest = {label: min(most, *(int((values == label).sum()) for values in labels.values())) for label in classes[0]}
    for rows in index.values():
        _, counts = rows.unique(return_counts=True)
        assert len(rows) == permutations * sum(smallest.values()) and (counts == permutations).all()


@given(st.sampled_from([torch.int64, torch.float32, torch.bool]), st.integers(0, 2), SEEDS)
def test_labels_of_any_kind_are_paired_or_refused(dtype, dimensions, seed):
    labels = np.random.default_rng(seed).integers(0, 2, size=(3,) * dimensions)
    values = torch.as_tensor(labels).to(dtype)
    try:
        index = pair_many({"a": values, "b": values}, 1)
    except DMVAEError:
        assert dtype != torch.int64 or dimensions != 1
    else:
        assert torch.equal(values[index["a"]], values[index["b"]])


# --- PairedData ------------------------------------------------------------------------------------------------


def test_a_batch_holds_the_pairs_items_scaled_and_float():
    data = paired()
    rows = torch.tensor([4, 0, 4])
    batch = data.batch(rows)
    assert data.names == ("a", "b") and len(data) == 12
    assert batch["a"].dtype == batch["b"].dtype == torch.float32
    torch.testing.assert_close(batch["a"][:, 0, 0, 0] * 255, data.index["a"][rows].float())  # uint8: divided by 255
    torch.testing.assert_close(batch["b"][:, 0, 0, 1], data.index["b"][rows].float())  # float: as it is
    assert torch.equal(data.labels[rows], B[data.index["b"][rows]])


def test_pair_pairs_by_the_protocol():
    data = PairedData.pair({"a": items_of(A), "b": items_of(B)}, {"a": A.tolist(), "b": B.numpy()}, 2, 1, seed=5)
    expected = pair_by_class(A, B, 2, 1, 5)
    assert torch.equal(data.index["a"], expected[0]) and torch.equal(data.index["b"], expected[1])


def test_fingerprint_depends_on_every_value_and_on_nothing_else():
    fingerprint = paired().fingerprint
    assert len(fingerprint) == 16 and int(fingerprint, 16) >= 0
    assert paired().fingerprint == paired().to("cpu").fingerprint == fingerprint
    strided = paired(items={"a": items_of(A).flip(0).contiguous().flip(0)})
    assert strided.fingerprint == fingerprint
    pixel, label, index = items_of(A), B.clone(), paired().index["a"].clone()
    pixel[8, 0, 0, 1] += 1  # item 8 is in no pair
    label[5] = 9  # nor is item 5 of b
    index[[0, 1]] = index[[1, 0]]
    others = [
        paired(observed={"a": torch.arange(12) != 3}),
        paired(observed={"b": torch.arange(12) != 3}),
        paired(items={"a": pixel}),
        paired(item_labels={"b": label}),
        paired(index={"a": index}),
        paired(items={"b": items_of(B).double()}),
        paired(items={"a": items_of(A).reshape(-1, 1, 2, 1)}),
    ]
    assert len({fingerprint, *(other.fingerprint for other in others)}) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": {"c": items_of(A)}}, "same modalities"),
        ({"items": {"a": items_of(A)[:-1]}}, "labels and items of different length"),
        ({"items": {"a": torch.tensor(1.0)}}, r"expected numbers \(N, ...\)"),
        ({"items": {"a": items_of(A)[:, 0]}}, r"expected .*uint8 images \(N, C, H, W\)"),
        ({"items": {"b": torch.full((7, 2), float("nan"))}}, "12 values of 'b' are not finite, first in item 0"),
        ({"item_labels": {"a": A.float()}}, r"labels of 'a': torch.float32 of shape \(9,\); expected integers"),
        ({"item_labels": {"a": (A + 1) % 3}}, "disagree on the class in 12 of 12 pairs"),
        ({"index": {"a": torch.full((12,), 9)}}, "from 9 to 9; expected 0 to 8"),
        ({"index": {"a": torch.full((12,), -1)}}, "from -1 to -1; expected 0 to 8"),
        ({"index": {"a": torch.tensor([1])}}, "must have one length"),
        ({"index": dict.fromkeys("ab", torch.zeros(0, dtype=torch.int64))}, "at least 1"),
        ({"observed": {"c": torch.ones(12).bool()}}, r"observed names \['c'\]; the modalities are \['a', 'b'\]"),
        ({"observed": {"a": torch.ones(12)}}, r"torch.float32; expected \(12,\) of bool"),
        ({"observed": {"a": torch.ones(9).bool()}}, r"expected \(12,\) of bool"),
        ({"observed": {name: torch.arange(12) < 10 for name in "ab"}}, "2 observations have no item.* observation 10"),
    ],
)
def test_parts_that_do_not_fit_are_named(changes, message):
    with pytest.raises(DMVAEError, match=message):
        paired(**changes)


@pytest.mark.parametrize("rows", [torch.tensor([12]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor(0), ["x"]])
def test_rows_outside_the_data_are_an_error(rows):
    with pytest.raises(DMVAEError, match="batch: rows"):
        paired().batch(rows)


def test_indices_labels_and_rows_may_be_any_integers():
    expected, lists = (
        paired(),
        paired(
            index={name: index.tolist() for name, index in paired().index.items()},
            item_labels={"a": A.int(), "b": B.numpy().astype("uint8")},
        ),
    )
    assert lists.fingerprint == expected.fingerprint
    for rows in ([4, 0], np.array([4, 0]), range(4, -1, -4), torch.tensor([4, 0], dtype=torch.int32)):
        assert torch.equal(lists.batch(rows)["b"], expected.batch(torch.tensor([4, 0]))["b"])


@given(LABELS, st.data())
def test_paired_data_takes_an_index_only_if_the_classes_agree(labels, data):
    n = len(labels)
    index = {name: data.draw(st.lists(st.integers(-1, n), min_size=1, max_size=5)) for name in "ab"}
    right = len(index["a"]) == len(index["b"]) and all(
        0 <= i < n and 0 <= j < n and labels[i] == labels[j] for i, j in zip(index["a"], index["b"])
    )
    items, item_labels = {name: torch.rand(n, 2) for name in "ab"}, {name: torch.tensor(labels) for name in "ab"}
    tensors = {name: torch.tensor(rows) for name, rows in index.items()}
    if right:
        assert len(PairedData(items, tensors, item_labels)) == len(index["a"])
    else:
        with pytest.raises(DMVAEError):
            PairedData(items, tensors, item_labels)


# --- aligned data -------------------------------------------------------------------------------------------------


def test_row_i_of_each_modality_is_observation_i():
    audio, video = torch.rand(6, 3), torch.rand(6, 2, 2)
    data = PairedData.aligned({"audio": audio, "video": video})
    rows = torch.tensor([5, 0, 5])
    assert len(data) == 6 and data.labels is None and data.item_labels is None and data.masks(rows) is None
    assert all(torch.equal(data.batch(rows)[name], x[rows]) for name, x in (("audio", audio), ("video", video)))


def test_labels_of_aligned_data_are_the_observations():
    data = PairedData.aligned({"a": torch.rand(3, 1), "b": torch.rand(3, 1)}, labels=[4, 4, 2])
    assert data.labels.tolist() == [4, 4, 2]


def test_arrays_give_the_batches_and_the_fingerprint_of_equal_tensors(tmp_path):
    numbers, images = np.random.default_rng(0).normal(size=(50, 3)), items_of(torch.arange(50))
    np.save(tmp_path / "x.npy", numbers)
    tensors = PairedData.aligned({"x": torch.from_numpy(numbers), "y": images})
    rows = torch.tensor([49, 3, 3])
    for x in (numbers, np.load(tmp_path / "x.npy", mmap_mode="r"), numbers.astype(">f8"), numbers[::-1].copy()[::-1]):
        arrays = PairedData.aligned({"x": x, "y": images.numpy()})
        assert (
            arrays.items["x"] is x and arrays.to("cpu").items["x"] is x and arrays.split((0.5, 0.5))[0].items["x"] is x
        )
        assert all(torch.equal(arrays.batch(rows)[name], tensors.batch(rows)[name]) for name in "xy")
        assert arrays.fingerprint == tensors.fingerprint
    assert PairedData.aligned({"x": numbers[:, :2], "y": images}).fingerprint != tensors.fingerprint
    assert PairedData.aligned({"x": numbers.astype("float32"), "y": images}).fingerprint != tensors.fingerprint


def test_writing_into_a_batch_does_not_change_the_data():
    x = np.ones((4, 2), "float32")
    PairedData.aligned({"x": x}).batch(torch.arange(4))["x"].zero_()
    assert (x == 1).all()


MEASURE = """
import sys
import numpy as np
import torch
from torch import nn
from dmvae_lib import DMVAE, Modality, PairedData, Schedule, train

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

def trained(items, folder):
    networks = {"x": (nn.Linear(10_000, 6), nn.Linear(3, 10_000)), "y": (nn.Linear(2, 6), nn.Linear(3, 2))}
    model = DMVAE({name: Modality(*of, 1, likelihood="gaussian") for name, of in networks.items()}, 2)
    n = len(items["y"])
    data = PairedData.aligned(items, observed={"y": torch.arange(n) % 2 == 0})
    train(model, data.split((0.9, 0.1))[0], Schedule(n // 100, batch_size=100), device="cpu", directory=folder)

x, y = np.memmap(sys.argv[1], "float32", "r", shape=(7_500, 10_000)), torch.rand(7_500, 2)
trained({"x": x[:500], "y": y[:500]}, sys.argv[2] + "/few")
before = peak()
trained({"x": x, "y": y}, sys.argv[2] + "/all")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of its memory from /proc")
def test_a_memory_map_is_trained_on_without_being_in_memory_whole(tmp_path):
    """A file of 300 MB is checked, split, fingerprinted and trained on in less than a third of its size, masks and all."""
    with open(tmp_path / "x.bin", "wb") as file:
        file.truncate(7_500 * 10_000 * 4)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "x.bin"), str(tmp_path)]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 100


def test_changes_of_a_private_memory_map_survive(tmp_path):
    """Mode "c" keeps what was written in this process's pages alone: reading must not drop them."""
    np.save(tmp_path / "x.npy", np.zeros((8, 2)))
    x = np.load(tmp_path / "x.npy", mmap_mode="c")
    x[3] = 7
    data = PairedData.aligned({"x": x})
    assert data.fingerprint and data.batch(torch.tensor([3]))["x"].tolist() == [[7, 7]]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ({"a": torch.rand(5, 1), "b": torch.rand(4, 1)}, "'a': 5, 'b': 4.* one observation"),
        ({"a": torch.zeros(5, 3, 8, 8, dtype=torch.int32)}, r"torch.int32; .*x / 65535.*one_hot.*x.float\(\)"),
        ({"a": np.zeros((5, 3), bool)}, r"of bool; expected floating point.*astype\('float32'\)"),
        ({"a": np.zeros((5, 8, 8), "uint8")}, r"expected .*\(N, C, H, W\).*x\[:, None\]"),
        ({"a": np.array(["x", "y"])}, "of <U1; expected numbers"),
        ({"a": np.array([{}, {}])}, "of object; expected numbers"),
        ({"a": np.array(1.0)}, r"expected numbers \(N, ...\)"),
        ({"a": [1.0, 2.0]}, r"list; expected a tensor or an array.*torch.stack\(items\) or np.stack"),
        ({"a": pd.DataFrame({"x": [1.0]})}, r"DataFrame; expected .*frame.to_numpy\(\)"),
        ({"a": pd.Series([1.0])}, r"Series; expected .*frame.to_numpy\(\)"),
        ({"a": np.ma.masked_invalid([[1.0], [np.nan]])}, r"MaskedArray .*Pass x.data, and observed="),
        (
            {"a": TensorDataset(torch.rand(2, 1))},
            "TensorDataset; .*Stack the data set's items into one tensor or array",
        ),
        (DataLoader(TensorDataset(torch.rand(2, 1))), "items are a DataLoader; .*Stack the data set's items"),
        (torch.rand(2, 1), "items are a Tensor; expected {name: tensor or array"),
        ({}, "at least one modality"),
        ({"a": torch.zeros(0, 2)}, "at least 1"),
    ],
)
def test_what_cannot_be_aligned_is_named_with_what_to_pass(items, message):
    with pytest.raises(DMVAEError, match=message):
        PairedData.aligned(items)


@pytest.mark.parametrize("convert", [torch.from_numpy, np.asarray])
def test_values_that_are_not_finite_are_counted_and_the_first_is_named(convert, monkeypatch):
    monkeypatch.setattr("dmvae_lib.pairing.BLOCK", 100)  # 12 bytes a row: blocks of 8 rows
    x = np.zeros((40, 3), "float32")
    x[17, 1], x[38] = np.nan, np.inf
    with pytest.raises(DMVAEError, match="4 values of 'x' are not finite, first in item 17"):
        PairedData.aligned({"x": convert(x)})


# --- missing items --------------------------------------------------------------------------------------------------


def with_gaps(fill=float("nan")):
    """Six observations: `a` lacks 1 and 4, `b` lacks 0, `c` nothing."""
    there = {"a": torch.tensor([1, 0, 1, 1, 0, 1]).bool(), "b": torch.arange(6) > 0}
    items = {name: torch.arange(1.0, 13).view(6, 2) + 100 * i for i, name in enumerate("abc")}
    for name, mask in there.items():
        items[name][~mask] = fill
    return items, there


def test_a_missing_items_values_never_come_into_a_batch():
    rows = torch.arange(6)
    for fill in (float("nan"), float("inf"), 5.0):
        items, there = with_gaps(fill)
        data = PairedData.aligned(items, observed=there)
        batch = data.batch(rows)
        for name, mask in data.masks(rows).items():
            assert (batch[name][~mask] == 0).all() and torch.equal(batch[name][mask], items[name][mask])


def test_masks_are_of_all_modalities_and_of_the_rows_asked_for():
    items, there = with_gaps()
    rows = torch.tensor([4, 0, 5])
    masks = PairedData.aligned(items, observed=there).masks(rows)
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "a": [False, True, True],
        "b": [True, False, True],
        "c": [True, True, True],
    }


def test_masks_that_hide_nothing_are_as_none():
    items, _ = with_gaps(0)
    data = PairedData.aligned(items, observed={"a": np.ones(6, bool)})
    assert data.masks(torch.arange(6)) is None and data.fingerprint == PairedData.aligned(items).fingerprint


def test_only_a_value_that_is_observed_must_be_finite():
    items, there = with_gaps()
    with pytest.raises(DMVAEError, match="4 values of 'a' are not finite, first in item 1"):
        PairedData.aligned(items, observed={"b": there["b"]})
    items["b"][2, 0] = float("nan")
    with pytest.raises(DMVAEError, match="1 values of 'b' are not finite, first in item 2"):
        PairedData.aligned(items, observed=there)


# --- split ----------------------------------------------------------------------------------------------------------


def values(data):
    """Each observation's number, which its items hold."""
    return data.batch(torch.arange(len(data)))["a"][:, 0].long()


def test_parts_have_their_shares_and_every_observation_once():
    data = PairedData.aligned({"a": torch.arange(100.0)[:, None], "b": torch.arange(100.0)[:, None]}, torch.arange(100))
    parts = data.split((0.7, 0.2, 0.1), seed=1)
    assert [len(part) for part in parts] == [70, 20, 10]
    assert torch.cat([values(part) for part in parts]).sort().values.tolist() == list(range(100))
    assert all(torch.equal(part.labels, values(part)) for part in parts)
    assert values(parts[2]).tolist() != list(range(90, 100))  # at random
    again, other = data.split((0.7, 0.2, 0.1), seed=1), data.split((0.7, 0.2, 0.1), seed=2)
    assert [part.fingerprint for part in again] == [part.fingerprint for part in parts]
    assert not torch.equal(values(other[0]), values(parts[0]))


def test_parts_keep_their_masks_and_forget_them_where_nothing_is_missing():
    items = {"a": torch.arange(8.0)[:, None], "b": torch.arange(8.0)[:, None]}
    items["b"][5] = float("nan")
    parts = PairedData.aligned(items, observed={"b": torch.arange(8) != 5}).split((0.5, 0.5))
    for part in parts:
        masks = part.masks(torch.arange(4))
        assert (masks is None) == (5 not in values(part)) and (
            masks is None or (masks["b"] == (values(part) != 5)).all()
        )


@given(st.lists(st.integers(0, 5), min_size=6, max_size=40), SEEDS)
def test_a_group_is_never_in_two_parts(groups, seed):
    data = PairedData.aligned({"a": torch.arange(float(len(groups)))[:, None]})
    try:
        parts = data.split((0.5, 0.5), seed, groups)
    except DMVAEError:
        assert len(set(groups)) == 1
        return
    one, other = ({groups[i] for i in values(part).tolist()} for part in parts)
    assert not one & other and one | other == set(groups)


def test_groups_may_be_names_and_weigh_by_their_observations():
    groups = ["x"] * 50 + ["y"] * 25 + ["z"] * 25
    parts = PairedData.aligned({"a": torch.arange(100.0)[:, None]}).split((0.5, 0.5), groups=groups, seed=3)
    assert {len(part) for part in parts} <= {50, 25, 75}


def test_pairs_of_a_shared_item_are_not_torn_apart():
    """Pairs made by class share items: at random an item would come into several parts. Groups may save it."""
    with pytest.raises(DMVAEError, match="item . of 'a' is in several observations .* Divide the items"):
        paired().split((0.5, 0.5))
    items = {"image": torch.rand(4, 2), "caption": torch.rand(12, 3)}
    captions = PairedData(items, {"image": torch.arange(4).repeat_interleave(3), "caption": torch.arange(12)})
    parts = captions.split((0.5, 0.5), groups=captions.index["image"])
    assert [len(part) for part in parts] == [6, 6]
    assert not set(parts[0].index["image"].tolist()) & set(parts[1].index["image"].tolist())
    with pytest.raises(DMVAEError, match="item . of 'image' is in several groups"):
        captions.split((0.5, 0.5), groups=torch.arange(12) % 4)


def test_a_missing_items_place_ties_no_observations_together():
    index = {"a": torch.arange(4), "b": torch.zeros(4, dtype=torch.int64)}  # b has one item, of the first observation
    items, there = {"a": torch.arange(4.0)[:, None], "b": torch.ones(1, 1)}, {"b": torch.arange(4) == 0}
    assert [len(part) for part in PairedData(items, index, observed=there).split((0.5, 0.5))] == [2, 2]


@pytest.mark.parametrize(
    ("shares", "groups", "message"),
    [
        ((0.8, 0.1), None, "sum is 1"),
        ((1.2, -0.2), None, "positive"),
        ((1.0, 0.0), None, "positive"),
        ((float("nan"), 1.0), None, "positive"),
        ((), None, "positive"),
        ((0.99, 0.01), None, r"of 6 observations make parts of \[6, 0\]"),
        ((0.5, 0.5), [0] * 6, "in 1 groups make parts"),
        ((0.5, 0.5), [0, 1], r"groups of shape \(2,\); expected \(6,\)"),
    ],
)
def test_a_split_that_cannot_be_made_is_named(shares, groups, message):
    with pytest.raises(DMVAEError, match=message):
        PairedData.aligned({"a": torch.rand(6, 1)}).split(shares, groups=groups)
