"""The pairing protocol (Shi et al. 2019) and what PairedData promises."""

import time

import numpy as np
import pytest
import torch

from dmvae_lib.data import PairedData, pair_by_class, pair_many
from dmvae_lib.errors import DMVAEError

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
        fields[field] = {**fields[field], **parts}
    return PairedData(**fields)


# --- the protocol ----------------------------------------------------------------------------------------------


def test_labels_agree_in_every_pair():
    index_a, index_b = pair_by_class(A, B)
    assert index_a.dtype == index_b.dtype == torch.int64
    assert torch.equal(A[index_a], B[index_b])


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


@pytest.mark.parametrize("convert", [torch.Tensor.tolist, torch.Tensor.numpy, lambda x: x.to(torch.uint8)])
def test_labels_may_be_lists_arrays_or_tensors(convert):
    assert all(
        torch.equal(x, y) for x, y in zip(pair_by_class(convert(A), convert(B)), pair_by_class(A, B), strict=True)
    )


def test_three_modalities_agree_in_every_tuple():
    index = pair_many({"a": A, "b": B, "c": C}, permutations=4)
    assert torch.equal(A[index["a"]], B[index["b"]]) and torch.equal(A[index["a"]], C[index["c"]])
    assert {len(values) for values in index.values()} == {4 * 6}


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
        (([], [0]), {}, "'a' are empty"),
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
        paired(items={"a": pixel}),
        paired(item_labels={"b": label}),
        paired(index={"a": index}),
        paired(items={"b": items_of(B).double()}),
        paired(items={"a": items_of(A).reshape(-1, 1, 2, 1)}),
    ]
    assert len({fingerprint, *(other.fingerprint for other in others)}) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": {"c": items_of(A)}}, "same modalities"),
        ({"items": {"a": items_of(A)[:-1]}}, "labels and images of different length"),
        ({"items": {"a": items_of(A).long()}}, "torch.int64; expected"),
        ({"items": {"a": torch.tensor(1.0)}}, r"expected \(N, ...\)"),
        ({"items": {"a": items_of(A).numpy()}}, "ndarray; expected a tensor"),
        ({"items": {"a": items_of(A)[:, 0]}}, r"expected \(N, C, H, W\)"),
        ({"items": {"b": torch.full((7, 2), float("nan"))}}, "14 values of 'b' are not finite"),
        ({"item_labels": {"a": A.int()}}, "expected 1-D and torch.int64"),
        ({"item_labels": {"a": (A + 1) % 3}}, "disagree on the class in 12 of 12 pairs"),
        ({"index": {"a": torch.full((12,), 9)}}, "from 9 to 9; expected 0 to 8"),
        ({"index": {"a": torch.full((12,), -1)}}, "from -1 to -1; expected 0 to 8"),
        ({"index": {"a": torch.tensor([1])}}, "must have one length"),
        ({"index": dict.fromkeys("ab", torch.zeros(0, dtype=torch.int64))}, "at least 1"),
    ],
)
def test_parts_that_do_not_fit_are_named(changes, message):
    with pytest.raises(DMVAEError, match=message):
        paired(**changes)


@pytest.mark.parametrize("rows", [torch.tensor([12]), torch.tensor([-1]), torch.tensor([0.0]), torch.tensor(0)])
def test_rows_outside_the_data_are_an_error(rows):
    with pytest.raises(DMVAEError, match="batch: rows"):
        paired().batch(rows)


def test_labels_as_arrays_of_any_integer_type_pair_alike():
    index = [pair_by_class(A.numpy().astype(kind), B)[0] for kind in (np.uint8, np.uint16, np.int32)]
    assert torch.equal(index[0], index[1]) and torch.equal(index[0], index[2])
