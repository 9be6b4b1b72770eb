"""Flowers with captions for Sec. 5.2: Oxford-102, or drawn ones that need no download; classes split zero-shot."""

from __future__ import annotations

import os
import re
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import verify, verify_listed
from dmvae_lib.pairing import PairedData
from dmvae_lib.paper.data import ELSEWHERE, DataSet, Splits, check_asked
from dmvae_lib.paper.data.embedded_flowers import drawn_flowers, flower_classes
from dmvae_lib.paper.data.features import decode_image, image_features, token_embeddings
from dmvae_lib.training import resolve_device

CAPTIONS = 10  # of each image
TITLES = {"embedded": "drawn flowers", "subset": "Oxford-102 (reduced networks)", "full": "Oxford-102"}
NETWORKS = {  # source -> image backbone, text model
    "embedded": ("descriptor", "small-bert"),
    "subset": ("squeezenet1_0", "minilm"),
    "full": ("resnet101", "bert-base-uncased"),
}
CLASS_LISTS = {"train": "trainclasses.txt", "validation": "valclasses.txt", "test": "testclasses.txt"}
CAPTION_FOLDER = "cvpr2016_flowers"
SQUEEZENET = "weights/squeezenet1_0-imagenet.safetensors"
# Files whose publishers give no checksums of their own.
UNPUBLISHED = ("flowers-102/jpg/*.jpg", f"{CAPTION_FOLDER}/*.txt", f"{CAPTION_FOLDER}/text_c10/*/*.txt", SQUEEZENET)


@dataclass(frozen=True, eq=False)
class Flowers:
    """Images, what they show and what is said about them, before any network.

    images: N paths, or (N, 3, H, W) uint8; labels: (N,) int64; captions: N lists of ten; classes: {split: its classes},
    for "train", "validation" and "test"; names: {class: what it is called}.
    """

    images: Sequence[Path] | Tensor
    labels: Tensor
    captions: list[list[str]]
    classes: dict[str, tuple[int, ...]]
    names: dict[int, str]

    def rows(self, split: str) -> Tensor:
        """The images of a split's classes, (n,) int64, ascending."""
        return torch.isin(self.labels, torch.tensor(self.classes[split])).nonzero().flatten()


