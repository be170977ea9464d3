"""`ddpm-deploy bench`: engines side by side with PyTorch and with what else people use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_deploy.cli.common import (
    Device,
    Json,
    ModelName,
    Observe,
    Respacing,
    Seed,
    note,
    print_json,
    print_table,
    rate,
    recipe_of,
    settings,
    size,
)

if TYPE_CHECKING:
    from ddpm_deploy.bench import Measurement
    from ddpm_deploy.engines.contenders import Contender, Contest, Failure, Opened
    from ddpm_deploy.engines.footprint import Footprint
    from ddpm_deploy.run import Recipe
    from ddpm_deploy.spec import ModelSpec

LAYERS = 15
"""Layers that `--layers` prints of each engine."""

PACKAGES = ("torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "diffusers")
"""Packages whose versions stand in the report."""

Footprints = dict[tuple[str, int], "Footprint"]
"""By a contender's label, and the batch."""


def command(
    engine: Annotated[
        list[Path] | None, typer.Option("--engine", "-e", help="Engine to time; may be repeated.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option("--against", help="Checkpoint for the loop in PyTorch.")
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            help="Time what people use instead: torch.compile, diffusers, plain runtimes.",
        ),
    ] = False,
    engines: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Rows to keep, by runtime or precision: openvino,bf16."),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Images at once, 1 if left out; may be repeated."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps a turn.")] = 20,
    repeat: Annotated[int, typer.Option(min=1, help="Turns each; the engines take turns.")] = 5,
    warm_up: Annotated[int, typer.Option(min=1, help="Steps before the clock starts.")] = 5,
    respacing: Respacing = None,
    seed: Seed = 0,
    observe: Observe = None,
    model: ModelName = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="CPU threads of every row; one a core if left out."),
    ] = None,
    device: Device = "auto",
    memory: Annotated[
        bool,
        typer.Option(
            "--memory/--no-memory",
            help="Start each in a process of its own, too, for memory and time to start.",
        ),
    ] = True,
    layers: Annotated[
        bool, typer.Option("--layers", help="Say what each engine's layers take, too.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw images/s with their errors: .svg or .png.")
    ] = None,
    json: Json = False,
) -> None:
    """Time steps of the sampling loop, each engine side by side.

    The engines take turns in one process, with the same threads. Memory and the
    time to start are those of a process of its own for each: memory is its peak
    above Python with NumPy, load is from opening to the first step's end, start
    from the process's own start. Time on an idle machine: where cores are shared,
    runtimes whose threads spin, as PyTorch's do, lose most.

    loop s is the family's own sampler over all its steps, or those of
    --respacing; images/s too. error is the output's largest error over the peak
    of PyTorch's, or the first row's, on the same input. Ratios are to the torch
    loop, or the first row.

    What cannot run says why and stops nothing. Exit codes: 0 something was
    measured; 2 nothing was, or bad input.
    """
    import os

    from ddpm_deploy._version import __version__
    from ddpm_deploy.doctor import machine, read_system
    from ddpm_deploy.engines.base import check_path, is_checkpoint
    from ddpm_deploy.engines.contenders import (
        LABELS,
        Contender,
        close_all,
        contest,
        open_all,
        spec_of_first,
    )
    from ddpm_deploy.engines.contenders import peers as all_peers
    from ddpm_deploy.errors import EngineError

    if against is not None:
        check_path(against)
        if not is_checkpoint(against):
            raise EngineError(
                f"{against} is no checkpoint, so it has no loop in PyTorch.",
                hint=f"Time it as an engine: --engine {against}",
            )
    if plot is not None:
        _check_plot(plot)
    system = read_system(runtimes=())
    cores = system.physical_cores(os.sched_getaffinity(0))
    threads = threads or cores
    paths = list(dict.fromkeys(engine or [Path("unet.onnx")]))
    alike = len({path.name for path in paths}) < len(paths)
    contenders = [
        Contender(
            kind="engine",
            path=path,
            label=str(path) if alike else path.name,
            threads=threads,
            device=device,
            model=model,
        )
        for path in paths
    ]
    if peers:
        contenders = [
            *all_peers(against, paths, threads=threads, device=device, model=model),
            *contenders,
        ]
    if against is not None or peers:
        torch = Contender(
            kind="torch",
            path=against,
            label=LABELS["torch"],
            threads=threads,
            device=device,
            model=model,
        )
        contenders = [torch, *contenders]
    contenders = _chosen(contenders, engines)
    batches = list(dict.fromkeys(batch or [1]))
    spec = spec_of_first(contenders)
    _note_busy(cores)
    footprints: Footprints = {}
    failures: list[Failure] = []
    recipe = None
    if spec is not None:
        recipe = recipe_of(
            spec,
            seed=seed,
            sampler=None,
            steps=None,
            eta=None,
            spacing=None,
            label=None,
            guidance=1.0,
            observe=observe,
            example=True,
            respacing=respacing,
        )
        if memory:
            # Before anything is opened here: what crashes or fills the memory does so there.
            footprints, failures = _footprints(contenders, recipe, batches, spec)
    crashed = {(each.name, each.batch) for each in failures}
    whole = [c for c in contenders if not all((c.label, b) in crashed for b in batches)]
    opened, unopened = open_all(whole, spec=spec)
    failures = _merged(failures, unopened, batches)
    contests: list[Contest] = []
    if recipe is not None and opened:
        hint = "Time engines of one schedule, or leave --respacing out."
        for each in batches:
            present = [o for o in opened if (o.contender.label, each) not in crashed]
            with settings(hint):
                lengths = [o.length(recipe) for o in present]
                note(
                    f"timing at batch {each}: {len(present)} x {repeat} turns of "
                    f"{min(steps, *lengths, steps)} steps"
                )
                found = contest(
                    present, recipe, batch=each, steps=steps, repeat=repeat, warm_up=warm_up
                )
            contests.append(found)
            failures += found.failures
    if not any(found.results for found in contests):
        raise _nothing(failures)
    profiles = _profiles(opened, batches) if layers else []
    close_all(opened)
    by_name = {each.name: each for each in opened}
    if json:
        print_json(
            {
                "tool": f"ddpm-deploy {__version__}",
                "machine": {**machine(system), "physical_cores": cores},
                "runtimes": _versions(system.distributions),
                "threads": threads,
                "results": [
                    result for found in contests for result in _results(found, by_name, footprints)
                ],
                "failed": [
                    {"name": f.name, "batch": f.batch, "reason": f.reason, "hint": f.hint}
                    for f in failures
                ],
                **({"layers": profiles} if layers else {}),
            }
        )
    else:
        for found in contests:
            lengths = [
                by_name[result.name].length(recipe)  # type: ignore[arg-type]
                for result in found.results
            ]
            _print_contest(found, lengths, by_name, footprints)
        _print_failures(failures)
        for profile in profiles:
            _print_profile(profile)
    if plot is not None:
        cpu = system.cpu or system.processor
        title = f"{cpu}, {threads} {'thread' if threads == 1 else 'threads'}"
        _draw(plot, contests, by_name, title=f"{title}, ddpm-deploy {__version__}")
        note(f"chart: {plot}")


