"""Table 2's rows on the flowers, and what each part of its DMVAE row contributes: each a frozen `Row`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from dmvae_lib.models import Terms
from dmvae_lib.models.base import Batch, Observed
from dmvae_lib.paper.data.flowers import FLOWERS as DATA
from dmvae_lib.paper.profiles import Profile
from dmvae_lib.paper.retrieval import evaluate_retrieval
from dmvae_lib.paper.rows import cmpm_cmpc, gmm_hglmm, iatv, timam, triplet, word2vec, word_cnn, word_cnn_rnn
from dmvae_lib.paper.rows import flower_dmvae as dmvae
from dmvae_lib.paper.rows.row import Row
from dmvae_lib.training import Schedule

if TYPE_CHECKING:
    from dmvae_lib.paper.runs import Run


def schedule(profile: Profile) -> Schedule:
    """Every row's budget: batches of 64 pairs (Sec. 5.2)."""
    return Schedule(profile.retrieval_steps, 64, profile.retrieval_learning_rate, precision=profile.precision)


def fitted(profile: Profile) -> Schedule:
    """One fit in place of updates, the same in every profile."""
    return Schedule(1)


def objective(model: nn.Module, batch: Batch, labels: Tensor | None, observed: Observed | None, beta: float) -> Terms:
    """For `dmvae_lib.train`: the row's own loss, which sees the classes; no item of the flowers is missing."""
    return model.loss(batch, labels, beta=beta)


def retrieval_of(run: Run) -> dict[str, Any]:
    """`evaluate_retrieval` on the setting's evaluation classes."""
    return evaluate_retrieval(run.model, run.setting.splits(run.row.data).test)


def _row(name: str, title: str, build: Callable[..., nn.Module], *more_from_profile: str) -> Row:
    taken = ("retrieval_hidden", *more_from_profile)
    return Row(f"flowers-{name}", title, DATA, build, schedule, retrieval_of, {}, taken, objective)


def _without(name: str, title: str, **options: Any) -> Row:
    return replace(FLOWER_DMVAE, name=f"flowers-{name}", title=title, options=options)


FLOWER_DMVAE = _row("dmvae", "DMVAE", dmvae.build, "matching")
TABLE2 = {  # in the paper's order
    row.title: row
    for row in (
        _row("word2vec", "Word2Vec", word2vec.build),
        Row("flowers-gmm-hglmm", "GMM+HGLMM", DATA, gmm_hglmm.build, fitted, retrieval_of, fit=gmm_hglmm.GMMHGLMM.fit),
        _row("word-cnn", "Word CNN", word_cnn.build),
        _row("word-cnn-rnn", "Word CNN-RNN", word_cnn_rnn.build),
        _row("triplet", "Triplet", triplet.build),
        _row("iatv", "IATV", iatv.build),
        _row("cmpm-cmpc", "CMPM+CMPC", cmpm_cmpc.build),
        _row("timam", "TIMAM", timam.build),
        FLOWER_DMVAE,
    )
}
PARTS = {  # what each part of the DMVAE row contributes; the paper does not show it
    row.title: row
    for row in (
        FLOWER_DMVAE,
        _without("matching", "matching loss alone", evidence=False),
        _without("no-matching", "without matching loss", matching=0.0),
        _without("no-private", "without private spaces", private_dims={"image": 0, "text": 0}),
        _without("no-cross", "without cross terms", without=dmvae.CROSS_TERMS),
    )
}
FLOWERS = tuple({row.name: row for row in (*TABLE2.values(), *PARTS.values())}.values())
