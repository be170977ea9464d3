"""A difference between two graphs, in words, and the worst of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

_MOST = 10
_LISTED = 3

_WORST_FIRST = (
    "structure",
    "other-weights",
    "operator-replaced",
    "gelu",
    "q-k-swapped",
    "wiring",
    "resize",
    "attribute",
    "epsilon",
    "constant",
    "weight-shape",
    "weight-transposed",
    "weight-flipped",
    "channels-permuted",
    "blocks-exchanged",
    "weight-truncated",
    "bias-missing",
    "weight-zero",
    "weight-scaled",
    "weight-changed",
    "weights-rounded",
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that is not the same in two graphs.

    Attributes:
        kind: Which sort: one of `structure`, `other-weights`, `operator-replaced`, `gelu`,
            `q-k-swapped`, `wiring`, `resize`, `attribute`, `epsilon`, `constant`, `weight-shape`,
            `weight-transposed`, `weight-flipped`, `channels-permuted`, `blocks-exchanged`,
            `weight-truncated`, `bias-missing`, `weight-zero`, `weight-scaled`, `weight-changed`,
            `weights-rounded`. The last is what half precision does, and healthy by itself.
        where: The parameter or module, as the checkpoint calls it.
        says: A sentence with the values.
        evidence: The values, in JSON's types or tuples.
        names: Weights and first outputs of nodes that both graphs have by these names, so that the
            reference's can stand in for the engine's; empty where there are none.
    """

    kind: str
    where: str
    says: str
    evidence: Mapping[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = ()


def worst(found: Sequence[Difference]) -> list[Difference]:
    """Puts the worst first; of a kind that is often, three and a sum of the others."""
    by_kind: dict[str, list[Difference]] = {}
    for one in found:
        by_kind.setdefault(one.kind, []).append(one)
    short = []
    for kind in sorted(by_kind, key=_WORST_FIRST.index):
        alike = by_kind[kind]
        if len(alike) > _LISTED:
            more = len(alike) - 1
            alike = [
                replace(
                    alike[0],
                    where=listed([one.where for one in alike]),
                    says=f"{alike[0].says} {times(more, 'more place')} likewise.",
                    names=tuple(name for one in alike for name in one.names),
                )
            ]
        short += alike
    return short[:_MOST]


def listed(where: Sequence[str]) -> str:
    """Returns three of some names, and how many more there are."""
    names = list(dict.fromkeys(where))
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def times(count: int, what: str = "node") -> str:
    """Returns a count with its noun, such as `2 nodes`."""
    return f"{count} {what}{'' if count == 1 else 's'}"
