from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddpm_deploy.data import ImageData
from ddpm_deploy.errors import CheckpointError, RunError, TrainError
from ddpm_deploy.model import load_network
from ddpm_deploy.train import Outcome, Progress, Settings, Trainer, claim, fit, read_run
from tests.train.conftest import tiny


@pytest.fixture
def start(digits: ImageData, fabric: Fabric) -> Callable[..., Trainer]:
    def new(settings: Settings | None = None) -> Trainer:
        return Trainer(settings or tiny(), digits, fabric)

    return new


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of nested dictionaries and lists, by its path."""
    if isinstance(value, dict):
        return {k: v for key in value for k, v in flat(value[key], f"{path}/{key}").items()}
    if isinstance(value, list):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{path}/{i}").items()}
    return {path: value}


def differing(a: Any, b: Any) -> list[str]:
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    return [
        k
        for k in a
        if not (torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k])
    ]


def resumed(folder: Path, digits: ImageData, fabric: Fabric, **changes: Any) -> Trainer:
    saved = read_run(folder)
    trainer = Trainer(saved.settings.resumed_with(changes), digits, fabric)
    trainer.restore(saved.state)
    return trainer


def test_a_resumed_run_is_the_run_that_never_stopped_bit_for_bit(
    start: Callable[..., Trainer], digits: ImageData, fabric: Fabric, tmp_path: Path
) -> None:
    fit(start(), tmp_path / "whole")
    fit(start(tiny(steps=3)), tmp_path / "parts")
    fit(resumed(tmp_path / "parts", digits, fabric, steps=6), tmp_path / "parts")
    whole, parts = (read_run(tmp_path / name).state for name in ("whole", "parts"))
    assert whole["step"] == 6
    assert differing(whole, parts) == []


def test_both_checkpoints_are_networks_that_say_what_they_are(
    start: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = start()
    outcome = fit(trainer, tmp_path)
    assert outcome.checkpoint == tmp_path / "ckpt.pt"
    assert (outcome.step, outcome.signal) == (6, None)
    state = trainer.state()
    for name, kind, weights in [
        ("ckpt.pt", None, "ema"),
        ("last.pt", None, "ema"),
        ("last.pt", "online", "model"),
    ]:
        loaded = load_network(tmp_path / name, weights=kind)  # type: ignore[arg-type]
        assert loaded.spec.weights == (kind or "ema")
        assert replace(loaded.spec, checkpoint_sha256="", weights="") == trainer.spec
        assert loaded.spec.family == "ddpm-deploy"
        assert loaded.assumed == ()
        assert differing(loaded.network.state_dict(), state[weights]) == []


def test_a_checkpoint_to_export_holds_the_weights_once(
    start: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = start()
    fit(trainer, tmp_path)
    content = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert content.keys() == {"ddpm_deploy", "ema"}
    assert sum(v.numel() for v in content["ema"].values()) == trainer.parameters


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves_it(
    start: Callable[..., Trainer], tmp_path: Path, number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def watch(progress: Progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), number)

    outcome = fit(start(), tmp_path, watch=watch)
    assert outcome == Outcome(
        checkpoint=tmp_path / "ckpt.pt", step=4, loss=outcome.loss, signal=number
    )
    assert read_run(tmp_path).state["step"] == 4
    assert signal.getsignal(number) == before


def test_a_second_signal_stops_at_once(start: Callable[..., Trainer], tmp_path: Path) -> None:
    def watch(_: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(start(), tmp_path, watch=watch)
    assert read_run(tmp_path).state["step"] == 0


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import ddpm_deploy.files as files
from ddpm_deploy.data import open_data
from ddpm_deploy.train import Trainer, fit, open_fabric
from tests.train.conftest import tiny

saves, fsync = 0, os.fsync
def kill(number):
    global saves
    saves += 1
    if saves == int(sys.argv[2]):  # the bytes are written, the name is not yet there
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(number)
files.os.fsync = kill
with open_fabric("cpu", "32") as fabric:
    fit(Trainer(tiny(), open_data("digits"), fabric), Path(sys.argv[1]))
"""


def test_a_run_killed_while_saving_goes_on_from_the_save_before(
    start: Callable[..., Trainer], digits: ImageData, fabric: Fabric, tmp_path: Path
) -> None:
    # Syncs: settings, last, ckpt at step 0; last, ckpt at 2; last at 4, which it does not survive.
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path / "killed"), "6"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert read_run(tmp_path / "killed").state["step"] == 2
    load_network(tmp_path / "killed" / "ckpt.pt")
    fit(resumed(tmp_path / "killed", digits, fabric), tmp_path / "killed")
    fit(start(), tmp_path / "whole")
    whole, parts = (read_run(tmp_path / name).state for name in ("whole", "killed"))
    assert differing(whole, parts) == []


