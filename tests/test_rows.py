"""Rows: what the paper's tables say of them, what is refused, and a data set of one's own in place of the paper's."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from toy import OPTIONS, ROW, SHARED, TOY, place_in

from dmvae_lib import DMVAE, DMVAEError
from dmvae_lib.paper import published
from dmvae_lib.paper.profiles import PROFILES, get_profile
from dmvae_lib.paper.rows import FIELD, JUDGES, ROWS, digits
from dmvae_lib.paper.rows.digits import (
    DIGITS,
    MNIST_SVHN,
    RELATED,
    RELEASE,
    TABLE1,
    TABLE3,
    budgets,
    first_images,
    judge,
    learning_curve,
)
from dmvae_lib.paper.rows.flowers import FLOWERS
from dmvae_lib.paper.runs import Run, setting

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = get_profile("quick")


# --- the paper's ----------------------------------------------------------------------------------------------------


def built(row):
    splits = TOY.load("embedded", ".", "test") if row.data == TOY else None
    return row.build(row.data, splits, **row.arguments(replace(QUICK, width=0.125)))


def test_table_3_takes_away_one_thing_at_a_time():
    """The columns of the paper's Table 3: cross-reconstructions M2S and S2M, the product of experts, private spaces."""
    full, changes = TABLE3["full"], {}
    for title, row in TABLE3.items():
        others = {name: value for name, value in row.options.items() if full.options.get(name) != value}
        changes[title] = others
        assert replace(row, name=full.name, title=full.title, options=full.options) == full
    assert changes == {
        "full": {},
        "no PoE": {"without": ["mnist<-joint", "svhn<-joint"]},
        "no crVAE M2S": {"without": ["svhn<-mnist"]},
        "no crVAE S2M": {"without": ["mnist<-svhn"]},
        "no crVAE": {"without": ["svhn<-mnist", "mnist<-svhn"]},
        "no private spaces": {"private_dims": {"mnist": 0, "svhn": 0}},
    }
    assert full.options["private_dims"] == {"mnist": 1, "svhn": 4} and full.options["shared_dim"] == 10
    assert full is TABLE1["DMVAE"]


def test_the_release_keeps_the_kls_of_the_joint_reconstructions_it_leaves_out():
    batch = {"mnist": torch.rand(2, 1, 28, 28), "svhn": torch.rand(2, 3, 32, 32)}
    released, full = (set(built(row).loss(batch).flat()) for row in (RELEASE, TABLE3["full"]))
    assert full - released == {"log_likelihood(mnist<-joint)", "log_likelihood(svhn<-joint)"}


def test_dmvae_starts_as_its_authors_start_it_and_weighs_mnist_as_they_do():
    for source, mnist in (("embedded", 5.0), ("subset", 50.0), ("full", 50.0)):
        weights = TABLE1["DMVAE"].arguments(replace(QUICK, source=source))["weights"]
        assert weights == {"mnist": mnist, "svhn": 1.0}
    assert {row.options["initialise"] for row in (*TABLE3.values(), RELEASE)} == {"release"}


def test_mvae_weighs_mnist_as_dmvae_does_and_the_other_baselines_by_the_ratio_of_pixels():
    for row in (TABLE1["MMVAE"], *RELATED.values()):
        assert row.options["weights"] == {"mnist": 3 * 32 * 32 / 28**2, "svhn": 1.0} and row.options["shared_dim"] == 20
    mvae, dmvae = (TABLE1[title].arguments(get_profile("subset")) for title in ("MVAE", "DMVAE"))
    assert mvae["weights"] == dmvae["weights"] == {"mnist": 50.0, "svhn": 1.0} and mvae["shared_dim"] == 20


def test_schedules():
    paper = get_profile("paper")
    assert [TABLE1[title].schedule(paper).steps for title in ("DMVAE", "MVAE", "MMVAE")] == [168_000, 168_000, 393_750]
    assert [TABLE1[title].schedule(paper).anneal_steps for title in ("MVAE", "MMVAE", "DMVAE")] == [84_000, 0, 0]
    mmvae = TABLE1["MMVAE"]
    assert mmvae.schedule(paper).batch_size == 128 and mmvae.arguments(paper)["particles"] == 30
    assert [mmvae.schedule(get_profile(name)).chunks for name in ("quick", "subset", "paper")] == [1, 1, 8]


def test_the_paper_has_a_number_for_each_row_of_its_tables():
    assert set(published.TABLE1) <= set(TABLE1) and set(published.TABLE3) <= set(TABLE3)


def test_names_are_unique_and_configurations_are_json():
    assert len(ROWS) == len((*JUDGES, *DIGITS, *FLOWERS, *FIELD))
    for row in ROWS.values():
        for profile in PROFILES.values():
            config = row.config(profile, 3)
            assert json.loads(json.dumps(config)) == config and config["seed"] == 3


def test_a_learning_curve_trains_on_the_first_images_alone():
    splits = MNIST_SVHN.load("embedded", permutations=2)
    ((first, row),) = learning_curve(get_profile("smoke")).items()
    data, whole = row.select(splits), splits.train
    assert first == 500 and row.name == "dmvae-first-500"
    assert torch.equal(data.items["svhn"], whole.items["svhn"][:500]) and data.index["svhn"].max() < 500
    assert torch.equal(data.items["mnist"], whole.items["mnist"])
    assert torch.equal(first_images(splits, "svhn", 10**6, 2).index["svhn"], whole.index["svhn"])


