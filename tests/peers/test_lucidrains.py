"""Against denoising-diffusion-pytorch itself, any release since 0.27.4 that is installed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ddpm_deploy import denoise
from ddpm_deploy.arrays import Samples
from ddpm_deploy.model import LoadedNetwork, load_network
from ddpm_deploy.parity import TOLERANCE, relative_error
from tests.peers import lucidrains_peer as peer

pytestmark = pytest.mark.peers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip(peer.PACKAGE, reason="denoising-diffusion-pytorch is not installed")

RELEASE = version("denoising-diffusion-pytorch")
NUMBERS = tuple(map(int, RELEASE.split(".")))
SEQUENCES = NUMBERS >= (0, 31, 1) and NUMBERS != (1, 7, 2)  # whose Unet1D cannot run
TAKES = inspect.signature(peer.module().Unet).parameters
OBJECTIVES = {"pred_noise": "epsilon", "pred_x0": "sample", "pred_v": "v_prediction"}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """The package's own warnings are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def random_peer(seed: int) -> tuple[Any, tuple[int, ...], dict[str, Any]]:
    """Returns a diffusion around a network, the samples' size, and what to type of both."""
    rng = np.random.default_rng(seed)
    size: tuple[int, ...] = (8, 8)
    if SEQUENCES and seed % 4 == 3:
        size = (int(rng.choice([8, 16])),)
    levels = int(rng.integers(1, 4))
    unet: dict[str, Any] = {
        "dim": 8 * int(rng.integers(1, 4)),
        "dim_mults": tuple(rng.integers(1, 3, levels).tolist()),
        "channels": int(rng.integers(1, 4)),
        "self_condition": bool(rng.integers(2)),
    }
    typed: dict[str, Any] = {}
    if NUMBERS >= (2, 0, 12) and rng.integers(2):
        unet["init_dim"] = int(rng.choice([8, 20]))
    if NUMBERS < (2,) and rng.integers(2):
        typed["resnet_block_groups"] = unet["resnet_block_groups"] = int(rng.choice([1, 2, 4]))
    if "full_attn" in TAKES and len(size) == 2:
        unet["full_attn"] = tuple(bool(rng.integers(2)) for _ in range(levels))
    if "attn_heads" in TAKES:
        count = levels if len(size) == 2 else 1
        unet["attn_dim_head"], unet["attn_heads"] = (
            tuple(rng.integers(2, 9, count).tolist()) for _ in range(2)
        )
        if len(size) == 1:
            unet["attn_dim_head"], unet["attn_heads"] = unet["attn_dim_head"][0], 3
        if NUMBERS < (1, 9) or len(size) == 1:
            typed["heads"] = unet["attn_heads"]
        if rng.integers(2):
            typed["theta"] = unet["sinusoidal_pos_emb_theta"] = 5000
    T = int(rng.choice([33, 50, 64, 100]))  # noqa: N806
    diffusion: dict[str, Any] = {
        "timesteps": T,
        "beta_schedule": str(rng.choice(["linear", "cosine"])),
        "objective": str(rng.choice(list(OBJECTIVES)[: 3 if NUMBERS >= (0, 30) else 2])),
    }
    if seed % 2 and NUMBERS >= (0, 28):
        diffusion["sampling_timesteps"] = typed["sampling_timesteps"] = int(rng.integers(1, 12))
        diffusion["ddim_sampling_eta"] = typed["ddim_sampling_eta"] = float(rng.choice([0, 0.7]))
    if NUMBERS >= (1, 0) and len(size) == 2 and rng.integers(2):
        diffusion["beta_schedule"] = "sigmoid"
        diffusion["schedule_fn_kwargs"] = {"tau": float(rng.choice([1, 0.7]))}
    if NUMBERS >= (1, 5) and len(size) == 2:
        diffusion["min_snr_loss_weight"] = bool(rng.integers(2))
    torch.manual_seed(seed)
    network = peer.make_unet(len(size), **unet)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return peer.make_diffusion(network, size, **diffusion), size, {**typed, "said": diffusion}


def take(given: Samples, *_: Any) -> Samples:
    """Stands in for a network, and for its noise."""
    return given


def load(path: Path, size: tuple[int, ...], typed: dict[str, Any], **given: Any) -> LoadedNetwork:
    """Loads a file with what it does not say typed."""
    settings = {name: value for name, value in typed.items() if name != "said"}
    if isinstance(settings.get("heads"), int):
        settings["heads"] = str(settings["heads"])
    silent = NUMBERS < (1, 8) or (NUMBERS < (2,) and len(size) == 1)
    if silent and "version" not in torch.load(path, weights_only=True):
        settings["release"] = RELEASE
    if NUMBERS < (1, 5, 4):
        given["prediction"] = OBJECTIVES[typed["said"]["objective"]]
    return load_network(path, image_size=size, settings=settings, **given)


