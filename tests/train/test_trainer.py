from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torch.nn import functional as F  # noqa: N812

from ddpm_deploy.data import ImageData, open_data
from ddpm_deploy.errors import DataError, TrainError
from ddpm_deploy.model import UNet
from ddpm_deploy.train import Trainer, check
from ddpm_deploy.train.batches import Batches
from ddpm_deploy.train.trainer import FIRST_SCALE, new_network
from tests.train.conftest import TINY, tiny


def copies(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.items()}


def test_three_steps_are_the_plain_lines_in_torch(digits: ImageData, fabric: Fabric) -> None:
    settings = tiny(lr=1e-2, clip_grad=0.5, ema=0.5)
    trainer = Trainer(settings, digits, fabric)
    for _ in range(3):
        trainer.advance()

    torch.manual_seed(settings.seed)
    network = UNet(1, classes=10, widths=TINY)
    first = network.get_parameter("inc.double_conv.0.weight")
    with torch.no_grad():
        first.mul_(FIRST_SCALE)
    average = copies(network.state_dict())
    rest = [p for p in network.parameters() if p is not first]
    optimizer = torch.optim.AdamW(
        [{"params": rest}, {"params": [first]}], weight_decay=0.01, fused=True
    )
    alpha_bar = torch.from_numpy(trainer.spec.schedule.alpha_bar.copy())[:, None, None, None]
    signal, noise = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
    batches = Batches(
        data=digits, seed=0, batch=8, timesteps=20, flip=False, drop_label=0.1, classes=10
    )
    for step in range(3):
        batch = batches.at(step)
        assert batch.y is not None
        x0, t, eps, y = (torch.from_numpy(v) for v in (batch.x0, batch.t, batch.eps, batch.y))
        lr = 1e-2 * ((step + 1) / 3)  # two steps of warm-up
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, lr * FIRST_SCALE
        out = network(signal[t] * x0 + noise[t] * eps, t, y)
        optimizer.zero_grad()
        torch.autograd.backward(F.mse_loss(out, eps))
        torch.nn.utils.clip_grad_norm_([*rest, first], 0.5)
        optimizer.step()
        decay = min(0.5, (2 + step) / (11 + step))
        for name, value in network.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value

    state = trainer.state()
    for name, value in network.state_dict().items():
        # Keys have a bias whose gradient is rounding alone, which AdamW makes as large as any
        # other: so 1e-5. A wrong rate or decay moves weights by 1e-3.
        assert torch.allclose(state["model"][name], value, rtol=0, atol=1e-5), name
        assert torch.allclose(state["ema"][name], average[name], rtol=0, atol=1e-5), name


def test_the_loss_falls(digits: ImageData, fabric: Fabric) -> None:
    trainer = Trainer(tiny(lr=3e-3, batch=32, steps=60), digits, fabric)
    losses = [trainer.advance().loss.item() for _ in range(60)]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:5])


def test_a_new_network_sees_the_size_of_its_input() -> None:
    # As PyTorch begins it, the first GroupNorm takes the size away; ours keeps about half of it.
    torch.manual_seed(0)
    x = torch.randn(4, 1, 8, 8)
    t, y = torch.full((4,), 9), torch.zeros(4, dtype=torch.int64)
    changes = []
    for network in (UNet(1, classes=10, widths=TINY), new_network(1, 10, tiny())):
        inc = network.get_submodule("inc")
        with torch.no_grad():
            small, large = inc(x), inc(1.1 * x)
        changes.append(float((large - small).norm() / small.norm()))
        assert torch.isfinite(network(x, t, y)).all()
    assert changes[0] < 1e-3
    assert changes[1] > 1e-2


def test_the_learning_rate_rises_and_falls(digits: ImageData, fabric: Fabric) -> None:
    trainer = Trainer(tiny(lr=1.0, warmup=1, cooldown=2), digits, fabric)
    rates = [trainer.advance().lr for _ in range(6)]
    assert np.allclose(rates, [1 / 2, 1, 1, 1, 2 / 3, 1 / 3])


def test_a_network_does_not_touch_torchs_own_generator(digits: ImageData, fabric: Fabric) -> None:
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    Trainer(tiny(), digits, fabric).advance()
    assert torch.equal(torch.rand(3), expected)


def test_samples_are_the_averages_and_the_same_every_time(
    digits: ImageData, fabric: Fabric
) -> None:
    trainer = Trainer(tiny(), digits, fabric)
    trainer.advance()
    x = trainer.sample(12, steps=4)
    assert x.shape == (12, 1, 8, 8)
    assert np.abs(x).max() <= 1.0
    assert np.array_equal(x, trainer.sample(12, steps=4))


def test_labels_can_be_left_unused(digits: ImageData, fabric: Fabric) -> None:
    trainer = Trainer(tiny(unconditional=True), digits, fabric)
    trainer.advance()
    assert trainer.spec.conditions == ()
    assert "label_emb.weight" not in trainer.state()["model"]
    assert trainer.sample(2, steps=2).shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_too_little_memory_names_a_smaller_batch(
    digits: ImageData, fabric: Fabric, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    trainer = Trainer(tiny(), digits, fabric)

    def full(*_: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(trainer, "_loss", full)
    with pytest.raises(TrainError, match="cpu has too little memory for 8 pictures") as caught:
        trainer.advance()
    assert caught.value.hint.endswith("--batch 4")


def test_data_that_do_not_fit_are_refused(digits: ImageData) -> None:
    with pytest.raises(DataError, match="are 28x28; this network halves them three") as caught:
        check(tiny(), open_data("digits", image_size=28), 1)
    assert caught.value.hint.endswith("--image-size 32")
    with pytest.raises(DataError, match=r"batch of 2000 .* digits has 1797") as caught:
        check(tiny(batch=2000), digits, 1)
    assert caught.value.hint.endswith("--batch 1797")
    with pytest.raises(TrainError, match="8 cannot be shared by 3 processes") as shared:
        check(tiny(), digits, 3)
    assert shared.value.hint.endswith("--batch 9")
