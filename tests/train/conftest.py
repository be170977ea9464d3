"""A network that trains in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from ddpm_deploy.data import ImageData, open_data
from ddpm_deploy.model import UNetWidths
from ddpm_deploy.train import Settings, open_fabric

TINY = UNetWidths(inc=4, down=(4, 4, 4), bottom=(4, 4), up=(4, 4, 4), up_middle=(4, 4, 4), time=8)


def tiny(**changes: Any) -> Settings:
    """Settings of a run on the digits that lasts six steps."""
    plain: dict[str, Any] = {
        "data": "digits",
        "widths": TINY,
        "batch": 8,
        "steps": 6,
        "warmup": 2,
        "save_every": 2,
        "sample_every": 0,
        "flip": False,
        "timesteps": 20,
    }
    return Settings(**{**plain, **changes})


@pytest.fixture(scope="session")
def digits() -> ImageData:
    return open_data("digits")


@pytest.fixture(scope="session")
def numbered() -> ImageData:
    """Ten pictures, each with its number as its value, bright on the left side alone."""
    images = np.zeros((10, 8, 8, 1), dtype=np.uint8)
    images[:, :, :4] = np.arange(10, dtype=np.uint8)[:, None, None, None]
    return ImageData(
        source="numbered",
        sample_shape=(1, 8, 8),
        labels=np.arange(10, dtype=np.int64) % 3,
        classes=("0", "1", "2"),
        fingerprint="numbered",
        count=10,
        read=lambda indices: images[indices],
    )


@pytest.fixture
def fabric() -> Iterator[Fabric]:
    with open_fabric("cpu", "32") as opened:
        yield opened


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