def _note_busy(cores: int) -> None:
    """Says so where other programs want the cores."""
    import os

    load = os.getloadavg()[0]
    if load > cores / 2:
        note(
            f"note: the machine is busy (load {load:.1f} on {cores} cores); runtimes whose threads "
            "spin, as PyTorch's do, suffer most, so do not quote these figures"
        )


def _check_plot(path: Path) -> None:
    from ddpm_deploy.engines.base import needs

    with needs("matplotlib", extra="report"):
        from ddpm_deploy.report.speed import SUFFIXES
    if path.suffix not in SUFFIXES:
        raise typer.BadParameter(
            f"{path} has the suffix {path.suffix!r}; charts end in {' or '.join(SUFFIXES)}",
            param_hint="--plot",
        )


def _chosen(contenders: Sequence[Contender], names: str | None) -> list[Contender]:
    """Returns the rows that `--engines` names; all where it was left out."""
    if names is None:
        return list(contenders)
    wanted = {name.strip() for name in names.split(",")}
    known = set[str]().union(*(each.words for each in contenders))
    if unknown := wanted - known:
        raise typer.BadParameter(
            f"{min(unknown)!r} is no row's runtime or precision; these rows have "
            f"{', '.join(sorted(known))}",
            param_hint="--engines",
        )
    return [each for each in contenders if each.words & wanted]


