"""What is measured of an engine on the machine that will run it: batch, streams, runtime."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from ddpm_deploy.arrays import Array
from ddpm_deploy.engines.base import Engine, installed_runtimes, open_engine
from ddpm_deploy.engines.build import Built, Tune, Write, build_engine
from ddpm_deploy.engines.race import race, winner
from ddpm_deploy.errors import DDPMDeployError, EngineBuildError
from ddpm_deploy.precision import ALIKE
from ddpm_deploy.runtime import Runtime, RuntimeRecord
from ddpm_deploy.tuning import BatchTime, best_batch

LONGEST = 3.0
"""Seconds that the calls of one batch may take while the best batch is looked for."""


class Judge(Protocol):
    """What compares engines of a lower precision with float32."""

    def psnr(self, engine: Engine) -> float:
        """Returns how like float32's an engine's pictures are, in decibels."""

    def shift(self, engine: Engine) -> Array:
        """Returns what each channel of its output is too large by in the mean: (C,)."""


Reopen = Callable[[RuntimeRecord], Engine]
"""Opens an engine as another record says."""


def this_machine(processor: str | None) -> dict[str, str]:
    """Returns what a measurement holds for: the processor, and the runtimes with their versions."""
    found = {"processor": processor or "unknown", "cores": str(len(os.sched_getaffinity(0)))}
    owners = metadata.packages_distributions()  # onnxruntime-gpu has the module onnxruntime
    for name in installed_runtimes():
        packages = sorted({*owners.get(name, ())})
        versions = {package: metadata.version(package) for package in packages}
        found[name] = ", ".join(
            version if package == name else f"{package} {version}"
            for package, version in versions.items()
        )
    return found


def still_holds(before: RuntimeRecord, asked: RuntimeRecord, wanted: Sequence[Runtime]) -> bool:
    """Says whether an engine is what would be built again.

    Args:
        before: What the engine says of itself.
        asked: What is wanted now, here: nothing measured.
        wanted: The runtimes that would be measured.
    """
    measured = replace(
        before,
        runtime=asked.runtime,
        arithmetic=asked.arithmetic,
        streams=asked.streams,
        best_batch=None,
        error=None,
        shift=(),
        psnr=None,
        milliseconds={},
    )
    raced = set(before.milliseconds) or {before.runtime}
    return measured == asked and raced == set(wanted)


def tune(
    engine: Engine,
    record: RuntimeRecord,
    *,
    reopen: Reopen | None,
    cores: int,
    on_progress: Callable[[str], None] = lambda _: None,
    measure: Callable[[Engine], BatchTime] | None = None,
) -> RuntimeRecord:
    """Chooses the batch at which most images are drawn, and into how many parts it is cut.

    Args:
        engine: With one stream.
        record: Its own.
        reopen: Opens it with more streams; None where the runtime has none.
        cores: The most streams.
        on_progress: Told what was measured, in words.
        measure: Returns an engine's best batch; `tuning.best_batch` when None.

    Returns:
        The record with what was best; of equals the fewest streams.

    Raises:
        EngineError: The engine failed.
    """
    fastest = measure or _fastest
    found = {1: fastest(engine)}
    if reopen is not None and cores > 1:
        with reopen(replace(record, streams=cores)) as other:
            found[cores] = fastest(other)
    seconds = {str(n): each.seconds / each.batch for n, each in found.items()}
    streams = int(winner(seconds))
    batch = found[streams].batch
    parts = f" in {streams} streams" if streams > 1 and batch > 1 else ""
    on_progress(f"{record.runtime} is fastest at batch {batch}{parts}")
    return replace(record, streams=streams, best_batch=batch)


def _fastest(engine: Engine) -> BatchTime:
    tried: dict[int, BatchTime] = {}

    def keep(each: BatchTime) -> None:
        tried[each.batch] = each

    return tried[best_batch(engine, longest=LONGEST, on_progress=keep)]


def build_fastest(
    graph: Path,
    output: Path,
    records: Sequence[RuntimeRecord],
    *,
    writer: Callable[[Runtime], Write | None],
    budget: float | None = None,
    judge: Judge | None = None,
    decibels: float | None = None,
    device: str = "auto",
    on_progress: Callable[[str], None] = lambda _: None,
) -> Built:
    """Builds an engine for each runtime, and keeps the fastest.

    Args:
        graph: As in `build_engine`.
        output: Where to, as there.
        records: One a runtime, none of them measured yet; of equals the first is kept.
        writer: Returns what writes a runtime's engine, as in `build_engine`.
        budget: As there.
        judge: Measures what a lower precision costs, and what its mean is off by, which the engine
            then takes off; None where nobody asks.
        decibels: The least that it may say. Where bfloat16 between int8 layers says less, float32
            stands there.
        device: As there.
        on_progress: Told what is being done, in words, and which runtime failed.

    Raises:
        EngineError: None of them could be built, or run; the first one's reason.
        SpecError: As from `build_engine`, and the others.
    """

    def build(record: RuntimeRecord, place: Path, *, measured: bool = False) -> Built:
        write = writer(record.runtime)
        if judge is not None and write is not None and not measured:
            record = _shifted(graph, record, write, judge, budget=budget, device=device)
        tuner = _tuner(judge, decibels, device, on_progress)
        try:
            return build_engine(
                graph,
                place,
                record,
                write=write,
                tune=None if measured or write is None else tuner,
                budget=budget,
                threads=record.threads,
                device=device,
            )
        except _UnlikeError as error:
            if record.precision != "int8" or record.arithmetic == "f32":
                raise
            on_progress(
                f"{error.args[0].split(';')[0]} with bfloat16 between the int8 layers: "
                "float32 there, then"
            )
            return build(replace(record, arithmetic="f32", shift=()), place)

    if len(records) == 1:
        return build(records[0], output)
    made: dict[str, Built] = {}
    failures: list[DDPMDeployError] = []
    with TemporaryDirectory() as folder:
        for record in records:
            on_progress(f"building and measuring for {record.runtime}")
            try:
                made[record.runtime] = build(record, Path(folder) / f"{record.runtime}.onnx")
            except DDPMDeployError as error:
                on_progress(f"not for {record.runtime}: {error}")
                failures.append(error)
        if not made:
            raise failures[0]
        with ExitStack() as stack:
            engines = {
                name: stack.enter_context(
                    open_engine(each.path, threads=each.record.threads, device=device)
                )
                for name, each in made.items()
            }
            batches = {name: each.record.best_batch or 1 for name, each in made.items()}
            seconds = race(engines, batches)
    best = made[winner(seconds)]
    kept = replace(best.record, milliseconds={name: 1000 * s for name, s in seconds.items()})
    return build(kept, output, measured=True)


def _shifted(
    graph: Path,
    record: RuntimeRecord,
    write: Write,
    judge: Judge,
    *,
    budget: float | None,
    device: str,
) -> RuntimeRecord:
    """Builds an engine for a moment, and returns the record with what its mean is off by."""
    with TemporaryDirectory() as folder:
        place = Path(folder) / "unshifted.onnx"
        build_engine(
            graph, place, record, write=write, budget=budget, threads=record.threads, device=device
        )
        with open_engine(place, threads=record.threads, device=device) as engine:
            shift = judge.shift(engine)
    return replace(record, shift=tuple(float(each) for each in shift))


class _UnlikeError(EngineBuildError):
    """An engine's pictures are further from float32's than was allowed."""


def _tuner(
    judge: Judge | None,
    decibels: float | None,
    device: str,
    on_progress: Callable[[str], None],
) -> Tune:
    def measured(engine: Engine, record: RuntimeRecord) -> RuntimeRecord:
        if judge is not None:
            found = judge.psnr(engine)
            if decibels is not None and not found >= decibels:
                raise _UnlikeError(
                    f"The worst image of a short loop is {found:.1f} dB from float32's; "
                    f"{decibels:g} are asked for. Nothing was written.",
                    hint="Allow more: --budget psnr=" + str(max(1, math.floor(found))),
                )
            on_progress(f"the worst image of a short loop is {found:.1f} dB from float32's")
            record = replace(record, psnr=min(found, ALIKE))
        reopen: Reopen | None = None
        if record.runtime == "openvino":
            from ddpm_deploy.engines.openvino import OpenVinoEngine  # noqa: PLC0415

            def reopen_parted(other: RuntimeRecord) -> Engine:
                return OpenVinoEngine(
                    engine.path, threads=other.threads, device=device, record=other, cache=False
                )

            reopen = reopen_parted
        cores = record.threads or len(os.sched_getaffinity(0))
        return tune(engine, record, reopen=reopen, cores=cores, on_progress=on_progress)

    return measured
