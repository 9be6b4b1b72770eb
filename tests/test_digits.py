"""The digits: what each source holds, and that nothing damaged or missing passes for it."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from standins import write_svhn

from dmvae_lib.errors import DMVAEError
from dmvae_lib.paper.data import digits
from dmvae_lib.paper.data.cdsprites import CDSPRITES
from dmvae_lib.paper.data.digits import MNIST_SVHN
from dmvae_lib.paper.data.embedded_digits import VERSIONS, handwritten_digits, house_numbers
from dmvae_lib.paper.data.flowers import FLOWERS
from dmvae_lib.paper.data.polymnist import POLYMNIST

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
RUNS = Path(__file__).resolve().parents[1] / "results" / "quick" / "runs"
NPZ = Path("svhn", "test_32x32_first10000.npz")
load = MNIST_SVHN.load
real = pytest.mark.skipif(not (SHARED / NPZ).is_file(), reason="the real data is not here")


@pytest.fixture(scope="module")
def embedded():
    return load("embedded")


@pytest.fixture(scope="module")
def handwritten():
    return handwritten_digits()


@pytest.fixture
def root(tmp_path):
    """A data folder with MNIST linked and the SVHN subset copied, to be damaged by a test."""
    (tmp_path / "svhn").mkdir()
    shutil.copyfile(SHARED / NPZ, tmp_path / NPZ)
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    for file in (SHARED / "MNIST" / "raw").iterdir():
        (tmp_path / "MNIST" / "raw" / file.name).symlink_to(file)
    return tmp_path


def rows(images):
    """The images as a set of byte strings."""
    return {image.numpy().tobytes() for image in images}


# --- embedded --------------------------------------------------------------------------------------------------


def test_embedded_splits_have_the_sizes_of_their_sources(embedded):
    assert {name: tuple(x.shape) for name, x in embedded.train.items.items()} == {
        "mnist": (1297 * VERSIONS, 1, 28, 28),
        "svhn": (8000, 3, 32, 32),
    }
    assert len(embedded.test.items["mnist"]) == 500 and len(embedded.test.items["svhn"]) == 2000
    assert all(x.dtype == torch.uint8 for split in (embedded.train, embedded.test) for x in split.items.values())
    assert embedded.titles == {"mnist": "scikit-learn digits", "svhn": "drawn house numbers"}
    # scikit-learn's last 500 digits have 46 to 51 of each class, all fewer than the 200 house numbers of each.
    assert len(embedded.test) == 30 * 500


def test_embedded_is_the_same_each_time(embedded):
    again = load("embedded")
    assert (again.train.fingerprint, again.test.fingerprint) == (embedded.train.fingerprint, embedded.test.fingerprint)
    assert not rows(embedded.train.items["svhn"]) & rows(embedded.test.items["svhn"])


def test_no_handwritten_digit_is_in_train_and_test(handwritten):
    train, train_labels, test, test_labels = handwritten
    assert not rows(train) & rows(test)
    assert len(train) == len(train_labels) and len(test) == len(test_labels)


def test_versions_of_a_digit_are_adjacent_and_the_first_is_the_digit_itself(handwritten):
    from sklearn.datasets import load_digits as scikit_digits

    source = scikit_digits()
    train, labels, test, test_labels = handwritten
    assert torch.equal(labels.view(-1, VERSIONS), torch.from_numpy(source.target[:1297])[:, None].expand(-1, VERSIONS))
    assert torch.equal(test_labels, torch.from_numpy(source.target[1297:]))
    # The plain enlargement, computed another way: the source with a margin of 2, three times as large, cut to 28.
    small = torch.nn.functional.pad(torch.from_numpy(source.images).float() / 16, (2, 2, 2, 2))
    large = torch.nn.functional.interpolate(small[:, None], scale_factor=3, mode="bicubic")[..., 4:-4, 4:-4]
    expected = large.clamp(0, 1) * 255
    versions = train.view(-1, VERSIONS, 1, 28, 28)
    assert (torch.cat([versions[:, 0], test]) - expected).abs().max() < 1
    for version in range(1, VERSIONS):
        assert ((versions[:, version] - expected[:1297]).abs().flatten(1).mean(1) > 1).all()  # every one is warped
        # ... slightly: most of the ink stays in its place.
        assert torch.cosine_similarity(versions[:, version].flatten(1), expected[:1297].flatten(1)).mean() > 0.7


def test_validation_holds_out_training_images_and_whole_digits(embedded):
    held = load("embedded", evaluation="validation")
    for name in ("mnist", "svhn"):
        joined = torch.cat([held.train.items[name], held.test.items[name]])
        assert torch.equal(joined, embedded.train.items[name])
        assert abs(len(held.test.items[name]) / len(joined) - 0.1) < 0.001
        assert not rows(held.test.items[name]) & rows(embedded.test.items[name])
    assert len(held.train.items["mnist"]) % VERSIONS == 0


def test_house_numbers_are_balanced_distinct_and_full_of_contrast():
    images, labels = house_numbers(1003, seed=7)
    assert images.shape == (1003, 3, 32, 32) and images.dtype == torch.uint8
    assert sorted(labels.bincount(minlength=10).tolist()) == [100] * 7 + [101] * 3
    assert len(rows(images)) == 1003
    # Grey levels, in the middle: no figure vanishes in its background, whatever colour and shading add.
    assert images.float().mean(1)[:, 6:26, 10:22].flatten(1).std(1).quantile(0.05) > 15


def test_house_numbers_follow_from_their_seed():
    first, again, other = (house_numbers(600, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not rows(first) & rows(other)


def test_house_numbers_show_their_label():
    """A nearest class mean of the contrast, which knows nothing of fonts or colours, is well above chance."""

    def contrast(images):
        grey = images.float().mean(1)[:, 4:-4, 8:-8]
        edges = (grey - grey.flatten(1).median(1).values[:, None, None]).abs().flatten(1)
        return torch.nn.functional.normalize(edges - edges.mean(1, keepdim=True))

    (images, labels), (held, held_labels) = house_numbers(3000, 0), house_numbers(1000, 1)
    features = contrast(images)
    means = torch.stack([features[labels == digit].mean(0) for digit in range(10)])
    accuracy = ((contrast(held) @ means.T).argmax(1) == held_labels).double().mean()
    assert accuracy > 0.25


def test_half_of_the_house_numbers_are_darker_than_their_wall():
    """The middle of the figures against the wall."""
    images, labels = house_numbers(2000)
    grey = images.float().mean(1)[(labels == 1) | (labels == 7)]
    middle, wall = grey[:, 6:26, 12:20], grey.flatten(1).median(1).values
    lighter = middle.amax((1, 2)) - wall > wall - middle.amin((1, 2))
    assert 0.4 < lighter.double().mean() < 0.6


DRAWN = """
from hashlib import sha256
from dmvae_lib.paper.data.embedded_digits import handwritten_digits, house_numbers
print([sha256(x.numpy().tobytes()).hexdigest() for x in (*handwritten_digits(), *house_numbers(2000))])
"""


def test_processors_of_other_kinds_draw_the_same_digits():
    """This one by torch's best code for it, and by its code for any; float32 differed in single pixels."""
    drawn = set()
    for kind in ({}, {"ATEN_CPU_CAPABILITY": "default"}):
        environment = os.environ | kind | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", DRAWN], env=environment, capture_output=True, check=True)
        drawn.add(done.stdout)
    assert len(drawn) == 1 and drawn.pop()


