"""What a checkpoint family is, and what reading one gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ddpm_deploy.model.facts import Facts
from ddpm_deploy.spec import Condition, ModelSpec

State = Mapping[str, Tensor]
"""Tensors by name."""

Weights = Literal["ema", "online"]


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint as it was read, before anybody knows what it is.

    Attributes:
        path: The file or folder that was named.
        state: The weights that were taken, without wrapping and without shared prefixes.
        weights: Which ones they are, where there are two.
        choices: Which ones there are.
        content: All that the file holds.
        config: What stands beside the weights, in JSON's types: a diffusers folder's `unet` and
            `scheduler`, a policy's `cfg`; empty where nothing does.
        files: The files that were read, the weights first; their hash is the checkpoint's.
        whole: The tensors that the state was taken from, under their full names; empty where a
            family unwrapped it.
    """

    path: Path
    state: State
    weights: Weights
    choices: tuple[Weights, ...]
    content: Any = None
    config: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    whole: State = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a family makes of a checkpoint.

    Attributes:
        network: In the shapes of the weights, untrained; called with (x, t, *conditions).
        spec: What it is.
        state: The weights under the network's own names, where the file has others.
        files: What was read besides those of the checkpoint: its hash is over these, too.
    """

    network: nn.Module
    spec: ModelSpec
    state: State | None = None
    files: tuple[Path, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of checkpoint, told by the names of its tensors alone.

    Attributes:
        name: As it is called in messages and in specs.
        has_all: Names that every file of it has.
        read: Makes the network and its spec of an opened checkpoint. What it finds out, and what it
            must ask, goes through the `Facts`. Raises CheckpointError for what it does not support.
        has_none: Text that is in no name of it.
        unwrap: Takes the weights out of a file whose form only this family has: from its content,
            its path, and `ema`, `online` or None for the better of what is there. Returns None for
            other files. The state keeps no wrapping and no shared prefix.
        open_folder: Likewise for a folder, from its path.
    """

    name: str
    has_all: tuple[str, ...]
    read: Callable[[Opened, Facts], Reading]
    has_none: tuple[str, ...] = ()
    unwrap: Callable[[Any, Path, Weights | None], Opened | None] | None = None
    open_folder: Callable[[Path, Weights | None], Opened | None] | None = None

    def missing(self, state: State) -> list[str]:
        """Returns the names that a state dict of this family would have, and this one has not."""
        return [name for name in self.has_all if name not in state]

    def unwanted(self, state: State) -> list[str]:
        """Returns the names in a state dict that no file of this family has."""
        return [name for name in state if any(part in name for part in self.has_none)]

    def matches(self, state: State) -> bool:
        """Tells whether a state dict is of this family, by its names."""
        return not self.missing(state) and not self.unwanted(state)


def count_parts(state: State, pattern: str) -> int:
    """Returns how many parts there are, from 0 on, by a name of theirs with `{}` for the number."""
    number = 0
    while pattern.format(number) in state:
        number += 1
    return number


def label_condition(
    classes: int, names: Sequence[str] = (), *, null: int | None = -1, name: str = "y"
) -> Condition:
    """Returns a class label as a condition.

    Args:
        classes: Their number.
        names: What they are called, in order.
        null: The label that means none: `classes` when -1, a row that the graph adds; None where
            there is none.
        name: Of the graph's input.
    """
    return Condition(
        name=name,
        meaning="class_label",
        dtype="int64",
        classes=classes,
        null=classes if null == -1 else null,
        names=tuple(names),
    )
