from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddpm_deploy import Condition, ModelSpec, Schedule, cosine, ddim, ddpm, dome272, linear
from ddpm_deploy.errors import SpecError
from ddpm_deploy.schedule import SCHEDULES, named_schedule
from ddpm_deploy.spec import FORMAT

LABEL = Condition(name="y", meaning="class_label", dtype="int64", classes=10, null=10)

SPEC = ModelSpec(
    sample_shape=(3, 64, 64),
    schedule=linear(),
    variance="fixed_large",
    clip=None,
    rounding="truncate",
    first_timestep=1,
    sampler="dome272",
    conditions=(LABEL,),
    family="dome272",
    checkpoint_sha256="ab" * 32,
)

positive = st.floats(1e-300, 1e300)
schedules = st.one_of(
    st.lists(st.floats(1e-12, 1.0), min_size=1, max_size=30).map(
        lambda beta: Schedule(np.array(beta))
    ),
    st.builds(named_schedule, st.sampled_from(sorted(SCHEDULES)), st.integers(1, 50)),
    st.builds(
        lambda start, end: linear(7, start=start, end=end), st.floats(1e-9, 0.5), st.floats(0.5, 1)
    ),
)
conditions = st.builds(
    Condition,
    name=st.text(min_size=1).filter(lambda name: name not in {"x", "t"}),
    meaning=st.sampled_from(["class_label", "observation"]),
    dtype=st.sampled_from(["int64", "float32"]),
    shape=st.lists(st.integers(1, 9), max_size=2).map(tuple),
    classes=st.none() | st.integers(1, 1000),
    null=st.none() | st.integers(0, 1000),
)
specs = st.builds(
    ModelSpec,
    sample_shape=st.lists(st.integers(1, 512), min_size=1, max_size=4).map(tuple),
    schedule=schedules,
    prediction=st.sampled_from(["epsilon", "sample", "v_prediction"]),
    variance=st.sampled_from(["fixed_small", "fixed_large", "learned", "learned_range"]),
    clip=st.none() | positive,
    value_range=st.tuples(st.floats(-1e9, 0), st.floats(1e-9, 1e9)),
    rounding=st.sampled_from(["nearest", "truncate"]),
    first_timestep=st.just(0),
    sampler=st.sampled_from(["ddpm", "ddim", "dome272"]),
    conditions=st.lists(conditions, max_size=3, unique_by=lambda c: c.name).map(tuple),
    family=st.text(),
    checkpoint_sha256=st.text("0123456789abcdef", max_size=64),
    tool_version=st.text(),
)


def changed(**fields: Any) -> str:
    return json.dumps({**SPEC.to_dict(), **fields})


def with_label(**fields: Any) -> str:
    return changed(conditions=[{**json.loads(SPEC.to_json())["conditions"][0], **fields}])


# --- There and back ---


@settings(deadline=None)  # the machine may be busy
@given(specs)
def test_a_spec_comes_back_bit_for_bit(spec: ModelSpec) -> None:
    text = spec.to_json()
    read = ModelSpec.from_json(text)
    assert read == spec
    assert read.schedule.beta.tobytes() == spec.schedule.beta.tobytes()
    assert read.schedule.name == spec.schedule.name
    assert dict(read.schedule.parameters) == dict(spec.schedule.parameters)
    assert read.to_json() == text


def test_json_is_plain_and_says_its_format() -> None:
    data = json.loads(SPEC.to_json())
    assert data["format"] == FORMAT == 2
    assert data["schedule"] == {
        "name": "linear",
        "T": 1000,
        "parameters": {"start": 1e-4, "end": 0.02},
    }
    assert data["sample_shape"] == [3, 64, 64]
    assert data["clip"] is None
    assert data["conditions"][0] == {
        "name": "y",
        "meaning": "class_label",
        "dtype": "int64",
        "shape": [],
        "classes": 10,
        "null": 10,
        "names": [],
    }
    assert set(data) == {
        *("format", "sample_shape", "schedule", "prediction", "variance", "clip", "value_range"),
        *("rounding", "first_timestep", "timestep", "sampler", "conditions", "family"),
        *("checkpoint_sha256", "tool_version", "sampling", "guidance", "restore", "network"),
        "weights",
    }


def test_betas_without_a_name_travel_as_they_are() -> None:
    beta = np.array([0.1, 1 / 3, 0.7])
    spec = SPEC.with_changes(schedule=Schedule(beta))
    assert json.loads(spec.to_json())["schedule"] == {"name": "given", "T": 3, "beta": list(beta)}
    assert ModelSpec.from_json(spec.to_json()).schedule == Schedule(beta)


