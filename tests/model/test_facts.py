"""What a user says of a checkpoint against what its file says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ddpm_deploy import Schedule, cosine, linear
from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.facts import Fact, Facts, Said


def facts(**said: Any) -> Facts:
    return Facts(Said(**said), source="ckpt.pt")


def only(found: Facts) -> Fact:
    (fact,) = found.all
    return fact


def test_what_nobody_says_is_assumed_and_says_how_to_say_it() -> None:
    found = facts()
    assert found.ask("heads", 4) == 4
    assert only(found) == Fact(name="heads", value=4, source="assumed", option="--set heads=...")


@pytest.mark.parametrize(
    ("typed", "default", "value"),
    [
        ("8", 4, 8),
        ("0.5", 1.0, 0.5),
        ("2", 1.0, 2.0),
        ("true", False, True),
        ("No", True, False),
        ("new", "legacy", "new"),
        ("1,2,4", (1,), (1, 2, 4)),
        ("(0.5, 1)", (1,), (0.5, 1)),
        ([1, 2], (1,), (1, 2)),  # as it comes back from a spec's JSON
        ("7", None, 7),
        ("zero", None, "zero"),
        (3, 4, 3),
        (False, True, False),
    ],
)
def test_what_is_typed_is_read_as_the_default_s_kind(typed: Any, default: Any, value: Any) -> None:
    found = facts(settings={"name": typed})
    assert found.ask("name", default) == value
    assert type(found.ask("name", default)) is type(value)
    assert only(found).source == "flag"


@pytest.mark.parametrize(
    ("typed", "default", "message"),
    [
        ("four", 4, "--set name=four is not a whole number."),
        ("4.5", 4, "--set name=4.5 is not a whole number."),
        ("x", 0.5, "--set name=x is not a number."),
        ("maybe", True, "--set name=maybe is not true or false."),
        ("1,x", (1,), "--set name=1,x is not a list of numbers such as 1,2,4."),
    ],
)
def test_what_is_no_such_value_is_refused(typed: str, default: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        facts(settings={"name": typed}).ask("name", default)
    assert str(caught.value) == message
    assert caught.value.hint


def test_a_word_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    found = facts(settings={"order": "old"})
    with pytest.raises(CheckpointError, match="--set order=old is not one of new, legacy"):
        found.ask("order", "legacy", among=("new", "legacy"))


def test_a_config_yields_to_what_is_typed_and_weights_do_not() -> None:
    found = facts(settings={"heads": "2", "channels": "3"})
    assert found.found("heads", 8, "config") == 2
    assert only(found).source == "flag"
    with pytest.raises(CheckpointError) as caught:
        found.found("channels", 1)
    assert str(caught.value) == "ckpt.pt has channels 1 by its weights, not 3."
    assert found.found("channels", 3) == 3  # the same is no contradiction


def test_what_no_default_is_right_for_must_be_said() -> None:
    with pytest.raises(CheckpointError) as caught:
        facts().need("heads", int, why="Attention depends on it.", hint="Type --set heads=4")
    assert str(caught.value) == "ckpt.pt does not say its heads. Attention depends on it."
    assert caught.value.hint == "Type --set heads=4"
    assert facts(settings={"heads": "4"}).need("heads", int, why="", hint="") == 4


def test_a_setting_that_nobody_asked_for_is_refused_with_those_that_there_are() -> None:
    found = facts(settings={"head": "4"})
    found.ask("heads", 4)
    with pytest.raises(CheckpointError) as caught:
        found.done()
    assert str(caught.value) == "--set head is nothing that ckpt.pt has; it takes heads."


@pytest.mark.parametrize(
    ("said", "default", "multiple", "size"),
    [
        (None, (64, 64), 8, (64, 64)),
        ((32,), (64, 64), 8, (32, 32)),
        ((16, 24), (64, 64), 8, (16, 24)),
        ((16,), (128,), 4, (16,)),
    ],
)
def test_one_number_is_a_square_s_side(
    said: tuple[int, ...] | None,
    default: tuple[int, ...],
    multiple: int,
    size: tuple[int, ...],
) -> None:
    found = facts(image_size=said)
    assert found.image_size(default, multiple_of=multiple) == size
    assert only(found).source == ("assumed" if said is None else "flag")


def test_a_size_that_the_network_cannot_take_is_refused() -> None:
    with pytest.raises(CheckpointError, match="20x20; this network takes multiples of 8"):
        facts(image_size=(20,)).image_size((64, 64), multiple_of=8)
    with pytest.raises(CheckpointError, match=r"ckpt\.pt does not say its image size; no file"):
        facts().image_size(None, multiple_of=8)


def test_a_schedule_in_the_file_is_not_typed_over() -> None:
    found = facts(schedule=cosine(10))
    assert found.schedule(linear(10)) == cosine(10)
    assert only(found).source == "flag"
    with pytest.raises(CheckpointError, match="holds its own schedule, linear"):
        found.schedule(linear(10), source="weights")
    assert facts().schedule(linear(10), source="weights") == linear(10)


def test_a_prediction_is_one_of_three() -> None:
    assert facts().prediction("epsilon") == "epsilon"
    assert facts(prediction="v_prediction").prediction("epsilon") == "v_prediction"
    with pytest.raises(CheckpointError, match="there are epsilon, sample, v_prediction"):
        facts(prediction="v").prediction("epsilon")


def test_what_a_spec_says_is_from_a_config() -> None:
    found = facts(settings={"heads": 2}, schedule=linear(10), source="config")
    found.ask("heads", 4)
    found.schedule(cosine(10))
    assert [fact.source for fact in found.all] == ["config", "config"]


def test_a_name_or_a_length_alone_changes_that_of_the_default() -> None:
    assert facts(timesteps=50).schedule(cosine(10)) == cosine(50)
    assert facts(schedule="linear").schedule(cosine(10)) == linear(10)
    assert facts(schedule="cosine", timesteps=7).schedule(linear(10)) == cosine(7)
    steep = linear(10, start=0.01, end=0.5)
    assert facts(timesteps=20).schedule(steep) == linear(20, start=0.01, end=0.5)
    given = Schedule(np.full(10, 0.1))
    with pytest.raises(CheckpointError, match="cannot take this schedule: its schedule is given"):
        facts(timesteps=20).schedule(given)
    assert facts(schedule="linear", timesteps=20).schedule(given) == linear(20)


def test_a_default_that_cannot_be_made_is_not_where_all_is_said() -> None:
    def fails() -> Schedule:
        raise AssertionError

    assert facts(schedule="linear", timesteps=5).schedule(fails, source="config") == linear(5)


def test_what_an_engine_s_spec_says_gives_way_to_what_the_checkpoint_says() -> None:
    told = facts(
        schedule=linear(10),
        prediction="sample",
        image_size=(8, 8),
        source="config",
    )
    assert told.schedule(cosine(10), source="config") == cosine(10)
    assert told.prediction("epsilon", source="config") == "epsilon"
    assert told.image_size((16, 16), source="config") == (16, 16)
    assert told.image_size((16, 16)) == (8, 8)  # the family's default says nothing
    typed = Said(schedule=linear(10), source="config", typed=frozenset({"schedule"}))
    assert Facts(typed, source="ckpt.pt").schedule(cosine(10), source="config") == linear(10)


def test_a_prediction_of_the_weights_is_not_typed_over() -> None:
    with pytest.raises(CheckpointError, match="by its weights that it predicts v_prediction"):
        facts(prediction="epsilon").prediction("v_prediction", source="weights")


def test_a_size_beyond_reason_and_a_number_below_the_least_are_refused() -> None:
    with pytest.raises(CheckpointError, match="99992x99992; 16384 is the most"):
        facts(image_size=(99992,)).image_size((64, 64), multiple_of=8)
    with pytest.raises(CheckpointError, match="--set heads=0 is below 1"):
        facts(settings={"heads": "0"}).ask("heads", 4, least=1)
