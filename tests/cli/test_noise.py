from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from ddpm_deploy import ModelSpec, SeededNoise, cosine
from ddpm_deploy.cli.app import app
from tests.engines.plans import record, write_plan
from tests.support import write_graph


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("view.png")
    return Path("view.png")


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["noise", *arguments])
    return result.exit_code, result.stdout, result.stderr


def panels(path: Path, height: int, width: int) -> list[np.ndarray]:
    sheet = np.asarray(Image.open(path))
    assert sheet.shape[0] == height + 4
    return [sheet[2:-2, x : x + width] for x in range(2, sheet.shape[1], width + 2)]


def test_the_strip_holds_the_picture_and_x_t_by_the_formula(picture: Path) -> None:
    code, out, err = run("view.png", "--t", "0,500,999", "--seed", "5")
    assert (code, out) == (0, "view-noise.png\n")
    clean, *noisy = panels(Path("view-noise.png"), 64, 96)
    original = np.asarray(Image.open(picture))
    np.testing.assert_array_equal(clean, original)

    eps = SeededNoise(5, [0], (3, 64, 96))(0)[0].transpose(1, 2, 0).astype(np.float64)
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    assert len(noisy) == 3
    for found, t in zip(noisy, (0, 500, 999), strict=True):
        a = alpha_bar[t]
        x = math.sqrt(a) * (original / 127.5 - 1) + math.sqrt(1 - a) * eps
        wanted = np.clip((x + 1) * 127.5, 0, 255)
        # Rounded to the nearest: half a level, and what float32 adds.
        assert np.abs(found - wanted).max() < 0.5 + 1e-3
        assert f"t = {t} " in err
        assert f"{a:.5g}" in err
        assert f"{a / (1 - a):.5g}" in err


def test_without_t_the_strip_runs_from_the_first_to_the_last_timestep(picture: Path) -> None:
    code, _, err = run("view.png", "--timesteps", "40", "-o", "deep/strip.png")
    assert code == 0
    assert "t = 0 " in err
    assert "t = 39 " in err
    assert len(panels(Path("deep/strip.png"), 64, 96)) == 9


def test_a_large_picture_is_made_smaller_and_image_size_says_how_large(tmp_path: Path) -> None:
    Image.new("L", (900, 300), 200).save(tmp_path / "wide.png")
    strip = tmp_path / "strip.png"
    for arguments, (height, width) in [
        ([], (85, 256)),
        (["--image-size", "90"], (30, 90)),
        (["--image-size", "1000"], (333, 1000)),
    ]:
        code, _, err = run(str(tmp_path / "wide.png"), "--t", "10", "-o", str(strip), *arguments)
        assert code == 0
        assert f"{width}x{height} pixels" in err
        assert np.asarray(Image.open(strip)).shape == (height + 4, 2 * (width + 2) + 2)


def test_the_schedule_can_come_from_an_engine(picture: Path) -> None:
    spec = ModelSpec(sample_shape=(1, 8, 8), schedule=cosine(50))
    write_graph(Path("unet.onnx"), spec)
    code, _, err = run("view.png", "--engine", "unet.onnx", "--t", "25")
    assert code == 0
    assert "cosine" in err
    # Nichol & Dhariwal's ᾱ at the middle, f(26/50)/f(0).
    f = [math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (26 / 50, 0)]
    assert f"{f[0] / f[1]:.5g}" in err


def test_the_schedule_can_come_from_a_plan_that_runs_elsewhere(picture: Path) -> None:
    spec = ModelSpec(sample_shape=(1, 8, 8), schedule=cosine(50))
    write_plan(Path("unet.plan"), record(spec=spec))
    code, _, err = run("view.png", "--engine", "unet.plan", "--t", "25")
    assert code == 0
    assert err.startswith("cosine")
    assert "T = 50" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "There is no picture missing.png"),
        (["view.png", "--t", "0,1000"], "1000 is none of this schedule's timesteps 0..999"),
        (["view.png", "--t", "0;5"], "'0;5' is no list of timesteps"),
        (["view.png", "--schedule", "square"], "No schedule is called 'square'"),
        (["view.png", "-o", "strip.jpg"], "strip.jpg is no name for a PNG file"),
        (["view.png", "-o", "view.png"], "view.png is the picture itself"),
        (["view.png", "--engine", "none.onnx"], "There is no file none.onnx"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(
    picture: Path, arguments: list[str], message: str
) -> None:
    before = sorted(Path.cwd().iterdir())
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert message in " ".join(err.split())
    assert sorted(Path.cwd().iterdir()) == before
