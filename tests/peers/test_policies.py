"""Action networks against the code of the projects that train them.

Needs `diffusion_policy` (real-stanford) or `lerobot` (huggingface, v0.4) on the path, with
diffusers; dill and omegaconf for the workspaces. Packages that only their simulators and cameras
need may be empty modules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_deploy import denoise
from ddpm_deploy.arrays import Samples, Timesteps
from ddpm_deploy.model import LoadedNetwork, load_network
from tests.model.policies import Drawn

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

STATES = ("observation.state", "observation.environment_state")


class Noise:
    """Hands out prepared noise in place of `torch.randn`, and keeps it."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self.drawn: list[Samples] = []

    def __call__(self, *size: Any, **settings: Any) -> torch.Tensor:
        shape = settings.get("size", size[0] if size and not isinstance(size[0], int) else size)
        drawn = self._rng.standard_normal(tuple(shape)).astype(np.float32)
        self.drawn.append(drawn)
        return torch.from_numpy(drawn.copy())


def ours(loaded: LoadedNetwork, noise: Noise, *conditions: torch.Tensor) -> Samples:
    """Draws with our loop and the same noise; returns actions in their own units."""

    def predict(x: Samples, t: Timesteps) -> Samples:
        with torch.inference_mode():
            out = loaded.network(torch.from_numpy(x), torch.from_numpy(t), *conditions)
        return np.asarray(out.numpy())

    fresh = iter(noise.drawn)
    *_, last = denoise(predict, loaded.spec.table(), lambda _: next(fresh))
    restore = loaded.spec.restore
    assert restore is not None
    return restore(last.x)


def close(given: Samples, wanted: Samples) -> bool:
    # Coefficients in float32 there, in float64 here; the clipped loop does not magnify them much.
    return bool(np.abs(given - wanted).max() <= 5e-4 * np.ptp(wanted))


