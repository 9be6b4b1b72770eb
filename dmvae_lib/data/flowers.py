"""Flowers with captions for Sec. 5.2: Oxford-102, or drawn ones that need no download; classes split zero-shot."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dmvae_lib.data.embedded_flowers import drawn_flowers, flower_classes
from dmvae_lib.data.features import decode_image, image_features, token_embeddings
from dmvae_lib.data.pairing import PairedData
from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import fetch, verify, verify_unchanged

CAPTIONS = 10  # of each image
SPLITS = ("train", "validation", "test")
EVALUATIONS = ("test", "validation")
TITLES = {"embedded": "drawn flowers", "subset": "Oxford-102 (reduced networks)", "full": "Oxford-102"}
NETWORKS = {  # source -> image backbone, text model
    "embedded": ("descriptor", "small-bert"),
    "subset": ("squeezenet1_0", "minilm"),
    "full": ("resnet101", "bert-base-uncased"),
}
CLASS_LISTS = {"train": "trainclasses.txt", "validation": "valclasses.txt", "test": "testclasses.txt"}
CAPTION_FOLDER = "cvpr2016_flowers"
UNPUBLISHED = (  # files whose publishers give no checksums of their own
    "flowers-102/jpg/*.jpg",
    f"{CAPTION_FOLDER}/*.txt",
    f"{CAPTION_FOLDER}/text_c10/*/*.txt",
    "weights/squeezenet1_0-imagenet.safetensors",
)


@dataclass(frozen=True, eq=False)
class Flowers:
    """Images, what they show and what is said about them, before any network.

    images: N paths, or (N, 3, H, W) uint8; labels: (N,) int64; captions: N lists of ten; classes: {split: its classes},
    for "train", "validation" and "test"; names: {class: what it is called}.

    Raises DMVAEError unless every image has a label and ten captions that are not blank, and every class one split.
    """

    images: Sequence[Path] | Tensor
    labels: Tensor
    captions: list[list[str]]
    classes: dict[str, tuple[int, ...]]
    names: dict[int, str]

    def __post_init__(self):
        if not len(self.images) == len(self.labels) == len(self.captions):
            raise DMVAEError(
                f"Flowers: {len(self.images)} images, {len(self.labels)} labels and captions of {len(self.captions)} "
                "images; expected one label and ten captions for each image."
            )
        for number, lines in enumerate(self.captions):
            if len(lines) != CAPTIONS or not all(line.strip() for line in lines):
                raise DMVAEError(
                    f"Flowers: image {number} has {sum(bool(line.strip()) for line in lines)} captions that are not "
                    f"blank; expected {CAPTIONS}."
                )
        check_classes(self.classes, set(self.labels.tolist()))

    def rows(self, split: str) -> Tensor:
        """The images of a split's classes, (n,) int64, ascending."""
        return torch.isin(self.labels, torch.tensor(self.classes[split])).nonzero().flatten()


@dataclass(frozen=True, eq=False)
class FlowerSplit(PairedData):
    """The images of some classes, each paired with each of its ten captions.

    Modalities: "image" (n, d) float32 features and "text" (10n, 30, d) float16 token embeddings, zero after the last
    token. Caption j belongs to image j // 10; pair j is that caption with its image. captions: the 10n texts; pictures:
    n paths, or (n, 3, H, W) uint8.
    """

    captions: list[str] = field(repr=False)
    pictures: Sequence[Path] | Tensor = field(repr=False)

    def image(self, i: int) -> np.ndarray:
        """Image i for display, (H, W, 3) uint8. Raises DMVAEError for a file that cannot be decoded."""
        picture = self.pictures[i]
        return picture.permute(1, 2, 0).numpy() if isinstance(picture, Tensor) else np.asarray(decode_image(picture))

    def to(self, device: str | torch.device) -> FlowerSplit:
        """The same data with features, labels and index on `device`."""
        moved = super().to(device)
        return FlowerSplit(moved.items, moved.item_labels, moved.index, self.captions, self.pictures)


