from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_deploy import Engine, denoise, open_engine
from ddpm_deploy.arrays import Samples, Timesteps
from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.model import LoadedNetwork, load_network
from ddpm_deploy.model.families import FAMILIES
from ddpm_deploy.sampling import Predictor
from ddpm_deploy.spec import ModelSpec
from tests.model.policies import (
    FOLDER,
    RECORDED,
    Drawn,
    Recorded,
    lerobot_config,
    lerobot_names,
    policy_config,
    policy_state,
    write_lerobot,
    write_workspace,
)
from tests.round_trip import check_round_trip

FAMILY = {"columbia": "diffusion_policy", "lerobot": "lerobot"}
STATES = ("observation.state", "observation.environment_state")


@pytest.fixture(scope="module", params=RECORDED, ids=lambda r: r.name)
def recorded(request: pytest.FixtureRequest) -> Recorded:
    assert isinstance(request.param, Recorded)
    return request.param


@pytest.fixture(scope="module")
def loaded(recorded: Recorded, tmp_path_factory: pytest.TempPathFactory) -> LoadedNetwork:
    return load_network(recorded.make(tmp_path_factory.mktemp(recorded.name)))


@pytest.fixture(scope="module")
def engine(loaded: LoadedNetwork, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = tmp_path_factory.mktemp("exported") / "unet.onnx"
    export_network(loaded.network, loaded.spec, path)
    return open_engine(path, device="cpu")


def value(loaded: LoadedNetwork, name: str) -> Any:
    return next(fact.value for fact in loaded.facts if fact.name == name)


def bound(
    engine: Engine, recorded: Recorded, run: dict[str, Any], case: str = ""
) -> dict[str, Any]:
    """The conditions of a record, by the names of the graph's inputs."""
    names = [c.name for c in engine.spec.conditions]
    return {n: run[f"{k}{case}"] for n, k in zip(names, recorded.inputs, strict=True)}


def test_onnx_runtime_gives_what_the_original_gave(engine: Engine, recorded: Recorded) -> None:
    io = recorded.load("io")
    cases = sum(name.startswith("out") for name in io)
    for k in map(str, range(cases)):
        out = engine(io[f"x{k}"], io[f"t{k}"], **bound(engine, recorded, io, k))
        wanted = io[f"out{k}"]
        assert np.abs(out - wanted).max() <= 2e-5 * np.abs(wanted).max()
    assert cases >= 2


def states(run: dict[str, Any]) -> tuple[Any, Any]:
    """What each recorded step was given, and what it gave."""
    return (run["x"], run["after"]) if "x" in run else (run["states"][:-1], run["states"][1:])


def _always(out: Samples) -> Predictor:
    def predict(x: Samples, t: Timesteps) -> Samples:
        return out

    return predict


def _noise(noise: Samples) -> Callable[[int], Samples]:
    def draw(k: int) -> Samples:
        return noise

    return draw


def test_every_step_of_the_loop_is_the_original_s(
    loaded: LoadedNetwork, recorded: Recorded
) -> None:
    run = recorded.load("run")
    table = loaded.spec.table()
    assert [row.t for row in table] == run["timesteps"].tolist()
    before, after = states(run)
    for k, place in enumerate(run.get("steps", range(len(table)))):
        row = table[place]
        noise = run["noise"][k] if row.x_from_noise else np.zeros_like(before[k])
        out = run["model_out"][k]
        (step,) = denoise(_always(out), [row], _noise(noise), x=before[k])
        # diffusers computes its coefficients in float32, which has few digits of 1 - ᾱ at t < 10
        # and where x_0 says what ε is.
        rough = row.t < 10 or loaded.spec.prediction == "sample"
        peak = max(1.0, float(np.abs(after[k]).max()))
        assert np.abs(step.x - after[k]).max() <= (2e-4 if rough else 1e-5) * peak, row.t


def test_the_whole_loop_ends_in_the_actions_that_the_original_returned(
    engine: Engine, recorded: Recorded
) -> None:
    run = recorded.load("run")
    table = engine.spec.table()
    first = 0
    before, _ = states(run)
    if "steps" in run:  # the last ten steps of a hundred
        first = next(k for k, place in enumerate(run["steps"]) if place >= 90)
        table = table[90:]
    conditions = bound(engine, recorded, run)

    def predict(x: Samples, t: Timesteps) -> Samples:
        return engine(x, t, **conditions)

    *_, last = denoise(predict, table, lambda k: run["noise"][first + k - 1], x=before[first])
    restore = engine.spec.restore
    assert restore is not None
    wanted = run["action_pred"]
    assert np.abs(restore(last.x) - wanted).max() <= 1e-4 * np.ptp(wanted)


def test_the_loop_visits_what_its_configuration_says(loaded: LoadedNetwork) -> None:
    # test_every_step_of_the_loop_is_the_original_s compares the steps themselves.
    assert len(loaded.spec.table()) == value(loaded, "num_inference_steps")


def test_a_file_is_of_its_own_family_and_of_no_other(
    recorded: Recorded, loaded: LoadedNetwork, tmp_path: Path
) -> None:
    family = FAMILY[recorded.name.partition("_")[0]]
    assert loaded.spec.family == family
    from ddpm_deploy.model.checkpoint import open_checkpoint

    state = open_checkpoint(recorded.make(tmp_path)).state
    assert [each.name for each in FAMILIES if each.matches(state)] == [family]


def test_nothing_is_assumed_where_the_configuration_is_there(loaded: LoadedNetwork) -> None:
    assert not loaded.assumed


def test_an_engine_s_spec_is_enough_to_load_its_checkpoint_again(
    recorded: Recorded, loaded: LoadedNetwork, tmp_path: Path
) -> None:
    spec = ModelSpec.from_json(loaded.spec.to_json())
    again = load_network(recorded.make(tmp_path), spec=spec)
    assert again.spec == loaded.spec
    pairs = zip(again.network.parameters(), loaded.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["columbia_lowdim", "columbia_ddim_sample"])
def test_the_online_weights_are_taken_where_they_are_asked_for(name: str, tmp_path: Path) -> None:
    variant = next(r for r in RECORDED if r.name == name)
    path = variant.make(tmp_path)
    io, wanted = variant.load("io"), variant.load("online")["out0"]
    found = load_network(path, weights="online")
    assert (found.spec.weights, load_network(path).spec.weights) == ("online", "ema")
    x, t, c = (torch.from_numpy(io[k]) for k in ("x0", "t0", "c0"))
    with torch.inference_mode():
        out = found.network(x, t, c).numpy()
    assert np.abs(out - wanted).max() <= 2e-5 * np.abs(wanted).max()
    assert value(found, "weights") == "online (of ema, online)"


def test_the_file_that_the_original_wrote_is_the_same_policy(tmp_path: Path) -> None:
    variant = RECORDED[0]
    ours = load_network(variant.make(tmp_path))
    real = load_network(FOLDER / variant.name / "latest.ckpt")
    assert real.facts == ours.facts
    assert real.spec.with_changes(checkpoint_sha256="") == ours.spec.with_changes(
        checkpoint_sha256=""
    )
    pairs = zip(real.network.parameters(), ours.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def check_facts(found: LoadedNetwork, drawn: Drawn) -> None:
    """Compares every fact with the policy that was saved."""
    widths = drawn.widths
    shown = {
        "action_dim": widths.actions,
        "down_dims": widths.down,
        "kernel_size": widths.kernel,
        "diffusion_step_embed_dim": widths.step,
        "film": "scale and shift" if widths.scale else "shift",
        "n_groups": drawn.groups,
        "horizon": drawn.horizon,
        "n_obs_steps": drawn.steps,
        "prediction": drawn.prediction,
        "num_inference_steps": drawn.inference,
    }
    assert {name: value(found, name) for name in shown} == shown
    spec = found.spec
    assert spec.sample_shape == (drawn.horizon, widths.actions)
    assert spec.sampler == drawn.scheduler.lower()
    assert {c.name: c.shape for c in spec.conditions} == {
        name: (drawn.steps, size) for name, size in drawn.seen.items()
    }
    assert not found.assumed


def check_workspace(tmp_path: Path, seed: int, *, export: bool = False) -> None:
    drawn = Drawn.of(seed, "obs")
    network = write_workspace(tmp_path / "latest.ckpt", drawn, seed)
    out = tmp_path / "unet.onnx" if export else None
    check_facts(check_round_trip(tmp_path / "latest.ckpt", network, export=out), drawn)


def check_lerobot(tmp_path: Path, seed: int, *, export: bool = False) -> None:
    drawn = Drawn.of(seed, *STATES[: 1 + seed % 2])
    network = write_lerobot(tmp_path / "policy", drawn, seed)
    out = tmp_path / "unet.onnx" if export else None
    check_facts(check_round_trip(tmp_path / "policy", network, export=out), drawn)


@pytest.mark.parametrize("seed", range(30))
def test_any_workspace_comes_back_as_itself(tmp_path: Path, seed: int) -> None:
    check_workspace(tmp_path, seed)


@pytest.mark.parametrize("seed", range(100, 130))
def test_any_lerobot_policy_comes_back_as_itself(tmp_path: Path, seed: int) -> None:
    check_lerobot(tmp_path, seed)


@pytest.mark.parametrize("check", [check_workspace, check_lerobot])
def test_some_of_them_also_do_as_graphs(tmp_path: Path, check: Callable[..., None]) -> None:
    check(tmp_path, 201, export=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(50))
def test_all_of_them_also_do_as_graphs(tmp_path: Path, seed: int) -> None:
    (check_workspace if seed < 25 else check_lerobot)(tmp_path, seed, export=True)


def refused(path: Path, **said: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_network(path, **said)
    assert caught.value.hint
    return f"{caught.value} | {caught.value.hint}"


# A UNet alone, as the project's notebook saves it


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module.model."])
def test_a_bare_unet_asks_for_its_horizon_alone(tmp_path: Path, prefix: str) -> None:
    drawn = Drawn.of(3, "obs")
    unet = drawn.unet(3)
    path = tmp_path / "pusht_state_100ep.ckpt"
    torch.save({prefix + name: value for name, value in unet.state_dict().items()}, path)
    said = refused(path)
    assert "does not say its horizon" in said
    assert "--set horizon=16" in said
    found = check_round_trip(
        path, unet, settings={"horizon": str(drawn.horizon), "n_groups": str(drawn.groups)}
    )
    assert found.spec.schedule.T == 100
    assert [c.name for c in found.spec.conditions] == ["global_cond"]
    assert {f.name for f in found.assumed} >= {"schedule", "noise_scheduler", "prediction"}


def test_a_bare_unet_without_a_condition_has_none(tmp_path: Path) -> None:
    drawn = Drawn.of(4)
    unet = drawn.unet(4)
    torch.save(unet.state_dict(), tmp_path / "unet.pt")
    settings = {"horizon": drawn.horizon, "n_groups": drawn.groups}
    assert check_round_trip(tmp_path / "unet.pt", unet, settings=settings).spec.conditions == ()


def test_the_notebook_s_pair_of_networks_is_its_unet(tmp_path: Path) -> None:
    drawn = Drawn.of(5, "obs")
    unet = drawn.unet(5)
    state = {f"noise_pred_net.{name}": value for name, value in unet.state_dict().items()}
    torch.save({"vision_encoder.conv1.weight": torch.zeros(1), **state}, tmp_path / "v.ckpt")
    settings = {"horizon": drawn.horizon, "n_groups": drawn.groups}
    found = check_round_trip(tmp_path / "v.ckpt", unet, settings=settings)
    assert "vision_encoder" in value(found, "not in the graph")


def test_a_bare_unet_of_lerobot_loads_too(tmp_path: Path) -> None:
    drawn = Drawn.of(6, "obs")
    unet = drawn.unet(6)
    save_file(lerobot_names(unet.state_dict()), tmp_path / "unet.safetensors")
    settings = {"horizon": drawn.horizon, "n_groups": drawn.groups}
    found = check_round_trip(tmp_path / "unet.safetensors", unet, settings=settings)
    assert found.spec.family == "lerobot"


def test_a_policy_s_own_state_dict_is_normalised_as_it_says(tmp_path: Path) -> None:
    drawn = Drawn.of(7, "obs")
    network, state = policy_state(drawn, 7)
    torch.save(state, tmp_path / "policy.pt")
    settings = {"horizon": drawn.horizon, "n_groups": drawn.groups}
    found = check_round_trip(tmp_path / "policy.pt", network, settings=settings)
    assert found.spec.restore is not None


@pytest.mark.parametrize("horizon", [7, 0, -4])
def test_a_horizon_that_the_network_cannot_halve_is_refused(tmp_path: Path, horizon: int) -> None:
    drawn = next(d for d in (Drawn.of(k, "obs") for k in range(99)) if d.widths.multiple == 4)
    torch.save(drawn.unet(0).state_dict(), tmp_path / "unet.pt")
    said = refused(tmp_path / "unet.pt", settings={"horizon": horizon, "n_groups": drawn.groups})
    assert f"The horizon is {horizon}" in said
    assert "multiples of 4" in said


# What is refused, by its name


def changed(tmp_path: Path, change: Callable[[dict[str, Any]], None], seed: int = 0) -> Path:
    """Writes a workspace with something changed in it."""
    path = tmp_path / "latest.ckpt"
    write_workspace(path, Drawn.of(seed, "obs"), seed)
    payload = torch.load(path, weights_only=True)
    change(payload)
    torch.save(payload, path)
    return path


def ema(payload: dict[str, Any]) -> dict[str, Any]:
    state = payload["state_dicts"]["ema_model"]
    assert isinstance(state, dict)
    return state


def test_damaged_policies_are_refused_with_their_own_message(tmp_path: Path) -> None:
    name = "model.mid_modules.0.blocks.1.block.1.weight"
    said = refused(changed(tmp_path, lambda p: ema(p).pop(name)))
    assert "Missing key(s)" in said
    said = refused(
        changed(tmp_path, lambda p: ema(p).update({"model.extra.weight": torch.ones(1)}))
    )
    assert "Unexpected key(s)" in said
    said = refused(changed(tmp_path, lambda p: ema(p).update({name: torch.ones(3)})))
    assert "size mismatch" in said
    said = refused(changed(tmp_path, lambda p: ema(p).update({name: "text"})))
    assert f"its {name} is no tensor" in said
    said = refused(changed(tmp_path, lambda p: ema(p).update({name: torch.ones(8) / 0})))
    assert "not finite" in said
    said = refused(changed(tmp_path, lambda p: p["state_dicts"].clear()))
    assert "without a model" in said
    scale = "normalizer.params_dict.action.scale"
    said = refused(changed(tmp_path, lambda p: ema(p).update({scale: ema(p)[scale] * 0})))
    assert "scale of 0" in said
    said = refused(changed(tmp_path, lambda p: ema(p).update({scale: ema(p)[scale] / 0})))
    assert "was never set" in said
    said = refused(changed(tmp_path, lambda p: ema(p).pop(scale)))
    assert "do not fit" in said


def test_other_ways_to_take_observations_are_refused_by_name(tmp_path: Path) -> None:
    def local(payload: dict[str, Any]) -> None:
        ema(payload)["model.local_cond_encoder.0.blocks.0.block.0.weight"] = torch.ones(1)

    said = refused(changed(tmp_path, local))
    assert "obs_as_local_cond" in said
    assert "obs_as_global_cond: True" in said
    drawn = Drawn.of(4)  # nothing but the timestep
    path = tmp_path / "latest.ckpt"
    state = {f"model.{k}": v for k, v in drawn.unet(4).state_dict().items()}
    for field, size in (("obs", 2), ("action", drawn.widths.actions - 2)):
        state |= {
            f"normalizer.params_dict.{field}.{what}": torch.ones(size)
            for what in ("scale", "offset")
        }
    torch.save({"cfg": {}, "state_dicts": {"model": state}}, path)
    assert "inpainting" in refused(path)


def test_other_policies_of_the_project_are_refused_by_name(tmp_path: Path) -> None:
    def transformer(payload: dict[str, Any]) -> None:
        payload["state_dicts"]["ema_model"] = {"model.input_emb.weight": torch.ones(1)}
        payload["cfg"]["policy"]["_target_"] = "diffusion_policy.policy.x.DiffusionTransformer"

    said = refused(changed(tmp_path, transformer))
    assert "DiffusionTransformer of diffusion_policy, a transformer" in said
    torch.save({"model.input_emb.weight": torch.ones(1)}, tmp_path / "bare.pt")
    assert "a transformer" in refused(tmp_path / "bare.pt")

    def bet(payload: dict[str, Any]) -> None:
        payload["state_dicts"] = {"policy": {"x": torch.ones(1)}}

    assert "it has policy" in refused(changed(tmp_path, bet))


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("_target_", "diffusers.PNDMScheduler", "PNDMScheduler; DDPM and DDIM"),
        ("beta_schedule", "other", "beta_schedule is 'other'"),
        ("variance_type", "learned_range", "variance_type=learned_range"),
        ("prediction_type", "flow", "prediction_type=flow"),
        ("thresholding", True, "thresholding=True"),
        ("timestep_spacing", "random", "timestep_spacing=random"),
        (
            "num_train_timesteps",
            10**12,
            "num_train_timesteps is 1000000000000, not 1 to",
        ),
        ("num_train_timesteps", "many", "num_train_timesteps is 'many', not 1 to"),
        ("num_train_timesteps", 3, "num_inference_steps is"),
        ("steps_offset", 300, "describes a loop that cannot be"),
    ],
)
def test_a_loop_that_is_not_there_is_refused(
    tmp_path: Path, setting: str, value: Any, said: str
) -> None:
    def change(payload: dict[str, Any]) -> None:
        payload["cfg"]["policy"]["noise_scheduler"][setting] = value

    assert said in refused(changed(tmp_path, change))


def test_a_configuration_of_another_training_is_refused(tmp_path: Path) -> None:
    def steps(payload: dict[str, Any]) -> None:
        payload["cfg"]["policy"]["n_obs_steps"] += 1

    assert "its configuration says n_obs_steps" in refused(changed(tmp_path, steps))

    def size(payload: dict[str, Any]) -> None:
        for what in ("scale", "offset"):
            ema(payload)[f"normalizer.params_dict.obs.{what}"] = torch.ones(97)

    assert "no multiple of an observation's: obs 97" in refused(changed(tmp_path, size))


def test_what_the_user_says_goes_before_the_configuration(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda payload: None, seed=1)
    found = load_network(path, settings={"noise_scheduler": "DDIM", "num_inference_steps": "10"})
    assert (found.spec.sampler, found.spec.sampling.steps) == ("ddim", 10)
    facts = {fact.name: fact for fact in found.facts}
    assert facts["num_inference_steps"].source == "flag"
    assert "has action_dim" in refused(path, settings={"action_dim": 99})
    assert "nothing that" in refused(path, settings={"hoirzon": 99})


def test_settings_that_refer_to_others_are_those(tmp_path: Path) -> None:
    def refer(payload: dict[str, Any]) -> None:
        policy = payload["cfg"]["policy"]
        payload["cfg"] |= {"horizon": policy["horizon"], "loop": "${loop}"}
        policy |= {"horizon": "${horizon}", "num_inference_steps": "${loop}"}
        policy["n_action_steps"] = "${eval:'1/0'}"  # nothing computes it
        policy["n_obs_steps"] = "${nowhere.at.all}"

    found = load_network(changed(tmp_path, refer))
    assert value(found, "horizon") == Drawn.of(0, "obs").horizon
    assert {fact.name for fact in found.assumed} == {"num_inference_steps"}


# LeRobot's forms


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return next(r for r in RECORDED if r.name == "lerobot_old").make(tmp_path)


@pytest.fixture
def new(tmp_path: Path) -> Path:
    return next(r for r in RECORDED if r.name == "lerobot_new").make(tmp_path)


def same(one: LoadedNetwork, other: LoadedNetwork) -> bool:
    specs = [each.spec.with_changes(checkpoint_sha256="") for each in (one, other)]
    return specs[0] == specs[1]


def test_a_policy_is_found_from_the_folder_of_its_run(old: Path, tmp_path: Path) -> None:
    wanted = load_network(old)
    assert load_network(old.parent).spec == wanted.spec
    run = tmp_path / "run" / "checkpoints" / "last"
    shutil.copytree(old, run / "pretrained_model")
    (run / "training_state").mkdir()
    assert load_network(tmp_path / "run").spec == wanted.spec
    assert load_network(run).spec == wanted.spec


def test_the_weights_alone_find_what_is_beside_them(old: Path, new: Path) -> None:
    for folder in (old, new):
        assert load_network(folder / "model.safetensors").spec == load_network(folder).spec


def test_the_weights_without_anything_still_know_their_statistics(old: Path) -> None:
    wanted = load_network(old)
    (old / "config.json").unlink()
    path = old / "model.safetensors"
    assert "does not say its horizon" in refused(path)
    found = load_network(path, settings={"horizon": 16})
    assert found.spec.restore == wanted.spec.restore
    assert found.spec.conditions == wanted.spec.conditions


def test_the_configuration_of_2024_says_the_same(old: Path) -> None:
    wanted = load_network(old)
    shutil.copy(FOLDER / "lerobot_old" / "files" / "config_2024.json", old / "config.json")
    assert same(load_network(old), wanted)


def test_a_compiled_unet_loads_as_itself(new: Path) -> None:
    wanted = load_network(new)
    state = load_file(new / "model.safetensors")
    renamed = {
        k.replace("diffusion.unet.", "diffusion.unet._orig_mod."): v for k, v in state.items()
    }
    save_file(renamed, new / "model.safetensors")
    assert same(load_network(new), wanted)


def test_normalisation_that_is_not_there_is_asked_for(new: Path) -> None:
    for file in new.glob("policy_*"):
        file.unlink()
    said = refused(new)
    assert f"It normalises {', '.join(STATES)}, action" in said
    assert "--set normalization=none" in said
    found = load_network(new, settings={"normalization": "none"})
    assert found.spec.restore is None
    assert "is 'MAGIC'" in refused(new, settings={"normalization": "MAGIC"})
    assert [c.name for c in found.spec.conditions] == list(STATES)


def test_the_network_alone_may_be_asked_for(new: Path) -> None:
    plain = load_network(new, settings={"normalization": "none"})
    assert plain.spec.restore is None
    again = load_network(new, spec=plain.spec)
    assert again.spec == plain.spec
    assert all(
        isinstance(m, torch.nn.Identity)
        for m in again.network.get_submodule("normalise").children()
    )


def test_statistics_that_were_never_set_are_refused(old: Path) -> None:
    state = load_file(old / "model.safetensors")
    name = "unnormalize_outputs.buffer_action.max"
    state[name] = torch.full_like(state[name], torch.inf)
    save_file(state, old / "model.safetensors")
    assert f"not finite in {name}" in refused(old)


def test_other_policies_of_lerobot_are_refused_by_name(old: Path) -> None:
    config = json.loads((old / "config.json").read_text(encoding="utf-8"))
    (old / "config.json").write_text(json.dumps({**config, "type": "act"}), encoding="utf-8")
    said = refused(old)
    assert "is a policy of the type act" in said
    assert "--policy.type=diffusion" in said
    (old / "config.json").write_text("{", encoding="utf-8")
    assert "is no JSON" in refused(old)
    (old / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (old / "model.safetensors").unlink()
    assert "no model.safetensors" in refused(old)


def test_a_policy_with_cameras_takes_what_its_encoder_gives(tmp_path: Path) -> None:
    drawn = Drawn.of(8, "obs")
    unet = drawn.unet(8)
    state = {f"diffusion.unet.{k}": v for k, v in lerobot_names(unet.state_dict()).items()}
    state |= {"diffusion.rgb_encoder.backbone.0.weight": torch.ones(2)}
    state |= {
        f"normalize_inputs.buffer_observation_image.{k}": torch.ones(3) for k in ("mean", "std")
    }
    for k, number in (("min", -1.0), ("max", 5.0)):
        state[f"unnormalize_outputs.buffer_action.{k}"] = torch.full(
            (drawn.widths.actions,), number
        )
    folder = tmp_path / "policy"
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    config = lerobot_config(Drawn.of(8))
    image = {"observation.image": {"type": "VISUAL", "shape": [3, 96, 96]}}
    config |= {"horizon": drawn.horizon, "input_features": image, "n_groups": drawn.groups}
    config["output_features"] = {"action": {"type": "ACTION", "shape": [drawn.widths.actions]}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    found = check_round_trip(folder, unet)
    assert [c.name for c in found.spec.conditions] == ["global_cond"]
    assert "rgb_encoder (observation.image)" in value(found, "not in the graph")
    assert found.spec.restore is not None
    assert set(found.spec.restore.scale) == {3.0}
    assert set(found.spec.restore.offset) == {2.0}


def test_a_processor_s_step_that_is_not_in_the_graph_is_named(new: Path) -> None:
    path = new / "policy_postprocessor.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described["steps"].append({"registry_name": "absolute_actions_processor", "config": {}})
    path.write_text(json.dumps(described), encoding="utf-8")
    assert "absolute_actions_processor" in value(load_network(new), "not in the graph")


def test_a_processor_reads_no_file_outside_its_folder(new: Path) -> None:
    path = new / "policy_postprocessor.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    name = described["steps"][0]["state_file"]
    shutil.move(new / name, new.parent / name)
    described["steps"][0]["state_file"] = f"../{name}"
    path.write_text(json.dumps(described), encoding="utf-8")
    assert "It normalises action" in refused(new)


def test_the_configuration_of_a_drawn_policy_is_complete() -> None:
    assert policy_config(Drawn.of(0, "obs"))["policy"]["horizon"]