def _footprints(
    contenders: Sequence[Contender], recipe: Recipe, batches: Sequence[int], spec: ModelSpec
) -> tuple[Footprints, list[Failure]]:
    from ddpm_deploy.engines.contenders import failure
    from ddpm_deploy.engines.footprint import footprint

    note(f"starting each of {len(contenders)} alone, for memory and time (--no-memory leaves out)")
    found: Footprints = {}
    failures = []
    for batch in batches:
        for each in contenders:
            try:
                found[each.label, batch] = footprint(each, recipe, batch, spec=spec)
            except Exception as error:  # noqa: BLE001, PERF203  (one must not stop the others)
                failures.append(failure(each.label, batch, error))
    return found, failures


def _merged(
    failures: Sequence[Failure], unopened: Sequence[Failure], batches: Sequence[int]
) -> list[Failure]:
    """Says once what fails at every batch."""
    from dataclasses import replace

    merged: list[Failure] = []
    for each in (*failures, *unopened):
        same = [f for f in failures if (f.name, f.reason) == (each.name, each.reason)]
        whole = replace(each, batch=None) if len(same) == len(batches) else each
        if whole not in merged and not any(f.name == each.name and f.batch is None for f in merged):
            merged.append(whole)
    return merged


def _nothing(failures: Sequence[Failure]) -> Exception:
    """Returns the error of a table without a row."""
    from ddpm_deploy.errors import EngineError

    if len(failures) == 1:
        return EngineError(failures[0].reason, hint=failures[0].hint)
    said = "; ".join(f"{each.name}: {each.reason.rstrip('.')}" for each in failures)
    hint = next((each.hint for each in failures if each.hint), "")
    return EngineError(f"Nothing could be timed. {said}.", hint=hint)


def _versions(distributions: Any) -> dict[str, str]:
    return {name: distributions[name].version for name in PACKAGES if name in distributions}


def _results(
    found: Contest, by_name: dict[str, Opened], footprints: Footprints
) -> Iterator[dict[str, Any]]:
    """Yields what `--json` says of each row; times in seconds, sizes in bytes."""
    from dataclasses import asdict

    base = found.results[0].median if found.results else 1.0
    for result in found.results:
        opened = by_name[result.name]
        cost = footprints.get((opened.contender.label, found.batch))
        yield {
            **asdict(result),
            "steps_per_second": result.steps_per_second,
            "ratio": base / result.median,
            "error": found.errors[result.name],
            "error_against": found.reference,
            "kind": opened.contender.kind,
            "precision": opened.engine.precision,
            "path": str(opened.contender.path),
            "size": opened.contender.size,
            "peak_memory": cost and cost.peak_memory,
            "load": cost and cost.load,
            "cold_start": cost and cost.cold_start,
        }


