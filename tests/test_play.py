"""The site's page to play with: what stands where in its picture, and that its sliders show it."""

from pathlib import Path

import numpy as np
import play
import pytest
import torch
from browser import chromium, needs_chromium
from PIL import Image

from dmvae_lib.pairing import PairedData
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.profiles import SMOKE
from dmvae_lib.paper.rows.digits import DMVAE_ROW

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def model_and_splits():
    """An untrained DMVAE whose codes show in what it draws, and two noisy pairs of each digit."""
    noise = torch.Generator().manual_seed(0)
    shapes = {"mnist": (1, 28, 28), "svhn": (3, 32, 32)}
    items = {name: torch.rand(20, *shape, generator=noise) for name, shape in shapes.items()}
    pairs = PairedData.aligned(items, torch.arange(10).repeat(2))
    splits = Splits(pairs, pairs, {"mnist": "written", "svhn": "drawn"}, "embedded")
    torch.manual_seed(0)
    model = DMVAE_ROW.model(splits, SMOKE).eval()
    for decoder in model.decoders.values():
        for parameter in decoder.parameters():
            parameter.data *= 2
    return model, splits


def test_a_tile_is_what_the_decoder_draws_for_its_private_code(model_and_splits):
    model, splits = model_and_splits
    picture, facts = play.rendered(model, splits)
    side, n = facts["side"], len(facts["steps"])
    assert (side, n, facts["classes"]) == (32, 9, list(range(10)))
    assert [pair["title"] for pair in facts["pairs"]] == ["written → drawn", "drawn → written"]
    assert [len(pair["private"]) for pair in facts["pairs"]] == [2, 1]
    assert picture.size == (82 * side, 20 * side)
    first, second = facts["pairs"][0]["private"]
    code = torch.zeros(1, 4)
    code[0, first - 1], code[0, second - 1] = facts["steps"][7], facts["steps"][2]
    image = splits.test.batch(torch.tensor([10 + 3]))["mnist"]  # the second 3
    with torch.no_grad():
        drawn = model.mean("svhn", code, model.infer({"mnist": image}).joint.mean)[0]
    column = 1 + 7 * n + 2
    tile = picture.crop((column * side, 3 * side, (column + 1) * side, 4 * side))
    assert torch.equal(torch.from_numpy(np.array(tile)), (255 * drawn).round().to(torch.uint8).permute(1, 2, 0))


def slide(which: int, to: int) -> str:
    return f"(e => {{ e.value = {to}; e.dispatchEvent(new Event('input')); }})(document.querySelectorAll('#play [type=range]')[{which}])"


def click(of: str, which: int) -> str:
    return f"document.querySelector('#play .{of} button:nth-child({which})').click()"


@needs_chromium
def test_a_slider_changes_what_is_shown(model_and_splits, tmp_path):
    play.write(tmp_path / "_static", *model_and_splits)
    html = (DOCS / "play.md").read_text("utf-8").split("```{raw} html\n")[1].split("```")[0]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "play.html").write_text(f'<!doctype html><meta charset="utf-8">{html}', "utf-8")
    with chromium() as page:
        page.open((tmp_path / "docs" / "play.html").as_uri())
        page.wait("document.querySelector('#drawn').width == 32")
        assert page.run("document.querySelectorAll('#play .input button').length") == 10
        drawn = []
        for step in ("0", slide(0, 8), slide(1, 0), click("input", 9), click("pair", 2)):
            page.run(step)
            box = page.run("document.querySelector('#drawn').getBoundingClientRect().toJSON()")
            page.screenshot(tmp_path / "window.png")
            with Image.open(tmp_path / "window.png") as window:  # the canvas alone: the sliders move in any case
                drawn.append(window.crop(tuple(box[edge] for edge in ("left", "top", "right", "bottom"))).tobytes())
        assert len(set(drawn)) == len(drawn)
        assert page.run("[...document.querySelectorAll('#play label')].map(label => label.hidden)") == [False, True]
        assert not page.errors
