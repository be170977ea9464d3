"""How `build` shows that a plan is being built, what came of it, and what fits less memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill

from ddpm_deploy.cli.common import note, size
from ddpm_deploy.engines.build_settings import BuildSettings, Rung
from ddpm_deploy.engines.flavour import LABELS
from ddpm_deploy.engines.plan import PlanRecord
from ddpm_deploy.engines.trt_build import (
    Building,
    OutOfMemoryError,
    PlanBuilt,
    Prepared,
    TooLargeError,
    build_plan,
)
from ddpm_deploy.errors import EngineBuildError, EngineError, MissingDependencyError
from ddpm_deploy.parity import BUDGETS
from ddpm_deploy.spec import ModelSpec

OTHER_FUNCTION = 0.1
"""An error that no rounding explains."""

_LINE_EVERY = 60.0
"""Seconds between two lines about a build that goes on, where there is no terminal."""

_GPUS = {
    "7.5": "GeForce RTX 20 and GTX 16, T4",
    "8.0": "A100, A30",
    "8.6": "GeForce RTX 30, RTX A2000 to A6000",
    "8.9": "GeForce RTX 40, RTX Ada, L4, L40",
    "12.0": "GeForce RTX 50, RTX PRO Blackwell",
    "12.1": "DGX Spark",
}

_INPUTS = {
    "graph_sha256": "the graph",
    "flavour": "the runtime",
    "version": "the runtime's version",
    "platform": "the platform",
    "device": "the GPU",
    "compute_capabilities": "the compute capability",
    "profiles": "the batches",
    "precision": "the precision",
    "fused_step": "the step behind the network",
    "options": "workspace, optimization level, budget or data",
    "tool": "the version of ddpm-deploy",
}


def make_plan(
    graph: Path,
    output: Path,
    settings: BuildSettings,
    *,
    spec: ModelSpec,
    prepare: Callable[[BuildSettings], Prepared],
    check: Callable[[Path, PlanRecord], None],
    weights: Sequence[Path],
    force: bool,
    retry_smaller: bool,
) -> PlanBuilt:
    """Builds a plan as `build_plan` does, with a clock, and tells what came of it on stderr.

    Args:
        graph: The `.onnx` file that `export` wrote.
        output: The plan to write.
        settings: What to build with.
        spec: What the network is.
        prepare: Makes the graph that TensorRT reads.
        check: As in `build_plan`.
        weights: Files that hold weights of the graph besides its own.
        force: Build though nothing has changed.
        retry_smaller: When memory runs out, go on with the next smaller build.

    Raises:
        OutOfMemoryError: Memory ran out; the hint is the ladder of smaller builds.
    """
    given_up: list[str] = []
    while True:
        try:
            with _clock(f"building {output} in {_named(settings)}") as watch:
                built = build_plan(
                    graph,
                    output,
                    settings,
                    spec=spec,
                    prepare=prepare,
                    check=check,
                    weights=weights,
                    force=force,
                    watch=watch,
                )
            break
        except OutOfMemoryError as error:
            rungs = settings.smaller(batch_alone=isinstance(error, TooLargeError))
            if not (retry_smaller and rungs):
                hint = _ladder(graph, output, rungs)
                raise OutOfMemoryError(str(error), hint=hint) from error
            settings, gives_up = rungs[0].settings, rungs[0].gives_up
            given_up.append(gives_up)
            note(f"{error} Trying again without {gives_up}.")
    _tell(built, given_up)
    return built


def check_plan(graph: Path, plan: Path, record: PlanRecord) -> None:
    """Runs a plan that was just built beside its graph, where its GPU is, and says how far it is.

    Args:
        graph: The `.onnx` file.
        plan: The plan, which need not have its name yet.
        record: Its sidecar.

    Raises:
        EngineBuildError: Its output is another function's.
    """
    from ddpm_deploy.engines.base import needs
    from ddpm_deploy.engines.device import find_device
    from ddpm_deploy.export.prove import prove

    if find_device() is None:
        return
    with needs("cuda-bindings", extra="tensorrt"):
        from ddpm_deploy.engines.trt import TrtEngine
    try:
        with TrtEngine.open(plan, record) as engine:
            error = prove(graph, engine)
    except (EngineError, MissingDependencyError) as reason:
        note(f"the plan was not compared with its graph here: {reason}")
        return
    finally:
        plan.with_name(plan.name + ".cache").unlink(missing_ok=True)
    if not error <= OTHER_FUNCTION:
        raise EngineBuildError(
            f"{record.runtime} built another function than the graph: on this GPU they differ by "
            f"{error:.1e} of the peak. Nothing was written.",
            hint="Try --fp32, or --optimization-level 1, and please report the network.",
        )
    note(f"on this GPU its output is at most {error:.1e} of the peak from the graph's")
    if not error <= BUDGETS[record.precision]:
        note(
            f"that is more than {BUDGETS[record.precision]:.0e}, what rounding explains: see "
            f"ddpm-deploy verify --against {graph}"
        )


def _named(settings: BuildSettings) -> str:
    return f"{settings.precision} with {LABELS[settings.flavour]}"


def _ladder(graph: Path, output: Path, rungs: Sequence[Rung]) -> str:
    if not rungs:
        return "Close other programs or add swap; there is nothing left to give up."
    lines = ["Close other programs or add swap. Or give something up, each line besides what"]
    lines.append("those above it do; --retry-smaller tries them in turn:")
    for rung in rungs:
        lines += [f"  {rung.settings.command(graph, output)}", f"    without {rung.gives_up}"]
    return "\n".join(lines)


@contextmanager
def _clock(what: str) -> Iterator[Callable[[Building], None]]:
    """Shows the time that went by, and what the last build took; a line a minute in a pipe.

    How far a build is, TensorRT does not say, so there is no percentage.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    spoke = 0.0
    start = time.perf_counter()
    begun: Building | None = None

    def text(building: Building) -> str:
        last = "" if building.last is None else f" (last time {duration(building.last)})"
        return f"{what}: {duration(building.seconds)}{last}"

    class Line:
        """What stands beside the spinner, made anew whenever it turns."""

        def __rich__(self) -> Text:  # which has no markup: a name may hold brackets
            if begun is not None:
                return Text(text(begun))
            return Text(f"preparing the graph: {duration(time.perf_counter() - start)}")

    def watch(building: Building) -> None:
        nonlocal begun
        begun = building

    if console.is_terminal:
        with console.status(Line()):
            yield watch
        return

    def line(building: Building) -> None:
        nonlocal spoke
        if building.seconds - spoke >= _LINE_EVERY:
            spoke = building.seconds
            note(text(building))

    yield line


