"""Views of the ledger: tables beside the paper's numbers, claims, and results/ with where each artefact came from."""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations
from time import gmtime, strftime

import pandas as pd
from matplotlib.figure import Figure

from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import atomic_write, check_seal, locked, read_json, remove_leftovers, seal, sha256, write_json
from dmvae_lib.paper.pages import REPAIR, counted, manifest, write_pages
from dmvae_lib.paper.published import MEASURES, Claim
from dmvae_lib.paper.rows.row import Row
from dmvae_lib.paper.runs import Run, Setting, commit, project_folder

OWN_FIGURES = re.compile("fig[45][a-z]?|fig[678]")  # the paper's: as PDFs too, for those who cite them
Percents = Mapping[str, Mapping[str, float]]  # the paper's: {row: {measure: percent}}

# --- the ledger, and tables of it -------------------------------------------------------------------------------------


def ledger(setting: Setting) -> dict[tuple[str, int], dict]:
    """{(row's name, seed): entry} of every run in the profile's ledger, of whatever configuration.

    Raises DMVAEError that names the file for an entry that is damaged, changed by hand, or another run's.
    """
    if keeps(setting):
        paths = {path: path.stem for path in (setting.results / "runs").glob("*.json")}
    else:
        part = setting.profile.name + ("" if setting.evaluation == "test" else f"-{setting.evaluation}")
        paths = {path: path.parent.name for path in (setting.runs / part).glob("*/entry.json")}
    found = {}
    for path, name in sorted(paths.items()):
        entry = check_seal(read_json(path, REPAIR), str(path), REPAIR)
        if name != f"{entry['row']}-{entry['seed']}":
            raise DMVAEError(f"{path} is the entry of {entry['row']}, seed {entry['seed']}, not its own. {REPAIR}")
        found[entry["row"], entry["seed"]] = entry
    return found


def keeps(setting: Setting) -> bool:
    """Whether results/ is written: not by profile smoke, and not on a validation split."""
    return setting.profile.writes_results and setting.evaluation == "test"


def table(
    rows: Mapping[str, Row], setting: Setting, paper: Percents | None = None, seeds: Collection[int] | None = None
) -> pd.DataFrame:
    """`compare`'s table of the ledger's entries alone: all seeds, or these, whose configuration is the row's present one.

    rows: {title: Row}; a row without such an entry stands there with missing numbers. Nothing is trained. `.attrs` has
    the ledger's files in the table, "runs", how long they trained together, "seconds", and what `check` needs,
    "measured". Entries of several kinds of machine stand together, though what is drawn or computed as their data differs
    there in rounding, and its fingerprint with it. Raises DMVAEError as `ledger` does.
    """
    entries = ledger(setting)
    values: dict[str, list] = {title: [] for title in rows}
    measured: dict[str, dict] = {title: {} for title in rows}
    used: dict[str, float] = {}
    for title, row in rows.items():
        for seed, entry in present(entries, row, setting).items():
            if seeds is None or seed in seeds:
                values[title].append(entry["scores"])
                measured[title][seed] = _measured(entry)
                used[f"{row.name}-{seed}.json"] = entry["seconds"]
    made = compare(values, paper or {})
    made.attrs |= {"measured": measured, "runs": list(used), "seconds": sum(used.values())}
    return made


def grid_choice(of: str) -> pd.DataFrame:
    """What results/subset/grid_<of>.csv, by `benchmarks/grid.py`, says of each row of "table1" or "table2": the score in
    percent and the values of the cell that the row uses, of the highest one, and of the best that its authors' published
    values allow."""
    grid = pd.read_csv(project_folder() / "results" / "subset" / f"grid_{of}.csv").rename(
        columns={"learning_rate": "rate"}
    )
    kinds = {"chosen": "used", "highest": "highest", "authors": "its authors'"}
    about = ["row", "score", "updates", "seeds", "seconds", "own", *kinds, *MEASURES.values()]
    lines: dict[str, dict[str, str]] = {title: {} for title in grid["row"]}
    for kind, column in kinds.items():
        for title, cells in grid[grid[kind]].groupby("row"):
            best = cells.sort_values("score").iloc[-1]
            values = best.drop(about, errors="ignore").dropna().items()
            written = ", ".join(value if isinstance(value, str) else f"{name} {value:.3g}" for name, value in values)
            lines[title][column] = f"{best['score']:.1f} ({written})"
    return pd.DataFrame(lines).T.fillna("–")


