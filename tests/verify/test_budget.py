from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ddpm_deploy import linear
from ddpm_deploy.errors import BudgetError
from ddpm_deploy.verify import Budget, Comparison, Errors, Limit, PictureErrors, read_budget
from ddpm_deploy.verify.budget import (
    ARITHMETICS,
    QUANTITIES,
    UNIT_ROUNDOFF,
    Arithmetic,
    ErrorKind,
    Quantity,
)
from ddpm_deploy.verify.compare import StepErrors, StepParts
from ddpm_deploy.verify.measures import MEASURES, Measure

NONE = Errors(max=0.0, l2=0.0, cosine=1.0, psnr=math.inf)


def step(t: int, **parts: Errors) -> StepErrors:
    """A step with errors, by `local_out`, `accumulated_x`, ..., and none otherwise."""
    sides = {
        side: StepParts(**{q: parts.get(f"{side}_{q}", NONE) for q in QUANTITIES})
        for side in ("local", "accumulated")
    }
    return StepErrors(k=1000 - t, t=t, **sides)


def found(*steps: StepErrors, budget: Budget, pictures: PictureErrors | None = None) -> Comparison:
    return Comparison(
        steps=steps,
        not_finite=None,
        pictures=pictures,
        budget=budget,
        spec_differences={},
        lengths=(1000, 1000),
        kept=(),
    )


def only(*limits: Limit, **pictures: Any) -> Budget:
    return Budget(limits=limits, **{"pixels": 0.0, "equal": 0.0, "bias": 255.0, **pictures})


def read(tmp_path: Path, text: str) -> Budget:
    path = tmp_path / "budget.toml"
    path.write_text(text, encoding="utf-8")
    return read_budget(path)


CASES: dict[Measure, tuple[float, float, float]] = {
    "max": (1e-3, 1e-3, 1.001e-3),
    "l2": (1e-3, 0.0, 2e-3),
    "cosine": (0.99, 0.99, 0.98),
    "psnr": (40.0, math.inf, 39.9),
}
"""A bound of each measure, a value inside and one outside."""


@pytest.mark.parametrize("error", ["local", "accumulated"])
@pytest.mark.parametrize("quantity", QUANTITIES)
@pytest.mark.parametrize("measure", MEASURES)
def test_a_limit_holds_its_own_number_alone(
    error: ErrorKind, quantity: Quantity, measure: Measure
) -> None:
    bound, inside, outside = CASES[measure]
    limit = Limit(error=error, quantity=quantity, measure=measure, bound=bound)
    for value, passed in ((inside, True), (outside, False), (math.nan, False)):
        errors = replace(NONE, **{measure: value})
        result = found(step(5, **{f"{error}_{quantity}": errors}), budget=only(limit))
        assert result.passed is passed
        (named,) = [check for check in result.checks if check.name == limit.name]
        assert (named.t, named.bound) == (5, bound)
    bad = Errors(max=9.0, l2=9.0, cosine=-1.0, psnr=-9.0)
    others = {f"{e}_{q}" for e in ("local", "accumulated") for q in QUANTITIES}
    rest = dict.fromkeys(others - {f"{error}_{quantity}"}, bad)
    assert found(step(5, **rest), budget=only(limit)).passed


@pytest.mark.parametrize(
    ("first", "last", "held"),
    [(0, None, {0, 4, 9}), (4, None, {4, 9}), (0, 4, {0, 4}), (4, 4, {4}), (5, 8, set())],
)
def test_a_limit_holds_over_its_range_with_both_ends(
    first: int, last: int | None, held: set[int]
) -> None:
    limit = Limit(error="local", quantity="out", bound=1e-3, first=first, last=last)
    for t in (0, 4, 9):
        steps = [step(s, local_out=replace(NONE, max=1.0 if s == t else 0.0)) for s in (9, 4, 0)]
        assert found(*steps, budget=only(limit)).passed is (t not in held)


