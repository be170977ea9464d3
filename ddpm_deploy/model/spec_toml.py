"""spec.toml: what a user's own network is, in the user's words."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, get_args

import numpy as np

from ddpm_deploy.errors import SpecError
from ddpm_deploy.model.facts import Fact
from ddpm_deploy.sampling import (
    SAMPLERS,
    FinalSigma,
    FirstOrderEnd,
    Prediction,
    Sampling,
    Spacing,
    Variance,
)
from ddpm_deploy.schedule import SCHEDULES, Schedule, named_schedule
from ddpm_deploy.spec import Condition, Meaning, ModelSpec, Restore, Rounding

CONVENTIONS = {
    "index": "the index, int64",
    "float": "the index, float32",
    "fraction": "t / T, float32",
}
"""What a module takes for t, where the graph takes the index 0..T-1."""

OWN = "own"
"""Family of networks that a user's code makes."""

PROGRAM = "torch.export"
"""Family of programs of torch.export."""

EXAMPLE = """sample_shape = [3, 32, 32]
[schedule]
name = "linear"
T = 1000"""
"""The least that a spec.toml says."""


@dataclass(frozen=True, kw_only=True)
class Described:
    """What a spec.toml says.

    Attributes:
        path: The file.
        spec: What the network is; `spec.network` has its `arguments` and its `timestep`.
        facts: The same as a table, with what was left out as assumed.
    """

    path: Path
    spec: ModelSpec
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class _Kind:
    """What a value may be: a test, in words, and an example of it."""

    fits: Callable[[Any], bool]
    words: str
    example: str


Keys: TypeAlias = Mapping[str, _Kind]


