"""The pages on results/: the README's block, an overview of every artefact, and for each profile where each came from."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from dmvae_lib.errors import DMVAEError
from dmvae_lib.files import atomic_write, check_seal, read_json, sha256
from dmvae_lib.paper.profiles import PROFILES

REPAIR = "Take the committed one back by `git checkout`, or delete it and run `make reproduce`."
BEGIN, END = "<!-- results: written by `make reproduce`, do not edit -->", "<!-- end of results -->"
SHORT = {"table1": None, "table3": None, "table2": 2}  # the README's tables: competitors beside DMVAE (None: every row)
PICTURE = "fig4b"  # the README's, from the profile nearest to the paper's data
CLAIMS = {"table1": ("table1_claims", "figures_claims"), "table2": ("table2_claims",), "table3": ("table3_claims",)}
DATA = {  # by a profile's source: what it is, and what the paper's claims are judged on
    "embedded": ("stand-ins for the paper's data: compare rows with each other, not with the paper", "drawn stand-ins"),
    "subset": ("a part of the paper's images, a small budget", "real images"),
    "full": ("the paper's data and schedule", "the paper's data"),
}
INTRODUCTION = """# Results

Every table and figure of the paper, regenerated. A folder is a profile (its data and budget) and never mixes two. Tables and
claims are made from the profile's ledger, `runs/`: a file for each run, with its configuration, data, versions, machine, seconds
and every score. Each name below leads to the artefact in full with all of its provenance: the whole SHA-256 of each file,
notebook, commit, runs, and the BibTeX entry of that key. `manifest.json` says the same to programs. In tables: percent, mean ±
standard deviation over seeds, *(the paper's number)*.
"""


def write_pages(results: Path) -> None:
    """results/README.md, each profile's, and the block in the README beside results/, of what is there."""
    pages = {results / "README.md": index(results)}
    pages |= {results / profile / "README.md": provenance(results / profile) for profile in _manifests(results)}
    if (readme := results.parent / "README.md").exists():
        before, begin, rest = readme.read_text("utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise DMVAEError(f"{readme} lacks the marks {BEGIN!r} and {END!r}; put them back where the results belong.")
        pages[readme] = f"{before}{begin}\n\n{readme_results(results)}\n{end}{after}"
    for path, text in pages.items():
        with atomic_write(path) as temporary:
            temporary.write_text(text, "utf-8")


def manifest(folder: Path) -> dict[str, dict]:
    """{artefact: its entry} of a profile's folder. Raises DMVAEError for an entry that is damaged or another's."""
    path = folder / "manifest.json"
    entries = read_json(path, REPAIR)
    for name, entry in entries.items():
        check_seal(entry, f"{path}, entry {name!r},", REPAIR)
        if entry["artefact"] != name:
            raise DMVAEError(f"{path}: the entry of {entry['artefact']!r} stands as {name!r}. {REPAIR}")
    return entries


def _manifests(results: Path) -> dict[str, dict]:
    """{profile: its manifest}; a rehearsal's, `name@share`, is nothing to cite."""
    folders = [path.parent for path in sorted(results.glob("*/manifest.json")) if "@" not in path.parent.name]
    return {folder.name: manifest(folder) for folder in folders}


def _is(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


# --- the README's block -----------------------------------------------------------------------------------------------


def readme_results(results: Path, tables: Mapping[str, int | None] = SHORT) -> str:
    """The paper's rows beside its numbers, and the verdicts on its claims: `PICTURE` and each table from the profile
    nearest to the paper's data that has it.

    From the tables' csv files and those of their `CLAIMS`; one that is not the one in the manifest is not shown.
    """
    manifests = _manifests(results)
    nearest = [profile for profile in reversed(PROFILES) if profile in manifests]  # from the paper's data to stand-ins
    lines, profiles = [], {}
    counts: dict[str, Counter[str]] = {}
    for name, best in tables.items():
        for profile in nearest:
            folder, entries = results / profile, manifests[profile]
            if (frame := _csv(folder, entries, name)) is None:
                continue
            about, judged_on = DATA[PROFILES[profile].source]
            profiles[profile] = f"`{profile}` ({about})"
            lines += [_titled(name, profile, entries[name]["caption"], best), "", _small(_short(frame, best)), ""]
            claims = [_csv(folder, entries, claimed) for claimed in CLAIMS[name]]
            verdicts = _verdicts([of for of in claims if of is not None])
            if verdicts:
                lines += [f"- **{len(texts)} {verdict}**: {'; '.join(texts)}." for verdict, texts in verdicts.items()]
                lines.append("")
                found = {verdict: len(texts) for verdict, texts in verdicts.items()}
                counts.setdefault(judged_on, Counter()).update(found)
            break
    if not lines:
        return "No profile has results; `make reproduce` makes them.\n"
    said = [
        f"on {data} {', '.join(f'{n} {verdict}' for verdict, n in of_data.items())}" for data, of_data in counts.items()
    ]
    about = f"**The paper's claims**: {'; '.join(said)}. " if said else ""
    about += "A claim is decided by the 95 % interval of its difference over seeds ([notebook 03](notebooks/03_table1.ipynb)). "
    about += "Tables: percent, mean ± standard deviation over seeds, without ± of one seed; *(the paper's number)*. "
    about += f"Profile {'; '.join(profiles.values())}."
    return "\n".join([*_picture(nearest, manifests), about, "", *lines])


def _picture(nearest: Sequence[str], manifests: Mapping[str, Mapping[str, dict]]) -> list[str]:
    """`PICTURE` over its caption, from the first of these profiles that has it."""
    for profile in nearest:
        if PICTURE in manifests[profile]:
            caption = manifests[profile][PICTURE]["caption"]
            return [f"![{caption.partition(';')[0]}](results/{profile}/{PICTURE}.png)", "", f"*{caption}*", ""]
    return []


def _titled(name: str, profile: str, caption: str, best: int | None) -> str:
    """A table's caption, whose title leads to it."""
    title, _, rest = caption.partition(". ")
    of = f" Of the paper's competitors the {best} best by each measure, here or in the paper." if best else ""
    return f"**[{title}](results/{profile}/README.md#{name}).** {rest}{of}"


def counted(seeds: pd.Series) -> str:
    """How many seeds the lines of a table have: "3 seeds", "1 to 3 seeds"."""
    low, high = int(seeds.min()), int(seeds.max())
    return f"{low} to {high} seeds" if low < high else f"{low} seed{'s' * (low != 1)}"


def _csv(folder: Path, entries: Mapping[str, dict], name: str) -> pd.DataFrame | None:
    if name not in entries or not _is(folder / f"{name}.csv", entries[name]["files"].get(f"{name}.csv", "")):
        return None
    return pd.read_csv(folder / f"{name}.csv")


def _short(frame: pd.DataFrame, best: int | None) -> pd.DataFrame:
    """All rows, or without the paper's competitors but the `best` by each measure, here or in the paper."""
    if best is None:
        return frame
    competitors = frame[frame["paper"].notna() & (frame["row"] != "DMVAE")]
    ranked = competitors.groupby("measure")
    kept = {row for by in ("mean", "paper") for _, of in ranked for row in of.nlargest(best, by)["row"]}
    return frame[~frame["row"].isin(set(competitors["row"]) - kept)]


def _small(frame: pd.DataFrame) -> str:
    """A table's csv as Markdown: mean ± standard deviation *(the paper's number)*, a column for each measure."""
    mean = frame["mean"].map("{:.1f}".format).where(frame["mean"].notna(), "–")
    spread = frame["sd"].map(" ± {:.1f}".format).where(frame["sd"].notna(), "")
    paper = frame["paper"].map(" *({:g})*".format).where(frame["paper"].notna(), "")
    frame = frame.assign(text=mean + spread + paper)
    rows, measures = frame["row"].unique(), frame["measure"].unique()
    wide = frame.pivot(index="row", columns="measure", values="text").reindex(rows)[measures].fillna("–")
    return wide.rename_axis(index=None, columns=None).to_markdown(disable_numparse=True)


def _verdicts(claims: Sequence[pd.DataFrame]) -> dict[str, list[str]]:
    """{verdict: the claims by name}, the confirmed ones first, those that go beyond the paper's apart and last."""
    every = pd.concat([of for of in claims if "verdict" in of] or [pd.DataFrame(columns=["claim", "in", "verdict"])])
    beyond = every["in"].str.startswith("beyond").map({True: " (beyond the paper)", False: ""})
    named = every["claim"].groupby(every["verdict"] + beyond, sort=False).agg(list)
    return dict(sorted(named.items(), key=lambda item: ("beyond" in item[0], not item[0].startswith("confirmed"))))


# --- results/README.md ------------------------------------------------------------------------------------------------


def index(results: Path) -> str:
    """results/README.md: a line for each artefact of every profile, and the tables beside the paper's numbers."""
    lines = [INTRODUCTION]
    for profile, entries in reversed(_manifests(results).items()):
        lines += [f"## Profile `{profile}`", ""]
        for name, entry in sorted(entries.items(), key=lambda item: item[0] not in SHORT):
            frame = _csv(results / profile, entries, name) if f"{name}.tex" in entry["files"] else None
            if frame is not None:  # beside the paper's numbers
                lines += [f"**[{name}]({profile}/README.md#{name})** {entry['caption']}", "", _small(frame), ""]
        lines += ["| | what it shows, SHA-256, BibTeX key, runs (seeds) |", "|---|---|"]
        lines += [_line(results, profile, name, entry) for name, entry in entries.items()]
        lines.append("")
    return "\n".join(lines)


def _line(results: Path, profile: str, name: str, entry: Mapping) -> str:
    file, digest = next(iter(entry["files"].items()))
    picture = f'<img src="{profile}/{file}" width="120" alt="{name}">' if file.endswith(".png") else f"`{file}`"
    short = re.split(r"(?<!Sec)(?<!Eq)\. ", entry["caption"])[0].replace("|", r"\|")
    changed = [f for f, expected in entry["files"].items() if not _is(results / profile / f, expected)]
    parts = [f"**[{name}]({profile}/README.md#{name})** {short}", f"`{digest[:12]}`", f"`{_key(profile, name)}`"]
    parts += [f"**changed since: {', '.join(changed)}**"] if changed else []
    return f"| {picture} | {' · '.join([*parts, *_runs(entry, f'{profile}/runs')])} |"


def _key(profile: str, name: str) -> str:
    return f"dmvae_lib-{profile}-{name}"


def _runs(entry: Mapping, folder: str) -> list[str]:
    """An artefact's runs: for each row its name, and every seed as a link to its entry in the ledger; none: empty."""
    of: dict[str, str] = {}
    for run in entry["runs"]:
        row, _, seed = run.removesuffix(".json").rpartition("-")
        of[row] = of.get(row, row) + f" [{seed}]({folder}/{run})"
    return ["; ".join(of.values())] if of else []


# --- results/<profile>/README.md --------------------------------------------------------------------------------------


def provenance(folder: Path) -> str:
    """results/<profile>/README.md: each artefact in full, its files' SHA-256, what made it from which runs, its BibTeX.

    The address in the BibTeX is the file's name in Software Heritage, which finds it by its content for good.
    """
    profile = folder.name
    lines = [f"# Profile `{profile}`: every table and figure", "", "[All profiles](../README.md)", ""]
    for name, entry in manifest(folder).items():
        lines += [f"## {name}", "", entry["caption"].replace("|", r"\|"), ""]
        files, by, made = entry["files"], entry["notebook"], entry["made"]
        if f"{name}.png" in files:
            lines += [f"![{name}]({name}.png)", ""]
        elif _is(text := folder / f"{name}.md", files[f"{name}.md"]):
            lines += [text.read_text("utf-8").partition("\n\n")[2].rstrip(), ""]
        executed = f"notebooks/{Path(by).name}"
        own = profile != "quick" and (folder / executed).is_file()  # quick's are those in notebooks/
        source = f"[{by}]({executed if own else f'../../{by}'})"
        lines += [f"Made by {source}, dmvae_lib {made['dmvae_lib']} at commit `{made['commit']}`, {made['finished']}."]
        lines += [f"From the runs {runs}." for runs in _runs(entry, "runs")]
        lines += ["", "| file | SHA-256 |", "|---|---|"]
        for file, digest in files.items():
            changed = "" if _is(folder / file, digest) else " **changed since**"
            link = f"`{file}`" if file.endswith(".md") else f"[{file}]({file})"  # the table above is what it says
            lines.append(f"| {link} | `{digest}`{changed} |")
        lines += ["", *_bibtex(folder, name, entry), ""]
    return "\n".join(lines)


def _bibtex(folder: Path, name: str, entry: Mapping) -> Sequence[str]:
    file, digest = next(iter(entry["files"].items()))
    content = (folder / file).read_bytes() if (folder / file).is_file() else b""
    git = hashlib.sha1(b"blob %d\0%b" % (len(content), content), usedforsecurity=False).hexdigest()
    title, path = (re.sub(r"([_%&#])", r"\\\1", text) for text in (entry["caption"], f"results/{folder.name}/{file}"))
    return [
        "```bibtex",
        f"@misc{{{_key(folder.name, name)},",
        "  author = {{The dmvae\\_lib authors}},",
        f"  title = {{{title}}},",
        f"  howpublished = {{dmvae\\_lib, {path}}},",
        f"  year = {{{entry['made']['finished'][:4]}}},",
        f"  note = {{SHA-256 {digest}}},",
        f"  url = {{https://archive.softwareheritage.org/swh:1:cnt:{git}}},",
        "}",
        "```",
    ]
