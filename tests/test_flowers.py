"""The flowers: zero-shot splits, images and captions that join, and that nothing damaged or missing passes."""

import hashlib
import io
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat

from dmvae_lib.data import embedded_flowers, flowers
from dmvae_lib.data.flowers import (
    Flowers,
    check_classes,
    fetch_captions,
    load_captions,
    load_classes,
    load_flowers,
    load_oxford,
)
from dmvae_lib.data.pairing import PairedData
from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import fetch

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
real = pytest.mark.skipif(not (SHARED / "cvpr2016_flowers").is_dir(), reason="the real data is not here")
LABELS = [3, 3, 1, 4, 1, 2, 4, 2]  # of images 1 to 8
LISTS = {"trainclasses.txt": (3, 4), "valclasses.txt": (1,), "testclasses.txt": (2,)}


pytestmark = pytest.mark.usefixtures("one_thread")


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def caption_file(root, number):
    return root / "cvpr2016_flowers" / "text_c10" / f"class_{LABELS[number - 1]:05}" / f"image_{number:05}.txt"


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A data folder in the layout of Oxford-102, eight images of four classes, to be damaged by a test."""
    (tmp_path / "flowers-102" / "jpg").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for number in range(1, len(LABELS) + 1):
        pixels = torch.randint(256, (40, 50, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(tmp_path / "flowers-102" / "jpg" / f"image_{number:05}.jpg")
        path = caption_file(tmp_path, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"a flower of image {number}, caption {line}\n" for line in range(10)))
    for name, members in LISTS.items():
        (tmp_path / "cvpr2016_flowers" / name).write_text("".join(f"class_{number:05}\n" for number in members))
    mat = tmp_path / "flowers-102" / "imagelabels.mat"
    savemat(mat, {"labels": np.array([LABELS], dtype=np.uint8)})
    entry = ("imagelabels.mat", hashlib.md5(mat.read_bytes()).hexdigest())
    files = {**torchvision.datasets.Flowers102._file_dict, "label": entry}
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", files)
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
    data = load_flowers("subset", subset, cache=tmp_path / "cache", progress=False)
    split = data.train
    assert isinstance(split, PairedData) and split.names == ("image", "text") and len(split) == 40
    assert split.items["image"].shape == (4, 512) and split.items["image"].dtype == torch.float32
    assert split.items["text"].shape == (40, 30, 128) and split.items["text"].dtype == torch.float16
    assert split.labels.tolist() == [3] * 20 + [4] * 20
    assert split.captions[25] == "a flower of image 4, caption 5"
    assert split.index["image"][25] == 2 and split.index["text"][25] == 25
    assert split.image(2).shape == (40, 50, 3) and split.image(2).dtype == np.uint8
    assert np.array_equal(split.image(2), np.asarray(Image.open(subset / "flowers-102/jpg/image_00004.jpg")))
    batch = split.batch(torch.tensor([0, 25]))
    assert batch["image"].shape == (2, 512) and batch["text"].dtype == torch.float32
    moved = split.to("cpu")
    assert moved.captions == split.captions and moved.fingerprint == split.fingerprint
    assert (data.title, data.backbone, data.text_model) == (flowers.TITLES["subset"], "squeezenet1_0", "small-bert")


def test_validation_does_not_look_at_the_test_classes(subset):
    for number in (6, 8):  # the images of the test class
        (subset / "flowers-102" / "jpg" / f"image_{number:05}.jpg").write_bytes(b"damaged")
    data = load_flowers("subset", subset, evaluation="validation", progress=False)
    assert data.test is data.validation and set(data.test.labels.tolist()) == {1}
    with pytest.raises(DMVAEError, match="image_00006.jpg cannot be decoded"):
        load_flowers("subset", subset, progress=False)


def test_embedded_needs_no_files(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded_flowers, "IMAGES", {"train": 2, "validation": 2, "test": 3})
    data = load_flowers("embedded", tmp_path / "nowhere", cache=tmp_path / "cache", progress=False)
    assert [len(split.items["image"]) for split in (data.train, data.validation, data.test)] == [80, 24, 36]
    members = [set(split.labels.tolist()) for split in (data.train, data.validation, data.test)]
    assert [len(part) for part in members] == [40, 12, 12] and len(set.union(*members)) == 64
    assert data.test.image(0).shape == (64, 64, 3)
    assert data.names[0].split()[3] in data.train.captions[0] + data.train.captions[1] + data.train.captions[2]
    assert not (tmp_path / "nowhere").exists()
    again = load_flowers("embedded", tmp_path / "nowhere", cache=tmp_path / "cache", progress=False)
    assert again.train.fingerprint == data.train.fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("oxford",), "unknown source 'oxford'; expected one of embedded, subset, full"),
        (("embedded", ".", "train"), "unknown evaluation 'train'; expected one of test, validation"),
    ],
)
def test_bad_arguments_list_the_choices(arguments, message):
    with pytest.raises(DMVAEError, match=message):
        load_flowers(*arguments)


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
    with pytest.raises(DMVAEError, match="class_00001/image_00003.txt: there is no such file"):
        load_oxford(root)


def test_captions_in_another_classs_folder_are_named(root):
    path = caption_file(root, 3)
    path.rename(root / "cvpr2016_flowers" / "text_c10" / "class_00002" / path.name)
    with pytest.raises(
        DMVAEError, match="its captions are in class_00002/image_00003.txt, but its label says class_00001"
    ):
        load_oxford(root)


def test_captions_of_no_image_are_named(root):
    (caption_file(root, 3).with_name("image_00099.txt")).write_text("a\n" * 10)
    with pytest.raises(DMVAEError, match="image_00099.txt: captions of an image that is not there"):
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
        ("valclasses.txt", None, "there is no .*valclasses.txt"),
    ],
)
def test_class_lists_that_overlap_or_do_not_cover_are_named(root, name, content, message):
    path = root / "cvpr2016_flowers" / name
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(DMVAEError, match=message):
        load_oxford(root)


def test_class_lists_and_captions_are_checked_without_files_too():
    with pytest.raises(DMVAEError, match="expected train, validation, test"):
        check_classes({"train": (1,), "test": (2,)})
    classes = {"train": (1,), "validation": (2,), "test": (3,)}
    good = {"images": torch.zeros(3, 3, 8, 8, dtype=torch.uint8), "labels": torch.tensor([1, 2, 3]), "classes": classes}
    with pytest.raises(DMVAEError, match="3 images, 3 labels and captions of 2 images"):
        Flowers(**good, captions=[["a"] * 10] * 2, names={})
    with pytest.raises(DMVAEError, match="image 1 has 9 captions that are not blank"):
        Flowers(**good, captions=[["a"] * 10, ["a"] * 9 + [" "], ["a"] * 10], names={})


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
    with pytest.raises(DMVAEError, match="weights of squeezenet1_0 are missing: .*squeezenet1_0-imagenet.safetensors"):
        load_flowers("subset", root, progress=False)


def test_full_downloads_only_what_is_missing_and_whole(root, monkeypatch):
    calls = []

    def download(folder, download):
        calls.append(folder)
        target = Path(folder, "flowers-102")
        (target / "jpg").mkdir(parents=True)
        if len(calls) == 1:
            raise RuntimeError("connection reset")
        (target / "jpg" / "image_00001.jpg").write_bytes(b"new")
        for name in ("imagelabels.mat", "setid.mat"):
            (target / name).write_bytes(b"new")

    monkeypatch.setattr(torchvision.datasets, "Flowers102", download)
    labels = (root / "flowers-102" / "imagelabels.mat").read_bytes()
    (root / "flowers-102" / "jpg").rename(root / "old")
    with pytest.raises(DMVAEError, match="there is no .*jpg and fetching it failed .connection reset"):
        flowers._download_images(root)
    assert not (root / "flowers-102" / "jpg").exists() and not list(root.glob(".download-*"))
    flowers._download_images(root)
    assert (root / "flowers-102" / "jpg" / "image_00001.jpg").read_bytes() == b"new"
    assert (root / "flowers-102" / "imagelabels.mat").read_bytes() == labels
    flowers._download_images(root)
    assert len(calls) == 2


# --- fetch -------------------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT; the path says what goes wrong: drop (half of what is asked for arrives), wrong, slow, norange."""

    def do_GET(self):
        server = self.server
        server.requests.append(self.headers.get("Range"))
        start = int(self.headers["Range"][6:-1]) if "Range" in self.headers and self.path != "/norange" else 0
        if self.path == "/missing":
            return self.send_error(404)
        if start >= len(CONTENT):
            return self.send_error(416)
        body = CONTENT[start:] if self.path != "/wrong" else CONTENT[start:-1] + b"!"
        body = server.archive if self.path == "/archive" else body
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        if self.path == "/slow":
            self.wfile.write(body[:1000])
            self.wfile.flush()
            server.stopped.wait(10)
        elif self.path in ("/drop", "/norange") and len(server.requests) < server.whole_after:
            self.wfile.write(body[: len(body) // 2])
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.stopped, server.whole_after, server.archive = [], threading.Event(), 3, b""
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetch_gives_the_file_once(server, tmp_path):
    path = fetch(f"{server.url}/file", tmp_path / "sub" / "file", DIGEST.upper())
    assert path.read_bytes() == CONTENT and names(path.parent) == ["file"]
    fetch(f"{server.url}/file", path, DIGEST)
    assert server.requests == [None]


def test_fetch_goes_on_after_dropped_connections(server, tmp_path):
    assert fetch(f"{server.url}/drop", tmp_path / "file", DIGEST).read_bytes() == CONTENT
    assert server.requests == [None, f"bytes={len(CONTENT) // 2}-", f"bytes={len(CONTENT) * 3 // 4}-"]


def test_fetch_starts_again_where_the_server_cannot_resume(server, tmp_path):
    assert fetch(f"{server.url}/norange", tmp_path / "file", DIGEST).read_bytes() == CONTENT


def test_a_part_is_kept_for_the_next_run_and_never_taken_for_the_file(server, tmp_path):
    server.whole_after = 99
    with pytest.raises(DMVAEError, match="cannot fetch .*/drop in 3 attempts .*after .* bytes are kept"):
        fetch(f"{server.url}/drop", tmp_path / "file", DIGEST)
    assert names(tmp_path) == ["file.part"]
    held = (tmp_path / "file.part").stat().st_size
    server.whole_after = 0
    assert fetch(f"{server.url}/drop", tmp_path / "file", DIGEST).read_bytes() == CONTENT
    assert server.requests[-1] == f"bytes={held}-" and names(tmp_path) == ["file"]


def test_a_whole_part_that_was_not_yet_checked_is_used(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert fetch(f"{server.url}/file", tmp_path / "file", DIGEST).read_bytes() == CONTENT


def test_wrong_bytes_are_removed(server, tmp_path):
    with pytest.raises(DMVAEError, match="/wrong gave 1,048,576 bytes with SHA-256 .*, expected .*removed"):
        fetch(f"{server.url}/wrong", tmp_path / "file", DIGEST)
    assert not names(tmp_path)


def test_a_silent_server_times_out(server, tmp_path):
    begun = time.monotonic()
    with pytest.raises(DMVAEError, match="cannot fetch .*/slow in 2 attempts .*timed out"):
        fetch(f"{server.url}/slow", tmp_path / "file", DIGEST, timeout=0.3, attempts=2)
    assert time.monotonic() - begun < 5 and not (tmp_path / "file").exists()


def test_refusals_and_bad_addresses_are_said_so(server, tmp_path):
    with pytest.raises(DMVAEError, match="/missing: the server says 404"):
        fetch(f"{server.url}/missing", tmp_path / "file", DIGEST)
    assert len(server.requests) == 1
    with pytest.raises(DMVAEError, match="cannot fetch file"):
        fetch("file", tmp_path / "file", DIGEST)
    with pytest.raises(DMVAEError, match="expected 64 hexadecimal digits"):
        fetch(f"{server.url}/file", tmp_path / "file", "abc")
    (tmp_path / "file").write_bytes(b"another")
    with pytest.raises(DMVAEError, match="has SHA-256"):
        fetch(f"{server.url}/file", tmp_path / "file", DIGEST)
    assert (tmp_path / "file").read_bytes() == b"another"


def test_the_captions_archive_is_unpacked_whole_or_not_at_all(server, root):
    (root / "cvpr2016_flowers").rename(root / "elsewhere")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        file.add(root / "elsewhere", arcname="cvpr2016_flowers")
    server.archive = buffer.getvalue()
    fetch_captions(f"{server.url}/archive", hashlib.sha256(server.archive).hexdigest(), root)
    assert load_classes(root / "cvpr2016_flowers")["test"] == (2,) and len(load_oxford(root).captions) == 8
    with pytest.raises(DMVAEError, match="is there already"):
        fetch_captions(f"{server.url}/archive", DIGEST, root)


def test_an_archive_that_cannot_be_unpacked_leaves_nothing(server, tmp_path):
    server.archive = b"no archive"
    with pytest.raises(DMVAEError, match="cannot be unpacked"):
        fetch_captions(f"{server.url}/archive", hashlib.sha256(server.archive).hexdigest(), tmp_path)
    assert names(tmp_path) == ["cvpr2016_flowers.tar.gz"]
