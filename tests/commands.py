"""Running commands in tests: in this process, or in one of their own where signals matter."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from typer.testing import CliRunner

from ddpm_deploy.cli.app import app


class Outcome(NamedTuple):
    """What a command did: its exit code, and what it wrote where."""

    code: int
    out: str
    err: str


def run(*arguments: object) -> Outcome:
    """Runs a command in this process; an error that is not ours fails the test."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Outcome(result.exit_code, result.stdout, result.stderr)


def start(*arguments: object, python: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Starts a command as a process of its own that Ctrl-C reaches.

    Args:
        *arguments: The command and its options.
        python: Instead of `-m ddpm_deploy`: what Python runs.
    """
    return subprocess.Popen(
        [sys.executable, *(python or ("-m", "ddpm_deploy")), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def finish(process: subprocess.Popen[str]) -> Outcome:
    """Waits for a process."""
    with process:
        out, err = process.communicate(timeout=100)
    return Outcome(process.returncode, out, err)


def builder(process: subprocess.Popen[str]) -> int:
    """Waits for the process that a command builds its plan in, and returns its number."""
    for _ in range(600):
        for number in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            if "trt_worker" in Path(f"/proc/{number}/cmdline").read_text():
                return int(number)
        time.sleep(0.05)
    raise AssertionError(finish(process))


def gone(number: int) -> bool:
    """Waits for a process to end."""
    for _ in range(200):
        state = Path(f"/proc/{number}/stat")
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def refusal(outcome: Outcome) -> str:
    """Returns the one message of a command that could not; checks that there is just that one."""
    lines = outcome.err.splitlines()
    assert outcome.code == 2, outcome
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, outcome.err
    return errors[0].removeprefix("error: ")


def contents(folder: Path) -> dict[str, bytes | None]:
    """Returns the bytes of every file below a folder, hidden ones too; None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
