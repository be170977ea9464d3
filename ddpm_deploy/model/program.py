"""Programs of torch.export (`.pt2`), read without running what else such a file can do.

`torch.export.load` is no reader of data: of torch 2.13 it unpickles what says `use_pickle`, opaque
constants, and example inputs that the restricted reader refuses; gives shape expressions to
`sympify`, which evaluates them as Python; compiles `guards_code`; takes any dotted name below
`torch` (`torch.os.system`) as an operator; imports modules that a tree of arguments names; and
opens shared libraries. So a file's records are checked first, and what the loader sees is a new
archive of those that hold tensors and a graph of ATen operators, and nothing else.
"""

from __future__ import annotations

import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model.blame import said
from ddpm_deploy.model.foreign_files import is_zip
from ddpm_deploy.model.spec_toml import PROGRAM
from ddpm_deploy.spec import ModelSpec

_RECORDS = re.compile(
    r"archive_format|archive_version|byteorder|version|\.data/[\w.]+|models/model\.json|"
    r"data/weights/(weight_\d+|model_weights_config\.json)|"
    r"data/constants/(tensor_\d+|model_constants_config\.json)|"
    r"data/sample_inputs/model\.pt|\.format/\w+"
)
"""The records of an archive that is a program and nothing else."""

_OPERATORS = frozenset(
    {"add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "eq", "ne", "lt"}
    | {"le", "gt", "ge", "and_", "or_", "not_", "getitem"}
)
_MATH = frozenset({"ceil", "floor", "trunc", "sqrt"})
_SYMBOLIC = frozenset({"sym_int", "sym_float", "sym_not", "sym_max", "sym_min", "sym_sum"})
_HIGHER = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})
_FILES = frozenset({"from_file", "save"})
"""ATen operators that reach for files."""

_SYMBOL = re.compile(r"Symbol\('[su]\d+'(, \w+=(True|False))*\)", re.ASCII)
_WORDS = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_EXPRESSION = re.compile(r"[\w+\-*/(), =<>]*", re.ASCII)  # others' letters can spell names, too
_ENDLESS = re.compile(r"\*\s*\*|<\s*<|>\s*>|\d{11}", re.ASCII)
"""Powers, shifts and long numbers, whose values can be larger than any memory."""