def read_spec_toml(path: Path) -> Described:
    """Reads a spec.toml.

    Args:
        path: The file.

    Raises:
        SpecError: It is missing or no TOML; or a key or a value in it is none that there is.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SpecError(
            f"There is no file {path}.",
            hint=f"Write what no checkpoint says; the least is: {' | '.join(EXAMPLE.splitlines())}",
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"{path} cannot be read: {error}.", hint="Give a text file: --spec spec.toml"
        ) from error
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib  # type: ignore[no-redef, import-not-found, unused-ignore]
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one
        raise SpecError(
            f"{path} is no TOML: {str(error) or 'it is nested too deep'}.",
            hint='Texts stand in quotes, lists in brackets: prediction = "epsilon"',
        ) from error
    return _Reader(path, text).described(data)


class _Reader:
    """Reads the tables, and says of a wrong key or value on which line it stands."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text = path, text

    def described(self, data: Mapping[str, Any]) -> Described:
        self._known(data, {*_TOP, "schedule", "sampling", "conditions", "model", "restore"}, "")
        for name, kind in {
            "schedule": dict,
            "sampling": dict,
            "model": dict,
            "restore": dict,
        }.items():
            if name in data and not isinstance(data[name], kind):
                self._wrong("", name, data[name], "a table", f"[{name}]")
        top = self._values(data, _TOP, "")
        if "sample_shape" not in top:
            self._lacks("sample_shape", "sample_shape = [3, 32, 32]", "channels, height, width")
        shape = tuple(top.pop("sample_shape"))
        schedule = self._schedule(data.get("schedule"))
        if "clip" in top and top["clip"] is False:
            top["clip"] = None
        timestep = top.pop("timestep", "index")
        if "value_range" in top:
            low, high = top["value_range"]
            if not low < high:
                self._wrong(
                    "", "value_range", top["value_range"], "darkest, then brightest", "[-1.0, 1.0]"
                )
            top["value_range"] = (float(low), float(high))
        if top.get("first_timestep", 0) >= schedule.T:
            self._wrong(
                "", "first_timestep", top["first_timestep"], f"at most T-1, {schedule.T - 1}", "0"
            )
        spec = ModelSpec(
            sample_shape=shape,
            schedule=schedule,
            sampling=self._sampling(data.get("sampling", {}), schedule.T),
            conditions=self._conditions(data.get("conditions", []), shape),
            restore=self._restore(data.get("restore"), shape),
            family=OWN,
            network={"timestep": timestep, "arguments": dict(data.get("model", {}))},
            **top,
        )
        self._arguments(data.get("model", {}))
        try:
            spec = spec.with_changes()
            spec.table()
        except ValueError as error:
            raise SpecError(
                f"{self.path} says what cannot be: {error}.", hint="See docs/own-networks.md"
            ) from error
        return Described(path=self.path, spec=spec, facts=tuple(_facts(spec, data)))

    def _schedule(self, table: Mapping[str, Any] | None) -> Schedule:
        if table is None:
            self._lacks(
                "[schedule]", 'name = "linear" and T = 1000 below [schedule]', "of training"
            )
        if "betas" in table:
            self._known(table, {"betas"}, "schedule")
            betas = table["betas"]
            if not (isinstance(betas, list) and betas and all(_number(b) for b in betas)):
                self._wrong("schedule", "betas", betas, "a list of numbers", "[0.0001, 0.0002]")
            try:
                return Schedule(np.array(betas, dtype=np.float64))
            except ValueError as error:
                self._bad("schedule", "betas", f"{error}", "betas, each above 0 and at most 1")
        if "name" not in table:
            self._lacks("schedule.name", 'name = "linear" below [schedule]', "or betas = [...]")
        name = table["name"]
        if name not in SCHEDULES:
            self._wrong("schedule", "name", name, f"one of {', '.join(SCHEDULES)}", '"linear"')
        if "T" not in table:
            self._lacks("schedule.T", "T = 1000 below [schedule]", "the steps of training")
        parameters = [p for p in inspect.signature(SCHEDULES[name]).parameters if p != "T"]
        self._known(table, {"name", "T", *parameters}, "schedule")
        self._values(table, {"T": _WHOLE, **dict.fromkeys(parameters, _NUMBER)}, "schedule")
        given = {p: float(table[p]) for p in parameters if p in table}
        try:
            with np.errstate(all="ignore"):
                return named_schedule(name, table["T"], **given)
        except (ValueError, ArithmeticError, MemoryError) as error:
            self._bad("schedule", "name", f"gives no schedule: {error}", "other parameters")

    def _sampling(self, table: Mapping[str, Any], T: int) -> Sampling:  # noqa: N803
        self._known(table, set(_SAMPLING), "sampling")
        values = self._values(table, _SAMPLING, "sampling")
        steps = values.get("steps")
        if isinstance(steps, list):
            values["steps"] = tuple(steps)
            if not all(0 <= t < T for t in steps):
                self._wrong("sampling", "steps", steps, f"timesteps of 0..{T - 1}", "[9, 5, 0]")
            if len(set(steps)) < len(steps):
                self._wrong("sampling", "steps", steps, "timesteps, each once", "[9, 5, 0]")
        elif steps is not None and steps > T:
            self._wrong("sampling", "steps", steps, f"at most T, {T}", str(T))
        return Sampling(**values)

    def _conditions(self, given: Any, shape: tuple[int, ...]) -> tuple[Condition, ...]:
        if not isinstance(given, list) or not all(isinstance(each, dict) for each in given):
            self._wrong("", "conditions", given, "tables, one an input", "[[conditions]]")
        made: list[Condition] = []
        for number, table in enumerate(given):
            where = f"conditions[{number}]"
            for key in ("name", "meaning"):
                if key not in table:
                    self._lacks(f"{where}.{key}", f"{key} = {_CONDITION[key].example}", "")
            self._known(table, set(_CONDITION), where)
            values = self._values(table, _CONDITION, where)
            if values["name"] in {"x", "t", *(c.name for c in made)}:
                self._wrong(where, "name", values["name"], "a name of its own, not x or t", '"y"')
            meaning = values["meaning"]
            mine = {
                "class_label": {"classes", "null", "names"},
                "observation": {"shape", "dtype"},
                "self_condition": set[str](),
            }[meaning]
            self._known(table, {"name", "meaning"} | mine, where)
            if meaning == "class_label" and "classes" not in values:
                self._lacks(f"{where}.classes", "classes = 10", "the number of labels")
            names = values.get("names", ())
            if names and len(names) != values["classes"]:
                self._wrong(
                    where,
                    "names",
                    names,
                    f"{values['classes']} texts, as classes says",
                    '["cat", "dog"]',
                )
            if meaning == "observation" and "shape" not in values:
                self._lacks(f"{where}.shape", "shape = [20]", "of one sample")
            label = meaning == "class_label"
            default = shape if meaning == "self_condition" else ()
            made.append(
                Condition(
                    name=values["name"],
                    meaning=meaning,
                    dtype="int64" if label else values.get("dtype", "float32"),
                    shape=tuple(values.get("shape", default)),
                    classes=values.get("classes"),
                    null=values.get("null"),
                    names=tuple(names),
                )
            )
        if len([c for c in made if c.meaning == "class_label"]) > 1:
            self._bad(
                "", "conditions", "has two class_labels", "one; give the other as observation"
            )
        if len([c for c in made if c.meaning == "self_condition"]) > 1:
            self._bad("", "conditions", "has two self_conditions", "one")
        return tuple(made)

    def _restore(self, table: Mapping[str, Any] | None, shape: tuple[int, ...]) -> Restore | None:
        if table is None:
            return None
        self._known(table, set(_RESTORE), "restore")
        values = self._values(table, _RESTORE, "restore")
        for key in ("scale", "offset"):
            if key not in values:
                self._lacks(f"restore.{key}", f"{key} = [1.0] below [restore]", "")
        axis = values.get("axis", -1)
        if not -len(shape) <= axis < len(shape):
            self._wrong("restore", "axis", axis, f"an axis of sample_shape {list(shape)}", "-1")
        for key in ("scale", "offset"):
            if len(values[key]) not in {1, shape[axis]} or len(values[key]) != len(values["scale"]):
                self._wrong(
                    "restore",
                    key,
                    values[key],
                    f"1 or {shape[axis]} numbers, as many in scale and offset",
                    "[1.0]",
                )
        scale, offset = (tuple(map(float, values[key])) for key in ("scale", "offset"))
        return Restore(scale=scale, offset=offset, axis=axis)

    def _arguments(self, table: Mapping[str, Any]) -> None:
        for name, value in table.items():
            if not name.isidentifier():
                self._bad("model", name, "is no name of an argument", "base = 64")
            if not _plain(value):
                self._wrong(
                    "model",
                    name,
                    value,
                    "a number, a text, true, false, a list or a table of them",
                    "64",
                )

    def _values(self, table: Mapping[str, Any], kinds: Keys, where: str) -> dict[str, Any]:
        """Returns the values of a table's known keys, checked."""
        values = {}
        for key, kind in kinds.items():
            if key in table:
                if not kind.fits(table[key]):
                    self._wrong(where, key, table[key], kind.words, kind.example)
                values[key] = table[key]
        return values

    def _known(self, table: Mapping[str, Any], names: set[str], where: str) -> None:
        for key in table:
            if key in names:
                continue
            near = difflib.get_close_matches(key, names, n=1)
            there = ", ".join(sorted(names))
            place = f" in [{where.partition('[')[0]}]" if where else ""
            raise SpecError(
                f"{self._at(where, key)} is no key{place}; there are {there}.",
                hint=f"Did you mean {near[0]}?" if near else "Leave it out, or correct its name.",
            )

    def _lacks(self, key: str, write: str, what: str) -> NoReturn:
        raise SpecError(
            f"{self.path} does not say {key}{f' ({what})' if what else ''}, and nothing else does.",
            hint=f"Write: {write}",
        )

    def _wrong(self, where: str, key: str, value: Any, words: str, example: str) -> NoReturn:
        shown = _toml(value)
        write = example if example.startswith("[[") or words == "a table" else f"{key} = {example}"
        raise SpecError(
            f"{self._at(where, key)} is {shown}; it must be {words}.", hint=f"Write: {write}"
        )

    def _bad(self, where: str, key: str, what: str, write: str) -> NoReturn:
        raise SpecError(f"{self._at(where, key)}: {what}.", hint=f"Write {write}.")

    def _at(self, where: str, key: str) -> str:
        line = _line_of(self.text, where, key)
        return f"{self.path}{f', line {line}' if line else ''}: {f'{where}.' if where else ''}{key}"


