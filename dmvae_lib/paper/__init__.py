"""All that is this paper's: its published numbers, data sets, networks, rows, runs, tables and figures.

Everything here stands on the core (`dmvae_lib`), which imports nothing of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from dmvae_lib.models import MultimodalVAE
    from dmvae_lib.paper.rows.row import Row


def pretrained(source: str | Path, row: Row | None = None, **options: Any) -> MultimodalVAE:
    """The model of a row, its networks made anew, with saved weights; on the CPU, ready for inference.

    source: a folder, as results/quick/models/dmvae-mnist-svhn; the name of one in a checkout's results/subset/models; or a
    repository of the Hub, with options as `revision="a commit"`. row: where it is none of `ROWS`.
    Raises DMVAEError as `load` does, and for a model that no row made.
    """
    from pathlib import Path

    import torch

    from dmvae_lib.errors import DMVAEError
    from dmvae_lib.models.saving import fetched, load_weights, read_config
    from dmvae_lib.pairing import PairedData
    from dmvae_lib.paper.data import Splits
    from dmvae_lib.paper.rows import ROWS

    ours = Path(__file__).resolve().parents[2] / "results" / "subset" / "models" / source
    folder = fetched(ours if ours.is_dir() and not Path(source).is_dir() else source, **options)
    config = read_config(folder)
    about = config.get("about", {})
    if row is None and (row := ROWS.get(about.get("row", ""))) is None:
        made = f"made by row {about['row']!r}; give it as `row`" if "row" in about else "that no row made"
        raise DMVAEError(f"{source} holds a model {made}, or load it with {config['model']}.load.")
    if lacking := {"classes", "shapes", "arguments"} - about.keys():
        raise DMVAEError(
            f"{source} does not say its {', '.join(sorted(lacking))}, as a row's model does; load it with {config['model']}.load."
        )
    # Builders look at the items' shapes and the classes at most.
    classes = about["classes"] or [0]
    items = {name: torch.zeros(len(classes), *shape) for name, shape in about["shapes"].items()}
    pairs = PairedData.aligned(items, torch.tensor(classes))
    model = row.build(row.data, Splits(pairs, pairs, {}, "saved"), **about["arguments"])
    return load_weights(model, folder)
