"""Tables beside the paper's numbers, figures, and the manifest that says where each came from."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dmvae_lib.errors import DMVAEError
from dmvae_lib.experiments import coherence
from dmvae_lib.files import (
    atomic_write,
    check_seal,
    locked,
    read_json,
    remove_leftovers,
    seal,
    sha256,
    write_json,
)
from dmvae_lib.paper import Claim
from dmvae_lib.runs import Run, Setting, configuration_hash, provenance
from dmvae_lib.source import changed, python_digest, source_digests
from dmvae_lib.training import resolve_device

MEASURES = {
    "mnist->svhn": "Cross(M → S)",
    "svhn->mnist": "Cross(S → M)",
    "joint": "Joint",
    "rank1": "Img2Txt (Rank-1)",
    "ap50": "Txt2Img (AP@50)",
}


def compare(
    values: Mapping[str, Sequence[Mapping[str, float]]], paper: Mapping[str, Mapping[str, float]]
) -> pd.DataFrame:
    """Long table of measured shares beside the paper's percentages.

    values: {row: [{measure: share in [0, 1]} for every seed]}; paper: {row: {measure: percent}}, rows may be absent.
    Columns, in percent: mean, sd (over seeds; missing with one), seeds, paper, difference (mean - paper), and each
    seed's own number, as text.
    """
    records = []
    for row, seeds in values.items():
        for measure in seeds[0]:
            percents = [100 * seed[measure] for seed in seeds]
            mean = statistics.fmean(percents)
            sd = statistics.stdev(percents) if len(percents) > 1 else float("nan")
            published = paper.get(row, {}).get(measure, float("nan"))
            each = " ".join(f"{percent:.2f}" for percent in percents)
            records.append(
                (row, MEASURES.get(measure, measure), mean, sd, len(seeds), published, mean - published, each)
            )
    columns = ["row", "measure", "mean", "sd", "seeds", "paper", "difference", "each"]
    return pd.DataFrame(records, columns=columns).set_index(["row", "measure"])


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """`compare`'s table as people read it: a line per row, for each measure ours (mean ± sd), the paper's, the difference."""

    def line(entry: pd.Series) -> pd.Series:
        ours = f"{entry['mean']:.1f}" if pd.isna(entry["sd"]) else f"{entry['mean']:.1f} ± {entry['sd']:.1f}"
        missing = pd.isna(entry["paper"])
        return pd.Series(
            {
                "ours": ours,
                "paper": "–" if missing else f"{entry['paper']:g}",
                "difference": "–" if missing else f"{entry['difference']:+.1f}",
            }
        )

    lines = table.apply(line, axis=1).unstack("measure").swaplevel(axis=1)
    measures = table.index.get_level_values("measure").unique()
    rows = table.index.get_level_values("row").unique()
    order = [(measure, column) for measure in measures for column in ("ours", "paper", "difference")]
    return lines.loc[rows, pd.MultiIndex.from_tuples(order)].rename_axis(None)


def check(claims: Iterable[Claim], table: pd.DataFrame) -> pd.DataFrame:
    """Whether each claim of the paper's text holds in `compare`'s table: a line each, with the two numbers compared.

    A difference smaller than the standard deviations of the two cells together is marked as within the spread.
    """
    lines = []
    for claim in claims:
        greater, than = (table.loc[(row, MEASURES[measure])] for row, measure in (claim.greater, claim.than))
        holds = bool(greater["mean"] > claim.factor * than["mean"])
        spread = (greater["sd"] ** 2 + (claim.factor * than["sd"]) ** 2) ** 0.5  # missing with one seed: then no mark
        close = abs(greater["mean"] - claim.factor * than["mean"]) < spread
        verdict = ("holds" if holds else "does not hold") + (", within the spread of seeds" if close else "")
        numbers = [f"{row} {table.loc[(row, MEASURES[m]), 'mean']:.1f}" for row, m in (claim.greater, claim.than)]
        factor = "" if claim.factor == 1 else f"{claim.factor:g} × "
        lines.append((claim.text, f"{numbers[0]} > {factor}{numbers[1]}", verdict))
    return pd.DataFrame(lines, columns=["claim", "means", "here"]).set_index("claim")


@dataclass(frozen=True)
class Results:
    """Writes a notebook's artefacts to results/<profile>/, each with its entry in manifest.json.

    notebook: its name, as in "03_table1", or the path of a script. In a profile that keeps no results (smoke) nothing
    is written. Raises DMVAEError for runs that the library as it is would not make, and for a manifest that is damaged.
    """

    setting: Setting
    notebook: str

    def table(self, name: str, table: pd.DataFrame, caption: str, runs: Iterable[Run] = ()) -> pd.DataFrame:
        """name.csv (numbers), name.md and name.tex (readable; booktabs) of `compare`'s table; returns the readable one."""
        shown = readable(table)
        seeds = int(table["seeds"].min())
        caption = f"{caption} Profile {self.setting.profile.name}, {seeds} seed{'s' * (seeds > 1)}, percent."
        flat = shown.copy()
        flat.columns = [f"{measure}, {column}" for measure, column in shown.columns]
        layout = {"label": f"tab:{name}", "column_format": "l" + "rrr" * (shown.shape[1] // 3), "escape": True}
        bare = caption.split(": ", 1)[-1]  # LaTeX numbers its tables itself
        texts = {
            "csv": table.to_csv(float_format="%.4f"),
            "md": f"{caption}\n\n{flat.to_markdown(disable_numparse=True)}\n",
            "tex": _latex(shown.to_latex(caption=bare.replace("%", r"\%").replace("&", r"\&"), **layout)),
        }
        self._keep(name, caption, runs, {suffix: _text_writer(text) for suffix, text in texts.items()})
        return shown

    def frame(self, name: str, frame: pd.DataFrame, caption: str, runs: Iterable[Run] = ()) -> pd.DataFrame:
        """name.csv and name.md of any other table; returns it."""
        caption = f"{caption} Profile {self.setting.profile.name}."
        flat = frame.reset_index() if frame.index.nlevels > 1 else frame  # tabulate writes a MultiIndex as tuples
        shown = flat.to_markdown(index=flat is frame, disable_numparse=True)
        texts = {"csv": frame.to_csv(), "md": f"{caption}\n\n{shown}\n"}
        self._keep(name, caption, runs, {suffix: _text_writer(text) for suffix, text in texts.items()})
        return frame

    def figure(self, name: str, figure: Figure, caption: str, runs: Iterable[Run] = (), dpi: int = 300) -> Figure:
        """name.png and name.pdf (vectors); returns the figure."""
        caption = f"{caption} Profile {self.setting.profile.name}."
        writers = {
            "png": lambda path: figure.savefig(path, dpi=dpi, bbox_inches="tight"),
            "pdf": lambda path: figure.savefig(path, bbox_inches="tight", metadata={"CreationDate": None}),
        }
        self._keep(name, caption, runs, writers)
        return figure

    def _keep(self, name: str, caption: str, runs: Iterable[Run], writers: Mapping) -> None:
        if not self.setting.profile.writes_results:
            return
        folder, runs = self.setting.results, list(runs)
        made_by = self.notebook if "/" in self.notebook else f"notebooks/{self.notebook}.ipynb"
        for made in runs:
            if other := changed(made.info["config"]["code"]):
                raise DMVAEError(
                    f"{name}: run {made.folder} was trained by another state of {', '.join(other)}; load it by `run`, "
                    "which trains it anew."
                )
        with locked(folder, "writing results"):
            remove_leftovers(folder)
            for suffix, write in writers.items():
                with atomic_write(folder / f"{name}.{suffix}") as temporary:
                    write(temporary)
            entry = {
                "caption": caption,
                "notebook": made_by,
                "files": {f"{name}.{suffix}": sha256(folder / f"{name}.{suffix}") for suffix in writers},
                "runs": [
                    {
                        "name": made.info["config"]["name"],
                        "seed": made.info["config"]["seed"],
                        "configuration": made.info["hash"],
                        "data": made.info["config"]["data"],
                        "commit": made.info["commit"],
                        "device": made.info["device"],
                        "seconds": made.info["seconds"],
                    }
                    for made in runs
                ],
                "code": source_digests(coherence, *EVALUATION),
                "cells": _cells(folder.parents[1] / made_by),
                "made": provenance(resolve_device(self.setting.device)),
            }
            manifest = read_manifest(folder) if (folder / "manifest.json").exists() else {}
            write_json(folder / "manifest.json", dict(sorted((manifest | {name: seal(entry)}).items())))
            known = _configurations(folder) | {made.info["hash"]: made.info["config"] for made in runs}
            write_json(folder / "configurations.json", dict(sorted(known.items())))


EVALUATION = ("dmvae_lib.metrics", "dmvae_lib.retrieval", "dmvae_lib.analysis")  # beside `coherence`
REPAIR = "Restore it by git, or delete it and run `make reproduce`."


def read_manifest(folder: Path) -> dict[str, dict]:
    """{artefact: its entry} of a profile's results. Raises DMVAEError for entries that are not as they were written."""
    path = folder / "manifest.json"
    manifest = read_json(path, REPAIR)
    for name, entry in manifest.items():
        if isinstance(entry, dict) and "code" in entry:  # those without are older than seals
            check_seal(entry, f"{path}, entry {name!r},", REPAIR)
    return manifest


def _configurations(folder: Path) -> dict[str, dict]:
    path = folder / "configurations.json"
    known = read_json(path, REPAIR) if path.exists() else {}
    for name, config in known.items():
        if configuration_hash(config) != name:
            raise DMVAEError(f"{path} is damaged: {name} is not its configuration's hash. {REPAIR}")
    return known


def _cells(notebook: Path) -> str:
    """A digest of a notebook's code without its parameters, or of a script's; "" where there is none."""
    if not notebook.exists():
        return ""
    text = notebook.read_text(encoding="utf-8")
    if notebook.suffix == ".py":
        return python_digest(text)
    cells = json.loads(text)["cells"]
    given = {"parameters", "injected-parameters"}
    code = [cell for cell in cells if cell["cell_type"] == "code" and not given & {*cell["metadata"].get("tags", [])}]
    return python_digest("\n".join(python_digest("".join(cell["source"])) for cell in code))


def stale(folder: Path) -> dict[str, list[str]]:
    """{artefact: what has changed since it was made} of a profile's results; artefacts that are up to date have [].

    Looked at are the artefact's own files, the library's version, the source of its runs and of their evaluation, its
    notebook, and whether a newer artefact used the same run under another configuration.
    """
    manifest, configurations = read_manifest(folder), _configurations(folder)
    newest: dict[tuple[str, int], tuple[str, str]] = {}
    for entry in manifest.values():
        for run in entry["runs"]:
            key = run["name"], run["seed"]
            newest[key] = max(newest.get(key, ("", "")), (entry["made"]["finished"], run["configuration"]))
    found = {}
    for name, entry in manifest.items():
        whys = [f"`{file}`" for file, digest in entry["files"].items() if not _is(folder / file, digest)]
        then, now = entry["made"]["packages"]["dmvae_lib"], version("dmvae_lib")
        whys += [f"version {then} of the library, now {now}"] * (then != now)
        sources = set(changed(entry.get("code", {})))
        for run in entry["runs"]:
            config = configurations.get(run["configuration"])
            whys += [f"configuration {run['configuration']}, which is missing"] * (config is None)
            sources |= set(changed((config or {}).get("code", {})))
            if newest[run["name"], run["seed"]][1] != run["configuration"]:
                whys.append(f"run {run['name']}, seed {run['seed']}")
        whys += [f"`{source}`" for source in sorted(sources)]
        if "code" not in entry:
            whys.append("the source, which was not recorded then")
        elif entry["cells"] != _cells(folder.parents[1] / entry["notebook"]):
            whys.append(f"`{entry['notebook']}`")
        found[name] = whys
    return found


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def _latex(text: str) -> str:
    for character, command in (("→", r"$\rightarrow$"), ("±", r"$\pm$"), ("–", "--")):
        text = text.replace(character, command)
    return text


def _text_writer(text: str):
    return lambda path: path.write_text(text)


def index(results: Path) -> str:
    """results/README.md: every table and figure of every profile, shown, with where it came from, or that it is stale."""
    lines = [
        "# Results",
        "",
        "Every table and figure of the paper, regenerated. One folder is one profile (its data and budget); a folder",
        "never mixes profiles. `manifest.json` names for each artefact the notebook, runs, seeds, data and commit;",
        "`configurations.json` holds each run's full configuration. This page is generated by `make reproduce`, which",
        "marks as stale what an earlier state of the library or of a notebook made.",
        "",
        "To cite one of them, open *cite* below it. The link is the file's Software Heritage identifier, which is made of",
        "its content: it stays, wherever this repository moves, and resolves once Software Heritage has archived it.",
    ]
    for folder in _folders(results):
        profile, outdated = folder.name, stale(folder)
        lines += ["", f"## Profile `{profile}`"]
        for name, entry in read_manifest(folder).items():
            files = ", ".join(f"[{file}]({profile}/{file})" for file in entry["files"])
            lines += ["", f"### {name}", "", entry["caption"], ""]
            if outdated[name]:
                lines += [_mark(outdated[name]), ""]
            if f"{name}.png" in entry["files"]:
                lines += [f"![{name}]({profile}/{name}.png)", ""]
            if f"{name}.md" in entry["files"]:
                lines += [(folder / f"{name}.md").read_text().split("\n\n", 1)[1]]
            runs = ", ".join(f"{run['name']} seed {run['seed']} (`{run['configuration']}`)" for run in entry["runs"])
            lines += [
                f"Files: {files}. Made by [{Path(entry['notebook']).stem}](../{entry['notebook']})"
                + (f" from {runs}" if runs else "")
                + f", commit `{entry['made']['commit']}`, {entry['made']['device']}."
            ]
            lines += ["", *_citation(name, entry, folder)]
    text = "\n".join(lines) + "\n"
    with atomic_write(results / "README.md") as temporary:
        temporary.write_text(text)
    return text


def _folders(results: Path) -> list[Path]:
    """The profiles' folders; a rehearsal's, `name@share`, is nothing to cite."""
    return [path.parent for path in sorted(results.glob("*/manifest.json")) if "@" not in path.parent.name]


def _mark(whys: list[str]) -> str:
    return f"**Stale**: changed since: {', '.join(whys)}. `make reproduce` makes it anew."


def _citation(name: str, entry: Mapping, folder: Path) -> list[str]:
    """Each file's SHA-256 and permanent link, and BibTeX for the artefact, folded away."""
    links = {file: f"https://archive.softwareheritage.org/{swhid(folder / file)}" for file in entry["files"]}
    rows = [f"| [{file}]({links[file]}) | `{digest}` |" for file, digest in entry["files"].items()]
    main = next(iter(entry["files"]))
    fields = {
        "author": "{The dmvae_lib authors}",
        "title": entry["caption"].rstrip("."),
        "year": entry["made"]["finished"][:4],
        "howpublished": f"dmvae_lib {entry['made']['packages']['dmvae_lib']}, results/{folder.name}/{main}",
        "note": f"SHA-256 {entry['files'][main]}",
        "url": links[main],
    }
    plain = {
        key: value if key == "url" else re.sub(r"([&%#_])", r"\\\1", _latex(value)) for key, value in fields.items()
    }
    bibtex = [f"@misc{{dmvae_lib-{folder.name}-{name},", *(f"  {k} = {{{v}}}," for k, v in plain.items()), "}"]
    head = ["<details><summary>cite</summary>", "", "| file, permanent link | SHA-256 |", "|---|---|", *rows, ""]
    return [*head, "```bibtex", *bibtex, "```", "", "</details>"]


def swhid(path: Path) -> str:
    """The Software Heritage identifier of a file's content, which is its git blob's (ISO/IEC 18670)."""
    content = path.read_bytes()
    return "swh:1:cnt:" + hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def readme_tables(readme: Path, results: Path, tables: Sequence[str] = ("table1", "table2", "table3")) -> None:
    """Puts each table, every profile's numbers beside the published ones, between the README's result marks.

    So they cannot drift from results/. Numbers that are not in the manifest, or are stale, are not shown without saying so.
    """
    text = readme.read_text()
    start, end = "<!-- results: written by `make reproduce`, do not edit -->", "<!-- end of results -->"
    if start not in text or end not in text:
        raise DMVAEError(f"{readme} lacks the marks {start!r} and {end!r}; put them back where the tables belong.")
    folders = _folders(results)[::-1]
    manifests, outdated = {f: read_manifest(f) for f in folders}, {f: stale(f) for f in folders}
    found = []
    for name in tables:
        title, notes, shown = "", [], {}
        for folder in [folder for folder in folders if name in manifests[folder]]:
            title, _, note = manifests[folder][name]["caption"].partition(". ")
            if whys := outdated[folder][name]:
                note += f" {_mark(whys)}"
            notes.append(f"- `{folder.name}`: {note}")
            path = folder / f"{name}.csv"
            if _is(path, manifests[folder][name]["files"][path.name]):
                shown[folder.name] = readable(pd.read_csv(path, index_col=["row", "measure"]))
        if shown:
            published: dict[str, dict[str, pd.Series]] = {}
            for profile, table in shown.items():
                for measure in table.columns.unique(0):
                    published.setdefault(measure, {})["published"] = table[measure, "paper"]
                    published[measure][f"`{profile}`"] = table[measure, "ours"]
            columns = {(measure, name): values for measure, of in published.items() for name, values in of.items()}
            flat = pd.DataFrame(columns).reindex(next(iter(shown.values())).index)
            flat.columns = [name if name != "published" else f"{measure}: {name}" for measure, name in flat.columns]
            notes = [*notes, "", flat.fillna("–").to_markdown(disable_numparse=True)]
        found += [f"**{title}.**" if title else "", "", *notes, ""]
    body = "\n".join(found)
    with atomic_write(readme) as temporary:
        temporary.write_text(f"{text[: text.index(start)]}{start}\n\n{body}\n{text[text.index(end) :]}")
