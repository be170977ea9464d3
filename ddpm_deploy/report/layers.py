"""Which layer of the network computes in what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ddpm_deploy.precision import LayerPrecision

SHORT = {"fp32": "32", "fp16": "16", "bf16": "b16", "int8": "i8"}
"""What a cell of the map says of a precision."""

_OPERATORS = {"Attention": "attn", "ConvTranspose": "convᵀ"}


def operator(op_type: str) -> str:
    """Returns an operator's name for a narrow cell: `conv`, `norm`."""
    if op_type.endswith("Normalization"):
        return "norm"
    return _OPERATORS.get(op_type, op_type.lower())


@dataclass(frozen=True, kw_only=True)
class LayerMap:
    """The map and its counts.

    Attributes:
        layers: In the order of the graph.
        precisions: Those that occur, `fp32` first.
        counts: For each operator how many of its layers compute in each of `precisions`.
    """

    layers: tuple[LayerPrecision, ...]
    precisions: tuple[str, ...]
    counts: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def says(self) -> str:
        """The counts of all layers, in a line."""
        totals = [sum(column) for column in zip(*(row for _, row in self.counts), strict=True)]
        said = [f"{n} in {name}" for n, name in zip(totals, self.precisions, strict=True)]
        return f"{len(self.layers)} layers: {', '.join(said)}"


def layer_map(layers: Sequence[LayerPrecision]) -> LayerMap | None:
    """Counts layers; None where there is none."""
    if not layers:
        return None
    known = [name for name in SHORT if any(layer.precision == name for layer in layers)]
    precisions = (*known, *sorted({layer.precision for layer in layers} - set(known)))
    counted = Counter((layer.op_type, layer.precision) for layer in layers)
    operators = sorted({layer.op_type for layer in layers})
    counts = tuple((op, tuple(counted[op, name] for name in precisions)) for op in operators)
    return LayerMap(layers=tuple(layers), precisions=precisions, counts=counts)
