"""Tables against what diffusers' schedulers recorded, and against closed forms."""

from __future__ import annotations

import json
import math
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from ddpm_deploy import ModelSpec, Schedule, cosine, ddim, ddpm, denoise, dpmpp_2m, linear
from ddpm_deploy.arrays import Samples, Timesteps
from ddpm_deploy.sampling import Prediction, Sampling, Table, predicted_x0, timesteps
from tests.conftest import GaussianPredictor
from tests.golden import GOLDEN

FOLDER = GOLDEN / "diffusers" / "tutorial_small"
LINEAR = linear(1000)


def recorded_runs() -> list[Any]:
    """The peer's runs: the file, its scheduler's class and settings, what `step` was given."""
    runs = json.loads((FOLDER / "samplers.json").read_text(encoding="utf-8"))
    return [pytest.param(run, id=run["file"]) for run in runs]


def table_of(run: dict[str, Any], visited: list[int]) -> Table:
    """Our table with a recorded scheduler's settings, of the part that was recorded."""
    return [row for row in whole_table(run, visited) if row.t in visited]


def whole_table(run: dict[str, Any], visited: list[int]) -> Table:
    config, given = run["config"], run["step_args"]
    prediction = cast("Prediction", config["prediction_type"])
    steps = None if "1000" in run["file"] else len(visited)
    clip = 1.0 if config.get("clip_sample") else None
    spacing, offset = config["timestep_spacing"], config["steps_offset"]
    match run["scheduler"]:
        case "DDPMScheduler":
            return ddpm(
                LINEAR,
                steps,
                prediction=prediction,
                variance=config["variance_type"],
                clip=clip,
                spacing=spacing,
                offset=offset,
                noise_at_end=True,
            )
        case "DDIMScheduler":
            return ddim(
                LINEAR,
                steps,
                eta=given.get("eta", 0.0),
                prediction=prediction,
                clip=clip,
                spacing=spacing,
                offset=offset,
                direction="clipped" if given.get("use_clipped_model_output") else "network",
                previous="stride",
                final="clean" if config["set_alpha_to_one"] else "first",
            )
        case _:
            return dpmpp_2m(
                LINEAR,
                steps,
                prediction=prediction,
                order=config["solver_order"],
                spacing=spacing,
                offset=offset,
                karras="karras" in run["file"],
            )


def step_alone(
    table: Table, k: int, states: NDArray[Any], outs: NDArray[Any], noise: Samples | None
) -> Samples:
    """Takes step k from the peer's own state and output, and the x_0 of its step before."""
    before = predicted_x0(table[k - 1], states[:, k - 1], outs[:, k - 1]) if k else None

    def predict(x: Samples, t: Timesteps) -> Samples:
        return np.asarray(outs[:, k])

    def draw(number: int) -> Samples:
        assert noise is not None
        return noise

    (step,) = denoise(predict, table[k : k + 1], draw, x=states[:, k], before=before)
    return step.x


@pytest.mark.parametrize("run", recorded_runs())
def test_each_step_is_diffusers_own(run: dict[str, Any]) -> None:
    recorded = np.load(FOLDER / f"{run['file']}.npz")
    visited = recorded["timesteps"].tolist()
    table = table_of(run, visited)
    assert [row.t for row in table] == visited
    drawn = 0
    for k, row in enumerate(table):
        noise = recorded["noise"][drawn] if row.x_from_noise else None
        drawn += noise is not None
        given = step_alone(table, k, recorded["states"], recorded["model_out"], noise)
        wanted = recorded["states"][:, k + 1]
        assert given.dtype == np.float32
        # diffusers computes its coefficients in float32: 1 - alpha_bar has four digits at t < 10.
        within = 2e-4 if row.t < 10 or "ddim10_sample" in run["file"] else 1e-5
        assert np.abs(given - wanted).max() <= within * max(1.0, float(np.abs(wanted).max()))
    # ddim draws at its last step, too, and multiplies by 0.
    assert len(recorded["noise"]) - drawn in ({0, 1} if "eta" in run["file"] else {0})


@pytest.mark.parametrize("name", ["epsilon", "epsilon_karras", "epsilon_leading"])
def test_the_solver_s_sigmas_are_diffusers_own(name: str) -> None:
    recorded = np.load(FOLDER / f"dpmpp2m10_{name}.npz")
    table = dpmpp_2m(
        LINEAR,
        10,
        spacing="leading" if "leading" in name else "linspace",
        karras="karras" in name,
    )
    # x_0 = (x - σ' ε) / α and σ' / α = σ; diffusers has its own in float32.
    sigmas = [-row.x0_from_out for row in table]
    np.testing.assert_allclose(sigmas, recorded["sigmas"][:-1], rtol=2e-5)
    assert (table[-1].s, recorded["sigmas"][-1]) == (-1, 0)


def test_the_saved_scheduler_of_a_ddpm_spaces_the_solver_as_it_does() -> None:
    leading = np.load(FOLDER / "dpmpp2m10_epsilon_leading.npz")["timesteps"]
    assert [row.t for row in dpmpp_2m(LINEAR, 10)] == leading.tolist()


