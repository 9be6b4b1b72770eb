"""The paper's figures and the notebooks' plots. Each function returns a matplotlib figure and draws nothing else."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
plt.rcParams |= {"figure.dpi": 100, "savefig.dpi": 150, "pdf.fonttype": 42, "axes.titlesize": "medium"}


def tile(images: Tensor, gap: int = 2) -> np.ndarray:
    """(R, C, channels, H, W) in [0, 1] or uint8 -> one picture of R x C images, (height, width, 3), white gaps."""
    images = images.detach().cpu().float() / (1 if images.is_floating_point() else 255)
    rows, columns, _, height, width = images.shape
    padded = F.pad(images.expand(-1, -1, 3, -1, -1), (0, gap, 0, gap), value=1.0).permute(0, 3, 1, 4, 2)
    picture = padded.reshape(rows * (height + gap), columns * (width + gap), 3)
    return picture[: len(picture) - gap, : picture.shape[1] - gap].numpy()


def gallery(rows: Mapping[str, Tensor], title: str = "", width: float = 7.0) -> Figure:
    """One labelled row of images for each entry, {label: (C, channels, H, W)}."""
    height = width / max(len(images) for images in rows.values()) * len(rows) + 0.3
    figure, axes = plt.subplots(len(rows), 1, figsize=(width, height), squeeze=False)
    for ax, (label, images) in zip(axes[:, 0], rows.items()):
        ax.imshow(tile(images[None]), interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        sns.despine(ax=ax, left=True, bottom=True)
        ax.set_ylabel(textwrap.fill(label, 18), rotation=0, ha="right", va="center", fontsize="small")
    axes[0, 0].set_title(title)
    figure.subplots_adjust(hspace=0.06)
    return figure


def curves(history: pd.DataFrame, groups: Mapping[str, Sequence[str]]) -> Figure:
    """Training curves, one panel for each group of the history's columns, {title: columns}; x is the number of updates.

    In the legend "log_likelihood(svhn<-mnist)" and "kl(svhn<-mnist/private)" are both svhn<-mnist.
    """
    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.2), squeeze=False)
    for ax, (title, columns) in zip(axes[0], groups.items()):
        for column, dashes in zip(columns, cycle(["-", "--", ":", "-.", (0, (5, 1, 1, 1)), (0, (1, 3))])):
            bound = re.sub(r"^\w+\((.+?)(/\w+)?\)$", r"\1", column)
            ax.plot(history.index, history[column], linestyle=dashes, label=bound)
        weighted = any(column.startswith("log_likelihood") for column in columns)
        ax.set(title=title, xlabel="updates", ylabel="nats per pair" + ", times λ" * weighted)
        ax.legend(fontsize="x-small")
    figure.tight_layout()
    return figure


MARKERS = ("+", "o", "^", "x", "s", "D", "v")  # of the modalities in their order; the paper's Fig. 5 has the first two


def embedding(
    points: Mapping[str, np.ndarray], labels: np.ndarray, titles: Mapping[str, str], title: str = ""
) -> Figure:
    """Fig. 5: 2-D points of each modality, {name: (N, 2)}, labels (N,): a marker a modality, a colour and a numeral a class.

    A class's numeral stands where its points of a modality lie densest, in a square for "+" and "x", in a circle for the
    others. titles: {name: in the legend}.
    """
    figure, ax = plt.subplots(figsize=(5.2, 5.2))
    colours = sns.color_palette("colorblind", int(max(labels)) + 1)
    for (name, xy), marker in zip(points.items(), MARKERS, strict=False):
        for label in np.unique(labels):
            colour = colours[label]
            style = {"color": colour} if marker in "+x" else {"facecolors": "none", "edgecolors": [colour]}
            ax.scatter(*xy[labels == label].T, s=28, marker=marker, linewidths=1.0, **style)
        # For the legend alone, in no class's colour.
        ax.plot([], [], color="0.3", marker=marker, linestyle="", markerfacecolor="none", label=titles[name])
        for label in np.unique(labels):  # readable without colour
            own = xy[labels == label]
            distances = np.sort(np.linalg.norm(own[:, None] - own, axis=-1), 1)
            box = {
                "boxstyle": "square" if marker in "+x" else "circle",
                "pad": 0.15,
                "fc": "white",
                "ec": colours[label],
            }
            densest = own[distances[:, :10].mean(1).argmin()]
            ax.text(*densest, str(label), fontsize=10, weight="bold", ha="center", va="center", bbox=box, zorder=3)
    ax.legend(fontsize="small", ncols=2, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0))
    ax.set(xticks=[], yticks=[], title=title)
    return figure


RIGHT, WRONG, SWAPPED = "black", "#c1121f", "#0353a4"


def retrieved_captions(lines: Sequence[tuple[np.ndarray, Sequence[tuple[str, bool]]]]) -> Figure:
    """Fig. 6: a line per query image (H, W, 3) with its nearest captions and whether each has the image's class."""
    figure, axes = _ranked(lines, 2.3, 1.9)
    for row, (image, captions) in zip(axes, lines):
        row[0].imshow(image)
        for ax, (caption, right) in zip(row[1:], captions):
            text = textwrap.fill(caption, 26) + ("" if right else "\n(wrong class)")
            ax.text(0.5, 0.5, text, ha="center", va="center", fontsize=8, color=RIGHT if right else WRONG)
    return figure


