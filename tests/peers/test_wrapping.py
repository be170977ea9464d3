"""Files that ema-pytorch, accelerate and Lightning themselves write."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model import LoadedNetwork, load_network
from tests.support import tiny_network

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]


def is_of(loaded: LoadedNetwork, network: nn.Module) -> bool:
    found = loaded.network.state_dict()
    return all(torch.equal(found[name], v) for name, v in network.state_dict().items())


@pytest.mark.parametrize("wrap", [False, True])
def test_a_state_of_ema_pytorch(wrap: bool, tmp_path: Path) -> None:
    kind = pytest.importorskip("ema_pytorch").EMA
    network = tiny_network(channels=3)
    average = kind(network, beta=0.9, update_after_step=0, update_every=1)
    average.update()
    for value in network.parameters():
        value.data += 0.1
    average.update()
    state = average.state_dict()
    path = tmp_path / "ckpt.pt"
    torch.save({"net": network.state_dict(), "ema": state} if wrap else state, path)
    assert is_of(load_network(path), average.ema_model)
    assert is_of(load_network(path, weights="online"), network)


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_accelerate(safe: bool, tmp_path: Path) -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    network = tiny_network(channels=3)
    prepared, _ = accelerator.prepare(network, torch.optim.Adam(network.parameters()))
    folder = tmp_path / "run"
    accelerator.save_state(str(folder), safe_serialization=safe)
    assert is_of(load_network(folder), prepared)
    for name in ("optimizer.bin", "random_states_0.pkl"):
        with pytest.raises(CheckpointError, match=r"is (an optimizer's state|the state of random)"):
            load_network(folder / name)


def test_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, rate: float = 1e-3, network: Any = None) -> None:
            super().__init__()
            self.save_hyperparameters(ignore=["network"])
            self.model, self.model_ema = network, deepcopy(network)
            self.loss = nn.Linear(3, 3)

        def training_step(self, batch: list[Tensor], _: int) -> Tensor:
            out: Tensor = self.model(batch[0], torch.zeros(len(batch[0]), dtype=torch.int64))
            return out.mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.model.parameters())

    data = torch.utils.data.TensorDataset(torch.zeros(4, 3, 8, 8))
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=str(tmp_path),
    )
    module = Module(network=tiny_network(channels=3).train())
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    assert is_of(load_network(path), module.model_ema)
    assert is_of(load_network(path, weights="online"), module.model)