def test_the_committed_runs_are_of_these_data(embedded):
    """Results on data that have changed would stand in one table with those on the new ones: retrain, or take out."""
    of = {path.name: json.loads(path.read_text()) for path in RUNS.glob("*.json")}
    other = [name for name, entry in of.items() if entry["config"]["data"] == MNIST_SVHN.name
             and entry["data"]["test"] != embedded.test.fingerprint]  # fmt: skip
    assert len(of) > 50 and not other


# --- real data -------------------------------------------------------------------------------------------------


@real
def test_subset_holds_mnist_and_the_first_svhn_test_images_in_order():
    data, held = load("subset", SHARED), load("subset", SHARED, evaluation="validation", permutations=1)
    assert len(data.train.items["mnist"]) == 54_000 and len(data.test.items["mnist"]) == 10_000
    assert len(data.train.items["svhn"]) == 7_200 and len(data.test.items["svhn"]) == 2_000
    with np.load(SHARED / NPZ) as file:
        assert (data.train.items["svhn"][5].permute(1, 2, 0).numpy() == file["X"][5]).all()
        assert (data.test.items["svhn"][0].permute(1, 2, 0).numpy() == file["X"][8000]).all()
        assert (data.test.item_labels["svhn"].numpy() == file["y"][8000:]).all()
    # Published class counts of MNIST.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    both = data.train.item_labels["mnist"].bincount() + held.test.item_labels["mnist"].bincount()
    assert both.tolist() == counts
    # SVHN has fewer of every class than MNIST, so all of it is paired, 30 times.
    assert len(data.train) == 30 * 7_200 and len(data.test) == 30 * 2_000
    assert (data.train.index["svhn"].bincount() == 30).all() and data.train.index["mnist"].bincount().max() == 30


