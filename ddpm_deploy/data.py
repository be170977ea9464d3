"""Pictures to train on or to measure with: a folder, an `.npz` file, or scikit-learn's digits."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ddpm_deploy.arrays import Array, Pixels, Samples
from ddpm_deploy.errors import DataError, MissingDependencyError
from ddpm_deploy.images import CHANNELS, from_pixels, read_picture

DIGITS = "digits"
"""The word that names scikit-learn's 1,797 handwritten digits of 8x8 pixels."""

LARGEST = 4096
"""Height or width that pictures are brought to at most; beyond it memory ends before patience."""

FOLDER_SIZE = 64
"""Height and width that the pictures of a folder are brought to, where none is asked for."""

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm"),
)
"""A file of a folder is a picture when its name ends so, in capitals or not."""

Size = int | tuple[int, int]


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageData:
    """Pictures of one size, read when they are asked for.

    Attributes:
        source: What was opened, as it was typed.
        sample_shape: (C, H, W).
        labels: int64, (N,), 0 to `len(classes)` - 1; None where the data has none.
        classes: What the labels are called, in order; empty where there are none.
        skipped: Files of a folder whose names do not end like a picture's.
        fingerprint: The same for the same pictures, or names of pictures, in the same order.
    """

    source: str
    sample_shape: tuple[int, int, int]
    labels: NDArray[np.int64] | None
    classes: tuple[str, ...] = ()
    skipped: tuple[Path, ...] = ()
    fingerprint: str
    count: int
    read: Callable[[NDArray[np.int64]], Pixels]

    def __len__(self) -> int:
        return self.count

    def load(
        self,
        indices: Sequence[int] | NDArray[np.int64],
        *,
        value_range: tuple[float, float] = (-1.0, 1.0),
    ) -> Samples:
        """Reads some of the pictures.

        Args:
            indices: Which, each 0 to N-1, in any order, as often as you like.
            value_range: What black and white become.

        Returns:
            float32, (n, C, H, W), in `value_range`.

        Raises:
            DataError: A file is gone or is no picture that can be read.
            IndexError: An index is outside 0..N-1.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.count):
            raise IndexError(
                f"the indices are {wanted.min()}..{wanted.max()}; "
                f"{self.source} has 0..{self.count - 1}"
            )
        return from_pixels(self.read(wanted), value_range=value_range)

    def spread(self, count: int) -> NDArray[np.int64]:
        """Returns the indices of so many pictures, or of all, evenly over the whole set."""
        count = min(count, len(self))
        return np.arange(count) * len(self) // count


def open_data(
    source: str | Path, *, image_size: Size | None = None, channels: int | None = None
) -> ImageData:
    """Opens pictures and brings them to one size: the shorter side is resized, the rest cropped.

    Args:
        source: A folder (its sub-folders, by name, are the classes), an `.npz` file with `images`
            uint8 (N, H, W) or (N, H, W, C) and perhaps `labels` int64 (N,), or `digits`.
        image_size: Height and width in pixels, one number where they agree; when None, what an
            array has, and 64 for a folder.
        channels: 1 for grey, 3 for colour; when None, what an array has, and 3 for a folder.

    Raises:
        DataError: There is nothing at `source`, it holds no pictures, or its arrays are not such.
        MissingDependencyError: `digits` needs scikit-learn.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and not 1 <= min(size) <= max(size) <= LARGEST:
        raise DataError(
            f"The image size is {image_size}; it must lie in 1..{LARGEST} pixels.",
            hint="Type it in pixels: --image-size 64",
        )
    if channels not in {None, *CHANNELS}:
        raise DataError(
            f"Pictures have 1, 3 or 4 channels, not {channels}.",
            hint="Type --channels 1 for grey or --channels 3 for colour.",
        )
    name, path = str(source), Path(source)
    if name == DIGITS:
        return _from_arrays(name, *_digits(), size, channels)
    if path.is_dir():
        return _from_folder(path, size or (FOLDER_SIZE, FOLDER_SIZE), channels or 3)
    if not path.exists():
        raise DataError(
            f"There is no folder or file {path}.",
            hint="Give a folder of pictures, an .npz file, or the word digits.",
        )
    if path.suffix != ".npz":
        raise DataError(
            f"{path} is neither a folder nor an .npz file.",
            hint="Give the folder that the pictures are in, or pack an array: "
            "np.savez('data.npz', images=images, labels=labels)",
        )
    return _from_arrays(name, *_read_npz(path), size, channels)