def _line_of(text: str, where: str, key: str) -> int:
    """Returns the line that a key stands on, from 1; 0 where it stands in no line of its own."""
    section, number = where.partition("[")[::2]
    wanted = int(number.rstrip("]")) if number else 0
    here, seen = "", -1
    for count, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if header := re.match(r"\[+\s*([\w.]+)\s*\]+", stripped):
            here = header[1]
            seen += here == section
            if not where and here == key:
                return count
        elif here != section or (number and seen != wanted):
            continue
        elif re.match(rf"[\"']?{re.escape(key)}[\"']?\s*=", stripped):
            return count
    return 0


def _facts(spec: ModelSpec, data: Mapping[str, Any]) -> Iterable[Fact]:
    """Yields what the file says, and what it leaves out."""

    def fact(name: str, value: Any, key: str) -> Fact:
        source: Any = "config" if key in data else "assumed"
        return Fact(name=name, value=value, source=source, option=f"{key} in spec.toml")

    yield fact("sample shape", "x".join(map(str, spec.sample_shape)), "sample_shape")
    yield fact("schedule", str(spec.schedule), "schedule")
    yield fact("t is given as", CONVENTIONS[spec.network["timestep"]], "timestep")
    yield fact("prediction", spec.prediction, "prediction")
    yield fact("variance", spec.variance, "variance")
    yield fact("clip of x_0", spec.clip, "clip")
    yield fact("value range", list(spec.value_range), "value_range")
    yield fact("rounding", spec.rounding, "rounding")
    yield fact("sampler", spec.sampler, "sampler")
    if spec.sampling != Sampling():
        own = Sampling()
        told = {f.name: getattr(spec.sampling, f.name) for f in fields(Sampling)}
        changed = (f"{k} {v}" for k, v in told.items() if v != getattr(own, k))
        yield fact("its loop", ", ".join(changed), "sampling")
    for condition in spec.conditions:
        size = condition.classes or "x".join(map(str, condition.shape))
        yield fact(f"condition {condition.name}", f"{condition.meaning} {size}", "conditions")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    shown = f'"{value}"' if isinstance(value, str) else str(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}…"


