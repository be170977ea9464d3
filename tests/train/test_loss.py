from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ddpm_deploy.schedule import cosine
from ddpm_deploy.train.loss import EpsilonLoss

rng = np.random.default_rng(0)
X0, EPS = (torch.from_numpy(rng.standard_normal((4, 1, 8, 8)).astype(np.float32)) for _ in "ab")
T = torch.tensor([0, 3, 20, 49])


def test_the_network_sees_the_forward_process_and_its_label() -> None:
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.extend([x, t, y])
        return x

    labels = torch.tensor([1, 2, 3, 4])
    EpsilonLoss(cosine(50), torch.device("cpu"))(network, X0, T, EPS, labels)
    expected = cosine(50).diffuse(X0.numpy(), T.numpy(), EPS.numpy())
    assert np.allclose(seen[0].numpy(), expected, rtol=0, atol=1e-6)  # float32 rounding
    assert torch.equal(seen[1], T)
    assert torch.equal(seen[2], labels)


def test_the_true_noise_has_no_loss_and_zeros_have_its_mean_square() -> None:
    loss = EpsilonLoss(cosine(50), torch.device("cpu"))
    assert loss(lambda x, t: EPS, X0, T, EPS, None).item() == 0.0
    zeros = loss(lambda x, t: torch.zeros_like(x), X0, T, EPS, None)
    assert np.isclose(zeros.item(), np.mean(EPS.numpy().astype(np.float64) ** 2))


def test_half_precision_outputs_are_compared_in_float32() -> None:
    loss = EpsilonLoss(cosine(50), torch.device("cpu"))
    assert loss(lambda x, t: EPS.bfloat16(), X0, T, EPS, None).dtype == torch.float32