def _from_folder(folder: Path, size: tuple[int, int], channels: int) -> ImageData:
    paths, skipped = _pictures(folder)
    if not paths:
        what = f" among its {len(skipped)} files" if skipped else ": it is empty"
        raise DataError(
            f"{folder} holds no pictures{what}.",
            hint="Pictures end in " + ", ".join(SUFFIXES),
        )
    relative = [path.relative_to(folder) for path in paths]
    classes = tuple(sorted({name.parts[0] for name in relative if len(name.parts) > 1}))
    loose = [name for name in relative if len(name.parts) == 1]
    if classes and loose:
        raise DataError(
            f"{folder} holds pictures beside its sub-folders ({loose[0]}) and inside them "
            f"({classes[0]}/), so it is not clear what the classes are.",
            hint="Move every picture into a class's sub-folder, or all of them into one folder.",
        )
    labels = None
    if len(classes) > 1:
        number = {name: label for label, name in enumerate(classes)}
        labels = np.array([number[name.parts[0]] for name in relative], dtype=np.int64)

    def read_one(path: Path) -> Pixels:
        try:
            return _fit(read_picture(path, channels=channels), size)
        except DataError as error:
            raise DataError(str(error), hint="Take it out of the folder, or mend it.") from error

    def read(indices: NDArray[np.int64]) -> Pixels:
        wanted = [paths[i] for i in indices]
        if len(wanted) < 2:
            pictures = [read_one(path) for path in wanted]
        else:
            with ThreadPoolExecutor(min(len(wanted), os.cpu_count() or 1)) as pool:
                pictures = list(pool.map(read_one, wanted))
        empty: Pixels = np.empty((0, *size, channels), dtype=np.uint8)
        return np.stack(pictures) if pictures else empty

    return ImageData(
        source=str(folder),
        sample_shape=(channels, *size),
        labels=labels,
        classes=classes if labels is not None else (),  # one class says nothing
        skipped=tuple(skipped),
        fingerprint=_digest("\n".join(name.as_posix() for name in relative).encode()),
        count=len(paths),
        read=read,
    )


def _pictures(folder: Path) -> tuple[list[Path], list[Path]]:
    """Lists the files below a folder, sorted by name: the pictures, and the rest.

    What is hidden is no class and no picture: `.ipynb_checkpoints`, macOS's `._1.png`, the `.part`
    of a process that was killed.
    """
    pictures: list[Path] = []
    rest: list[Path] = []
    above = {folder: {folder.resolve()}}
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        inside = []
        for name in sorted(folders):
            below = Path(root, name)
            real = below.resolve()
            if not name.startswith(".") and real not in above[Path(root)]:  # no link back up
                above[below] = above[Path(root)] | {real}
                inside.append(name)
        folders[:] = inside
        for name in names:
            path = Path(root, name)
            shown = path.suffix.lower() in SUFFIXES and not name.startswith(".")
            (pictures if shown else rest).append(path)
    return sorted(pictures), sorted(rest)


def _raise(error: OSError) -> None:
    raise error


def _from_arrays(
    source: str,
    images: Pixels,
    labels: NDArray[np.int64] | None,
    size: tuple[int, int] | None,
    channels: int | None,
) -> ImageData:
    if channels is not None and channels != images.shape[-1]:
        images = _recolour(images, channels, source)
    if size is not None and size != images.shape[1:3]:
        images = np.stack([_fit(picture, size) for picture in images])
    count, height, width, depth = images.shape
    parts = [str(images.shape).encode(), images.tobytes()]
    if labels is not None:
        parts.append(labels.tobytes())
    return ImageData(
        source=source,
        sample_shape=(depth, height, width),
        labels=labels,
        classes=() if labels is None else tuple(str(i) for i in range(int(labels.max()) + 1)),
        fingerprint=_digest(*parts),
        count=count,
        read=lambda indices: images[indices],
    )


