"""One small grid for every row of Table 1, Table 2 or PolyMNIST, trained shortly, judged on validation data alone.

`.venv/bin/python benchmarks/grid.py --profile subset --of table2` trains the cells that are not trained here yet, so that
an interrupted grid goes on, and writes results/<profile>/grid_table2.csv. A cell's `score` is the mean of its measures, and
over the seeds. One rule for all rows, the paper's own included: a row keeps its own values unless the highest score is
above theirs by more than `MARGIN`, also with two more seeds. What is chosen is written into dmvae_lib/paper/rows/;
tests/test_grid.py holds the two together. (Table 2's rows had got the highest cell of one seed before there was this rule, and
by it they keep it.)
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
from independent import command_line, need_multivae
from tqdm.auto import tqdm

from dmvae_lib import DMVAEError, Schedule
from dmvae_lib.paper import profiles
from dmvae_lib.paper.profiles import Profile
from dmvae_lib.paper.published import MEASURES
from dmvae_lib.paper.rows import TABLE1, TABLE2, Row
from dmvae_lib.paper.rows.polymnist import POLYMNIST_ROWS
from dmvae_lib.paper.rows.successors import SUCCESSORS
from dmvae_lib.paper.runs import Run, Setting, setting
from dmvae_lib.paper.tables import Results

# {"learning_rate": Adam's, "lambda": of the first modality, "weights": of every modality, an option of the row: its value}
Cell = Mapping[str, Any]
# Points: about what a seed changes. After 1,200 updates the score's standard deviation over seeds was 3.7 (DMVAE), 1.7
# (MMVAE) and 0.6 (MVAE), by the validation curves of the ledger's runs.
MARGIN = 3.0
COMPARED = ("DMVAE", "MVAE", "MMVAE", "MoPoE", "MVTCAE", "MMVAE+")
TABLES = {
    "table1": TABLE1,
    "table2": {title: row for title, row in TABLE2.items() if not row.fit},  # GMM+HGLMM has no rate
    # "one source" estimates DMVAE's own objective, and MultiVae's MVAE and MMVAE are held against ours: as those.
    "polymnist": {title: (POLYMNIST_ROWS | SUCCESSORS)[title] for title in COMPARED},
}
RATES = {"table1": (5e-4, 1e-3, 2e-3), "table2": (2e-4, 7e-4, 2e-3), "polymnist": (1e-3,)}
LAMBDAS, INITIALISATIONS = (1.0, 3072 / 784, 50.0), ("pytorch", "kaiming", "release")
# PolyMNIST: of every modality's likelihood; MoPoE, MVTCAE and MMVAE+ have beta = 2.5 beside it
WEIGHTS, LIKELIHOODS = (1.0, 2.5), ("bernoulli", "laplace")
OWN = {  # Table 2: an option of the row and its middle value; a third and three times as much are tried too
    "Word2Vec": ("margin", 1.0),
    "Word CNN": ("margin", 1.0),
    "Word CNN-RNN": ("margin", 1.0),
    "Triplet": ("margin", 0.2),
    "IATV": ("temperature", 0.1),
    "CMPM+CMPC": ("classification", 1.0),
    "TIMAM": ("adversarial", 0.1),
    "DMVAE": ("matching", 100.0),
}
REED = {"learning_rate": 7e-4, "margin": 1.0}  # github.com/reedscot/cvpr2016, by RMSprop
AUTHORS: dict[str, dict[str, Cell]] = {  # {table: {row: what its authors publish of it}}
    "table1": {
        "MVAE": {"learning_rate": 1e-3, "initialise": "pytorch"},  # github.com/mhw32/multimodal-vae-public
        "MMVAE": {"learning_rate": 1e-3, "lambda": 3072 / 784, "initialise": "pytorch"},  # github.com/iffsid/mmvae
        "DMVAE": {"learning_rate": 1e-3, "lambda": 50.0, "initialise": "release"},  # github.com/seqam-lab/DMVAE
    },
    "table2": {
        **dict.fromkeys(("Word2Vec", "Word CNN", "Word CNN-RNN"), REED),
        # github.com/YingZhangDUT/Cross-Modal-Projection-Learning
        "CMPM+CMPC": {"learning_rate": 2e-4, "classification": 1.0},
    },
    "polymnist": dict.fromkeys(
        ("MoPoE", "MVTCAE", "MMVAE+"), {"weights": 1.0, "initialise": "pytorch", "likelihood": "laplace"}
    ),
}


def cells(of: str, title: str) -> list[Cell]:
    """The grid of a row. Table 1: rate, lambda of the first modality, initialisation; Table 2: rate and OWN value;
    PolyMNIST: lambda of all modalities, likelihood, initialisation."""
    axes: dict[str, tuple] = {"learning_rate": RATES[of]}
    if of == "table1":
        axes |= {"lambda": LAMBDAS, "initialise": INITIALISATIONS}
    elif of == "polymnist":
        axes |= {"weights": WEIGHTS, "likelihood": LIKELIHOODS, "initialise": ("pytorch", "release")}
    elif title in OWN:
        option, middle = OWN[title]
        axes[option] = tuple(round(middle * factor, 3) for factor in (1 / 3, 1.0, 3.0))
    return [dict(zip(axes, values)) for values in product(*axes.values())]


def variant(row: Row, profile: Profile, cell: Cell) -> Row:
    """The row with the cell's values in the place of its own, under a name of its own."""
    weights = row.arguments(profile).get("weights", {})
    options = dict(row.options) | {name: value for name, value in cell.items() if name in row.options}
    if "lambda" in cell:
        options["weights"] = weights | {next(iter(weights)): cell["lambda"]}
    if "weights" in cell:
        options["weights"] = dict.fromkeys(weights, cell["weights"])
    name = ".".join([f"grid-{row.name}", *(f"{key}-{value}".replace("_", "-") for key, value in cell.items())])
    return replace(row, name=name, options=options, schedule=partial(at_rate, row.schedule, cell["learning_rate"]))


