from __future__ import annotations

import os
import pickle
import random
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_deploy import ModelSpec
from ddpm_deploy.errors import CheckpointError, DDPMDeployError, MissingDependencyError, SpecError
from ddpm_deploy.model import LoadedNetwork, load_network
from tests.support import tiny_network, tiny_spec, write_checkpoint, write_state_dict


def weights(loaded: LoadedNetwork) -> list[torch.Tensor]:
    return list(loaded.network.state_dict().values())


def same(one: LoadedNetwork, other: LoadedNetwork) -> bool:
    """Tells whether two networks are the same; the file's own hash may differ."""
    specs = [loaded.spec.with_changes(checkpoint_sha256="") for loaded in (one, other)]
    pairs = zip(weights(one), weights(other), strict=True)
    return specs[0] == specs[1] and all(torch.equal(a, b) for a, b in pairs)


def refused(path: Path, **settings: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_network(path, **settings)  # type: ignore[arg-type]
    assert "weights_only" not in str(caught.value)  # torch's advice to run the file's code
    assert caught.value.hint
    return caught.value


class Command:
    """An object whose pickle runs a command when it is read."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.flag}",)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    assert str(refused(tmp_path / "no.pt")).endswith(
        "no.pt does not exist; a checkpoint is a file."
    )
    (tmp_path / "run.pt").mkdir()
    assert str(refused(tmp_path / "run.pt")).endswith("run.pt is a folder; a checkpoint is a file.")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"epoch 1, loss 0.2\n", "it is neither an archive nor a pickle"),
        (b"hello", "it is neither an archive nor a pickle"),
        (bytes(4096), "it is neither an archive nor a pickle"),
        (b"\x80\x02", "its pickle cannot be read"),
        (b"PK\x03\x04", "it begins as an archive whose end is missing"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(content)
    error = refused(path)
    assert str(error) == f"{path} is damaged, or is no checkpoint: {reason}."
    assert "sha256sum" in error.hint


def test_an_archive_of_another_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))
    refused(path)


def test_a_truncated_checkpoint_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    content = write_checkpoint(tmp_path / "ckpt.pt").read_bytes()
    path = tmp_path / "short.pt"
    for share in (0.001, 0.1, 0.5, 0.93, 0.999):
        path.write_bytes(content[: int(len(content) * share)])
        assert "short.pt is damaged" in str(refused(path))
    path.write_bytes(content[:-1])
    assert "short.pt is damaged" in str(refused(path))


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    original = write_checkpoint(tmp_path / "ckpt.pt")
    content = original.read_bytes()
    whole = load_network(original)
    generator = random.Random(0)
    anywhere = generator.choices(range(len(content)), k=150)
    with zipfile.ZipFile(original) as archive:
        listed = archive.start_dir
    headers = generator.choices(range(listed, len(content)), k=250)
    outcomes = {"refused": 0, "the same": 0}
    path = tmp_path / "flipped.pt"
    for position in anywhere + headers:
        flipped = bytearray(content)
        flipped[position] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = load_network(path)
        except DDPMDeployError:
            outcomes["refused"] += 1
        else:
            assert same(loaded, whole), position
            outcomes["the same"] += 1
    assert min(outcomes.values()) > 50  # dates and paddings are harmless, numbers are not


def test_a_flipped_bit_in_a_tensor_names_the_record(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "ckpt.pt")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
    name, extra = struct.unpack("<HH", content[record.header_offset + 26 :][:4])
    content[record.header_offset + 30 + name + extra + record.file_size // 2] ^= 1
    path.write_bytes(content)
    assert f"the checksum of its record {record.filename} does not match" in str(refused(path))


def test_a_record_marked_as_a_folder_is_refused(tmp_path: Path) -> None:
    # torch gives such a tensor's memory as it finds it: another model at every call, silently.
    path = write_checkpoint(tmp_path / "ckpt.pt")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        listed, name = archive.start_dir, archive.infolist()[0].filename
    content[listed + 38] ^= 0x10  # the external attributes of the first record
    path.write_bytes(content)
    assert f"its record {name} is marked as a folder" in str(refused(path))


def test_an_optimizer_s_file_names_the_weights_beside_it(tmp_path: Path) -> None:
    network = tiny_network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-4)
    network(torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)).sum().backward()
    optimizer.step()
    path = tmp_path / "optim.pt"
    torch.save(optimizer.state_dict(), path)
    error = refused(path)
    assert str(error) == f"{path} is an optimizer's state, not a network."
    assert error.hint.endswith(f"ddpm-deploy export {tmp_path / 'ckpt.pt'}")
    write_state_dict(tmp_path / "ema_ckpt.pt")
    assert refused(path).hint.endswith(f"ddpm-deploy export {tmp_path / 'ema_ckpt.pt'}")


def test_an_unknown_architecture_names_the_nearest_and_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    state = tiny_network().state_dict()
    del state["outc.weight"], state["sa1.mha.in_proj_weight"]
    torch.save(state, path)
    assert (
        "The nearest family is dome272, with 5 of its 7 marks; "
        "missing: sa1.mha.in_proj_weight, outc.weight."
    ) in str(refused(path))
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    message = str(refused(path))
    assert "its 2 tensors begin with weight, bias. The nearest family is dome272, with 0" in message


def test_a_fork_with_other_layers_names_them(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    state = tiny_network().state_dict()
    torch.save({**state, "extra.weight": torch.zeros(2)}, path)
    assert "looks like dome272 but its weights do not fit" in str(refused(path))
    assert "extra.weight" in str(refused(path))
    torch.save({**state, "inc.double_conv.0.weight": torch.zeros(4)}, path)
    assert "looks like dome272 but its weights do not fit" in str(refused(path))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_that_needs_code_is_refused_and_its_code_does_not_run(
    tmp_path: Path, archive: bool, protocol: int
) -> None:
    path, flag = tmp_path / "ckpt.pt", tmp_path / "ran"
    content = {"model": Command(flag), "weight": torch.zeros(2)}
    if archive:
        torch.save(content, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    error = refused(path)
    assert "is a pickle that runs code when it is read: it asks for posix.system." in str(error)
    assert "torch.save(model.state_dict()" in error.hint
    assert not flag.exists()


def test_a_whole_module_and_a_program_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    assert "it asks for torch.nn.modules.linear.Linear" in str(refused(path))
    with zipfile.ZipFile(path, "w") as archive:  # what torch.jit.save writes has these
        archive.writestr("net/data.pkl", b"")
        archive.writestr("net/constants.pkl", b"")
    assert "is a TorchScript archive: a program" in str(refused(path))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (torch.zeros(3), "holds a Tensor, not a dictionary of tensors"),
        ([torch.zeros(3)], "holds a list, not a dictionary of tensors"),
        ({"epoch": 3, "loss": 0.1}, "holds no tensors; its keys are epoch, loss"),
        ({0: torch.zeros(3)}, "holds no tensors; its keys are 0"),
        ({}, "holds no tensors"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: object, what: str) -> None:
    torch.save(content, tmp_path / "ckpt.pt")
    assert what in str(refused(tmp_path / "ckpt.pt"))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, number: float) -> None:
    state = tiny_network().state_dict()
    state["outc.bias"][0] = number
    torch.save(state, tmp_path / "ckpt.pt")
    assert "has numbers that are not finite: 1 of 1 in outc.bias" in str(
        refused(tmp_path / "ckpt.pt")
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_of_wrappers_are_stripped(tmp_path: Path, prefix: str) -> None:
    plain = load_network(write_state_dict(tmp_path / "ckpt.pt"))
    wrapped = load_network(write_state_dict(tmp_path / "wrapped.pt", prefix=prefix))
    assert same(plain, wrapped)


def test_the_averaged_weights_are_taken_where_a_file_has_both(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    online, ema = tiny_network(seed=1), tiny_network(seed=2)
    torch.save({"model": online.state_dict(), "ema": ema.state_dict(), "step": 5}, path)
    for wanted, network in [(None, ema), ("ema", ema), ("online", online)]:
        loaded = load_network(path, weights=wanted)  # type: ignore[arg-type]
        assert loaded.spec.weights == (wanted or "ema")
        assert torch.equal(loaded.network.state_dict()["outc.weight"], network.outc.weight)


def test_weights_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save({"state_dict": tiny_network().state_dict()}, path)
    error = refused(path, weights="ema")
    assert str(error) == f"{path} holds no ema weights; it has online."
    write_state_dict(path)
    assert "does not say that it is the EMA's" in str(refused(path, weights="ema"))
    assert load_network(write_state_dict(tmp_path / "ema_ckpt.pt")).spec.weights == "ema"


def test_safetensors_hold_the_same_network(tmp_path: Path) -> None:
    plain = load_network(write_state_dict(tmp_path / "ckpt.pt"))
    path = tmp_path / "ckpt.safetensors"
    safetensors = pytest.importorskip("safetensors.torch", reason="of the extra [export]")
    safetensors.save_file(tiny_network(channels=3).state_dict(), path)
    assert same(load_network(path), plain)
    path.write_bytes(path.read_bytes()[:1000])
    assert "is damaged" in str(refused(path))


def test_safetensors_that_are_not_installed_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "ckpt.safetensors"
    path.write_bytes(bytes(100))
    with pytest.raises(MissingDependencyError, match="safetensors is needed here") as caught:
        load_network(path)
    assert caught.value.hint == "pip install 'ddpm-deploy[export]'"


def test_what_the_file_does_not_say_is_reported_as_assumed(tmp_path: Path) -> None:
    loaded = load_network(write_state_dict(tmp_path / "ckpt.pt"))
    assert [(fact.name, fact.value, fact.option) for fact in loaded.assumed] == [
        ("heads", 4, "--set heads=..."),
        ("image size", "64x64", "--image-size"),
        (
            "schedule",
            "linear (start 0.0001, end 0.02), T = 1000",
            "--schedule, --timesteps",
        ),
        ("prediction", "epsilon", "--prediction"),
    ]
    sized = load_network(tmp_path / "ckpt.pt", image_size=32)
    assert sized.spec.sample_shape == (3, 32, 32)
    assert "image size" not in [fact.name for fact in sized.assumed]
    assert load_network(write_checkpoint(tmp_path / "own.pt")).assumed == ()


def test_settings_that_contradict_the_file_are_refused(tmp_path: Path) -> None:
    own = write_checkpoint(tmp_path / "own.pt")
    assert "was trained at 8x8, not at --image-size 16" in str(refused(own, image_size=16))
    other = tiny_spec(timesteps=30).schedule
    assert "was trained with the schedule linear" in str(refused(own, schedule=other))
    bare = write_state_dict(tmp_path / "ckpt.pt")
    assert "The image size is 20x20; this network takes multiples of 8." in str(
        refused(bare, image_size=20)
    )


@pytest.mark.parametrize(
    ("spec", "given"),
    [(tiny_spec(), "1 channels and no labels"), (tiny_spec(classes=4), "1 channels and 4 labels")],
)
def test_a_checkpoint_of_another_kind_than_the_engine_s_is_refused(
    tmp_path: Path, spec: ModelSpec, given: str
) -> None:
    path = write_state_dict(tmp_path / "ckpt.pt", channels=3, classes=2)
    error = refused(path, spec=spec)
    assert str(error) == (
        f"{path} is a network of 3 channels and 2 labels of dome272; the engine beside it has "
        f"{given} of test."
    )


@pytest.mark.parametrize(
    ("own", "what"),
    [
        ({"format": 1}, "is damaged"),
        ({"spec": "{"}, "is damaged"),
        ({"spec": '{"format": 99, "tool_version": "9.9"}'}, "written by ddpm-deploy 9.9"),
    ],
)
def test_a_damaged_or_later_spec_in_a_checkpoint_is_refused(
    tmp_path: Path, own: dict[str, object], what: str
) -> None:
    path = tmp_path / "ckpt.pt"
    torch.save({"ddpm_deploy": own, "ema": tiny_network().state_dict()}, path)
    with pytest.raises(SpecError, match=what):
        load_network(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.complex64])
def test_weights_that_are_no_floating_point_numbers_are_refused_by_name(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    state = {key: value.to(dtype) for key, value in tiny_network(channels=3).state_dict().items()}
    path = tmp_path / "ckpt.pt"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=rf"holds {dtype} in inc\.double_conv\.0\.weight"):
        load_network(path)
