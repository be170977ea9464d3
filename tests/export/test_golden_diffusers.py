"""A diffusers pipeline, exported by the command, against what diffusers itself recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ddpm_deploy import Engine, denoise, open_engine
from ddpm_deploy.arrays import Samples
from ddpm_deploy.cli.app import app
from ddpm_deploy.images import to_pixels
from ddpm_deploy.model import load_network
from tests.golden import GOLDEN, make_variant

VARIANT = "diffusers/tutorial_small"
FOLDER = GOLDEN / VARIANT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_variant(VARIANT, tmp_path_factory.mktemp("diffusers"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Engine:
    path = folder / "unet.onnx"
    result = CliRunner().invoke(app, ["export", str(folder / "pipeline"), "-o", str(path)])
    assert result.exit_code == 0, result.output
    return open_engine(path, device="cpu")


@pytest.mark.parametrize("case", [0, 1, 2])
def test_onnx_runtime_gives_what_diffusers_gave(engine: Engine, case: int) -> None:
    recorded = np.load(FOLDER / "io.npz")
    out = engine(recorded[f"x{case}"], recorded[f"t{case}"])
    wanted = recorded[f"out{case}"]
    assert np.abs(out - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_the_pipeline_s_pictures_are_diffusers_own(engine: Engine) -> None:
    recorded = np.load(FOLDER / "pipeline_ddpm10.npz")
    noise = recorded["noise"]

    def draw(k: int) -> Samples:
        return np.asarray(noise[k - 1], dtype=np.float32)

    *_, last = denoise(engine, engine.spec.table(steps=10), draw, x=recorded["x_T"])
    pictures = np.clip(last.x / 2 + 0.5, 0, 1).transpose(0, 2, 3, 1)
    # Twenty times what a second thread alone moves them by, in [-1, 1].
    assert np.abs(pictures - recorded["image_float_nhwc"]).max() <= 20 * 2.8e-5 / 2
    pixels = to_pixels(last.x, rounding=engine.spec.rounding)
    difference = np.abs(pixels.astype(int) - recorded["image_uint8_nhwc"].astype(int))
    assert difference.max() <= 1
    assert np.mean(difference > 0) <= 1e-3


def test_the_pickle_holds_the_same_network(folder: Path, engine: Engine) -> None:
    loaded = load_network(folder / "pipeline_bin")
    assert loaded.spec.with_changes(checkpoint_sha256="") == engine.spec.with_changes(
        checkpoint_sha256=""
    )
    again = load_network(folder / "pipeline").network.state_dict()
    for name, tensor in loaded.network.state_dict().items():
        assert tensor.equal(again[name])
