"""Reading pickles that would run code, without running any.

Robot policies are saved together with the objects that configured their training, by `dill`. To
unpickle such a file is to run it. Here a pickle is read as what it is, a program for a stack of
objects, by a machine of our own: it imports nothing and calls nothing. What the program would have
called becomes an `Inert`, which only remembers its name and what it was given; tensors are made
afterwards, by our own code, from the numbers of those that `torch.save` writes.

Nothing here uses `pickle` or `torch.load`.
"""

from __future__ import annotations

import math
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

PICKLE_BYTES = 2**24
"""Longest pickle that is read; a policy's has a few hundred thousand bytes beside its tensors."""

_NODES, _DEPTH = 100_000, 100
"""How much of a configuration is read, and how deep: one that holds itself never ends."""

_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_PARAMETERS = frozenset(
    {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
)


@dataclass(eq=False, slots=True)
class Inert:
    """What a pickle would have imported, or made by a call.

    Attributes:
        name: Of the function or class, with its module; `persistent` for what lies outside the
            pickle; `call` where what is called is no plain name.
        args: What it would have been called with; None where it is only named.
        state: What would have been set on it.
        items: What would have been appended to it, or set in it as (key, value).
    """

    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None
    items: list[Any] = field(default_factory=list)


class Tensors(Mapping[str, Tensor]):
    """The tensors of a state dict, each read when it is asked for.

    Args:
        path: The archive.
        prefix: Of its records' names.
        entries: What the pickle says of them.
    """

    def __init__(self, path: Path, prefix: str, entries: Mapping[str, Any]) -> None:
        self._path, self._prefix, self._entries = path, prefix, entries
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}
        self._bytes = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Tensor:
        """Reads a tensor.

        Raises:
            ValueError: The file says what no tensor is.
        """
        try:
            return self._tensor(self._entries[name])
        except (ValueError, TypeError, OverflowError, RuntimeError, zipfile.BadZipFile) as error:
            raise ValueError(f"its tensor {name} cannot be read: {error}") from error

    def _tensor(self, node: Any) -> Tensor:
        if parameter := _args(node, *_PARAMETERS):
            node = parameter[0]
        args = _args(node, "torch._utils._rebuild_tensor_v2")
        if len(args) < 4:
            raise ValueError(f"it is {_described(node)}")
        stored, offset, size, stride = args[:4]
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError("its shape is none")
        storage = self._storage(stored)
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count and (last >= storage.numel() or count > storage.numel()):
            raise ValueError(f"its shape goes beyond its {storage.numel()} numbers")
        if not count:
            return torch.empty(size, dtype=storage.dtype)
        return storage.as_strided(size, stride, offset)

    def _storage(self, node: Any) -> Tensor:
        (pid,) = _args(node, "persistent") or (None,)
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage":
            raise ValueError(f"its numbers are {_described(node)}")
        _, kind, key, _, count = pid
        if not isinstance(kind, Inert) or not isinstance(key, str) or type(count) is not int:
            raise ValueError("its numbers are of no kind")
        module, _, name = kind.name.rpartition(".")
        if module != "torch" or name not in _DTYPES:
            raise ValueError(f"its numbers are {kind.name}")
        dtype = _DTYPES[name]
        if (key, dtype) not in self._storages:
            self._storages[key, dtype] = self._read(key, dtype, count)
        return self._storages[key, dtype]

    def _read(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        with zipfile.ZipFile(self._path) as archive:
            try:
                record = archive.getinfo(f"{self._prefix}/data/{key}")
            except KeyError:
                raise ValueError(f"its record {key} is missing") from None
            if record.file_size != count * dtype.itemsize:
                raise ValueError(f"its record {key} has {record.file_size} bytes for {count}")
            self._bytes += record.file_size
            if record.compress_type != zipfile.ZIP_STORED or (
                self._bytes > self._path.stat().st_size
            ):
                raise ValueError(f"its record {key} is larger than the file")
            data = bytearray(archive.read(record))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


def read_workspace(path: Path) -> dict[str, Any] | None:
    """Reads a file of the form {cfg, state_dicts}, as real-stanford/diffusion_policy saves it.

    Args:
        path: An archive that `torch.save` wrote, whose checksums were compared.

    Returns:
        `cfg`: its configuration in JSON's types; `state_dicts`: `Tensors` by name. None for any
        other file, and for one whose pickle is no pickle.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            prefix = names[0].removesuffix("/data.pkl")
            record = archive.getinfo(names[0])
            if record.file_size > PICKLE_BYTES or record.compress_type != zipfile.ZIP_STORED:
                return None
            order = f"{prefix}/byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                return None
            content = read_pickle(archive.read(record))
        if not isinstance(content, dict) or not isinstance(content.get("state_dicts"), dict):
            return None
        if "cfg" not in content:
            return None
        states = {
            name: Tensors(path, prefix, state)
            for name, state in content["state_dicts"].items()
            if isinstance(name, str)
            and isinstance(state, dict)
            and all(isinstance(key, str) for key in state)
        }
        return {"cfg": plain(content["cfg"]), "state_dicts": states}
    except Exception:  # noqa: BLE001  (whatever is wrong with it, it is no such file)
        return None


def read_pickle(data: bytes) -> Any:
    """Returns what a pickle would make, with an `Inert` wherever it would import or call.

    Raises:
        Exception: It is no pickle; of nearly any kind.
    """
    machine = _Machine()
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name == "STOP":
            return machine.stack.pop()
        machine.step(opcode.name, argument)
    raise ValueError("it has no end")


def plain(node: Any) -> Any:
    """Returns a configuration in JSON's types; OmegaConf's containers become dicts and lists.

    Anything else becomes the text `<name>`, which no setting is.

    Raises:
        ValueError: It is too deep or too large; one that holds itself is both.
    """
    left = _NODES

    def read(node: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if depth > _DEPTH or left < 0:
            raise ValueError("its configuration has no end")
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if isinstance(node, dict):
            return {str(key): read(value, depth + 1) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return [read(value, depth + 1) for value in node]
        if isinstance(node, Inert) and isinstance(node.state, dict):
            for name in ("_content", "_val"):
                if name in node.state:
                    return read(node.state[name], depth + 1)
        return f"<{_described(node)}>"

    return read(node, 0)


_CONSTANTS: Final[Mapping[str, Any]] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_GIVEN = re.compile(
    "(SHORT_)?(BIN)?(STRING|BYTES|UNICODE|BYTES8|UNICODE8)|(BIN)?(INT|FLOAT)|BININT[12]|LONG[14]?"
    "|BYTEARRAY8"
)
"""Instructions that put what they carry on the stack."""

_MARK = object()


class _Machine:
    """The stack and the memo of a pickle, and what each of its instructions does to them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:  # noqa: PLR0912, PLR0915
        stack = self.stack
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif _GIVEN.fullmatch(name):
            stack.append(argument)
        else:
            match name:
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    stack.append(_MARK)
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    self.marked()
                case "DUP":
                    stack.append(stack[-1])
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(self.memo[argument])
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    self.memo[argument] = stack[-1]
                case "MEMOIZE":
                    self.memo[len(self.memo)] = stack[-1]
                case "EMPTY_LIST" | "EMPTY_SET":
                    stack.append([])
                case "EMPTY_TUPLE":
                    stack.append(())
                case "EMPTY_DICT":
                    stack.append({})
                case "LIST" | "FROZENSET":
                    stack.append(self.marked())
                case "TUPLE":
                    stack.append(tuple(self.marked()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    stack.append(tuple(self.popped(int(name[-1]))))
                case "DICT":
                    pairs = self.marked()
                    stack.append({})
                    self.put(pairs)
                case "APPEND":
                    self.extend(self.popped(1))
                case "APPENDS" | "ADDITEMS":
                    self.extend(self.marked())
                case "SETITEM":
                    self.put(self.popped(2))
                case "SETITEMS":
                    self.put(self.marked())
                case "GLOBAL":
                    stack.append(Inert(str(argument).replace(" ", ".")))
                case "STACK_GLOBAL":
                    module, attribute = self.popped(2)
                    stack.append(Inert(f"{_text(module)}.{_text(attribute)}"))
                case "INST":
                    called = Inert(str(argument).replace(" ", "."))
                    stack.append(_called(called, tuple(self.marked())))
                case "OBJ":
                    called, *args = self.marked()
                    stack.append(_called(called, tuple(args)))
                case "REDUCE" | "NEWOBJ":
                    called, args = self.popped(2)
                    stack.append(_called(called, args))
                case "NEWOBJ_EX":
                    called, args, keywords = self.popped(3)
                    stack.append(
                        _called(called, (args, keywords))
                    )  # not a copy of args, which may be long
                case "BUILD":
                    (state,) = self.popped(1)
                    if isinstance(stack[-1], Inert):
                        stack[-1].state = state
                case "PERSID":
                    stack.append(Inert("persistent", (argument,)))
                case "BINPERSID":
                    stack.append(Inert("persistent", tuple(self.popped(1))))
                case _:  # the registry of extensions, buffers outside the file
                    raise ValueError(f"its pickle has the instruction {name}")

    def popped(self, count: int) -> list[Any]:
        """Takes so many objects from the stack; a mark is none."""
        taken = [self.stack.pop() for _ in range(count)][::-1]
        if any(each is _MARK for each in taken):
            raise ValueError("its pickle takes a mark for an object")
        return taken

    def marked(self) -> list[Any]:
        """Takes what lies above the last mark, and the mark."""
        taken = []
        while (top := self.stack.pop()) is not _MARK:
            taken.append(top)
        return taken[::-1]

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        (target.items if isinstance(target, Inert) else target).extend(values)

    def put(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if isinstance(target, Inert):
                target.items.append((key, value))
            elif isinstance(target, dict) and isinstance(key, str | int | float | bytes | None):
                target[key] = value
            else:  # a deep tuple's hash would exhaust the stack of the interpreter
                raise ValueError(f"its pickle has a {type(key)} for a key")  # noqa: TRY004


def _called(called: Any, args: Any) -> Any:
    """Returns what a call would have made: an `Inert`, or the one container that states are in."""
    if not isinstance(args, tuple):
        raise ValueError("its pickle calls something with no arguments at all")  # noqa: TRY004
    name = called.name if isinstance(called, Inert) and called.args is None else "call"
    if name == "collections.OrderedDict" and not args:
        return {}
    return Inert(name, args)


def _args(node: Any, *names: str) -> tuple[Any, ...]:
    """Returns what a function of one of these names was given; nothing where it is no such call."""
    return (node.args or ()) if isinstance(node, Inert) and node.name in names else ()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("its pickle imports what has no name")  # noqa: TRY004
    return value


def _described(node: Any) -> str:
    return node.name[:80] if isinstance(node, Inert) else type(node).__name__