def retrieved_images(lines: Sequence[tuple[str, Sequence[tuple[np.ndarray, bool | None]]]]) -> Figure:
    """Figs. 7 and 8: a line per query caption with its nearest images, framed red and dashed where wrong (False).

    Words in [brackets] are drawn blue, without the brackets (Fig. 8's swaps).
    """
    figure, axes = _ranked(lines, 1.7, 1.8, query=2.0)
    for row, (caption, images) in zip(axes, lines):
        _coloured_text(row[0], caption)
        for ax, (image, right) in zip(row[1:], images):
            ax.imshow(image)
            if right is False:
                frame = {"fill": False, "ec": WRONG, "lw": 4, "ls": "--", "clip_on": False}
                ax.add_patch(plt.Rectangle((0, 0), 1, 1, transform=ax.transAxes, **frame))
    return figure


def _ranked(lines: Sequence[tuple], width: float, height: float, query: float = 1.0) -> tuple[Figure, np.ndarray]:
    """Empty axes, a row per line, headed by rank; width, height in inches, the first column `query` times as wide."""
    n = len(lines[0][1])
    size, ratios = (width * (n + query), height * len(lines)), [query] + [1.0] * n
    figure, axes = plt.subplots(len(lines), n + 1, figsize=size, squeeze=False, width_ratios=ratios)
    for ax in axes.flat:
        ax.axis("off")
        ax.set_anchor("N")
    for rank, ax in enumerate(axes[0]):
        ax.set_title(f"Rank {rank}" if rank else "Query", fontsize=9)
    return figure, axes


def _coloured_text(ax, caption: str) -> None:
    """Wrapped text, left aligned, with the words in [brackets] blue; monospaced, so that words can be placed one by one."""
    lines: list[list[tuple[str, bool]]] = [[]]  # words, and whether each is swapped
    swapped = False
    for word in caption.split():
        swapped = swapped or word.startswith("[")
        bare = word.strip("[]")
        if sum(len(w) + 1 for w, _ in lines[-1]) + len(bare) > 30:
            lines.append([])
        lines[-1].append((bare, swapped))
        swapped = swapped and not word.endswith("]")
    for i, line in enumerate(lines):
        y = 0.5 + 0.11 * (len(lines) / 2 - i)
        for colour, chosen in ((RIGHT, False), (SWAPPED, True)):
            text = " ".join(w if blue is chosen else " " * len(w) for w, blue in line)
            ax.text(0, y, text, family="monospace", fontsize=8, color=colour, transform=ax.transAxes, va="top")


def bars_beside_paper(table: pd.DataFrame, measures: Sequence[str], blind: Mapping[str, float]) -> Figure:
    """`tables.compare`'s rows as bars, a panel per measure, the paper's numbers as open circles, and a line for each of
    `blind`, {what scores without looking: percent}."""
    figure, axes = plt.subplots(1, len(measures), figsize=(4 * len(measures), 3), sharey=True)
    for ax, measure in zip(axes, measures):
        part = table.xs(measure, level="measure")
        y = np.arange(len(part))
        ax.barh(y, part["mean"], xerr=part["sd"].fillna(0), color="C0", alpha=0.75, label="here, ± sd over seeds")
        ax.scatter(part["paper"], y, facecolors="none", edgecolors="black", zorder=3, label="paper")
        for (title, percent), dashes in zip(blind.items(), cycle(["--", ":", "-."])):
            ax.axvline(percent, color="0.3", linestyle=dashes, linewidth=1.2, label=title)
        ax.set(title=measure, xlim=(0, 100), xlabel="percent", yticks=y, yticklabels=part.index)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize="x-small", ncols=4, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def intervals(panels: Mapping[str, Mapping[str, tuple[float, tuple[float, float]]]]) -> Figure:
    """{title: {row: (share, (low, high))}}: a panel each, a dot in its interval for every row, in percent."""
    figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.4), sharey=True)
    for ax, (title, rows) in zip(axes, panels.items()):
        for y, (share, interval) in enumerate(rows.values()):
            ax.plot([100 * end for end in interval], [y, y], color="C0", linewidth=2)
            ax.plot(100 * share, y, "o", color="C0")
        ax.set(title=title, xlabel="percent", yticks=range(len(rows)), yticklabels=list(rows))
    axes[0].invert_yaxis()
    figure.tight_layout()
    return figure


