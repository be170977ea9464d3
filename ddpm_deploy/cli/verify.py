"""`ddpm-deploy verify`: is the deployed loop the trained model?"""

from __future__ import annotations

import json as json_module
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ddpm_deploy.cli.common import (
    Device,
    Eta,
    Guidance,
    Json,
    Label,
    ModelName,
    Observe,
    Progress,
    Respacing,
    SamplerName,
    Seed,
    SpacingName,
    Steps,
    Threads,
    note,
    note_untrained,
    print_json,
    print_table,
    recipe_of,
    settings,
)

if TYPE_CHECKING:
    from ddpm_deploy.precision import LayerPrecision
    from ddpm_deploy.verify import Budget, StepErrors, Verifier
    from ddpm_deploy.verify.compare import Side
    from ddpm_deploy.verify.verification import Verification

ROWS = 12
"""Timesteps that the table shows; --json has all of them."""

REPORTS = (".json", ".html", ".xml", ".sarif")

_PARTS = ("out", "x0", "x")
_OF_THE_LOOP = (
    "count",
    "sampler",
    "steps",
    "eta",
    "spacing",
    "respacing",
    "seed",
    "label",
    "guidance",
)


def command(
    ctx: typer.Context,
    engine: Annotated[
        Path, typer.Option("--engine", "-e", help="The deployed engine, or its .trace.")
    ] = Path("unet.onnx"),
    against: Annotated[
        Path,
        typer.Option("--against", help="The trained checkpoint, another engine, or a .trace."),
    ] = Path("ckpt.pt"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images to draw.")] = 4,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="Write a report: .html, .json, .xml (JUnit) or .sarif. May be repeated.",
        ),
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(
            min=2, help="Compare so many timesteps, drawn from all of the schedule, to save time."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="What may differ: a .toml file, or fp32, tf32, fp16, bf16, int8, or psnr=35 "
            "besides the engine's own; by its precision if left out."
        ),
    ] = None,
    local: Annotated[
        float | None,
        typer.Option(min=0, help="Budget: errors of a step on the same x_t, of the peak."),
    ] = None,
    accumulated: Annotated[
        float | None,
        typer.Option(min=0, help="Budget: error of x when both run free, of the peak."),
    ] = None,
    pixels: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Budget: least share of pixels within one level of 255."),
    ] = None,
    bisect: Annotated[
        bool,
        typer.Option(
            "--bisect", help="Walk the graph to the first node that differs; exports a checkpoint."
        ),
    ] = False,
    sampler: SamplerName = None,
    steps: Steps = None,
    eta: Eta = None,
    spacing: SpacingName = None,
    respacing: Respacing = None,
    seed: Seed = 0,
    label: Label = None,
    guidance: Guidance = 1.0,
    observe: Observe = None,
    model: ModelName = None,
    threads: Threads = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Compare a deployed loop with the trained model, step by step.

    Local error: both are fed the same x_t. Accumulated error: each runs free
    on the same noise. Exits 1 outside the budget, and says what the likely
    cause is.
    """
    from ddpm_deploy.verify.sampled import drawn_steps
    from ddpm_deploy.verify.verification import default_budget, open_side, verify

    if timesteps is not None and steps is not None:
        raise typer.BadParameter(
            "it draws the timesteps that --steps would choose; leave one of them out",
            param_hint="--timesteps",
        )
    decibels = _decibels(budget)
    allowed = None if decibels is not None else _budget(budget)
    places = [path.resolve() for path in output or ()]
    if twice := next((path for path in places if places.count(path) > 1), None):
        raise typer.BadParameter(f"{twice} is named twice", param_hint="--output")
    with ExitStack() as stack:
        # Opened before the loop: a place that cannot be written shall not cost the work.
        reports = {path: stack.enter_context(_report(path)) for path in output or ()}
        deployed = open_side(stack, engine, threads=threads, device=device)
        reference = open_side(
            stack, against, spec=deployed.spec, threads=threads, device=device, model=model
        )
        _check_loop(ctx, {engine: deployed, against: reference})
        if bisect:
            _check_bisect({engine: deployed, against: reference})
        recipe = recipe_of(
            deployed.spec,
            seed=seed,
            sampler=sampler,
            steps=steps if timesteps is None else drawn_steps(deployed.spec, timesteps, seed=seed),
            eta=eta,
            spacing=spacing,
            label=label,
            guidance=guidance,
            observe=observe,
            example=True,
            respacing=respacing,
        )
        with settings("See: ddpm-deploy verify --help"), ExitStack() as bar:
            watch = _Watch(bar, deployed)
            found = verify(
                deployed,
                reference,
                recipe,
                range(count),
                budget=replace(
                    given := (allowed or default_budget(deployed)).changed(
                        local=local, accumulated=accumulated, pixels=pixels
                    ),
                    psnr=given.psnr if decibels is None else decibels,
                ),
                command=sys.argv,
                on_start=watch.start,
                on_step=watch.step,
            )
        if not found.passed:
            found = _explained(found, reference, deployed)
        lines: list[str] = []
        if bisect:
            found, lines = _walked(found, reference, deployed, threads)
        for path, partial in reports.items():
            partial.write_text(_text(path.suffix, found, deployed), encoding="utf-8")
    for path in reports:
        note(f"report: {path}")
    if json:
        print_json(found.to_dict())
    else:
        _print(found, lines)
    raise typer.Exit(0 if found.passed else 1)


def _check_loop(ctx: typer.Context, sides: Mapping[Path, Side]) -> None:
    """Refuses to be told of a loop where a trace says which it is."""
    from ddpm_deploy.verify.trace import Trace

    typed = [
        name
        for name in (*_OF_THE_LOOP, "timesteps")
        if (source := ctx.get_parameter_source(name)) and source.name == "COMMANDLINE"
    ]
    for path, side in sides.items():
        if isinstance(side, Trace) and typed:
            raise typer.BadParameter(
                f"{path} says what loop it is, its images and its noise; leave --{typed[0]} out",
                param_hint=f"--{typed[0]}",
            )


def _decibels(text: str | None) -> float | None:
    """Reads `--budget psnr=35`: the engine's own budget, and so many decibels for the pictures."""
    if text is None or not text.startswith("psnr="):
        return None
    try:
        found = float(text.removeprefix("psnr="))
    except ValueError:
        found = nan
    if not isfinite(found):
        raise typer.BadParameter(f"{text!r} is no number of decibels", param_hint="--budget")
    return found


