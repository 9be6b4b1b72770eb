"""Properties that hold for every input, on inputs that hypothesis looks for (the product of experts': test_distributions)."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmvae_lib import DMVAEError, runs
from dmvae_lib.profiles import PROFILES, get_profile

pytestmark = pytest.mark.usefixtures("one_thread")


# --- configuration --------------------------------------------------------------------------------------------------

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


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), VALUES, min_size=1), st.data())
def test_a_configurations_hash_takes_any_order_and_sees_every_change(config, data):
    digest = runs.configuration_hash(config)
    assert runs.configuration_hash(dict(reversed(config.items()))) == digest
    key = data.draw(st.sampled_from(sorted(config)))
    assert runs.configuration_hash(config | {key: [config[key]]}) != digest


@given(st.one_of(st.integers(max_value=0), st.floats(), st.text(), st.none(), st.lists(st.integers())))
def test_seeds_are_a_count_or_refused(seeds):
    with pytest.raises(DMVAEError, match="seeds="):
        runs.setting(seeds=seeds)
