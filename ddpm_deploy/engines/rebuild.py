"""Building a plan again from what its sidecar says."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from ddpm_deploy.engines.plan import PlanRecord
from ddpm_deploy.errors import EngineError, PlanMismatchError

_FLAGS = frozenset(
    {"--fp16", "--bf16", "--fp32", "--int8", "--fuse-step", "--version-compatible"}
    | {"--hardware-compatible"}
)
_VALUES = frozenset(
    {"--runtime", "--budget", "--batch", "--compute-capability", "--workspace"}
    | {"--optimization-level"}
)
_FILES = frozenset({"--data", "--timing-cache", "-o"})
"""Together the options that `BuildSettings.command` writes, and no other way to spell them."""


def rebuild_arguments(plan: Path, record: PlanRecord, mismatch: PlanMismatchError) -> list[str]:
    """Returns the arguments of `ddpm-deploy` that build a plan again, in its place.

    A sidecar may come from anywhere: of its command only `build` is taken, with the options that
    this package writes, and of files only the graph beside the plan and the plan itself. So
    half precision that was measured on `--data` is measured on the network's own samples.

    Args:
        plan: The file.
        record: Its sidecar.
        mismatch: Why it does not run here.

    Raises:
        EngineError: The graph is not beside the plan, or the command is no build of it.
    """
    graph = plan.parent / record.graph
    if Path(record.graph).name != record.graph or not graph.is_file():
        raise EngineError(
            f"{plan} cannot be built again here: its graph {record.graph} is not beside it.",
            hint=f"Copy {Path(record.graph).name} to {plan.parent}, or: {mismatch.command}",
        ) from mismatch
    try:
        words = shlex.split(mismatch.command)
        options = _options(words[3:])
        if words[:2] != ["ddpm-deploy", "build"] or Path(words[2]).name != record.graph:
            raise ValueError
    except (ValueError, IndexError) as error:
        raise EngineError(
            f"The sidecar of {plan} names no build of {record.graph}: {mismatch.command}",
            hint=f"Type the build yourself: ddpm-deploy build {graph} --fp16 -o {plan}",
        ) from error
    # What stands in the plan's place has the same inputs, and does not run: it is built in any case
    return ["build", str(graph), *options, "--force", "-o", str(plan)]


def _options(words: Sequence[str]) -> list[str]:
    """Returns the options that are kept: those that name no file.

    Raises:
        ValueError: One is not as this package writes it.
    """
    kept: list[str] = []
    left = iter(words)
    for word in left:
        if word in _FLAGS:
            kept.append(word)
        elif word not in _VALUES | _FILES or (value := next(left, None)) is None:
            raise ValueError(word)
        elif word in _VALUES:
            kept += [word, value]
    return kept
