"""denoising-diffusion-pytorch, the release that is installed: its networks, files and runs.

    python -m tests.peers.lucidrains_peer     # writes the variants of that release anew

The package imports torchvision at its top and uses it for training alone: an empty module in its
place does.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tests import golden

PACKAGE = "denoising_diffusion_pytorch"
TINY = {"dim": 16, "dim_mults": (1, 2)}

VARIANTS: dict[str, dict[str, Any]] = {
    "v2_3_selfcond": {
        "release": "2.3.4",
        "unet": {
            "dim": 8,
            "init_dim": 12,
            "dim_mults": (1, 2),
            "channels": 1,
            "self_condition": True,
            "full_attn": (True, False),
            "attn_heads": (2, 3),
            "attn_dim_head": (6, 4),
        },
        "diffusion": {
            "timesteps": 100,
            "objective": "pred_noise",
            "beta_schedule": "linear",
            "min_snr_loss_weight": True,
        },
        "ddim": (7, 0.5),
    },
    "v2_3_x0": {
        "release": "2.3.4",
        "unet": {"dim": 8, "dim_mults": (1, 2, 2)},
        "diffusion": {"timesteps": 50, "objective": "pred_x0", "beta_schedule": "cosine"},
        "size": (8, 12),
        "ddim": (14, 0.5),
    },
    "v2_3_learned": {
        "release": "2.3.4",
        "unet": {"dim": 8, "dim_mults": (1, 2), "learned_variance": True},
        "diffusion": {"timesteps": 12, "beta_schedule": "cosine"},
        "learned": True,
    },
    "v2_3_sequence": {
        "release": "2.3.4",
        "unet": {"dim": 8, "dim_mults": (1, 2), "channels": 2, "self_condition": True},
        "diffusion": {"timesteps": 30},
        "size": (16,),
        "ddim": (7, 0.5),
    },
    "v1_9_memory": {
        "release": "1.9.4",
        "unet": {**TINY, "attn_heads": 2, "full_attn": (True, False)},
        "diffusion": {"timesteps": 16},
    },
    "v1_9_sequence": {
        "release": "1.9.4",
        "unet": {**TINY, "attn_heads": 2},
        "diffusion": {"timesteps": 16, "objective": "pred_v"},
        "size": (16,),
    },
    "v1_8_heads": {
        "release": "1.8.15",
        "unet": {
            **TINY,
            "attn_heads": (2, 3),
            "attn_dim_head": (6, 4),
            "full_attn": (True, False),
        },
        "diffusion": {"timesteps": 40, "beta_schedule": "linear"},
        "ddim": (7, 0.0),
    },
    "v1_7_7": {"release": "1.7.7"},
    "v1_7_3": {"release": "1.7.3"},
    "v1_7_1": {"release": "1.7.1"},
    "v1_7_0": {"release": "1.7.0"},
    "v1_5_4": {"release": "1.5.4", "diffusion": {"timesteps": 50}, "ddim": (7, 0.5)},
    "v1_5_sequence": {
        "release": "1.5.4",
        "size": (16,),
        "diffusion": {"timesteps": 50},
        "ddim": (7, 0.5),
    },
    "v1_0_0": {"release": "1.0.0", "diffusion": {"timesteps": 50}, "ddim": (7, 0.5)},
    "v0_30_0": {"release": "0.30.0", "diffusion": {"timesteps": 50}, "ddim": (7, 0.5)},
    "v0_27_4": {"release": "0.27.4"},
}


def module(name: str = PACKAGE) -> Any:
    """Imports a module of the package."""
    return importlib.import_module(f"{PACKAGE}.{name}")


def make_unet(axes: int = 2, **arguments: Any) -> Any:
    """Makes the release's own network, in evaluation mode."""
    unet = module().Unet if axes == 2 else module(f"{PACKAGE}_1d").Unet1D
    return unet(**arguments).eval()


def make_diffusion(unet: Any, size: Sequence[int], *, learned: bool = False, **given: Any) -> Any:
    """Makes the release's own diffusion around a network."""
    if len(size) == 1:
        return module(f"{PACKAGE}_1d").GaussianDiffusion1D(unet, seq_length=size[0], **given).eval()
    kind = module("learned_gaussian_diffusion").LearnedGaussianDiffusion if learned else None
    square = size[0] if size[0] == size[1] else tuple(size)
    return (kind or module().GaussianDiffusion)(unet, image_size=square, **given).eval()


def fill(network: nn.Module, seed: str) -> list[dict[str, Any]]:
    """Fills a network with weights by formula; returns what `golden.make_variant` needs of them."""
    entries = []
    for key, tensor in network.state_dict().items():
        offset, amp = 0.0, 0.1
        if tensor.ndim > 1 and key.endswith("weight"):
            amp = math.sqrt(3.0 / math.prod(tensor.shape[1:]))
        elif key.endswith(("norm.weight", ".g")):
            offset, amp = 1.0, 0.3
        elif key.endswith("mem_kv"):
            amp = 1.0
        entry: dict[str, Any] = {"key": key, "shape": list(tensor.shape), "dtype": "float32"}
        entry |= {"offset": offset, "amp": amp, "seed": f"{seed}/{key}"}
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(golden._entry(entry, golden.GOLDEN)))
        entries.append(entry)
    return entries


