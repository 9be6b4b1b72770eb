"""Tables beside the paper's numbers, figures, and the manifest that says where each came from."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from dmvae_lib.errors import DMVAEError
from dmvae_lib.experiments import Run, Setting, provenance
from dmvae_lib.files import atomic_write, sha256
from dmvae_lib.paper import Claim
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
    Columns, in percent: mean, sd (over seeds; missing with one), seeds, paper, difference (mean - paper).
    """
    records = []
    for row, seeds in values.items():
        for measure in seeds[0]:
            percents = [100 * seed[measure] for seed in seeds]
            mean = statistics.fmean(percents)
            sd = statistics.stdev(percents) if len(percents) > 1 else float("nan")
            published = paper.get(row, {}).get(measure, float("nan"))
            records.append((row, MEASURES.get(measure, measure), mean, sd, len(seeds), published, mean - published))
    columns = ["row", "measure", "mean", "sd", "seeds", "paper", "difference"]
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

    In a profile that keeps no results (smoke) nothing is written.
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

    def figure(self, name: str, figure: Figure, caption: str, runs: Iterable[Run] = ()) -> Figure:
        """name.png (300 dpi) and name.pdf (vectors); returns the figure."""
        caption = f"{caption} Profile {self.setting.profile.name}."
        writers = {
            "png": lambda path: figure.savefig(path, dpi=300, bbox_inches="tight"),
            "pdf": lambda path: figure.savefig(path, bbox_inches="tight", metadata={"CreationDate": None}),
        }
        self._keep(name, caption, runs, writers)
        return figure

    def _keep(self, name: str, caption: str, runs: Iterable[Run], writers: Mapping) -> None:
        if not self.setting.profile.writes_results:
            return
        folder, runs = self.setting.results, list(runs)
        for suffix, write in writers.items():
            with atomic_write(folder / f"{name}.{suffix}") as temporary:
                write(temporary)
        entry = {
            "caption": caption,
            "notebook": f"notebooks/{self.notebook}.ipynb",
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
            "made": provenance(resolve_device(self.setting.device)),
        }
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text()) if path.exists() else {}
        manifest[name] = entry
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(dict(sorted(manifest.items())), indent=1) + "\n")
        configurations = folder / "configurations.json"
        known = json.loads(configurations.read_text()) if configurations.exists() else {}
        known |= {made.info["hash"]: made.info["config"] for made in runs}
        with atomic_write(configurations) as temporary:
            temporary.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def _latex(text: str) -> str:
    for character, command in (("→", r"$\rightarrow$"), ("±", r"$\pm$"), ("–", "--")):
        text = text.replace(character, command)
    return text


def _text_writer(text: str):
    return lambda path: path.write_text(text)


def index(results: Path) -> str:
    """results/README.md: every table and figure of every profile, shown, with where it came from."""
    lines = [
        "# Results",
        "",
        "Every table and figure of the paper, regenerated. One folder is one profile (its data and budget); a folder",
        "never mixes profiles. `manifest.json` names for each artefact the notebook, runs, seeds, data and commit;",
        "`configurations.json` holds each run's full configuration. This page is generated by `make reproduce`.",
        "",
        "To cite one of them, open *cite* below it. The link is the file's Software Heritage identifier, which is made of",
        "its content: it stays, wherever this repository moves, and resolves once Software Heritage has archived it.",
    ]
    for manifest in sorted(results.glob("*/manifest.json")):
        profile = manifest.parent.name
        lines += ["", f"## Profile `{profile}`"]
        for name, entry in json.loads(manifest.read_text()).items():
            files = ", ".join(f"[{file}]({profile}/{file})" for file in entry["files"])
            lines += ["", f"### {name}", "", entry["caption"], ""]
            if f"{name}.png" in entry["files"]:
                lines += [f"![{name}]({profile}/{name}.png)", ""]
            if f"{name}.md" in entry["files"]:
                lines += [(manifest.parent / f"{name}.md").read_text().split("\n\n", 1)[1]]
            runs = ", ".join(f"{run['name']} seed {run['seed']} (`{run['configuration']}`)" for run in entry["runs"])
            lines += [
                f"Files: {files}. Made by [{Path(entry['notebook']).stem}](../{entry['notebook']})"
                + (f" from {runs}" if runs else "")
                + f", commit `{entry['made']['commit']}`, {entry['made']['device']}."
            ]
            lines += ["", *_citation(name, entry, manifest.parent)]
    text = "\n".join(lines) + "\n"
    with atomic_write(results / "README.md") as temporary:
        temporary.write_text(text)
    return text


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
    """Puts the tables of every profile between the README's result marks, so that they cannot drift from results/."""
    text = readme.read_text()
    start, end = "<!-- results: written by `make reproduce`, do not edit -->", "<!-- end of results -->"
    if start not in text or end not in text:
        raise DMVAEError(f"{readme} lacks the marks {start!r} and {end!r}; put them back where the tables belong.")
    found = [
        path
        for manifest in sorted(results.glob("*/manifest.json"))
        for path in map(manifest.with_name, map("{}.md".format, tables))
        if path.exists()
    ]
    body = "\n".join(path.read_text() for path in found)
    with atomic_write(readme) as temporary:
        temporary.write_text(f"{text[: text.index(start)]}{start}\n\n{body}\n{text[text.index(end) :]}")
