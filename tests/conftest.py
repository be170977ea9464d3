"""What many tests share."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import Engine, Schedule, open_engine
from ddpm_deploy.arrays import Samples, Timesteps
from tests.support import tiny_spec, write_graph

# A shell starts background jobs with Ctrl-C ignored, and what they start inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)

DATA = Path(__file__).parent / "data"


class GaussianPredictor:
    """The exact ε for data whose every number is N(mean, std²): what a perfect network gives.

    With x_t = √ᾱ x_0 + √(1-ᾱ) ε and x_0 normal, (ε, x_t) is jointly normal and
    E[ε | x_t] = √(1-ᾱ) (x_t - √ᾱ mean) / (ᾱ std² + 1 - ᾱ).
    """

    def __init__(self, schedule: Schedule, *, mean: float, std: float) -> None:
        self.schedule, self.mean, self.std = schedule, mean, std

    def __call__(self, x: Samples, t: Timesteps) -> Samples:
        a = self.schedule.alpha_bar[t].reshape(-1, *[1] * (x.ndim - 1))
        eps = np.sqrt(1 - a) * (x - np.sqrt(a) * self.mean) / (a * self.std**2 + 1 - a)
        return eps.astype(np.float32)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return open_engine(write_graph(tmp_path / "unet.onnx", tiny_spec()))


@pytest.fixture
def labelled(tmp_path: Path) -> Engine:
    return open_engine(write_graph(tmp_path / "labelled.onnx", tiny_spec(classes=4)))
