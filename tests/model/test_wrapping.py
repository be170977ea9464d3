"""What trainers wrap a network in, and which of its weights are taken."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model import LoadedNetwork, load_network
from tests.commands import run
from tests.model.mynets import Net
from tests.model.test_own import SPEC, trained
from tests.support import tiny_network

State = Mapping[str, Tensor]


def online() -> dict[str, Tensor]:
    return dict(tiny_network(channels=3, seed=1).state_dict())


def ema() -> dict[str, Tensor]:
    return dict(tiny_network(channels=3, seed=2).state_dict())


def under(prefix: str, state: State) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": value for name, value in state.items()}


def is_of(loaded: LoadedNetwork, state: State) -> bool:
    found = loaded.network.state_dict()
    return all(torch.equal(found[name], value) for name, value in state.items())


def refused(path: Path, **said: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_network(path, **said)
    assert caught.value.hint
    return caught.value


BUFFERS = {"loss.vgg.weight": torch.ones(3, 3), "betas": torch.linspace(0, 1, 10)}

ONE: dict[str, Any] = {
    "bare": online,
    "Lightning": lambda: {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": under("model", online()) | BUFFERS,
        "hyper_parameters": {"lr": 1e-4, "widths": [1, 2]},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}],
        "loops": {"fit_loop": {"state_dict": {}}},
    },
    "Lightning with DDP and torch.compile": lambda: {
        "state_dict": under("model._orig_mod.module", online())
    },
    "Lightning of another attribute": lambda: {
        "state_dict": under("denoiser.net", online()) | BUFFERS
    },
    "module": lambda: {"module": online(), "epoch": 3},
    "network_state_dict": lambda: {"network_state_dict": online(), "optimizer": {"state": {}}},
    "params": lambda: {"params": online()},
    "nested": lambda: {"checkpoint": {"model": {"state_dict": online()}, "step": 3}},
    "unknown key": lambda: {"my_denoiser_3": online(), "losses": [0.1, 0.2]},
    "beside a tensor": lambda: {"my_denoiser": online(), "mean": torch.zeros(3)},
    "model beside another": lambda: {"model": online(), "discriminator": {"a": torch.zeros(3)}},
    "numpy's numbers": lambda: {
        "model": online(),
        "loss": np.float64(0.25),
        "step": np.int64(3),
        "history": np.arange(4.0),
    },
    "arguments": lambda: {
        "model": online(),
        "args": argparse.Namespace(lr=0.1, out=PosixPath("runs")),
    },
    "parameters": lambda: OrderedDict((k, nn.Parameter(v)) for k, v in online().items()),
    "a frozen optimizer": lambda: {
        "model": online(),
        "optimizer": torch.optim.Adam(tiny_network(channels=3).parameters()).state_dict(),
    },
}


@pytest.mark.parametrize("name", ONE)
def test_one_set_of_weights_is_found(name: str, tmp_path: Path) -> None:
    torch.save(ONE[name](), tmp_path / "ckpt.pt")
    loaded = load_network(tmp_path / "ckpt.pt")
    assert is_of(loaded, online())
    assert loaded.spec.weights == "online"
    assert [fact.value for fact in loaded.facts if fact.name == "weights"] == ["online"]


def lit_ema() -> dict[str, Tensor]:
    """CompVis' LitEma: buffers named without dots, beside two numbers."""
    flat = {f"model_ema.{name.replace('.', '')}": value for name, value in ema().items()}
    numbers = {"decay": torch.tensor(0.99), "num_updates": torch.tensor(3)}
    return flat | under("model_ema", numbers)


def averaged() -> dict[str, Tensor]:
    model = AveragedModel(tiny_network(channels=3))
    model.module.load_state_dict(ema())
    return dict(model.state_dict())


def ema_pytorch() -> dict[str, Tensor]:
    numbers = {"initted": torch.tensor(True), "step": torch.tensor(3)}
    return under("online_model", online()) | under("ema_model", ema()) | numbers


BOTH: dict[str, Callable[[], Any]] = {
    "model and ema": lambda: {"model": online(), "ema": ema()},
    "state_dict_ema of timm": lambda: {"state_dict": online(), "state_dict_ema": ema()},
    "model_ema": lambda: {"model": online(), "model_ema": ema()},
    "params_ema": lambda: {"params": online(), "params_ema": ema()},
    "Lightning's ema_model": lambda: {
        "state_dict": under("model", online()) | under("ema_model", ema()) | BUFFERS
    },
    "Lightning with an AveragedModel": lambda: {
        "state_dict": under("model", online()) | under("ema_model", averaged())
    },
    "Lightning's LitEma": lambda: {"state_dict": under("model", online()) | lit_ema() | BUFFERS},
    "Lightning's net_ema": lambda: {"state_dict": under("net", online()) | under("net_ema", ema())},
    "a callback's": lambda: {
        "state_dict": under("model", online()),
        "callbacks": {"EMA{'decay': 0.999}": {"ema_state_dict": under("model", ema())}},
    },
    "ema-pytorch, bare": ema_pytorch,
    "ema-pytorch beside": lambda: {"model": online(), "ema": ema_pytorch(), "step": 3},
    "shadow by names": lambda: {"model": online(), "ema": {"shadow": ema(), "decay": 0.9}},
    "AveragedModel beside": lambda: {"model": online(), "ema": averaged()},
    "unknown keys": lambda: {"denoiser_x": online(), "denoiser_x_ema": ema()},
}


