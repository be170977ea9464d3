"""diffusers' UNet2DModel: what its folders say, at random, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddpm_deploy import ModelSpec
from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.files import sha256
from ddpm_deploy.model import LoadedNetwork, load_network
from ddpm_deploy.model.families import FAMILIES
from ddpm_deploy.model.unet2d import UNet2D
from ddpm_deploy.verify.compare import differing_fields
from tests.model.diffusers_configs import (
    SCHEDULER,
    network_of,
    random_config,
    save_model,
    save_pipeline,
    write_json,
)
from tests.round_trip import check_round_trip

WEIGHTS = "diffusion_pytorch_model"

CONFIG = {
    **random_config(0),
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [4, 8],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
    "norm_eps": 1e-5,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "mid_block_type": "UNetMidBlock2D",
    "add_attention": True,
    "num_class_embeds": None,
    "time_embedding_dim": None,
}


@pytest.fixture(scope="module")
def network() -> UNet2D:
    return network_of(CONFIG)


@pytest.fixture
def pipeline(tmp_path: Path, network: UNet2D) -> Path:
    return save_pipeline(tmp_path / "pipeline", network, CONFIG)


def values(loaded: LoadedNetwork) -> dict[str, tuple[Any, str]]:
    return {fact.name: (fact.value, fact.source) for fact in loaded.facts}


def check_random(folder: Path, seed: int, *, export: Path | None = None) -> None:
    config = random_config(seed)
    network = network_of(config, seed)
    suffix = ("safetensors", "bin")[seed % 2]
    said: dict[str, Any] = {}
    if seed % 3 == 0:
        said = {"image_size": tuple([config["sample_size"]] * 2)}
        if isinstance(config["sample_size"], list):
            said = {"image_size": tuple(config["sample_size"])}
        config = {**config, "sample_size": None}
    save_pipeline(folder, network, config, suffix=suffix)
    loaded = check_round_trip(folder, network, export=export, **said)
    assert isinstance(loaded.network, UNet2D)
    assert loaded.network.settings == network.settings
    spec = loaded.spec
    assert (spec.label.classes if spec.label else 0) == network.settings.classes
    again = load_network(folder, spec=ModelSpec.from_json(spec.to_json()))
    assert again.spec == spec
    assert again.network.settings == network.settings


@pytest.mark.parametrize("seed", range(60))
def test_a_random_network_comes_back_with_every_hyper_parameter(tmp_path: Path, seed: int) -> None:
    check_random(tmp_path / "pipeline", seed)


QUICK = (31, 47, 58)
"""Small ones with attention, residual resamplers and labels among them."""


@pytest.mark.parametrize(
    "seed",
    [pytest.param(s, marks=() if s in QUICK else [pytest.mark.slow]) for s in range(60)],
)
def test_a_random_network_exports(tmp_path: Path, seed: int) -> None:
    check_random(tmp_path / "pipeline", seed, export=tmp_path / "unet.onnx")


def test_its_weights_are_of_this_family_alone(network: UNet2D) -> None:
    state = network.state_dict()
    assert [family.name for family in FAMILIES if family.matches(state)] == ["diffusers"]


def test_a_pipeline_says_all_but_the_number_of_steps(pipeline: Path, network: UNet2D) -> None:
    loaded = check_round_trip(pipeline, network)
    assert [fact.name for fact in loaded.assumed] == ["steps"]
    found = values(loaded)
    assert found["steps"] == (1000, "assumed")
    assert found["scheduler"] == ("DDPMScheduler", "config")
    assert found["attention_head_dim"] == (2, "config")
    assert found["block_out_channels"] == ((4, 8), "weights")
    assert found["image size"] == ("8x8", "config")
    spec = loaded.spec
    assert (spec.sampler, spec.rounding, spec.clip, spec.family) == (
        "ddpm",
        "nearest",
        1.0,
        "diffusers",
    )


def test_the_hash_is_of_every_file_that_was_read_the_weights_first(pipeline: Path) -> None:
    wanted = sha256(
        pipeline / "unet" / f"{WEIGHTS}.safetensors",
        pipeline / "unet" / "config.json",
        pipeline / "scheduler" / "scheduler_config.json",
        pipeline / "model_index.json",
    )
    assert load_network(pipeline).spec.checkpoint_sha256 == wanted


def test_the_flat_layout_is_read_from_the_root(pipeline: Path, network: UNet2D) -> None:
    flat = pipeline.parent / "flat"
    flat.mkdir()
    for path in pipeline.rglob("*.*"):
        path.rename(flat / path.name)
    loaded = check_round_trip(flat, network)
    assert values(loaded)["scheduler"] == ("DDPMScheduler", "config")
    # Its files named themselves say as much.
    named = load_network(flat / f"{WEIGHTS}.safetensors")
    assert named.spec == loaded.spec


def test_a_network_in_a_pipeline_takes_the_pipeline_s_scheduler(
    pipeline: Path, network: UNet2D
) -> None:
    whole = load_network(pipeline).spec
    assert load_network(pipeline / "unet").spec == whole
    file = pipeline / "unet" / f"{WEIGHTS}.safetensors"
    assert check_round_trip(file, network).spec == whole


def test_a_network_alone_has_its_schedule_assumed(tmp_path: Path, network: UNet2D) -> None:
    loaded = check_round_trip(save_model(tmp_path / "m", network, CONFIG), network)
    assumed = {fact.name for fact in loaded.assumed}
    assert assumed >= {"scheduler", "schedule", "prediction", "sampler", "clip_sample", "steps"}
    assert {fact.name for fact in loaded.facts if fact.source == "config"} >= {"norm_eps"}
    assert loaded.spec.sampler == "ddpm"


def test_a_training_folder_has_the_ema_s_weights_and_the_online_ones(
    tmp_path: Path, network: UNet2D
) -> None:
    online = network_of(CONFIG, seed=1)
    folder = tmp_path / "out" / "checkpoint-500"
    save_model(folder / "unet", online, CONFIG)
    ema = {**CONFIG, "decay": 0.9999, "min_decay": 0.0, "optimization_step": 500, "power": 0.75}
    save_model(folder / "unet_ema", network, ema)
    write_json(
        tmp_path / "out" / "scheduler" / "scheduler_config.json",
        {**SCHEDULER, "variance_type": "fixed_large"},
    )
    loaded = check_round_trip(folder, network)
    assert values(loaded)["weights"] == ("ema (of online, ema)", "weights")
    # The scheduler stands in the folder that training writes to.
    assert (loaded.spec.weights, loaded.spec.variance) == ("ema", "fixed_large")
    assert check_round_trip(folder, online, weights="online").spec.weights == "online"
    assert check_round_trip(folder / "unet", online).spec.variance == "fixed_large"
    assert load_network(folder / "unet_ema").spec.weights == "ema"
    with pytest.raises(CheckpointError, match="holds no ema weights; it has online"):
        load_network(folder / "unet", weights="ema")


def test_a_training_that_has_not_ended_names_its_checkpoints(
    tmp_path: Path, network: UNet2D
) -> None:
    for step in (500, 1000, 1500):
        save_model(tmp_path / f"checkpoint-{step}" / "unet", network, CONFIG)
    with pytest.raises(CheckpointError, match="training that has not ended") as error:
        load_network(tmp_path)
    assert error.value.hint.endswith("checkpoint-1500")


def test_safetensors_are_read_before_pickles(pipeline: Path, network: UNet2D) -> None:
    (pipeline / "unet" / f"{WEIGHTS}.bin").write_bytes(b"no pickle")
    check_round_trip(pipeline, network)


def test_a_variant_is_read_where_the_plain_weights_are_not_there(
    pipeline: Path, network: UNet2D
) -> None:
    plain = pipeline / "unet" / f"{WEIGHTS}.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(plain).items()}
    save_file(half, plain.with_name(f"{WEIGHTS}.fp16.safetensors"))
    check_round_trip(pipeline, network)
    plain.unlink()
    halved = network_of(CONFIG)
    halved.load_state_dict({name: tensor.float() for name, tensor in half.items()})
    check_round_trip(pipeline, halved)


def shard(folder: Path, suffix: str = "safetensors") -> None:
    """Splits the weights of a folder in three, as diffusers does with large ones."""
    whole = folder / f"{WEIGHTS}.safetensors"
    state = load_file(whole)
    whole.unlink()
    places = {}
    for part in range(3):
        name = f"{WEIGHTS}-{part + 1:05}-of-00003.{suffix}"
        held = {key: state[key] for key in sorted(state)[part::3]}
        places.update(dict.fromkeys(held, name))
        if suffix == "bin":
            torch.save(held, folder / name)
        else:
            save_file(held, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    write_json(folder / f"{WEIGHTS}.{suffix}.index.json", index)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_in_parts_are_read_together(pipeline: Path, network: UNet2D, suffix: str) -> None:
    shard(pipeline / "unet", suffix)
    check_round_trip(pipeline, network)
    # One part named itself stands for them all.
    part = pipeline / "unet" / f"{WEIGHTS}-00002-of-00003.{suffix}"
    check_round_trip(part, network)
    part.unlink()
    with pytest.raises(CheckpointError, match="lacks diffusion_pytorch_model-00002-of-00003"):
        load_network(pipeline)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_index_reads_nothing_outside_its_folder(pipeline: Path, suffix: str) -> None:
    folder = pipeline / "unet"
    elsewhere = pipeline / f"elsewhere.{suffix}"
    (folder / f"{WEIGHTS}.safetensors").rename(elsewhere)
    for place in (f"../elsewhere.{suffix}", str(elsewhere.absolute())):
        write_json(
            folder / f"{WEIGHTS}.{suffix}.index.json", {"weight_map": {"conv_in.weight": place}}
        )
        with pytest.raises(CheckpointError, match="lacks elsewhere"):
            load_network(pipeline)
    write_json(folder / f"{WEIGHTS}.{suffix}.index.json", {"weight_map": {"conv_in.weight": ".."}})
    with pytest.raises(CheckpointError, match="lacks "):
        load_network(pipeline)


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gives attention the names that it had before diffusers 0.17."""
    renamed = {}
    for key, tensor in state.items():
        name = key
        for new, old in OLD.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    return renamed