def _budget(text: str | None) -> Budget | None:
    from ddpm_deploy.verify import Budget, read_budget
    from ddpm_deploy.verify.budget import ARITHMETICS

    if text is None:
        return None
    if text in ARITHMETICS:
        return Budget.of(text)
    return read_budget(Path(text))


def _check_bisect(sides: Mapping[Path, Side]) -> None:
    """Says before the loop that there is nothing to walk, or nothing to walk it with."""
    from ddpm_deploy.engines.base import needs
    from ddpm_deploy.errors import ParityError
    from ddpm_deploy.verify.trace import Trace

    for path, side in sides.items():
        if isinstance(side, Trace):
            raise ParityError(
                f"{path} is a trace, which has no graph that --bisect could walk.",
                hint="Leave --bisect out, or give two engines.",
            )
    with needs("onnx", extra="export"):
        import ddpm_deploy.export.explain  # noqa: F401


def _explained(found: Verification, reference: Side, deployed: Side) -> Verification:
    """Adds what the graphs show, where onnx is there to read them."""
    from dataclasses import replace

    from ddpm_deploy.engines.base import needs
    from ddpm_deploy.errors import MissingDependencyError

    try:
        with needs("onnx", extra="export"):
            from ddpm_deploy.export.explain import explain
    except MissingDependencyError:
        return found
    note("outside the budget; looking for the cause in both files")
    return replace(found, causes=explain(found, reference, deployed))


def _walked(
    found: Verification, reference: Side, deployed: Side, threads: int | None
) -> tuple[Verification, list[str]]:
    """Walks both graphs; returns what that adds, and its lines."""
    from dataclasses import replace

    from ddpm_deploy.engines import Engine
    from ddpm_deploy.export.explain import walk
    from ddpm_deploy.verify.causes import VAGUE, merged

    note("walking both graphs, layer by layer")
    walked = walk(found, cast("Engine", reference), cast("Engine", deployed), threads=threads)
    causes = found.causes
    if not found.passed and (nodes := list(walked.causes())):
        causes = merged([*nodes, *(cause for cause in found.causes if cause.name not in VAGUE)])
    return replace(found, causes=causes, bisection=walked.to_dict()), walked.lines()


class _Watch:
    """Shows how far the comparison is."""

    def __init__(self, stack: ExitStack, deployed: Side) -> None:
        self._stack, self._deployed = stack, deployed
        self._progress: Progress | None = None

    def start(self, verifier: Verifier) -> None:
        note_untrained(self._deployed.spec, verifier.table)
        self._progress = self._stack.enter_context(Progress("compared", len(verifier), "steps"))

    def step(self, _: StepErrors) -> None:
        if self._progress is not None:
            self._progress.advance()


