"""PyTorch as an engine: the reference that the others are compared with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.bench import Loop, StepTime
from ddpm_deploy.engines.base import Engine
from ddpm_deploy.errors import EngineError
from ddpm_deploy.model.blame import said
from ddpm_deploy.model.checkpoint import load_network
from ddpm_deploy.model.foreign_files import NoModelError
from ddpm_deploy.run import Recipe
from ddpm_deploy.spec import ModelSpec

_FAILURES = (RuntimeError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a network raises, a user's own one too."""


class TorchEngine(Engine):
    """A network in PyTorch, float32, without TF32.

    Args:
        network: In evaluation mode; called with (x, t, *conditions).
        spec: What it is.
        path: The file it came from.
        device: `cpu`, `cuda`, or `auto` for CUDA where there is one.
        threads: CPU threads of this process; torch's choice when None.

    Raises:
        EngineError: The device is not there.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: ModelSpec,
        *,
        path: Path,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        if device not in {"auto", "cpu", "cuda"}:
            raise EngineError(f"The device is {device!r}; there are auto, cpu and cuda.")
        if device == "cuda" and not torch.cuda.is_available():
            raise EngineError(
                f"This PyTorch ({torch.__version__}) finds no CUDA device.",
                hint="Type --device cpu, or see ddpm-deploy doctor.",
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if threads is not None:
            torch.set_num_threads(threads)
        if device == "cuda":  # the reference is float32, not TF32
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
        self.spec = spec
        self.path = path
        self.name = f"torch {device.upper()}"
        self.network = network.to(device)
        self.device = device
        self._blame = "The network's own code raised this."

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        threads: int | None = None,
        device: str = "auto",
        spec: ModelSpec | None = None,
        model: str | None = None,
    ) -> TorchEngine:
        """Opens a checkpoint; arguments and errors as in `open_engine`."""
        try:
            loaded = load_network(path, spec=spec, model=model)
        except NoModelError as error:
            raise EngineError(
                f"{path} is a folder; an engine is a file.", hint=error.hint
            ) from error
        return cls(loaded.network, loaded.spec, path=path, device=device, threads=threads)

    def compiled(self) -> TorchEngine:
        """Returns it with `torch.compile` around the network, which the first call compiles."""
        made = TorchEngine(self.network, self.spec, path=self.path, device=self.device)
        made.network = cast("nn.Module", torch.compile(self.network))
        made.name = f"torch.compile {self.device.upper()}"
        made._blame = "torch.compile needs a C++ compiler, such as g++."
        return made

    def _run(self, feeds: Mapping[str, Array]) -> Samples:
        named = ("x", "t", *(condition.name for condition in self.spec.conditions))
        tensors = [torch.from_numpy(feeds[name]).to(self.device) for name in named]
        try:
            with torch.inference_mode():
                return np.asarray(self.network(*tensors).cpu().numpy(), dtype=np.float32)
        except _FAILURES as error:  # torch's out-of-memory error is a RuntimeError
            full = isinstance(error, torch.OutOfMemoryError) or "memory" in str(error)
            raise EngineError(
                f"PyTorch failed on a batch of {len(feeds['x'])}: {said(error)}",
                hint="Type a smaller --batch." if full else self._blame,
            ) from error

    def weights(self) -> Mapping[str, Array]:
        """Returns its state dict."""
        return {name: value.cpu().numpy() for name, value in self.network.state_dict().items()}

    def describe(self) -> dict[str, Any]:
        """Returns what identifies the runtime, for reports."""
        return {**super().describe(), "runtime": f"torch {torch.__version__}"}


def torch_loop(engine: TorchEngine, recipe: Recipe, batch: int) -> Loop:
    """Makes the loop as people write it in PyTorch, all of it on the network's device.

    It is what `bench` compares with: the same table, torch's noise, no NumPy.
    """
    table = recipe.table(engine.spec)
    device = engine.device
    given = recipe.conditions(engine, range(batch))
    sees = engine.spec.self_condition

    def run(steps: int) -> Iterator[StepTime]:
        generator = torch.Generator(device).manual_seed(recipe.seed)
        shape = (batch, *engine.spec.sample_shape)
        with torch.inference_mode():
            x = torch.randn(shape, generator=generator, device=device)
            before = torch.zeros_like(x)
            fed = {name: torch.from_numpy(value).to(device) for name, value in given.items()}
            for row in table[:steps]:
                start = time.perf_counter()
                t = torch.full((batch,), row.t, dtype=torch.int64, device=device)
                if sees is not None:
                    fed[sees.name] = before
                conditions = [fed[condition.name] for condition in engine.spec.conditions]
                out, v = engine.network(x, t, *conditions).tensor_split([x.shape[1]], dim=1)
                x0 = row.x0_from_x * x + row.x0_from_out * out
                if row.clip is not None:
                    x0 = x0.clamp(-row.clip, row.clip)
                x = row.x_from_x0 * x0 + row.x_from_x * x + row.x_from_out * out
                x += row.x_from_before * before
                before = x0
                if row.x_from_noise:
                    noise = torch.randn(shape, generator=generator, device=device)
                    learned = row.log_std
                    std = torch.exp(learned[0] + learned[1] * v) if learned else row.x_from_noise
                    x = x + std * noise
                if device == "cuda":
                    torch.cuda.synchronize()
                took = time.perf_counter() - start
                yield StepTime(total=took, network=took)

    return run