def test_a_file_of_2022_is_read(tmp_path: Path) -> None:
    """Flat, in a pickle, with attention's old names and the keys that a config had then."""
    config = {
        **CONFIG,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_type": "conv",
        "upsample_type": "conv",
    }
    network = network_of(config)
    then = (
        "act_fn attention_head_dim block_out_channels center_input_sample downsample_padding "
        "flip_sin_to_cos freq_shift in_channels layers_per_block mid_block_scale_factor norm_eps "
        "norm_num_groups out_channels sample_size"
    )
    kept = {name: config[name] for name in then.split()}
    kept["down_block_types"] = ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]
    kept["up_block_types"] = ["UNetResAttnUpBlock2D", "UNetResUpBlock2D"]
    write_json(tmp_path / "config.json", {"_class_name": "UNet2DModel", **kept})
    state = old_names(network.state_dict())
    assert "mid_block.attentions.0.proj_attn.weight" in state
    torch.save(state, tmp_path / f"{WEIGHTS}.bin")
    scheduler = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    write_json(tmp_path / "scheduler_config.json", scheduler)
    write_json(
        tmp_path / "model_index.json",
        {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
    )
    loaded = check_round_trip(tmp_path, network)
    assert isinstance(loaded.network, UNet2D)
    assert loaded.network.settings == network.settings
    assert (loaded.spec.variance, loaded.spec.prediction) == ("fixed_large", "epsilon")
    assert loaded.spec.sampling.steps == 1000
    check_round_trip(tmp_path / f"{WEIGHTS}.bin", network)


def test_a_wrapped_and_prefixed_state_beside_its_config_is_read(
    tmp_path: Path, network: UNet2D
) -> None:
    save_model(tmp_path, network, CONFIG)
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "last.pt")
    torch.save(state, tmp_path / "bare.pt")
    check_round_trip(tmp_path / "last.pt", network)
    check_round_trip(tmp_path / "bare.pt", network)