def test_the_worst_step_is_the_largest_error_or_the_least_likeness() -> None:
    steps = [
        step(t, local_out=replace(NONE, max=error, cosine=1 - error))
        for t, error in ((9, 1e-4), (4, 3e-4), (0, 2e-4))
    ]
    measures: tuple[Measure, ...] = ("max", "cosine")
    for measure in measures:
        limit = Limit(error="local", quantity="out", measure=measure, bound=0.5)
        assert limit.worst(steps) is steps[1]
    assert Limit(error="local", quantity="out", bound=0.5).worst([]) is None


def test_limits_are_told_apart_by_name() -> None:
    names = [
        Limit(error="local", quantity="out", bound=1.0).name,
        Limit(error="local", quantity="x0", measure="psnr", bound=1.0, first=3).name,
        Limit(error="accumulated", quantity="x", bound=1.0, last=9).name,
        Limit(error="accumulated", quantity="x", bound=1.0, first=3, last=9).name,
    ]
    assert names == [
        "local/out/max",
        "local/x0/psnr/t=3..",
        "accumulated/x/max/t=0..9",
        "accumulated/x/max/t=3..9",
    ]


GOOD = PictureErrors(
    psnr=(math.inf, 42.0), ssim=(1.0, 0.995), equal=0.9, close=0.96, largest=2, bias=-0.1
)
BAD = PictureErrors(
    psnr=(50.0, 40.0), ssim=(1.0, 0.98), equal=0.8, close=0.94, largest=9, bias=-0.3
)


@pytest.mark.parametrize(
    ("name", "bound"),
    [("pixels", 0.95), ("equal", 0.9), ("bias", 0.1), ("psnr", 41.0), ("ssim", 0.99)],
)
def test_pictures_have_limits_of_their_own(name: str, bound: float) -> None:
    budget = only(**{name: bound})
    assert found(step(0), budget=budget, pictures=GOOD).passed
    failed = [c for c in found(step(0), budget=budget, pictures=BAD).checks if not c.passed]
    assert [check.name for check in failed] == [name]


def test_a_general_budget_allows_what_the_steps_of_a_loop_magnify() -> None:
    fitted = Budget.of("fp32").over(100.0, values=10_000)
    assert fitted.bound("local", "out") == 2e-5
    assert fitted.bound("local", "x") == pytest.approx(2e-3)
    assert fitted.bound("accumulated", "x") == pytest.approx(2e-3)  # a single step's at least
    assert fitted.pixels == pytest.approx(0.9)
    assert (fitted.equal, fitted.bias) == (0.0, 10.0)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_general_budget_stays_where_no_step_magnifies(arithmetic: Arithmetic) -> None:
    budget = Budget.of(arithmetic)
    assert budget.over(0.02, values=10_000) == budget


def test_a_pixel_may_lie_at_the_edge_between_two_levels() -> None:
    assert Budget.of("fp32").over(1.0, values=64).equal == 63 / 64


def test_what_somebody_asked_for_is_held_to_the_letter() -> None:
    asked = Budget.of("fp32").changed(local=1e-6, accumulated=1e-5, pixels=1.0)
    assert asked.over(157.0, values=64) == asked
    written = Budget(limits=(Limit(error="local", quantity="x", bound=1e-6),), equal=1.0)
    assert written.over(157.0, values=64) == written


def test_an_input_that_is_rounded_may_cost_epsilon_more_where_it_is_small() -> None:
    schedule = linear(1000, start=1e-4, end=0.02)
    budget = Budget.of("bf16").with_input_rounded(schedule, 2.0**-8)
    bounds = [budget.bound_at("local", "out", t) or 0.0 for t in range(1000)]
    assert bounds == sorted(bounds, reverse=True)
    for t, bound in enumerate(bounds):
        exact = 4e-2 + 2.0**-8 / math.sqrt(1 - schedule.alpha_bar[t])
        assert exact <= bound * (1 + 1e-9)
        assert bound <= 4e-2 + 2 * (exact - 4e-2)
    assert budget.bound("local", "x") == Budget.of("bf16").bound("local", "x")