def load_flowers(
    source: str,
    root: str | os.PathLike = "data",
    evaluation: str = "test",
    cache: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    permutations: int = 30,
) -> Splits:
    """Features of flowers and of their captions, computed on `device` and kept in `cache` where one is given.

    source: "embedded" (drawn flowers; no files), "subset" (Oxford-102, SqueezeNet-1.0 from root/weights and MiniLM) or
        "full" (Oxford-102, ResNet-101 and BERT-base; what is missing is downloaded, except for the captions, see
        `fetch_captions`). Other sources never stand in. Files are held to root/MANIFEST.sha256 where there is one.
    evaluation: "test", or "validation": `test` is then the validation classes and the test classes are not loaded, for
        choices that must not see them.
    permutations: not used; an image is paired with its own captions.

    Items are "image" (n, d) float32, divided by the standard deviation of all values of the training images, and "text"
    (10n, 30, d) float16 token embeddings, zero after the last token; caption j belongs to image j // 10, pair j is that
    caption with its image. facts: "title", "backbone" and "text_model"; "names", {class: what it is called}; "classes",
    {split: its classes}; "captions", {"train": 10n texts, "test": ...}; "pictures", paths or (n, 3, H, W) uint8 by the
    same names (`picture`); "scale", what the images' features were divided by.

    Raises DMVAEError for an unknown source or evaluation, and for images, captions, class lists or weights that are
    missing, damaged, changed, or do not fit together.
    """
    check_asked("load_flowers", source, evaluation)
    flowers, (backbone, text_model), device = _read(source, root), NETWORKS[source], resolve_device(device)
    captions: dict[str, list[str]] = {}
    pictures: dict[str, Sequence[Path] | Tensor] = {}
    data, scale = {}, 1.0
    for part, split in (("train", "train"), ("test", evaluation)):
        rows = flowers.rows(split)
        labels, pairs = flowers.labels[rows], torch.arange(CAPTIONS * len(rows))
        captions[part] = [caption for row in rows.tolist() for caption in flowers.captions[row]]
        pictures[part], features = _pictures(flowers, rows, source, root, cache=cache, device=device)
        tokens, _ = token_embeddings(captions[part], text_model, cache=cache, device=device)
        if part == "train":
            scale = features.std().item()
        data[part] = PairedData(
            items={"image": features / scale, "text": tokens},
            index={"image": pairs // CAPTIONS, "text": pairs},
            item_labels={"image": labels, "text": labels.repeat_interleave(CAPTIONS)},
        )
    facts: dict[str, Any] = {"title": TITLES[source], "backbone": backbone, "text_model": text_model}
    facts["names"] = flowers.names
    facts |= {"classes": flowers.classes, "captions": captions, "pictures": pictures, "scale": scale}
    titles = {"image": TITLES[source], "text": f"captions of {TITLES[source]}"}
    return Splits(data["train"], data["test"], titles, source, facts)


# The paper gives no weights for flowers: one for both, against which the rows' weight of Eq. 4 is chosen (rows/flowers.py).
FLOWERS = DataSet(
    name="flowers",
    modalities=("image", "text"),
    load=load_flowers,
    weights={source: {"image": 0.1, "text": 0.1} for source in NETWORKS},
)


def picture(splits: Splits, i: int, part: str = "test") -> np.ndarray:
    """Image i of "test" or "train" for display, (H, W, 3) uint8. Raises DMVAEError for a file that cannot be decoded."""
    found = splits.facts["pictures"][part][i]
    return found.permute(1, 2, 0).numpy() if isinstance(found, Tensor) else np.asarray(decode_image(found))


def query_tokens(caption: str, splits: Splits) -> Tensor:
    """(1, 30, D) token embeddings of a caption of one's own, by the data's text model."""
    return token_embeddings([caption], splits.facts["text_model"])[0]


def unseen_flowers(
    source: str,
    scale: float,
    root: str | os.PathLike = "data",
    cache: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
) -> Splits:
    """The images of the test classes alone, for captions of one's own: no other image is read, no caption embedded.

    scale: what the features were divided by in training, `about["facts"]["scale"]` of a model that a row made. `test`,
    and `train` the same, has "image" with its classes as labels; facts: "backbone", "text_model", "names", "pictures"
    of "test". The rest, and the errors, as of `load_flowers`.
    """
    if source not in NETWORKS:
        raise DMVAEError(f"unseen_flowers: unknown source {source!r}; expected one of {', '.join(NETWORKS)}.")
    flowers, (backbone, text_model) = _read(source, root), NETWORKS[source]
    rows, how = flowers.rows("test"), {"cache": cache, "device": resolve_device(device)}
    pictures, features = _pictures(flowers, rows, source, root, **how)
    test = PairedData.aligned({"image": features / scale}, flowers.labels[rows])
    facts = {"backbone": backbone, "text_model": text_model, "names": flowers.names, "pictures": {"test": pictures}}
    return Splits(test, test, {"image": TITLES[source]}, source, facts)


def _read(source: str, root: str | os.PathLike) -> Flowers:
    return embedded_flowers() if source == "embedded" else load_oxford(root, download=source == "full")


def _pictures(flowers: Flowers, rows: Tensor, source: str, root: str | os.PathLike, **how: Any) -> tuple[Any, Tensor]:
    """The images of some rows, and their features by the source's backbone; how: as `image_features` takes it."""
    images = flowers.images
    pictures = images[rows] if isinstance(images, Tensor) else [images[row] for row in rows.tolist()]
    weights = Path(root, SQUEEZENET) if source == "subset" else None
    return pictures, image_features(pictures, NETWORKS[source][0], weights, **how)


def embedded_flowers() -> Flowers:
    """The drawn flowers (`drawn_flowers`), classes 0 to 63."""
    images, labels, captions = drawn_flowers()
    kinds, classes = flower_classes()
    names = {
        number: f"{kind.count} {kind.length} {kind.tip} {kind.petals} petals, {kind.size} {kind.centre} centre"
        + (f", {kind.pattern}" if kind.pattern != "plain" else "")
        + (", stamen" if kind.stamen == "visible" else "")
        for number, kind in enumerate(kinds)
    }
    return Flowers(images, labels, captions, classes, names)


# --- Oxford-102 --------------------------------------------------------------------------------------------------


def load_oxford(root: str | os.PathLike, download: bool = False) -> Flowers:
    """Oxford-102 (Nilsback & Zisserman 2008) with Reed et al.'s (2016) captions and zero-shot classes, 1 to 102.

    Reads root/flowers-102, which torchvision downloads and verifies if it may and must, and root/cvpr2016_flowers. What
    has no published checksum is held to root/MANIFEST.sha256 where there is one.

    Raises DMVAEError for what is missing or damaged and for images, labels, captions and class lists that do not join.
    """
    from scipy.io import loadmat
    from torchvision.datasets import Flowers102

    folder = Path(root, "flowers-102")
    if download:
        try:
            Flowers102(root, download=True)
        except (OSError, RuntimeError, HTTPException) as error:
            raise _missing("Oxford-102", folder, f" and fetching it failed ({error})") from error
    verify_listed(root, UNPUBLISHED)
    name, digest = Flowers102._file_dict["label"]
    if not (folder / name).is_file():
        raise _missing("Oxford-102", folder / name)
    verify(folder / name, digest)
    labels = torch.from_numpy(loadmat(folder / name)["labels"].astype(np.int64).flatten())
    images = [folder / "jpg" / f"image_{number:05}.jpg" for number in range(1, len(labels) + 1)]
    if odd := set(images) ^ set((folder / "jpg").glob("image_*.jpg")):
        raise DMVAEError(
            f"{folder / 'jpg'}: {len(odd & set(images)):,} of {len(images):,} images are missing and "
            f"{len(odd - set(images)):,} have no label, first {min(odd).name}. Delete the folder and fetch them again."
        )
    texts = Path(root, CAPTION_FOLDER)
    names = dict(enumerate(Flowers102.classes, 1))
    return Flowers(images, labels, load_captions(texts, labels), load_classes(texts, labels), names)


def load_captions(folder: str | os.PathLike, labels: Tensor) -> list[list[str]]:
    """Ten captions of each image, from folder/text_c10/class_XXXXX/image_XXXXX.txt, one to a line, blanks stripped.

    labels: (N,) int64, the class of images 1 to N; images and files must join one to one. The lines are kept as they
    are: 13 of the 81,890 published ones read "{}", a caption never written, and stay so that each image has ten.

    Raises DMVAEError that names the file for captions that are missing, in another class's folder or of no image, not
    UTF-8, not ten, or blank.
    """
    folder = Path(folder, "text_c10")
    if not folder.is_dir():
        raise _missing("the captions", folder)
    paths = [folder / f"class_{label:05}/image_{number:05}.txt" for number, label in enumerate(labels.tolist(), 1)]
    found = set(folder.glob("class_*/image_*.txt"))
    if odd := sorted(set(paths) ^ found):
        raise DMVAEError(
            f"{folder}: captions and labels do not join in {len(odd)} files, first {odd[0].relative_to(folder)}, which "
            f"{'is of no image of that class' if odd[0] in found else 'is missing'}. Unpack the captions again."
        )
    # Not splitlines(): it also splits at characters that may stand inside a caption, such as U+2028 or a form feed.
    captions = [[line.strip() for line in _text(path).removesuffix("\n").split("\n")] for path in paths]
    for path, lines in zip(paths, captions):
        if len(lines) != CAPTIONS:
            raise DMVAEError(f"{path} has {len(lines)} lines; expected {CAPTIONS} captions. Unpack the captions again.")
        if "" in lines:
            raise DMVAEError(f"{path}, line {lines.index('') + 1}: the caption is empty. Unpack the captions again.")
    return captions


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DMVAEError(f"cannot read {path}: {error.strerror}. Unpack the captions again.") from error
    except UnicodeDecodeError as error:
        raise DMVAEError(f"{path} is not UTF-8 at byte {error.start}. Unpack the captions again.") from error


def load_classes(folder: str | os.PathLike, labels: Tensor | None = None) -> dict[str, tuple[int, ...]]:
    """{split: its classes} from trainclasses.txt, valclasses.txt and testclasses.txt, lines such as class_00041.

    Raises DMVAEError for a list that is missing or has another line, for a class that is listed twice and, given
    the images' labels, for a class without images or in no list.
    """
    home: dict[int, str] = {}
    for split, name in CLASS_LISTS.items():
        lines = _text(Path(folder, name)).split() or ["nothing"]
        if bad := [line for line in lines if not re.fullmatch(r"class_\d+", line)]:
            raise DMVAEError(
                f"{Path(folder, name)} holds {bad[0]!r}; expected lines such as class_00041. Unpack the captions again."
            )
        for number in (int(line.removeprefix("class_")) for line in lines):
            if number in home:
                raise DMVAEError(
                    f"class {number} is listed for {home[number]} and for {split}; list it once, to be zero-shot."
                )
            home[number] = split
    if labels is not None and (odd := sorted(home.keys() ^ set(labels.tolist()))):
        state = "is listed but has no images" if odd[0] in home else "is in no class list"
        raise DMVAEError(f"class {odd[0]} {state}; the lists must hold every class of the images and no other.")
    return {split: tuple(number for number, where in home.items() if where == split) for split in CLASS_LISTS}


# --- downloads ---------------------------------------------------------------------------------------------------


def fetch_captions(url: str, sha256: str, root: str | os.PathLike) -> Path:
    """Fetches the captions' archive, whose top folder is cvpr2016_flowers, and unpacks it as root/cvpr2016_flowers.

    Reed et al. publish cvpr2016_flowers.tar.gz without a checksum, so none is kept here: give the URL and the digest of
    a copy that you trust, or put the folder there yourself. The folder comes whole or not at all.

    Raises DMVAEError for a digest that is none, where the folder is there already, for a server that does not give the
    archive or gives other bytes, and for an archive with links or with paths that leave its folder.
    """
    import pooch

    target = Path(root, CAPTION_FOLDER)
    if target.exists():
        raise DMVAEError(f"{target} is there already; delete it to fetch the captions again.")
    if not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise DMVAEError(f"fetch_captions: sha256={sha256!r}; expected 64 hexadecimal digits, of a copy you trust.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".captions-") as folder:
            archive = pooch.retrieve(url, f"sha256:{sha256.lower()}", "captions.tar.gz", folder, progressbar=True)
            with tarfile.open(archive) as file:
                if links := [member.name for member in file if not (member.isfile() or member.isdir())]:
                    raise tarfile.TarError(f"{links[0]} is no plain file")
                file.extractall(folder, filter="data")  # refuses members that would leave the folder
            os.replace(Path(folder, CAPTION_FOLDER), target)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise DMVAEError(
            f"cannot fetch {url} as {target} ({error}); nothing was kept. Check address, network and digest; "
            f"it must be a tar archive of a folder {CAPTION_FOLDER}, without links."
        ) from error
    return target


def _missing(what: str, path: Path, detail: str = "") -> DMVAEError:
    return DMVAEError(
        f"{what}: there is no {path.absolute()}{detail}. `make reproduce PROFILE=paper` downloads the images on a machine "
        f"with network access; the captions ({CAPTION_FOLDER}, Reed et al. 2016) have no published checksum: put the "
        f"folder there, or call fetch_captions with a URL and digest that you trust. {ELSEWHERE}"
    )
