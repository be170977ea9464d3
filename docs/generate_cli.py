"""Writes docs/cli.md from the commands' own --help: python docs/generate_cli.py."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from ddpm_deploy.cli.app import COMMANDS, app

PAGE = Path(__file__).with_name("cli.md")

HEADER = """# The commands

Written from `--help` by `python docs/generate_cli.py`; a test fails when it is stale.

stdout is the result, a path a line, or JSON with `--json`; stderr is progress, `error:` and
` hint:`. Exit codes: 0 done; 1 a check said no (`verify`, `doctor`); 2 could not (bad input,
missing runtime, usage); 130 stopped by Ctrl-C; 143 `train` stopped by SIGTERM.
"""


def render() -> str:
    """Returns the page as it should be."""
    runner = CliRunner(env={"COLUMNS": "80", "TERM": "dumb"})
    parts = [HEADER]
    for arguments in ([], *([name] for name in COMMANDS)):
        text = runner.invoke(app, [*arguments, "--help"], prog_name="ddpm-deploy").stdout
        title = " ".join(["ddpm-deploy", *arguments])
        lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
        parts.append(f"## {title}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
