"""The site's page to play with: what the published DMVAE draws, rendered beforehand, so that it needs no server.

A Sphinx extension: `extensions += ["play"]`. It writes play.webp and play.js into the site's _static; docs/play.md shows
them. Where profile quick has no published weights the page says so instead.
"""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dmvae_lib.models import MultimodalVAE
from dmvae_lib.paper import pretrained
from dmvae_lib.paper.data import Splits
from dmvae_lib.paper.data.digits import MNIST_SVHN
from dmvae_lib.paper.figures import tile
from dmvae_lib.paper.runs import setting

HERE = Path(__file__).resolve().parent
WEIGHTS = HERE.parent / "results" / "quick" / "models" / "dmvae-mnist-svhn"
STEPS = torch.linspace(-2.5, 2.5, 9)
INSTEAD = (
    "# Play\n\nThis checkout has no published weights of profile `quick`, so there is nothing to play with here.\n"
)


@torch.no_grad()
def rendered(model: MultimodalVAE, splits: Splits, example: int = 1) -> tuple[Image.Image, dict[str, Any]]:
    """One picture of square tiles, and {"side", "steps", "classes", "pairs": [{"title", "private"}]}, what play.js needs of it.

    A row for each pair of source and target and each class: the example-th test image of it, then the target for its
    shared code, by two private dimensions (the second one faster), those that change the images most; or by its one.
    """
    test, side = splits.test, max(x.shape[-1] for x in splits.test.items.values())
    chosen = torch.cat([(test.labels == label).nonzero()[example] for label in test.labels.unique()])
    images, rows, pairs = test.batch(chosen), [], []
    for source, target in permutations(model.names, 2):
        shared, dim = model.infer({source: images[source]}).joint.mean[:, None], model.private_dims[target]
        ends = model.mean(target, torch.stack([-torch.eye(dim), torch.eye(dim)])[:, None] * STEPS[-1], shared)
        moved = (ends[0] - ends[1]).abs().flatten(2).mean((0, 2))
        dims = sorted(moved.topk(min(2, dim)).indices.tolist())
        values = torch.cartesian_prod(*[STEPS] * len(dims)).view(-1, len(dims))
        drawn = model.mean(target, torch.zeros(len(values), dim).index_copy(1, torch.tensor(dims), values), shared)
        row = torch.cat([_framed(images[source][:, None], side), _framed(drawn, side)], 1)
        rows.append(F.pad(row, (0, 0) * 3 + (0, 1 + len(STEPS) ** 2 - row.shape[1])))
        pairs.append({"title": f"{splits.titles[source]} → {splits.titles[target]}", "private": [k + 1 for k in dims]})
    pixels = tile(torch.cat(rows), gap=0)
    facts = {"side": side, "steps": [round(step, 3) for step in STEPS.tolist()], "pairs": pairs}
    facts["classes"] = test.labels.unique().tolist()
    return Image.fromarray((255 * pixels).round().astype("uint8")), facts


def _framed(images: Tensor, side: int) -> Tensor:
    """(R, C, channels, H, W) -> (R, C, 3, side, side), black around."""
    around = side - images.shape[-1]
    padded = F.pad(images, (around // 2, around - around // 2) * 2)
    return padded.expand(-1, -1, 3, -1, -1)


def write(static: Path, model: MultimodalVAE, splits: Splits) -> None:
    """play.webp and play.js, for docs/play.md's HTML, into a folder."""
    static.mkdir(parents=True, exist_ok=True)
    picture, facts = rendered(model, splits)
    picture.save(static / "play.webp", quality=92, method=6)
    script = (HERE / "play.js").read_text("utf-8")
    (static / "play.js").write_text(f"const PLAY = {json.dumps(facts)};\n{script}", "utf-8")


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", _with_weights)
    app.connect("source-read", _without_weights)
    return {"parallel_read_safe": True}


def _with_weights(app: Any) -> None:
    if app.builder.format == "html" and WEIGHTS.is_dir():
        write(Path(app.outdir, "_static"), pretrained(WEIGHTS), setting("quick").splits(MNIST_SVHN))


def _without_weights(app: Any, page: str, source: list[str]) -> None:
    if page == "docs/play" and not WEIGHTS.is_dir():
        source[0] = INSTEAD