def test_a_state_without_its_config_is_refused(tmp_path: Path, network: UNet2D) -> None:
    path = tmp_path / "unet.pt"
    torch.save(network.state_dict(), path)
    with pytest.raises(CheckpointError, match="and not its config") as error:
        load_network(path)
    assert error.value.hint.endswith(str(tmp_path / "config.json"))


def test_a_label_is_an_input_and_has_no_null_unless_somebody_says_so(tmp_path: Path) -> None:
    config = {**CONFIG, "num_class_embeds": 5, "resnet_time_scale_shift": "scale_shift"}
    network = network_of(config)
    save_pipeline(tmp_path / "p", network, config)
    label = check_round_trip(tmp_path / "p", network).spec.label
    assert label is not None
    assert (label.name, label.dtype, label.classes, label.null) == ("y", "int64", 5, None)
    loaded = check_round_trip(tmp_path / "p", network, settings={"null_label": "4"})
    assert loaded.spec.label is not None
    assert loaded.spec.label.null == 4
    assert values(loaded)["null_label"] == (4, "flag")
    with pytest.raises(CheckpointError, match="null_label is 5; the labels are 0 to 4"):
        load_network(tmp_path / "p", settings={"null_label": "5"})


def test_what_is_said_wins_over_the_config(pipeline: Path) -> None:
    said = {"norm_eps": "1e-3", "attention_head_dim": "4", "variance_type": "fixed_large"}
    loaded = load_network(pipeline, settings=said)
    assert isinstance(loaded.network, UNet2D)
    assert (loaded.network.settings.eps, loaded.network.settings.head_dim) == (1e-3, 4)
    assert loaded.spec.variance == "fixed_large"
    assert values(loaded)["norm_eps"] == (1e-3, "flag")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fourier": ({"time_embedding_type": "fourier"}, "time_embedding_type 'fourier'"),
    "spatial": ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift 'spatial'"),
    "timestep": ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
    "identity": ({"class_embed_type": "identity"}, "class_embed_type 'identity'"),
    "skip": ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "has a SkipDownBlock2D"),
    "kdown": ({"up_block_types": ["KUpBlock2D", "UpBlock2D"]}, "has a KUpBlock2D"),
    "act": ({"act_fn": "elu"}, "act_fn 'elu'"),
    "conditioned": ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel: a U-Net cond"),
    "first": ({"_class_name": "UNetModel"}, "UNetModel: the U-Net of diffusers' first revisions"),
    "unknown": ({"_class_name": "MyNet"}, "holds a MyNet: another network of diffusers"),
    "widths": ({"block_out_channels": [4, 16]}, r"says block_out_channels \[4, 16\], and the wei"),
    "layers": ({"layers_per_block": 3}, "says layers_per_block 3, and the weights have 1"),
    "attention": ({"down_block_types": ["DownBlock2D"] * 2}, "says down_block_types"),
    "classes": ({"num_class_embeds": 7}, "says num_class_embeds 7"),
    "size": ({"sample_size": 7}, "image size is 7x7; this network takes multiples of 2"),
    "head": ({"attention_head_dim": 64}, "attention_head_dim is 64"),
    "groups": ({"norm_num_groups": 3}, "must be divisible by num_groups"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_another_network_is_refused_by_name(
    tmp_path: Path, network: UNet2D, changes: dict[str, Any], message: str
) -> None:
    folder = save_model(tmp_path / "m", network, {**CONFIG, **changes})
    for path in (folder, folder / f"{WEIGHTS}.safetensors"):
        with pytest.raises(CheckpointError, match=message):
            load_network(path)


def test_a_pipeline_of_another_network_is_refused_before_its_weights_are_read(
    pipeline: Path,
) -> None:
    index = json.loads((pipeline / "model_index.json").read_text(encoding="utf-8"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"unet": ["diffusers", "UNet2DConditionModel"]}, "holds a UNet2DConditionModel"),
        ({"vqvae": ["diffusers", "VQModel"]}, "draws what the vqvae in it decodes"),
        ({"unet": None, "transformer": ["diffusers", "X"]}, "of scheduler, transformer: it has no"),
    ]
    for changes, message in cases:
        write_json(pipeline / "model_index.json", {**index, **changes})
        with pytest.raises(CheckpointError, match=message):
            load_network(pipeline)