def learning_curve(curve: pd.DataFrame) -> Figure:
    """A line for each column, in percent, against the index, numbers of training images, on a logarithmic axis."""
    figure, ax = plt.subplots(figsize=(4.5, 3))
    curve.plot(ax=ax, marker="o", logx=True, ylim=(0, 100), ylabel="percent")
    ax.set_xticks(curve.index, [f"{n:,}" for n in curve.index], minor=False)
    ax.xaxis.minorticks_off()
    ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize="small", frameon=False)
    figure.tight_layout()
    return figure


def by_share(mean: pd.DataFrame, sd: pd.DataFrame) -> Figure:
    """Scores in percent, columns (measure, series), by the share of complete observations: a panel a measure, a series a marker.
    sd: the bars; missing where there is one seed."""
    measures = mean.columns.unique(0)
    figure, axes = plt.subplots(1, len(measures), figsize=(3.3 * len(measures), 3.4), sharey=True)
    for ax, measure in zip(axes, measures):
        for (series, values), (marker, line) in zip(mean[measure].items(), ("o-", ("s", "--"), "^:")):
            style = marker + line * (len(values) > 2)  # a line through two points would say too much
            ax.errorbar(values.index, values, sd[measure, series].fillna(0), fmt=style, capsize=3, label=series)
        ax.set(title=measure, xscale="log", ylim=(0, 100), xlabel="complete observations")
        ax.set_xticks(mean.index, [f"{share:.0%}" for share in mean.index])
        ax.xaxis.minorticks_off()
    axes[0].set_ylabel("percent")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize="small", ncols=3, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def by_given(table: pd.DataFrame) -> Figure:
    """`tables.compare`'s measures "k given", in percent: a line a row, a band of its standard deviation; published ones dashed."""
    figure, ax = plt.subplots(figsize=(6, 3.6))
    measures = [name for name in table.index.unique("measure") if name.endswith(" given")]
    numbers = [int(name.split()[0]) for name in measures]
    for i, (row, marker) in enumerate(zip(table.index.unique("row"), "osD^vXPph*" * 3)):
        part, colour = table.loc[row].reindex(measures), sns.color_palette("colorblind")[i % 10]
        if part["mean"].notna().any():
            ax.plot(numbers, part["mean"], color=colour, marker=marker, label=row)
        ax.fill_between(numbers, part["mean"] - part["sd"], part["mean"] + part["sd"], color=colour, alpha=0.15)
        if part["paper"].notna().any():
            ax.plot(
                numbers,
                part["paper"],
                color=colour,
                marker=marker,
                fillstyle="none",
                linestyle="--",
                label=f"{row}, published",
            )
    ax.set(xlabel="modalities given", ylabel="coherence, percent", xticks=numbers, ylim=(0, 100))
    ax.legend(fontsize="x-small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure


def by_pairs(scores: pd.DataFrame) -> Figure:
    """`tables.curves`' scores, a panel a measure, a line a row: the mean over seeds, a band from the least to the greatest."""
    figure, axes = plt.subplots(1, scores.shape[1], figsize=(4.2 * scores.shape[1], 3.6), sharey=True, squeeze=False)
    dashes, grouped = ["-", "--", ":", "-."], scores.groupby(level=["row", "pairs"], sort=False)
    mean, low, high = grouped.mean(), grouped.min(), grouped.max()
    for ax, measure in zip(axes[0], scores):
        for i, row in enumerate(mean.index.unique("row")):
            x, style = mean.loc[row].index / 1_000, {"color": f"C{i % 10}", "linestyle": dashes[i // 10 % 4]}
            ax.plot(x, mean.loc[row, measure], label=row, **style)
            ax.fill_between(x, low.loc[row, measure], high.loc[row, measure], color=style["color"], alpha=0.15)
        ax.set(title=measure, xlabel="thousand pairs seen", ylim=(0, 100))
    axes[0, 0].set_ylabel("percent, validation split")
    axes[0, -1].legend(fontsize="x-small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    return figure
