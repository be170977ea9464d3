"""Ports of Ho et al.'s network: ermongroup/ddim's lists, pytorch_diffusion's bare states."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_deploy import ModelSpec, linear
from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model import load_network
from ddpm_deploy.model.ddim_port import CIFAR10
from ddpm_deploy.model.families import FAMILIES
from ddpm_deploy.model.unet2d import Block, UNet2D, UNet2DSettings, timestep_frequencies
from ddpm_deploy.sampling import Sampling
from tests.model.diffusers_configs import scramble
from tests.round_trip import check_round_trip

GROUPS = {"norm_num_groups": "2"}
"""The originals have 32 groups, and networks of 32 channels are no test of a moment."""


def random_settings(seed: int) -> UNet2DSettings:
    rng = np.random.default_rng(seed)
    levels = int(rng.integers(1, 5))
    first = int(rng.choice([4, 6, 8]))
    widths = tuple(first * int(m) for m in rng.integers(1, 4, levels))
    attention = rng.random(levels) < 0.5
    down = tuple(Block(attention=bool(each)) for each in attention)
    channels = int(rng.choice([1, 3]))
    return UNet2DSettings(
        channels=channels,
        out_channels=channels,
        widths=widths,
        first=0 if widths[0] == first else first,
        layers=int(rng.integers(1, 3)),
        down=down,
        up=down[::-1],
        time=4 * first,
        head_dim=None,
        groups=2,
        middle_groups=2,
        eps=1e-6,
        padding=0,
        cosine_first=False,
    )


def network_of(settings: UNet2DSettings, seed: int = 0) -> UNet2D:
    first = settings.first or settings.widths[0]
    network = UNet2D(settings, timestep_frequencies(first, 1))
    scramble(network, seed)
    return network.eval()


def original_names(network: UNet2D) -> dict[str, torch.Tensor]:
    """Gives the tensors the names that the original's code registers them by."""
    levels = len(network.settings.widths)
    state = {}
    for key, value in network.state_dict().items():
        tensor, parts = value, key.split(".")
        match parts[0]:
            case "time_embedding":
                parts = ["temb", "dense", "0" if parts[1] == "linear_1" else "1", *parts[2:]]
            case "conv_norm_out":
                parts[0] = "norm_out"
            case "down_blocks":
                parts[0] = "down"
            case "up_blocks":
                parts[:2] = ["up", str(levels - 1 - int(parts[1]))]
            case "mid_block":
                attends = parts[1] == "attentions"
                parts[:3] = ["mid", "attn_1" if attends else f"block_{int(parts[2]) + 1}"]
        name = ".".join(parts)
        attention = "attentions" in name or "attn" in name
        for new, old in [
            ("resnets", "block"),
            ("attentions", "attn"),
            ("downsamplers.0", "downsample"),
            ("upsamplers.0", "upsample"),
            ("time_emb_proj", "temb_proj"),
            ("conv_shortcut", "nin_shortcut"),
            ("to_out.0", "proj_out"),
            ("to_", ""),
            ("group_norm", "norm"),
        ]:
            name = name.replace(new, old)
        if attention and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        state[name] = tensor
    return state


def check_random(path: Path, seed: int, *, export: Path | None = None) -> None:
    settings = random_settings(seed)
    network = network_of(settings, seed)
    state = original_names(network)
    if seed % 2:
        other = {k: v + 1 for k, v in state.items()}
        online = {f"module.{k}": v for k, v in other.items()}
        torch.save([online, {"state": {}, "param_groups": []}, 3, 5000, state], path)
    else:
        torch.save(state, path)
    multiple = 2 ** (len(settings.widths) - 1)
    size = (2 * multiple, 3 * multiple)
    loaded = check_round_trip(path, network, export=export, image_size=size, settings=GROUPS)
    assert isinstance(loaded.network, UNet2D)
    assert loaded.network.settings == settings
    assert (loaded.spec.family, loaded.spec.sample_shape) == ("ddim", (settings.channels, *size))
    again = load_network(path, spec=ModelSpec.from_json(loaded.spec.to_json()))
    assert again.spec == loaded.spec
    assert again.network.settings == settings


@pytest.mark.parametrize("seed", range(50))
def test_a_random_network_comes_back_with_every_hyper_parameter(tmp_path: Path, seed: int) -> None:
    check_random(tmp_path / "ckpt.pth", seed)


QUICK = (1, 8, 11)


@pytest.mark.parametrize(
    "seed",
    [pytest.param(s, marks=() if s in QUICK else [pytest.mark.slow]) for s in range(50)],
)
def test_a_random_network_exports(tmp_path: Path, seed: int) -> None:
    check_random(tmp_path / "ckpt.pth", seed, export=tmp_path / "unet.onnx")


SMALL = random_settings(3)


@pytest.fixture(scope="module")
def network() -> UNet2D:
    return network_of(SMALL)


def said(**more: str) -> dict[str, Any]:
    return {"image_size": 16, "settings": {**GROUPS, **more}}


