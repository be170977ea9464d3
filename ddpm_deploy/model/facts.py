"""What was found out about a network, each hyper-parameter with where it is from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.sampling import PREDICTIONS, Prediction
from ddpm_deploy.schedule import SCHEDULES, Schedule, linear, named_schedule

Source = Literal["weights", "config", "release", "flag", "assumed"]
"""Shapes and numbers in the file; a file beside them; a file known by its shapes; what was typed;
the family's default, which nothing confirms."""

T = TypeVar("T")

_LARGEST = 16384
"""Side of a sample: more is a mistake, and no network of these fits a machine with it."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A hyper-parameter.

    Attributes:
        name: As it is called in messages, and in `--set NAME=VALUE`.
        value: In JSON's types.
        source: Where it is from.
        option: What to type to say otherwise; empty where the file decides.
    """

    name: str
    value: Any
    source: Source
    option: str = ""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the user says about a checkpoint.

    Attributes:
        image_size: Height and width, or the length of a sequence; None where nothing is said.
        schedule: Of training: all of it, or its name.
        timesteps: Its T, where that was said alone or with a name.
        prediction: What the network gives.
        settings: Of the family, by name: text as it was typed, or values in JSON's types.
        source: Where all this is from: `flag`, or `config` where a spec says it.
        typed: Names of settings that were typed, where a spec says the others.
    """

    image_size: tuple[int, ...] | None = None
    schedule: Schedule | str | None = None
    timesteps: int | None = None
    prediction: Prediction | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: Source = "flag"
    typed: frozenset[str] = frozenset()

    def of(self, name: str) -> Source:
        """Returns where a setting is from."""
        return "flag" if name in self.typed else self.source

    def schedule_for(self, default: Schedule) -> Schedule | None:
        """Returns the schedule that is said: its name or its T alone changes that of a default.

        Raises:
            ValueError: There is none of that name, or a default of given betas has another T.
        """
        if isinstance(self.schedule, Schedule):
            return self.schedule
        if self.schedule is None and self.timesteps is None:
            return None
        name, T = self.schedule or default.name, self.timesteps or default.T  # noqa: N806
        if self.schedule is None and name not in SCHEDULES:
            raise ValueError(f"its schedule is {default}, whose T is that of its betas")
        return named_schedule(name, T, **(default.parameters if name == default.name else {}))


class Facts:
    """Collects the hyper-parameters of one checkpoint, and asks only for what no file says.

    Args:
        said: What the user says.
        source: What to call the checkpoint in errors.
    """

    def __init__(self, said: Said, *, source: str) -> None:
        self._said, self._source = said, source
        self._facts: dict[str, Fact] = {}

    @property
    def all(self) -> tuple[Fact, ...]:
        """The facts so far, in the order in which they were found."""
        return tuple(self._facts.values())

    def found(self, name: str, value: T, source: Source = "weights") -> T:
        """Notes what a file says; what the user says wins over a config, never over weights.

        Raises:
            CheckpointError: The user says another value than the weights, or one that is no such.
        """
        if name in self._said.settings:
            typed = self._typed(name, kind=type(value))
            if typed == value or source != "weights":
                if typed != value:
                    source, value = self._said.of(name), typed
            else:
                raise CheckpointError(
                    f"{self._source} has {name} {_shown(value)} by its weights, not "
                    f"{_shown(typed)}.",
                    hint=f"Leave {name} out.",
                )
        option = "" if source == "weights" else f"--set {name}=..."
        self._note(Fact(name=name, value=value, source=source, option=option))
        return value

    def remark(self, name: str, value: Any, source: Source) -> None:
        """Notes what follows from other facts, or what nothing can change."""
        self._note(Fact(name=name, value=value, source=source))

    def ask(self, name: str, default: T, *, among: Sequence[T] = (), least: int | None = None) -> T:
        """Returns what the user says, or the family's default, which is then assumed.

        Args:
            name: Of the fact.
            default: Where the user says nothing; its type is the value's.
            among: What there is, where that is a list.
            least: Of a number.

        Raises:
            CheckpointError: What was typed is no such value.
        """
        if name in self._said.settings:
            value: T = self._typed(name, kind=type(default), among=among)
            if least is not None and isinstance(value, int) and value < least:
                raise CheckpointError(
                    f"--set {name}={value} is below {least}.", hint="See docs/checkpoints.md"
                )
            self._note(_fact(name, value, self._said.of(name)))
            return value
        self._note(_fact(name, default, "assumed"))
        return default

    def need(self, name: str, kind: Callable[[Any], T], *, why: str, hint: str) -> T:
        """Returns what the user says of a fact that no file holds and no default is right for.

        Args:
            name: Of the fact.
            kind: `int`, `float`, `str` or `bool`.
            why: What depends on it, as a sentence.
            hint: What to type.

        Raises:
            CheckpointError: The user says nothing, or no such value.
        """
        if name not in self._said.settings:
            raise CheckpointError(
                f"{self._source} does not say its {name.replace('_', ' ')}. {why}", hint=hint
            )
        value: T = self._typed(name, kind=kind)
        self._note(_fact(name, value, self._said.of(name)))
        return value

    def typed(self, name: str) -> bool:
        """Tells whether the user says something of a fact, `image size` among them."""
        if name == "image size":
            return self._said.image_size is not None
        if name == "prediction":
            return self._said.prediction is not None
        return name in self._said.settings

    def image_size(
        self,
        default: tuple[int, ...] | None,
        *,
        source: Source = "assumed",
        multiple_of: int = 1,
        axes: int = 2,
        called: str = "image size",
    ) -> tuple[int, ...]:
        """Returns the sample's size: what the user says, a config's, or the family's default.

        Args:
            default: Height and width, or a length; None where there is no default.
            source: Of the default.
            multiple_of: What the network halves it by.
            axes: How many numbers it is; of a default, as many as that has.
            called: What it is.

        Raises:
            CheckpointError: Nobody says it, or the network cannot take it.
        """
        option = "--image-size"
        axes = len(default) if default else axes
        said = None if default and self._yields(called, source) else self._said.image_size
        size = said or default
        if size is None:
            raise CheckpointError(
                f"{self._source} does not say its {called}; no file of this kind does.",
                hint=f"Type the one it was trained at: {option} {32 if multiple_of <= 32 else 64}",
            )
        if len(size) == 1:
            size *= axes  # one number is a square's side
        if len(size) != axes:
            raise CheckpointError(
                f"The {called} is {'x'.join(map(str, size))}; here it is "
                + ("one number." if axes == 1 else "one number, or height x width."),
                hint=f"Type {option} 32" if axes == 1 else f"Type {option} 32, or {option} 16x24",
            )
        if any(side > _LARGEST for side in size):
            raise CheckpointError(
                f"The {called} is {'x'.join(map(str, size))}; {_LARGEST} is the most.",
                hint=f"Type the size that it was trained at: {option} {4 * multiple_of}",
            )
        if any(side < 1 or side % multiple_of for side in size):
            raise CheckpointError(
                f"The {called} is {'x'.join(map(str, size))}; this network takes multiples of "
                f"{multiple_of}.",
                hint=f"Type the size that it was trained at: {option} {4 * multiple_of}",
            )
        source = self._said.of(called) if said else source
        self._note(Fact(name=called, value="x".join(map(str, size)), source=source, option=option))
        return size

    def schedule(
        self,
        default: Schedule | Callable[[], Schedule],
        *,
        source: Source = "assumed",
        adapt: Callable[[Schedule], Schedule] | None = None,
    ) -> Schedule:
        """Returns the schedule of training: what the user says, or the file's or family's own.

        Args:
            default: Where the user says nothing; or what makes it, which is then not called where
                the user says all.
            source: Of the default.
            adapt: What the family means by a schedule of the name and length that was typed.
        """
        whole = self._said.schedule
        if callable(default):
            said_all = isinstance(whole, Schedule) or (whole and self._said.timesteps)
            unused = said_all and not self._yields("schedule", source)
            default = linear() if unused else default()
        try:
            said = None if self._yields("schedule", source) else self._said.schedule_for(default)
        except ValueError as error:
            raise CheckpointError(
                f"{self._source} cannot take this schedule: {error}.",
                hint="Type both: --schedule linear --timesteps 1000",
            ) from error
        if said is not None and adapt is not None:
            said = adapt(said)
        if said is not None and source == "weights" and said != default:
            raise CheckpointError(
                f"{self._source} holds its own schedule, {default}; it is not {said}.",
                hint="Leave --schedule and --timesteps out.",
            )
        schedule = said or default
        option = "" if source == "weights" else "--schedule, --timesteps"
        source = self._said.of("schedule") if said is not None and source != "weights" else source
        self._note(Fact(name="schedule", value=str(schedule), source=source, option=option))
        return schedule

    def prediction(self, default: Prediction, *, source: Source = "assumed") -> Prediction:
        """Returns what the network gives: what the user says, or the file's or family's own."""
        said = None if self._yields("prediction", source) else self._said.prediction
        if said is not None and said not in PREDICTIONS:
            raise CheckpointError(
                f"The prediction is {said!r}; there are {', '.join(PREDICTIONS)}.",
                hint="Type --prediction epsilon",
            )
        if said is not None and source == "weights" and said != default:
            raise CheckpointError(
                f"{self._source} says by its weights that it predicts {default}, not {said}.",
                hint="Leave --prediction out.",
            )
        if said is not None and source != "weights":
            source = self._said.of("prediction")
        value = said or default
        option = "" if source == "weights" else "--prediction"
        self._note(Fact(name="prediction", value=value, source=source, option=option))
        return value

    def done(self) -> None:
        """Ends the collecting.

        Raises:
            CheckpointError: The user says something that this family does not have.
        """
        if unknown := [name for name in self._said.settings if name not in self._facts]:
            known = [fact.name for fact in self.all if fact.option.startswith("--set")]
            raise CheckpointError(
                f"--set {unknown[0]} is nothing that {self._source} has; it takes "
                f"{', '.join(known) or 'nothing'}.",
                hint="Leave it out, or see docs/checkpoints.md",
            )

    def _yields(self, name: str, source: Source) -> bool:
        """Tells whether what an engine's spec says gives way to what the checkpoint itself says."""
        replayed = self._said.source == "config" and name not in self._said.typed
        return replayed and source in {"weights", "config", "release"}

    def _note(self, fact: Fact) -> None:
        self._facts[fact.name] = fact

    def _typed(self, name: str, *, kind: Callable[[Any], Any], among: Sequence[Any] = ()) -> Any:
        given = self._said.settings[name]
        try:
            value = _parse(given, kind)
        except (ValueError, TypeError):
            value = None
            wanted = _KINDS.get(kind, "a value of its kind")
        else:
            wanted = f"one of {', '.join(map(_shown, among))}"
            if not among or value in among:
                return value
        raise CheckpointError(
            f"--set {name}={_shown(given)} is not {wanted}.", hint="See docs/checkpoints.md"
        )


_KINDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list of numbers such as 1,2,4",
    list: "a list such as [1,2,4]",
    dict: 'a table such as {"a": 1}',
}


def _fact(name: str, value: Any, source: Source) -> Fact:
    return Fact(name=name, value=value, source=source, option=f"--set {name}=...")


def _parse(given: Any, kind: Callable[[Any], Any]) -> Any:
    """Reads what was typed; a value of the kind already stays as it is.

    Raises:
        ValueError: It is no such value.
    """
    if kind is type(None):  # a default that is None: nothing, a number, or a word
        if given in {"null", "none"}:
            return None
        return int(given) if str(given).lstrip("-").isdecimal() else given
    if not isinstance(given, str):
        return tuple(given) if kind is tuple else given
    read: Callable[[str], Any] = _FROM_TEXT.get(kind, kind)
    return read(given)


def _truth(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError(text)
    return words[text.lower()]


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(p) if "." in p else int(p) for p in text.strip("()[] ").split(","))


def _list(text: str) -> list[Any]:
    value = json.loads(text if text.startswith("[") else f"[{text}]")
    if not isinstance(value, list):
        raise TypeError(text)
    return value


def _table(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise TypeError(text)
    return value


_FROM_TEXT: Mapping[Any, Callable[[str], Any]] = {
    bool: _truth,
    tuple: _numbers,
    list: _list,
    dict: _table,
}


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
