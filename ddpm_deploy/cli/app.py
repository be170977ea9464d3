"""The app: its commands, and how errors become one message and an exit code."""

from __future__ import annotations

import errno
import os
from importlib import import_module
from typing import Annotated, Any

import typer
import typer.core

from ddpm_deploy._version import __version__
from ddpm_deploy.errors import DDPMDeployError

COMMANDS = (
    "train",
    "export",
    "build",
    "sample",
    "verify",
    "budget",
    "trace",
    "nll",
    "noise",
    "bench",
    "inspect",
    "doctor",
)
"""In the order of a model's life; each is a file of this folder with a function `command`."""

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

_HINTS = {
    errno.ENOENT: "Check the path.",
    errno.EACCES: "Write elsewhere with -o, or free some space.",
}


class _Group(typer.core.TyperGroup):
    """Turns errors into `error:` and ` hint:` on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DDPMDeployError as error:
            _say(str(error), error.hint)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted; nothing half-written is left behind", err=True)
            raise typer.Exit(INTERRUPTED) from error
        except MemoryError as error:
            _say(f"Out of memory: {error}", "Try a smaller --batch.")
            raise typer.Exit(2) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output left: `| head`
                raise typer.Exit(0) from error
            where = f": {error.filename}" if error.filename else ""
            what = error.strerror or str(error)
            if error.errno == errno.EEXIST:  # from making a folder
                what = "A file stands where a folder is needed"
            _say(f"{what}{where}.", _HINTS.get(error.errno or 0, _HINTS[errno.EACCES]))
            raise typer.Exit(2) from error

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002  (the base class's)
        return list(self.commands)


def _say(message: str, hint: str) -> None:
    typer.echo(typer.style("error:", fg=typer.colors.RED, bold=True) + f" {message}", err=True)
    if hint:
        typer.echo(typer.style(" hint:", fg=typer.colors.CYAN, bold=True) + f" {hint}", err=True)


app = typer.Typer(
    cls=_Group,
    name="ddpm-deploy",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
for _name in COMMANDS:
    app.command(_name)(import_module(f"ddpm_deploy.cli.{_name}").command)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ddpm-deploy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    ctx: typer.Context,
    version: Annotated[  # noqa: ARG001  (its callback has done it)
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run a PyTorch diffusion model on the edge, and prove that it is the same.

    Exit codes: 0 done; 1 a check said no (verify, doctor); 2 could not (bad
    input, missing runtime, usage); 130 stopped by Ctrl-C.
    """
    if ctx.invoked_subcommand != "bench":  # which times PyTorch as it comes
        # Threads that spin while they wait starve each other, and ONNX Runtime's beside them,
        # where cores are shared: a step of 10 ms then takes 500. OpenMP reads this when torch is
        # imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """Runs the command line."""
    app()
