"""Building a plan again from what its sidecar says."""

from __future__ import annotations

import shlex
from pathlib import Path

from ddpm_deploy.engines.plan import PlanRecord
from ddpm_deploy.errors import EngineError, PlanMismatchError


def rebuild_arguments(plan: Path, record: PlanRecord, mismatch: PlanMismatchError) -> list[str]:
    """Returns the arguments of `ddpm-deploy` that build a plan again, in its place.

    A sidecar may come from anywhere: of its command only `build` is taken, of files only the graph
    beside the plan and the plan itself.

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
    words = shlex.split(mismatch.command)
    known = words[:2] == ["ddpm-deploy", "build"] and words.count("-o") == 1 and words[-1] != "-o"
    if not known or len(words) < 3 or Path(words[2]).name != record.graph:
        raise EngineError(
            f"The sidecar of {plan} names no build of {record.graph}: {mismatch.command}",
            hint=f"Type the build yourself: ddpm-deploy build {graph} --fp16 -o {plan}",
        ) from mismatch
    words[2] = str(graph)
    words[words.index("-o") + 1] = str(plan)
    if "--timing-cache" in words:  # another file that would be written
        at = words.index("--timing-cache")
        del words[at : at + 2]
    return words[1:]
