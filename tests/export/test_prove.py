from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import open_engine
from ddpm_deploy.export.prove import prove
from tests.support import tiny_spec, write_graph


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_graph(tmp_path / "unet.onnx", tiny_spec(classes=3))


def test_the_graph_s_own_engine_is_the_graph(graph: Path) -> None:
    with open_engine(graph) as engine:
        assert prove(graph, engine) == 0


def test_an_error_is_the_largest_over_the_peak(graph: Path, tmp_path: Path) -> None:
    # out = 0.9 tanh(x) + t/1000 + y/100 + bias: every output is 0.25 away, and its peak below 1.
    other = write_graph(tmp_path / "other.onnx", tiny_spec(classes=3), bias=0.25)
    with open_engine(other) as engine:
        assert 0.25 < prove(graph, engine) < 0.35


def test_what_is_not_finite_is_infinitely_far(graph: Path, tmp_path: Path) -> None:
    broken = write_graph(tmp_path / "broken.onnx", tiny_spec(classes=3), bias=float("nan"))
    with open_engine(broken) as engine:
        assert prove(graph, engine) == np.inf