def _digits() -> tuple[Pixels, NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError(
            "The digits are part of scikit-learn, and it is not installed.",
            hint="pip install 'ddpm-deploy[demo]'",
        ) from error
    images, labels = load_digits().images, load_digits().target  # 0.0 to 16.0
    pixels = np.rint(images * (255 / 16)).astype(np.uint8)
    return pixels[..., None], labels.astype(np.int64)


def _read_npz(path: Path) -> tuple[Pixels, NDArray[np.int64] | None]:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays: dict[str, Array] = {k: file[k] for k in file.files if k in {"images", "labels"}}
            keys = ", ".join(file.files) or "none"
    except (  # the last two: one array that np.save wrote is no context manager
        *(OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile),
        *(AttributeError, TypeError),
    ) as error:
        raise DataError(
            f"{path} is damaged, or is no .npz file of plain arrays: {error}.",
            hint="Pack it again: np.savez('data.npz', images=images, labels=labels)",
        ) from error
    if "images" not in arrays:
        raise DataError(
            f"{path} holds no array called images; its arrays are {keys}.",
            hint="Pack it again: np.savez('data.npz', images=images, labels=labels)",
        )
    images = arrays["images"]
    if images.dtype != np.uint8 or images.ndim not in {3, 4} or 0 in images.shape:
        raise DataError(
            f"images in {path} is {images.dtype} {images.shape}; "
            "it must be uint8 (N, H, W) or (N, H, W, C) with N >= 1.",
            hint="Scale the pictures to 0..255 and put the channels last.",
        )
    images = images[..., None] if images.ndim == 3 else images
    if images.shape[-1] not in CHANNELS:
        first = images.shape[1] in CHANNELS
        raise DataError(
            f"images in {path} has {images.shape[-1]} channels; pictures have 1, 3 or 4.",
            hint="The channels come last: images.transpose(0, 2, 3, 1)" if first else "",
        )
    labels = arrays.get("labels")
    return images, None if labels is None else _check_labels(labels, len(images), path)


def _check_labels(labels: Array, count: int, path: Path) -> NDArray[np.int64]:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise DataError(
            f"labels in {path} is {labels.dtype} {labels.shape}; it must be int64 ({count},), "
            "one for each picture.",
            hint="Leave labels out of the file to train without classes.",
        )
    # As many classes as pictures is the most that can mean something; it catches ids and -1.
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= count:
        raise DataError(
            f"labels in {path} are {low}..{high}; with {count} pictures they must lie in "
            f"0..{count - 1}, and count the classes from 0.",
            hint="Number the classes anew: np.unique(labels, return_inverse=True)[1]",
        )
    return labels.astype(np.int64)


def _recolour(images: Pixels, channels: int, source: str) -> Pixels:
    match images.shape[-1], channels:
        case 1, 3:
            return images.repeat(3, axis=-1)
        case 3, 1:  # ITU-R 601-2, the luma that Pillow uses for files
            luma = images.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
            grey: Pixels = np.rint(luma).astype(np.uint8)[..., None]
            return grey
        case has, _:
            raise DataError(
                f"{source} has {has} channels and {channels} were asked for.",
                hint=f"Type --channels {has}, or convert the pictures first.",
            )


def _fit(picture: Pixels, size: tuple[int, int]) -> Pixels:
    """Resizes until the picture covers `size`, and crops the middle."""
    from PIL import Image  # noqa: PLC0415

    height, width = size
    if picture.shape[:2] == size:
        return picture
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    scale = max(height / image.height, width / image.width)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(covering, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    fitted = np.asarray(image.crop((left, top, left + width, top + height)))
    return fitted if fitted.ndim == 3 else fitted[..., None]


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
