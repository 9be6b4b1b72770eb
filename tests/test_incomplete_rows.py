"""Notebook 13's rows: who has met a partner, what is missing, and that nothing else differs from Table 1's rows."""

from dataclasses import replace

import pytest
import torch
from toy import MVAE_ROW, ROW, TOY, place_in

from dmvae_lib import DMVAEError
from dmvae_lib.paper.profiles import get_profile
from dmvae_lib.paper.reproduce import runs_of
from dmvae_lib.paper.rows import TABLE1
from dmvae_lib.paper.rows.incomplete import complete_in_part, incomplete
from dmvae_lib.paper.runs import Run, setting

pytestmark = pytest.mark.usefixtures("one_thread")
SPLITS = TOY.load("embedded", ".", "test", permutations=4)


def partners(data):
    """(P,) whether an observation is complete."""
    return torch.stack(list(data.masks(torch.arange(len(data))).values())).all(0)


@pytest.mark.parametrize("share", [0.5, 0.2, 0.05])
def test_a_share_of_the_items_has_met_a_partner_and_the_others_never_do(share):
    data, whole = complete_in_part(SPLITS, share), SPLITS.train
    complete, masks = partners(data), data.masks(torch.arange(len(data)))
    assert len(data) == len(whole) and complete.double().mean() == pytest.approx(share, abs=0.02)
    for name, index in data.index.items():
        with_partner, without = (set(index[rows].tolist()) for rows in (complete, ~complete))
        assert not with_partner & without and with_partner | without == set(whole.index[name].tolist())
        labels = data.item_labels[name]
        for label in range(3):  # of each class the first
            of_class = [i for i in with_partner | without if labels[i] == label]
            assert max(i for i in with_partner if labels[i] == label) < min(i for i in without if labels[i] == label)
            assert len(of_class) >= 2
    kept = torch.stack(list(masks.values()))[:, ~complete]
    assert (kept.sum(0) == 1).all() and 0.3 < kept[0].double().mean() < 0.7  # one modality, at random


def test_alone_is_the_complete_observations_and_nothing_else():
    data, alone = complete_in_part(SPLITS, 0.2), complete_in_part(SPLITS, 0.2, alone=True)
    complete = partners(data)
    assert alone.observed is None and all(torch.equal(alone.index[n], data.index[n][complete]) for n in data.names)


def test_the_order_of_the_observations_tells_nothing_of_them():
    complete = partners(complete_in_part(SPLITS, 0.5)).double()
    halves = complete.chunk(2)
    assert abs(halves[0].mean() - halves[1].mean()) < 0.1


def test_pairs_without_labels_are_refused():
    bare = replace(SPLITS.train, item_labels=None)
    with pytest.raises(DMVAEError, match="no labels"):
        complete_in_part(replace(SPLITS, train=bare), 0.5)


def test_rows_differ_from_table_1s_by_what_they_are_trained_on():
    profile = get_profile("paper")
    for what, rows in incomplete(profile).items():
        full = TABLE1[what.split(",")[0]]
        assert list(rows) == [1.0, 0.5, 0.2, 0.05] and rows[1.0] is full
        for row in rows.values():
            assert replace(row, name=full.name, title=full.title, select=full.select) == full
    names = [row.name for rows in incomplete(profile).values() for row in rows.values()]
    assert len(set(names)) == len(names) - 1  # DMVAE's own row is in two lines


def test_a_profile_may_give_this_comparison_fewer_updates():
    profile = replace(get_profile("paper"), incomplete_steps=100)
    for what, rows in incomplete(profile).items():
        full = TABLE1[what.split(",")[0]]
        assert rows[1.0].name == f"{full.name}-gaps-100"
        for row in rows.values():
            assert row.schedule(profile) == replace(full.schedule(profile), steps=100)
            assert replace(row, name=full.name, title=full.title, select=full.select, schedule=full.schedule) == full


def test_reproduce_trains_the_profiles_shares_with_every_seed():
    place = setting("smoke", seeds=2)
    runs = [(run.row.name, run.seed) for run in runs_of(place)]
    expected = {row.name for rows in incomplete(place.profile).values() for row in rows.values()}
    assert {(name, seed) for name in expected for seed in (0, 1)} <= set(runs) and len(set(runs)) == len(runs)
    assert "dmvae-gaps-5" in expected and "dmvae-gaps-50" not in expected


@pytest.mark.parametrize("row", [ROW, MVAE_ROW], ids=lambda row: row.name)
def test_a_run_on_incomplete_data_is_trained_evaluated_and_found_again(tmp_path, row):
    place = place_in(tmp_path)
    gaps = replace(row, name=f"{row.name}-gaps", select=lambda splits: complete_in_part(splits, 0.5))
    entry = Run(gaps, 0, place).entry
    assert set(entry["scores"]) == {"left->top", "top->left", "joint"}
    assert entry["data"]["train"] != Run(row, 0, place).entry["data"]["train"]
    assert Run(gaps, 0, place).recorded() == entry