@real
def test_subset_validation_leaves_the_test_images_alone():
    held = load("subset", SHARED, evaluation="validation", permutations=1)
    assert [len(held.test.items[name]) for name in ("mnist", "svhn")] == [6_000, 800]
    assert [len(held.train.items[name]) for name in ("mnist", "svhn")] == [54_000, 7_200]
    with np.load(SHARED / NPZ) as file:
        assert (held.test.items["svhn"][-1].permute(1, 2, 0).numpy() == file["X"][7999]).all()


def flip_bit(path):
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.unlink()  # not written through: it may be a link
    path.write_bytes(damaged)


def truncate(path):
    whole = path.read_bytes()
    path.unlink()
    path.write_bytes(whole[: len(whole) // 2])


@real
@pytest.mark.parametrize("damage", [flip_bit, truncate])
@pytest.mark.parametrize(
    "name", [NPZ, Path("MNIST/raw/t10k-images-idx3-ubyte"), Path("MNIST/raw/train-labels-idx1-ubyte")]
)
def test_a_damaged_file_is_named(root, name, damage):
    damage(root / name)
    with pytest.raises(DMVAEError, match="damaged") as error:
        load("subset", root)
    assert str(root / name) in str(error.value) and "Delete it" in str(error.value)


@real
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: {"X": x, "y": (y + 1) % 10}, "y has .* bytes of MD5"),
        (lambda x, y: {"X": x[::-1], "y": y}, "X has .* bytes of MD5"),
        (lambda x, y: {"X": x[:9999], "y": y}, r"shape \(9999, 32, 32, 3\)"),
        (lambda x, y: {"X": x.reshape(10_000, 3, 32, 32), "y": y}, r"shape \(10000, 3, 32, 32\)"),
        (lambda x, y: {"X": x, "y": y.astype(np.int8)}, "dtype int8"),
        (lambda x, y: {"X": x}, "cannot be read as arrays X and y"),
        (lambda x, y: {"X": x, "y": y.astype(object)}, "cannot be read as arrays X and y"),
    ],
)
def test_another_array_does_not_pass_for_the_subset(tmp_path, change, message):
    (tmp_path / "svhn").mkdir()
    with np.load(SHARED / NPZ) as file:
        np.savez(tmp_path / NPZ, **change(file["X"], file["y"]))
    with pytest.raises(DMVAEError, match=message):
        digits._svhn_subset(tmp_path)