def _print_contest(
    found: Contest, lengths: Sequence[int], by_name: dict[str, Opened], footprints: Footprints
) -> None:
    """Prints the two tables of a batch size: speed and error, then what a start takes."""
    if not found.results:
        return
    length = " or ".join(map(str, dict.fromkeys(lengths)))
    rows = list(_results(found, by_name, footprints))
    speed = [
        (
            row["name"],
            _milliseconds(row["median"]),
            _milliseconds(row["p90"]),
            rate(row["loop"]),
            rate(row["images_per_second"]),
            _error(row["error"]),
            f"{row['ratio']:.2f}",
        )
        for row in rows
    ]
    title = f"batch {found.batch}, {length} steps an image"
    _print_rows(title, ("loop", "step ms", "p90", "loop s", "images/s", "error", "ratio"), speed)
    costs = [
        (
            row["name"],
            "" if row["peak_memory"] is None else size(row["peak_memory"]),
            "" if row["load"] is None else f"{row['load']:.2f}",
            "" if row["cold_start"] is None else f"{row['cold_start']:.2f}",
            "" if row["size"] is None else size(row["size"]),
            "" if row["overhead"] == 0 else f"{row['overhead']:.1%}",
        )
        for row in rows
    ]
    columns = ("loop", "memory", "load s", "start s", "on disk", "loop's own")
    _print_rows(f"batch {found.batch}, what it takes", columns, costs)
    typer.echo(f"error: largest, over the peak, against {found.reference}\n")


def _print_rows(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table

    typer.echo(title)  # rich would fold it at the table's width
    table = Table(box=box.SIMPLE, pad_edge=False)
    for name in columns:
        if name in {"loop", "layer", "operator"}:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def _milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"


def _error(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.1e}"


def _print_failures(failures: Sequence[Failure]) -> None:
    for each in failures:
        where = "" if each.batch is None else f" at batch {each.batch}"
        hint = f" {each.hint}" if each.hint else ""
        typer.echo(f"not timed{where}: {each.name}: {each.reason}{hint}")


def _profiles(opened: Sequence[Opened], batches: Sequence[int]) -> list[dict[str, Any]]:
    """Returns what each engine's layers take, where its runtime tells; in seconds a call."""
    from ddpm_deploy.engines.contenders import layers

    profiles = []
    for each in opened:
        if each.contender.kind != "engine":
            continue
        for batch in batches:
            taken = list(layers(each.engine, batch))
            operators: dict[str, float] = {}
            for _, kind, seconds in taken:
                operators[kind] = operators.get(kind, 0.0) + seconds
            profiles.append(
                {
                    "name": each.name,
                    "batch": batch,
                    "layers": [{"name": n, "operator": k, "seconds": s} for n, k, s in taken],
                    "operators": dict(sorted(operators.items(), key=lambda item: -item[1])),
                }
            )
    return profiles


def _print_profile(profile: dict[str, Any]) -> None:
    title = f"{profile['name']}, batch {profile['batch']}"
    total = sum(profile["operators"].values())
    if not total:
        typer.echo(f"{title}: its runtime does not tell what layers take")
        return
    slowest = [
        (each["name"], each["operator"], f"{1000 * each['seconds']:.2f}", f"{share:.1%}")
        for each in profile["layers"][:LAYERS]
        for share in [each["seconds"] / total]
    ]
    _print_rows(f"{title}: slowest layers", ("layer", "operator", "ms", "share"), slowest)
    totals = [
        (kind, f"{1000 * seconds:.2f}", f"{seconds / total:.1%}")
        for kind, seconds in list(profile["operators"].items())[:LAYERS]
    ]
    _print_rows(f"{title}: by operator", ("operator", "ms", "share"), totals)


def _draw(
    path: Path, contests: Sequence[Contest], by_name: dict[str, Opened], *, title: str
) -> None:
    from ddpm_deploy.report.speed import Bar, write_chart

    def bar(found: Contest, result: Measurement) -> Bar:
        return Bar(
            name=result.name,
            images_per_second=result.images_per_second,
            error=found.errors[result.name],
            peer=by_name[result.name].contender.kind != "engine",
        )

    groups = [
        (f"batch {found.batch}", [bar(found, result) for result in found.results])
        for found in contests
        if found.results
    ]
    write_chart(groups, path, title=title)
