from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from ddpm_deploy.errors import TrainError
from ddpm_deploy.model import UNetWidths
from ddpm_deploy.train import Settings, parse_widths
from tests.train.conftest import tiny


def test_settings_survive_json() -> None:
    assert Settings.from_dict(json.loads(json.dumps(tiny().to_dict()))) == tiny()


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="colour are unknown"):
        Settings.from_dict({**tiny().to_dict(), "colour": 1})


def test_a_run_may_go_on_longer() -> None:
    assert tiny().resumed_with({"steps": 99, "batch": 8}) == replace(tiny(), steps=99)


def test_a_run_may_not_become_another() -> None:
    with pytest.raises(TrainError, match=r"--lr was 0\.0003, not 0\.1; --batch was 8, not 16"):
        tiny().resumed_with({"lr": 0.1, "batch": 16})


def test_a_run_that_cools_down_keeps_its_length() -> None:
    with pytest.raises(TrainError, match="--steps was 6, not 99"):
        tiny(cooldown=2).resumed_with({"steps": 99})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "batch is 0; it must be at least 1"),
        ({"lr": -1.0}, r"lr is -1\.0; it must be above 0"),
        ({"ema": 1.0}, r"ema is 1\.0; it must be in \[0, 1\)"),
        ({"drop_label": 1.5}, r"drop_label is 1\.5"),
        ({"schedule": "cubic"}, "one of linear, scaled_linear, cosine, sigmoid"),
        ({"variance": "learned"}, "variance is learned"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**change)


def test_widths_change_single_blocks() -> None:
    widths = parse_widths("down=32,16,8 bottom=8,8 time=32", UNetWidths.scaled(16))
    assert widths == replace(UNetWidths.scaled(16), down=(32, 16, 8), bottom=(8, 8), time=32)
    assert parse_widths("", UNetWidths()) == UNetWidths()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("middle=3", "'middle' is no block"),
        ("inc=a", "does not read BLOCK=CHANNELS"),
        ("down=4,4", r"must give 3 positive number\(s\)"),
        ("bottom=4", "must give 2 or 3"),
        ("up=4,4,6", "4 attention heads must divide each"),
        ("time=33", "it must be even"),
    ],
)
def test_widths_that_make_no_network_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_widths(text, UNetWidths())


def test_the_spec_says_what_was_trained() -> None:
    spec = tiny(schedule="cosine", variance="fixed_large").spec((1, 8, 8), list("0123456789"))
    assert (spec.schedule.name, spec.schedule.T) == ("cosine", 20)
    assert (spec.prediction, spec.variance, spec.clip) == ("epsilon", "fixed_large", 1.0)
    assert (spec.sampler, spec.rounding, spec.first_timestep) == ("ddpm", "nearest", 0)
    assert spec.label is not None
    assert (spec.label.classes, spec.label.null) == (10, 10)
    assert tiny().spec((1, 8, 8), ()).conditions == ()