def test_a_run_killed_between_its_two_checkpoints_mends_the_second(
    start: Callable[..., Trainer], digits: ImageData, fabric: Fabric, tmp_path: Path
) -> None:
    fit(start(), tmp_path)
    last = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    (tmp_path / "ckpt.pt").unlink()
    fit(resumed(tmp_path, digits, fabric), tmp_path)  # no step is left to do
    assert differing(last, torch.load(tmp_path / "ckpt.pt", weights_only=True)) == []


def test_more_steps_count_from_the_moment_they_are_asked_for(
    start: Callable[..., Trainer], digits: ImageData, fabric: Fabric, tmp_path: Path
) -> None:
    fit(start(), tmp_path)

    def stop(_: Progress) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        fit(resumed(tmp_path, digits, fabric, steps=9), tmp_path, watch=stop)
    assert read_run(tmp_path).settings.steps == 9


def test_a_full_disk_leaves_the_save_before(
    start: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = start()
    real = torch.save

    def full(content: Any, file: Any) -> None:
        if content["ddpm_deploy"]["step"] == 4:
            file.write(b"half of it")
            raise OSError(28, "No space left on device")
        real(content, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        fit(trainer, tmp_path)
    assert read_run(tmp_path).state["step"] == 2
    assert not list(tmp_path.glob(".*"))


def test_a_disk_that_is_full_in_the_middle_of_a_write_says_so(
    start: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = start()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):  # torch raises a RuntimeError
            fit(trainer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(
    start: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = start()

    def watch(progress: Progress) -> None:
        if progress.step == 3:
            with torch.no_grad():
                next(trainer._plain.parameters()).fill_(float("nan"))

    with pytest.raises(TrainError, match=r"loss is nan at step 4 .*last\.pt still holds step 2"):
        fit(trainer, tmp_path, watch=watch)
    assert read_run(tmp_path).state["step"] == 2


def test_grids_and_curves_are_written(start: Callable[..., Trainer], tmp_path: Path) -> None:
    fit(start(tiny(steps=100, save_every=100, sample_every=50, samples=20)), tmp_path)
    grids = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert grids == ["step-0000050.png", "step-0000100.png"]
    with Image.open(tmp_path / "samples" / grids[0]) as sheet:
        assert sheet.size == (10 * 66 + 2, 2 * 66 + 2)  # a column a class, 8x8 shown at 64x64
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "gradient norm", "learning rate"} <= set(events.Tags()["scalars"])
    assert [point.step for point in events.Scalars("loss")] == [50, 100]
    assert all(np.isfinite(point.value) for point in events.Scalars("loss"))
    assert [picture.step for picture in events.Images("samples")] == [50, 100]


def test_a_folder_with_a_run_is_refused_unless_it_may_go(
    start: Callable[..., Trainer], tmp_path: Path
) -> None:
    claim(tmp_path)
    fit(start(tiny(steps=1)), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="already holds a run") as caught:
        claim(tmp_path)
    assert "--resume" in caught.value.hint
    claim(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["notes.txt"]
    with pytest.raises(RunError, match=r"notes\.txt is a file"):
        claim(tmp_path / "notes.txt")


def test_what_is_no_run_cannot_go_on(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run to go on with"):
        read_run(tmp_path)
    torch.save({"model": {}}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="not written by ddpm-deploy train"):
        read_run(tmp_path)
    torch.save({"ddpm_deploy": {"settings": "{}", "format": 99}}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="has format 99"):
        read_run(tmp_path)
    for damaged in ("{}", "[]"):
        torch.save({"ddpm_deploy": {"settings": damaged, "format": 1}}, tmp_path / "last.pt")
        with pytest.raises(CheckpointError, match=r"settings in .* are damaged"):
            read_run(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "does not fit the run"),
        ({"optimizer": [1]}, "does not fit the run"),
        ({"ddpm_deploy": {}}, "not hold the pictures"),
        ({"step": -5}, "has done -5 steps"),
        ({"step": 7}, "has done 7 steps, and --steps is 6"),
    ],
)
def test_a_checkpoint_that_is_not_the_runs_is_refused(
    start: Callable[..., Trainer], change: dict[str, Any], message: str
) -> None:
    trainer = start()
    with pytest.raises(TrainError, match=message):
        trainer.restore({**trainer.state(), **change})


def test_a_run_goes_on_with_its_own_pictures_only(
    start: Callable[..., Trainer], digits: ImageData, fabric: Fabric, tmp_path: Path
) -> None:
    fit(start(tiny(steps=1)), tmp_path)
    with pytest.raises(TrainError, match="not hold the pictures that the run began with"):
        resumed(tmp_path, replace(digits, fingerprint="others"), fabric)
