"""The golden numbers: what guards the mathematics of every row of the tables.

`.venv/bin/python tests/test_golden.py` records them anew, into tests/golden.json.
"""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dmvae_lib import PairedData
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.data.polymnist import POLYMNIST
from dmvae_lib.paper.profiles import get_profile
from dmvae_lib.paper.rows import FLOWERS, ROWS

GOLDEN = Path(__file__).with_name("golden.json")
COMMAND = ".venv/bin/python tests/test_golden.py"
PROFILE = replace(get_profile("quick"), width=0.125, particles=3, retrieval_hidden=8)
BATCH = torch.arange(8)
BETA = 0.5  # so that its place is seen too
SHAPES = {  # of the data sets of images
    "mnist-svhn": {"mnist": (1, 28, 28), "svhn": (3, 32, 32)},
    "polymnist": dict.fromkeys(POLYMNIST.modalities, (3, 28, 28)),
    "cdsprites-1": {"image": (3, 64, 64), "caption": (7, 27)},
}


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


def numbers(row) -> dict[str, dict[str, float]]:
    """{"start", "after three steps": {term: value, "gradient": its norm}}, or what a row that is fitted has learnt."""
    with float64():
        splits = splits_of(row)
        torch.manual_seed(0)
        model = row.build(row.data, splits, **row.arguments(PROFILE)).train()
        pairs = row.select(splits)
        batch = {name: items[pairs.index[name][BATCH]] for name, items in pairs.items.items()}
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
            terms = row.objective(model, batch, pairs.labels[BATCH], None, BETA)
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


def check(row) -> None:
    expected, found = json.loads(GOLDEN.read_text()).get(row.name), numbers(row)
    advice = (
        f"or raise the row's version (its runs are then trained again) and run `{COMMAND}` to record the new numbers"
    )
    assert expected is not None, f"row {row.name} has no golden numbers: run `{COMMAND}`"
    for when, values in expected.items():
        assert found[when] == pytest.approx(values, rel=1e-6, abs=1e-9), (
            f"the mathematics of row {row.name} changed ({when}): undo it, {advice}"
        )
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_the_mathematics_is_the_recorded_one(row):
    check(row)


def test_no_row_is_recorded_that_is_gone():
    assert set(json.loads(GOLDEN.read_text())) == set(ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS.values() if not row.fit], ids=lambda row: row.name)
def test_the_steps_move_the_numbers_and_do_not_explode(row):
    start, after = json.loads(GOLDEN.read_text())[row.name].values()
    assert (
        abs(after["total"] - start["total"]) > 1e-4 * abs(start["total"]) and after["gradient"] < 10 * start["gradient"]
    )


@pytest.mark.parametrize("name", ["dmvae", "mvae", "jmvae", "flowers-dmvae"])
def test_a_changed_constant_is_seen_and_what_to_do_is_said(monkeypatch, name):
    from dmvae_lib import DiagonalGaussian, product_of_experts

    def changed(*arguments, **options):
        found = product_of_experts(*arguments, **options)
        return DiagonalGaussian(found.mean, found.logvar + 1e-4)

    if name == "jmvae":  # all there is to see it by are its posteriors
        usual = DiagonalGaussian.kl
        monkeypatch.setattr(DiagonalGaussian, "kl", lambda *arguments: usual(*arguments) * (1 + 1e-5))
    for module in [module for key, module in sys.modules.items() if key.startswith("dmvae_lib")]:
        if hasattr(module, "product_of_experts"):
            monkeypatch.setattr(module, "product_of_experts", changed)
    with pytest.raises(AssertionError, match=f"row {name} changed .*: undo it, or raise the row's version .*{COMMAND}"):
        check(ROWS[name])


def test_a_rename_is_no_change():
    assert numbers(replace(ROWS["dmvae"], name="another", title="Another", version=2)) == numbers(ROWS["dmvae"])


if __name__ == "__main__":
    recorded = {name: numbers(row) for name, row in ROWS.items()}
    short = json.loads(json.dumps(recorded), parse_float=lambda digits: float(f"{float(digits):.9g}"))
    GOLDEN.write_text(json.dumps(short, indent=1) + "\n")
    print(f"{GOLDEN} has the numbers of {len(ROWS)} rows.")