def test_damaged_folders_are_refused_with_what_is_wrong(pipeline: Path) -> None:
    weights = pipeline / "unet" / f"{WEIGHTS}.safetensors"
    state: dict[str, torch.Tensor] = load_file(weights)
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({k: v for k, v in state.items() if k != "conv_out.bias"}, "Missing key.*conv_out.bias"),
        ({**state, "more": torch.zeros(1)}, "Unexpected key.*more"),
        ({**state, "conv_out.bias": torch.zeros(3)}, "size mismatch for conv_out.bias"),
        ({**state, "conv_out.bias": torch.full((1,), torch.nan)}, "not finite: 1 of 1 in conv_out"),
    ]
    for changed, message in cases:
        save_file(changed, weights)
        with pytest.raises(CheckpointError, match=message):
            load_network(pipeline)
    weights.unlink()
    with pytest.raises(CheckpointError, match="has no weights beside its"):
        load_network(pipeline)
    (pipeline / "unet" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="names a unet, and there is neither"):
        load_network(pipeline)
    (pipeline / "model_index.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match="it is no JSON"):
        load_network(pipeline)


def test_a_folder_of_something_else_is_not_this_family_s(tmp_path: Path, network: UNet2D) -> None:
    (tmp_path / "config.json").write_text("no JSON", encoding="utf-8")
    with pytest.raises(CheckpointError, match="is a folder"):
        load_network(tmp_path)
    torch.save(network.state_dict(), tmp_path / "unet.pt")
    with pytest.raises(CheckpointError, match="and not its config"):
        load_network(tmp_path / "unet.pt")


def test_a_network_that_takes_a_picture_besides_is_refused(tmp_path: Path) -> None:
    config = {**CONFIG, "in_channels": 3}
    save_model(tmp_path / "m", network_of(config), config)
    with pytest.raises(CheckpointError, match="takes 3 channels and gives 1"):
        load_network(tmp_path / "m")


def test_a_changed_config_shows_beside_an_engine_s_spec(pipeline: Path, tmp_path: Path) -> None:
    before = load_network(pipeline).spec
    assert load_network(pipeline, spec=before).spec == before
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text(encoding="utf-8"))
    write_json(scheduler, {**config, "prediction_type": "sample", "beta_end": 0.5})
    after = load_network(pipeline, spec=before).spec
    assert set(differing_fields(after, before)) == {"prediction", "schedule"}
    # And an engine's spec that was edited is not taken for the checkpoint's.
    edited = before.with_changes(prediction="v_prediction", clip=3.0, variance="fixed_large")
    assert load_network(pipeline, spec=edited).spec == after


