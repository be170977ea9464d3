"""Damaged and strange files: one message each, in seconds, and never a traceback."""

from __future__ import annotations

import random
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_deploy.errors import DDPMDeployError
from ddpm_deploy.model import LoadedNetwork, load_network
from tests.commands import run
from tests.support import tiny_network, write_checkpoint

NAME = "inc.double_conv.0.weight"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)


def state() -> dict[str, Any]:
    return dict(tiny_network(channels=3).state_dict())


def opened(content: Any) -> LoadedNetwork:
    torch.save(content, "ckpt.pt")
    start = time.monotonic()
    try:
        return load_network("ckpt.pt", image_size=8)
    finally:
        assert time.monotonic() - start < 20


def refused(content: Any) -> str:
    with pytest.raises(DDPMDeployError) as caught:
        opened(content)
    assert caught.value.hint
    outcome = run("export", "ckpt.pt")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert outcome.err.count("error: ") == 1
    return str(caught.value)


def deep(levels: int) -> Any:
    content: Any = state()
    for _ in range(levels):
        content = {"more": content}
    return content


def cyclic() -> dict[str, Any]:
    content: dict[str, Any] = {"epoch": 3}
    content["self"] = {"again": content}
    return content


def quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.to_sparse(), f"holds a sparse tensor (torch.sparse_coo) in {NAME}"),
        (lambda v: v.to("meta"), f"a tensor on torch's meta device, in {NAME}"),
        (quantised, f"holds quantised numbers (torch.qint8) in {NAME}"),
        (lambda v: v.to(torch.complex64), f"holds torch.complex64 in {NAME}"),
        (lambda v: v.to(torch.int8), f"holds torch.int8 in {NAME}"),
        (lambda v: v > 0, f"holds torch.bool in {NAME}"),
        (lambda v: v * float("nan"), f"not finite: 108 of 108 in {NAME}"),
        (lambda v: torch.zeros(0), "do not fit that network"),
        (lambda v: torch.zeros(()), "do not fit that network"),
        (lambda v: v[0], "do not fit that network"),
        (lambda v: v[:, :, :, None], "do not fit that network"),
        (lambda v: torch.zeros(1).expand(10**6, 10**6), f"numbers that share 4 bytes in {NAME}"),
        (lambda v: [1, 2, 3], "nearest family is dome272, with 6 of its 7 marks"),
        (lambda v: None, "nearest family is dome272, with 6 of its 7 marks"),
        (lambda v: {"a": v}, "nearest family is dome272, with 6 of its 7 marks"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tensor_that_is_no_plain_one_is_named(
    change: Callable[[Tensor], Any], message: str
) -> None:
    content = state()
    content[NAME] = change(content[NAME])
    assert message in refused(content)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_numbers_load_as_float32(dtype: torch.dtype) -> None:
    loaded = opened({name: value.to(dtype) for name, value in state().items()})
    for name, value in loaded.network.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, state()[name].to(dtype).float())


def test_an_eight_bit_float_loads_as_float32() -> None:
    content = state()
    content[NAME] = content[NAME].to(torch.float8_e4m3fn)
    value = opened(content).network.state_dict()[NAME]
    assert torch.equal(value, content[NAME].float())


def test_views_and_strides_do_not_matter() -> None:
    content = state()
    flat = torch.cat([value.flatten() for value in content.values()])
    views, at = {}, 0
    for name, value in content.items():
        views[name] = flat[at : at + value.numel()].view(value.shape)
        at += value.numel()
    views[NAME] = content[NAME].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not views[NAME].is_contiguous()
    found = opened(views).network.state_dict()
    assert all(torch.equal(found[name], value) for name, value in content.items())


def test_zeros_are_a_network_too() -> None:
    opened({name: torch.zeros_like(value) for name, value in state().items()})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (cyclic, "holds no tensors; its keys are epoch, self"),
        (lambda: deep(50), "holds no tensors; its keys are more"),
        (lambda: {i: torch.zeros(2) for i in range(5)}, "holds no tensors; its keys are 0, 1"),
        (lambda: {("a", 1): torch.zeros(2), b"c": 3}, "holds no tensors; its keys are ('a', 1)"),
        (lambda: {"": torch.zeros(2)}, "nearest family"),
        (lambda: {"module.": torch.zeros(2)}, "nearest family"),
        (lambda: {"model": {}}, "holds no tensors; its keys are model"),
        (lambda: {"model": None, "ema": []}, "holds no tensors; its keys are model, ema"),
        (lambda: [], "holds a list, not a dictionary"),
        (lambda: "text", "holds a str, not a dictionary"),
        (lambda: None, "holds a NoneType, not a dictionary"),
        (lambda: 3, "holds a int, not a dictionary"),
        (lambda: [[torch.zeros(2)]], "holds a list, not a dictionary"),
        (lambda: {f"k{i}": i for i in range(100_000)}, "holds no tensors; its keys are k0, k1"),
    ],
)
def test_strange_contents_are_one_message(content: Callable[[], Any], message: str) -> None:
    assert message in refused(content())


