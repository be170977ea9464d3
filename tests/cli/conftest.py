"""What tests of several commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.commands import run
from tests.support import write_checkpoint


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ckpt.pt, of three classes, and the unet.onnx that `export` made of it.

    Tracing a network takes seconds, so it is done once.
    """
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = write_checkpoint(folder / "ckpt.pt", classes=3)
    outcome = run("export", checkpoint, "-o", folder / "unet.onnx")
    assert outcome.code == 0, outcome.err
    return folder
