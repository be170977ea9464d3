from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_deploy import Engine, ModelSpec, SeededNoise, denoise, linear, open_engine
from ddpm_deploy.errors import ParityError
from ddpm_deploy.run import Recipe
from ddpm_deploy.verify import Budget, Comparison, Errors, Verifier
from ddpm_deploy.verify.compare import differing_fields
from tests.support import tiny_spec, write_graph
from tests.verify.verifications import verified

NONE = Errors(max=0.0, l2=0.0, cosine=1.0, psnr=float("inf"))


class Faulty(Engine):
    """Another engine with a fault of one kind."""

    name = "faulty"

    def __init__(
        self,
        good: Engine,
        *,
        later: int = 0,
        label: int = 0,
        bad: float = 0.0,
        from_t: int = -1,
        scale: float = 1.0,
        spec: ModelSpec | None = None,
    ) -> None:
        self.good, self.spec, self.path = good, spec or good.spec, good.path
        self.later, self.label, self.bad, self.from_t = later, label, bad, from_t
        self.scale = scale

    def _run(self, feeds: Mapping[str, Any]) -> np.ndarray:
        t = np.minimum(feeds["t"] + self.later, self.spec.schedule.T - 1)
        conditions = {name: feeds[name] for name in feeds if name not in {"x", "t"}}
        if self.label:
            conditions["y"] = (conditions["y"] + self.label) % 4
        out = self.good(feeds["x"], t, **conditions) * np.float32(self.scale)
        if self.bad and t[0] <= self.from_t:
            out[0, 0, 0, 0] = self.bad
        return out


def compare(
    reference: Engine, engine: Engine, recipe: Recipe | None = None, **settings: Any
) -> Comparison:
    verifier = Verifier(reference, engine, recipe or Recipe(), range(2), **settings)
    for _ in verifier:
        pass
    return verifier.result


def test_an_engine_is_itself_exactly(engine: Engine) -> None:
    result = compare(engine, engine)
    assert len(result.steps) == 20
    for step in result.steps:
        for side in (step.local, step.accumulated):
            assert side.out == side.x0 == side.x == NONE
    assert [step.t for step in result.steps] == list(range(19, -1, -1))
    assert result.failures == []
    assert result.amplification is None
    assert result.pictures is not None
    assert (result.pictures.equal, result.pictures.largest) == (1.0, 0)
    assert result.pictures.psnr == (float("inf"), float("inf"))
    assert result.pictures.ssim == (1.0, 1.0)
    assert result.to_dict()["pictures"]["psnr"] == [None, None]


def test_the_first_step_s_two_errors_are_one(tmp_path: Path, engine: Engine) -> None:
    # Both start from the same x_T, so nothing can have accumulated yet.
    other = open_engine(write_graph(tmp_path / "other.onnx", tiny_spec(), bias=1e-3))
    first, second, *_ = compare(engine, other).steps
    assert first.local == first.accumulated
    assert second.local.x != second.accumulated.x


def test_errors_are_what_they_say(tmp_path: Path, engine: Engine) -> None:
    bias = 1e-3
    other = open_engine(write_graph(tmp_path / "other.onnx", tiny_spec(), bias=bias))
    noise = SeededNoise(0, range(2), (1, 8, 8))
    table = engine.spec.table()
    wanted, given = (list(denoise(each, table, noise)) for each in (engine, other))
    steps = compare(engine, other).steps
    for step, w, g in zip(steps, wanted, given, strict=True):
        # A bias moves every output alike; 1e-3 is exact to a float32 ulp of the output.
        assert step.local.out.max * np.abs(w.out).max() == pytest.approx(bias, abs=2e-7)
        free = step.accumulated
        assert free.out.max == np.abs(g.out - w.out).max() / np.abs(w.out).max()
        assert free.x0.max == np.abs(g.x0 - w.x0).max() / np.abs(w.x0).max()
        assert free.x.max == np.abs(g.x - w.x).max() / np.abs(w.x).max()


def test_other_weights_are_outside_the_budget(tmp_path: Path, engine: Engine) -> None:
    other = open_engine(write_graph(tmp_path / "other.onnx", tiny_spec(), bias=0.05))
    result = compare(engine, other)
    worst = result.worst_local
    assert worst.local.out.max > 0.03
    assert result.failures[0] == (
        f"local error of the output: max {worst.local.out.max:.2g} at t = {worst.t}; budget 2e-05"
    )
    assert result.failures[1].startswith("local error of x: max ")
    assert result.failures[2].startswith(
        f"accumulated error of x: max {result.worst_accumulated.accumulated.x.max:.2g}"
    )
    assert "of pixels are within one level; budget 99.90%" in result.failures[3]
    assert result.pictures is not None
    assert all(np.isfinite(result.pictures.psnr))


