from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ddpm_deploy.errors import CheckpointError, DDPMDeployError
from ddpm_deploy.model import load_network
from ddpm_deploy.model.inert import (
    Inert,
    Tensors,
    _Machine,
    plain,
    read_pickle,
    read_workspace,
)
from ddpm_deploy.model.opening import read_content
from tests import golden

LOWDIM = golden.GOLDEN / "policy" / "columbia_lowdim"
REAL = LOWDIM / "latest.ckpt"
"""Written by the original's own `save_checkpoint`, with dill and OmegaConf."""

FORBIDDEN = (
    *("import", "exec", "compile", "os.", "subprocess.", "socket.", "shutil.", "ctypes."),
    *("pickle.find_class", "marshal.", "code.__new__", "function.__new__", "urllib."),
)
_events: list[str] = []
_watching = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event.startswith(FORBIDDEN):
        _events.append(f"{event} {arguments}")


sys.addaudithook(_hook)


@contextmanager
def nothing_happens() -> Iterator[None]:
    """Fails if the interpreter imports, compiles or runs anything, or touches the machine."""
    global _watching  # noqa: PLW0603
    _events.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert not _events


def archive(path: Path, pickled: bytes, records: dict[str, bytes] | None = None) -> Path:
    """Writes an archive as `torch.save` does, around any pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", b"little")
        for name, data in (records or {}).items():
            file.writestr(f"archive/data/{name}", data)
        file.writestr("archive/version", b"3\n")
    return path


class Call:
    """An object whose pickle calls something."""

    def __init__(self, called: Any, *arguments: Any) -> None:
        self.called, self.arguments = called, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.called, self.arguments


def g(name: str) -> bytes:
    return b"c" + name.replace(" ", "\n").encode() + b"\n"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def hostile(flag: Path) -> dict[str, bytes]:
    """Pickles that touch a file, one for each way that is known to."""
    command = f"touch {flag}"
    python = f"open({str(flag)!r}, 'w')"
    run = text(command) + b"\x85R"
    evaluate = text(python) + b"\x85R"
    return {
        "os.system": g("os system") + run,
        "posix.system": g("posix system") + run,
        "eval": g("builtins eval") + evaluate,
        "exec": g("builtins exec") + evaluate,
        "old names": g("__builtin__ eval") + evaluate,
        "stack global": text("os") + text("system") + b"\x93" + run,
        "dotted": text("os") + text("path.os.system") + b"\x93" + run,
        "getattr": g("builtins getattr") + g("os path") + text("system") + b"\x86R" + run,
        "import": g("importlib import_module") + text("antigravity") + b"\x85R",
        "__import__": g("builtins __import__") + text("this") + b"\x85R",
        "inst": b"(" + text(command) + b"ios\nsystem\n",
        "obj": b"(" + g("os system") + text(command) + b"o",
        "newobj": g("os system") + text(command) + b"\x85\x81",
        "newobj_ex": g("subprocess Popen") + text(command) + b"\x85}" + b"\x92",
        "build": g("builtins object") + b")\x81}" + text("__class__") + g("os _Environ") + b"sb",
        "setstate": g("code InteractiveConsole") + b")\x81" + text(python) + b"b",
        "copyreg": g("copyreg _reconstructor") + g("os system") + g("builtins object") + b"N\x87R",
        "extension": g("copyreg add_extension") + text("os") + text("system") + b"K\x01\x87R"
        + b"0\x82\x01",
        "partial": g("functools partial") + g("os system") + text(command) + b"\x86R" + b")R",
        "methodcaller": g("operator methodcaller") + text("system") + text(command) + b"\x86R"
        + g("os path") + b"\x85R",
        "dill import": g("dill._dill _import_module") + text("os") + b"\x85R",
        "dill function": g("dill._dill _create_function")
        + (g("dill._dill _create_code") + b"(" + b"K\x00" * 12 + b"tR") + b"}\x86R)R",
        "dill type": g("dill._dill _load_type") + text("CodeType") + b"\x85R",
        "marshal": g("marshal loads") + text("x") + b"\x85R",
        "torch.load": g("torch load") + text(str(flag)) + b"\x85R",
        "torch.jit": g("torch.jit load") + text(str(flag)) + b"\x85R",
        "hub": g("torch.hub load") + text("a/b") + text("c") + b"\x86R",
        "persistent": text(command) + b"Q",
        "persistent text": b"P" + command.encode() + b"\n",
        "persistent call": g("os system") + run + b"Q",
        "numpy": g("numpy load") + text(str(flag)) + b"\x85R",
        "pathlib": g("pathlib Path.touch") + text(str(flag)) + b"\x85R",
        "ordered dict": g("collections OrderedDict") + (g("os system") + run) + b"\x85R",
        "default dict": g("collections defaultdict") + g("os getcwd") + b"\x85R",
        "tensor": g("torch._utils _rebuild_tensor_v2") + (g("os system") + run)
        + b"K\x00)\x87R",
    }  # fmt: skip


def far_object() -> bytes:
    """A NumPy array of one number of 8 bytes, in which an object lies a gigabyte away."""

    def dtype(name: str) -> bytes:
        return g("numpy dtype") + text(name) + b"\x89\x88\x87R"

    field = b"}" + text("a") + dtype("O8") + b"J" + struct.pack("<i", 2**30) + b"\x86s"
    layout = b"(K\x03" + text("|") + b"N" + text("a") + b"\x85" + field + b"K\x08K\x01K\x3ftb"
    made = g("numpy.core.multiarray _reconstruct") + g("numpy ndarray") + b"K\x00\x85"
    return made + text("b") + b"\x87R(K\x01K\x01\x85" + dtype("V8") + layout + b"\x89]Natb"


NAMES = list(hostile(Path("flag")))


def outcomes(paths: list[Path], *, mebibytes: int = 384, seconds: int = 120) -> list[str]:
    """Opens files in a process of their own with little memory; returns what came of each."""
    script = """