@pytest.mark.parametrize("seed", range(24))
def test_a_random_network_gives_what_the_package_gives(seed: int, tmp_path: Path) -> None:
    diffusion, size, typed = random_peer(seed)
    torch.save(diffusion.state_dict(), tmp_path / "diffusion.pt")
    loaded = load(tmp_path / "diffusion.pt", size, typed)
    assert loaded.spec.prediction == OBJECTIVES[typed["said"]["objective"]]
    unet = diffusion.model
    rng = np.random.default_rng(seed)
    shape = (2, unet.channels, *size)
    arrays: list[NDArray[Any]] = [rng.standard_normal(shape, dtype=np.float32)]
    arrays.append(np.array([0, diffusion.num_timesteps - 1]))
    if unet.self_condition:
        arrays.append(rng.standard_normal(shape, dtype=np.float32))
    tensors = [torch.from_numpy(array) for array in arrays]
    with torch.no_grad():
        wanted, given = unet(*tensors).numpy(), loaded.network(*tensors).numpy()
    assert relative_error(given, wanted) <= TOLERANCE


@pytest.mark.parametrize("seed", range(24))
def test_its_loop_is_that_of_the_package(seed: int, tmp_path: Path) -> None:
    diffusion, size, typed = random_peer(seed)
    torch.save(diffusion.state_dict(), tmp_path / "diffusion.pt")
    spec = load(tmp_path / "diffusion.pt", size, typed).spec
    run = peer.record(diffusion, (diffusion.model.channels, *size), seed)
    table = spec.table()
    assert [row.t for row in table] == run["timesteps"].tolist()
    states = [state[None] for state in (*run["model_in"], run["final"] * 2 - 1)]
    noise = [run["noise"][k, None] for k in range(1, len(run["noise"]))]
    noise += [np.zeros_like(states[0])] * (len(table) - len(noise))
    for k, row in enumerate(table):
        out = run["model_out"][k, None]
        (step,) = denoise(partial(take, out), [row], partial(take, noise[k]), x=states[k])
        wanted = states[k + 1]
        # At the least timesteps the package's float32 coefficients lose digits.
        tolerance = 2e-4 if row.t < 10 else 1e-5
        assert np.abs(step.x - wanted).max() <= tolerance * max(1.0, np.abs(wanted).max())


@pytest.mark.parametrize("seed", [0, 3])
def test_the_trainer_s_own_file_is_read(seed: int, tmp_path: Path) -> None:
    diffusion, size, typed = random_peer(seed)
    trainer = make_trainer(diffusion, size, tmp_path)
    if trainer is None:
        pytest.skip("this release has no Trainer1D")
    with torch.no_grad():
        for parameter in trainer.ema.ema_model.parameters():
            parameter.mul_(1.1)
    trainer.save(1)
    path = tmp_path / "results" / "model-1.pt"
    if NUMBERS >= (1, 0):
        assert torch.load(path, weights_only=True)["version"] == RELEASE
    x = torch.randn(2, diffusion.model.channels, *size)
    for weights, source in [("ema", trainer.ema.ema_model), ("online", diffusion)]:
        loaded = load(path, size, typed, weights=weights)
        with torch.no_grad():
            wanted = source.model(x, torch.tensor([0, 9])).numpy()
            given = loaded.network(x, torch.tensor([0, 9])).numpy()
        assert relative_error(given, wanted) <= TOLERANCE
        assert loaded.spec.weights == weights
        assert diffusion.num_timesteps == loaded.spec.schedule.T


def make_trainer(diffusion: Any, size: tuple[int, ...], folder: Path) -> Any:
    """Makes the package's Trainer on data that it never reads."""
    given: dict[str, Any] = {"results_folder": str(folder / "results"), "num_samples": 1}
    if len(size) == 1:
        one = peer.module(f"{peer.PACKAGE}_1d")
        if not hasattr(one, "Trainer1D"):
            return None
        data = torch.zeros(100, diffusion.channels, *size)
        dataset = one.Dataset1D(data) if hasattr(one, "Dataset1D") else data
        return one.Trainer1D(diffusion, dataset, **given)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(100):
        (pictures / f"{number}.jpg").touch()
    kind = peer.module().Trainer
    if "calculate_fid" in inspect.signature(kind).parameters:
        given["calculate_fid"] = False
    return kind(diffusion, str(pictures), **given)