def test_betas_that_borrow_a_name_travel_as_they_are() -> None:
    for borrowed in (
        Schedule(np.array([0.1, 0.2, 0.7]), "linear"),
        Schedule(np.array([0.1, 0.2, 0.7]), "linear", {"s": 1.0}),
    ):
        spec = SPEC.with_changes(schedule=borrowed)
        assert ModelSpec.from_json(spec.to_json()).schedule == borrowed


# --- Files that are not to be read ---


def test_a_later_format_is_refused_with_a_hint() -> None:
    text = changed(format=3, tool_version="3.1.0", something_new=[1])
    with pytest.raises(SpecError, match=r"unet\.onnx has format 3, written by ddpm-deploy 3\.1\.0"):
        ModelSpec.from_json(text, source="unet.onnx")
    with pytest.raises(SpecError) as caught:
        ModelSpec.from_json(text)
    assert "reads formats up to 2" in str(caught.value)
    assert caught.value.hint == "Update ddpm-deploy here: pip install --upgrade ddpm-deploy"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        (SPEC.to_json()[:-9], "not JSON"),
        ("[1, 2]", "no format number"),
        ("{}", "no format number"),
        ('{"format": "1"}', "no format number"),
        (changed(mystery=1, another=2), "unknown fields: another, mystery"),
        (changed(prediction="score"), "prediction is 'score'; there are epsilon, sample"),
        (changed(variance="large"), "variance is 'large'"),
        (changed(rounding="up"), "rounding is 'up'"),
        (changed(timestep="sigma"), "timestep is 'sigma'"),
        (changed(sampler="euler"), "sampler is 'euler'"),
        (changed(clip=-1), "clip is -1"),
        (changed(clip="1"), "clip is '1'; it must be a positive number"),
        (changed(clip=True), "clip is True"),
        (changed(clip=math.inf), "clip is inf"),
        (changed(clip=10**400), "damaged"),
        (changed(value_range=[0, 10**400]), "damaged"),
        ('{"format": ' + "1" * 5000 + "}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        (changed(value_range=[-math.inf, 1]), "value_range is"),
        (changed(sample_shape="364"), "sample_shape is"),
        (changed(sample_shape=[3, 64.5, 64]), "sample_shape is"),
        (changed(first_timestep=1.5), r"first_timestep is 1.5; it must lie in 0\.\.999"),
        (changed(first_timestep=1000), "first_timestep is 1000"),
        (changed(family=None), "family is None; it must be text"),
        (changed(value_range=[1, -1]), r"value_range is \(1.0, -1.0\)"),
        (changed(value_range=[1]), "damaged"),
        (changed(sample_shape=[]), r"sample_shape is \(\)"),
        (changed(sample_shape=[3, 0, 64]), r"sample_shape is \(3, 0, 64\)"),
        (changed(sample_shape=None), "damaged"),
        (changed(schedule={"name": "linear"}), "no 'T'"),
        (changed(schedule={"name": "square", "T": 9, "parameters": {}}), "called 'square'"),
        (changed(schedule={"name": "linear", "T": 0, "parameters": {}}), "T is 0"),
        (changed(schedule={"name": "given", "beta": [2.0]}), r"beta\[0\] is 2.0"),
        (changed(schedule={"name": "given", "beta": [10**400]}), "damaged"),
        (changed(schedule={"name": 5, "beta": [0.5]}), "the schedule's name is 5; it must be text"),
        (changed(schedule=None), "damaged"),
        (changed(conditions=[{"name": "y"}]), "damaged"),
        (with_label(x=1), "damaged"),
        (with_label(name=""), "a condition's name is ''"),
        (with_label(name="x"), "two inputs are called 'x'"),
        (with_label(dtype="int7"), "damaged"),
        (with_label(meaning="mood"), "a condition's meaning is 'mood'"),
        (with_label(shape=[0]), r"the shape of y is \(0,\)"),
        (with_label(classes=0), "classes of y is 0"),
        (with_label(null="none"), "null of y is 'none'; it must be a whole number"),
        (changed(conditions=7), "damaged"),
    ],
)
def test_a_damaged_spec_is_refused_with_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        ModelSpec.from_json(text, source="unet.onnx")
    assert "The spec in unet.onnx is damaged" in str(caught.value)
    assert caught.value.hint == "Export the network again: ddpm-deploy export CHECKPOINT"


