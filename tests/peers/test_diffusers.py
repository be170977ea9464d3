"""Against diffusers itself: its networks, its files, and its schedulers step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_deploy import ModelSpec, Step, Transition
from ddpm_deploy.arrays import Samples
from ddpm_deploy.model import load_network
from ddpm_deploy.model.diffusers_scheduler import read_scheduler
from ddpm_deploy.model.facts import Facts, Said
from ddpm_deploy.model.unet2d import UNet2D
from ddpm_deploy.parity import TOLERANCE, relative_error
from ddpm_deploy.sampling import denoise, predicted_x0
from tests.model.diffusers_configs import random_config, scramble, settings_of

diffusers: Any = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.peers,
    # NumPy's remark about what diffusers does with a tensor.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]


@pytest.mark.parametrize("seed", range(100))
def test_a_random_network_of_diffusers_is_ours(tmp_path: Path, seed: int) -> None:
    config = random_config(seed)
    peer = diffusers.UNet2DModel(**config)
    scramble(peer, seed)
    peer = peer.eval()
    safe = seed % 2 == 0
    if seed % 3:
        diffusers.DDPMPipeline(unet=peer, scheduler=diffusers.DDPMScheduler()).save_pretrained(
            tmp_path, safe_serialization=safe
        )
    elif seed % 5:
        peer.save_pretrained(tmp_path, safe_serialization=safe)
    else:
        peer.save_pretrained(tmp_path, safe_serialization=safe, max_shard_size="5KB")
    loaded = load_network(tmp_path)
    assert isinstance(loaded.network, UNet2D)
    assert loaded.network.settings == settings_of(config)
    size = config["sample_size"]
    size = [size, size] if isinstance(size, int) else size
    assert loaded.spec.sample_shape == (config["in_channels"], *size)
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(3, *loaded.spec.sample_shape, generator=drawn)
    t = torch.tensor([0, 37, 999])
    labels = (torch.tensor([0, 4, 2]),) if config["num_class_embeds"] else ()
    with torch.inference_mode():
        wanted = peer(x, t, *labels).sample
        given = loaded.network(x, t, *labels)
    assert relative_error(given.numpy(), wanted.numpy()) <= TOLERANCE


def random_scheduler(seed: int) -> tuple[Any, dict[str, Any], int, bool]:
    """Returns a scheduler, what its step is given, steps, and whether a variance is learned."""
    rng = np.random.default_rng(seed)

    def one(*values: Any) -> Any:
        return values[int(rng.integers(len(values)))]

    kind = one("DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler")
    total = one(1000, 1000, 250, 4000)
    steps = one(4, 7, 10, 20, 25)
    schedules = ["linear", "scaled_linear", "squaredcos_cap_v2"]
    if kind == "DDPMScheduler":
        schedules += ["sigmoid", "laplace"]
    settings = {
        "num_train_timesteps": total,
        "beta_start": one(1e-4, 8.5e-4),
        "beta_end": one(0.02, 0.012),
        "beta_schedule": one(*schedules),
        "prediction_type": one("epsilon", "sample", "v_prediction"),
        "timestep_spacing": one("leading", "linspace", "trailing"),
        "steps_offset": one(0, 1),
    }
    if rng.random() < 0.2:
        settings["beta_schedule"] = "linear"  # which it would still go by in places
        settings["trained_betas"] = np.sort(rng.uniform(1e-4, 0.03, total)).tolist()
    if settings["prediction_type"] != "epsilon" and rng.random() < 0.2:
        settings["rescale_betas_zero_snr"] = True
    learned, given = False, {}
    if kind != "DPMSolverMultistepScheduler":
        settings["clip_sample"] = one(True, False)
        settings["clip_sample_range"] = one(1.0, 2.5)
    if kind == "DDPMScheduler":
        variances = ("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
        settings["variance_type"] = one(*variances)
        learned = settings["variance_type"] == "learned_range"
    elif kind == "DDIMScheduler":
        settings["set_alpha_to_one"] = one(True, False)
        given = {"eta": one(0.0, 0.5, 1.0)}
    else:
        settings["solver_order"] = one(1, 2)
        settings["use_karras_sigmas"] = one(False, False, True)
        settings["final_sigmas_type"] = one("zero", "sigma_min")
        settings["lower_order_final"] = one(True, False)
        settings["euler_at_final"] = one(True, False, False)
    return getattr(diffusers, kind)(**settings), given, steps, learned


@pytest.mark.parametrize("seed", range(300))
def test_a_random_scheduler_s_steps_are_ours(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer, given, steps, learned = random_scheduler(seed)
    peer.save_config(tmp_path)
    facts = Facts(Said(settings={"steps": str(steps)}), source="it")
    config = dict(peer.load_config(tmp_path))
    loop = read_scheduler(config, "", facts, learned=learned, source="it")
    spec = ModelSpec(sample_shape=(2, 4, 4), **vars(loop))
    table = spec.table(eta=given.get("eta"))
    peer.set_timesteps(steps)
    visited = peer.timesteps.tolist()[: len(table)]
    # Where they are cut, the last digit of float32 decides between two.
    cut = loop.sampling.karras and spec.schedule.name.startswith("cosine")
    np.testing.assert_allclose([row.t for row in table], visited, rtol=0, atol=1 if cut else 0)
    if hasattr(peer, "set_begin_index"):
        peer.set_begin_index(0)  # it takes the second of two equal timesteps for the first
    in_float64(peer, spec, steps)
    # Karras' σ stay those of float32 numbers, and these differ where they are moved to zero SNR.
    noisy = loop.sampling.karras and config.get("rescale_betas_zero_snr")
    within = 2e-4 if noisy else 1e-5
    rng = np.random.default_rng(1000 + seed)
    draws: list[torch.Tensor] = []

    def noise(shape: Any, **_: Any) -> torch.Tensor:
        draws.append(torch.from_numpy(rng.standard_normal(tuple(shape)).astype(np.float32)))
        return draws[-1]

    for module in ("scheduling_ddpm", "scheduling_ddim", "scheduling_dpmsolver_multistep"):
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", noise)
    x = torch.from_numpy(rng.standard_normal((3, 2, 4, 4)).astype(np.float32))
    before = None
    for row, t in zip(table, peer.timesteps[: len(table)], strict=True):
        out = rng.standard_normal((3, 4 if learned else 2, 4, 4)).astype(np.float32)
        draws.clear()
        wanted = peer.step(torch.from_numpy(out), t, x, **given).prev_sample.numpy()
        state = x.numpy()
        step = take(row, state, out, draws, before)
        if not np.isfinite(wanted).all():  # the root of -1e-17
            assert given["eta"] == 1
            assert np.isfinite(step.x).all()
            break
        assert np.abs(step.x - wanted).max() <= within * max(1.0, np.abs(wanted).max()), row
        before = predicted_x0(row, state, out[:, :2])
        x = torch.from_numpy(wanted.astype(np.float32))


def take(
    row: Transition,
    x: Samples,
    out: Samples,
    draws: list[torch.Tensor],
    before: Samples | None,
) -> Step:
    """Takes one step of ours with a given output of the network, and the peer's noise."""

    def draw(k: int) -> Samples:
        return np.asarray(draws[-1].numpy())

    (step,) = denoise(lambda x, t: out, [row], draw, x=x, before=before)
    return step


def in_float64(peer: Any, spec: ModelSpec, steps: int) -> None:
    """Gives a scheduler the betas that it rounded to float32, in full.

    1 - alpha_bar has four digits in float32 where there is little noise: its own steps are off by
    1e-4 there.
    """
    first, alpha_bar = float(peer.alphas_cumprod[0]), torch.tensor(spec.schedule.alpha_bar)
    np.testing.assert_allclose(peer.alphas_cumprod, alpha_bar, rtol=2e-3, atol=1e-7)
    if alpha_bar[-1] == 0 and hasattr(peer, "sigmas"):
        alpha_bar[-1] = 2**-24
    if getattr(peer.config, "use_karras_sigmas", False):  # they are made of the rounded ones
        peer.sigmas = peer.sigmas.double()
        return
    peer.alphas_cumprod = alpha_bar
    if hasattr(peer, "sigmas"):
        peer.set_timesteps(steps)
        peer.set_begin_index(0)
        peer.sigmas = peer.sigmas.double()
    if getattr(peer, "final_alpha_cumprod", 1.0) == first:
        peer.final_alpha_cumprod = alpha_bar[0]