def record(diffusion: Any, shape: tuple[int, ...], seed: int) -> dict[str, NDArray[Any]]:
    """Runs a diffusion's own loop for one sample, and returns all that went in and out."""
    generator = np.random.default_rng(seed)
    noise: list[NDArray[np.float32]] = []
    calls: list[dict[str, NDArray[Any]]] = []
    network = diffusion.model.forward

    def draw(*_: Any, **__: Any) -> Tensor:
        noise.append(generator.standard_normal((1, *shape), dtype=np.float32))
        return torch.from_numpy(noise[-1])

    def call(x: Tensor, t: Tensor, seen: Tensor | None = None, **named: Tensor) -> Tensor:
        seen = named.get("x_self_cond", seen)
        out: Tensor = network(x, t, seen) if diffusion.model.self_condition else network(x, t)
        kept = {"model_in": x, "timesteps": t, "model_out": out}
        if seen is not None:
            kept["model_self_cond"] = seen
        calls.append({name: tensor.numpy()[0].copy() for name, tensor in kept.items()})
        return out

    with (
        mock.patch("torch.randn", draw),
        mock.patch("torch.randn_like", draw),
        mock.patch.object(diffusion.model, "forward", call),
        torch.no_grad(),
    ):
        final = diffusion.sample(batch_size=1)
    run = {name: np.stack([c[name] for c in calls if name in c]) for name in calls[-1]}
    return {**run, "noise": np.concatenate(noise), "final": final.numpy()[0]}


def write_variant(name: str) -> None:
    """Records a variant into tests/data/golden."""
    variant = VARIANTS[name]
    size = variant.get("size", (8, 8))
    steps, eta = variant.get("ddim", (None, 0.0))
    unet = make_unet(len(size), **variant.get("unet", TINY))
    given = variant.get("diffusion", {"timesteps": 16})
    if steps:
        given = {**given, "sampling_timesteps": steps, "ddim_sampling_eta": eta}
    diffusion = make_diffusion(unet, size, learned=variant.get("learned", False), **given)
    folder = golden.GOLDEN / "lucidrains" / name
    folder.mkdir(parents=True, exist_ok=True)
    entries = fill(unet, f"lucidrains/{name}")
    buffers = {key: t.numpy() for key, t in diffusion.state_dict().items() if "." not in key}
    np.savez_compressed(folder / "buffers.npz", **buffers)
    stored = [
        {"key": key, "shape": list(b.shape), "dtype": "float32", "npz": "buffers.npz", "name": key}
        for key, b in buffers.items()
    ]
    named = [{**entry, "key": f"model.{entry['key']}"} for entry in entries]
    table = {
        "format": "lucidrains",
        "variant": name,
        "peer": f"denoising-diffusion-pytorch {version('denoising-diffusion-pytorch')} (PyPI)",
        "torch": torch.__version__,
        "unet_args": variant.get("unet", TINY),
        "diffusion_args": given,
        "sample_shape": [unet.channels, *size],
        "files": [
            {"path": "diffusion_state_dict.pt", "kind": "torch", "tree": {"$tensors": "diffusion"}}
        ],
        "tensors": {"diffusion": [*stored, *named]},
    }
    (folder / "table.json").write_text(json.dumps(table, separators=(",", ":")), encoding="utf-8")
    shape = (unet.channels, *size)
    generator = np.random.default_rng(len(name))
    calls: dict[str, NDArray[Any]] = {}
    last = diffusion.num_timesteps - 1
    for case, t in enumerate([[1, last], [last // 2, 3], [0, 3 * last // 4]]):
        inputs = [generator.standard_normal((2, *shape), dtype=np.float32), np.array(t)]
        names = [f"x{case}", f"t{case}"]
        if case and unet.self_condition:
            inputs.append(generator.uniform(-1, 1, (2, *shape)).astype(np.float32))
            names.append(f"self_cond{case}")
        with torch.no_grad():
            calls[f"out{case}"] = unet(*map(torch.from_numpy, inputs)).numpy()
        calls |= dict(zip(names, inputs, strict=True))
    run = record(diffusion, shape, len(name))
    np.savez_compressed(folder / "io.npz", allow_pickle=False, **calls)
    np.savez_compressed(folder / "run.npz", allow_pickle=False, **run)


if __name__ == "__main__":
    for each, made_by in VARIANTS.items():
        if made_by["release"] == version("denoising-diffusion-pytorch"):
            write_variant(each)
            print(each)