def test_samples_that_are_no_pictures_have_no_likeness() -> None:
    rows = replace(BAD, ssim=())
    assert found(step(0), budget=only(ssim=0.99), pictures=rows).passed


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_a_default_budget_allows_more_than_one_rounding(arithmetic: Arithmetic) -> None:
    budget = Budget.of(arithmetic)
    local, accumulated = budget.bound("local", "out"), budget.bound("accumulated", "x")
    assert local is not None
    assert accumulated is not None
    assert local > UNIT_ROUNDOFF[arithmetic]
    assert accumulated >= local
    assert budget.bound("local", "x0") is None


@pytest.mark.parametrize(
    ("fine", "coarse"),
    [("fp32", "tf32"), ("fp32", "fp16"), ("fp16", "bf16"), ("bf16", "int8")],
)
def test_default_budgets_grow_with_the_roundoff(fine: Arithmetic, coarse: Arithmetic) -> None:
    less, more = Budget.of(fine), Budget.of(coarse)
    assert [limit.name for limit in less.limits] == [limit.name for limit in more.limits]
    pairs = zip(less.limits, more.limits, strict=True)
    assert all(one.bound < two.bound for one, two in pairs)
    assert less.pixels > more.pixels


def test_a_budget_comes_back_from_its_file(tmp_path: Path) -> None:
    budget = Budget(
        limits=(
            Limit(error="local", quantity="out", bound=2.5e-5),
            Limit(error="local", quantity="x0", measure="l2", bound=0.125, first=10, last=99),
            Limit(error="accumulated", quantity="x", measure="cosine", bound=0.999, last=0),
            Limit(error="accumulated", quantity="out", measure="psnr", bound=40.0, first=900),
        ),
        pixels=0.97,
        equal=0.5,
        bias=2.0,
        psnr=41.5,
        ssim=0.99,
    )
    text = budget.to_toml(comment='two lines\n\n"quoted" # and [[limit]]')
    assert text.startswith('# two lines\n#\n# "quoted" # and [[limit]]\nformat = 1\n')
    assert read(tmp_path, text) == budget


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_default_budgets_come_back_from_their_files(tmp_path: Path, arithmetic: Arithmetic) -> None:
    assert read(tmp_path, Budget.of(arithmetic).to_toml()) == Budget.of(arithmetic)


def test_numbers_of_numpy_are_written_as_numbers(tmp_path: Path) -> None:
    import numpy as np

    limit = Limit(error="local", quantity="out", bound=np.float64(1e-3))
    assert read(tmp_path, only(limit, psnr=np.float64(40.5)).to_toml()) == only(limit, psnr=40.5)


def test_what_a_file_leaves_open_is_open(tmp_path: Path) -> None:
    budget = read(tmp_path, '[[limit]]\nerror = "local"\nquantity = "out"\nat_most = 1\n')
    assert budget == only(Limit(error="local", quantity="out", bound=1.0))
    assert read(tmp_path, "pixels = 0.5") == only(pixels=0.5)
    with pytest.raises(BudgetError, match="it would allow everything"):
        read(tmp_path, "format = 1")


def test_a_wider_bound_replaces_the_default_and_leaves_the_rest() -> None:
    psnr = Limit(error="local", quantity="out", measure="psnr", bound=40.0)
    budget = Budget(limits=(*Budget.of("fp16").limits, psnr), psnr=30.0)
    changed = budget.changed(local=0.5, pixels=0.1)
    assert changed.bound("local", "out") == 0.5
    assert changed.bound("accumulated", "x") == budget.bound("accumulated", "x")
    assert psnr in changed.limits
    assert (changed.pixels, changed.psnr) == (0.1, 30.0)
    assert budget.changed() == budget