_LETTERS, _ATOMS = 1000, 16
"""Longest expression, and how many symbols and numbers are in it: a product of sums is expanded."""
_FUNCTIONS = frozenset(
    {"Symbol", "Integer", "Add", "Mul", "Max", "Min", "Mod", "Eq", "Ne", "Lt", "Le", "Gt"}
    | {"Ge", "Rational", "FloorDiv", "PythonMod", "ModularIndexing", "CleanDiv", "CeilDiv"}
    | {"CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "IntTrueDiv", "FloatTrueDiv"}
    | {"ToFloat", "Where", "Identity", "true", "false", "True", "False"}
    | {"Equality", "Unequality", "StrictGreaterThan", "StrictLessThan", "GreaterThan", "LessThan"}
    | {"And", "Or", "Not", "evaluate", "integer", "positive", "nonnegative"}
)
_FREE = 2**31
_TREES = frozenset({None, "builtins.tuple", "builtins.list", "builtins.dict"})


def is_program(path: Path) -> bool:
    """Tells whether a file is a program of torch.export, by its records."""
    if not path.is_file() or not is_zip(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # noqa: BLE001  (whoever opens it says what is wrong)
        return False
    return any(
        name.endswith(("/archive_format", "/models/model.json"))
        or name == "serialized_exported_program.json"
        for name in names
    )


def load_program(path: Path, spec: ModelSpec | None) -> tuple[nn.Module, ModelSpec]:
    """Loads a program of torch.export.

    Args:
        path: The file.
        spec: What its network is.

    Returns:
        The program as a module called with (x, t, *conditions), t as the program takes it; and
        the spec.

    Raises:
        CheckpointError: It is damaged, holds more than tensors and ATen operators, or does not
            take samples of the spec in batches of any size; or nothing says what it is.
    """
    if spec is None:
        raise CheckpointError(
            f"{path} is a program of torch.export, which says nothing of its schedule and what it "
            "predicts.",
            hint="Write them into a file, and add: --spec spec.toml (docs/own-networks.md)",
        )
    records = _records(path)
    _check_graph(path, records)
    program = _loaded(path, records)
    _check_inputs(path, program, spec)
    try:
        module = program.module(check_guards=False)
    except Exception as error:
        raise _unread(path, error) from error
    if wrong := next((p.device for p in module.parameters() if p.device.type != "cpu"), None):
        raise _device(path, str(wrong))
    network = {"timestep": spec.network.get("timestep", "index")}
    return module, spec.with_changes(family=PROGRAM, network=network)


def _records(path: Path) -> dict[str, bytes]:
    """Returns the records of an archive by their names without its folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            if any(info.filename == "serialized_exported_program.json" for info in infos):
                raise _older(path)
            names = [info.filename.partition("/")[2] for info in infos]
            for name in names:
                if name.startswith("data/aotinductor"):
                    raise CheckpointError(
                        f"{path} is a package of AOTInductor: machine code, not a graph.",
                        hint="Save the program that it was compiled from: torch.export.save("
                        "program, 'program.pt2')",
                    )
                if not _RECORDS.fullmatch(name) and not name.startswith("extra/"):
                    raise _refused(path, f"the record {name}")
            if len(set(names)) < len(names):
                raise _refused(path, "two records of one name")
            if sum(info.file_size for info in infos) > 2 * path.stat().st_size + 65536:
                raise _refused(path, "records that were compressed")
            return {
                name: archive.read(info)
                for name, info in zip(names, infos, strict=True)
                if not name.startswith("extra/")
            }
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises nearly anything on a damaged archive
        raise CheckpointError(
            f"{path} is damaged: {error}.",
            hint=f"Copy it again from where it was made, and compare: sha256sum {path}",
        ) from error


def _check_graph(path: Path, records: dict[str, bytes]) -> None:
    """Checks all that `torch.export.load` would evaluate; takes away what it need not see."""
    try:
        program = json.loads(records["models/model.json"])
        for part, prefix in (("weights", "weight_"), ("constants", "tensor_")):
            config = json.loads(records[f"data/{part}/model_{part}_config.json"])["config"]
            for name, payload in config.items():
                if payload["use_pickle"] or not payload["path_name"].startswith(prefix):
                    raise _refused(path, f"a pickle in place of {name}")
                meta = payload["tensor_meta"]
                if meta["device"]["type"] != "cpu":
                    raise _device(path, meta["device"]["type"])
                record = records[f"data/{part}/{payload['path_name']}"]
                if not record and all(side.get("as_int") for side in meta["sizes"]):
                    raise CheckpointError(  # which the loader would fill with zeros
                        f"{path} is damaged: the record of {name} is empty.",
                        hint="Save it again: torch.export.save(program, 'program.pt2')",
                    )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.load(io.BytesIO(records["data/sample_inputs/model.pt"]), weights_only=True)
        for key, value in _walk(program):
            _check_entry(path, key, value)
        program["guards_code"] = []
        records["models/model.json"] = json.dumps(program).encode()
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is no program that this release reads: {said(error)}",
            hint="Save it again: torch.export.save(program, 'program.pt2')",
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # torch.load raises nearly anything
        raise _refused(path, "a pickle in its example inputs that asks for code") from error


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """Yields every key of nested JSON with its value; a node's metadata is emptied."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, list):
            left += one
        elif isinstance(one, dict):
            if "target" in one and isinstance(one.get("metadata"), dict):
                one["metadata"] = {}
            yield from one.items()
            left += one.values()


def _check_entry(path: Path, key: str, value: Any) -> None:
    match key:
        case "target" | "as_operator" if isinstance(value, str):
            if not _allowed(value):
                raise _refused(path, f"a call of {value}")
        case "as_custom_obj" if value is not None:
            raise _refused(path, "an object of a class of its own")
        case "expr_str" if isinstance(value, str):
            if len(value) > _LETTERS:
                raise _refused(path, f"an expression of {len(value)} letters")
            bare = _SYMBOL.sub("0", value)
            if _ENDLESS.search(bare) or len(re.findall(r"\d+", bare)) > _ATOMS:
                raise _refused(path, f"the expression {value[:80]}")
            if not _EXPRESSION.fullmatch(bare) or not set(_WORDS.findall(bare)) <= _FUNCTIONS | {
                name for name in _WORDS.findall(bare) if re.fullmatch(r"[su]\d+", name)
            }:
                raise _refused(path, f"the expression {value[:80]}")
        case "in_spec" | "out_spec" if isinstance(value, str):
            for name, inner in _walk(json.loads(value)):
                if name == "type" and inner not in _TREES:
                    raise _refused(path, f"an argument of the type {inner}")


def _allowed(target: str) -> bool:
    """Tells whether an operator's name is one of ATen's, or arithmetic of shapes."""
    match target.split("."):
        case ["torch", "ops", "aten" | "prims" as space, name, overload]:
            packet: Any = getattr(getattr(torch.ops, space), name, None)
            known = isinstance(packet, torch._ops.OpOverloadPacket) and name not in _FILES
            return known and overload in cast("Any", packet).overloads()
        case ["torch", "ops", "higher_order", name]:
            return name in _HIGHER
        case ["_operator", name]:
            return name in _OPERATORS
        case ["math", name]:
            return name in _MATH
        case parts:
            return len(parts) == 2 and parts[0] == "torch" and parts[1] in _SYMBOLIC


def _loaded(path: Path, records: Mapping[str, bytes]) -> Any:
    """Loads the program from an archive of the checked records alone."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"program/{name}", content)
    whole.seek(0)
    quiet = logging.getLogger("torch")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(whole)
    except Exception as error:  # it raises nearly anything on what it does not know
        raise _unread(path, error) from error
    finally:
        quiet.setLevel(level)


def _check_inputs(path: Path, program: Any, spec: ModelSpec) -> None:
    """Compares the program's inputs with the spec's, and wants their batch to be free."""
    wanted = {"x": spec.sample_shape, "t": (), **{c.name: c.shape for c in spec.conditions}}
    names = list(program.graph_signature.user_inputs)
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    shapes = [
        getattr(nodes[n].meta.get("val"), "shape", None) if n in nodes else None for n in names
    ]
    shown = ", ".join("a constant" if s is None else _shape(s) for s in shapes)
    if len(shapes) != len(wanted) or None in shapes:
        raise CheckpointError(
            f"{path} takes {len(shapes)} inputs ({shown}); the spec has {', '.join(wanted)}.",
            hint="Export the module as it is called here: torch.export.export(model, "
            f"({', '.join(wanted)},), ...)",
        )
    batch = 'batch = torch.export.Dim("batch")'
    free = ", ".join("{0: batch}" for _ in wanted)
    line = f"{batch}; torch.export.export(model, ({', '.join(wanted)}), dynamic_shapes=({free}))"
    for (name, sides), shape in zip(wanted.items(), shapes, strict=True):
        if shape is None or tuple(map(_side, shape[1:])) != tuple(map(str, sides)):
            raise CheckpointError(
                f"{path} takes {name} of the shape {_shape(shape or ())}; the spec says "
                f"{_shape(('N', *sides))}.",
                hint="Correct sample_shape or [[conditions]] in spec.toml.",
            )
        if isinstance(shape[0], int):
            raise CheckpointError(
                f"{path} takes {name} in batches of {shape[0]} alone; its batch must be free.",
                hint=f"Export it so: {line}",
            )
        bounds = program.range_constraints.get(shape[0].node.expr)
        if bounds is not None and (bounds.lower > 1 or bounds.upper < _FREE):
            raise CheckpointError(
                f"{path} takes batches of {bounds.lower} to {bounds.upper}; its batch must be "
                "free.",
                hint=f"Give Dim neither min nor max: {line}",
            )


def _shape(sizes: Iterable[Any]) -> str:
    return f"({', '.join(map(_side, sizes))})"


def _side(size: Any) -> str:
    return str(size) if isinstance(size, int) else "N"


def _refused(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a torch.export program with {what}. torch.export.load would run what such a "
        "file says, so ddpm-deploy opens programs of tensors and ATen operators alone.",
        hint="Export the module's state dict and its code instead: ddpm-deploy export ckpt.pt "
        "--model package.module:factory --spec spec.toml",
    )


def _device(path: Path, device: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a program whose tensors lie on {device}.",
        hint="Export it on the CPU: torch.export.export(model.cpu(), ...)",
    )


def _older(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is a program that PyTorch 2.7 or older saved; its form is out of use.",
        hint="Save it with a later one: torch.export.save(program, 'program.pt2')",
    )


def _unread(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} is a torch.export program that torch {torch.__version__} cannot load: "
        f"{said(error)}",
        hint="Save it again with this version: torch.export.save(program, 'program.pt2')",
    )
