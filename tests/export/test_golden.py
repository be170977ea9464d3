"""dome272's real network, exported by the command, against what the original's code recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ddpm_deploy import Engine, Schedule, denoise, dome272, linear, open_engine
from ddpm_deploy.arrays import Samples
from ddpm_deploy.cli.app import app
from ddpm_deploy.engines.flavour import installed
from ddpm_deploy.engines.plan import PlanRecord, read_record
from ddpm_deploy.images import to_pixels
from ddpm_deploy.sampling import Table
from tests import golden


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("dome272")
    checkpoint = golden.write_checkpoint(folder / "ckpt.pt")
    path = folder / "unet.onnx"
    result = CliRunner().invoke(app, ["export", str(checkpoint), "-o", str(path)])
    assert result.exit_code == 0, result.output
    checkpoint.unlink()
    return open_engine(path, device="cpu")


@pytest.mark.parametrize("case", [0, 1, 2])
def test_onnx_runtime_gives_what_the_original_code_gave(engine: Engine, case: int) -> None:
    recorded = np.load(golden.DOME272 / "io.npz")
    out = engine(recorded[f"x{case}"], recorded[f"t{case}"])
    wanted = recorded[f"out{case}"]
    assert np.abs(out - wanted).max() <= 2e-5 * np.abs(wanted).max()


TRAJECTORIES = ["sample_full_T12", "sample_first10_of_T1000", "sample_last10_of_T1000"]


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_the_dome272_table_follows_the_original_loop(engine: Engine, name: str) -> None:
    recorded = np.load(golden.DOME272 / f"{name}.npz")
    rows = _rows(recorded["timesteps"], linear(12 if "T12" in name else 1000))
    noise = recorded["noise"]

    def draw(k: int) -> Samples:
        return np.asarray(noise[k - 1], dtype=np.float32)

    indices = recorded["x_at_each_step_index"].tolist()
    states = dict(zip(indices, recorded["x_at_each_step"], strict=True))
    seen = 0
    for step in denoise(engine, rows, draw, x=recorded["x_T"]):
        if step.k - 1 in states:
            wanted = states[step.k - 1]
            assert np.abs(step.x_t - wanted).max() <= 1e-5 * np.abs(wanted).max()
            seen += 1
    assert seen == len(states)
    wanted = recorded["x_final_float"]
    assert np.abs(step.x - wanted).max() <= 1e-5 * np.abs(wanted).max()
    pixels = to_pixels(step.x, rounding=engine.spec.rounding).transpose(0, 3, 1, 2)
    difference = np.abs(pixels.astype(int) - recorded["uint8"].astype(int))
    assert difference.max() <= 1
    assert np.mean(difference > 0) <= 1e-3


def test_the_schedule_is_the_original_s() -> None:
    recorded = np.load(golden.DOME272 / "sample_full_T12.npz")
    schedule = linear(12)
    # The original computes both in float32.
    np.testing.assert_allclose(schedule.beta, recorded["beta"], rtol=1e-6)
    np.testing.assert_allclose(schedule.alpha_bar, recorded["alpha_hat"], rtol=1e-6)


def build(plan: Path, *arguments: str) -> PlanRecord:
    """Builds a plan of the network, really, and reads its sidecar."""
    result = CliRunner().invoke(app, ["build", *arguments, "--runtime", "rtx", "-o", str(plan)])
    assert result.exit_code == 0, result.output
    assert plan.stat().st_size > 40e6
    return read_record(plan)


def check_islands(record: PlanRecord) -> None:
    """What TensorRT itself says of the layers: statistics in float32, most products in half."""
    layers = record.layers
    assert (layers["CONVOLUTION HALF"], layers["CONVOLUTION FLOAT"]) == (31, 2)
    assert (layers["NORMALIZATION FLOAT"], layers["SOFTMAX FLOAT"]) == (44, 6)
    assert not {"NORMALIZATION HALF", "SOFTMAX HALF"} & layers.keys()
    # Six products, of t alone, stay in float32.
    assert layers["MATRIX_MULTIPLY HALF"] == 36
    assert layers["MATRIX_MULTIPLY FLOAT"] == 6


@pytest.mark.skipif("tensorrt_rtx" not in installed(), reason="tensorrt_rtx is not installed")
def test_tensorrt_rtx_builds_the_real_network_in_half_precision(
    engine: Engine, tmp_path: Path
) -> None:
    graph, plan = str(engine.path), tmp_path / "unet.plan"
    record = build(plan, graph, "--fp16", "--batch", "1:4:8", "--keep-graph")
    assert record.precision_error is not None
    assert record.precision_error < 3e-3  # other tools give 5e-2: docs/precision.md
    check_islands(record)
    assert record.memory < 2**29  # whole, one matrix of attention would be 1 GiB at batch 8
    kept = str(tmp_path / "unet.fp16.onnx")
    fused = build(tmp_path / "fused.plan", kept, "--fp16", "--fuse-step", "--batch", "8")
    assert fused.fused_step
    assert (fused.precision_error, str(*fused.profiles)) == (record.precision_error, "8:8:8")
    check_islands(fused)


@pytest.mark.skipif("tensorrt_rtx" not in installed(), reason="tensorrt_rtx is not installed")
def test_tensorrt_rtx_builds_the_real_network_in_float32(engine: Engine, tmp_path: Path) -> None:
    record = build(tmp_path / "unet.plan", str(engine.path), "--fp32")
    assert not [name for name in record.layers if name.endswith(" HALF")]
    assert record.layers["SOFTMAX FLOAT"] > 6  # the queries are cut: it fuses no float32
    assert record.memory < 2**29


def _rows(timesteps: np.ndarray, schedule: Schedule) -> Table:
    visited = set(timesteps.tolist())
    return [row for row in dome272(schedule) if row.t in visited]


def test_the_export_leaves_one_file(engine: Engine) -> None:
    assert [path.name for path in Path(engine.path).parent.iterdir()] == ["unet.onnx"]
