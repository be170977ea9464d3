"""OpenAI's own code, where it is installed, and the references in tests/data/golden/openai.

    python -m tests.peers.openai

writes those anew. Neither project is on PyPI: clone openai/guided-diffusion and
openai/improved-diffusion, and put both folders into PYTHONPATH.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.golden import GOLDEN, make_variant

COMMITS = {
    "guided": "openai/guided-diffusion@22e0df8",
    "improved": "openai/improved-diffusion@1bc7bbb",
}


def peer(project: str, name: str) -> Any:
    """Imports one of a project's modules."""
    return import_module(f"{project}_diffusion.{name}")


def diffusion_of(project: str, **flags: Any) -> Any:
    """Makes a project's SpacedDiffusion of its own flags."""
    return peer(project, "script_util").create_gaussian_diffusion(**flags)


@dataclass
class Recorder:
    """A network that writes down what it was called with and what it gave."""

    network: Any

    def __post_init__(self) -> None:
        self.outputs: list[NDArray[Any]] = []
        self.timesteps: list[float] = []

    def __call__(self, x: torch.Tensor, t: torch.Tensor, **labels: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.network(x, t, **labels)
        self.outputs.append(out.numpy())
        self.timesteps.append(float(t[0]))
        return out


@contextmanager
def prepared_noise(noise: NDArray[Any]) -> Iterator[None]:
    """Gives prepared numbers in place of `torch.randn_like`."""
    drawn = iter(noise)
    own = torch.randn_like
    torch.randn_like = lambda x: torch.from_numpy(next(drawn).copy())  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.randn_like = own


def peer_run(
    network: Any,
    diffusion: Any,
    x: NDArray[Any],
    noise: NDArray[Any],
    *,
    ddim: bool = False,
    labels: NDArray[Any] | None = None,
    eta: float | None = None,
) -> dict[str, NDArray[Any]]:
    """Runs a project's own loop, and records every step of it."""
    recorder = Recorder(network)
    loop = diffusion.ddim_sample_loop_progressive if ddim else diffusion.p_sample_loop_progressive
    with torch.no_grad(), prepared_noise(noise):
        steps = loop(
            recorder,
            x.shape,
            noise=torch.from_numpy(x.copy()),
            device="cpu",
            model_kwargs={} if labels is None else {"y": torch.from_numpy(labels)},
            **({} if eta is None else {"eta": eta}),
        )
        states = [x, *(step["sample"].numpy() for step in steps)]
    final = torch.from_numpy(states[-1])
    pixels = ((final + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    recorded = {
        "x_T": x,
        "noise": noise,
        "states": np.stack(states, axis=1),
        "model_out": np.stack(recorder.outputs, axis=1),
        "model_timesteps": np.array(recorder.timesteps),
        "uint8_nhwc": pixels.numpy(),
    }
    return recorded if labels is None else {**recorded, "labels": labels}


# --- The references in tests/data ---

SIZE = 8

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "guided_small_cond": {
        "project": "guided",
        "network": {
            "num_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": "1,2",
            "attention_resolutions": "4",
            "class_cond": True,
            "learn_sigma": True,
            "num_head_channels": 16,
            "resblock_updown": True,
            "use_new_attention_order": True,
            "use_scale_shift_norm": True,
        },
        "diffusion": {"steps": 1000, "noise_schedule": "cosine", "learn_sigma": True},
        "runs": {"ddpm_10": {"timestep_respacing": "10"}},
    },
    "guided_small_legacy": {
        "project": "guided",
        "network": {
            "num_channels": 32,
            "num_res_blocks": 1,
            "channel_mult": "1,2,3",
            "attention_resolutions": "4,2",
            "learn_sigma": True,
            "num_heads": 4,
            "use_scale_shift_norm": True,
        },
        "diffusion": {"steps": 1000, "noise_schedule": "linear", "learn_sigma": True},
        "runs": {
            "ddpm_5_3_2": {"timestep_respacing": "5,3,2"},
            "ddim_ddim10": {"timestep_respacing": "ddim10"},
        },
    },
    "improved_small_plain": {
        "project": "improved",
        "unet": {
            "in_channels": 3,
            "model_channels": 32,
            "out_channels": 3,
            "num_res_blocks": 2,
            "attention_resolutions": [2],
            "channel_mult": [1, 2],
            "num_heads": 1,
            "num_heads_upsample": 2,
        },
        "diffusion": {"steps": 600, "noise_schedule": "linear", "rescale_timesteps": True},
        "runs": {
            "ddpm_10": {"timestep_respacing": "10"},
            "ddpm_10_sigma_small": {"timestep_respacing": "10", "sigma_small": True},
            "ddpm_5_3_2_predict_xstart": {"timestep_respacing": "5,3,2", "predict_xstart": True},
            "ddim_ddim10_eta0.5": {"timestep_respacing": "ddim10", "eta": 0.5},
        },
    },
}
"""Flags of the projects' own scripts; `unet` are arguments of the network itself."""


def network_of(variant: Mapping[str, Any]) -> Any:
    """Makes a variant's network with the project's own code, its weights as they begin."""
    project = variant["project"]
    if "unet" in variant:
        made = peer(project, "unet").UNetModel(**variant["unet"])
    else:
        made = peer(project, "script_util").create_model(image_size=SIZE, **variant["network"])
    return made.eval()


def main() -> None:
    torch.set_num_threads(1)
    for name, variant in VARIANTS.items():
        folder = GOLDEN / "openai" / name
        folder.mkdir(parents=True, exist_ok=True)
        network = network_of(variant)
        entries = [_entry(f"openai/{name}/{key}", key, tensor) for key, tensor in _state(network)]
        file = {"path": "model000100.pt", "kind": "torch"}
        table = {
            "format": "openai",
            "variant": name,
            "peer": COMMITS[variant["project"]],
            "torch": torch.__version__,
            "flags": {k: v for k, v in variant.items() if k != "project"},
            "files": [{**file, "tree": {"$tensors": "model", "parameter": True}}],
            "tensors": {"model": entries},
        }
        text = json.dumps(table, separators=(",", ":")).replace('{"key"', '\n{"key"')
        (folder / "table.json").write_text(text + "\n", encoding="utf-8")
        checkpoint = make_variant(f"openai/{name}", Path("/tmp/openai") / name) / file["path"]
        network.load_state_dict(torch.load(checkpoint, weights_only=True))
        _write(folder, variant, network)


def _write(folder: Path, variant: Mapping[str, Any], network: Any) -> None:
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return generator.standard_normal(shape, dtype=np.float32)

    labelled = variant.get("network", {}).get("class_cond", False)
    flags = variant["diffusion"]
    whole = diffusion_of(variant["project"], **flags)
    io: dict[str, NDArray[Any]] = {}
    for case, t in enumerate([0, flags["steps"] // 3, flags["steps"] - 1]):
        at = np.array([t, flags["steps"] // 2], dtype=np.int64)
        io |= {f"x{case}": normal(2, 3, SIZE, SIZE), f"t{case}": at}
        labels = {}
        if labelled:
            io[f"y{case}"] = np.array([case, 999 - case], dtype=np.int64)
            labels = {"y": torch.from_numpy(io[f"y{case}"])}
        with torch.no_grad():
            model = whole._wrap_model(network)
            out = model(torch.from_numpy(io[f"x{case}"]), torch.from_numpy(at), **labels)
        io[f"out{case}"] = out.numpy()
    _save(folder / "io.npz", io)
    for run, named in variant["runs"].items():
        more = dict(named)
        eta = more.pop("eta", None)
        recorded = peer_run(
            network,
            diffusion_of(variant["project"], **flags, **more),
            normal(2, 3, SIZE, SIZE),
            normal(10, 2, 3, SIZE, SIZE),
            ddim=run.startswith("ddim"),
            labels=np.array([7, 207], dtype=np.int64) if labelled else None,
            eta=eta,
        )
        _save(folder / f"{run}.npz", recorded)


def _save(path: Path, arrays: Mapping[str, Any]) -> None:
    np.savez_compressed(path, **arrays)


def _state(network: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from network.state_dict().items()


def _entry(seed: str, key: str, tensor: torch.Tensor) -> dict[str, Any]:
    """Describes a tensor: uniform by its fan-in, so that no layer is silent."""
    offset, amp = 0.0, 0.2  # biases
    if tensor.ndim > 1:
        amp = math.sqrt(3 / math.prod(tensor.shape[1:]))
    elif key.endswith("weight"):  # of a normalisation
        offset, amp = 1.0, 0.3
    if key == "label_emb.weight":
        amp = 1.0
    shape = list(tensor.shape)
    told = {"shape": shape, "dtype": "float32", "offset": offset, "amp": amp}
    return {"key": key, **told, "seed": seed}


if __name__ == "__main__":
    main()
