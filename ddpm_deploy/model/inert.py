"""Reading pickles that would run code, without running any.

Robot policies are saved together with the objects that configured their training, by `dill`. To
unpickle such a file is to run it. Here a pickle is read as what it is, a program for a stack of
objects, by a machine of our own: it imports nothing and calls nothing. What the program would have
called becomes an `Inert`, which only remembers its name and what it was given; tensors are made
afterwards, by our own code, from the numbers of those that `torch.save` writes.

Files of weights with NumPy's numbers beside them are read so, too: NumPy's own unpickling takes
layouts of memory from the file, and writes wherever they say.

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

PICKLE_BYTES, _STEPS = 2**22, 2**20
"""Longest pickle that is read, and how many instructions of it.

A policy's has a few hundred thousand bytes beside its tensors, and a quarter as many instructions;
each of these can make an object of 200 bytes.
"""

_STATES, _DIMS, _LARGEST = 100, 8, 2**48
"""State dicts in a workspace, dimensions of a tensor, and numbers that sizes and steps stay below.
"""

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
_TENSOR = "torch._utils._rebuild_tensor_v2"
_PARAMETERS = frozenset(
    {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
)
_PLAIN = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|argparse\.Namespace|numpy\.dtypes\.\w+|"
    r"pathlib\.(Pure)?(Posix|Windows)?Path|numpy\.(dtype|ndarray|bool_?|u?int\d+|float\d+)|"
    r"numpy\._?core\.multiarray\.(scalar|_reconstruct)|torch\.(Size|device|[a-z]+\d+|bool|\w+Storage)"
)
"""What stands beside weights and says nothing of them: numbers, settings and paths."""


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
        self._archive, self._entries = _Archive(path, prefix), entries

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
            return self._archive.tensor(self._entries[name])
        except _WRONG as error:
            raise ValueError(f"its tensor {name} cannot be read: {error}") from error


_WRONG = (ValueError, TypeError, OverflowError, RuntimeError, zipfile.BadZipFile)
"""What comes of a pickle that says of a tensor what is none."""


class _Archive:
    """The numbers in an archive, each storage read once."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix = path, prefix
        self._file: zipfile.ZipFile | None = None
        self._storages: dict[tuple[str, torch.dtype], Tensor] = {}
        self._bytes = 0

    def tensor(self, node: Any) -> Tensor:
        """Makes the tensor that a pickle's calls describe.

        Raises:
            Exception: They describe none; one of `_WRONG`.
        """
        if parameter := _args(node, *_PARAMETERS):
            node = parameter[0]
        args = _args(node, _TENSOR)
        if not 4 <= len(args) <= 7 or any(args[6:]):  # the last is of views of another kind
            raise ValueError(f"it is {_described(node)}")
        stored, offset, size, stride = args[:4]
        if len(size) != len(stride) or len(size) > _DIMS:
            raise ValueError("its shape is none")
        numbers = (offset, *size, *stride)
        if not all(type(n) is int and 0 <= n < _LARGEST for n in numbers):
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
        if not 0 <= count < _LARGEST:
            raise ValueError("there is no such count of numbers")
        module, _, name = kind.name.rpartition(".")
        if module != "torch" or name not in _DTYPES:
            raise ValueError(f"its numbers are {kind.name}")
        dtype = _DTYPES[name]
        if (key, dtype) not in self._storages:
            self._storages[key, dtype] = self._read(key, dtype, count)
        return self._storages[key, dtype]

    def _read(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        # Kept open: its table of records is as long as there are tensors.
        self._file = self._file or zipfile.ZipFile(self._path)
        try:
            record = self._file.getinfo(f"{self._prefix}/data/{key}")
        except KeyError:
            raise ValueError(f"its record {key} is missing") from None
        if record.file_size != count * dtype.itemsize:
            raise ValueError(f"its record {key} has {record.file_size} bytes for {count}")
        self._bytes += record.file_size
        if record.compress_type != zipfile.ZIP_STORED or self._bytes > self._path.stat().st_size:
            raise ValueError(f"its record {key} is larger than the file")
        data = bytearray(self._file.read(record))
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
        machine, prefix = _run(path)
        content = machine.result
        if not isinstance(content, dict) or not isinstance(content.get("state_dicts"), dict):
            return None
        if "cfg" not in content or len(content["state_dicts"]) > _STATES:
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


def read_beside(path: Path) -> Any:
    """Reads a file of tensors with NumPy's numbers, arguments or paths beside them.

    Args:
        path: An archive that `torch.save` wrote, whose checksums were compared.

    Returns:
        What it holds, its tensors read, and an `Inert` in place of those numbers and arguments.
        None for a file that asks for anything else, and for one whose pickle is no pickle.

    Raises:
        ValueError: One of its tensors is none.
    """
    try:
        machine, prefix = _run(path)
    except Exception:  # noqa: BLE001  (whatever is wrong with it, it is no such file)
        return None
    known = {_TENSOR, *_PARAMETERS}
    if any(name not in known and not _PLAIN.fullmatch(name) for name in machine.names):
        return None
    if not isinstance(machine.result, dict | list):
        return None
    try:
        return _with_tensors(machine.result, _Archive(path, prefix))
    except _WRONG as error:
        raise ValueError(f"one of its tensors cannot be read: {error}") from error


def _with_tensors(content: Any, archive: _Archive) -> Any:
    """Puts tensors in the place of the calls that make them, wherever dicts and lists hold one."""
    made: dict[int, Any] = {}  # with the call itself, so that no other takes its identity

    def value_of(node: Any) -> Any:
        if not isinstance(node, Inert) or node.name not in {_TENSOR, *_PARAMETERS}:
            return node
        if id(node) not in made:
            made[id(node)] = node, archive.tensor(node)
        return made[id(node)][1]

    left, seen = [content], set[int]()
    while left:
        one = left.pop()
        if not isinstance(one, dict | list) or id(one) in seen:
            continue
        seen.add(id(one))
        for key, value in list(one.items() if isinstance(one, dict) else enumerate(one)):
            one[key] = value_of(value)
            left.append(value)
    return content


def _run(path: Path) -> tuple[_Machine, str]:
    """Runs an archive's pickle; returns the machine after it, and what its records begin with.

    Raises:
        Exception: It is no archive of `torch.save`; of nearly any kind.
    """
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        prefix = name.removesuffix("/data.pkl")
        record = archive.getinfo(name)
        if record.file_size > PICKLE_BYTES or record.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its pickle is too long")
        order = f"{prefix}/byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise ValueError("its numbers are of the other byte order")
        data = archive.read(record)
    machine = _Machine()
    machine.run(data)
    return machine, prefix


def read_pickle(data: bytes) -> Any:
    """Returns what a pickle would make, with an `Inert` wherever it would import or call.

    Raises:
        Exception: It is no pickle; of nearly any kind.
    """
    machine = _Machine()
    machine.run(data)
    return machine.result


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
            if any(isinstance(key, bytes) for key in node):  # whose text is four times as long
                raise ValueError("its configuration has bytes for a name")
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

_MARK, _NAME = object(), 1000


class _Machine:
    """The stack and the memo of a pickle, and what each of its instructions does to them.

    Attributes:
        names: What it would have imported.
        result: What it leaves at its end.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.names: set[str] = set()
        self.result: Any = None

    def run(self, data: bytes) -> None:
        """Goes through a pickle to its end.

        Raises:
            Exception: It has none, or is no pickle; of nearly any kind.
        """
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name == "STOP":
                self.result = self.stack.pop()
                return
            if count >= _STEPS:
                break
            self.step(opcode.name, argument)
        raise ValueError("it has no end")

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
                    stack.append(self.named(str(argument).replace(" ", ".")))
                case "STACK_GLOBAL":
                    module, attribute = self.popped(2)
                    stack.append(self.named(f"{_text(module)}.{_text(attribute)}"))
                case "INST":
                    called = self.named(str(argument).replace(" ", "."))
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

    def named(self, name: str) -> Inert:
        """Returns what stands for an import."""
        if len(name) > _NAME:  # two texts that are given once can be joined a million times
            raise ValueError("its pickle imports what has too long a name")
        self.names.add(name)
        return Inert(name)

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
            elif isinstance(target, dict) and isinstance(key, str | float | bytes | None):
                target[key] = value
            elif isinstance(target, dict) and isinstance(key, int) and abs(key) < _LARGEST:
                target[key] = value  # of larger ones, any number can have the same hash
            else:  # a deep tuple's hash would exhaust the stack of the interpreter
                raise ValueError(f"its pickle has a {type(key)} for a key")


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