@pytest.mark.parametrize("missing", sorted(SPEC.to_dict().keys() - {"format"}))
def test_a_spec_without_a_field_is_damaged_or_takes_its_default(missing: str) -> None:
    data = SPEC.to_dict()
    del data[missing]
    if missing in {"sample_shape", "schedule", "conditions", "value_range"}:
        with pytest.raises(SpecError, match="damaged"):
            ModelSpec.from_dict(data)
    else:
        assert ModelSpec.from_dict(data).schedule == SPEC.schedule


@settings(deadline=None)  # the machine may be busy
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=5,
    ),
    st.sampled_from(sorted(SPEC.to_dict())),
)
def test_no_value_of_a_field_gives_anything_but_a_spec_or_a_spec_error(
    value: Any, name: str
) -> None:
    with suppress(SpecError):
        read = ModelSpec.from_dict({**SPEC.to_dict(), name: value})
        assert ModelSpec.from_json(read.to_json()) == read


# --- What a spec says ---


def test_a_spec_s_tables_are_those_of_its_settings() -> None:
    spec = ModelSpec(
        sample_shape=(1, 8, 8),
        schedule=cosine(100),
        prediction="v_prediction",
        variance="fixed_large",
        clip=2.0,
    )
    assert spec.table() == ddpm(
        cosine(100), prediction="v_prediction", variance="fixed_large", clip=2.0
    )
    assert spec.table("ddim", 10, eta=0.5, spacing="trailing") == ddim(
        cosine(100), 10, eta=0.5, prediction="v_prediction", clip=2.0, spacing="trailing"
    )
    assert spec.with_changes(sampler="ddim").table(steps=5) == spec.table("ddim", 5)
    assert SPEC.table() == dome272(linear())
    assert SPEC.table(steps=999) == dome272(linear())


@pytest.mark.parametrize(
    ("spec", "arguments", "message"),
    [
        (SPEC, {"steps": 50}, "neither a stride nor eta: 999 steps here"),
        (SPEC, {"eta": 0.5}, "neither a stride nor eta"),
        (SPEC, {"spacing": "trailing"}, "neither a stride nor eta"),
        (SPEC, {"sampler": "ddpm", "eta": 0.5}, "eta belongs to ddim"),
        (SPEC, {"sampler": "euler"}, "sampler is 'euler'; there are ddpm, ddim, dome272"),
        (SPEC, {"sampler": "ddpm", "steps": 1001}, "steps is 1001; this schedule has 1 to 1000"),
        (SPEC.with_changes(prediction="sample"), {}, "predict ε alone; this one gives sample"),
        (SPEC.with_changes(variance="learned"), {}, "with learned variance"),
    ],
)
def test_a_table_that_the_spec_does_not_have_is_refused(
    spec: ModelSpec, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        spec.table(**arguments)


def test_a_learned_variance_doubles_the_output_s_channels() -> None:
    for variance in ("fixed_small", "fixed_large"):
        assert SPEC.with_changes(variance=variance).output_shape == (3, 64, 64)
    for variance in ("learned", "learned_range"):
        assert SPEC.with_changes(variance=variance).output_shape == (6, 64, 64)
    sequence = ModelSpec(sample_shape=(7, 16), schedule=linear(), variance="learned")
    assert sequence.output_shape == (14, 16)


def test_the_label_is_found_among_the_conditions() -> None:
    observation = Condition(name="o", meaning="observation", dtype="float32", shape=(5,))
    assert SPEC.with_changes(conditions=(observation, LABEL)).label == LABEL
    assert SPEC.with_changes(conditions=(observation,)).label is None
    assert SPEC.with_changes(conditions=()).label is None


def test_a_change_that_makes_no_spec_is_refused() -> None:
    assert SPEC.with_changes(clip=3.0).clip == 3.0
    assert SPEC.clip is None
    changes: list[tuple[dict[str, Any], str]] = [
        ({"clip": 0.0}, "clip is 0.0; it must be a positive number"),
        ({"clip": math.nan}, "clip is nan"),
        ({"sample_shape": ()}, "sample_shape is"),
        ({"variance": "none"}, "variance is 'none'"),
    ]
    for fields, message in changes:
        with pytest.raises(ValueError, match=message):
            SPEC.with_changes(**fields)


def test_names_of_classes_travel_and_are_as_many_as_the_classes() -> None:
    condition = Condition(
        name="y", meaning="class_label", dtype="int64", classes=2, null=2, names=("cat", "dog")
    )
    spec = ModelSpec(sample_shape=(1, 8, 8), schedule=linear(10), conditions=(condition,))
    assert ModelSpec.from_json(spec.to_json()) == spec
    with pytest.raises(SpecError, match=r"y has 2 classes and 3 names"):
        ModelSpec.from_json(spec.to_json().replace('"cat"', '"cat", "cow"'))
