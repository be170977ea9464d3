from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from ddpm_deploy import Engine, ModelSpec, SeededNoise, open_engine
from ddpm_deploy.arrays import Samples, Timesteps
from ddpm_deploy.export.calibrate import sampled
from ddpm_deploy.export.precision import convert
from ddpm_deploy.export.rounding import rounded
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.model.checkpoint import load_network
from ddpm_deploy.precision import Half
from ddpm_deploy.run import Recipe
from ddpm_deploy.schedule import Schedule, linear
from ddpm_deploy.verify import Verifier
from ddpm_deploy.verify.budget import ARITHMETICS, UNIT_ROUNDOFF, Arithmetic
from ddpm_deploy.verify.compare import Comparison
from ddpm_deploy.verify.expect import (
    SHARE,
    Expectation,
    disturbed,
    expected,
    rounding_gain,
    split,
)
from ddpm_deploy.verify.loops import Loop, engine_loop

DIGITS = Path(__file__).parents[2] / "demo" / "digits.pt"
RECIPE = Recipe(sampler="ddim", steps=25)
IMAGES = range(4)
HALVES: tuple[Half, ...] = ("fp16", "bf16")


def linear_loop(a: float, *, images: int = 4, size: int = 64, clip: float | None = None) -> Loop:
    """A loop of a network out = a·x, whose errors can be summed by hand."""
    spec = ModelSpec(sample_shape=(1, size, size), schedule=linear(20, start=1e-3, end=0.2))
    noise = SeededNoise(0, range(images), spec.sample_shape)
    table = spec.table("ddim", 20)
    rows = [vars(row) | {"clip": clip} for row in table]
    return Loop(
        lambda x, _: np.float32(a) * x, [type(table[0])(**row) for row in rows], noise, spec=spec
    )


def compared(loop: Loop, other: Loop, images: range = IMAGES) -> Comparison:
    verifier = Verifier(loop, other, Recipe(sampler="ddim", steps=20), images)
    for _ in verifier:
        pass
    return verifier.result


@pytest.mark.parametrize("persistent", [0.0, 0.5, 1.0])
def test_a_linear_loop_accumulates_what_its_table_says(persistent: float) -> None:
    a, level = 0.8, 1e-3
    loop = linear_loop(a)
    result = compared(loop, disturbed(loop, level, persistent=persistent))
    # x_s = g x_t + h out', and the error e_s = g e_t + h d_t with d_t the noise of the step: the
    # persistent part adds up, the squares of the fresh ones do.
    same, fresh = 0.0, 0.0
    x = loop.start()
    for k, (row, step) in enumerate(zip(loop.table, result.steps, strict=True), start=1):
        h = row.x_from_x0 * row.x0_from_out + row.x_from_out
        g = row.x_from_x0 * row.x0_from_x + row.x_from_x + a * h
        noise = level * a * np.sqrt(np.mean(x.astype(np.float64) ** 2))
        x = loop.step(k, x).x
        same = g * same + h * persistent * noise
        fresh = g**2 * fresh + (h * noise) ** 2 * (1 - persistent**2)
        wanted = np.sqrt(same**2 + fresh) / np.sqrt(np.mean(x.astype(np.float64) ** 2))
        # Of the worst of four images of 4096 numbers, whose noise has its size within 1 %; its
        # parts are uncorrelated within 1/64.
        assert step.accumulated.x.l2 == pytest.approx(wanted, rel=0.08)
        assert step.local.out.l2 == pytest.approx(level, rel=0.06)


def test_a_network_that_only_rounds_its_result_has_the_gain_one() -> None:
    loop = linear_loop(0.5)
    x, t = loop.start(), np.zeros(4, np.int64)
    out = loop.predict(x, t)
    gain = rounding_gain(loop.predict, x, t, out)
    assert gain == pytest.approx(np.sqrt(np.mean(out.astype(np.float64) ** 2)))


