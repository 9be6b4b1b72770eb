"""The flowers: zero-shot splits, images and captions that join, and that nothing damaged or missing passes."""

import hashlib
import tarfile
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat
from standins import LABELS, caption_file, member, packed, write_oxford
from torchvision.datasets import Flowers102

from dmvae_lib.errors import DMVAEError
from dmvae_lib.pairing import PairedData
from dmvae_lib.paper.data import embedded_flowers, flowers
from dmvae_lib.paper.data.features import image_features, token_embeddings
from dmvae_lib.paper.data.flowers import (
    CAPTIONS,
    FLOWERS,
    fetch_captions,
    load_captions,
    load_classes,
    load_flowers,
    load_oxford,
    picture,
    query_tokens,
    unseen_flowers,
)

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not (SHARED / "cvpr2016_flowers").is_dir(), reason="the real data is not here")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A data folder in the layout of Oxford-102, eight images of four classes, to be damaged by a test."""
    monkeypatch.setattr(Flowers102, "_file_dict", Flowers102._file_dict | write_oxford(tmp_path))
    return tmp_path


# --- what is loaded ----------------------------------------------------------------------------------------------


def test_images_labels_and_captions_join(root):
    loaded = load_oxford(root)
    assert [path.name for path in loaded.images] == [f"image_{number:05}.jpg" for number in range(1, 9)]
    assert loaded.labels.tolist() == LABELS and loaded.names[1] == "pink primrose"
    assert loaded.captions[4] == [f"a flower of image 5, caption {line}" for line in range(10)]
    assert loaded.classes == {"train": (3, 4), "validation": (1,), "test": (2,)}
    assert {split: loaded.rows(split).tolist() for split in loaded.classes} == {
        "train": [0, 1, 3, 6],
        "validation": [2, 4],
        "test": [5, 7],
    }


@pytest.fixture
def subset(root, monkeypatch):
    """What `subset` needs, with random SqueezeNet weights and the small BERT."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = torchvision.models.squeezenet1_0().state_dict()
    (root / "weights").mkdir()
    save_file(weights, root / "weights" / "squeezenet1_0-imagenet.safetensors")
    monkeypatch.setitem(flowers.NETWORKS, "subset", ("squeezenet1_0", "small-bert"))
    return root


def test_every_image_is_paired_with_its_own_ten_captions(subset, tmp_path):
    splits = load_flowers("subset", subset, cache=tmp_path / "cache")
    train, facts = splits.train, splits.facts
    assert isinstance(train, PairedData) and train.names == FLOWERS.modalities and len(train) == 40
    assert train.items["image"].shape == (4, 512) and train.items["image"].dtype == torch.float32
    assert train.items["text"].shape == (40, 30, 128) and train.items["text"].dtype == torch.float16
    assert train.labels.tolist() == [3] * 20 + [4] * 20 and set(splits.test.labels.tolist()) == {2}
    assert facts["captions"]["train"][25] == "a flower of image 4, caption 5"
    assert train.index["image"][25] == 2 and train.index["text"][25] == 25
    alone = token_embeddings(["a flower of image 4, caption 5"], "small-bert")[0][0]
    assert torch.allclose(train.items["text"][25].float(), alone.float(), atol=5e-3)
    assert np.array_equal(
        picture(splits, 2, "train"), np.asarray(Image.open(subset / "flowers-102/jpg/image_00004.jpg"))
    )
    assert np.array_equal(picture(splits, 1), np.asarray(Image.open(subset / "flowers-102/jpg/image_00008.jpg")))
    assert (facts["title"], facts["backbone"], facts["text_model"]) == (
        flowers.TITLES["subset"],
        "squeezenet1_0",
        "small-bert",
    )
    assert (
        facts["names"][1] == "pink primrose"
        and splits.source == "subset"
        and set(splits.titles) == set(FLOWERS.modalities)
    )
    assert query_tokens("a flower", splits).shape == (1, 30, 128)


def test_image_features_are_scaled_by_the_training_images_alone(subset):
    splits = load_flowers("subset", subset)
    weights = subset / flowers.SQUEEZENET
    raw = {part: image_features(paths, "squeezenet1_0", weights) for part, paths in splits.facts["pictures"].items()}
    assert torch.allclose(splits.train.items["image"].std(), torch.tensor(1.0))
    for part, data in (("train", splits.train), ("test", splits.test)):
        assert torch.allclose(data.items["image"], raw[part] / raw["train"].std())


