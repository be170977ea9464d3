from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpm_deploy.data import open_data
from ddpm_deploy.errors import DataError, MissingDependencyError


def save(path: Path, colour: Any, *, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_digits_are_sklearns_with_the_whole_range() -> None:
    data = open_data("digits", image_size=None, channels=None)
    assert len(data) == 1797
    assert data.sample_shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert data.labels is not None
    assert data.labels[:4].tolist() == [0, 1, 2, 3]
    x = data.load(range(1797))
    assert x.dtype == np.float32
    assert x.shape == (1797, 1, 8, 8)
    assert (x.min(), x.max()) == (-1.0, 1.0)


def test_digits_say_what_to_install_where_sklearn_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match="scikit-learn"):
        open_data("digits")


def test_sub_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    save(tmp_path / "b" / "1.png", (255, 0, 0))
    save(tmp_path / "a" / "deep" / "2.PNG", (0, 255, 0))
    save(tmp_path / "a" / "1.jpg", (0, 0, 255))
    data = open_data(tmp_path, image_size=8)
    assert data.classes == ("a", "b")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 1]
    assert data.sample_shape == (3, 8, 8)
    # Sorted: a/1.jpg (blue), a/deep/2.PNG (green), b/1.png (red).
    assert np.allclose(data.load([2, 1])[:, :, 4, 4], [[1, -1, -1], [-1, 1, -1]])


def test_a_flat_folder_has_no_labels_and_says_what_it_skipped(tmp_path: Path) -> None:
    save(tmp_path / "1.png", 255, mode="L")
    (tmp_path / "notes.txt").write_text("about the pictures")
    data = open_data(tmp_path, channels=1)
    assert (len(data), data.labels, data.classes) == (1, None, ())
    assert [path.name for path in data.skipped] == ["notes.txt"]
    assert data.load([0]).shape == (1, 1, 64, 64)
    assert data.load([]).shape == (0, 1, 64, 64)


def test_what_is_hidden_is_no_class_and_no_picture(tmp_path: Path) -> None:
    save(tmp_path / "cats" / "1.png", 0)
    save(tmp_path / "dogs" / "1.png", 0)
    save(tmp_path / ".ipynb_checkpoints" / "1-checkpoint.png", 0)
    save(tmp_path / "dogs" / ".000002.0a1b2c3d.part.png", 0)
    (tmp_path / "cats" / "._1.png").write_bytes(b"\x00\x05\x16\x07")  # macOS writes such
    data = open_data(tmp_path)
    assert (len(data), data.classes) == (2, ("cats", "dogs"))


def test_a_link_back_up_is_not_followed_and_one_elsewhere_is(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "1.png", 0)
    save(tmp_path / "data" / "cats" / "1.png", 0)
    (tmp_path / "data" / "dogs").symlink_to(tmp_path / "elsewhere")
    for name in ("again", "and_again"):  # two of them make 2^40 paths
        (tmp_path / "data" / name).symlink_to(".")
    data = open_data(tmp_path / "data")
    assert (len(data), data.classes) == (2, ("cats", "dogs"))


def test_the_middle_of_a_wide_picture_stays(tmp_path: Path) -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 255
    Image.fromarray(wide).save(tmp_path / "1.png")
    assert np.all(open_data(tmp_path, image_size=10).load([0]) == 1.0)


def test_an_array_keeps_its_size_and_channels(tmp_path: Path) -> None:
    images = np.arange(2 * 8 * 16 * 3, dtype=np.uint32).reshape(2, 8, 16, 3).astype(np.uint8)
    data = open_data(npz(tmp_path / "a.npz", images=images, labels=np.array([1, 0])))
    assert data.sample_shape == (3, 8, 16)
    assert data.classes == ("0", "1")
    assert np.allclose((data.load([1, 0]) + 1) * 127.5, images[::-1].transpose(0, 3, 1, 2))


def test_an_array_is_resized_and_recoloured_when_asked(tmp_path: Path) -> None:
    grey = npz(tmp_path / "a.npz", images=np.full((3, 28, 28), 255, dtype=np.uint8))
    data = open_data(grey, image_size=32, channels=3)
    assert data.sample_shape == (3, 32, 32)
    assert np.all(data.load([0, 1, 2]) == 1.0)
    assert data.labels is None
    back = npz(tmp_path / "b.npz", images=np.full((1, 8, 8, 3), 200, dtype=np.uint8))
    assert np.allclose(open_data(back, channels=1).load([0]), 200 / 127.5 - 1)