def test_a_judge_learns_each_real_training_image_once():
    splits = MNIST_SVHN.load("embedded", permutations=2)
    for name, row in digits.JUDGES.items():
        data = row.select(splits)
        assert torch.equal(data.batch(torch.arange(5))[name], splits.train.items[name][:5] / 255)
        assert torch.equal(data.labels, splits.train.item_labels[name]) and data.names == (name,)


def test_unknown_modality_of_a_judge():
    with pytest.raises(DMVAEError, match="unknown modality 'cifar'.*mnist, svhn"):
        judge(MNIST_SVHN, "cifar")


# --- what decides a run -----------------------------------------------------------------------------------------------


def test_a_configuration_sees_every_change_of_row_profile_and_seed():
    configs = [
        row.config(profile, seed)
        for row, profile, seed in (
            (ROW, QUICK, 0),
            (ROW, QUICK, 1),
            (replace(ROW, version=2), QUICK, 0),
            (replace(ROW, options=OPTIONS | {"without": ["left<-top"]}), QUICK, 0),
            (replace(ROW, options=OPTIONS | {"weights": {"left": 1.0, "top": 1.0}}), QUICK, 0),
            (ROW, replace(QUICK, steps=3), 0),
            (ROW, replace(QUICK, width=0.25), 0),
            (ROW, replace(QUICK, permutations=1), 0),
        )
    ]
    assert not [one for i, one in enumerate(configs) for other in configs[:i] if one == other]
    assert replace(ROW, title="in other words").config(replace(QUICK, gigabytes=9.0), 0) == configs[0]


@pytest.mark.parametrize("row", [*ROWS.values(), *learning_curve(get_profile("subset")).values()], ids=lambda r: r.name)
def test_a_row_reaches_another_process_as_it_is(row):
    again = pickle.loads(pickle.dumps(row))
    assert again.config(QUICK, 0) == row.config(QUICK, 0) and again.data == row.data


# --- what is refused --------------------------------------------------------------------------------------------------


def test_an_option_that_a_row_does_not_use_is_refused():
    with pytest.raises(DMVAEError, match="row 'toy-dmvae': dmvae does not use sharde_dim; its options are shared_dim,"):
        replace(ROW, options=OPTIONS | {"sharde_dim": 3})
    with pytest.raises(DMVAEError, match="mvae does not use private_dims"):
        replace(TABLE1["MVAE"], options=TABLE1["DMVAE"].options)
    with pytest.raises(DMVAEError, match="does not use particles"):
        replace(ROW, from_profile=("width", "particles"))
    with pytest.raises(DMVAEError, match="dmvae needs shared_dim, private_dims; add it to options"):
        replace(ROW, options={"initialise": "release"})
    with pytest.raises(DMVAEError, match="a profile has no breadth"):
        replace(ROW, from_profile=("breadth",))
    with pytest.raises(DMVAEError, match="row 'DMVAE/2': expected a name of a-z"):
        replace(ROW, name="DMVAE/2")


def test_options_for_the_modalities_of_another_data_set_are_refused():
    with pytest.raises(DMVAEError, match="private_dims are for mnist, svhn; 'toy' has left, top"):
        built(replace(ROW, options=OPTIONS | {"private_dims": {"mnist": 1, "svhn": 4}}))
    with pytest.raises(DMVAEError, match="row 'toy-dmvae': data set 'toy' has no weights .* for source 'full'"):
        ROW.arguments(get_profile("paper"))
    for lacking, row, message in (
        ({"networks": None}, ROW, "'toy' has no networks"),
        ({}, replace(RELATED["JMVAE"], options=SHARED), "'toy' has no joint_encoder"),
        ({"classifier": None}, judge(TOY, "left"), "'toy' has no evaluation classifier"),
    ):
        with pytest.raises(DMVAEError, match=message):
            built(replace(row, data=replace(TOY, **lacking)))


# --- a data set of one's own --------------------------------------------------------------------------------------------


def test_a_data_set_of_ones_own_is_trained_and_scored_by_naming_it(tmp_path):
    run = Run(ROW, 0, place_in(tmp_path, steps=400, learning_rate=1e-2, classifier_steps=300))
    assert isinstance(run.model, DMVAE) and run.model.weights == {"left": 2.0, "top": 1.0}
    assert set(run.scores) == {"left->top", "top->left", "joint"} and run.scores["left->top"] > 0.8
    assert set(run.entry["judges"]) == {"left", "top"} and run.entry["judges"]["left"]["accuracy"] > 0.9
    assert (tmp_path / "results" / "toys" / "runs" / "toy-classifier-left-0.json").exists()


def test_data_sets_are_loaded_once_for_equal_settings():
    place = setting("smoke", device="cpu")
    assert place.splits(TOY) is replace(place).splits(pickle.loads(pickle.dumps(TOY)))
    assert place.splits(TOY) is not setting("smoke", device="cpu", evaluation="validation").splits(TOY)


def test_what_the_budget_decides_differs_in_the_budget_alone():
    subset = get_profile("subset")
    rows = budgets(subset)
    usual = {name: row.config(subset, 0) for name, row in TABLE1.items()}
    longer = rows["DMVAE, twice the updates"].config(subset, 0)
    assert longer["schedule"] == usual["DMVAE"]["schedule"] | {"steps": 2 * subset.steps}
    assert longer["arguments"] == usual["DMVAE"]["arguments"]
    more = rows["MMVAE, K = 30"].config(subset, 0)
    assert more["arguments"] == usual["MMVAE"]["arguments"] | {"particles": 30}
    assert more["schedule"] == usual["MMVAE"]["schedule"] | {"chunks": 3}
    assert not budgets(get_profile("quick"))