def test_validation_does_not_look_at_the_test_classes(subset):
    for number in (6, 8):  # the images of the test class
        (subset / "flowers-102" / "jpg" / f"image_{number:05}.jpg").write_bytes(b"damaged")
    splits = load_flowers("subset", subset, evaluation="validation")
    assert set(splits.test.labels.tolist()) == {1}
    with pytest.raises(DMVAEError, match="image_00006.jpg cannot be decoded"):
        load_flowers("subset", subset)


def test_embedded_needs_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded_flowers, "IMAGES", {"train": 2, "validation": 2, "test": 3})
    splits = load_flowers("embedded", tmp_path / "nowhere", cache=tmp_path / "cache")
    held = load_flowers("embedded", tmp_path / "nowhere", "validation", tmp_path / "cache")
    parts = (splits.train, held.test, splits.test)
    assert [len(part.items["image"]) for part in parts] == [80, 24, 36]
    members = [set(part.labels.tolist()) for part in parts]
    assert [len(part) for part in members] == [40, 12, 12] and len(set.union(*members)) == 64
    assert members == [set(splits.facts["classes"][name]) for name in ("train", "validation", "test")]
    assert picture(splits, 0).shape == (64, 64, 3) and picture(splits, 0).dtype == np.uint8
    assert splits.facts["names"][0].split()[3] in " ".join(splits.facts["captions"]["train"][:3])
    alone = unseen_flowers("embedded", splits.facts["scale"], tmp_path / "nowhere")
    assert torch.equal(alone.test.items["image"], splits.test.items["image"])
    assert torch.equal(alone.test.labels, splits.test.item_labels["image"])
    assert (picture(alone, 5) == picture(splits, 5)).all()
    assert not (tmp_path / "nowhere").exists()
    again = load_flowers("embedded", tmp_path / "nowhere", cache=tmp_path / "cache")
    assert again.train.fingerprint == splits.train.fingerprint == held.train.fingerprint


def test_every_source_has_a_weight_for_every_modality():
    assert set(FLOWERS.weights) == {"embedded", "subset", "full"}
    assert all(set(weights) == set(FLOWERS.modalities) for weights in FLOWERS.weights.values())


# --- the real data -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oxford():
    return load_oxford(SHARED)


@real
def test_real_splits_are_zero_shot_and_of_the_papers_sizes(oxford):
    rows = {split: set(oxford.rows(split).tolist()) for split in oxford.classes}
    assert {split: len(members) for split, members in oxford.classes.items()} == {
        "train": 62,
        "validation": 20,
        "test": 20,
    }
    assert {split: len(found) for split, found in rows.items()} == {"train": 5878, "validation": 1156, "test": 1155}
    assert set.union(*rows.values()) == set(range(8189)) and sum(map(len, rows.values())) == 8189
    labels = [set(oxford.labels[sorted(found)].tolist()) for found in rows.values()]
    assert not labels[0] & labels[1] and not labels[0] & labels[2] and not labels[1] & labels[2]


@real
def test_no_real_image_is_in_two_splits_under_another_name(oxford):
    digests = {
        split: {hashlib.sha256(oxford.images[row].read_bytes()).digest() for row in oxford.rows(split).tolist()}
        for split in oxford.classes
    }
    assert not digests["train"] & digests["test"] and not digests["train"] & digests["validation"]
    assert not digests["validation"] & digests["test"]


@real
def test_real_captions_are_as_published(oxford):
    lines = [caption for captions in oxford.captions for caption in captions]
    assert len(lines) == 81_890 and all(caption.isascii() for caption in lines)
    assert [caption for caption in lines if not any(map(str.isalpha, caption))] == ["{}"] * 13
    assert oxford.captions[6733][0] == "the petals of the flower are pink in color and have a yellow center."


# --- captions that are wrong -------------------------------------------------------------------------------------


def test_odd_characters_stay_in_their_caption(root):
    path = caption_file(root, 2)
    odd = ["pétale", "a\u2028b", "a\x0cb", "\u00a0nbsp", "🌸", "{}", "a\x85b", "tab\tbed", " padded ", "last"]
    path.write_bytes("\ufeff".encode() + "\r\n".join(odd).encode())  # a byte order mark, Windows' ends, none at the end
    assert load_oxford(root).captions[1] == [line.strip() for line in odd]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:9], "image_00002.txt has 9 lines; expected 10 captions"),
        (lambda lines: [*lines, "one more"], "image_00002.txt has 11 lines; expected 10 captions"),
        (lambda lines: [], "image_00002.txt has 1 lines"),
        (lambda lines: [*lines[:3], "", *lines[4:]], "image_00002.txt, line 4: the caption is empty"),
        (lambda lines: [*lines[:9], " \t "], "image_00002.txt, line 10: the caption is empty"),
    ],
)
def test_captions_that_are_not_ten_or_empty_are_named(root, change, message):
    path = caption_file(root, 2)
    path.write_text("\n".join(change(path.read_text().splitlines())) + "\n")
    with pytest.raises(DMVAEError, match=message):
        load_oxford(root)