def test_a_hundred_thousand_tensors_take_little_more_than_torch_does() -> None:
    numbers = torch.zeros(100_000)
    torch.save({f"k{i}": numbers[i] for i in range(100_000)}, "ckpt.pt")
    start = time.process_time()
    torch.load("ckpt.pt", weights_only=True)
    torchs = time.process_time() - start
    with pytest.raises(DDPMDeployError, match="its 100000 tensors begin with k0, k1, k2"):
        load_network("ckpt.pt")
    assert time.process_time() - start - 2 * torchs < 5


def test_shallow_nests_are_opened() -> None:
    opened(deep(4))


def test_dictionaries_of_dictionaries_without_end_are_not_walked() -> None:
    content: dict[str, Any] = {}
    for _ in range(40):  # 2^40 ways through it
        content = {"a": content, "b": content}
    assert "holds no tensors" in refused(content)


def test_a_file_is_refused_wherever_it_is_cut() -> None:
    content = write_checkpoint(Path("whole.pt")).read_bytes()
    legacy = Path("legacy.pt")
    torch.save(state(), legacy, _use_new_zipfile_serialization=False)
    for whole in (content, legacy.read_bytes()):
        for cut in [
            *range(0, 60, 3),
            *(len(whole) * i // 40 for i in range(1, 40)),
            len(whole) - 1,
        ]:
            Path("cut.pt").write_bytes(whole[:cut])
            with pytest.raises(DDPMDeployError, match=r"cut\.pt is damaged, or is no checkpoint"):
                load_network("cut.pt")


def test_safetensors_are_refused_wherever_they_are_cut() -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(state(), "whole.safetensors")
    whole = Path("whole.safetensors").read_bytes()
    for cut in [*range(0, 60, 3), *(len(whole) * i // 40 for i in range(1, 40)), len(whole) - 1]:
        Path("cut.safetensors").write_bytes(whole[:cut])
        with pytest.raises(DDPMDeployError, match="is damaged, or is no checkpoint"):
            load_network("cut.safetensors")


@pytest.mark.parametrize("form", ["legacy", "safetensors"])
def test_a_flipped_bit_never_ends_in_a_traceback(form: str) -> None:
    path = Path(f"ckpt.{'pt' if form == 'legacy' else form}")
    if form == "legacy":
        torch.save(state(), path, _use_new_zipfile_serialization=False)
    else:
        pytest.importorskip("safetensors.torch").save_file(state(), path)
    content = path.read_bytes()
    draw = random.Random(0)
    head = 8 + int.from_bytes(content[:8], "little") if form == "safetensors" else 30_000
    for number in range(150):
        flipped = bytearray(content)
        end = head if number % 3 else len(content)
        flipped[draw.randrange(min(end, len(content)))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            loaded = load_network(path, image_size=8)
        except DDPMDeployError as error:
            assert error.hint  # noqa: PT017  (both outcomes are right)
        else:  # neither form has checksums: a number may have changed, or, where the old form says
            # where in a storage a tensor lies, that one tensor
            found = loaded.network.state_dict()
            changed = [int((found[k] != v).sum()) for k, v in state().items()]
            assert sum(n > 0 for n in changed) <= 1
            assert form == "legacy" or sum(changed) <= 1


def test_a_flipped_bit_of_an_archive_is_refused_or_changes_no_number() -> None:
    """Torch's archives carry a checksum of each tensor."""
    content = write_checkpoint(Path("ckpt.pt")).read_bytes()
    draw = random.Random(1)
    wanted = load_network("ckpt.pt").network.state_dict()
    refusals = 0
    for _ in range(60):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        Path("ckpt.pt").write_bytes(flipped)
        try:
            loaded = load_network("ckpt.pt")
        except DDPMDeployError:
            refusals += 1
            outcome = run("export", "ckpt.pt")
            assert outcome.code == 2
            assert outcome.err.count("error: ") == 1
        else:  # in what pads the archive, or in what nobody reads
            found = loaded.network.state_dict()
            assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert refusals > 20


def test_an_archive_that_would_unpack_without_end_is_refused() -> None:
    torch.save({"a": torch.zeros(2**20)}, "whole.pt")
    with (
        zipfile.ZipFile("whole.pt") as whole,
        zipfile.ZipFile("ckpt.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(DDPMDeployError, match="is compressed, which torch does not do"):
        load_network("ckpt.pt")
