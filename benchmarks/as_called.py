"""What attention costs in PyTorch as most code calls it, beside the same network here.

    python benchmarks/as_called.py ckpt.pt unet.cpu.onnx [--batch 4]

`nn.MultiheadAttention(...)(x, x, x)` returns the weights of attention too unless it is told not to,
and then stores every score; dome272's code calls it so. The network of `ddpm_deploy.model`, which
`bench` times as PyTorch's loop, does not. Both get one network's weights and take turns with the
engine; their outputs are compared first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_deploy import open_engine
from ddpm_deploy.arrays import Samples
from ddpm_deploy.engines.pytorch import TorchEngine
from ddpm_deploy.parity import relative_error


class AsCalled(nn.Module):
    """Attention by PyTorch's own module, weights and all."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        state = own.state_dict()
        width = state["out_proj.weight"].shape[0]
        self.mha = nn.MultiheadAttention(width, int(own.heads), batch_first=True)  # type: ignore[arg-type]
        self.mha.load_state_dict(state)

    def forward(self, x: Tensor) -> Tensor:
        """Returns what attention gives; its weights are made and dropped."""
        out: Tensor = self.mha(x, x, x)[0]
        return out


def main() -> None:
    """Prints the milliseconds of a step, and how many times the engine's that is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    engine = open_engine(arguments.engine)
    ours = TorchEngine.open(arguments.checkpoint, device="cpu", spec=engine.spec)
    called = TorchEngine.open(arguments.checkpoint, device="cpu", spec=engine.spec)
    for name, module in list(called.network.named_modules()):
        if hasattr(module, "in_proj_weight") and hasattr(module, "heads"):
            called.network.set_submodule(name, AsCalled(module).eval())
    draw = np.random.default_rng(0)
    x = draw.standard_normal((arguments.batch, *engine.spec.sample_shape)).astype(np.float32)
    t = np.full(arguments.batch, engine.spec.schedule.T // 2, np.int64)
    loops: dict[str, Callable[[], Samples]] = {
        "PyTorch as called": lambda: called(x, t),
        "PyTorch, ddpm_deploy.model": lambda: ours(x, t),
        f"{engine.name} {arguments.engine.name}": lambda: engine(x, t),
    }
    outs = [loop() for loop in loops.values()]
    times: dict[str, list[float]] = {name: [] for name in loops}
    with torch.inference_mode():
        for _ in range(arguments.turns):
            for name, loop in loops.items():
                start = time.perf_counter()
                loop()
                times[name].append(time.perf_counter() - start)
    least = np.median(times[list(loops)[-1]])
    for (name, taken), out in zip(times.items(), outs, strict=True):
        median = float(np.median(taken))
        print(
            f"{name:44} {1000 * median:8.1f} ms  {median / least:5.2f}  "
            f"error {relative_error(out, outs[1]):.0e}"
        )


if __name__ == "__main__":
    main()