def test_captions_that_are_not_utf8_are_named(root):
    path = caption_file(root, 7)
    path.write_bytes(path.read_bytes().replace(b"flower", b"fl\xf6wer", 1))
    with pytest.raises(DMVAEError, match="image_00007.txt is not UTF-8 at byte 4"):
        load_oxford(root)


def test_a_missing_caption_file_is_named(root):
    caption_file(root, 3).unlink()
    with pytest.raises(DMVAEError, match="do not join in 1 files, first class_00001/image_00003.txt, which is missing"):
        load_oxford(root)


def test_captions_in_another_classs_folder_are_named(root):
    path = caption_file(root, 3)
    path.rename(root / "cvpr2016_flowers" / "text_c10" / "class_00002" / path.name)
    with pytest.raises(DMVAEError, match="do not join in 2 files, first class_00001/image_00003.txt, which is missing"):
        load_oxford(root)


def test_captions_of_no_image_are_named(root):
    (caption_file(root, 3).with_name("image_00099.txt")).write_text("a\n" * 10)
    with pytest.raises(DMVAEError, match="class_00001/image_00099.txt, which is of no image of that class"):
        load_captions(root / "cvpr2016_flowers", torch.tensor(LABELS))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("testclasses.txt", "class_00002\nclass_00003\n", "class 3 is listed for train and for test"),
        ("testclasses.txt", "class_00002\nclass_00002\n", "class 2 is listed for test and for test"),
        ("testclasses.txt", "class_00002\nclass_00005\n", "class 5 is listed but has no images"),
        ("trainclasses.txt", "class_00003\n", "class 4 is in no class list"),
        ("valclasses.txt", "primrose\n", "valclasses.txt holds 'primrose'; expected lines such as class_00041"),
        ("valclasses.txt", "", "valclasses.txt holds 'nothing'"),
        ("valclasses.txt", None, "cannot read .*valclasses.txt: No such file"),
    ],
)
def test_class_lists_that_overlap_or_do_not_cover_are_named(root, name, content, message):
    path = root / "cvpr2016_flowers" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DMVAEError, match=message):
        load_oxford(root)


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


# --- files that are missing --------------------------------------------------------------------------------------


def test_missing_data_says_where_and_what_to_do(root, tmp_path):
    with pytest.raises(DMVAEError, match="Oxford-102: there is no /.*imagelabels.mat.*PROFILE=paper.*quick needs no"):
        load_flowers("subset", tmp_path / "empty")
    (root / "flowers-102" / "jpg" / "image_00004.jpg").unlink()
    with pytest.raises(DMVAEError, match="1 of 8 images are missing and 0 have no label, first image_00004.jpg"):
        load_oxford(root)


def test_missing_captions_say_that_they_cannot_be_fetched_unasked(root):
    (root / "cvpr2016_flowers").rename(root / "elsewhere")
    with pytest.raises(
        DMVAEError, match="the captions: there is no /.*text_c10.*no published checksum.*fetch_captions"
    ):
        load_oxford(root)


def test_other_labels_are_an_error(root):
    savemat(root / "flowers-102" / "imagelabels.mat", {"labels": np.array([LABELS[::-1]], dtype=np.uint8)})
    with pytest.raises(DMVAEError, match="imagelabels.mat .* has MD5"):
        load_oxford(root)


def test_subset_without_weights_names_the_file(root):
    with pytest.raises(
        DMVAEError, match="weights of .*squeezenet1_0 cannot be loaded from .*squeezenet1_0-imagenet.safe.*No such"
    ):
        load_flowers("subset", root)


def test_what_the_manifest_lists_is_held_to_it(root):
    path = caption_file(root, 4)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (root / "MANIFEST.sha256").write_text(f"{digest}  {path.relative_to(root).as_posix()}\n")
    load_oxford(root)
    path.write_text(path.read_text().replace("a flower", "no flower"))
    with pytest.raises(DMVAEError, match="image_00004.txt .* has SHA-256"):
        load_oxford(root)


