"""A recorded loop as the reference, and as the deployed side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_deploy import Engine, SeededNoise, open_engine
from ddpm_deploy.errors import ParityError, TraceError
from ddpm_deploy.run import Recipe
from ddpm_deploy.sampling import Step
from ddpm_deploy.verify import (
    Comparison,
    Trace,
    Verifier,
    engine_loop,
    read_trace,
    record,
    write_trace,
)
from ddpm_deploy.verify.compare import Side
from ddpm_deploy.verify.trace import loop_steps
from ddpm_deploy.verify.verification import described, verify
from tests.support import tiny_spec, write_graph
from tests.verify.conftest import DEMO

RECIPE = Recipe(seed=5, sampler="ddpm")
IMAGES = range(3)


def compare(
    reference: Side, engine: Side, recipe: Recipe | None = None, images: Sequence[int] = IMAGES
) -> Comparison:
    verifier = Verifier(reference, engine, recipe, images)
    for _ in verifier:
        pass
    return verifier.result


def recorded(engine: Engine, recipe: Recipe = RECIPE, *, keep: int | None = None) -> Trace:
    return record(
        loop_steps(engine_loop(engine, recipe, IMAGES)),
        spec=engine.spec,
        recipe=recipe,
        images=IMAGES,
        keep=keep,
        source=described(engine),
    )


@pytest.mark.parametrize("keep", [None, 5])
def test_a_checkpoint_s_trace_stands_in_for_it(
    demo: Path, tmp_path: Path, keep: int | None
) -> None:
    recipe = Recipe(seed=5, sampler="ddim", steps=12, eta=0.5, labels=(0, 2))
    with (
        open_engine(DEMO, threads=1) as checkpoint,
        open_engine(demo, threads=1) as deployed,
    ):
        live = compare(checkpoint, deployed, recipe)
        write_trace(tmp_path / "ckpt.trace", recorded(checkpoint, recipe, keep=keep))
        trace = read_trace(tmp_path / "ckpt.trace")
        found = compare(trace, deployed)
    assert found.passed
    assert [step.k for step in found.steps] == sorted(trace.steps)
    at = {step.k: step for step in live.steps}
    # PyTorch gives the same bits again, so every number is the same, not almost.
    assert found.steps == tuple(at[step.k] for step in found.steps)
    assert found.pictures == live.pictures
    assert found.worst_local in live.steps


def test_other_weights_fail_against_a_trace_as_against_the_engine(
    tmp_path: Path, engine: Engine
) -> None:
    other = open_engine(write_graph(tmp_path / "other.onnx", tiny_spec(), bias=0.05))
    assert compare(recorded(engine), other).steps == compare(engine, other, RECIPE).steps
    assert not compare(recorded(engine, keep=3), other).passed


def test_the_trace_decides_sampler_seed_and_images(engine: Engine) -> None:
    trace = recorded(engine, Recipe(seed=9, sampler="ddim", steps=4))
    verifier = Verifier(trace, engine, Recipe(seed=1), range(7))
    assert verifier.recipe == trace.recipe
    assert tuple(verifier.images) == (0, 1, 2)
    steps = list(verifier)
    assert [step.t for step in steps] == [15, 10, 5, 0]
    assert {step.accumulated.x.max for step in steps} == {0.0}


def of_checkpoint(path: Path, digest: str) -> Engine:
    return open_engine(write_graph(path, replace(tiny_spec(), checkpoint_sha256=digest)))


@pytest.mark.parametrize("as_reference", [True, False])
def test_a_foreign_model_s_trace_is_refused(tmp_path: Path, as_reference: bool) -> None:
    trace = recorded(of_checkpoint(tmp_path / "a.onnx", "a" * 64))
    foreign = of_checkpoint(tmp_path / "b.onnx", "b" * 64)
    sides: tuple[Side, Side] = (trace, foreign) if as_reference else (foreign, trace)
    with pytest.raises(TraceError, match=r"SHA-256 aaaaaaaaaaaa…, and .*b\.onnx comes from bbbb"):
        Verifier(*sides)
    same = of_checkpoint(tmp_path / "c.onnx", "a" * 64)
    assert compare(trace, same).passed


def test_a_trace_without_a_checkpoint_s_hash_is_compared(tmp_path: Path, engine: Engine) -> None:
    # Nothing says that it is another model, so the numbers do.
    assert compare(recorded(engine), of_checkpoint(tmp_path / "a.onnx", "a" * 64)).passed


def test_two_traces_are_refused(engine: Engine) -> None:
    with pytest.raises(ParityError, match="Both sides are traces"):
        Verifier(recorded(engine), recorded(engine))


def test_a_trace_of_other_samples_is_refused(tmp_path: Path, engine: Engine) -> None:
    larger = open_engine(write_graph(tmp_path / "larger.onnx", tiny_spec(size=16)))
    with pytest.raises(ParityError, match=r"The reference makes samples of \(1, 8, 8\)"):
        Verifier(recorded(engine), larger)


def own_loop(engine: Engine, *, fault: str = "") -> Iterator[Step]:
    """DDIM as in Song et al. 2021, Eq. 12 at η = 0, written for itself.

    It is given the network and the noise, and nothing else of ours.
    """
    alpha_bar = np.cumprod(1 - np.linspace(1e-3, 0.2, 20))
    visited = [15, 10, 5, 0]
    x = SeededNoise(5, IMAGES, (1, 8, 8))(0)
    for k, t in enumerate(visited, start=1):
        a = alpha_bar[t]
        before = alpha_bar[visited[k]] if k < 4 else 1.0
        index = t + 1 if fault == "late" and t < 19 else t
        out = engine(x, np.full(len(x), index, dtype=np.int64))
        x0 = (x - np.sqrt(1 - a) * out) / np.sqrt(a)
        if fault != "unclipped":
            x0 = x0.clip(-1, 1)
        direction = (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
        result = np.sqrt(before) * x0 + np.sqrt(1 - before) * direction
        if fault == "nan" and k == 3:
            result[0, 0, 0, 0] = np.nan
        arrays = (np.asarray(array, dtype=np.float32) for array in (x, out, x0, result))
        x_t, out, x0, x = arrays
        yield Step(k=k, t=t, x_t=x_t, out=out, x0=x0, x=x)


def of_own_loop(engine: Engine, *, fault: str = "", keep: int | None = None) -> Trace:
    with np.errstate(invalid="ignore"):
        return record(
            own_loop(engine, fault=fault),
            spec=engine.spec,
            recipe=Recipe(seed=5, sampler="ddim", steps=4),
            images=IMAGES,
            keep=keep,
        )


def test_a_loop_of_one_s_own_is_verified_by_its_trace(tmp_path: Path, engine: Engine) -> None:
    write_trace(tmp_path / "own.trace", of_own_loop(engine))
    found = verify(read_trace(tmp_path / "own.trace"), engine)
    assert found.passed, found.comparison.failures
    assert found.comparison.worst_accumulated.accumulated.x.max < 1e-5  # float64 in between
    assert [step.t for step in found.comparison.steps] == [15, 10, 5, 0]
    assert found.images == (0, 1, 2)


@pytest.mark.parametrize("fault", ["late", "unclipped"])
def test_a_fault_of_one_s_own_loop_is_found(engine: Engine, fault: str) -> None:
    assert not compare(engine, of_own_loop(engine, fault=fault)).passed


def test_the_step_of_one_s_own_loop_that_is_not_finite_is_named(engine: Engine) -> None:
    bad = compare(engine, of_own_loop(engine, fault="nan")).not_finite
    assert bad is not None
    assert (bad.k, bad.t, bad.where) == (3, 5, "local")


def test_a_step_fed_numbers_that_are_not_finite_is_not_to_blame(engine: Engine) -> None:
    bad = compare(engine, of_own_loop(engine, fault="nan", keep=2)).not_finite  # steps 1 and 4
    assert bad is not None
    assert (bad.k, bad.t, bad.where) == (4, 0, "accumulated")


def test_a_state_beyond_what_the_reference_bears_is_the_loop_s_fault() -> None:
    class Halving(Engine):
        """Overflows as a network with squares in its norms does."""

        name, path, spec = "halving", Path("none"), tiny_spec()

        def _run(self, feeds: Mapping[str, Any]) -> np.ndarray:
            return np.where(np.abs(feeds["x"]) > 1e19, np.inf, feeds["x"] / 2).astype(np.float32)

    good = Halving()
    loop = engine_loop(good, RECIPE, IMAGES)
    steps = list(loop_steps(loop))
    steps[9] = replace(steps[9], x=steps[9].x * np.float32(1e20))
    steps[10] = replace(steps[10], x_t=steps[9].x)
    found = compare(good, record(steps, spec=good.spec, recipe=RECIPE, images=IMAGES))
    assert len(found.steps) == 20
    assert found.not_finite is None
    assert not found.passed


def test_the_pictures_that_a_loop_made_itself_are_compared(engine: Engine) -> None:
    own = of_own_loop(engine)
    black = np.zeros((3, 8, 8, 1), dtype=np.uint8)
    found = compare(engine, replace(own, pictures=black))
    assert found.pictures is not None
    assert found.pictures.equal < 0.5
    assert not found.passed


def test_a_recorded_engine_has_the_budget_of_its_precision(tmp_path: Path) -> None:
    good = open_engine(write_graph(tmp_path / "unet.onnx", tiny_spec()))
    loop = engine_loop(good, Recipe(), range(2))
    kinds = {"fp16": 5e-3, "bf16": 4e-2, "fp32": 2e-5, "whatever": 2e-5}
    for precision, bound in kinds.items():
        source = {"precision": precision}
        trace = record(
            loop_steps(loop), spec=good.spec, recipe=Recipe(), images=range(2), source=source
        )
        found = verify(trace, good)
        assert found.comparison.budget.bound("local", "out") == bound
