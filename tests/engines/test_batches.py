from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddpm_deploy.engines.batches import cut
from ddpm_deploy.engines.plan import Profile
from tests.engines.plans import record


def _profiles(*texts: str) -> tuple[Profile, ...]:
    return tuple(Profile.parse(text) for text in texts)


@pytest.mark.parametrize(
    ("samples", "profiles", "parts", "batch", "profile"),
    [
        (8, ["1:8:8"], [8], 8, 0),
        (5, ["1:8:8"], [5], 5, 0),
        (16, ["1:8:8"], [8, 8], 8, 0),
        (20, ["1:8:8"], [7, 7, 6], 7, 0),
        (9, ["1:8:8"], [5, 4], 5, 0),
        (2, ["4:4:4"], [2], 4, 0),  # padded by two
        (5, ["4:4:4"], [3, 2], 4, 0),
        (3, ["1", "8"], [3], 8, 1),  # between two profiles
        (1, ["1", "8"], [1], 1, 0),
        (1, ["1:8:8", "1:1:1"], [1], 1, 1),  # the one that is tuned for it
        (40, ["1:1:4", "4:16:32"], [20, 20], 20, 1),
    ],
)
def test_a_batch_is_cut_in_equal_parts(
    samples: int, profiles: list[str], parts: list[int], batch: int, profile: int
) -> None:
    found = cut(samples, record(profiles=_profiles(*profiles)))
    assert [s.stop - s.start for s in found.slices()] == parts
    assert (found.batch, found.profile) == (batch, profile)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    least, best, most = sorted(draw(st.lists(st.integers(1, 40), min_size=3, max_size=3)))
    return Profile(least=least, best=best, most=most)


@given(st.integers(1, 200), st.lists(profiles(), min_size=1, max_size=4))
def test_every_sample_runs_once_in_a_batch_that_its_profile_takes(
    samples: int, some: list[Profile]
) -> None:
    found = cut(samples, record(profiles=tuple(some)))
    slices = list(found.slices())
    assert [i for s in slices for i in range(s.start, s.stop)] == list(range(samples))
    assert all(s.stop - s.start <= found.batch for s in slices)
    assert found.batch in some[found.profile]
    # As few calls as the largest profile allows.
    assert len(slices) == -(-samples // max(p.most for p in some))


def test_no_samples_are_no_batch() -> None:
    with pytest.raises(ValueError, match="at least one sample, not 0"):
        cut(0, record())
