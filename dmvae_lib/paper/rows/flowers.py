"""Table 2's rows on the flowers, and its DMVAE row without some of its parts: each a frozen `Row`.

Learning rates, margins, temperatures and weights are the same in every profile: those that benchmarks/grid.py chose, of three
each and for every row alike, on the validation classes of Oxford-102 (results/subset/grid_table2.csv; tests/test_grid.py).
GMM+HGLMM is fitted and has none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
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


def schedule(profile: Profile, rate: float) -> Schedule:
    """Every row's budget: batches of 64 pairs (Sec. 5.2)."""
    return Schedule(profile.retrieval_steps, 64, rate)  # in float32: make parity is of the digits


def fitted(profile: Profile) -> Schedule:
    """One fit in place of updates, the same in every profile."""
    return Schedule(1)


def objective(model: nn.Module, batch: Batch, labels: Tensor | None, observed: Observed | None, beta: float) -> Terms:
    """For `dmvae_lib.train`: the row's own loss, which sees the classes; no item of the flowers is missing."""
    return model.loss(batch, labels, beta=beta)


def retrieval_of(run: Run) -> dict[str, Any]:
    """`evaluate_retrieval` on the setting's evaluation classes."""
    return evaluate_retrieval(run.model, run.setting.splits(run.row.data).test)


def _row(name: str, title: str, build: Callable[..., nn.Module], rate: float, **options: float) -> Row:
    trained = partial(schedule, rate=rate)
    return Row(f"flowers-{name}", title, DATA, build, trained, retrieval_of, options, ("retrieval_hidden",), objective)


def _without(name: str, title: str, **options: Any) -> Row:
    return replace(FLOWER_DMVAE, name=f"flowers-{name}", title=title, options={**FLOWER_DMVAE.options, **options})


FLOWER_DMVAE = _row("dmvae", "DMVAE", dmvae.build, 2e-3, matching=300.0)
TABLE2 = {  # in the paper's order; the two last are not the paper's
    row.title: row
    for row in (
        _row("word2vec", "Word2Vec", word2vec.build, 2e-3, margin=3.0),
        Row("flowers-gmm-hglmm", "GMM+HGLMM", DATA, gmm_hglmm.build, fitted, retrieval_of, fit=gmm_hglmm.GMMHGLMM.fit),
        _row("word-cnn", "Word CNN", word_cnn.build, 7e-4, margin=3.0),
        _row("word-cnn-rnn", "Word CNN-RNN", word_cnn_rnn.build, 2e-4, margin=0.333),
        _row("triplet", "Triplet", triplet.build, 2e-3, margin=0.2),
        _row("iatv", "IATV", iatv.build, 7e-4, temperature=0.3),
        _row("cmpm-cmpc", "CMPM+CMPC", cmpm_cmpc.build, 7e-4, classification=0.333),
        _row("timam", "TIMAM", timam.build, 2e-3, adversarial=0.033),
        FLOWER_DMVAE,
        _without("matching", "matching loss alone", evidence=False),
        _without("no-matching", "DMVAE without matching loss", matching=0.0),
    )
}
PARTS = {  # what two more parts of the DMVAE row contribute; the paper does not show it
    row.title: row
    for row in (
        FLOWER_DMVAE,
        _without("no-private", "without private spaces", private_dims={"image": 0, "text": 0}),
        _without("no-cross", "without cross terms", without=dmvae.CROSS_TERMS),
    )
}
FLOWERS = tuple({row.name: row for row in (*TABLE2.values(), *PARTS.values())}.values())
