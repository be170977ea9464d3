"""UNet2DModel configs at random, tiny, and the folders that diffusers would write for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from ddpm_deploy.model.unet2d import Block, UNet2D, UNet2DSettings, timestep_frequencies

SCHEDULER: dict[str, Any] = {
    "_class_name": "DDPMScheduler",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "variance_type": "fixed_small",
}


def random_config(seed: int) -> dict[str, Any]:
    """Returns the arguments of a tiny UNet2DModel; every setting takes every value somewhere."""
    rng = np.random.default_rng(seed)

    def one(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    levels = int(rng.integers(1, 4))
    groups = one(2, 4)
    widths = [int(groups * rng.integers(1, 4)) for _ in range(levels)]
    downs = [one("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D") for _ in widths]
    ups = [one("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D") for _ in widths]
    channels = one(1, 2, 3)
    step = 2 ** (levels - 1)
    return {
        "sample_size": one(4 * step, [2 * step, 4 * step]),
        "in_channels": channels,
        "out_channels": channels,
        "center_input_sample": one(False, True),
        "freq_shift": one(0, 1) if widths[0] > 3 else 0,
        "flip_sin_to_cos": one(False, True),
        "down_block_types": downs,
        "up_block_types": ups,
        "block_out_channels": widths,
        "layers_per_block": one(1, 2),
        "mid_block_scale_factor": one(1, 1.4, 2),
        "downsample_padding": one(0, 1),
        "downsample_type": one("conv", "resnet"),
        "upsample_type": one("conv", "resnet"),
        "dropout": one(0.0, 0.3),
        "act_fn": one("silu", "swish", "mish", "gelu", "relu"),
        "attention_head_dim": one(1, 2, None),
        "norm_num_groups": groups,
        "attn_norm_num_groups": one(None, 1, 2),
        "norm_eps": one(1e-5, 1e-6, 1e-3),
        "resnet_time_scale_shift": one("default", "scale_shift"),
        "add_attention": one(True, True, False),
        "mid_block_type": one("UNetMidBlock2D", "UNetMidBlock2D", None),
        "num_class_embeds": one(None, 5),
        "time_embedding_dim": one(None, 24),
    }


def settings_of(config: Mapping[str, Any]) -> UNet2DSettings:
    """Says in our words what a config says in diffusers' (facts of section 3.2)."""
    widths = tuple(config["block_out_channels"])
    last = len(widths) - 1

    def block(name: str, index: int, kind: str) -> Block:
        attention, resnet = name.startswith("Attn"), name.startswith("Resnet")
        resample = "resnet" if resnet or (attention and config[kind] == "resnet") else "conv"
        return Block(attention=attention, resample="conv" if index == last else resample)  # type: ignore[arg-type]

    default = config["resnet_time_scale_shift"] == "default"
    middle = config["mid_block_type"] is not None
    attends = middle and config["add_attention"]
    groups = config["attn_norm_num_groups"] or (config["norm_num_groups"] if default else None)
    return UNet2DSettings(
        channels=config["in_channels"],
        out_channels=config["out_channels"],
        widths=widths,
        layers=config["layers_per_block"],
        down=tuple(
            block(name, i, "downsample_type") for i, name in enumerate(config["down_block_types"])
        ),
        up=tuple(
            block(name, i, "upsample_type") for i, name in enumerate(config["up_block_types"])
        ),
        classes=config["num_class_embeds"] or 0,
        time=config["time_embedding_dim"] or 4 * widths[0],
        head_dim=config["attention_head_dim"],
        groups=config["norm_num_groups"],
        middle_groups=groups if attends else None,
        eps=config["norm_eps"],
        padding=config["downsample_padding"],
        activation=config["act_fn"],
        scale_shift=not default,
        middle=middle,
        middle_attention=attends,
        middle_scale=config["mid_block_scale_factor"],
        center=config["center_input_sample"],
        cosine_first=config["flip_sin_to_cos"],
    )


def network_of(config: Mapping[str, Any], seed: int = 0) -> UNet2D:
    """Makes a network of a config, in evaluation mode, with weights that all matter."""
    settings = settings_of(config)
    network = UNet2D(settings, timestep_frequencies(settings.widths[0], config["freq_shift"]))
    scramble(network, seed)
    return network.eval()


def scramble(network: nn.Module, seed: int) -> None:
    """Draws every parameter anew, so that no norm is 1 and no bias 0."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=drawn))


def save_pipeline(
    folder: Path,
    network: nn.Module,
    config: Mapping[str, Any],
    scheduler: Mapping[str, Any] = SCHEDULER,
    *,
    pipeline: str = "DDPMPipeline",
    suffix: str = "safetensors",
) -> Path:
    """Writes what `DDPMPipeline.save_pretrained` writes."""
    save_model(folder / "unet", network, config, suffix=suffix)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": pipeline,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    write_json(folder / "model_index.json", index)
    return folder


def save_model(
    folder: Path, network: nn.Module, config: Mapping[str, Any], *, suffix: str = "safetensors"
) -> Path:
    """Writes what `UNet2DModel.save_pretrained` writes."""
    write_json(folder / "config.json", {"_class_name": "UNet2DModel", **config})
    path = folder / f"diffusion_pytorch_model.{suffix}"
    state = network.state_dict()
    if suffix.endswith("safetensors"):
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return folder


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