def _layers(deployed: Side) -> list[LayerPrecision] | None:
    """Returns what each layer computes in, where onnx and the graph are there to read it."""
    from ddpm_deploy.engines import Engine
    from ddpm_deploy.errors import DDPMDeployError

    if not isinstance(deployed, Engine):
        return None
    try:
        from ddpm_deploy.export.describe import layers
        from ddpm_deploy.export.explain import source_graph
        from ddpm_deploy.export.onnx_file import load_graph

        graph = source_graph(deployed)
        return None if graph is None else layers(load_graph(graph, weights=False))
    except (ImportError, DDPMDeployError):  # the page says that none are known
        return None


@contextmanager
def _report(path: Path) -> Iterator[Path]:
    """Gives a place to write a report to; a suffix that says no form is refused."""
    from ddpm_deploy.engines.base import needs
    from ddpm_deploy.files import whole_file

    if path.suffix not in {"", *REPORTS}:  # no suffix: a device, or a name of one's own
        raise typer.BadParameter(
            f"{path} has the suffix {path.suffix}; reports end in {', '.join(REPORTS)}",
            param_hint="--output",
        )
    if path.suffix == ".html":
        with needs("matplotlib", extra="report"):
            import ddpm_deploy.report  # noqa: F401  (said before the loop, not after)
    with whole_file(path) as partial:
        yield partial


def _text(suffix: str, found: Verification, deployed: Side) -> str:
    match suffix:
        case ".html":
            from ddpm_deploy.report import html

            return html(found, layers=_layers(deployed))
        case ".xml":
            from ddpm_deploy.verify.junit import junit

            return junit(found)
        case ".sarif":
            from ddpm_deploy.verify.sarif import sarif

            return json_module.dumps(sarif(found), indent=2) + "\n"
        case _:
            return json_module.dumps(found.to_dict(), indent=2) + "\n"


def _print(found: Verification, walked: list[str]) -> None:
    count = f"{len(found.images)} image{'' if len(found.images) == 1 else 's'}"
    sides = f"{found.engine['name']} against {found.reference['name']}"
    typer.echo(_wrapped(f"{sides}, {count}, {found.sampled.says}"))
    if found.comparison.steps:
        _print_steps(found)
    result = found.comparison
    for check in result.checks:
        typer.echo(f"{'ok' if check.passed else 'outside'}: {check.says}")
    if result.amplification is not None:
        typer.echo(
            f"amplification: x is off by {result.amplification:.2g} times what the worst step adds"
        )
    if result.pictures is not None:
        psnr, ssim = min(result.pictures.psnr), min(result.pictures.ssim, default=None)
        words = "identical" if psnr == float("inf") else f"PSNR {psnr:.1f} dB at worst"
        words += "" if ssim is None or psnr == float("inf") else f", SSIM {ssim:.4f}"
        typer.echo(f"images: {result.pictures.equal:.3%} of pixels equal, {words}")
    for line in walked:
        typer.echo(_wrapped(f"bisect: {line}"))
    for cause in found.causes:
        typer.echo(_wrapped(f"{'cause' if cause.certain else 'likely cause'}: {cause.says}"))
        for line in cause.evidence:
            typer.echo(_wrapped(f"  evidence: {line}"))
        if cause.mend:
            typer.echo(_wrapped(f"  mend: {cause.mend}"))
    if found.same_checkpoint is False:
        typer.echo("note: the engine was exported from another checkpoint file than this one")
    typer.echo("verdict: " + ("the same model" if found.passed else "NOT the same model"))


def _print_steps(found: Verification) -> None:
    from rich.table import Table

    steps = found.comparison.steps
    table = Table(title="largest error over the reference's peak", title_justify="left")
    for name in ("t", "local out", "local x_0", "local x", "free out", "free x_0", "free x"):
        table.add_column(name, justify="right")
    for i in sorted({round(i * (len(steps) - 1) / (ROWS - 1)) for i in range(ROWS)}):
        step = steps[i]
        parts = [getattr(side, name) for side in (step.local, step.accumulated) for name in _PARTS]
        table.add_row(str(step.t), *(f"{part.max:.1e}" for part in parts))
    print_table(table)


def _wrapped(text: str) -> str:
    indent = " " * (len(text) - len(text.lstrip()) + 2)
    return textwrap.fill(text, 80, subsequent_indent=indent, break_on_hyphens=False)