def duration(seconds: float) -> str:
    """Returns a time in words: `3.5 s`, `2 min 05 s`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _tell(built: PlanBuilt, given_up: Sequence[str]) -> None:
    record = built.record
    took = duration(record.seconds)
    if built.reused:
        note(
            f"{built.path} is up to date: graph, options, {record.runtime} and GPU are those that "
            f"it was built with, in {took}; --force builds it again"
        )
    else:
        if built.changed:
            names = ", ".join(_INPUTS.get(name, name.replace("_", " ")) for name in built.changed)
            note(f"it replaces a plan that differed in {names}")
        note(
            f"built with {record.runtime} in {record.precision} in {took}: "
            f"{size(record.plan_bytes)}, batches {', '.join(map(str, record.profiles))}"
        )
        if record.precision_error is not None:
            note(
                f"the graph's output is at most {record.precision_error:.1e} of its peak from "
                "float32, measured before the build"
            )
        if record.memory:
            needs = size(record.memory)
            note(f"a batch of {record.largest_batch} needs about {needs} on the device")
        for reason, layers in record.precision_groups.items():
            note(fill(f"{reason}: {layers}", 79, initial_indent="  ", subsequent_indent="    "))
    if given_up:
        note(f"it does without {', and without '.join(given_up)}")
    name = built.path.name
    copy = f"; copy {name} and {name}.json there" if record.flavour == "tensorrt_rtx" else ""
    note(f"it runs {where(record)}{copy}")
    note(f"draw images there: ddpm-deploy sample --engine {built.path}")


def where(record: PlanRecord) -> str:
    """Says which machines run a plan: `on Orin, with TensorRT 10.3.0`."""
    if record.flavour == "tensorrt":
        gpu = "GPUs of Ampere and later" if record.hardware_compatible else record.device
        later = " and later" if record.version_compatible else ""
        return f"on {gpu}, with {record.runtime}{later}"
    if record.compute_capabilities:
        names = (
            f"{capability} ({_GPUS[capability]})" if capability in _GPUS else capability
            for capability in record.compute_capabilities
        )
        gpus = f"GPUs of compute capability {', '.join(names)}"
    else:
        gpus = "GPUs of Ampere and later (GeForce RTX 30, 40, 50)"
    # The system does not matter to such a plan, the processor does.
    processor = record.platform.split()[-1]
    return f"on {gpus}, {processor}, with {record.runtime} exactly"
