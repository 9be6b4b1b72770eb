"""The published weights: half the size, the same scores, a card from the ledger, and no training to use them."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from toy import ROW, place_in

from dmvae_lib import DMVAEError
from dmvae_lib.paper import pretrained, weights
from dmvae_lib.paper.rows.digits import judged
from dmvae_lib.paper.runs import Run
from dmvae_lib.paper.tables import median

pytestmark = pytest.mark.usefixtures("one_thread")
PAPER = {"left->top": 88.1, "top->left": 83.7, "joint": 44.7}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = place_in(tmp_path_factory.mktemp("published"), steps=200, learning_rate=1e-2, classifier_steps=300)
    for seed in range(3):
        Run(ROW, seed, place).train()
    weights.publish(ROW, place, PAPER)
    return place


def test_what_is_loaded_is_the_median_run_in_half_the_size_with_its_scores(place):
    folder = place.results / "models" / "dmvae-toy"
    run = median([Run(ROW, seed, place) for seed in range(3)])
    stored = load_file(folder / "model.safetensors")
    assert {values.dtype for values in stored.values()} == {torch.float16}
    loaded = replace(run)
    loaded.__dict__["model"] = pretrained(folder, ROW)
    assert {values.dtype for values in loaded.model.parameters()} == {torch.float32}
    scores = judged(loaded)["scores"]
    assert {name: abs(share - run.scores[name]) <= 0.002 for name, share in scores.items()} == dict.fromkeys(
        PAPER, True
    )
    assert loaded.model.about["run"] == run.config


def test_the_card_says_what_the_ledger_says(place):
    card = (place.results / "models" / "dmvae-toy" / "README.md").read_text("utf-8")
    run = median([Run(ROW, seed, place) for seed in range(3)])
    assert f"seed {run.seed}" in card and "of 3 seeds" in card and "200 updates of 10 pairs" in card
    assert f"{100 * run.scores['joint']:.1f}" in card and "| 44.7 |" in card and "±" in card
    assert run.entry["data"]["test"] in card and f"left: {run.entry['judges']['left']['accuracy']:.1%}" in card
    assert "Not good for" in card and "Terms of the data" in card and 'pretrained("dmvae-toy")' in card


def test_a_run_that_is_not_here_takes_the_published_weights_and_trains_nothing(place, tmp_path, monkeypatch):
    elsewhere = replace(place, runs=tmp_path)
    run = median([Run(ROW, seed, elsewhere) for seed in range(3)])  # by the ledger
    monkeypatch.setattr(Run, "train", lambda run: pytest.fail(f"{run} was trained"))
    stored = load_file(place.results / "models" / "dmvae-toy" / "model.safetensors")
    assert all(torch.equal(run.model.state_dict()[name], values.float()) for name, values in stored.items())


def test_weights_that_half_precision_spoils_are_not_published(place, monkeypatch):
    monkeypatch.setattr(weights, "WITHIN", -1.0)
    folder = place.results / "models" / "dmvae-toy"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(DMVAEError, match="in float16 left->top, top->left, joint is not the run's"):
        weights.publish(ROW, place, PAPER)
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}  # what is there stays


def test_a_row_without_entries_is_named(tmp_path):
    with pytest.raises(DMVAEError, match="has no entry of toy-dmvae as it is now: `make reproduce PROFILE=toys`"):
        weights.publish(ROW, place_in(tmp_path), PAPER)


def test_every_published_row_has_its_terms_on_the_card():
    assert {row.data.name for row in weights.PUBLISHED} == set(weights.TERMS)


def test_a_name_is_that_of_the_checkouts_weights(place, monkeypatch, tmp_path):
    checkout = tmp_path / "results" / "subset" / "models"
    shutil.copytree(place.results / "models", checkout)
    monkeypatch.setattr("dmvae_lib.paper.__file__", str(tmp_path / "dmvae_lib" / "paper" / "__init__.py"))
    assert pretrained("dmvae-toy", ROW).about["row"] == "toy-dmvae"
