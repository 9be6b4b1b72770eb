"""What the golden numbers of a row are, on any device: tests/test_golden.py compares them, benchmarks/gpu.py on a GPU."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from dmvae_lib import PairedData
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.data.polymnist import POLYMNIST
from dmvae_lib.paper.profiles import get_profile
from dmvae_lib.paper.rows import ROWS as TABLES
from dmvae_lib.paper.rows.flowers import FLOWERS
from dmvae_lib.paper.rows.incomplete import incomplete

GOLDEN = Path(__file__).with_name("golden.json")
PROFILE = replace(get_profile("quick"), width=0.125, particles=3, retrieval_hidden=8)
BATCH = torch.arange(8)
BETA = 0.5  # so that its place is seen too
SHAPES = {  # of the data sets of images
    "mnist-svhn": {"mnist": (1, 28, 28), "svhn": (3, 32, 32)},
    "polymnist": dict.fromkeys(POLYMNIST.modalities, (3, 28, 28)),
    "cdsprites-1": {"image": (3, 64, 64), "caption": (7, 27)},
}
ROWS = TABLES | {row.name: row for rows in incomplete(get_profile("paper")).values() for row in rows.values()}


@contextmanager
def float64():
    usual, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(usual)
        torch.set_num_threads(threads)


def splits_of(row) -> Splits:
    """Noise in the data set's shapes; captions of one to five words."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    if row in FLOWERS:  # more than GMM+HGLMM's projections have dimensions: below, canonical directions are arbitrary
        tokens = noise(800, 5, 64) - 0.5
        tokens[torch.arange(5) > torch.arange(800)[:, None] % 5] = 0
        items = {"image": noise(800, 260), "text": tokens}
    else:
        items = {name: noise(12, *shape) for name, shape in SHAPES[row.data.name].items()}
    labels = torch.arange(len(next(iter(items.values())))) % 3
    pairs = PairedData.aligned(items, labels)
    return Splits(pairs, pairs, {}, PROFILE.source)


class DrawnOnTheCPU(TorchFunctionMode):
    """Every draw, dropout's too, comes from the CPU's generator, so that all devices draw the same."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options, name = dict(options or {}), getattr(function, "__name__", "")
        if name in ("randn", "rand", "randint") and "device" in options:
            device = options.pop("device")
            return function(*arguments, **options).to(device)
        if name == "dropout":
            x, *rest = arguments
            return function(x.cpu(), *rest, **options).to(x.device)
        return function(*arguments, **options)


def numbers(row, device="cpu") -> dict[str, dict[str, float]]:
    """{"start", "after three steps": {term: value, "gradient": its norm}}, or what a row that is fitted has learnt."""
    with float64(), DrawnOnTheCPU():
        splits = splits_of(row)
        torch.manual_seed(0)
        model = row.build(row.data, splits, **row.arguments(PROFILE)).train().to(device)
        pairs = row.select(splits).to(device)
        rows = BATCH[: len(pairs)].to(device)
        labels, there = pairs.labels[rows], pairs.masks(rows)
        batch = {name: items[pairs.index[name][rows]] for name, items in pairs.items.items()}
        if row.fit:
            mixtures = row.fit(model, pairs, 0)
            found = {f"log-likelihood of {name}": {"first": h[0], "last": h[-1]} for name, h in mixtures.items()}
            image, text = model.embed_image(batch["image"]), model.embed_text(batch["text"])
            products = (image * text).sum(1)  # in which the arbitrary signs of singular vectors cancel
            return found | {"embeddings": {f"product {i}": value for i, value in enumerate(products.tolist())}}
        found, rate = {}, None
        weights = [values for values in model.parameters() if values.requires_grad]
        for step in range(4):
            torch.manual_seed(step)
            terms = row.objective(model, batch, labels, there, BETA)
            gradients = torch.autograd.grad(terms.total, weights, allow_unused=True)
            norm = sum(gradient.square().sum() for gradient in gradients if gradient is not None).sqrt().item()
            rate = rate or 0.1 / norm
            if step in (0, 3):
                values = {name: value.item() for name, value in terms.flat().items()}
                found["start" if step == 0 else "after three steps"] = values | {"gradient": norm}
            with torch.no_grad():
                for values, gradient in zip(weights, gradients):
                    values -= 0 if gradient is None else rate * gradient
    return found
