"""What made a deployed loop another model, in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Place = Literal["file", "noise", "sampler", "input", "network", "precision", "pictures"]


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A likely cause, with its evidence.

    Attributes:
        name: Which, for programs: `timestep-off-by-one`.
        place: Where it lies: in which `file` was taken, the `noise`, the `sampler`'s numbers, the
            network's `input`, the `network`, its `precision`, or the `pictures`.
        says: A sentence.
        evidence: What was measured that speaks for it, a sentence each, with values.
        mend: What to do about it.
        certain: Whether the evidence leaves no other: the error is gone without it.
    """

    name: str
    place: Place
    says: str
    evidence: tuple[str, ...] = ()
    mend: str = ""
    certain: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON's types."""
        return asdict(self)