@real
def test_a_file_left_by_another_program_is_not_read_instead_of_mnist(root):
    (root / "MNIST" / "processed").mkdir()
    for name in ("training.pt", "test.pt"):  # torchvision prefers these, unverified
        torch.save((torch.zeros(5, 28, 28, dtype=torch.uint8), torch.zeros(5)), root / "MNIST" / "processed" / name)
    assert len(load("subset", root, permutations=1).train.items["mnist"]) == 54_000


@pytest.fixture
def official(tmp_path, monkeypatch):
    """Small SVHN .mat files as published: (32, 32, 3, N), digit 0 written 10; torchvision is told their MD5s."""
    from torchvision.datasets import SVHN

    monkeypatch.setattr(SVHN, "split_list", write_svhn(tmp_path / "svhn", 40))
    return tmp_path


@real
def test_full_reads_the_official_files(official):
    (official / "MNIST").symlink_to(SHARED / "MNIST")
    data = load("full", official, permutations=2)
    assert data.train.items["svhn"].shape == (40, 3, 32, 32)
    assert data.train.item_labels["svhn"][8:11].tolist() == [9, 0, 1]  # written 9, 10, 1
    assert len(data.train) == 2 * 40
    expected = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 40), dtype=np.uint8)[..., 7]
    assert (data.train.items["svhn"][7].permute(1, 2, 0).numpy() == expected).all()
    flip_bit(official / "svhn" / "test_32x32.mat")
    with pytest.raises(DMVAEError, match="test_32x32.mat .* has MD5 .*Delete it and fetch it again"):
        load("full", official)