def test_its_weights_are_of_this_family_alone(network: UNet2D) -> None:
    state = original_names(network)
    assert [family.name for family in FAMILIES if family.matches(state)] == ["ddim"]
    autoencoder = {f"encoder.{name}": value for name, value in state.items()}
    assert not [family for family in FAMILIES if family.matches({**state, **autoencoder})]


def test_names_are_the_original_s(network: UNet2D) -> None:
    """The rest would follow from one that is wrong in the code and here alike."""
    names = original_names(network)
    patterns = [
        r"(conv_in|conv_out|norm_out|temb\.dense\.[01])",
        r"(down|up)\.\d\.block\.\d\.(norm1|conv1|temb_proj|norm2|conv2|nin_shortcut)",
        r"mid\.block_[12]\.(norm1|conv1|temb_proj|norm2|conv2)",
        r"((down|up)\.\d\.attn\.\d|mid\.attn_1)\.(norm|q|k|v|proj_out)",
        r"(down\.\d\.downsample|up\.\d\.upsample)\.conv",
    ]
    for name in names:
        assert any(re.fullmatch(rf"{p}\.(weight|bias)", name) for p in patterns), name


def test_a_list_has_the_ema_s_weights_and_the_online_ones(tmp_path: Path, network: UNet2D) -> None:
    path = tmp_path / "ckpt.pth"
    online = network_of(SMALL, seed=1)
    wrapped = {f"module.{k}": v for k, v in original_names(online).items()}
    optimizer = {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]}
    torch.save([wrapped, optimizer, 1, 5000, original_names(network)], path)
    loaded = check_round_trip(path, network, **said())
    assert loaded.facts[0].value == "ema (of online, ema)"
    check_round_trip(path, online, weights="online", **said())
    torch.save([wrapped, optimizer, 1, 5000], path)
    assert check_round_trip(path, online, **said()).spec.weights == "online"
    with pytest.raises(CheckpointError, match="holds no ema weights"):
        load_network(path, weights="ema", **said())


def test_each_project_s_own_sampler_is_assumed(tmp_path: Path, network: UNet2D) -> None:
    bare, listed = tmp_path / "bare.pt", tmp_path / "ckpt.pth"
    state = original_names(network)
    torch.save(state, bare)
    torch.save([state, {}, 1, 5000], listed)
    spec = load_network(bare, **said()).spec
    assert (spec.sampler, spec.clip, spec.variance, spec.rounding) == (
        "ddpm",
        1.0,
        "fixed_small",
        "truncate",
    )
    loaded = load_network(listed, **said())
    spec = loaded.spec
    assert (spec.sampler, spec.clip, spec.rounding) == ("ddim", None, "nearest")
    assert spec.sampling == Sampling(direction="network")
    assert spec.schedule == linear(1000)
    assert {fact.name for fact in loaded.assumed} == {
        "norm_eps",
        "schedule",
        "prediction",
        "sampler",
        "clip_sample",
        "variance",
        "rounding",
    }
    spec = load_network(listed, **said(sampler="ddpm")).spec
    assert (spec.sampler, spec.clip, spec.variance) == ("ddpm", 1.0, "fixed_large")


def test_the_published_cifar10_network_has_the_large_variance(tmp_path: Path) -> None:
    blocks = (Block(), Block(attention=True), Block(), Block())
    settings = UNet2DSettings(
        channels=3,
        out_channels=3,
        widths=CIFAR10,
        layers=1,
        down=blocks,
        up=blocks[::-1],
        head_dim=None,
        eps=1e-6,
        padding=0,
        cosine_first=False,
    )
    network = UNet2D(settings, timestep_frequencies(128, 1))
    torch.save(original_names(network), tmp_path / "cifar10.pt")
    loaded = load_network(tmp_path / "cifar10.pt", image_size=32)
    assert loaded.spec.variance == "fixed_large"
    found = {fact.name: (fact.value, fact.source) for fact in loaded.facts}
    assert found["attention_levels"] == ("1", "weights")
    assert found["norm_num_groups"] == (32, "assumed")


def test_the_image_size_is_asked_for(tmp_path: Path, network: UNet2D) -> None:
    torch.save(original_names(network), tmp_path / "unet.pt")
    with pytest.raises(CheckpointError, match="does not say its image size"):
        load_network(tmp_path / "unet.pt", settings=GROUPS)


def test_damaged_files_are_refused_with_what_is_wrong(tmp_path: Path, network: UNet2D) -> None:
    path, state = tmp_path / "unet.pt", original_names(network)
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({k: v for k, v in state.items() if k != "conv_out.bias"}, "Missing key.*conv_out.bias"),
        ({**state, "more": torch.zeros(1)}, "Unexpected key.*more"),
        ({**state, "conv_out.bias": torch.zeros(7)}, "size mismatch for conv_out.bias"),
        (
            {k: v for k, v in state.items() if "sample.conv" not in k},
            "trained with resamp_with_conv false",
        ),
    ]
    for changed, message in cases:
        torch.save(changed, path)
        with pytest.raises(CheckpointError, match=message):
            load_network(path, **said())
    torch.save({**state, "logvar": torch.zeros(1000)}, path)
    check_round_trip(path, network, **said())
