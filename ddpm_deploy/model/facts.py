"""What was found out about a network, each hyper-parameter with where it is from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.sampling import PREDICTIONS, Prediction
from ddpm_deploy.schedule import Schedule

Source = Literal["weights", "config", "release", "flag", "assumed"]
"""Shapes and numbers in the file; a file beside them; a file known by its shapes; what was typed;
the family's default, which nothing confirms."""

T = TypeVar("T")


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
        schedule: Of training.
        prediction: What the network gives.
        settings: Of the family, by name: text as it was typed, or values in JSON's types.
        source: Where all this is from: `flag`, or `config` where a spec says it.
    """

    image_size: tuple[int, ...] | None = None
    schedule: Schedule | None = None
    prediction: Prediction | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: Source = "flag"


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
                    source, value = self._said.source, typed
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

    def ask(self, name: str, default: T, *, among: Sequence[T] = ()) -> T:
        """Returns what the user says, or the family's default, which is then assumed.

        Args:
            name: Of the fact.
            default: Where the user says nothing; its type is the value's.
            among: What there is, where that is a list.

        Raises:
            CheckpointError: What was typed is no such value.
        """
        if name in self._said.settings:
            value: T = self._typed(name, kind=type(default), among=among)
            self._note(_fact(name, value, self._said.source))
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
        self._note(_fact(name, value, self._said.source))
        return value

    def typed(self, name: str) -> bool:
        """Tells whether the user says something of a fact, `image size` among them."""
        if name == "image size":
            return self._said.image_size is not None
        return name in self._said.settings

    def image_size(
        self,
        default: tuple[int, ...] | None,
        *,
        source: Source = "assumed",
        multiple_of: int = 1,
        called: str = "image size",
    ) -> tuple[int, ...]:
        """Returns the sample's size: what the user says, a config's, or the family's default.

        Args:
            default: Height and width, or a length; None where there is no default.
            source: Of the default.
            multiple_of: What the network halves it by.
            called: What it is.

        Raises:
            CheckpointError: Nobody says it, or the network cannot take it.
        """
        option = "--image-size"
        size = self._said.image_size or default
        if size is None:
            raise CheckpointError(
                f"{self._source} does not say its {called}; no file of this kind does.",
                hint=f"Type the one it was trained at: {option} {32 if multiple_of <= 32 else 64}",
            )
        if default is not None and len(size) != len(default):
            # One number is a square's side.
            size = size * len(default) if len(size) == 1 else size
        if any(side < 1 or side % multiple_of for side in size):
            raise CheckpointError(
                f"The {called} is {'x'.join(map(str, size))}; this network takes multiples of "
                f"{multiple_of}.",
                hint=f"Type the size that it was trained at: {option} {4 * multiple_of}",
            )
        source = self._said.source if self._said.image_size else source
        self._note(Fact(name=called, value="x".join(map(str, size)), source=source, option=option))
        return size

    def schedule(
        self,
        default: Schedule,
        *,
        source: Source = "assumed",
        adapt: Callable[[Schedule], Schedule] | None = None,
    ) -> Schedule:
        """Returns the schedule of training: what the user says, or the file's or family's own.

        Args:
            default: Where the user says nothing.
            source: Of the default.
            adapt: What the family means by a schedule of the name and length that was typed.
        """
        said = self._said.schedule
        if said is not None and adapt is not None:
            said = adapt(said)
        if said is not None and source == "weights" and said != default:
            raise CheckpointError(
                f"{self._source} holds its own schedule, {default}; it is not {said}.",
                hint="Leave --schedule and --timesteps out.",
            )
        schedule = said or default
        option = "" if source == "weights" else "--schedule, --timesteps"
        source = self._said.source if said is not None and source != "weights" else source
        self._note(Fact(name="schedule", value=str(schedule), source=source, option=option))
        return schedule

    def prediction(self, default: Prediction, *, source: Source = "assumed") -> Prediction:
        """Returns what the network gives: what the user says, or the file's or family's own."""
        said = self._said.prediction
        if said is not None and said not in PREDICTIONS:
            raise CheckpointError(
                f"The prediction is {said!r}; there are {', '.join(PREDICTIONS)}.",
                hint="Type --prediction epsilon",
            )
        source = self._said.source if said is not None else source
        value = said or default
        self._note(Fact(name="prediction", value=value, source=source, option="--prediction"))
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
}


def _fact(name: str, value: Any, source: Source) -> Fact:
    return Fact(name=name, value=value, source=source, option=f"--set {name}=...")


def _parse(given: Any, kind: Callable[[Any], Any]) -> Any:
    """Reads what was typed; a value of the kind already stays as it is.

    Raises:
        ValueError: It is no such value.
    """
    if kind is type(None):  # a default that is None: a number, or a word
        return int(given) if str(given).lstrip("-").isdecimal() else given
    if not isinstance(given, str):
        return tuple(given) if kind is tuple else given
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if given.lower() not in words:
            raise ValueError(given)
        return words[given.lower()]
    if kind is tuple:
        return tuple(
            float(part) if "." in part else int(part) for part in given.strip("()[] ").split(",")
        )
    return kind(given)


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