@real
def test_the_subset_can_be_cut_from_the_official_file(root, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN

    expected = digits._svhn_subset(root)
    with np.load(root / NPZ) as file:
        images, labels = np.concatenate([file["X"], file["X"][:7]]), np.concatenate([file["y"], file["y"][:7]])
    path = root / "svhn" / "test_32x32.mat"
    savemat(path, {"X": images.transpose(1, 2, 3, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
    known = {"test": ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]}
    monkeypatch.setattr(SVHN, "split_list", known)
    (root / NPZ).unlink()
    found = digits._svhn_subset(root)
    assert all(torch.equal(one, other) for one, other in zip(found, expected))


# --- missing files and bad arguments ---------------------------------------------------------------------------


def test_missing_mnist_says_where_and_what_to_do(tmp_path):
    with pytest.raises(DMVAEError) as error:
        load("subset", tmp_path / "data")
    for part in ("MNIST is missing", str(tmp_path / "data" / "MNIST" / "raw"), "make reproduce PROFILE=paper", "quick"):
        assert part in str(error.value)


@real
def test_missing_svhn_subset_says_where(root):
    (root / NPZ).unlink()
    with pytest.raises(DMVAEError, match="the SVHN subset is missing") as error:
        load("subset", root)
    assert str(root / NPZ) in str(error.value) and "test_32x32.mat" in str(error.value)


def test_a_failed_download_leaves_nothing_and_says_what_is_missing(tmp_path, monkeypatch):
    from torchvision.datasets import mnist

    def cut_off(url, download_root, filename, md5):
        Path(download_root, filename).write_bytes(b"half a file")
        raise URLError("no network")

    monkeypatch.setattr(mnist, "download_and_extract_archive", cut_off)
    with pytest.raises(DMVAEError, match="(?s)MNIST is missing.*fetching it failed.*no network.*quick"):
        load("full", tmp_path)
    assert os.listdir(tmp_path) == []


@real
def test_full_fetches_only_what_is_missing(official, monkeypatch):
    from torchvision.datasets import utils

    (official / "MNIST").symlink_to(SHARED / "MNIST")
    path = official / "svhn" / "test_32x32.mat"
    whole, fetched = path.read_bytes(), []
    path.unlink()

    def retrieve(url, target, *_):
        fetched.append(Path(target).name)
        Path(target).write_bytes(whole)

    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(utils, "_urlretrieve", retrieve)
    load("full", official, permutations=1)
    assert fetched == ["test_32x32.mat"] and path.read_bytes() == whole
    assert not list((official / "svhn").glob(".download-*"))


@real
def test_a_damaged_download_is_refused_and_the_next_one_begins_anew(official, monkeypatch):
    from torchvision.datasets import utils

    (official / "MNIST").symlink_to(SHARED / "MNIST")
    path = official / "svhn" / "test_32x32.mat"
    whole = path.read_bytes()
    path.unlink()
    sent = iter([whole[:-1], whole])
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    monkeypatch.setattr(utils, "_urlretrieve", lambda url, target, *_: Path(target).write_bytes(next(sent)))
    with pytest.raises(DMVAEError, match="SVHN is missing.*fetching it failed.*corrupted"):
        load("full", official, permutations=1)
    assert not path.exists()
    load("full", official, permutations=1)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("data", [MNIST_SVHN, FLOWERS, POLYMNIST, CDSPRITES[1]], ids=lambda data: data.name)
def test_every_loader_refuses_an_unknown_source_and_evaluation(data):
    with pytest.raises(DMVAEError, match="unknown source 'quick'; expected one of embedded, subset, full"):
        data.load("quick")
    with pytest.raises(DMVAEError, match="unknown evaluation 'train'; expected one of test, validation"):
        data.load("embedded", evaluation="train")


# --- the data set as an object ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dmvae", "mmvae"])
@pytest.mark.parametrize("name", MNIST_SVHN.modalities)
def test_networks_take_and_give_the_modalitys_images(family, name):
    encoder, decoder = MNIST_SVHN.networks(family, name, 3, 5, 0.25, "release")
    images = torch.rand(2, *digits.SHAPES[name])
    assert encoder(images).shape == (2, 16)
    decoded = decoder(100 * torch.randn(2, 8))
    assert decoded.shape == images.shape
    assert (0 <= decoded.min() and decoded.max() <= 1) == (family == "mmvae")  # means, or logits


def test_width_1_gives_the_published_hidden_layers_and_width_scales_them():
    for family, width, hidden in (("dmvae", 1, 256), ("mmvae", 1, 400), ("dmvae", 0.25, 64), ("mmvae", 0.25, 100)):
        encoder, _ = MNIST_SVHN.networks(family, "mnist", 1, 10, width, "release")
        assert encoder[1].out_features == hidden


def test_joint_encoder_and_classifiers_take_the_modalities():
    batch = {name: torch.rand(2, *digits.SHAPES[name]) for name in MNIST_SVHN.modalities}
    assert MNIST_SVHN.joint_encoder(7, 0.5, "kaiming")(batch).shape == (2, 14)
    for name, images in batch.items():
        assert MNIST_SVHN.classifier(name)(images).shape == (2, 10)


def test_weights_are_the_releases_on_real_data():
    assert MNIST_SVHN.weights["full"] == MNIST_SVHN.weights["subset"] == {"mnist": 50, "svhn": 1}
    assert MNIST_SVHN.weights.keys() == digits.TITLES.keys()


def test_the_data_set_survives_pickling_and_can_be_a_key():
    copy = pickle.loads(pickle.dumps(MNIST_SVHN))
    assert copy == MNIST_SVHN and hash(copy) == hash(MNIST_SVHN)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MNIST_SVHN.networks("jvae", "mnist", 1, 10, 1.0, "release"), "'jvae' for 'mnist'; expected dmvae"),
        (lambda: MNIST_SVHN.networks("dmvae", "usps", 1, 10, 1.0, "release"), "'dmvae' for 'usps'"),
        (lambda: MNIST_SVHN.networks("dmvae", "svhn", 1, 10, 1.0, "xavier"), "'xavier'; expected one of release"),
    ],
)
def test_unknown_names_are_an_error(call, message):
    with pytest.raises(DMVAEError, match=message):
        call()
