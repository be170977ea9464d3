from __future__ import annotations

import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from ddpm_deploy import __version__
from ddpm_deploy.cli import app as app_module
from ddpm_deploy.cli.app import COMMANDS
from tests.commands import finish, refusal, run, start
from tests.support import tiny_spec, write_graph


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an engine in it, in which every command runs, on 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    write_graph(Path("unet.onnx"), tiny_spec())
    return tmp_path


def test_the_version_is_one_line() -> None:
    assert run("--version") == (0, f"ddpm-deploy {__version__}\n", "")


def test_help_lists_every_command_in_the_order_of_a_model_s_life() -> None:
    outcome = run("--help")
    assert (outcome.code, outcome.err) == (0, "")
    _, commands = outcome.out.split("Commands:\n")
    assert [line.split()[0] for line in commands.splitlines() if line[2:3].strip()] == list(
        COMMANDS
    )
    assert "Exit codes: 0 done; 1 a check said no" in outcome.out


def test_each_file_of_the_room_is_a_command() -> None:
    room = Path(app_module.__file__).parent
    # `facts` is what inspect says; `plan`, `cpu` and `int8` are parts of build, `rebuild` is one of
    # sample, `describe_checkpoint` what export and inspect say of a checkpoint.
    shared = {
        "__init__",
        "app",
        "common",
        "cpu",
        "describe_checkpoint",
        "facts",
        "int8",
        "plan",
        "rebuild",
    }
    files = {path.stem for path in room.glob("*.py")} - shared
    assert files == set(COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_help_fits_80_columns(command: str) -> None:
    outcome = run(*command.split(), "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("Usage: ")
    assert outcome.out == run(*command.split(), "-h").out
    wide = [line for line in outcome.out.splitlines() if len(line) > 80]
    assert wide == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(command: str) -> None:
    text = import_module(f"ddpm_deploy.cli.{command}").command.__doc__
    assert text
    first = text.splitlines()[0]
    assert first.endswith(".")
    assert len(first) > 20
    assert first in run(command, "--help").out


@pytest.mark.parametrize("arguments", [["smaple"], ["--colour"], ["sample", "--colour"], []])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "Usage: " in outcome.err + outcome.out


def test_the_module_is_the_command() -> None:
    outcome = finish(start("--version"))
    assert outcome == (0, f"ddpm-deploy {__version__}\n", "")


@pytest.mark.parametrize(
    "command", ["--help", "sample --help", "doctor", "doctor --json", "inspect unet.onnx"]
)
def test_a_reader_that_leaves_early_is_no_error(command: str) -> None:
    process = start(*command.split())
    assert process.stdout is not None
    process.stdout.close()  # `| head` that has seen enough
    process.stdout = None
    outcome = finish(process)
    assert outcome.err == ""
    assert outcome.code in {0, 1}  # 1 is how Typer's own --help ends then


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Makes `doctor` fail in its middle."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("ddpm_deploy.doctor.examine", fail)


def test_ctrl_c_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert run("doctor") == (130, "", "interrupted; nothing half-written is left behind\n")


def test_ctrl_c_reaches_a_running_command() -> None:
    code = (
        "import time, ddpm_deploy.doctor as d\n"
        "d.examine = lambda: (print('on', flush=True), time.sleep(60))\n"
        "from ddpm_deploy.cli.app import main; main()"
    )
    process = start("doctor", python=["-c", code])
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    outcome = finish(process)
    assert outcome == (130, "", "interrupted; nothing half-written is left behind\n")


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, MemoryError("Unable to allocate 8 TiB"))
    outcome = run("doctor")
    assert refusal(outcome) == "Out of memory: Unable to allocate 8 TiB"
    assert " hint: Try a smaller --batch." in outcome.err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "/root/x"), "Permission denied: /root/x."),
        (OSError(28, "No space left on device"), "No space left on device."),
        (FileExistsError(17, "File exists", "a"), "A file stands where a folder is needed: a."),
        (OSError("3 requested and 0 written"), "3 requested and 0 written."),
    ],
)
def test_what_the_system_refuses_is_one_message(
    monkeypatch: pytest.MonkeyPatch, error: OSError, message: str
) -> None:
    fail_with(monkeypatch, error)
    assert refusal(run("doctor")) == message


def test_our_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        run("doctor")


def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("ddpm-deploy")
    if not script.exists():
        pytest.skip("the package is not installed into this Python")
    result = subprocess.run([script, "--version"], check=True, capture_output=True, text=True)
    assert result.stdout == f"ddpm-deploy {__version__}\n"
