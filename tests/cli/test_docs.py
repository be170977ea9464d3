"""The page of the commands is what the commands say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from ddpm_deploy.cli.app import COMMANDS
from tests.support import tiny_spec, write_graph

ROOT = Path(__file__).parents[2]


def test_the_page_of_commands_is_not_stale() -> None:
    generator = runpy.run_path(str(ROOT / "docs" / "generate_cli.py"))
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == generator["render"](), "stale: python docs/generate_cli.py"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_in_the_readme(name: str) -> None:
    assert f"ddpm-deploy {name}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_s_lines_of_python_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.split("```python")[1].split("```")[0]
    folder = tmp_path / "demo" / "out"
    folder.mkdir(parents=True)
    write_graph(folder / "unet.onnx", tiny_spec(classes=10, timesteps=50))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
