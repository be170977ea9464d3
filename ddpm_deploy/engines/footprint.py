"""What an engine costs besides its steps: memory and time to start, in a process of its own.

Memory belongs to a process, so each contender gets one. It opens the network, makes a few steps,
and says what that took. `python -m ddpm_deploy.engines.footprint` is that process.
"""

from __future__ import annotations

import json
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from ddpm_deploy.engines.contenders import Contender
from ddpm_deploy.errors import EngineError
from ddpm_deploy.run import Recipe
from ddpm_deploy.spec import ModelSpec

STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a start of a contender took.

    Attributes:
        peak_memory: Bytes at most, above Python with NumPy and this package, the runtime's own
            included; None where the system does not tell.
        load: Seconds from opening to the end of the first step, importing the runtime included.
        cold_start: Seconds from the start of the process to the end of the first step.
    """

    peak_memory: int | None
    load: float
    cold_start: float


def footprint(
    contender: Contender,
    recipe: Recipe,
    batch: int,
    *,
    spec: ModelSpec | None = None,
    patience: float = 900.0,
) -> Footprint:
    """Measures a contender in a process of its own.

    An engine that keeps a cache beside its file writes it at its first start; the start that is
    measured is a later one.

    Args:
        contender: What to measure.
        recipe: What loop it is.
        batch: Images at once.
        spec: What the network is, for a checkpoint that does not say.
        patience: Seconds for the process.

    Raises:
        EngineError: It failed there, or was killed.
    """
    cache = contender.path and contender.path.with_name(contender.path.name + ".cache")
    before = cache is not None and cache.exists()
    found = _start(contender, recipe, batch, spec, patience)
    if cache is not None and cache.exists() and not before:
        found = _start(contender, recipe, batch, spec, patience)
    return found


def _start(
    contender: Contender, recipe: Recipe, batch: int, spec: ModelSpec | None, patience: float
) -> Footprint:
    job = pickle.dumps((time.monotonic(), contender, recipe, batch, spec))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ddpm_deploy.engines.footprint"],
            input=job,
            capture_output=True,
            check=False,
            timeout=patience,
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(f"It made no step within {patience:.0f} s.") from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise EngineError(
            f"Its process ended with {name}.",
            hint="The machine may have run out of memory: type a smaller --batch."
            if name == "SIGKILL"
            else "Run it alone to see more: ddpm-deploy sample --engine FILE",
        )
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        text = done.stderr.decode(errors="replace").strip().splitlines()
        last = text[-1] if text else f"exit code {done.returncode}"
        raise EngineError(f"Its process ended with: {last}") from error
    if "error" in said:
        raise EngineError(said["error"], hint=said["hint"])
    return Footprint(**said)


def memory(what: str) -> int | None:
    """Returns a line of /proc/self/status in bytes; None where there is no such file.

    `VmHWM` is this program's peak; getrusage's would begin with that of the process that started
    it.
    """
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{what}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def main() -> None:
    """Does what stands on stdin, and prints a `Footprint`, or an error, as JSON."""
    job = pickle.loads(sys.stdin.buffer.read())  # noqa: S301  (from the process that started us)
    began, contender, recipe, batch, spec = job
    baseline = memory("VmRSS")
    opening = time.monotonic()
    try:
        engine = contender.open(spec)
        loop = contender.loop(engine, recipe, batch)
        for _ in loop(1):
            pass
        first = time.monotonic()
        for _ in loop(STEPS):
            pass
        peak = memory("VmHWM")
    except Exception as error:  # noqa: BLE001  (a runtime's errors have no common class)
        from ddpm_deploy.engines.contenders import failure  # noqa: PLC0415

        found = failure(contender.label, batch, error)
        print(json.dumps({"error": found.reason, "hint": found.hint}))
        return
    taken = Footprint(
        peak_memory=None if peak is None or baseline is None else peak - baseline,
        load=first - opening,
        cold_start=first - began,
    )
    print(json.dumps(asdict(taken)), flush=True)


if __name__ == "__main__":
    main()
