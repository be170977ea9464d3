"""Action networks saved as their projects save them, and what those recorded of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from ddpm_deploy.model.conditional_unet1d import ConditionalUNet1D, UNet1DWidths
from ddpm_deploy.model.policies import Normalise, Observation, PolicyNetwork
from tests import golden

FOLDER = golden.GOLDEN / "policy"


@dataclass(frozen=True)
class Recorded:
    """A variant whose network and loop the original's own code ran.

    Attributes:
        name: Its folder.
        file: What to open, in the folder that `golden.make_variant` wrote.
        inputs: Letters of its conditions in the records, in order.
    """

    name: str
    file: str
    inputs: str

    def make(self, out: Path) -> Path:
        """Writes the checkpoint."""
        return golden.make_variant(f"policy/{self.name}", out) / self.file

    def load(self, name: str) -> dict[str, NDArray[Any]]:
        """Reads one of the records."""
        with np.load(FOLDER / self.name / f"{name}.npz") as file:
            return {key: np.array(file[key]) for key in file.files}


RECORDED = [
    Recorded("columbia_lowdim", "latest.ckpt", "c"),
    Recorded("columbia_ddim_sample", "latest.ckpt", "c"),
    Recorded("columbia_image", "latest.ckpt", "c"),
    Recorded("lerobot_old", "pretrained_model", "se"),
    Recorded("lerobot_new", "pretrained_model", "se"),
]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A random policy.

    Attributes:
        widths: Of its UNet.
        groups: Of its norms.
        horizon: Actions that it draws.
        seen: Numbers that it sees at a step, by name.
        steps: Steps that it sees.
        scheduler: `DDPM` or `DDIM`.
        inference: Steps of its loop.
        prediction: What its UNet gives.
    """

    widths: UNet1DWidths
    groups: int
    horizon: int
    seen: Mapping[str, int]
    steps: int
    scheduler: str
    inference: int
    prediction: str

    @classmethod
    def of(cls, seed: int, *names: str) -> Drawn:
        """Draws one that sees so much."""
        rng = np.random.default_rng(seed)
        groups = int(rng.choice([1, 2, 4, 8]))
        levels = int(rng.integers(1, 4))
        steps = int(rng.integers(1, 4))
        seen = {name: int(rng.integers(1, 5)) for name in names}
        widths = UNet1DWidths(
            actions=int(rng.integers(1, 6)),
            down=tuple(int(n) for n in 8 * rng.integers(1, 4, levels)),
            step=int(2 * rng.integers(2, 9)),
            condition=steps * sum(seen.values()),
            kernel=int(rng.choice([1, 3, 5, 7])),
            scale=bool(rng.integers(2)),
        )
        return cls(
            widths=widths,
            groups=groups,
            horizon=widths.multiple * int(rng.integers(2, 6)),
            seen=seen,
            steps=steps,
            scheduler=str(rng.choice(["DDPM", "DDIM"])),
            inference=int(rng.choice([5, 8, 100])),
            prediction=str(rng.choice(["epsilon", "sample"])),
        )

    def unet(self, seed: int) -> ConditionalUNet1D:
        """Makes its UNet with random weights."""
        torch.manual_seed(seed)
        unet = ConditionalUNet1D(self.widths, groups=self.groups)
        for name, parameter in unet.named_parameters():
            if ".block.1." in name:  # norms that do nothing would hide their groups' mistakes
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        return unet.eval()


def policy_state(drawn: Drawn, seed: int) -> tuple[PolicyNetwork, dict[str, Tensor]]:
    """Makes a policy without an encoder, and its state as diffusion_policy names it."""
    unet = drawn.unet(seed)
    size = drawn.seen["obs"]
    scale, offset = torch.rand(size) + 0.5, torch.randn(size)
    action = torch.rand(drawn.widths.actions) + 0.5
    state = {f"model.{name}": value for name, value in unet.state_dict().items()}
    state |= {
        "_dummy_variable": torch.empty(0),
        "mask_generator._dummy_variable": torch.empty(0),
        "normalizer.params_dict.obs.scale": scale,
        "normalizer.params_dict.obs.offset": offset,
        "normalizer.params_dict.obs.input_stats.min": torch.zeros(size),
        "normalizer.params_dict.action.scale": action,
        "normalizer.params_dict.action.offset": -action,
    }
    seen = Observation(name="obs", size=size, normalise=Normalise(times=scale, plus=offset))
    return PolicyNetwork(unet, [seen]).eval(), state


