"""What tests of `verify` share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.commands import run

DEMO = Path(__file__).parents[2] / "demo" / "digits.pt"


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's trained network, exported. Tracing it takes seconds, so it is done once."""
    torch.set_num_threads(1)
    graph = tmp_path_factory.mktemp("demo") / "unet.onnx"
    outcome = run("export", DEMO, "-o", graph)
    assert outcome.code == 0, outcome.err
    return graph
