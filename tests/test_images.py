from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ddpm_deploy.arrays import Pixels
from ddpm_deploy.errors import DataError
from ddpm_deploy.images import (
    from_pixels,
    grid,
    is_picture,
    read_picture,
    to_pixels,
    write_gif,
    write_png,
)

RANDOM = np.random.default_rng(0).normal(0, 0.8, (4, 3, 32, 32)).astype(np.float32)


def random_pixels(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# --- Samples and pixels ---


def test_truncation_is_dome272_s_lines_bit_for_bit() -> None:
    """Its sample(): clamp, (x + 1) / 2, x * 255, type(torch.uint8)."""
    x = torch.from_numpy(RANDOM)
    x = (x.clamp(-1, 1) + 1) / 2
    theirs = (x * 255).type(torch.uint8)
    ours = to_pixels(RANDOM, rounding="truncate")
    np.testing.assert_array_equal(ours, theirs.permute(0, 2, 3, 1).numpy())


def test_rounding_to_the_nearest_is_that_of_diffusers() -> None:
    """Its pipelines: x / 2 + 0.5, clamp, * 255, round."""
    x = (torch.from_numpy(RANDOM) / 2 + 0.5).clamp(0, 1)
    theirs = (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    difference = np.abs(to_pixels(RANDOM).astype(int) - theirs)
    # x / 2 + 0.5 and (x + 1) / 2 round differently in float32: 1e-7 · 255 around each half.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("value_range", [(-1.0, 1.0), (0.0, 1.0), (-0.5, 2.5)])
def test_every_pixel_comes_back(value_range: tuple[float, float]) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = from_pixels(pixels, value_range=value_range)
    assert x.dtype == np.float32
    assert x.shape == (1, 1, 16, 16)
    assert (x.min(), x.max()) == value_range
    np.testing.assert_array_equal(to_pixels(x, value_range=value_range), pixels)


def test_pixels_become_what_torch_s_transforms_make_of_them() -> None:
    """ToTensor and Normalize(0.5, 0.5), as dome272 and most others load their data."""
    pixels = random_pixels(2, 8, 8, 3)
    theirs = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    np.testing.assert_allclose(from_pixels(pixels), theirs.numpy(), rtol=0, atol=2e-7)


@settings(deadline=None)  # the machine may be busy
@given(st.floats(-3, 3, width=32))
def test_a_pixel_is_the_nearest_level_or_the_one_below(value: float) -> None:
    x = np.full((1, 1, 1, 1), value, np.float32)
    exact = (min(max(value, -1), 1) + 1) * 127.5
    assert abs(int(to_pixels(x)[0, 0, 0, 0]) - exact) <= 0.5 + 1e-4
    assert -1e-4 <= exact - int(to_pixels(x, rounding="truncate")[0, 0, 0, 0]) < 1 + 1e-4


def test_pictures_have_one_three_or_four_channels() -> None:
    assert is_picture((1, 8, 8))
    assert is_picture((3, 8, 8))
    assert is_picture((4, 8, 8))
    assert not is_picture((2, 8, 8))
    assert not is_picture((3, 8))


# --- PNG ---


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_png_comes_back_bit_for_bit(tmp_path: Path, channels: int) -> None:
    pixels = random_pixels(7, 5, channels)
    write_png(tmp_path / "new" / "a.png", pixels)
    read = read_picture(tmp_path / "new" / "a.png", channels=channels)
    np.testing.assert_array_equal(read, pixels)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


def test_a_png_that_cannot_be_finished_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    write_png(path, random_pixels(4, 4, 3))
    before = path.read_bytes()

    def full(self: object, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"\x89PNG, the first half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        write_png(path, random_pixels(4, 4, 3, seed=1))
    with pytest.raises(OSError, match="No space left"):
        write_gif(tmp_path / "a.gif", [random_pixels(4, 4, 3)])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_cannot_be_written_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        write_png(tmp_path / "file" / "a.png", random_pixels(4, 4, 3))
    assert (tmp_path / "file").read_text() == "no folder"


# --- Reading pictures of other kinds ---


def test_pictures_of_other_kinds_become_grey_or_colour(tmp_path: Path) -> None:
    for mode, channels in [("1", 1), ("L", 1), ("LA", 1), ("P", 3), ("RGB", 3), ("RGBA", 3)]:
        Image.new(mode, (6, 4)).save(tmp_path / "p.png")
        assert read_picture(tmp_path / "p.png").shape == (4, 6, channels)
        assert read_picture(tmp_path / "p.png", channels=1).shape == (4, 6, 1)
        assert read_picture(tmp_path / "p.png", channels=3).shape == (4, 6, 3)
    Image.new("CMYK", (6, 4)).save(tmp_path / "p.jpg")
    assert read_picture(tmp_path / "p.jpg").shape == (4, 6, 3)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (2, 2), (200, 0, 100, 128))
    half.putpixel((1, 1), (9, 9, 9, 0))
    half.save(tmp_path / "p.png")
    pixels = read_picture(tmp_path / "p.png").astype(int)
    wanted = np.array([200, 0, 100]) * 128 / 255 + 255 * 127 / 255
    assert np.abs(pixels[0, 0] - wanted).max() <= 1
    assert pixels[1, 1].tolist() == [255, 255, 255]
    assert read_picture(tmp_path / "p.png", channels=4)[0, 0].tolist() == [200, 0, 100, 128]


def test_sixteen_bits_become_eight_over_the_whole_range(tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for name in ("p.png", "p.tif"):
        Image.fromarray(levels).save(tmp_path / name)
        pixels = read_picture(tmp_path / name)
        np.testing.assert_array_equal(pixels.ravel(), np.arange(256))


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    photo = Image.new("RGB", (16, 8))
    photo.paste((255, 255, 255), (0, 0, 8, 8))
    exif = photo.getexif()
    exif[0x0112] = 6  # the camera was on its side: turn by 90 degrees clockwise to look at it
    photo.save(tmp_path / "p.jpg", exif=exif, quality=95)
    pixels = read_picture(tmp_path / "p.jpg")
    assert pixels.shape == (16, 8, 3)
    assert pixels[:7].min() > 240
    assert pixels[9:].max() < 15


def test_what_is_no_picture_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no picture .*none\.png"):
        read_picture(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match=r"text\.png is no picture that can be read"):
        read_picture(tmp_path / "text.png")
    with pytest.raises(DataError, match="is no picture that can be read"):
        read_picture(tmp_path)
    write_png(tmp_path / "a.png", random_pixels(64, 64, 3))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.png is no picture that can be read"):
        read_picture(tmp_path / "cut.png")
    at = whole.index(b"IDAT") - 4  # a shorter length, and pixels stand where a chunk's name should
    shorter = whole[:at] + (100).to_bytes(4, "big") + whole[at + 4 :]
    (tmp_path / "chunk.png").write_bytes(shorter)
    with pytest.raises(DataError, match=r"chunk\.png is no picture that can be read: broken PNG"):
        read_picture(tmp_path / "chunk.png")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="its numbers are floats"):
        read_picture(tmp_path / "float.tif")


# --- Grids and animations ---


def test_a_grid_has_its_pictures_in_rows_on_white() -> None:
    pictures = [np.full((64, 80, 3), 10 * (i + 1), np.uint8) for i in range(5)]
    sheet = grid(pictures, columns=3, gap=4)
    assert sheet.shape == (2 * 64 + 3 * 4, 3 * 80 + 4 * 4, 3)
    expected = np.full_like(sheet, 255)
    for i in range(5):
        y, x = 4 + (i // 3) * 68, 4 + (i % 3) * 84
        expected[y : y + 64, x : x + 80] = 10 * (i + 1)
    np.testing.assert_array_equal(sheet, expected)


def test_small_pictures_are_enlarged_by_whole_pixels() -> None:
    picture = random_pixels(8, 8, 1)
    sheet = grid([picture], gap=0, columns=1)
    assert sheet.shape == (64, 64, 1)
    np.testing.assert_array_equal(sheet[::8, ::8], picture)
    np.testing.assert_array_equal(sheet[7::8, 7::8], picture)


@pytest.mark.parametrize(
    ("count", "columns", "rows"),
    [(1, 1, 1), (5, 5, 1), (8, 8, 1), (9, 8, 2), (64, 8, 8), (65, 9, 8), (100, 10, 10)],
)
def test_a_row_has_eight_pictures_or_the_grid_is_square(
    count: int, columns: int, rows: int
) -> None:
    sheet = grid([np.zeros((64, 64, 1), np.uint8)] * count)
    assert sheet.shape == (rows * 66 + 2, columns * 66 + 2, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_gif_can_be_read_back_and_holds_its_last_frame(tmp_path: Path, channels: int) -> None:
    frames = [np.full((8, 8, channels), 60 * i, np.uint8) for i in range(4)]
    write_gif(tmp_path / "a.gif", frames, seconds=0.1)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 4  # type: ignore[attr-defined]
        assert gif.info["loop"] == 0
        durations = []
        for i in range(4):
            gif.seek(i)
            durations.append(gif.info["duration"])
            shown = np.asarray(gif.convert("RGB"))
            # 256 colours a frame are enough for one grey.
            assert np.abs(shown.astype(int) - 60 * i).max() <= 2
        assert durations == [100, 100, 100, 2000]