def curves(rows: Mapping[str, Row], setting: Setting) -> pd.DataFrame:
    """The validation scores of the ledger's entries as they were trained: a line per (row, seed, pairs seen), percent.

    rows: as of `table`; entries without a curve of scores, or of another configuration, are left out. `.attrs` has the
    ledger's files in it, "runs".
    """
    lines, entries, used = [], ledger(setting), []
    for title, row in rows.items():
        for seed, entry in present(entries, row, setting).items():
            curve, batch = dict(entry["curve"]), entry["config"]["schedule"]["batch_size"]
            pairs, _ = [batch * n for n in curve.pop("updates")], curve.pop("total", None)
            used += [f"{row.name}-{seed}.json"] if curve else []
            for at, *shares in zip(pairs, *curve.values()) if curve else ():
                percents = {MEASURES.get(measure, measure): 100 * share for measure, share in zip(curve, shares)}
                lines.append({"row": title, "seed": seed, "pairs": at, **percents})
    made = pd.DataFrame(lines, columns=None if lines else ["row", "seed", "pairs"]).set_index(["row", "seed", "pairs"])
    made.attrs["runs"] = used
    return made


def present(entries: Mapping[tuple[str, int], dict], row: Row, setting: Setting) -> dict[int, dict]:
    """{seed: entry}, by seed, of the `ledger`'s entries of the row as it is now; says which others it has."""
    own = {seed: entry for (name, seed), entry in sorted(entries.items()) if name == row.name}
    now = {seed: entry for seed, entry in own.items() if entry["config"] == row.config(setting.profile, seed)}
    for seed in own.keys() - now.keys():
        print(f"{row.name}, seed {seed}: left out, of another configuration than the row's; train it.", file=sys.stderr)
    return now


