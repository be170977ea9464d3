from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric

from ddpm_deploy.data import ImageData
from ddpm_deploy.errors import TrainError
from ddpm_deploy.train import Trainer, choose_device, choose_precision, fit, read_run

TRAIN = (
    *("train", "--data", "digits", "--width", "4", "--batch", "8", "--warmup", "2"),
    *("--sample-every", "0", "--timesteps", "20", "--device", "cpu", "--threads", "1"),
)


def start(*command: str) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LOCAL_", "MASTER_"))}
    return subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, out.decode(), err.decode()


def assert_same_model(a: Path, b: Path) -> None:
    one, two = (read_run(folder).state for folder in (a, b))
    assert one["step"] == two["step"] == 4
    for kind in ("model", "ema"):
        for name, value in one[kind].items():
            # Gradients are summed in another order; AdamW divides by their size, so a weight whose
            # gradient is nearly 0 feels it most. Without the exchange the difference is 1e-3.
            assert torch.allclose(value, two[kind][name], rtol=0, atol=3e-5), name


def test_two_processes_train_the_model_of_one(
    digits: ImageData, fabric: Fabric, tmp_path: Path
) -> None:
    code, out, err = finish(
        start(
            *("ddpm_deploy", *TRAIN, "--steps", "4"),
            *("-o", str(tmp_path / "two"), "--devices", "2"),
        )
    )
    assert code == 0, err
    assert out == f"{tmp_path / 'two' / 'ckpt.pt'}\n"  # the second process is silent
    assert "2 x cpu" in err
    assert "arning" not in err
    settings = read_run(tmp_path / "two").settings
    fit(Trainer(settings, digits, fabric), tmp_path / "one")
    assert_same_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_torchrun_trains_the_model_of_one(tmp_path: Path) -> None:
    one = finish(start("ddpm_deploy", *TRAIN, "--steps", "4", "-o", str(tmp_path / "one")))
    two = finish(
        start(
            *("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "ddpm_deploy", *TRAIN, "--steps", "4", "-o", str(tmp_path / "two")),
        )
    )
    assert one[0] == 0, one[2]
    assert two[0] == 0, two[2]
    assert_same_model(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(tmp_path: Path) -> None:
    run = start(
        *("ddpm_deploy", *TRAIN, "--steps", "100000", "-o", str(tmp_path), "--devices", "2")
    )
    wait_for_curves(tmp_path)
    run.send_signal(signal.SIGINT)
    code, _, err = finish(run)
    assert code == 130, err
    assert f"--resume -o {tmp_path} --devices 2" in err
    assert read_run(tmp_path).state["step"] > 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the second process in /proc")
def test_a_process_that_is_killed_ends_the_run_with_the_way_on(tmp_path: Path) -> None:
    run = start(
        *("ddpm_deploy", *TRAIN, "--steps", "100000", "-o", str(tmp_path), "--devices", "2")
    )
    wait_for_curves(tmp_path)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    code, _, err = finish(run)
    assert code == 2, err
    assert "Another process of the run has ended" in err
    assert f"--resume -o {tmp_path}" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = start("ddpm_deploy", *TRAIN, "--steps", "100000", "-o", str(tmp_path))
    wait_for_curves(tmp_path)
    run.send_signal(number)
    returned, out, err = finish(run)
    step = read_run(tmp_path).state["step"]
    assert (returned, out) == (code, "")
    assert step > 0
    assert (
        f"stopped at step {step}, which is saved; "
        f"go on with:\n  ddpm-deploy train --resume -o {tmp_path}\n" in err
    )
    assert "Traceback" not in err


def wait_for_curves(folder: Path) -> None:
    """Waits until a point of the curves shows that steps are being done."""
    for _ in range(1200):
        if any(path.stat().st_size > 150 for path in folder.glob("events.*")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no steps in {folder}: {list(folder.iterdir())}")


def test_devices_and_precisions_that_are_not_there_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    with pytest.raises(TrainError, match="sees no CUDA device"):
        choose_device("cuda")
    with pytest.raises(TrainError, match="device is 'tpu'"):
        choose_device("tpu")
    assert choose_precision("auto", "cpu") == "32"
    assert choose_precision("bf16", "cpu") == "bf16"
    with pytest.raises(TrainError, match="float16 needs a GPU"):
        choose_precision("16", "cpu")
    with pytest.raises(TrainError, match="precision is 'int8'"):
        choose_precision("int8", "cpu")


@pytest.mark.parametrize(("has_bf16", "chosen"), [(True, "bf16"), (False, "16")])
def test_a_gpu_trains_in_mixed_precision(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert choose_precision("auto", "cuda") == chosen