def _whole(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(fits(each) for each in value)


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(_plain(each) for each in value)
    if isinstance(value, dict):
        return all(_plain(each) for each in value.values())
    return isinstance(value, bool | int | str) or _number(value)


def _among(names: Sequence[str]) -> _Kind:
    return _Kind(lambda v: v in names, f"one of {', '.join(names)}", f'"{names[0]}"')


def _name(value: Any) -> bool:
    return isinstance(value, str) and value.isidentifier()


_WHOLE = _Kind(_whole, "a whole number from 1 on", "1000")
_COUNT = _Kind(lambda v: _whole(v, 0), "a whole number from 0 on", "0")
_NUMBER = _Kind(_number, "a number", "0.02")
_SHAPE = _Kind(lambda v: _list(v, _whole), "a list of sizes without the batch", "[3, 32, 32]")
_FLAG = _Kind(lambda v: isinstance(v, bool), "true or false", "true")
_NUMBERS = _Kind(lambda v: _list(v, _number), "a list of numbers", "[1.0]")

_TOP: Keys = {
    "sample_shape": _SHAPE,
    "timestep": _among(list(CONVENTIONS)),
    "prediction": _among(get_args(Prediction)),
    "variance": _among(get_args(Variance)),
    "clip": _Kind(
        lambda v: v is False or (_number(v) and v > 0), "a number above 0, or false", "1.0"
    ),
    "value_range": _Kind(
        lambda v: _list(v, _number) and len(v) == 2,
        "two numbers, darkest and brightest",
        "[-1.0, 1.0]",
    ),
    "rounding": _among(get_args(Rounding)),
    "first_timestep": _COUNT,
    "sampler": _among(SAMPLERS),
}

_SAMPLING: Keys = {
    "steps": _Kind(
        lambda v: _whole(v) or _list(v, lambda t: _whole(t, 0)),
        "a whole number from 1 on, or a list of timesteps",
        "50",
    ),
    "eta": _Kind(lambda v: _number(v) and 0 <= v <= 1, "a number from 0 to 1", "0.0"),
    "spacing": _among(get_args(Spacing)),
    "offset": _COUNT,
    "direction": _among(("clipped", "network")),
    "previous": _among(("next", "stride")),
    "final": _among(("clean", "first")),
    "noise_at_end": _FLAG,
    "order": _Kind(lambda v: v in (1, 2) and not isinstance(v, bool), "1 or 2", "2"),
    "karras": _FLAG,
    "final_sigma": _among(get_args(FinalSigma)),
    "first_order_end": _among(get_args(FirstOrderEnd)),
}

_CONDITION: Keys = {
    "name": _Kind(_name, "a name such as y", '"y"'),
    "meaning": _among(get_args(Meaning)),
    "dtype": _among(("float32", "int64")),
    "shape": _Kind(lambda v: v == [] or _list(v, _whole), "a list of sizes", "[20]"),
    "classes": _WHOLE,
    "null": _COUNT,
    "names": _Kind(lambda v: _list(v, lambda n: isinstance(n, str)), "a list of texts", '["cat"]'),
}

_RESTORE: Keys = {
    "scale": _NUMBERS,
    "offset": _NUMBERS,
    "axis": _Kind(lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number", "-1"),
}
