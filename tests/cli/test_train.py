from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from ddpm_deploy.cli.app import app
from ddpm_deploy.model import load_network
from ddpm_deploy.train import read_run

TINY = (
    *("--data", "digits", "--width", "4", "--batch", "8", "--steps", "4", "--sample-every", "0"),
    *("--timesteps", "20", "--device", "cpu", "--threads", "1"),
)


def train(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments])


def refused(*arguments: str) -> str:
    """What a command that must fail says, on one line."""
    result = train(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "error: " in result.stderr
    return " ".join(result.stderr.split())


def test_a_run_prints_the_checkpoint_to_export(tmp_path: Path) -> None:
    result = train(*TINY, "-o", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'run' / 'ckpt.pt'}\n"
    assert "digits: 1797 pictures of 1x8x8, 10 classes" in result.stderr
    assert "step 4, loss " in result.stderr
    assert "images/s" in result.stderr
    spec = load_network(tmp_path / "run" / "ckpt.pt").spec
    assert spec.sample_shape == (1, 8, 8)
    assert spec.schedule.T == 20
    assert spec.label is not None


def test_the_folder_is_named_after_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = train(*TINY, "--steps", "1")
    assert result.stdout == "runs/digits/ckpt.pt\n", result.output


def test_the_original_learns_from_a_folder_of_classes(tmp_path: Path) -> None:
    from ddpm_deploy.images import write_png

    for number in range(4):
        picture = np.full((20, 30, 3), 60 * number, dtype=np.uint8)
        write_png(tmp_path / "data" / "ab"[number % 2] / f"{number}.png", picture)
    (tmp_path / "data" / "notes.txt").touch()
    result = train(
        *("--data", str(tmp_path / "data"), "--image-size", "16", "-o", str(tmp_path / "run")),
        *("--width", "4", "--batch", "4", "--steps", "2", "--samples", "4", "--sample-every", "2"),
        *("--schedule", "cosine", "--timesteps", "10", "--threads", "1", "--device", "cpu"),
    )
    assert result.exit_code == 0, result.output
    assert "4 pictures of 3x16x16, 2 classes" in result.stderr
    assert "left out 1 files that are no pictures: notes.txt" in result.stderr
    assert (tmp_path / "run" / "samples" / "step-0000002.png").exists()
    spec = load_network(tmp_path / "run" / "ckpt.pt").spec
    assert (spec.sample_shape, spec.schedule.name) == ((3, 16, 16), "cosine")
    assert read_run(tmp_path / "run").settings.flip


def test_resume_needs_nothing_but_the_folder(tmp_path: Path) -> None:
    out = ("-o", str(tmp_path))
    assert train(*TINY, *out, "--seed", "3").exit_code == 0
    result = train("--resume", *out, "--steps", "6", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "from step 4" in result.stderr
    saved = read_run(tmp_path)
    assert saved.state["step"] == 6
    assert (saved.settings.seed, saved.settings.batch, saved.settings.flip) == (3, 8, False)
    done = train("--resume", *out, "--device", "cpu")  # nothing is left to do
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'ckpt.pt'}\n")


def test_a_run_in_half_precision_does_not_go_on_in_another_one_unsaid(tmp_path: Path) -> None:
    assert train(*TINY, "-o", str(tmp_path)).exit_code == 0
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    own = state["ddpm_deploy"]
    own["settings"] = json.dumps({**json.loads(own["settings"]), "precision": "16"})
    torch.save(state, tmp_path / "last.pt")
    said = refused("--resume", "-o", str(tmp_path), "--device", "cpu")
    assert "Mixed float16 needs a GPU" in said


def test_a_run_is_not_written_over_or_changed(tmp_path: Path) -> None:
    out = ("-o", str(tmp_path))
    assert train(*TINY, *out).exit_code == 0
    said = refused(*TINY, *out)
    assert "already holds a run" in said
    assert "hint: Type --resume to go on with it, --overwrite to remove it" in said
    said = refused("--resume", *out, "--lr", "0.1", "--width", "8")
    assert "--lr was 0.0003, not 0.1" in said
    assert "--widths was 'inc=4 " in said
    assert "one of them" in refused(*TINY, *out, "--resume", "--overwrite")
    assert train(*TINY, *out, "--overwrite", "--steps", "1").exit_code == 0
    assert read_run(tmp_path).state["step"] == 1


def test_a_mistake_beside_overwrite_leaves_the_run_that_is_there(tmp_path: Path) -> None:
    out = ("-o", str(tmp_path), "--overwrite")
    assert train(*TINY, *out).exit_code == 0
    before = sorted(tmp_path.iterdir())
    assert "There is no folder or file nowhere" in refused("--data", "nowhere", *out)
    assert "8 must divide both" in refused("--data", "digits", "--image-size", "12", *out)
    assert sorted(tmp_path.iterdir()) == before
    assert read_run(tmp_path).state["step"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--data is missing"),
        (("--resume",), "--resume needs the folder"),
        (("--resume", "-o", "nowhere"), "holds no run to go on with"),
        (("--data", "nowhere"), "There is no folder or file nowhere"),
        (("--data", "digits", "--image-size", "12"), "8 must divide both"),
        (("--data", "digits", "--batch", "5000"), "Type a smaller batch: --batch 1797"),
        (("--data", "digits", "--width", "6"), "must be a positive multiple of 4"),
        (("--data", "digits", "--widths", "up=8"), "'up=8' must give 3"),
        (("--data", "digits", "--schedule", "cubic"), "Schedule is cubic"),
        (("--data", "digits", "--lr", "0"), "Lr is 0.0; it must be above 0"),
        (("--data", "digits", "--precision", "int8"), "precision is 'int8'"),
        (("--data", "digits", "--device", "tpu"), "device is 'tpu'"),
        (("--data", "digits", "--devices", "3"), "cannot be shared by 3 processes"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refused(*TINY, "-o", str(tmp_path / "file" / "run"))
    assert "Not a directory" in said


def test_a_damaged_checkpoint_cannot_go_on(tmp_path: Path) -> None:
    assert train(*TINY, "-o", str(tmp_path)).exit_code == 0
    whole = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refused("--resume", "-o", str(tmp_path))