@pytest.mark.parametrize("name", BOTH)
def test_of_both_sets_the_averaged_is_taken_and_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(BOTH[name](), path)
    for wanted, state in [(None, ema()), ("ema", ema()), ("online", online())]:
        loaded = load_network(path, weights=wanted)  # type: ignore[arg-type]
        assert is_of(loaded, state), wanted
        assert loaded.spec.weights == (wanted or "ema")
        assert loaded.facts[0].value == f"{wanted or 'ema'} (of ema, online)"
        again = load_network(path, spec=loaded.spec)
        assert is_of(again, state)


def test_an_averaged_model_alone_is_the_ema_s(tmp_path: Path) -> None:
    torch.save(averaged(), tmp_path / "ckpt.pt")
    loaded = load_network(tmp_path / "ckpt.pt", weights="ema")
    assert is_of(loaded, ema())
    assert loaded.spec.weights == "ema"


def test_of_several_networks_the_user_names_one(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    other = {"a": torch.zeros(3)}
    torch.save({"nets": {"denoiser": online(), "critic": other}, "epoch": 1}, path)
    error = refused(path)
    assert "holds several networks: nets.denoiser (" in str(error)
    assert "nets.critic (1 tensors)" in str(error)
    assert error.hint == "Name the one that samples: --set key=nets.denoiser"
    loaded = load_network(path, settings={"key": "nets.denoiser"})
    assert is_of(loaded, online())
    assert loaded.spec.network["key"] == "nets.denoiser"
    assert is_of(load_network(path, spec=loaded.spec), online())
    error = refused(path, settings={"key": "denoiser"})
    assert "holds no tensors under denoiser; it does under nets.denoiser, nets.critic" in str(error)
    torch.save({"model": {"unet": online(), "vae": other}}, path)
    assert "model.unet" in str(refused(path))
    assert "--set key=model.unet" in run("export", path).err


@pytest.mark.parametrize("place", ["ema", "ema_model", ""])
def test_averages_without_names_are_never_taken_silently(place: str, tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    shadow = {"shadow_params": list(ema().values()), "decay": 0.99, "num_updates": 3}
    torch.save({"model": online()} | ({place: shadow} if place else shadow), path)
    error = refused(path)
    assert "its EMA weights as a list without names" in str(error)
    assert "--weights online" in error.hint
    assert is_of(load_network(path, weights="online"), online())


def write_accelerate(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        if name.endswith(".safetensors"):
            save_file = pytest.importorskip("safetensors.torch").save_file
            save_file(online(), folder / name)
        else:
            torch.save(online(), folder / name)
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (folder / name).write_bytes(b"never opened")
    return folder


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_folder_of_accelerate_is_its_network(name: str, tmp_path: Path) -> None:
    folder = write_accelerate(tmp_path / "checkpoint_3", name)
    loaded = load_network(folder)
    assert is_of(loaded, online())
    assert loaded.spec.checkpoint_sha256 == load_network(folder / name).spec.checkpoint_sha256


def test_a_folder_of_accelerate_with_two_networks_asks_for_one(tmp_path: Path) -> None:
    folder = write_accelerate(tmp_path / "run", "model.safetensors", "model_1.safetensors")
    error = refused(folder)
    assert "several networks: model.safetensors, model_1.safetensors" in str(error)
    assert error.hint.endswith("run/model.safetensors")


def test_a_folder_is_a_reference_for_verify_where_it_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_accelerate(Path("run"))
    torch.save(trained(Net(4)).state_dict(), "run/pytorch_model.bin")
    Path("spec.toml").write_text(SPEC)
    own = ("--model", "tests.model.mynets:make")
    exported = run("export", "run", *own, "--spec", "spec.toml")
    assert exported.code == 0, exported.err
    verified = run("verify", "-e", "unet.onnx", "--against", "run", *own, "-n", 1)
    assert verified.code == 0, verified.err
    assert run("inspect", "run", *own, "--spec", "spec.toml").code == 0
    timed = run("bench", "-e", "unet.onnx", "--against", "run", *own, "--steps", 2, "--repeat", 1)
    assert timed.code == 0, timed.err
    Path("other").mkdir()
    for name in ("a.txt", "ckpt.pt"):
        (Path("other") / name).write_text("text")
        outcome = run("verify", "-e", "unet.onnx", "--against", "other", *own)
        assert "other is a folder; an engine is a file." in outcome.err


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".safetensors", ".model", ""])
def test_what_a_file_is_its_content_says(suffix: str, tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    one, other = tmp_path / f"torch{suffix}", tmp_path / f"safe{suffix}"
    torch.save(online(), one)
    save_file(online(), other)
    assert is_of(load_network(one), online())
    assert is_of(load_network(other), online())