def at_rate(schedule: Any, rate: float, profile: Profile) -> Schedule:
    return replace(schedule(profile), learning_rate=rate)


def present(row: Row, profile: Profile, cell: Cell) -> Cell:
    """The row's own values of what `cell` sets."""
    arguments = row.arguments(profile)
    known = {"learning_rate": row.schedule(profile).learning_rate, **arguments}
    first = next(iter(arguments.get("weights", {}).values()), None)
    return {name: first if name in ("lambda", "weights") else known[name] for name in cell}


def shortened(place: Setting, share: float) -> Setting:
    """The setting on its validation data, every row with that share of its updates."""
    return replace(place, profile=profiles.shortened(place.profile, share), evaluation="validation")


def line(of: str, place: Setting, title: str, cell: Cell) -> dict[str, Any]:
    """A row's cell, measured in percent over the setting's seeds; one that diverges has no score."""
    row = variant(TABLES[of][title], place.profile, cell)
    try:
        found = [Run(row, seed, place).train().entry for seed in range(place.seeds)]
    except DMVAEError as error:
        print(f"{title}, {dict(cell)}: {error}", file=sys.stderr)
        found = []
    published = AUTHORS[of].get(title, {})
    about = {"authors": bool(published) and published.items() <= cell.items()}
    about["own"] = present(TABLES[of][title], place.profile, cell) == cell
    measures = found[0]["scores"] if found else ()
    means = {m: round(100 * statistics.fmean(entry["scores"][m] for entry in found), 2) for m in measures}
    score = round(statistics.fmean(means.values()), 2) if means else float("nan")
    scores = {MEASURES.get(m, m): mean for m, mean in means.items()} | {"score": score}
    cost = {"updates": row.schedule(place.profile).steps, "seconds": sum(entry["seconds"] for entry in found)}
    return {"row": title, **cell, **scores, **about, "seeds": len(found), **cost}


def measure(of: str, place: Setting) -> pd.DataFrame:
    """`choose` of a line for every row and cell. The highest of many is so by luck too: where it is not the row's own, both
    are measured again with two more seeds, and these decide."""
    every = [(title, cell) for title in TABLES[of] for cell in cells(of, title)]
    lines = [line(of, place, *of_row) for of_row in tqdm(every, desc="grid", unit="cell")]
    frame, more = choose(pd.DataFrame(lines)), replace(place, seeds=place.seeds + 2)
    doubtful = frame["row"].isin(frame["row"][frame["highest"] & ~frame["own"]])
    for i in tqdm(frame.index[doubtful & (frame["highest"] | frame["own"])], desc="again", unit="cell"):
        lines[i] = line(of, more, *every[i])
    return choose(pd.DataFrame(lines))


def choose(frame: pd.DataFrame) -> pd.DataFrame:
    """The lines with "highest", the highest score of each row among those of most seeds, the first of equals, and "chosen":
    the row's own, unless the highest is above it by more than `MARGIN`."""
    fullest = frame["seeds"] == frame.groupby("row")["seeds"].transform("max")
    best = frame[fullest].dropna(subset="score").groupby("row")["score"].idxmax()
    highest, score = frame.index.isin(best), frame["row"].map(frame.loc[best].set_index("row")["score"])
    kept = frame["own"] & fullest & (frame["score"] >= score - MARGIN)
    return frame.assign(highest=highest, chosen=kept | (highest & ~frame["row"].isin(frame["row"][kept])))


def main() -> None:
    parser = command_line(__doc__, profile="subset", of="table2", seeds=1, device="auto", data="data", share=0.2)
    options = vars(parser.parse_args())
    of, share = options.pop("of"), options.pop("share")
    try:
        if of not in TABLES:
            raise DMVAEError(f"--of {of}: there is no such grid; expected one of {', '.join(TABLES)}.")
        if of == "polymnist":
            need_multivae()
        place = setting(**options)
        frame = measure(of, shortened(place, share))
        title = {"table1": "Table 1", "table2": "Table 2", "polymnist": "PolyMNIST"}[of]
        caption = (
            f"The grid of {title}: {share:g} of the updates, validation data, percent. `score`: the mean of a cell's measures; "
            "`authors`: what a row's authors publish; `own`: what the row had; `chosen`: its own, unless the `highest` score, "
            f"with two more seeds of both, is above that by more than {MARGIN:g} points."
        )
        if of == "table2":
            caption += " What the rows had was the highest cell of this grid, of one seed, before there was that rule."
        Results(place, "benchmarks/grid.py").frame(f"grid_{of}", frame.set_index("row"), caption)
    except DMVAEError as error:
        sys.exit(f"\n{error}")
    print(frame.loc[frame["chosen"] | frame["highest"] | frame["authors"]].to_string())


if __name__ == "__main__":
    main()
