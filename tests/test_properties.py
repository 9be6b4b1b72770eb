"""Properties that hold for every input, on inputs that hypothesis looks for (the product of experts': test_distributions)."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmvae_lib import DMVAEError, runs
from dmvae_lib.data import PairedData, pair_many
from dmvae_lib.data.features import token_embeddings
from dmvae_lib.data.flowers import CAPTIONS, load_captions, load_classes
from dmvae_lib.metrics import average_precision_at_k, cross_coherence, joint_coherence, rank1
from dmvae_lib.profiles import PROFILES, get_profile

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=30)
SEEDS = st.integers(0, 2**31)


# --- pairing --------------------------------------------------------------------------------------------------------


@given(st.lists(LABELS, min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 5), SEEDS)
def test_pairs_agree_on_their_class_and_use_each_item_once_in_a_permutation(labels, permutations, most, seed):
    labels = {str(number): torch.tensor(values) for number, values in enumerate(labels)}
    classes = [set(values.tolist()) for values in labels.values()]
    if any(one != classes[0] for one in classes):
        with pytest.raises(DMVAEError, match="every class must be in every data set"):
            pair_many(labels, permutations, most, seed)
        return
    index = pair_many(labels, permutations, most, seed)
    seen = [values[index[name]] for name, values in labels.items()]
    assert all(torch.equal(one, seen[0]) for one in seen)
    smallest = {label: min(most, *(int((values == label).sum()) for values in labels.values())) for label in classes[0]}
    for rows in index.values():
        _, counts = rows.unique(return_counts=True)
        assert len(rows) == permutations * sum(smallest.values()) and (counts == permutations).all()


@given(LABELS, st.data())
def test_paired_data_takes_an_index_only_if_the_classes_agree(labels, data):
    n = len(labels)
    index = {name: data.draw(st.lists(st.integers(-1, n), min_size=1, max_size=5)) for name in "ab"}
    right = len(index["a"]) == len(index["b"]) and all(
        0 <= i < n and 0 <= j < n and labels[i] == labels[j] for i, j in zip(index["a"], index["b"])
    )
    parts = ({name: torch.rand(n, 2) for name in "ab"}, {name: torch.tensor(labels) for name in "ab"})
    tensors = {name: torch.tensor(rows) for name, rows in index.items()}
    if right:
        assert len(PairedData(*parts, tensors)) == len(index["a"])
    else:
        with pytest.raises(DMVAEError):
            PairedData(*parts, tensors)


# --- metrics --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 6), st.integers(2, 4), SEEDS)
def test_coherence_is_a_share_and_takes_samples_in_any_order(n, classes, modalities, seed):
    generator = torch.Generator().manual_seed(seed)
    predicted = [torch.randint(classes, (n,), generator=generator) for _ in range(modalities)]
    order = torch.randperm(n, generator=generator)
    for share in (joint_coherence, lambda *values: cross_coherence(values[0], values[1])):
        found = share(*predicted)
        assert 0 <= found <= 1 and share(*(values[order] for values in predicted)) == found
        assert share(predicted[0], predicted[0]) == 1


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 5), st.integers(1, 8), SEEDS)
def test_retrieval_measures_are_shares_and_take_samples_in_any_order(images, texts, classes, width, seed):
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (images, texts))
    image_labels, text_labels = (torch.randint(classes, (n,), generator=generator) for n in (images, texts))
    i, t = (torch.randperm(n, generator=generator) for n in (images, texts))
    k = int(torch.randint(1, images + 1, (), generator=generator))
    one = rank1(image, image_labels, text, text_labels)
    precision = average_precision_at_k(text, text_labels, image, image_labels, k)
    assert 0 <= one <= 1 and 0 <= precision <= 1
    if width > 1:  # in one dimension every cosine is 1 or -1, and a tie goes to the first
        assert rank1(image[i], image_labels[i], text[t], text_labels[t]) == pytest.approx(one)
        found = average_precision_at_k(text[t], text_labels[t], image[i], image_labels[i], k)
        assert found == pytest.approx(precision)


# --- captions and class lists -------------------------------------------------------------------------------------


def parsed(content: bytes) -> list[str] | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text_c10", "class_00001", "image_00001.txt")
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        try:
            return load_captions(folder, torch.tensor([1]))[0]
        except DMVAEError as error:
            assert path.name in str(error)
    return None


@given(st.one_of(st.binary(max_size=200), st.lists(st.text(max_size=8), max_size=12).map("\n".join).map(str.encode)))
def test_captions_are_ten_that_are_not_blank_or_an_error_that_names_the_file(content):
    captions = parsed(content)
    assert captions is None or len(captions) == CAPTIONS and all(line and line == line.strip() for line in captions)


LINE = (
    st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool)
)


@given(st.lists(LINE, min_size=CAPTIONS, max_size=CAPTIONS))
def test_ten_lines_of_any_text_come_back_as_they_are(lines):
    if not lines[0].startswith("\ufeff"):  # a mark of the encoding
        assert parsed("\n".join(lines).encode()) == lines


@given(st.dictionaries(st.sampled_from(["trainclasses", "valclasses", "testclasses"]), st.binary(max_size=60)))
def test_class_lists_are_disjoint_or_an_error(contents):
    with tempfile.TemporaryDirectory() as folder:
        for name, content in contents.items():
            Path(folder, f"{name}.txt").write_bytes(content)
        try:
            classes = load_classes(folder)
        except DMVAEError:
            return
    members = [number for numbers in classes.values() for number in numbers]
    assert len(members) == len(set(members))


@settings(max_examples=10)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=3))
def test_any_caption_has_finite_embeddings_or_is_refused(captions):
    try:
        embeddings, lengths = token_embeddings(captions, "small-bert", progress=False)
    except DMVAEError:
        assert not all(caption.strip() for caption in captions)
        return
    assert embeddings.isfinite().all() and ((embeddings != 0).any(-1).sum(1) == lengths).all() and lengths.min() >= 2


# --- configuration --------------------------------------------------------------------------------------------------

SHARE = st.one_of(st.text(max_size=8), st.floats().map(str), st.sampled_from(["nan", " 1", "1_0", "1/..", "٣", "1\n"]))


@given(st.one_of(st.text(), st.tuples(st.sampled_from(sorted(PROFILES)), SHARE).map("@".join)))
def test_a_profiles_name_is_known_and_can_be_a_folders_or_is_refused(name):
    try:
        profile = get_profile(name)
    except DMVAEError as error:
        assert "profile" in str(error)
        return
    base, at, share = name.partition("@")
    assert (
        profile.name == name and base in PROFILES and Path(name).name == name and name.isascii() and name.isprintable()
    )
    assert not at or 0 < float(share) <= 1 and 1 <= profile.steps <= PROFILES[base].steps


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, min_size=1), st.data())
def test_a_configurations_hash_takes_any_order_and_sees_every_change(config, data):
    digest = runs.configuration_hash(config)
    assert runs.configuration_hash(dict(reversed(config.items()))) == digest
    key = data.draw(st.sampled_from(sorted(config)))
    assert runs.configuration_hash(config | {key: [config[key]]}) != digest


@given(st.one_of(st.integers(max_value=0), st.floats(), st.text(), st.none(), st.lists(st.integers())))
def test_seeds_are_a_count_or_refused(seeds):
    with pytest.raises(DMVAEError, match="seeds="):
        runs.setting(seeds=seeds)


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