# --- downloads ---------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Serves the server's files."""

    def do_GET(self):
        self.server.requests.append(self.path)
        body = self.server.files.get(self.path)
        if body is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.files = [], {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def digest_of(content):
    return hashlib.sha256(content).hexdigest()


def test_images_are_downloaded_by_torchvision_and_verified(root, server, tmp_path, monkeypatch):
    images = packed(root / "flowers-102" / "jpg", "jpg")
    server.files = {f"/{path.name}": path.read_bytes() for path in (root / "flowers-102").glob("*.mat")}
    server.files["/102flowers.tgz"] = images[:-1] + b"!"
    known = Flowers102._file_dict | {"image": ("102flowers.tgz", hashlib.md5(images).hexdigest())}
    monkeypatch.setattr(Flowers102, "_file_dict", known)
    monkeypatch.setattr(Flowers102, "_download_url_prefix", f"{server.url}/")
    new = tmp_path / "new"
    new.mkdir()
    (root / "cvpr2016_flowers").rename(new / "cvpr2016_flowers")
    with pytest.raises(DMVAEError, match="there is no .*flowers-102 and fetching it failed"):
        load_oxford(new, download=True)
    server.files["/102flowers.tgz"] = images
    assert load_oxford(new, download=True).labels.tolist() == LABELS
    asked = len(server.requests)
    load_oxford(new, download=True)
    assert len(server.requests) == asked


def test_the_captions_archive_is_fetched_and_unpacked(server, root):
    (root / "cvpr2016_flowers").rename(root / "elsewhere")
    archive = packed(root / "elsewhere", "cvpr2016_flowers")
    server.files["/archive"] = archive
    before = sorted(root.iterdir())
    assert fetch_captions(f"{server.url}/archive", digest_of(archive).upper(), root) == root / "cvpr2016_flowers"
    assert load_classes(root / "cvpr2016_flowers")["test"] == (2,) and len(load_oxford(root).captions) == 8
    assert sorted(root.iterdir()) == sorted([*before, root / "cvpr2016_flowers"])
    with pytest.raises(DMVAEError, match="is there already"):
        fetch_captions(f"{server.url}/archive", digest_of(archive), root)


@pytest.mark.parametrize(
    ("archive", "message"),
    [
        (lambda folder: b"no archive", "tar archive of a folder cvpr2016_flowers"),
        (lambda folder: packed(folder, "another"), "tar archive of a folder cvpr2016_flowers"),
        (lambda folder: packed(folder, "cvpr2016_flowers")[:-200], "tar archive of a folder cvpr2016_flowers"),
        (
            lambda folder: packed(
                folder, "cvpr2016_flowers", member("cvpr2016_flowers/a", tarfile.SYMTYPE, "text_c10")
            ),
            "cvpr2016_flowers/a is no plain file",
        ),
        (
            lambda folder: packed(
                folder,
                "cvpr2016_flowers",
                member("cvpr2016_flowers/b", tarfile.LNKTYPE, "cvpr2016_flowers/valclasses.txt"),
            ),
            "cvpr2016_flowers/b is no plain file",
        ),
        (lambda folder: packed(folder, "cvpr2016_flowers", member("../../evil")), "outside the destination"),
        (
            lambda folder: packed(folder, "cvpr2016_flowers", member("cvpr2016_flowers/../../../evil")),
            "outside the dest",
        ),
    ],
)
def test_an_archive_that_is_none_or_leaves_its_folder_is_refused_and_leaves_nothing(server, root, archive, message):
    content = server.files["/archive"] = archive(root / "cvpr2016_flowers")
    new = root / "new" / "data"
    with pytest.raises(DMVAEError, match=message):
        fetch_captions(f"{server.url}/archive", digest_of(content), new)
    assert not list(new.iterdir()) and not (root / "evil").exists() and not (root / "new" / "evil").exists()


def test_other_bytes_and_servers_that_refuse_leave_nothing(server, root, tmp_path):
    content = packed(root / "cvpr2016_flowers", "cvpr2016_flowers")
    server.files["/archive"] = content[:-1] + b"!"
    new = tmp_path / "new"
    for address, message in (
        (f"{server.url}/archive", "does not match the known hash"),
        (f"{server.url}/missing", "404"),
        ("no address", "cannot fetch no address"),
    ):
        with pytest.raises(DMVAEError, match=message):
            fetch_captions(address, digest_of(content), new)
        assert not list(new.iterdir())
    asked = len(server.requests)
    for digest in ("", "abc", None):
        with pytest.raises(DMVAEError, match="expected 64 hexadecimal digits"):
            fetch_captions(f"{server.url}/archive", str(digest or ""), new)
    assert len(server.requests) == asked
