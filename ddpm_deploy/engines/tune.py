"""What is measured of an engine on the machine that will run it: its streams, and the runtime."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ddpm_deploy.engines.base import Engine
from ddpm_deploy.engines.race import race, winner
from ddpm_deploy.runtime import Runtime, RuntimeRecord


def installed_runtimes() -> list[Runtime]:
    """Returns the runtimes for a CPU that are there, without importing them."""
    known: list[Runtime] = ["onnxruntime", "openvino"]
    return [name for name in known if find_spec(name) is not None]


def this_machine() -> dict[str, str]:
    """Returns what a measurement holds for: the processor, and the runtimes with their versions."""
    found = {"processor": _processor(), "cores": str(os.cpu_count() or 1)}
    owners = metadata.packages_distributions()  # onnxruntime-gpu has the module onnxruntime
    for name in installed_runtimes():
        found[name] = " ".join(
            f"{owner} {metadata.version(owner)}" for owner in sorted({*owners.get(name, ())})
        )
    return found


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def tune_streams(
    record: RuntimeRecord,
    reopen: Callable[[RuntimeRecord], Engine],
    *,
    batch: int,
    cores: int | None = None,
) -> RuntimeRecord:
    """Chooses into how many parts a batch is cut, which run side by side.

    Args:
        record: Of the engine.
        reopen: Opens it with another record.
        batch: Samples at once.
        cores: Most streams; this machine's cores when None.

    Returns:
        The record with the fastest number of streams; of equals the smallest.

    Raises:
        EngineError: The engine failed.
    """
    most = min(batch, cores or os.cpu_count() or 1)
    counts = [1]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    if len(counts) == 1:
        return replace(record, streams=1)
    records = {str(count): replace(record, streams=count) for count in counts}
    engines = {name: reopen(each) for name, each in records.items()}
    try:
        return records[winner(race(engines, batch))]
    finally:
        for engine in engines.values():
            engine.close()


def still_holds(record: RuntimeRecord, graph_sha256: str, machine: Mapping[str, str]) -> bool:
    """Says whether what was measured for a graph on a machine would be measured again."""
    return record.graph_sha256 == graph_sha256 and dict(record.machine) == dict(machine)