def compare(values: Mapping[str, Sequence[Mapping[str, float]]], paper: Percents) -> pd.DataFrame:
    """Long table of measured shares beside the paper's percentages.

    values: {row: [{measure: share in [0, 1]} for every seed]}; paper: rows may be absent.
    Columns, in percent: mean, sd (over seeds; missing with one), seeds, paper, difference (mean - paper), and each
    seed's own number, as text. A row without seeds has the others' measures, with missing numbers.
    """
    records = []
    everyones = dict.fromkeys(m for found in (*values.values(), paper.values()) for scores in found for m in scores)
    for row, seeds in values.items():
        for measure in seeds[0] if seeds else everyones:
            percents = [100 * seed[measure] for seed in seeds]
            mean = statistics.fmean(percents) if percents else float("nan")
            sd = statistics.stdev(percents) if len(percents) > 1 else float("nan")
            published = paper.get(row, {}).get(measure, float("nan"))
            each = " ".join(f"{percent:.2f}" for percent in percents)
            title = MEASURES.get(measure, measure)
            records.append((row, title, mean, sd, len(seeds), published, mean - published, each))
    columns = ["row", "measure", "mean", "sd", "seeds", "paper", "difference", "each"]
    return pd.DataFrame(records, columns=columns).set_index(["row", "measure"])


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`compare`'s table as people read it: a line per row, for each measure ours (mean ± sd), the paper's, the difference."""
    columns = {
        "ours": [_text(mean) + ("" if pd.isna(sd) else f" ± {sd:.1f}") for mean, sd in zip(table["mean"], table["sd"])],
        "paper": [_text(percent, "g") for percent in table["paper"]],
        "difference": [_text(difference, "+.1f") for difference in table["difference"]],
    }
    lines = pd.DataFrame(columns, index=table.index).unstack("measure").swaplevel(axis=1).fillna("–")
    rows, measures = (table.index.get_level_values(level).unique() for level in ("row", "measure"))
    order = [(measure, column) for measure in measures for column in columns]
    return lines.loc[rows, pd.MultiIndex.from_tuples(order)].rename_axis(None)


def _text(value: float, form: str = ".1f") -> str:
    return "–" if pd.isna(value) else f"{value:{form}}"


CONFIRMED, REFUTED, OPEN = "confirmed", "refuted", "not decided at this budget"


def check(claims: Iterable[Claim], table: pd.DataFrame, judge: str = "usual") -> pd.DataFrame:
    """What the ledger says of each claim, by the entries in `table`: a line each, with the numbers and the verdict.

    The claim's difference is taken seed by seed, over the seeds that both cells have, with its 95 % `interval`.
    Confirmed: all of the interval lies where the claim puts it; refuted: none of it does; else it is not decided.
    judge: "usual", or "strong" for the scores that the strong judges give.
    """
    lines = []
    for claim in claims:
        row, measure = claim.cell
        other = (row, f"chance of {measure}") if isinstance(claim.than, str) else claim.than
        cell, than = _of(table, claim.cell, judge), _of(table, other, judge)
        found = _paired(cell, than)
        seeds = found.seeds
        inside = claim.low < found.low and found.high < claim.high
        outside = found.high <= claim.low or claim.high <= found.low
        verdict = "not measured" if not seeds else CONFIRMED if inside else REFUTED if outside else OPEN
        numbers = [
            statistics.fmean(values[seed] for seed in seeds) if seeds else float("nan") for values in (cell, than)
        ]
        lines.append((claim.text, claim.where, *map(_text, numbers), found.text, _claimed(claim), len(seeds), verdict))
    columns = ["claim", "in", "here", "against", "difference [95 %]", "claimed", "seeds", "verdict"]
    return pd.DataFrame(lines, columns=columns).set_index("claim")


@dataclass(frozen=True)
class Difference:
    """A mean difference in points over `seeds`, with its 95 % interval; as text "+1.0 [+0.5, +1.5] *"."""

    seeds: tuple[int, ...]
    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, points: Mapping[int, float]) -> Difference:
        """Of {seed: difference in points}."""
        return cls(tuple(points), *interval(list(points.values())))

    @property
    def decided(self) -> bool:
        """Whether zero lies outside the interval: the star."""
        return self.low > 0 or self.high < 0

    @property
    def text(self) -> str:
        """Without the star."""
        within = f" [{self.low:+.1f}, {self.high:+.1f}]" if self.low > -float("inf") else ""
        return _text(self.mean, "+.1f") + within

    def __str__(self) -> str:
        return self.text + " *" * self.decided


def versus(table: pd.DataFrame, pairs: Iterable[tuple[str, str]], measures: Iterable[str]) -> pd.DataFrame:
    """One row against another, "one − other", by each measure: the `Difference` paired by seed over the seeds that both
    have; "–" where no seed has both."""
    cells = {
        f"{one} − {other}": {
            MEASURES.get(measure, measure): _paired(*(_of(table, (row, measure), "usual") for row in (one, other)))
            for measure in measures
        }
        for one, other in pairs
    }
    return pd.DataFrame(cells).T


def _paired(one: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """one - other, over the seeds that both have."""
    return Difference.of({seed: one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())})


def _claimed(claim: Claim) -> str:
    """Where the claim puts the difference."""
    if claim.high == float("inf"):
        return f"> {claim.low:g}"
    return f"< {claim.high:g}" if claim.low == -float("inf") else f"{claim.low:+g} to {claim.high:+g}"


def two_judges(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(rows as the usual and the strong judges score them, mean ± sd in percent; every two rows whose order one judge's
    95 % interval decides, and the other's decides otherwise, or not at all); of the runs that both have scored."""
    scored: dict[str, dict[tuple[str, str], str]] = {}
    measures: dict[str, None] = {}
    for row, seeds in table.attrs["measured"].items():
        of = {seed: by for seed, by in seeds.items() if "joint" in by["strong"]}
        for measure in (measure for measure in MEASURES if any(measure in by["strong"] for by in of.values())):
            measures[measure] = None
            for judge in ("usual", "strong"):
                scored.setdefault(row, {})[MEASURES[measure], judge] = spread(
                    [by[judge][measure] for by in of.values()]
                )
    pairs = [
        Claim(f"{a} above {b}, {MEASURES[measure]}", "", (a, measure), (b, measure))
        for measure in measures
        for a, b in combinations(scored, 2)
    ]
    usual, strong = check(pairs, table), check(pairs, table, "strong")
    order = usual[["verdict", "difference [95 %]"]].join(
        strong[["verdict", "difference [95 %]"]], rsuffix=", strong judge"
    )
    return pd.DataFrame(scored).T, order[usual["verdict"] != strong["verdict"]]