def test_a_network_that_takes_small_differences_has_a_large_gain() -> None:
    def cancelling(x: Samples, t: Timesteps) -> Samples:
        return (x + np.float32(4096)) - np.float32(4096)

    x, t = linear_loop(1.0).start(), np.zeros(4, np.int64)
    # x's digits below 4096's ulp 2^-11 are lost, so a neighbour either gives the same or is 2^-11
    # away: far more than a neighbour's own distance, 2^-24 or so.
    assert rounding_gain(cancelling, x, t, cancelling(x, t)) > 5


def test_the_noise_is_the_same_at_each_call() -> None:
    loop = disturbed(linear_loop(0.8), 1e-2)
    x = loop.start()
    np.testing.assert_array_equal(loop.step(3, x).out, loop.step(3, x).out)
    assert not np.array_equal(loop.step(3, x).out, loop.step(4, x).out)


def test_expectations_are_in_proportion_to_the_unit_roundoff() -> None:
    loop = linear_loop(0.8)
    found = expected(loop, Recipe(sampler="ddim", steps=20), IMAGES)
    assert tuple(found) == ARITHMETICS
    fp16, bf16 = found["fp16"], found["bf16"]
    for error, quantity in (("local", "out"), ("accumulated", "x")):
        assert bf16.worst(error, quantity) == pytest.approx(8 * fp16.worst(error, quantity))  # type: ignore[arg-type]
    assert bf16.amplification == pytest.approx(fp16.amplification)
    assert [found[a].pictures.close for a in ("fp32", "fp16", "bf16", "int8")] == sorted(
        (found[a].pictures.close for a in ARITHMETICS if a != "tf32"), reverse=True
    )


def test_the_amplification_is_what_a_comparison_calls_so() -> None:
    loop = linear_loop(0.8)
    fp16 = expected(loop, Recipe(sampler="ddim", steps=20), IMAGES)["fp16"]
    level = SHARE["fp16"] * UNIT_ROUNDOFF["fp16"]
    assert fp16.amplification == pytest.approx(compared(loop, disturbed(loop, level)).amplification)


def test_a_network_that_gives_zeros_has_no_amplification() -> None:
    fp16 = expected(linear_loop(0.0), Recipe(sampler="ddim", steps=20), IMAGES)["fp16"]
    assert fp16.amplification is None
    assert fp16.to_dict()["amplification"] is None
    assert min(limit.bound for limit in fp16.budget().limits) > 0


def test_clipping_bounds_the_error_of_x_0() -> None:
    recipe = Recipe(sampler="ddim", steps=20)
    free = expected(linear_loop(30.0), recipe, IMAGES)["int8"]
    clipped = expected(linear_loop(30.0, clip=1.0), recipe, IMAGES)["int8"]
    assert clipped.worst("local", "x0") <= 2.0
    assert free.ranges[-1].errors["local", "out"] > 0


def test_a_larger_factor_allows_more() -> None:
    loop, recipe = linear_loop(0.8), Recipe(sampler="ddim", steps=20)
    twice, four = (
        expected(loop, recipe, IMAGES, factor=factor)["bf16"].budget() for factor in (2.0, 4.0)
    )
    for one, two in zip(twice.limits, four.limits, strict=True):
        assert two.bound == pytest.approx(2 * one.bound, rel=0.01)
    assert four.pixels <= twice.pixels
    assert four.psnr is not None
    assert twice.psnr is not None
    assert four.psnr <= twice.psnr


def test_no_limit_is_below_the_loop_s_own_digits() -> None:
    budget = expected(linear_loop(0.8), Recipe(sampler="ddim", steps=20), IMAGES)["fp32"].budget()
    assert min(limit.bound for limit in budget.limits) >= 9.5e-7
    assert budget.pixels == 0.999


@pytest.mark.parametrize(
    ("schedule", "visited"),
    [
        (linear(1000), range(1000)),
        (linear(1000), range(0, 1000, 20)),
        (linear(20, start=1e-3, end=0.2), (19, 7, 0)),
        (linear(20, start=1e-3, end=0.2), (5,)),
    ],
)
def test_ranges_are_the_whole_schedule_once(schedule: Schedule, visited: range) -> None:
    ranges = split(schedule, visited, 6)
    assert 1 <= len(ranges) <= 6
    covered = [t for first, last in ranges for t in range(first, last + 1)]
    assert covered == list(range(schedule.T))
    assert all(any(first <= t <= last for t in visited) for first, last in ranges)


