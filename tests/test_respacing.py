"""Shorter loops as OpenAI's projects choose them."""

from __future__ import annotations

import pytest

from ddpm_deploy.respacing import respaced, respaced_sampler


@pytest.mark.parametrize(
    ("steps", "text", "kept"),
    [
        # What improved-diffusion's own run kept: tests/data/README.md.
        (4000, "10", [3999, 3555, 3110, 2666, 2222, 1777, 1333, 889, 444, 0]),
        (4000, "ddim10", [3600, 3200, 2800, 2400, 2000, 1600, 1200, 800, 400, 0]),
        # Sections of 334, 333 and 333, each with both of its ends.
        (1000, "5,3,2", [999, 667, 666, 500, 334, 333, 250, 166, 83, 0]),
        (10, "10", [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
        (6, " 1, 2", [5, 3, 0]),
        (5, "3", [4, 2, 0]),
        (4, "3", [3, 2, 0]),  # 1.5 goes to the even neighbour
        (10, "1", [0]),
        (10, "0,3", [9, 7, 5]),
        (5, "ddim3", [4, 2, 0]),
    ],
)
def test_the_timesteps_kept_are_those_of_the_original(
    steps: int, text: str, kept: list[int]
) -> None:
    assert list(respaced(steps, text)) == kept


@pytest.mark.parametrize("text", ["", "ten", "-1", "0", "0,0", "1.5", "ddim", "ddimx", "ddim0"])
def test_what_says_no_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="respacing is '"):
        respaced(100, text)


def test_a_section_with_too_few_timesteps_is_refused() -> None:
    with pytest.raises(ValueError, match="respacing 5,51 keeps 51 timesteps of 50"):
        respaced(100, "5,51")


def test_a_stride_that_does_not_fit_names_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"exactly 60 of 100 timesteps; nearest is ddim50"):
        respaced(100, "ddim60")
    with pytest.raises(ValueError, match="no whole stride keeps exactly 1 of 10"):
        respaced(10, "ddim1")  # as in the original, whose strides are shorter than the schedule


def test_only_strides_of_ddim_choose_a_sampler() -> None:
    assert [respaced_sampler(text) for text in ("10", "5,3,2", "ddim10")] == [None, None, "ddim"]