def beyond_scores(table: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """{title: a measure of `dmvae_lib.paper.codes`, or "chance of " one} as columns, of every row: `spread` over its seeds."""
    of_rows = {row: [by["usual"] for by in seeds.values()] for row, seeds in table.attrs["measured"].items()}
    cells = {
        title: {row: spread([of[measure] for of in every if measure in of]) for row, every in of_rows.items()}
        for title, measure in columns.items()
    }
    return pd.DataFrame(cells)


def spread(shares: Sequence[float]) -> str:
    """The mean ± standard deviation of shares, one for each seed, in percent; with one alone itself."""
    percents = [100 * share for share in shares]
    sd = f" ± {statistics.stdev(percents):.1f}" if len(percents) > 1 else ""
    return f"{statistics.fmean(percents):.1f}{sd}" if percents else "–"


def _of(table: pd.DataFrame, place: tuple[str, str] | float, judge: str) -> dict[int, float]:
    """{seed: percent} of a cell; percent that are given are every seed's."""
    measured = table.attrs["measured"]
    if isinstance(place, float):
        return {seed: place for of_row in measured.values() for seed in of_row}
    row, measure = place
    return {seed: 100 * by[judge][measure] for seed, by in measured.get(row, {}).items() if measure in by[judge]}


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high) of a 95 % interval for the mean over seeds (Student's t); endless with fewer than two."""
    from scipy.stats import t as student

    n = len(differences)
    mean = statistics.fmean(differences) if n else float("nan")
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(differences) / n**0.5 if n > 1 else float("inf")
    return mean, mean - half, mean + half


def _measured(entry: Mapping) -> dict[str, dict[str, float]]:
    """{judge: {measure: share}} of an entry: its scores, what else it says of the codes, and what chance would score."""
    rest = entry.get("codes", {}) | {
        f"chance of {measure}": share for measure, share in entry.get("chance", {}).items()
    }
    by = {"usual": entry["scores"], "strong": entry.get("strong", {}).get("scores", {})}
    return {judge: scores | rest for judge, scores in by.items()}


def median(runs: Iterable[Run]) -> Run:
    """The run with the median score (the mean of its measures; of an even number the lower): what figures are made from."""
    ranked = sorted(runs, key=lambda run: statistics.fmean(run.scores.values()))
    return ranked[(len(ranked) - 1) // 2]


def which(run: Run) -> str:
    """How a caption names a run: its seed, and its place by score (as of `median`) among the ledger's runs of the row."""
    entries = present(ledger(run.setting), run.row, run.setting) | {run.seed: run.entry}
    scores = {seed: statistics.fmean(entry["scores"].values()) for seed, entry in entries.items()}
    n, place = len(scores), sorted(scores, key=lambda seed: scores[seed]).index(run.seed)
    if n == 1:
        return f"seed {run.seed}, the only one here"
    by_place = {0: "the lowest", n - 1: "the highest", (n - 1) // 2: "the median"}
    return f"seed {run.seed}, {by_place.get(place, f'number {place + 1} from below')} of {n} by their scores"


# --- results/ ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Results:
    """Writes a notebook's artefacts to results/<profile>/, each with its entry in manifest.json, and the pages on them.

    notebook: its name, as in "03_table1", or the path of a script. runs: what the artefact is made from, as Runs or as
    names of the ledger's files (`table.attrs["runs"]`). Nothing is written unless the setting `keeps` results.
    """

    setting: Setting
    notebook: str

    def table(self, name: str, table: pd.DataFrame, caption: str, runs: Iterable[Run | str] = ()) -> pd.DataFrame:
        """name.csv (numbers), name.md and name.tex (readable; booktabs) of `compare`'s table; returns the readable one.

        Its entries of the ledger are in the manifest by themselves; runs: others, as the classifiers'.
        """
        shown = readable(table)
        caption = f"{caption} Profile {self.setting.profile.name}, {counted(table['seeds'])}, percent."
        flat = shown.copy()
        flat.columns = [f"{measure}, {column}" for measure, column in shown.columns]
        layout = {"label": f"tab:{name}", "column_format": "l" + "rrr" * (shown.shape[1] // 3), "escape": True}
        bare = caption.split(": ", 1)[-1]  # LaTeX numbers its tables itself
        latex = shown.to_latex(caption=bare.replace("%", r"\%").replace("&", r"\&"), **layout)
        for character, command in (("→", r"$\rightarrow$"), ("±", r"$\pm$"), ("–", "--")):
            latex = latex.replace(character, command)
        markdown = f"{caption}\n\n{flat.to_markdown(disable_numparse=True)}\n"
        texts = {"csv": table.to_csv(), "md": markdown, "tex": latex}
        self._keep(name, caption, [*table.attrs.get("runs", ()), *runs], texts)
        return shown

    def frame(self, name: str, frame: pd.DataFrame, caption: str, runs: Iterable[Run | str] = ()) -> pd.DataFrame:
        """name.csv and name.md of any other table; returns it."""
        caption = f"{caption} Profile {self.setting.profile.name}."
        flat = frame.reset_index() if frame.index.nlevels > 1 else frame  # tabulate writes a MultiIndex as tuples
        if frame.columns.nlevels > 1:
            flat = flat.set_axis([", ".join(filter(None, column)) for column in flat.columns], axis=1)
        shown = flat.to_markdown(index=frame.index.nlevels == 1, disable_numparse=True)
        self._keep(name, caption, runs, {"csv": frame.to_csv(), "md": f"{caption}\n\n{shown}\n"})
        return frame

    def figure(self, name: str, figure: Figure, caption: str, runs: Iterable[Run | str] = (), dpi: int = 150) -> Figure:
        """name.png and, for the paper's own figures, name.pdf; returns the figure."""
        caption = f"{caption} Profile {self.setting.profile.name}."
        writers = {"png": lambda path: figure.savefig(path, dpi=dpi, bbox_inches="tight")}
        if OWN_FIGURES.fullmatch(name):
            writers["pdf"] = lambda path: figure.savefig(path, bbox_inches="tight", metadata={"CreationDate": None})
        self._keep(name, caption, runs, writers)
        return figure

    def _keep(self, name: str, caption: str, runs: Iterable[Run | str], contents: Mapping[str, str | Callable]) -> None:
        """contents: {suffix: a text, or what writes to a path}."""
        if not keeps(self.setting):
            return
        folder = self.setting.results
        made_by = self.notebook if "/" in self.notebook else f"notebooks/{self.notebook}.ipynb"
        with locked(folder.parent, "writing results"):
            remove_leftovers(folder)
            for suffix, content in contents.items():
                with atomic_write(folder / f"{name}.{suffix}") as temporary:
                    if isinstance(content, str):
                        temporary.write_text(content, "utf-8")
                    else:
                        content(temporary)
            files = {f"{name}.{suffix}": sha256(folder / f"{name}.{suffix}") for suffix in contents}
            used = list(dict.fromkeys(run if isinstance(run, str) else run.entry_path.name for run in runs))
            finished = strftime("%Y-%m-%dT%H:%M:%SZ", gmtime())
            made = {"commit": commit(), "dmvae_lib": version("dmvae_lib"), "finished": finished}
            entry = {
                "artefact": name,
                "caption": caption,
                "notebook": made_by,
                "files": files,
                "runs": used,
                "made": made,
            }
            entries = manifest(folder) if (folder / "manifest.json").exists() else {}
            for former in entries.get(name, {"files": {}})["files"].keys() - files.keys():
                (folder / former).unlink(missing_ok=True)
            write_json(folder / "manifest.json", dict(sorted((entries | {name: seal(entry)}).items())))
            write_pages(folder.parent)