@dataclass(frozen=True, eq=False)
class FlowerData:
    """Features of flowers and captions, no class in two of train, validation and test.

    train, validation, test: `FlowerSplit`s; with evaluation="validation", `test` is `validation`. names: {class: what
    it is called}; title: what the data is; backbone, text_model: what computed the features, for `image_features` and
    `token_embeddings` of further queries.
    """

    train: FlowerSplit
    validation: FlowerSplit
    test: FlowerSplit
    names: dict[int, str]
    title: str
    backbone: str
    text_model: str


def load_flowers(
    source: str,
    root: str | os.PathLike = "data",
    evaluation: str = "test",
    cache: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> FlowerData:
    """Flowers of one source with their features, computed on `device` and kept in `cache` where one is given.

    source: "embedded" (drawn flowers; no files), "subset" (Oxford-102, SqueezeNet-1.0 from root/weights and MiniLM) or
        "full" (Oxford-102, ResNet-101 and BERT-base; what is missing is downloaded, except for the captions, see
        `fetch_captions`). Other sources never stand in.
    evaluation: "test", or "validation": `test` is then the validation classes and the test classes are not loaded, for
        choices that must not see them.

    Images, captions and lists are held to root/MANIFEST.sha256, where there is one, else to what they were when `cache`
    was first used (`verify_unchanged`).

    Raises DMVAEError for an unknown source or evaluation, and for images, captions, class lists or weights that are
    missing, damaged, changed, or do not fit together.
    """
    if source not in NETWORKS:
        raise DMVAEError(f"load_flowers: unknown source {source!r}; expected one of {', '.join(NETWORKS)}.")
    if evaluation not in EVALUATIONS:
        raise DMVAEError(f"load_flowers: unknown evaluation {evaluation!r}; expected one of {', '.join(EVALUATIONS)}.")
    root = Path(root)
    if source == "embedded":
        flowers = embedded_flowers()
    else:
        if source == "full":
            _download_images(root)
        place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:8]
        verify_unchanged(root, UNPUBLISHED, None if cache is None else Path(cache, f"oxford-{place}.sha256"))
        flowers = load_oxford(root)
    backbone, text_model = NETWORKS[source]
    weights = root / "weights" / "squeezenet1_0-imagenet.safetensors" if source == "subset" else None

    def split(name: str) -> FlowerSplit:
        rows = flowers.rows(name)
        pictures = (
            flowers.images[rows]
            if isinstance(flowers.images, Tensor)
            else [flowers.images[row] for row in rows.tolist()]
        )
        captions = [caption for row in rows.tolist() for caption in flowers.captions[row]]
        labels = flowers.labels[rows]
        images = image_features(pictures, backbone, weights, cache, device, progress=progress)
        text, _ = token_embeddings(captions, text_model, cache=cache, device=device, progress=progress)
        pairs = torch.arange(len(captions))
        return FlowerSplit(
            items={"image": images, "text": text},
            item_labels={"image": labels, "text": labels.repeat_interleave(CAPTIONS)},
            index={"image": pairs // CAPTIONS, "text": pairs},
            captions=captions,
            pictures=pictures,
        )

    train, validation = split("train"), split("validation")
    test = split("test") if evaluation == "test" else validation
    return FlowerData(train, validation, test, flowers.names, TITLES[source], backbone, text_model)


def embedded_flowers(seed: int = 0) -> Flowers:
    """The drawn flowers (`drawn_flowers`), classes 0 to 63."""
    images, labels, captions = drawn_flowers(seed)
    kinds, classes = flower_classes()
    names = {
        number: f"{kind.count} {kind.length} {kind.tip} {kind.petals} petals, {kind.size} {kind.centre} centre"
        + (f", {kind.pattern}" if kind.pattern != "plain" else "")
        + (", stamen" if kind.stamen == "visible" else "")
        for number, kind in enumerate(kinds)
    }
    return Flowers(images, labels, captions, classes, names)


# --- Oxford-102 --------------------------------------------------------------------------------------------------


def load_oxford(root: str | os.PathLike) -> Flowers:
    """Oxford-102 (Nilsback & Zisserman 2008) with Reed et al.'s (2016) captions and zero-shot classes, 1 to 102.

    Reads root/flowers-102 (torchvision's layout) and root/cvpr2016_flowers.

    Raises DMVAEError for what is missing or damaged and for images, labels, captions and class lists that do not join.
    """
    from scipy.io import loadmat
    from torchvision.datasets import Flowers102

    folder = Path(root, "flowers-102")
    name, digest = Flowers102._file_dict["label"]
    if not (folder / name).is_file():
        raise _missing("Oxford-102", folder / name)
    verify(folder / name, digest)
    labels = torch.from_numpy(loadmat(folder / name)["labels"].astype(np.int64).flatten())
    images = [folder / "jpg" / f"image_{number:05}.jpg" for number in range(1, len(labels) + 1)]
    found = {path.name for path in (folder / "jpg").glob("image_*.jpg")}
    wanted = {path.name for path in images}
    if found != wanted:
        odd = min(wanted - found, default=None) or min(found - wanted)
        raise DMVAEError(
            f"{folder / 'jpg'}: {len(wanted - found):,} of {len(wanted):,} images are missing and "
            f"{len(found - wanted):,} have no label, first {odd}. Delete the folder and fetch the images again."
        )
    captions = load_captions(Path(root, CAPTION_FOLDER), labels)
    classes = load_classes(Path(root, CAPTION_FOLDER))
    return Flowers(images, labels, captions, classes, dict(enumerate(Flowers102.classes, 1)))


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
    names = [f"class_{label:05}/image_{number:05}.txt" for number, label in enumerate(labels.tolist(), 1)]
    found = {f"{path.parent.name}/{path.name}": path for path in folder.glob("class_*/image_*.txt")}
    homes = {name.split("/")[1]: name for name in found}
    for name in names:
        if name not in found:
            other = homes.get(name.split("/")[1])
            detail = f"its captions are in {other}, but its label says {name}" if other else "it has no captions"
            raise DMVAEError(
                f"{folder / name}: there is no such file; the image is labelled as {name.split('/')[0]} and {detail}. "
                "Unpack the captions again."
            )
    if len(found) > len(names):
        raise DMVAEError(
            f"{folder / min(set(found) - set(names))}: captions of an image that is not there; expected one file for "
            f"each of the {len(names):,} images. Remove the file, or unpack images and captions again."
        )
    return [_ten_captions(found[name]) for name in names]


def _ten_captions(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DMVAEError(f"cannot read {path}: {error.strerror}; check its permissions.") from error
    except UnicodeDecodeError as error:
        raise DMVAEError(
            f"{path} is not UTF-8 at byte {error.start}: it is damaged or in another encoding. Unpack captions again."
        ) from error
    # Not splitlines(): it also splits at characters that may stand inside a caption, such as U+2028 or a form feed.
    lines = [line.strip() for line in text.removesuffix("\n").split("\n")]
    if len(lines) != CAPTIONS:
        raise DMVAEError(f"{path} has {len(lines)} lines; expected {CAPTIONS} captions. Unpack the captions again.")
    if "" in lines:
        raise DMVAEError(f"{path}, line {lines.index('') + 1}: the caption is empty. Unpack the captions again.")
    return lines


def load_classes(folder: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """{split: its classes} from trainclasses.txt, valclasses.txt and testclasses.txt, lines such as class_00041.

    Raises DMVAEError for a list that is missing or has another line, and for a class that is listed twice.
    """
    classes = {}
    for split, name in CLASS_LISTS.items():
        path = Path(folder, name)
        try:
            lines = path.read_text(encoding="utf-8").split()
        except OSError as error:
            raise _missing(f"the list of {split} classes", path) from error
        except UnicodeDecodeError as error:
            raise DMVAEError(f"{path} is not UTF-8 at byte {error.start}; unpack the captions again.") from error
        matches = [re.fullmatch(r"class_(\d+)", line) for line in lines]
        if not lines or None in matches:
            bad = lines[matches.index(None)] if lines else "nothing"
            raise DMVAEError(f"{path} holds {bad!r}; expected lines such as class_00041. Unpack the captions again.")
        classes[split] = tuple(int(match[1]) for match in matches if match)
    check_classes(classes)
    return classes


def check_classes(classes: dict[str, tuple[int, ...]], labels: set[int] | None = None) -> None:
    """Raises DMVAEError unless each class is in one split, once, and, with `labels`, the splits hold just these."""
    if set(classes) != set(SPLITS):
        raise DMVAEError(f"class lists of {sorted(classes)}; expected {', '.join(SPLITS)}.")
    home: dict[int, str] = {}
    for split, members in classes.items():
        for number in members:
            if number in home:
                raise DMVAEError(
                    f"class {number} is listed for {home[number]} and for {split}: classes must be in one split, once, "
                    "or the evaluation is not zero-shot. Correct the class lists."
                )
            home[number] = split
    if labels is not None and set(home) != labels:
        odd = min(set(home) ^ labels)
        state = "is in no class list" if odd in labels else "is listed but has no images"
        raise DMVAEError(f"class {odd} {state}; the lists must hold every class of the images and no other.")


def fetch_captions(url: str, sha256: str, root: str | os.PathLike) -> Path:
    """Fetches the captions' archive, whose top folder is cvpr2016_flowers, and unpacks it as root/cvpr2016_flowers.

    Reed et al. publish cvpr2016_flowers.tar.gz without a checksum, so none is kept here: give the URL and the digest of
    a copy that you trust, or put the folder there yourself.

    Raises DMVAEError as `fetch` does, for an archive that cannot be unpacked, and where the folder is there already.
    """
    root = Path(root)
    target = root / CAPTION_FOLDER
    if target.exists():
        raise DMVAEError(f"{target} is there already; delete it to fetch the captions again.")
    archive = fetch(url, root / f"{CAPTION_FOLDER}.tar.gz", sha256)
    try:
        with tempfile.TemporaryDirectory(dir=root, prefix=".unpack-") as folder:
            with tarfile.open(archive) as file:
                file.extractall(folder, filter=_plain_files)
            os.replace(Path(folder, CAPTION_FOLDER), target)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DMVAEError(
            f"{archive} cannot be unpacked as {target} ({error}); expected a tar archive of a folder {CAPTION_FOLDER}."
        ) from error
    return target


def _plain_files(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """tarfile's data filter, which keeps members inside the folder, without the links that it lets through."""
    if not (member.isfile() or member.isdir()):
        raise tarfile.SpecialFileError(member)
    return tarfile.data_filter(member, folder)


def _download_images(root: Path) -> None:
    """Oxford-102's images and labels through torchvision, where they are missing; whole or not at all."""
    from torchvision.datasets import Flowers102

    target = root / "flowers-102"
    names = [name for name in ("jpg", "imagelabels.mat", "setid.mat") if not (target / name).exists()]
    if not names:
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
            Flowers102(folder, download=True)
            target.mkdir(exist_ok=True)
            for name in names:
                shutil.move(Path(folder, "flowers-102", name), target / name)
    except (OSError, RuntimeError) as error:
        raise _missing("Oxford-102", target / names[0], f" and fetching it failed ({error})") from error


def _missing(what: str, path: Path, detail: str = "") -> DMVAEError:
    fetching = (
        "`make reproduce PROFILE=paper` downloads the images on a machine with network access; the captions "
        f"({CAPTION_FOLDER}, Reed et al. 2016) have no published checksum: put the folder there, or call "
        "fetch_captions with a URL and digest that you trust"
    )
    return DMVAEError(
        f"{what}: there is no {path.absolute()}{detail}. {fetching}. If the files are elsewhere, name their folder, "
        "`make reproduce DATA=folder` or the notebook's `data`. Profile quick needs no download."
    )