def test_the_solver_of_first_order_is_ddim() -> None:
    visited = [900, 500, 250, 90, 3]
    solver = dpmpp_2m(LINEAR, visited, order=1)
    for given, wanted in zip(solver, ddim(LINEAR, visited, clip=None), strict=True):
        assert (given.t, given.s) == (wanted.t, wanted.s)
        for name in ("x0_from_x", "x0_from_out", "x_from_x0", "x_from_x", "x_from_before"):
            assert math.isclose(getattr(given, name), getattr(wanted, name), rel_tol=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_second_order_comes_nearer_to_the_exact_solution(prediction: Prediction) -> None:
    """The reverse process of a Gaussian has a solution in closed form."""
    schedule, visited = cosine(1000), list(range(900, 99, -50))
    gaussian = GaussianPredictor(schedule, mean=0.3, std=0.5)

    def exact(x: Samples, t: Timesteps) -> Samples:
        a, eps = float(schedule.alpha_bar[t[0]]), gaussian(x, t)
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        v = math.sqrt(a) * eps - math.sqrt(1 - a) * x0
        given = {"epsilon": eps, "sample": x0, "v_prediction": v}[prediction]
        return np.asarray(given, dtype=np.float32)

    x = np.random.default_rng(0).standard_normal((4, 1, 2, 2)).astype(np.float32)
    start, end = (float(schedule.alpha_bar[t]) for t in (visited[0], visited[-1]))

    def spread(a: float) -> float:
        return math.sqrt(a * 0.5**2 + 1 - a)

    wanted = math.sqrt(end) * 0.3 + spread(end) / spread(start) * (x - math.sqrt(start) * 0.3)
    errors = []
    for order in (1, 2):
        table = dpmpp_2m(schedule, visited, order=order, prediction=prediction)[:-1]
        *_, last = denoise(exact, table, lambda k: x)
        errors.append(float(np.abs(last.x - wanted).max()))
    assert errors[1] < errors[0] / 10


def test_the_last_transition_is_of_first_order_where_there_are_few() -> None:
    def looks_back(steps: int, **settings: Any) -> list[bool]:
        return [row.x_from_before != 0 for row in dpmpp_2m(LINEAR, steps, **settings)][-2:]

    assert looks_back(5) == looks_back(30) == [True, False]
    assert looks_back(5, final_sigma="least") == [True, False]
    assert looks_back(15, final_sigma="least") == [True, True]
    assert looks_back(5, final_sigma="least", first_order_end="never") == [True, True]
    assert looks_back(30, final_sigma="least", first_order_end="always") == [True, False]


def test_a_schedule_that_ends_in_noise_alone_has_a_finite_sigma() -> None:
    beta = np.append(LINEAR.beta[:-1], 1.0)
    table = dpmpp_2m(Schedule(beta), 10, prediction="v_prediction", spacing="trailing")
    assert table[0].t == 999
    assert all(math.isfinite(value) for row in table for value in vars(row).values() if value)


def test_where_the_last_sigma_is_the_least_the_step_from_there_stays() -> None:
    table = dpmpp_2m(LINEAR, [500, 0], final_sigma="least", first_order_end="never")
    assert (table[-1].x_from_x, table[-1].x_from_x0, table[-1].x_from_before) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1000}, "steps is 1000; dpmpp_2m has 1 to 999"),
        ({"steps": 0}, "steps is 0"),
        ({"order": 3}, "order is 3; there are 1, 2"),
        ({"final_sigma": "one"}, "final_sigma is 'one'; there are zero, least"),
        ({"first_order_end": "x"}, "first_order_end is 'x'"),
        ({"prediction": "flow"}, "prediction is 'flow'"),
        ({"steps": [900, 3], "karras": True}, "choose their own timesteps"),
    ],
)
def test_a_wrong_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dpmpp_2m(LINEAR, **settings)


def test_a_spec_carries_the_solver_and_its_settings() -> None:
    loop = Sampling(steps=7, order=1, karras=True, final_sigma="least", first_order_end="never")
    spec = ModelSpec(
        sample_shape=(1, 4, 4), schedule=LINEAR, clip=None, sampler="dpmpp_2m", sampling=loop
    )
    read = ModelSpec.from_json(spec.to_json())
    assert read == spec
    wanted = dpmpp_2m(LINEAR, 7, order=1, karras=True, final_sigma="least", first_order_end="never")
    assert read.table() == wanted
    # Timesteps that are named take the place of those that Karras' sigmas choose.
    assert [row.t for row in read.table(steps=[800, 400, 3])] == [800, 400, 3]
    assert read.table("ddim", 3) == ddim(LINEAR, 3, clip=None)
    with pytest.raises(ValueError, match="dpmpp_2m adds no noise"):
        read.table(eta=0.5)
    with pytest.raises(ValueError, match="order"):
        spec.with_changes(sampling=Sampling(order=3))


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_timesteps_are_rounded_as_numpy_rounds_them(spacing: Any) -> None:
    for total in (1000, 4000, 37):
        for n in range(2, total + 1, 3):
            if spacing == "linspace":
                wanted = np.linspace(0, total - 1, n).round()[::-1]
            else:
                # Where the stride's rounding leaves one too many, it would be t = -1.
                wanted = np.round(np.arange(total, 0, -(total / n)))[:n] - 1
            assert timesteps(total, n, spacing=spacing) == wanted.astype(int).tolist()


def test_a_learned_range_at_a_noisy_end_spans_from_almost_nothing() -> None:
    last = ddpm(LINEAR, 10, variance="learned_range", spacing="trailing", noise_at_end=True)[-1]
    assert (last.t, last.x_from_noise, last.log_std is None) == (99, 1.0, False)
    assert last.log_std is not None
    low, high = (2 * (last.log_std[0] + v * last.log_std[1]) for v in (-1, 1))
    assert math.isclose(low, math.log(1e-20))
    assert math.isclose(high, math.log(1 - float(LINEAR.alpha_bar[99])))