@pytest.mark.parametrize("seed", range(12))
def test_diffusion_policy_s_unet_is_ours(tmp_path: Path, seed: int) -> None:
    peer = pytest.importorskip(
        "diffusion_policy.model.diffusion.conditional_unet1d", exc_type=ImportError
    )
    drawn = Drawn.of(seed, "obs")
    w = drawn.widths
    torch.manual_seed(seed)
    unet = peer.ConditionalUnet1D(
        w.actions,
        global_cond_dim=w.condition,
        diffusion_step_embed_dim=w.step,
        down_dims=list(w.down),
        kernel_size=w.kernel,
        n_groups=drawn.groups,
        cond_predict_scale=w.scale,
    ).eval()
    torch.save(unet.state_dict(), tmp_path / "unet.pt")
    settings = {"horizon": drawn.horizon, "n_groups": drawn.groups}
    loaded = load_network(tmp_path / "unet.pt", settings=settings)
    x, c = torch.randn(3, drawn.horizon, w.actions), torch.randn(3, w.condition)
    t = torch.tensor([0, 41, 99])
    with torch.inference_mode():
        wanted, given = unet(x, t, global_cond=c), loaded.network(x, t, c)
    assert float((given - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


LOOPS: list[dict[str, Any]] = [
    {"kind": "DDPM"},
    {"kind": "DDPM", "num_inference_steps": 10},
    {"kind": "DDPM", "prediction_type": "sample", "variance_type": "fixed_large"},
    {"kind": "DDPM", "beta_schedule": "linear", "num_inference_steps": 7, "steps_offset": 1},
    {"kind": "DDPM", "timestep_spacing": "trailing", "num_inference_steps": 9},
    {"kind": "DDIM", "num_inference_steps": 8},
    {"kind": "DDIM", "num_inference_steps": 16, "set_alpha_to_one": False, "steps_offset": 1},
    {"kind": "DDIM", "num_inference_steps": 10, "prediction_type": "sample", "eta": 0.5},
    {"kind": "DDIM", "num_inference_steps": 10, "use_clipped_model_output": True},
    {"kind": "DDIM", "num_inference_steps": 10, "beta_schedule": "scaled_linear"},
]


@pytest.mark.parametrize("seed", range(len(LOOPS)))
def test_diffusion_policy_s_workspace_acts_as_ours(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    dill, omegaconf = pytest.importorskip("dill"), pytest.importorskip("omegaconf")
    lowdim = pytest.importorskip(
        "diffusion_policy.policy.diffusion_unet_lowdim_policy", exc_type=ImportError
    )
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusion_policy.model.common.normalizer import LinearNormalizer
    from diffusion_policy.model.diffusion.conditional_unet1d import ConditionalUnet1D

    drawn = Drawn.of(seed, "obs")
    w, size = drawn.widths, drawn.seen["obs"]
    loop = dict(LOOPS[seed])
    kind, steps = loop.pop("kind"), loop.pop("num_inference_steps", None)
    handed: dict[str, Any] = {
        k: loop.pop(k) for k in ("eta", "use_clipped_model_output") if k in loop
    }
    scheduler = {"num_train_timesteps": 100, "beta_schedule": "squaredcos_cap_v2", **loop}
    unet = {
        "input_dim": w.actions,
        "global_cond_dim": w.condition,
        "diffusion_step_embed_dim": w.step,
        "down_dims": list(w.down),
        "kernel_size": w.kernel,
        "n_groups": drawn.groups,
        "cond_predict_scale": w.scale,
    }
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "horizon": drawn.horizon,
        "obs_dim": size,
        "action_dim": w.actions,
        "n_action_steps": 1,
        "n_obs_steps": drawn.steps,
        "num_inference_steps": steps,
        "obs_as_global_cond": True,
        **handed,
    }
    policy = lowdim.DiffusionUnetLowdimPolicy(
        model=ConditionalUnet1D(**unet),
        noise_scheduler=(DDPMScheduler if kind == "DDPM" else DDIMScheduler)(**scheduler),
        **settings,
    ).eval()
    normalizer = LinearNormalizer()
    fitted = {"obs": torch.randn(50, size) * 3 + 1, "action": torch.rand(50, w.actions) * 9 - 2}
    normalizer.fit(fitted, mode=["limits", "gaussian"][seed % 2])
    policy.set_normalizer(normalizer)
    target = f"diffusers.schedulers.scheduling_{kind.lower()}.{kind}Scheduler"
    cfg = omegaconf.OmegaConf.create(
        {
            "policy": {
                "_target_": "diffusion_policy.policy.x.DiffusionUnetLowdimPolicy",
                "model": unet,
                "noise_scheduler": {"_target_": target, **scheduler},
                **settings,
            }
        }
    )
    payload = {"cfg": cfg, "state_dicts": {"model": policy.state_dict()}, "pickles": {}}
    torch.save(payload, tmp_path / "latest.ckpt", pickle_module=dill)
    loaded = load_network(tmp_path / "latest.ckpt")
    seen = torch.randn(2, drawn.steps, size) * 3 + 1
    noise = Noise(seed)
    monkeypatch.setattr(torch, "randn", noise)
    with torch.no_grad():
        wanted = policy.predict_action({"obs": seen})["action_pred"].numpy()
    monkeypatch.undo()
    assert close(ours(loaded, noise, seen), wanted)


LEROBOT: list[tuple[dict[str, str], dict[str, Any]]] = [
    ({"STATE": "MIN_MAX", "ENV": "MIN_MAX", "ACTION": "MIN_MAX"}, {}),
    ({"STATE": "MEAN_STD", "ENV": "QUANTILES", "ACTION": "MEAN_STD"}, {"num_inference_steps": 10}),
    ({"STATE": "QUANTILE10", "ACTION": "QUANTILES"}, {"clip_sample_range": 2.0}),
    ({"ENV": "MIN_MAX", "ACTION": "QUANTILE10"}, {"noise_scheduler_type": "DDIM"}),
    (
        {"STATE": "MIN_MAX", "ACTION": "MIN_MAX"},
        {"noise_scheduler_type": "DDIM", "num_inference_steps": 12, "prediction_type": "sample"},
    ),
    ({"ACTION": "MIN_MAX"}, {"beta_schedule": "linear", "num_train_timesteps": 50}),
]


@pytest.mark.parametrize("seed", range(len(LEROBOT)))
def test_lerobot_s_policy_acts_as_ours(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    modeling = pytest.importorskip(
        "lerobot.policies.diffusion.modeling_diffusion", exc_type=ImportError
    )
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors

    modes, changes = LEROBOT[seed]
    drawn = Drawn.of(300 + seed, *STATES)
    w = drawn.widths
    state, environment = (drawn.seen[name] for name in STATES)
    config = DiffusionConfig(
        input_features={
            STATES[1]: PolicyFeature(FeatureType.ENV, (environment,)),
            STATES[0]: PolicyFeature(FeatureType.STATE, (state,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (w.actions,))},
        normalization_mapping={k: NormalizationMode[v] for k, v in modes.items()},
        device="cpu",
        crop_shape=None,
        down_dims=w.down,
        kernel_size=w.kernel,
        n_groups=drawn.groups,
        diffusion_step_embed_dim=w.step,
        use_film_scale_modulation=w.scale,
        horizon=2 * w.multiple * 2,
        n_obs_steps=drawn.steps,
        n_action_steps=1,
        **changes,
    )
    torch.manual_seed(seed)
    stats = {}
    for name, count in ((STATES[0], state), (STATES[1], environment), ("action", w.actions)):
        low, high = -torch.rand(count), torch.rand(count) + 1
        stats[name] = {"min": low, "max": high, "mean": low / 3, "std": high, "q01": low + 0.1}
        stats[name] |= {"q99": high - 0.1, "q10": low + 0.2, "q90": high - 0.2}
    stats[STATES[0]]["max"] = stats[STATES[0]]["max"].clone()
    stats[STATES[0]]["max"][0] = stats[STATES[0]]["min"][0]  # a constant
    policy = modeling.DiffusionPolicy(config).eval()
    before, after = make_diffusion_pre_post_processors(config, stats)
    for part in (policy, before, after):
        part.save_pretrained(tmp_path / "pretrained_model")
    loaded = load_network(tmp_path)
    seen = {STATES[0]: torch.rand(2, drawn.steps, state)}
    seen[STATES[0]][..., 0] = stats[STATES[0]]["min"][0]
    seen[STATES[1]] = torch.rand(2, drawn.steps, environment)
    noise = Noise(seed)
    normalised = {name: value for name, value in before(dict(seen)).items() if name in seen}
    monkeypatch.setattr(torch, "randn", noise)
    with torch.no_grad():
        condition = policy.diffusion._prepare_global_conditioning(normalised)
        drawn_actions = policy.diffusion.conditional_sample(2, global_cond=condition)
        wanted = after(drawn_actions).numpy()
    monkeypatch.undo()
    assert close(ours(loaded, noise, *(seen[name] for name in STATES)), wanted)
