"""Guidance inside the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_deploy import Recipe, open_engine, sample
from ddpm_deploy.errors import CheckpointError, EngineInputError
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.model import load_network
from ddpm_deploy.model.family import label_condition
from ddpm_deploy.model.guided import Guided
from tests.support import tiny_network, tiny_spec, write_checkpoint, write_state_dict


def test_guidance_in_the_graph_draws_what_guidance_in_the_loop_draws(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "ckpt.pt", classes=3)
    engines = []
    for scale in (None, 2.5):
        loaded = load_network(checkpoint, guidance=scale)
        assert loaded.spec.guidance == scale
        exported = export_network(loaded.network, loaded.spec, tmp_path / f"{scale}.onnx")
        engines.append(open_engine(exported.path))
    plain, guided = engines
    images = range(5)
    wanted = sample(plain, Recipe(seed=1, guidance=2.5, labels=(0, 2)), images)
    given = sample(guided, Recipe(seed=1, labels=(0, 2)), images)
    np.testing.assert_allclose(given, wanted, atol=2e-5)
    with pytest.raises(EngineInputError, match=r"has its guidance inside, of scale 2\.5"):
        sample(guided, Recipe(guidance=2.0), images)
    # The checkpoint, told by the engine's spec, is the guided network too.
    reference = open_engine(checkpoint, spec=guided.spec)
    given = sample(reference, Recipe(seed=1, labels=(0, 2)), images)
    np.testing.assert_allclose(given, wanted, atol=2e-5)


def test_a_learned_variance_stays_the_condition_s() -> None:
    spec = tiny_spec(classes=2).with_changes(variance="learned_range")

    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            labels = y.float()[:, None, None, None] + torch.zeros_like(x)
            return torch.cat([labels, 10 + labels], dim=1)

    x, t, y = torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64), torch.tensor([0, 1, 2])
    out = Guided(Network(), spec, 3.0)(x, t, y)
    # u = 2 (no label), c = y: 2 + 3 (y - 2); the variance is c's.
    assert out[:, 0, 0, 0].tolist() == [-4, -1, 2]
    assert out[:, 1, 0, 0].tolist() == [10, 11, 12]


def test_a_network_without_a_null_label_cannot_be_guided(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no label, so there is nothing to guide tow"):
        load_network(write_state_dict(tmp_path / "ckpt.pt"), guidance=2.0)
    spec = tiny_spec().with_changes(conditions=(label_condition(3, null=None),))
    with pytest.raises(CheckpointError, match="no label that means none") as caught:
        Guided(tiny_network(classes=3), spec, 2.0)
    assert "--set null_label=" in caught.value.hint
