"""`python -m dmvae_lib.paper.weights --profile subset`: the weights that `pretrained` loads, each with its model card.

Of every row in `PUBLISHED` the median run (`tables.median`) of the profile's ledger, in float16, in
results/<profile>/models/. The weights must be on this machine: runs/ has them after `make reproduce`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch

from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import atomic_write
from dmvae_lib.models.saving import WEIGHTS
from dmvae_lib.paper import pretrained, published
from dmvae_lib.paper.published import MEASURES
from dmvae_lib.paper.rows.digits import DMVAE_ROW
from dmvae_lib.paper.rows.flowers import FLOWER_DMVAE
from dmvae_lib.paper.rows.row import Row
from dmvae_lib.paper.runs import Run, Setting, setting
from dmvae_lib.paper.tables import median, table
from dmvae_lib.training import resolve_device

PUBLISHED = {
    DMVAE_ROW: published.TABLE1["DMVAE"],
    FLOWER_DMVAE: published.TABLE2["DMVAE"],
}  # {row: the paper's percent}
WITHIN = 0.002  # by which half precision may change a score
TERMS = {  # of what each data set's model learnt from: what it is not good for, and terms
    "mnist-svhn": (
        "For anything but studying such models: it draws blurred digits of 32 x 32 pixels, is often wrong, and has seen "
        "digits alone. Do not read house numbers or cheques with it.",
        "MNIST (LeCun et al. 1998): CC BY-SA 3.0, as commonly stated. SVHN (Netzer et al. 2011): non-commercial use.",
    ),
    "flowers": (
        "For naming flowers in earnest: it compares features of whole pictures with captions. It draws "
        "features, not pictures, and takes them from the feature networks named in `config.json` of the project only.",
        "Oxford-102 (Nilsback & Zisserman 2008), captions (Reed et al. 2016): research use. The feature networks were "
        "trained on ImageNet and on text of the web.",
    ),
}
EMBEDDED = "Drawn images and captions: MIT. scikit-learn's digits (Alpaydin & Kaynak 1998, UCI): CC BY 4.0."
CARD = """---
library_name: dmvae_lib
tags: [multimodal, vae, dmvae]
---

# {name}

{title} of *Private-Shared Disentangled Multimodal VAE* (Lee & Pavlovic), row `{row}` of profile `{profile}`, seed {seed}:
the median of {seeds} by its scores. Weights in float16, {megabytes:.1f} MB.

    from dmvae_lib.paper import pretrained

    model = pretrained("{name}")  # in a checkout; elsewhere give the path of this folder, or its repository on the Hub

**Data.** {data}. Test data {fingerprint}.

**Budget.** {steps:,} updates of {batch_size} pairs, learning rate {learning_rate:g}, precision {precision}, {seconds:.0f} s on {device}.

**Scores** on the test data, percent:

| | this model, as loaded | all seeds: mean ± sd | paper |
|---|---|---|---|
{scores}

{judges}**Not good for.** {bad_for}

**Terms of the data.** {terms} The weights carry no licence of ours beyond them; the code is MIT.
"""


def publish(row: Row, place: Setting, paper: Mapping[str, float]) -> Path:
    """Writes the row's folder and returns it. Raises DMVAEError without entries of the row in the ledger, and where the
    scores of what is loaded again are not the run's, within `WITHIN`."""
    found = table({row.title: row}, place, {row.title: paper})
    seeds = found.attrs["measured"][row.title]
    if not seeds:
        where = f"{place.results / 'runs'} has no entry of {row.name}"
        raise DMVAEError(f"{where} as it is now: `make reproduce PROFILE={place.profile.name}` makes it.")
    run = median([Run(row, seed, place) for seed in seeds])
    name = f"dmvae-{row.data.name}"
    folder, model, loaded = place.results / "models" / name, run.train().model, replace(run)
    model.about |= {"run": run.config, "data": run.entry["data"]}
    with TemporaryDirectory() as tried:
        model.save(tried, torch.float16)
        loaded.__dict__["model"] = pretrained(tried, row).to(resolve_device(place.device))
    scores = row.evaluate(loaded)["scores"]
    if far := [measure for measure, share in scores.items() if abs(share - run.scores[measure]) > WITHIN]:
        raise DMVAEError(
            f"{folder}: in float16 {', '.join(far)} is not the run's within {WITHIN:.1%}; it is not published."
        )
    model.save(folder, torch.float16)
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(_card(name, run, scores, found.loc[row.title], folder), "utf-8")
    return folder


def _card(name: str, run: Run, scores: dict[str, float], every: pd.DataFrame, folder: Path) -> str:
    entry, plan = run.entry, run.config["schedule"]
    lines = []
    for measure, share in scores.items():
        cell = every.loc[MEASURES.get(measure, measure)]
        spread = f"{cell['mean']:.1f} ± {cell['sd']:.1f}" if cell["seeds"] > 1 else f"{cell['mean']:.1f}"
        lines.append(f"| {MEASURES.get(measure, measure)} | {100 * share:.1f} | {spread} | {cell['paper']:g} |")
    bad_for, terms = TERMS.get(run.row.data.name, ("Anything untried.", "Those of its data."))
    terms = EMBEDDED if entry["config"]["source"] == "embedded" else terms
    right = [f"{of}: {judge['accuracy']:.1%}" for of, judge in entry.get("judges", {}).items()]
    made, seeds = entry["made"], int(every["seeds"].max())
    return CARD.format(
        name=name, title=run.row.title, row=run.row.name, profile=entry["profile"], seed=run.seed,
        seeds=f"{seeds} seed{'s' * (seeds > 1)}", megabytes=(folder / WEIGHTS).stat().st_size / 1e6,
        data="; ".join(run.setting.splits(run.row.data).titles.values()), fingerprint=f"`{entry['data']['test']}`",
        precision=made["precision"], device=made["cpu" if made["device"] == "cpu" else "device"], seconds=entry["seconds"],
        scores="\n".join(lines), bad_for=bad_for, terms=terms,
        judges=f"The judges are right on real test images: {', '.join(right)}.\n\n" if right else "",
        **{part: plan[part] for part in ("steps", "batch_size", "learning_rate")},
    )  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="subset")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data", default="data", help="folder of the data files")
    options = parser.parse_args()
    try:
        place = setting(options.profile, device=options.device, data=options.data)
        for row, paper in PUBLISHED.items():
            print(publish(row, place, paper))
    except DMVAEError as error:
        sys.exit(f"\n{error}")


if __name__ == "__main__":
    main()
