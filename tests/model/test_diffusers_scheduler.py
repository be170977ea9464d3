"""What a diffusers scheduler's config makes of the loop."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_deploy import ModelSpec, cosine, linear, scaled_linear
from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.diffusers_scheduler import Loop, read_scheduler
from ddpm_deploy.model.facts import Fact, Facts, Said
from ddpm_deploy.sampling import Sampling
from tests.test_solvers import recorded_runs, whole_table


def read(
    config: dict[str, Any], pipeline: str = "", *, learned: bool = False, **said: Any
) -> tuple[Loop, dict[str, Fact]]:
    facts = Facts(Said(settings=said), source="the file")
    loop = read_scheduler(config, pipeline, facts, learned=learned, source="the file")
    facts.done()
    return loop, {fact.name: fact for fact in facts.all}


def spec_of(loop: Loop) -> ModelSpec:
    return ModelSpec(sample_shape=(1, 4, 4), **vars(loop))


def ddpm_config(**changes: Any) -> dict[str, Any]:
    return {"_class_name": "DDPMScheduler", **changes}


def ddim_config(**changes: Any) -> dict[str, Any]:
    return {"_class_name": "DDIMScheduler", **changes}


def solver_config(**changes: Any) -> dict[str, Any]:
    return {"_class_name": "DPMSolverMultistepScheduler", **changes}


@pytest.mark.parametrize("run", [r for r in recorded_runs() if "useclipped" not in r.id])
def test_the_recorded_loops_are_what_their_configs_say(run: dict[str, Any]) -> None:
    config = {"_class_name": run["scheduler"], **run["config"]}
    if "karras" in run["file"]:
        config["use_karras_sigmas"] = True
    visited: list[int] = np.load(
        Path(__file__).parents[1] / f"data/golden/diffusers/tutorial_small/{run['file']}.npz"
    )["timesteps"].tolist()
    steps = 1000 if "1000" in run["file"] else len(visited)
    eta = run["step_args"].get("eta")
    table = spec_of(read(config)[0]).table(steps=steps, eta=eta)
    assert table == whole_table(run, visited)


def test_each_pipeline_has_its_own_number_of_steps() -> None:
    def steps(config: dict[str, Any], pipeline: str = "") -> Any:
        loop, facts = read(config, pipeline)
        assert facts["steps"].source == "assumed"
        return loop.sampling.steps

    assert steps(ddpm_config(), "DDPMPipeline") == steps(ddpm_config()) == 1000
    assert steps(ddpm_config(num_train_timesteps=4000), "DDPMPipeline") == 1000
    assert steps(ddpm_config(num_train_timesteps=200), "DDPMPipeline") == 200
    assert steps(ddim_config(), "DDIMPipeline") == steps(ddim_config()) == 50
    assert steps(ddim_config(), "DDPMPipeline") == 1000
    assert steps(solver_config(), "DDPMPipeline") == 20
    assert steps(solver_config(num_train_timesteps=10)) == 9


def test_a_ddim_pipeline_makes_a_ddim_scheduler_of_any() -> None:
    loop, facts = read(ddpm_config(clip_sample=False), "DDIMPipeline")
    assert (loop.sampler, loop.clip, loop.sampling.direction) == ("ddim", None, "network")
    assert facts["scheduler"].value == "DDIMScheduler"


def test_without_a_config_everything_is_assumed() -> None:
    loop, facts = read({})
    assert {fact.source for fact in facts.values()} == {"assumed"}
    wanted = Sampling(steps=1000, noise_at_end=True)
    assert (loop.sampler, loop.sampling, loop.clip) == ("ddpm", wanted, 1.0)
    assert (loop.schedule, loop.prediction, loop.variance) == (
        linear(1000),
        "epsilon",
        "fixed_small",
    )
    loop, facts = read({}, scheduler="DDIMScheduler", clip_sample="false", steps="25")
    assert (loop.sampler, loop.clip, loop.sampling.steps) == ("ddim", None, 25)
    assert facts["scheduler"].source == facts["steps"].source == "flag"


def test_another_scheduler_s_loop_is_assumed_and_says_so() -> None:
    for name, sampler in [
        ("PNDMScheduler", "ddim"),
        ("EulerDiscreteScheduler", "ddim"),
        ("EulerAncestralDiscreteScheduler", "ddpm"),
        ("UniPCMultistepScheduler", "ddim"),
    ]:
        config = {
            "_class_name": name,
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "v_prediction",
        }
        loop, facts = read(config)
        assert (loop.sampler, facts["sampler"].source) == (sampler, "assumed")
        assert facts["scheduler"] == Fact(
            name="scheduler", value=name, source="config", option="--set scheduler=..."
        )
        assert loop.schedule == scaled_linear(1000, start=0.00085, end=0.012)
        assert (loop.prediction, loop.clip) == ("v_prediction", None)
        assert read(config, sampler="dpmpp_2m")[0].sampler == "dpmpp_2m"


@pytest.mark.parametrize(
    "changes",
    [
        {"solver_order": 3},
        {"algorithm_type": "sde-dpmsolver++"},
        {"solver_type": "heun"},
        {"use_lu_lambdas": True},
        {"lambda_min_clipped": -5.1},
    ],
)
def test_a_solver_s_setting_that_is_not_followed_says_so(changes: dict[str, Any]) -> None:
    loop, facts = read(solver_config(**changes))
    ((name, value),) = changes.items()
    assert facts["not_followed"].value == f"{name} {value}"
    assert (loop.sampler, facts["sampler"].source) == ("dpmpp_2m", "assumed")
    assert spec_of(loop).table()


def test_a_solver_s_settings_are_followed() -> None:
    config = solver_config(
        solver_order=1,
        use_karras_sigmas=True,
        final_sigmas_type="sigma_min",
        lower_order_final=False,
        timestep_spacing="leading",
        steps_offset=1,
        clip_sample=True,
    )
    loop, facts = read(config)
    assert loop.clip is None  # it never clips
    assert loop.sampling == Sampling(
        steps=20,
        offset=1,
        order=1,
        karras=True,
        final_sigma="least",
        first_order_end="never",
    )
    assert facts["sampler"].source == "config"
    euler = read(solver_config(euler_at_final=True))[0].sampling
    assert (euler.first_order_end, euler.spacing) == ("always", "linspace")


def test_the_variances_are_those_of_diffusers() -> None:
    def variance(kind: str, *, learned: bool = False) -> str:
        return read(ddpm_config(variance_type=kind), learned=learned)[0].variance

    assert variance("fixed_small") == variance("fixed_small_log") == "fixed_small"
    assert variance("fixed_large") == "fixed_large"
    assert variance("learned_range", learned=True) == "learned_range"
    # The config has the class's default, and the network twice the channels.
    assert read(ddpm_config(), learned=True)[1]["variance_type"].source == "assumed"
    assert read(solver_config(variance_type="learned"), learned=True)[0].variance == "learned"
    assert read(solver_config(variance_type=None))[0].variance == "fixed_small"


def test_old_configs_say_by_a_switch_what_is_predicted() -> None:
    assert read(ddpm_config(predict_epsilon=False))[0].prediction == "sample"
    assert read(ddpm_config(predict_epsilon=True))[0].prediction == "epsilon"


def test_schedules_are_those_of_diffusers() -> None:
    def schedule(**config: Any) -> Any:
        return read(ddpm_config(num_train_timesteps=50, **config))[0].schedule

    assert schedule(beta_start=1e-3, beta_end=0.1) == linear(50, start=1e-3, end=0.1)
    assert schedule(beta_schedule="squaredcos_cap_v2") == cosine(50)
    sigmoid = schedule(beta_schedule="sigmoid", beta_start=1e-3, beta_end=0.1)
    assert math.isclose(sigmoid.beta[0], 0.099 / (1 + math.exp(6)) + 1e-3)
    assert math.isclose(sigmoid.beta[-1], 0.099 / (1 + math.exp(-6)) + 1e-3)
    given = schedule(trained_betas=[0.1, 0.2, 0.3])
    assert given.beta.tolist() == [0.1, 0.2, 0.3]
    rescaled = schedule(rescale_betas_zero_snr=True, beta_end=0.2)
    plain = linear(50, end=0.2)
    assert (rescaled.beta[-1], rescaled.alpha_bar[-1]) == (1.0, 0.0)
    assert math.isclose(rescaled.beta[0], plain.beta[0])
    # In the middle √ᾱ is moved and scaled.
    root, first, last = (math.sqrt(plain.alpha_bar[t]) for t in (25, 0, -1))
    wanted = (root - last) * first / (first - last)
    assert math.isclose(math.sqrt(rescaled.alpha_bar[25]), wanted)


def test_a_spec_keeps_a_schedule_of_any_kind() -> None:
    for changes in (
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"},
        {"rescale_betas_zero_snr": True, "beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": [0.1] * 50},
    ):
        spec = spec_of(read(ddim_config(prediction_type="v_prediction", **changes))[0])
        assert ModelSpec.from_json(spec.to_json()) == spec
        assert spec.table()


@pytest.mark.parametrize(
    ("config", "said", "message"),
    [
        (ddpm_config(thresholding=True), {}, "limits x_0 by dynamic thresholding"),
        (ddpm_config(variance_type="fixed_large_log"), {}, "fixed_large_log; it gives no numbers"),
        (ddpm_config(variance_type="learned_range"), {}, "gives only the channels of a picture"),
        (ddpm_config(prediction_type="flow_prediction"), {}, "predicts 'flow_prediction'"),
        (ddpm_config(beta_schedule="exp"), {}, "beta_schedule is 'exp'"),
        (ddpm_config(trained_betas=[0.1, 7.0]), {}, r"beta\[1\] is 7.0"),
        (ddpm_config(timestep_spacing="odd"), {}, "timestep_spacing is 'odd'"),
        (ddpm_config(steps_offset=1), {}, "cannot do 1000 steps: 1000 steps with offset 1"),
        (ddpm_config(), {"steps": "2000"}, "cannot do 2000 steps"),
        (ddpm_config(), {"sampler": "euler"}, "sampler=euler is not one of"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, {}, "which has no betas"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    config: dict[str, Any], said: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(config, **said)


def test_the_root_of_a_learned_variance_is_refused() -> None:
    with pytest.raises(CheckpointError, match="takes the root of what the network gives"):
        read(ddpm_config(variance_type="learned"), learned=True)


def test_thresholding_can_be_left_out() -> None:
    loop, facts = read(ddpm_config(thresholding=True), thresholding="false")
    assert loop.clip == 1.0
    assert facts["thresholding"].source == "flag"
