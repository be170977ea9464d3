"""How `sample` opens a plan that may have to be built again first."""

from __future__ import annotations

import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import typer

from ddpm_deploy.cli.common import note
from ddpm_deploy.engines import Engine, open_engine
from ddpm_deploy.engines.device import find_device
from ddpm_deploy.engines.plan import read_record
from ddpm_deploy.engines.rebuild import rebuild_arguments
from ddpm_deploy.errors import EngineError, PlanMismatchError
from ddpm_deploy.spec import ModelSpec


def open_or_rebuild(
    path: Path,
    *,
    rebuild: bool,
    threads: int | None,
    device: str,
    spec: ModelSpec | None = None,
    model: str | None = None,
) -> Engine:
    """Opens an engine; a plan that is not for this machine is built again, if that is wanted.

    Args:
        path: As for `open_engine`, and the rest too.
        rebuild: Whether to build; else the error's hint says that `--rebuild` does.
        threads: CPU threads.
        device: `cpu`, `cuda` or `auto`.
        spec: What a checkpoint is that does not say.
        model: The code of a user's own network.

    Raises:
        EngineError: As from `open_engine`; or nothing says how the plan was built.
        typer.Exit: The build failed, or was stopped by Ctrl-C. It has said why.
    """
    if rebuild and path.suffix != ".plan":
        raise EngineError(
            f"--rebuild is for a TensorRT plan; {path} is none.", hint="Leave --rebuild out."
        )
    try:
        return open_engine(path, threads=threads, device=device, spec=spec, model=model)
    except PlanMismatchError as mismatch:
        record = read_record(path)
        if not rebuild:
            mismatch.hint += (
                f"\nWith {Path(record.graph).name} beside the plan, --rebuild does that."
            )
            raise
        arguments = rebuild_arguments(path, record, mismatch)
        if find_device() is None:  # said before a build that takes minutes
            raise EngineError(
                f"{path} is not built again: there is no NVIDIA GPU here, or no driver for it.",
                hint=f"Run its graph on the CPU: --engine {arguments[1]}",
            ) from mismatch
        note(f"{mismatch}\nbuilding it again: ddpm-deploy {shlex.join(arguments)}")
    except EngineError:
        if rebuild:
            _check_whole(path)
        raise
    _build(arguments)
    return open_engine(path, threads=threads, device=device)


def _check_whole(plan: Path) -> None:
    """Raises EngineError where plan and sidecar do not say how the plan was built."""
    try:
        read_record(plan)
    except EngineError as error:
        raise EngineError(
            f"{error} So --rebuild cannot know what to build.", hint=error.hint
        ) from error


def _build(arguments: list[str]) -> None:
    """Runs the command `build` with its own messages; the path that it prints is no result here."""
    from ddpm_deploy.cli.app import app

    with redirect_stdout(sys.stderr):
        code = typer.main.get_command(app).main(
            arguments, prog_name="ddpm-deploy", standalone_mode=False
        )
    if code:
        raise typer.Exit(code)