import resource, sys
from pathlib import Path
from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model import load_network
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (int(sys.argv[1]) << 20),) * 2)
for path in sys.argv[2:]:
    try:
        load_network(path)
    except CheckpointError as error:
        print(" ".join(str(error).split()), flush=True)
    except MemoryError:
        print("out of memory", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(mebibytes), *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="reads how much memory it has from /proc")
def test_a_layout_of_memory_in_a_file_is_never_numpy_s(tmp_path: Path) -> None:
    evil = far_object()
    paths = [
        archive(tmp_path / "alone.pt", b"\x80\x02" + evil + b"."),
        archive(tmp_path / "beside.pt", b"\x80\x02}" + text("loss") + evil + b"s."),
        tmp_path / "old.pt",  # as torch wrote before 1.6
    ]
    paths[2].write_bytes(b"\x80\x02" + evil + b".")
    alone, beside, old = outcomes(paths)
    assert "it asks for numpy.core.multiarray._reconstruct" in alone
    assert "holds no tensors" in beside
    assert "it asks for numpy" in old or "is damaged" in old


def test_numbers_of_numpy_s_stay_names_beside_weights(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    saved = {
        "model": {"a": shared[:4].reshape(2, 2).T, "b": nn.Parameter(shared), "c": shared},
        "losses": [np.float64(0.5), np.float32(0.25)],
        "history": np.arange(3.0),
        "nested": [{"half": torch.ones(2).half()}],
        "epoch": 3,
    }
    torch.save(saved, tmp_path / "x.pt")
    with nothing_happens():
        content = read_content(tmp_path / "x.pt")
    for name, tensor_ in saved["model"].items():  # type: ignore[attr-defined]
        assert torch.equal(content["model"][name], tensor_.detach())
    assert content["nested"][0]["half"].dtype == torch.float16
    assert content["epoch"] == 3
    numbers = [*content["losses"], content["history"]]
    assert all(isinstance(number, Inert) for number in numbers)
    # What asks for more is refused as before.
    torch.save({**saved, "extra": Call(os.getcwd)}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="is a pickle that runs code"):
        read_content(tmp_path / "x.pt")


def test_a_damaged_tensor_beside_numpy_s_numbers_is_named_as_such(tmp_path: Path) -> None:
    body = text("w") + tensor(size=(7,), stride=(1,)) + b"s" + text("n") + g("numpy dtype") + b"s"
    path = archive(tmp_path / "x.pt", b"\x80\x02}" + body + b".", {"0": bytes(24)})
    with pytest.raises(CheckpointError, match="its shape goes beyond its 6 numbers"):
        read_content(path)


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """Lets Python import what it reads files with, before anybody watches."""
    content = read_workspace(REAL)
    assert content is not None
    assert dict(content["state_dicts"]["model"])


def test_a_workspace_that_the_original_wrote_is_read_without_running_any_of_it() -> None:
    table = json.loads((LOWDIM / "table.json").read_text(encoding="utf-8"))
    with pytest.raises(pickle.UnpicklingError, match="omegaconf"):
        torch.load(REAL, weights_only=True)
    with nothing_happens():
        content = read_workspace(REAL)
        assert content is not None
        ema = dict(content["state_dicts"]["ema_model"])
    # What OmegaConf itself gave, see tests/data/README.md.
    assert content["cfg"] == table["files"][0]["tree"]["cfg"]
    assert list(content["state_dicts"]) == ["model", "ema_model", "optimizer"]
    for entry in table["tensors"]["ema"]:
        wanted = torch.from_numpy(golden._entry(entry, LOWDIM))
        assert torch.equal(ema[entry["key"]], wanted), entry["key"]
    assert len(ema) == len(table["tensors"]["ema"])


@pytest.mark.parametrize("name", NAMES)
def test_what_a_pickle_would_call_is_never_called(tmp_path: Path, name: str) -> None:
    flag = tmp_path / "flag"
    pickled = hostile(flag)[name]
    with nothing_happens():
        try:
            made = read_pickle(b"\x80\x02" + pickled + b".")
        except (ValueError, LookupError) as error:
            made = error
    assert isinstance(made, Inert | Exception | dict)
    assert not flag.exists()


@pytest.mark.parametrize("place", ["cfg", "state", "tensor", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_file_is_refused_and_does_nothing(tmp_path: Path, name: str, place: str) -> None:
    flag = tmp_path / "flag"
    evil = hostile(flag)[name]
    state = b"}" + text("model.diffusion_step_encoder.1.weight") + evil + b"s"
    model = {"cfg": b"}", "state": evil, "tensor": state, "all": b"}"}[place]
    cfg = evil if place == "cfg" else b"}"
    body = b"}" + text("cfg") + cfg + b"s" + text("state_dicts")
    body += b"}" + text("model") + model + b"ss"
    path = archive(tmp_path / "x.ckpt", b"\x80\x02" + (evil if place == "all" else body) + b".")
    with pytest.raises(CheckpointError) as caught:
        load_network(path)
    assert caught.value.hint
    assert not flag.exists()


def test_a_pickle_of_another_form_is_still_refused_by_what_it_asks_for(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    path = tmp_path / "x.ckpt"
    torch.save({"weights": {}, "extra": Call(os.system, f"touch {flag}")}, path)
    with pytest.raises(CheckpointError, match="is a pickle that runs code when it is read") as said:
        read_content(path)
    assert "system" in str(said.value)
    assert not flag.exists()


def test_every_instruction_of_a_pickle_is_known() -> None:
    refused = set()
    for opcode in pickletools.opcodes:
        with suppress(LookupError):  # there is nothing on the stack
            try:
                _Machine().step(opcode.name, None)
            except ValueError:
                refused.add(opcode.name)
    assert refused == {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER", "STOP"}


class Node:
    """Stands in for a class of the project, which is not there when the file is read."""

    def __init__(self, **state: Any) -> None:
        self.__dict__ |= state


def test_plain_values_come_back_as_python_itself_reads_them() -> None:
    values: list[Any] = [
        *(None, True, False, 0, 1, 255, 256, 65536, -1, 2**31, -(2**40), 2**70, 1.5, -0.0),
        *("", "a", "ä" * 300, b"", b"x" * 300, (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        *([], [1, [2]], {}, {"a": {"b": [1, (2, "c")]}, 1: 2, None: 3}, OrderedDict()),
    ]
    shared = ["same"]
    values += [[shared, shared]]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for value in values:
            if isinstance(value, bytes) and protocol < 3:
                continue  # made by a call, before there was an instruction
            assert read_pickle(pickle.dumps(value, protocol)) == value, (protocol, value)


def test_objects_keep_their_name_arguments_and_state() -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        made = read_pickle(pickle.dumps(Node(a=1, b=[2]), protocol))
        assert (made.name, made.args, made.state) == (f"{__name__}.Node", (), {"a": 1, "b": [2]})


def test_a_configuration_s_nodes_are_read_and_the_rest_is_named() -> None:
    leaf = Inert("omegaconf.nodes.AnyNode", (), {"_val": 3, "_parent": None})
    inner = Inert("omegaconf.listconfig.ListConfig", (), {"_content": [leaf, leaf]})
    root = Inert("omegaconf.dictconfig.DictConfig", (), {"_content": {"a": inner, "b": leaf}})
    leaf.state["_parent"] = root
    assert plain(root) == {"a": [3, 3], "b": 3}
    strange = Inert("pathlib.PosixPath", ("a",))
    assert plain({"path": strange}) == {"path": "<pathlib.PosixPath>"}


def config_of(cfg: bytes) -> bytes:
    return b"\x80\x02}" + text("cfg") + cfg + b"s" + text("state_dicts") + b"}s."


LAUGHS = b"]q\x000" + b"".join(
    b"](" + (b"h" + bytes([k])) * 10 + b"eq" + bytes([k + 1]) + b"0" for k in range(10)
) + b"h\x0a"  # fmt: skip
"""Ten lists of ten of each other: 10**10 lists when they are written out."""


@pytest.mark.parametrize(
    "pickled",
    [
        config_of(LAUGHS),
        config_of(b"]q\x00h\x00a"),  # a list in itself
        config_of(b")" + b"\x85" * 200_000),  # a deep tuple
        config_of(b"}" + b")" + b"\x85" * 200_000 + b"Ns"),  # a deep tuple as a key
        config_of(b"N" + b"r\xff\xff\xff\xff"),  # the four-billionth place of the memo
        config_of(b"\x8e" + struct.pack("<Q", 2**62)),  # bytes without end
        config_of(b"\x8d" + struct.pack("<Q", 2**63)),  # a text without end
        config_of(b"\x8b" + struct.pack("<i", -5)),  # a number of a negative length
        config_of(b"I" + b"9" * 100_000 + b"\n"),
        config_of(b"0" * 50),
        config_of(b"(((((((("),
        config_of(b"h\x07"),
        b"\x80\x02",
        b".",
        b"",
        b"\x80\xff.",
    ],
)  # fmt: skip
def test_a_pickle_without_end_or_bottom_is_refused_at_once(tmp_path: Path, pickled: bytes) -> None:
    path = archive(tmp_path / "x.ckpt", pickled)
    with nothing_happens():
        content = read_workspace(path)
    assert content is None or content["cfg"] in (None, [])


def test_a_pickle_longer_than_any_policy_s_is_not_read(tmp_path: Path) -> None:
    for body in (b"X" + struct.pack("<I", 2**22) + b"a" * 2**22, b"N0" * 2**19):
        path = archive(tmp_path / "x.ckpt", b"\x80\x02" + body + config_of(b"}")[2:])
        assert read_workspace(path) is None
    longest = b"\x80\x02" + b"N0" * (2**19 - 100) + config_of(b"}")[2:]
    assert read_workspace(archive(tmp_path / "x.ckpt", longest)) is not None


def long(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<i", len(data)) + data


@pytest.mark.skipif(sys.platform != "linux", reason="reads how much memory it has from /proc")
def test_bombs_cost_little_time_and_memory(tmp_path: Path) -> None:
    begin = text("n") + g("numpy dtype") + b"s"  # or torch's own reader would read it
    huge = long(2**4_000_000)
    sides = b"(" + huge + b"q\x01" + b"h\x01" * 500_000 + b"tq\x02"
    stored = b"(" + text("storage") + g("torch FloatStorage") + text("0") + text("cpu") + b"K\x06tQ"
    call = g("torch._utils _rebuild_tensor_v2")
    same = b"".join(long(k * (2**61 - 1)) + b"N" for k in range(250_000))  # of one hash
    many = b"".join(text(f"{k:05}") + b"h\x05" for k in range(90_000))
    one = b"}(" + b"".join(text(f"{k:05}") + b"N" for k in range(100_000)) + b"uq\x05"
    bombs = {
        "dicts": b"\x80\x02}" + begin + b"}" * 2**24,
        "short dicts": b"\x80\x02}" + begin + b"}" * (2**22 - 100),
        "calls": b"\x80\x02}" + begin + b"NQ" + b"Q" * (2**22 - 200),
        "names": b"\x80\x02}" + begin + b"c\n\n" * 2**20,
        "marks": b"\x80\x02}" + begin + b"(" * (2**22 - 100),
        "sides": b"\x80\x02}" + begin + text("w") + call + b"(" + stored + b"K\0" + sides
        + b"h\x02\x89}tRs.",
        "a side": b"\x80\x02}" + begin + text("w") + call + b"(" + stored + b"K\0"
        + b"(" + huge + b"q\x01" + b"h\x01" * 7 + b"tq\x02" + b"h\x02\x89}tRs.",
        "an offset": b"\x80\x02}" + begin + text("w") + call + b"(" + stored + huge
        + b"))\x89}tRs.",
        "one hash": b"\x80\x02}" + begin + text("d") + b"}(" + same + b"us.",
        "shared states": b"\x80\x02}" + begin + text("cfg") + b"}s" + text("state_dicts") + one
        + b"0}(" + many + b"us.",
        "long names": b"\x80\x02}" + begin + text("cfg") + b"}(" + b"B"
        + struct.pack("<I", 2**20) + bytes(2**20) + b"q\x06NuNs.",
        "joined names": b"\x80\x02" + text("a" * 2**20) + b"q\x01" + b"h\x01h\x01\x93" * 2**18,
    }  # fmt: skip
    paths = [archive(tmp_path / f"{name}.pt", body) for name, body in bombs.items()]
    said = outcomes(paths)
    assert len(said) == len(bombs)
    for name, message in zip(bombs, said, strict=True):
        assert "out of memory" not in message, name
        wanted = ("is a pickle that runs code", "is damaged", "is a workspace of diffusion_policy")
        assert any(part in message for part in wanted), (name, message)
        assert len(message) < 1000


def tensor(
    *, kind: str = "torch FloatStorage", key: str = "0", count: int = 6, offset: int = 0,
    size: tuple[int, ...] = (2, 3), stride: tuple[int, ...] = (3, 1),
) -> bytes:  # fmt: skip
    """Writes a tensor's part of a pickle."""

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(whole(v) for v in values) + b"t"

    def whole(value: int) -> bytes:
        return pickle.dumps(value, 2)[2:-1]

    pid = b"(" + text("storage") + g(kind) + text(key) + text("cpu") + whole(count) + b"tQ"
    shape = whole(offset) + numbers(size) + numbers(stride)
    return g("torch._utils _rebuild_tensor_v2") + b"(" + pid + shape + b"\x89}tR"


def test_a_tensor_is_what_torch_would_make(tmp_path: Path) -> None:
    data = struct.pack("<6f", *range(6))

    def read(**changes: Any) -> torch.Tensor:
        body = b"}" + text("w") + tensor(**changes) + b"s"
        entries = read_pickle(b"\x80\x02" + body + b".")
        path = archive(tmp_path / "x.ckpt", b"", {"0": data, "1": b""})
        return Tensors(path, "archive", entries)["w"]

    assert torch.equal(read(), torch.arange(6.0).reshape(2, 3))
    assert torch.equal(read(size=(3, 2), stride=(1, 3)), torch.arange(6.0).reshape(2, 3).T)
    assert torch.equal(read(offset=2, size=(2,), stride=(1,)), torch.tensor([2.0, 3.0]))
    assert read(key="1", count=0, size=(0,), stride=(1,)).shape == (0,)
    assert read(size=(), stride=()).shape == ()
    for wrong in (
        {"count": 7}, {"count": 5}, {"count": -6}, {"offset": 1}, {"offset": -1},
        {"size": (3, 3)}, {"size": (-2, 3)}, {"size": (2, 3, 4)}, {"stride": (4, 1)},
        {"stride": (-3, 1)}, {"key": "7"}, {"key": "../0"}, {"kind": "os system"},
        {"kind": "torch.cuda FloatStorage"}, {"kind": "torch QInt8Storage"},
        {"size": (2**40, 2**40), "stride": (0, 0)}, {"size": (7,), "stride": (0,)},
        {"size": (2**70,), "stride": (1,)}, {"size": (0, 2**70), "stride": (1, 1)},
        {"kind": "torch DoubleStorage"},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="its tensor w cannot be read"):
            read(**wrong)


def test_records_that_are_larger_than_the_file_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data/0", bytes(2**22))
    entries = read_pickle(b"\x80\x02}" + text("w") + tensor(count=2**20) + b"s.")
    with pytest.raises(ValueError, match="larger than the file"):
        Tensors(path, "archive", entries)["w"]


def test_numbers_of_the_other_byte_order_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    with zipfile.ZipFile(REAL) as real, zipfile.ZipFile(path, "w") as file:
        for record in real.infolist():
            big = record.filename.endswith("byteorder")
            file.writestr(record.filename, b"big" if big else real.read(record))
    assert read_workspace(path) is None


ERRORS = (LookupError, ValueError, TypeError, AttributeError, OverflowError)
"""What a bad pickle ends with."""


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_random_bytes_do_nothing(data: bytes) -> None:
    with nothing_happens(), suppress(*ERRORS):
        read_pickle(data)


OPCODES = [opcode.code.encode("latin1") for opcode in pickletools.opcodes]


@given(st.lists(st.sampled_from([*OPCODES, *(h for h in hostile(Path("flag")).values())])))
@settings(max_examples=300, deadline=None)
def test_random_instructions_do_nothing(parts: list[bytes]) -> None:
    with nothing_happens(), suppress(*ERRORS):
        read_pickle(b"\x80\x02" + b"".join(parts) + b".")


def test_a_real_workspace_with_changed_bytes_loads_or_is_refused(tmp_path: Path) -> None:
    generator = random.Random(0)
    with zipfile.ZipFile(REAL) as real:
        records = {record.filename: real.read(record) for record in real.infolist()}
    pickled = records["archive/data.pkl"]
    outcomes = {"refused": 0, "loaded": 0}
    for k in range(40):
        changed = bytearray(pickled)
        for _ in range(1 + k % 3):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as file:  # with checksums that are right
            for name, data in records.items():
                file.writestr(name, bytes(changed) if name == "archive/data.pkl" else data)
        path = tmp_path / "x.ckpt"
        path.write_bytes(buffer.getvalue())
        try:
            load_network(path)
        except DDPMDeployError as error:
            assert error.hint  # noqa: PT017
            outcomes["refused"] += 1
        else:
            outcomes["loaded"] += 1  # the optimizer's state, a comment
    assert min(outcomes.values()) > 5