def test_what_was_typed_over_a_config_is_replayed(pipeline: Path) -> None:
    said: dict[str, Any] = {"settings": {"norm_eps": "0.01"}, "prediction": "sample"}
    typed = load_network(pipeline, **said)
    again = load_network(pipeline, spec=ModelSpec.from_json(typed.spec.to_json()))
    assert again.spec == typed.spec
    assert isinstance(again.network, UNet2D)
    assert isinstance(typed.network, UNet2D)
    assert again.network.settings == typed.network.settings
    assert again.network.settings.eps == 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"center_input_sample": "false"}, "says center_input_sample 'false', which is not true"),
        ({"flip_sin_to_cos": 1}, "says flip_sin_to_cos 1, which is not true or false"),
        ({"attention_head_dim": "8"}, "says attention_head_dim '8', which is not a whole number"),
        ({"attention_head_dim": 0}, "attention_head_dim is 0; there is 1 to inf"),
        ({"norm_num_groups": 8.0}, "says norm_num_groups 8.0, which is not a whole number"),
        ({"norm_eps": float("nan")}, "says norm_eps nan, which is not a number"),
        ({"norm_eps": 1e300}, "norm_eps is 1e"),
        ({"downsample_padding": 2}, "downsample_padding is 2; there is 0 to 1"),
        ({"sample_size": "16"}, "says sample_size '16'; it is a side"),
        ({"sample_size": [16]}, r"says sample_size \[16\]; it is a side"),
        ({"sample_size": [16.0, 16.0]}, "says sample_size"),
        ({"resnet_time_scale_shift": "scale_shift"}, "says resnet_time_scale_shift 'scale_shift'"),
        ({"add_attention": False}, "says add_attention False, and the weights have True"),
    ],
)
def test_a_config_s_value_of_another_kind_is_refused(
    pipeline: Path, changes: dict[str, Any], message: str
) -> None:
    config = json.loads((pipeline / "unet" / "config.json").read_text(encoding="utf-8"))
    write_json(pipeline / "unet" / "config.json", {**config, **changes})
    with pytest.raises(CheckpointError, match=message):
        load_network(pipeline)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_sample": "false"}, "says clip_sample 'false', which is not true or false"),
        ({"thresholding": "false"}, "says thresholding 'false', which is not true or false"),
        ({"rescale_betas_zero_snr": "no"}, "says rescale_betas_zero_snr 'no', which is not"),
        ({"clip_sample_range": 0}, "says what cannot be: clip is 0"),
        ({"num_train_timesteps": True}, "num_train_timesteps is True, not 1 to"),
        ({"rescale_betas_zero_snr": True}, "says what cannot be: alpha_bar is 0"),
    ],
)
def test_a_scheduler_s_value_of_another_kind_is_refused(
    pipeline: Path, changes: dict[str, Any], message: str
) -> None:
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text(encoding="utf-8"))
    write_json(scheduler, {**config, "timestep_spacing": "trailing", **changes})
    with pytest.raises(CheckpointError, match=message):
        load_network(pipeline)


def test_the_hash_of_a_file_is_over_the_configs_beside_it(pipeline: Path) -> None:
    weights = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    torch.save({"model": weights}, pipeline / "unet" / "ckpt.pt")
    before = load_network(pipeline / "unet" / "ckpt.pt").spec.checkpoint_sha256
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text(encoding="utf-8"))
    write_json(scheduler, {**config, "beta_end": 0.5})
    assert load_network(pipeline / "unet" / "ckpt.pt").spec.checkpoint_sha256 != before
