"""Profiles and settings: what a notebook's parameters may be."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmvae_lib import DMVAEError
from dmvae_lib.paper import runs
from dmvae_lib.paper.profiles import PROFILES, get_profile
from dmvae_lib.paper.rows import ROWS
from dmvae_lib.paper.rows.digits import DIGITS


def test_an_unknown_evaluation_lists_the_choices():
    with pytest.raises(DMVAEError, match="evaluation='train'.*test, validation"):
        runs.setting(evaluation="train")


def test_a_share_of_a_profiles_updates():
    quick, part = get_profile("quick"), get_profile("quick@0.05")
    assert (part.steps, part.particle_steps) == (round(0.05 * quick.steps), round(0.05 * quick.particle_steps))
    assert part.classifier_steps == quick.classifier_steps and part.name == "quick@0.05"  # the judges stay as they are
    for bad in ("quick@0", "quick@2", "quick@half"):
        with pytest.raises(DMVAEError, match=r"quick@.*\(0, 1\]"):
            get_profile(bad)


SHARE = st.one_of(st.text(max_size=8), st.floats().map(str), st.sampled_from(["nan", " 1", "1_0", "1/..", "٣", "1\n"]))


@given(st.one_of(st.text(), st.tuples(st.sampled_from(sorted(PROFILES)), SHARE).map("@".join)))
def test_a_profiles_name_is_known_and_can_be_a_folders_or_is_refused(name):
    try:
        profile = get_profile(name)
    except DMVAEError as error:
        assert "profile" in str(error)
        return
    base, at, share = name.partition("@")
    assert (
        profile.name == name and base in PROFILES and Path(name).name == name and name.isascii() and name.isprintable()
    )
    assert not at or 0 < float(share) <= 1 and 1 <= profile.steps <= PROFILES[base].steps


@given(st.one_of(st.integers(max_value=0), st.floats(), st.text(), st.none(), st.lists(st.integers())))
def test_seeds_are_a_count_or_refused(seeds):
    with pytest.raises(DMVAEError, match="seeds="):
        runs.setting(seeds=seeds)


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_the_digits_rows_alone_are_trained_in_the_profiles_precision(row):
    """Those that `make parity` stands for; of the models of multivae some give NaN in bfloat16."""
    schedule = row.schedule(replace(get_profile("quick"), precision="bfloat16"))
    assert schedule.precision == ("bfloat16" if row in DIGITS else "float32")


def test_the_precision_is_no_part_of_what_a_run_is():
    quick = get_profile("quick")
    configs = [ROWS["dmvae"].config(replace(quick, precision=name), 0) for name in ("float32", "bfloat16")]
    assert configs[0] == configs[1]
