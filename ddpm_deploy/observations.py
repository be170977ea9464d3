"""Observations: the numbers that an action network is conditioned on, from NumPy files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ddpm_deploy.errors import DataError
from ddpm_deploy.spec import Condition


def read_observations(path: Path, condition: Condition) -> tuple[tuple[float, ...], ...]:
    """Reads one observation a sample.

    Args:
        path: A `.npy` file: numbers, (N, *shape) or, for a single one, (*shape).
        condition: The input that takes them.

    Returns:
        A row of numbers each, in C order.

    Raises:
        DataError: The file is missing or damaged, or its numbers do not fit.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(
            f"There is no file {path}.", hint="Write one: numpy.save(FILE, observations)"
        ) from error
    except (ValueError, EOFError, OSError) as error:
        raise DataError(
            f"{path} is no NumPy array ({str(error).splitlines()[0]}).",
            hint="Write one: numpy.save(FILE, observations)",
        ) from error
    shape = condition.shape
    wanted = ", ".join(["N", *map(str, shape)]) + ("" if shape else ",")
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iuf":
        raise DataError(
            f"{path} is no array of numbers.", hint=f"Give float32 ({wanted}) as a .npy file."
        )
    if array.shape == shape:
        array = array[None]
    if array.shape[1:] != shape or not array.size:
        raise DataError(
            f"{path} is {array.dtype} {array.shape}; {condition.name} takes {condition.dtype} "
            f"({wanted}).",
            hint="Give one observation a sample, or one for all.",
        )
    if not np.isfinite(array).all():
        raise DataError(
            f"{path} has {int((~np.isfinite(array)).sum())} numbers that are not finite.",
            hint="Observations are finite numbers in their own units.",
        )
    rows = array.astype(np.float32).reshape(len(array), math.prod(shape)).tolist()
    return tuple(tuple(row) for row in rows)