def test_a_timestep_off_by_one_is_outside_the_budget(engine: Engine) -> None:
    result = compare(engine, Faulty(engine, later=1))
    assert result.failures[0].startswith("local error ")
    assert result.steps[0].local.out.max == 0  # T-1 has nothing after it, so the fault begins below
    # One timestep of write_graph's network is 1e-3 of an output whose peak is about 0.9.
    assert result.steps[5].local.out.max == pytest.approx(1.1e-3, rel=0.15)


def test_a_swapped_label_is_outside_the_budget(labelled: Engine) -> None:
    result = compare(labelled, Faulty(labelled, label=1), Recipe(labels=(0, 2)))
    assert result.failures[0].startswith("local error ")
    assert compare(labelled, labelled, Recipe(labels=(0, 2), guidance=3.0)).failures == []
    guided = compare(labelled, Faulty(labelled, label=1), Recipe(labels=(0,), guidance=3.0))
    assert guided.failures[0].startswith("local error ")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_first_step_that_is_not_finite_is_named(engine: Engine, bad: float) -> None:
    result = compare(engine, Faulty(engine, bad=bad, from_t=6))
    assert result.not_finite is not None
    assert (result.not_finite.t, result.not_finite.k, result.not_finite.where) == (6, 14, "local")
    assert [step.t for step in result.steps] == list(range(19, 6, -1))
    assert result.failures == ["numbers are not finite from t = 6 (step 14) on"]
    at_once = compare(engine, Faulty(engine, bad=bad, from_t=19))
    assert at_once.steps == ()
    assert at_once.pictures is None
    assert at_once.failures == ["numbers are not finite from t = 19 (step 1) on"]


def test_a_reference_that_is_not_finite_is_no_reference(engine: Engine) -> None:
    broken = Faulty(engine, bad=float("inf"), from_t=6)
    with pytest.raises(
        ParityError, match="reference itself gives numbers that are not finite at t = 6"
    ):
        compare(broken, engine)


def test_a_small_fault_stays_inside_a_larger_budget(engine: Engine) -> None:
    other = Faulty(engine, scale=1 + 1e-4)
    assert compare(engine, other).failures[0].startswith("local error of the output: max 0.0001")
    larger = Budget().changed(local=2e-4, accumulated=1e-2)
    assert compare(engine, other, budget=larger).failures == []


def test_samples_of_another_shape_cannot_be_compared(tmp_path: Path, engine: Engine) -> None:
    larger = open_engine(write_graph(tmp_path / "larger.onnx", tiny_spec(size=16)))
    with pytest.raises(ParityError, match=r"samples of \(1, 16, 16\).* of \(1, 8, 8\)"):
        compare(larger, engine)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"schedule": linear(20, start=1e-3, end=0.1)},
            "schedule: linear (start 0.001, end 0.2), T = 20 in the reference, "
            "linear (start 0.001, end 0.1), T = 20 in the engine",
        ),
        ({"clip": None}, "clip: 1.0 in the reference, None in the engine"),
        (
            {"prediction": "v_prediction"},
            "prediction: epsilon in the reference, v_prediction in the engine",
        ),
        ({"first_timestep": 1}, "first_timestep: 0 in the reference, 1 in the engine"),
    ],
)
def test_specs_that_differ_are_named_with_both_values(changes: dict[str, Any], line: str) -> None:
    name, _, values = line.partition(": ")
    assert differing_fields(tiny_spec(), replace(tiny_spec(), **changes)) == {name: values}


def test_origin_and_version_may_differ() -> None:
    other = replace(tiny_spec(), checkpoint_sha256="0" * 64, tool_version="9", sampler="ddim")
    assert differing_fields(tiny_spec(), other) == {}


@pytest.mark.parametrize("shape", [(4,), (2, 6), (2, 5, 5), (2, 3, 4, 4)])
def test_samples_of_any_rank_are_compared(tmp_path: Path, shape: tuple[int, ...]) -> None:
    class Halving(Engine):
        name = "halving"
        path = tmp_path / "none"
        spec = replace(tiny_spec(), sample_shape=shape)

        def _run(self, feeds: Mapping[str, Any]) -> np.ndarray:
            return np.asarray(feeds["x"] / 2)

    result = compare(Halving(), Halving())
    assert result.pictures is not None
    assert (len(result.pictures.psnr), result.pictures.equal, result.failures) == (2, 1.0, [])


def test_json_has_no_infinite_number(tmp_path: Path) -> None:
    # A walk gives one where the engine's numbers end and the reference's do not.
    jump = {"tensor": "conv", "local": float("inf"), "error": float("nan")}
    found = replace(verified(tmp_path), bisection={"t": 3, "jumps": [jump]})
    said = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert said["bisection"] == {
        "t": 3,
        "jumps": [{"tensor": "conv", "local": None, "error": None}],
    }