def test_ranges_are_narrow_where_little_noise_is_left() -> None:
    # log SNR of the linear schedule runs from 9.2 at t = 0 to -10 at 999 (Ho et al. 2020's β).
    widths = [last - first + 1 for first, last in split(linear(1000), range(1000), 6)]
    assert widths[0] < 20
    assert widths[1] < 100
    assert min(widths[2:]) > 100


class Digits:
    """The trained network of demo/, in float32 and in both half precisions rounded for real."""

    def __init__(self, folder: Path) -> None:
        loaded = load_network(DIGITS)
        graph = folder / "digits.onnx"
        export_network(loaded.network, loaded.spec, graph)
        self.graphs: dict[str, onnx.ModelProto] = {}
        self.engine = open_engine(graph, threads=1, device="cpu")
        self.half: dict[str, Engine] = {}
        for precision in HALVES:
            mixed = convert(onnx.load(graph), precision).model
            path = folder / f"{precision}.onnx"
            onnx.save_model(rounded(mixed), path)
            self.graphs[precision] = mixed
            self.half[precision] = open_engine(path, threads=1, device="cpu")
        self.expected: Mapping[Arithmetic, Expectation] = expected(
            engine_loop(self.engine, RECIPE, IMAGES), RECIPE, IMAGES
        )

    def compare(self, precision: Half, budget: Arithmetic) -> Comparison:
        """Compares a half precision with float32, within the budget of an arithmetic."""
        verifier = Verifier(
            self.engine,
            self.half[precision],
            RECIPE,
            IMAGES,
            budget=self.expected[budget].budget(),
        )
        for _ in verifier:
            pass
        return verifier.result


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize("precision", HALVES)
def test_a_trained_network_errs_in_half_precision_as_was_expected(
    digits: Digits, precision: Half
) -> None:
    result = digits.compare(precision, precision)
    assert result.failures == []
    expectation = digits.expected[precision]
    for error, quantity in (("local", "out"), ("local", "x0"), ("accumulated", "x")):
        for part in expectation.ranges:
            measured = max(
                getattr(getattr(step, error), quantity).max
                for step in result.steps
                if part.first <= step.t <= part.last
            )
            # Within a factor of three, at every noise level of the schedule.
            assert 1 / 3 < measured / part.errors[error, quantity] < 3  # type: ignore[index]


def test_fp16_s_budget_refuses_bf16_by_its_errors_everywhere(digits: Digits) -> None:
    failed = {c.name for c in digits.compare("bf16", "fp16").checks if not c.passed}
    parts = digits.expected["fp16"].ranges
    local = {name for name in failed if name.startswith("local/out/max/t=")}
    assert len(local) == len(parts)
    assert any(name.startswith("accumulated/x/max/t=") for name in failed)


def test_half_precision_computed_in_its_own_type_has_the_same_curves(digits: Digits) -> None:
    # onnx.reference computes in NumPy's float16 and in bfloat16: nothing is simulated there.
    calls = sampled(digits.engine, 4, 2, seed=3)
    curves: dict[str, list[float]] = {}
    for precision in HALVES:
        evaluator: Any = ReferenceEvaluator(digits.graphs[precision])
        true = [evaluator.run(["out"], dict(call.feeds))[0] for call in calls]
        ours = [digits.half[precision](**call.feeds) for call in calls]
        curves[precision] = [_rms(out - call.out) for out, call in zip(true, calls, strict=True)]
        simulated = [_rms(out - call.out) for out, call in zip(ours, calls, strict=True)]
        # Two roundings of 128 numbers in another order of sums: the same size within 30 %.
        assert simulated == pytest.approx(curves[precision], rel=0.3)
    ratios = [b / f for b, f in zip(curves["bf16"], curves["fp16"], strict=True)]
    # bf16 has three bits less.
    assert ratios == pytest.approx([UNIT_ROUNDOFF["bf16"] / UNIT_ROUNDOFF["fp16"]] * 4, rel=0.4)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))