def policy_config(drawn: Drawn) -> dict[str, Any]:
    """Returns the configuration of a policy without an encoder."""
    scheduler = {
        "_target_": f"diffusers.schedulers.scheduling_{drawn.scheduler.lower()}."
        f"{drawn.scheduler}Scheduler",
        "num_train_timesteps": 100,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": True,
        "prediction_type": drawn.prediction,
    }
    policy = {
        "_target_": "diffusion_policy.policy.diffusion_unet_lowdim_policy."
        "DiffusionUnetLowdimPolicy",
        "model": {"n_groups": drawn.groups},
        "noise_scheduler": scheduler,
        "horizon": drawn.horizon,
        "obs_dim": drawn.seen["obs"],
        "action_dim": drawn.widths.actions,
        "n_action_steps": 1,
        "n_obs_steps": drawn.steps,
        "num_inference_steps": drawn.inference,
        "obs_as_global_cond": True,
    }
    return {"policy": policy}


def write_workspace(path: Path, drawn: Drawn, seed: int) -> PolicyNetwork:
    """Writes a workspace's checkpoint, the configuration in plain types; returns the EMA's."""
    network, state = policy_state(drawn, seed)
    _, online = policy_state(drawn, seed + 1)
    states = {"model": online, "ema_model": state, "optimizer": {"state": {}, "param_groups": []}}
    torch.save({"cfg": policy_config(drawn), "state_dicts": states, "pickles": {}}, path)
    return network


def lerobot_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gives a UNet's weights the names of huggingface/lerobot."""
    renamed = {}
    for name, value in state.items():
        for theirs, mine in ((".blocks.0.", ".conv1."), (".blocks.1.", ".conv2.")):
            name = name.replace(theirs, mine)  # noqa: PLW2901
        renamed[name.replace(".2.conv.", ".2.")] = value
    return renamed


def lerobot_config(drawn: Drawn, *, mode: str = "MIN_MAX") -> dict[str, Any]:
    """Returns what a LeRobot policy's `config.json` says."""
    kinds = {"observation.state": "STATE", "observation.environment_state": "ENV"}
    return {
        "type": "diffusion",
        "n_obs_steps": drawn.steps,
        "horizon": drawn.horizon,
        "n_action_steps": 1,
        "input_features": {
            name: {"type": kinds[name], "shape": [size]} for name, size in drawn.seen.items()
        },
        "output_features": {"action": {"type": "ACTION", "shape": [drawn.widths.actions]}},
        "normalization_mapping": {"STATE": mode, "ACTION": mode},
        "down_dims": list(drawn.widths.down),
        "n_groups": drawn.groups,
        "noise_scheduler_type": drawn.scheduler,
        "num_train_timesteps": 100,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": drawn.prediction,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "num_inference_steps": drawn.inference,
    }


def write_lerobot(folder: Path, drawn: Drawn, seed: int) -> PolicyNetwork:
    """Writes a policy of LeRobot before v0.4, with its statistics among the weights."""
    unet = drawn.unet(seed)
    weights = lerobot_names(unet.state_dict())
    state = {f"diffusion.unet.{name}": value for name, value in weights.items()}
    size, actions = drawn.seen["observation.state"], drawn.widths.actions
    low, high = -torch.rand(size), torch.rand(size) + 1
    seen = Normalise(
        minus=low, over=high - low + 1e-8, times=torch.tensor([2.0]), plus=torch.tensor([-1.0])
    )
    for place, count in (("normalize_targets", actions), ("unnormalize_outputs", actions)):
        state[f"{place}.buffer_action.min"] = -torch.ones(count)
        state[f"{place}.buffer_action.max"] = 3 * torch.ones(count)
    state["normalize_inputs.buffer_observation_state.min"] = low
    state["normalize_inputs.buffer_observation_state.max"] = high
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(lerobot_config(drawn)), encoding="utf-8")
    observations = [
        Observation(name=name, size=n, normalise=seen if name == "observation.state" else None)
        for name, n in drawn.seen.items()
    ]
    return PolicyNetwork(unet, observations).eval()
