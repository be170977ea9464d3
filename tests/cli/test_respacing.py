"""`--respacing`, which the commands of a loop share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ddpm_deploy.cli.app import app
from tests.support import tiny_spec, write_checkpoint, write_graph


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "unet.onnx", tiny_spec())


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("typed", "sampler", "steps"),
    [
        (["5"], "ddpm", [19, 14, 10, 5, 0]),  # strides of 4.75; 9.5 goes to the even neighbour
        (["2,1"], "ddpm", [10, 9, 0]),
        (["ddim5"], "ddim", [16, 12, 8, 4, 0]),
        (["ddim5", "--sampler", "ddpm"], "ddpm", [16, 12, 8, 4, 0]),
        (["2,1", "--sampler", "ddim"], "ddim", [10, 9, 0]),
    ],
)
def test_a_run_visits_the_timesteps_that_were_typed(
    engine: Path, tmp_path: Path, typed: list[str], sampler: str, steps: list[int]
) -> None:
    folder = tmp_path / "run"
    result = invoke("sample", "-e", engine, "-n", 1, "-o", folder, "--respacing", *typed)
    assert result.exit_code == 0, result.output
    loop = json.loads((folder / "run.json").read_text(encoding="utf-8"))["identity"]
    assert (loop["sampler"], loop["steps"]) == (sampler, steps)
    again = invoke("sample", "-e", engine, "-n", 1, "-o", folder, "--respacing", *typed, "--json")
    assert json.loads(again.stdout)["drawn"] == 0


def test_two_ways_of_choosing_timesteps_are_refused(engine: Path) -> None:
    for option in (["--steps", 5], ["--spacing", "trailing"]):
        result = invoke("sample", "-e", engine, "--respacing", "5", *option)
        assert result.exit_code == 2
        assert "it chooses the timesteps itself" in " ".join(result.output.split())
    for command in ("verify", "budget"):
        target = [engine] if command == "budget" else ["-e", engine, "--against", engine]
        result = invoke(command, *target, "--timesteps", 5, "--respacing", "5")
        assert result.exit_code == 2, result.output


def test_what_does_not_fit_the_schedule_says_what_to_type(engine: Path) -> None:
    for text, what in [("30", "keeps 30 timesteps of 20"), ("ddim15", "nearest is ddim10")]:
        result = invoke("sample", "-e", engine, "--respacing", text)
        assert result.exit_code == 2
        assert what in result.output
        assert "--respacing ddim25" in result.output


def test_a_respaced_loop_is_recorded_verified_and_timed(engine: Path, tmp_path: Path) -> None:
    trace, checkpoint = tmp_path / "a.trace", write_checkpoint(tmp_path / "ckpt.pt")
    result = invoke("trace", engine, "-o", trace, "--respacing", "ddim5")
    assert result.exit_code == 0, result.output
    found = invoke("verify", "-e", engine, "--against", trace, "--json")
    assert found.exit_code == 0, found.output
    assert len(json.loads(found.stdout)["recipe"]["steps"]) == 5
    typed = invoke("verify", "-e", engine, "--against", trace, "--respacing", "ddim5")
    assert "leave --respacing out" in " ".join(typed.output.split())
    timed = invoke("bench", "-e", checkpoint, "--respacing", "2,1", "--repeat", 1, "--warm-up", 1)
    assert timed.exit_code == 0, timed.output
    assert "3 steps an image" in timed.output