def test_the_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    zeros, ones = (np.full((2, 8, 8), v, dtype=np.uint8) for v in (0, 1))
    prints = [
        open_data(npz(tmp_path / f"{i}.npz", images=images)).fingerprint
        for i, images in enumerate([zeros, ones, zeros])
    ]
    assert prints[0] == prints[2] != prints[1]


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no folder or file .*nowhere") as caught:
        open_data(tmp_path / "nowhere")
    assert "the word digits" in caught.value.hint
    with pytest.raises(DataError, match="holds no pictures: it is empty"):
        open_data(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="no pictures among its 1 files"):
        open_data(tmp_path)
    with pytest.raises(DataError, match=r"a\.txt is neither a folder nor an \.npz file"):
        open_data(tmp_path / "a.txt")


def test_a_folder_of_pictures_and_of_classes_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "1.png", (0, 0, 0))
    save(tmp_path / "cats" / "2.png", (0, 0, 0))
    with pytest.raises(DataError, match=r"beside its sub-folders \(1\.png\)"):
        open_data(tmp_path)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    save(tmp_path / "good.png", (0, 0, 0))
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    data = open_data(tmp_path, image_size=8)
    with pytest.raises(DataError, match=r"bad\.png is no picture that can be read"):
        data.load([0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros(3)}, "no array called images; its arrays are x"),
        ({"images": np.zeros((2, 8, 8), dtype=np.float32)}, r"is float32 \(2, 8, 8\)"),
        ({"images": np.zeros((0, 8, 8), dtype=np.uint8)}, "with N >= 1"),
        ({"images": np.zeros((2, 3, 8, 8), dtype=np.uint8)}, "has 8 channels"),
        ({"images": np.array([None])}, "no .npz file of plain arrays"),
        (
            {"images": np.zeros((2, 8, 8), dtype=np.uint8), "labels": np.zeros(3, dtype=int)},
            r"labels in .* is int64 \(3,\); it must be int64 \(2,\)",
        ),
        (
            {"images": np.zeros((2, 8, 8), dtype=np.uint8), "labels": np.array([-1, 0])},
            r"are -1\.\.0; with 2 pictures they must lie in 0\.\.1",
        ),
    ],
)
def test_wrong_arrays_are_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(npz(tmp_path / "a.npz", **arrays))


def test_a_truncated_npz_is_damaged(tmp_path: Path) -> None:
    path = Path(npz(tmp_path / "a.npz", images=np.zeros((2, 8, 8), dtype=np.uint8)))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="damaged"):
        open_data(path)


def test_one_array_under_the_name_of_an_npz_is_no_npz(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.zeros((2, 8, 8), dtype=np.uint8))
    with pytest.raises(DataError, match=r"no \.npz file of plain arrays"):
        open_data(tmp_path / "a.npz")


def test_sizes_and_channels_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="image size is 0"):
        open_data("digits", image_size=0)
    with pytest.raises(DataError, match="1, 3 or 4 channels, not 2"):
        open_data("digits", channels=2)
    with pytest.raises(DataError, match="digits has 1 channels and 4 were asked for"):
        open_data("digits", channels=4)


def test_an_index_outside_the_data_is_refused() -> None:
    with pytest.raises(IndexError, match=r"0\.\.1797; digits has 0\.\.1796"):
        open_data("digits").load([0, 1797])


def test_some_pictures_are_spread_over_the_whole_set_in_a_network_s_range(tmp_path: Path) -> None:
    pixels = np.stack([np.full((2, 2), level, dtype=np.uint8) for level in (0, 51, 102, 153, 255)])
    np.savez(tmp_path / "grey.npz", images=pixels)
    data = open_data(tmp_path / "grey.npz")
    assert data.spread(2).tolist() == [0, 2]
    assert data.spread(9).tolist() == [0, 1, 2, 3, 4]  # there are no more
    loaded = data.load(data.spread(5), value_range=(0.0, 1.0))
    np.testing.assert_allclose(loaded[:, 0, 0, 0], [0, 0.2, 0.4, 0.6, 1], atol=1e-7)