LIMIT = '[[limit]]\nerror = "local"\nquantity = "out"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limit = ", "no budget: Invalid value"),
        ("format = 2", "its format is 2; this release reads 1"),
        ("format = true", "its format is True; this release reads 1"),
        (
            "precision = 1",
            "it has precision; there are pixels, equal, bias, psnr, ssim and [[limit]]",
        ),
        ("pixels = '0.9'", "pixels is '0.9'; it is a number from 0 to 1"),
        ("pixels = true", "pixels is True; it is a number from 0 to 1"),
        ("pixels = 99", "pixels is 99; it is a number from 0 to 1"),
        ("pixels = -0.1", "pixels is -0.1; it is a number from 0 to 1"),
        ("psnr = inf", "psnr is inf; it is a number"),
        ("ssim = 2", "ssim is 2; it is a number from -1 to 1"),
        ("limit = 3", "limit is 3; it is written as [[limit]]"),
        ("[limit]\nerror = 'local'", "it is written as [[limit]]"),
        ("limit = [1]", "limit is [1]; it is written as [[limit]]"),
        ("[[limit]]\nquantity = 'out'\nat_most = 1", "error is None; there are local, accumulated"),
        (
            "[[limit]]\nerror = 'global'\nquantity = 'out'\nat_most = 1",
            "error is 'global'; there are local, accumulated",
        ),
        (
            "[[limit]]\nerror = ['local']\nquantity = 'out'\nat_most = 1",
            "error is ['local']; there are local, accumulated",
        ),
        (
            "[[limit]]\nerror = 'local'\nquantity = 'eps'\nat_most = 1",
            "quantity is 'eps'; there are out, x0, x",
        ),
        (
            LIMIT + "measure = 'rms'\nat_most = 1",
            "measure is 'rms'; there are max, l2, cosine, psnr",
        ),
        (LIMIT, "a limit of max says at_most = a number"),
        (LIMIT + "at_least = 1", "a limit of max says at_most = a number"),
        (LIMIT + "measure = 'psnr'\nat_most = 40", "a limit of psnr says at_least = a number"),
        (LIMIT + "measure = 'cosine'\nat_most = 1", "a limit of cosine says at_least = a number"),
        (LIMIT + "at_most = nan", "at_most is nan; it is a number"),
        (LIMIT + "at_most = '1'", "at_most is '1'; it is a number"),
        (LIMIT + "at_most = -1e-3", "at_most is -0.001; an error is at least 0"),
        (LIMIT + "at_most = 1\nfrom = -1", "from is -1; it is a timestep"),
        (LIMIT + "at_most = 1\nfrom = 0.5", "from is 0.5; it is a timestep"),
        (LIMIT + "at_most = 1\nfrom = true", "from is True; it is a timestep"),
        (LIMIT + "at_most = 1\nto = '9'", "to is '9'; it is a timestep"),
        (LIMIT + "at_most = 1\nfrom = 9\nto = 8", "a limit goes from 9 to 8"),
        (
            LIMIT + "at_most = 1\nuntil = 8",
            "a limit has until; it may have error, quantity, measure, at_most, at_least, from, to",
        ),
    ],
)
def test_a_file_that_is_no_budget_says_what_is_right(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(BudgetError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "budget.toml" in str(caught.value)
    assert "docs/parity.md" in caught.value.hint


def test_a_budget_that_is_not_there_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"There is no budget .*none\.toml") as caught:
        read_budget(tmp_path / "none.toml")
    assert "ddpm-deploy budget ckpt.pt" in caught.value.hint


def test_a_budget_that_cannot_be_read_is_no_question_of_where_to_write() -> None:
    memory = Path("/proc/self/mem")
    if not memory.exists():
        pytest.skip("of Linux")
    with pytest.raises(BudgetError, match="cannot be read"):
        read_budget(memory)


def test_what_is_no_text_is_no_budget(tmp_path: Path) -> None:
    (tmp_path / "budget.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BudgetError, match=r"budget\.toml is no budget"):
        read_budget(tmp_path / "budget.toml")
    with pytest.raises(BudgetError, match="is a folder"):
        read_budget(tmp_path)
