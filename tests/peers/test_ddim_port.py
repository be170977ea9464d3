"""Against pesser/pytorch_diffusion: its network, which is ermongroup/ddim's, and its loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_deploy.arrays import Samples, Timesteps
from ddpm_deploy.model import load_network
from ddpm_deploy.parity import TOLERANCE, relative_error
from ddpm_deploy.sampling import denoise
from tests.model.diffusers_configs import scramble

peer: Any = pytest.importorskip("pytorch_diffusion.diffusion")
pytestmark = pytest.mark.peers


@pytest.mark.parametrize("seed", range(12))
def test_a_random_network_of_the_original_is_ours(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    levels = int(rng.integers(1, 4))
    size = 4 * 2 ** (levels - 1)
    sizes = [size // 2**level for level in range(levels)]
    network = peer.Model(
        ch=32,
        out_ch=3,
        ch_mult=tuple(int(m) for m in rng.integers(1, 3, levels)),
        num_res_blocks=int(rng.integers(1, 3)),
        attn_resolutions=[s for s in sizes if rng.random() < 0.5],
        in_channels=3,
        resolution=size,
    )
    scramble(network, seed)
    network.eval()
    path = tmp_path / "model.ckpt"
    torch.save(network.state_dict(), path)
    loaded = load_network(path, image_size=size)
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(seed))
    t = torch.tensor([0, 37, 999])
    with torch.inference_mode():
        wanted, given = network(x, t), loaded.network(x, t)
    assert relative_error(given.numpy(), wanted.numpy()) <= TOLERANCE


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_loop_is_the_original_s(
    tmp_path: Path, variance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "ch": 32,
        "out_ch": 3,
        "ch_mult": (1,),
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "in_channels": 3,
        "resolution": 4,
    }
    diffusion = peer.Diffusion(
        {
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "num_diffusion_timesteps": 1000,
            "model_var_type": variance.replace("_", ""),
        },
        config,
        torch.device("cpu"),
    )
    path = tmp_path / "model.ckpt"
    torch.save(diffusion.model.state_dict(), path)
    spec = load_network(path, image_size=4, settings={"variance": variance}).spec
    table, rng = spec.table(), np.random.default_rng(0)
    for row in [*table[:5], *table[500:505], *table[-5:]]:
        x, out, noise = (rng.standard_normal((2, 3, 4, 4)).astype(np.float32) for _ in range(3))
        diffusion.model.forward = lambda x, t, out=out: torch.from_numpy(out)
        monkeypatch.setattr(torch, "randn_like", lambda x, z=noise: torch.from_numpy(z))
        wanted = diffusion.denoise(2, n_steps=1, x=torch.from_numpy(x), curr_step=row.t + 1).numpy()
        monkeypatch.undo()
        given = one_step(row, x, out, noise)
        assert np.abs(given - wanted).max() <= 1e-5 * max(1.0, np.abs(wanted).max())


def one_step(row: Any, x: Samples, out: Samples, noise: Samples) -> Samples:
    def predict(x: Samples, t: Timesteps) -> Samples:
        return out

    (step,) = denoise(predict, [row], lambda k: noise, x=x)
    return step.x
