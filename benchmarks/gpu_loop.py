"""What does a step of the loop cost on a GPU, and how much of it is not the network?

    python benchmarks/gpu_loop.py                                on a machine with an NVIDIA GPU
    python benchmarks/gpu_loop.py --device cpu --sizes 8 --batches 1 2 --steps 3     a smoke test

The network is dome272's UNet, 23 million weights, which are random: their values do not change the
time. Its plan is built by whichever of TensorRT and TensorRT-RTX is installed, with the transition
in NumPy and fused behind the network; where a plan cannot be built or run, the reason stands in its
place. Beside it, the same DDPM loop as people write it in PyTorch, all of it on the GPU.

`outside` is the share of a step that is not the network: one less its time in calls in a row on
the device, by the time of a step. `of peak` is the network's multiplications in a step, by what the
card does in a large product of half-precision matrices, measured here.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm_deploy import ModelSpec, Recipe, linear, open_engine
from ddpm_deploy.bench import engine_loop
from ddpm_deploy.engines.base import Engine
from ddpm_deploy.errors import DDPMDeployError
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.model import UNet, UNetWidths

SMALL = UNetWidths(
    inc=8, down=(16, 16, 16), bottom=(16, 16, 16), up=(16, 8, 8), up_middle=(16, 16, 8), time=32
)
"""For the smoke test: an eighth of the channels."""

Loop = Callable[[int], None]
"""Runs so many steps from pure noise, and returns when they are done."""


@dataclass(frozen=True)
class Row:
    """One loop's speed: seconds of a whole step, and of the network in it."""

    name: str
    step: float
    network: float


def main() -> None:
    """Prints a table for each image size."""
    arguments = _arguments()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} finds no CUDA device; see --device cpu.")
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    peak = matmul_rate(device)
    print(f"{where}, torch {torch.__version__}: {peak / 1e12:.2f} TFLOP/s in matrix products")
    for size in arguments.sizes:
        network, spec = make_network(size, small=device == "cpu")
        work = flops(network, size)
        print(f"\n{size}x{size}, {work / 1e9:.2f} GFLOP an image and step, {spec.schedule.T} steps")
        print(f"{'loop':34} batch  steps/s  images/s  outside  of peak")
        with tempfile.TemporaryDirectory() as folder:
            files = list(engine_files(Path(folder), network, spec, arguments))
            for batch in arguments.batches:
                rows = [*torch_rows(network, spec, batch, arguments)]
                rows += [
                    r for name, path in files for r in engine_rows(name, path, batch, arguments)
                ]
                for row in rows:
                    rate = work * batch / row.step / peak
                    print(
                        f"{row.name:34} {batch:5} {1 / row.step:8.1f} "
                        f"{batch / (row.step * spec.schedule.T):9.3f} "
                        f"{max(0.0, 1 - row.network / row.step):8.1%} {rate:8.1%}"
                    )


def make_network(size: int, *, small: bool) -> tuple[UNet, ModelSpec]:
    """Makes the network with random weights, on the CPU, and its spec."""
    torch.manual_seed(0)
    network = UNet(3, widths=SMALL if small else None).eval()
    spec = ModelSpec(
        sample_shape=(3, size, size),
        schedule=linear(1000, start=1e-4, end=0.02),
        family="benchmark",
    )
    return network, spec


def matmul_rate(device: str) -> float:
    """Measures a large product of matrices, the best of five: multiplications and additions/s."""
    n, dtype = (8192, torch.float16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        _wait(device)
        times.append((time.perf_counter() - start) / 10)
    return 2 * n**3 / min(times[1:])


def flops(network: UNet, size: int) -> int:
    """Counts multiplications and additions of one image's call, as PyTorch does."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        network(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.int64))
    return int(counter.get_total_flops())


def torch_rows(
    network: UNet, spec: ModelSpec, batch: int, arguments: argparse.Namespace
) -> Iterator[Row]:
    """Times PyTorch: eager, compiled, and its loop's network in a CUDA graph."""
    device: str = arguments.device
    half = arguments.precision == "fp16" and device == "cuda"
    model: Any = network.to(device)

    def eager(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.float16, enabled=half):
            out: torch.Tensor = model(x, t).float()
            return out

    yield _torch_row(f"torch eager {arguments.precision}", eager, spec, batch, arguments)
    if arguments.compile:
        last = model.to(memory_format=torch.channels_last)
        torch.compiler.reset()  # or another batch is compiled for any batch
        compiled: Any = torch.compile(last, mode="max-autotune", dynamic=False)

        def fast(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device, torch.float16, enabled=half):
                # The compiler's own graphs reuse their output's memory.
                x = x.contiguous(memory_format=torch.channels_last)
                out: torch.Tensor = compiled(x, t).float().clone()
                return out

        yield _torch_row(f"torch.compile {arguments.precision}", fast, spec, batch, arguments)
        model = model.to(memory_format=torch.contiguous_format)
    if device == "cuda":
        graphed = _graphed(eager, spec, batch)
        yield _torch_row(f"torch CUDA graph {arguments.precision}", graphed, spec, batch, arguments)
    network.to("cpu")


def _graphed(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], spec: ModelSpec, batch: int
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    x = torch.zeros(batch, *spec.sample_shape, device="cuda")
    t = torch.zeros(batch, dtype=torch.int64, device="cuda")
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(side):
        for _ in range(3):
            predict(x, t)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        out = predict(x, t)

    def replay(given: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        x.copy_(given)
        t.copy_(at)
        graph.replay()
        return out

    return replay


def _torch_row(
    name: str,
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    spec: ModelSpec,
    batch: int,
    arguments: argparse.Namespace,
) -> Row:
    device = arguments.device
    shape = (batch, *spec.sample_shape)
    table = spec.table("ddpm")

    def loop(steps: int) -> None:
        x = torch.randn(shape, device=device)
        for row in table[:steps]:
            t = torch.full((batch,), row.t, dtype=torch.int64, device=device)
            out = predict(x, t)
            x0 = row.x0_from_x * x + row.x0_from_out * out
            if row.clip is not None:
                x0 = x0.clamp(-row.clip, row.clip)
            x = row.x_from_x0 * x0 + row.x_from_x * x + row.x_from_out * out
            if row.x_from_noise:
                x = x + row.x_from_noise * torch.randn(shape, device=device)
        _wait(device)

    def alone(steps: int) -> None:
        x = torch.randn(shape, device=device)
        t = torch.zeros(batch, dtype=torch.int64, device=device)
        for _ in range(steps):
            predict(x, t)
        _wait(device)

    with torch.inference_mode():
        return Row(name, _seconds(loop, arguments.steps), _seconds(alone, arguments.steps))


def engine_files(
    folder: Path, network: UNet, spec: ModelSpec, arguments: argparse.Namespace
) -> Iterator[tuple[str, Path]]:
    """Exports the network and builds its plans, each with the command that a user types."""
    graph = folder / "unet.onnx"
    try:
        export_network(network.to("cpu"), spec, graph)
    except DDPMDeployError as error:
        print(f"  no export: {error}")
        return
    if arguments.device == "cuda":
        batches = f"1:{max(arguments.batches)}:{max(arguments.batches)}"
        for name, options in [("plan", []), ("plan, fused", ["--fuse-step"])]:
            plan = folder / f"{name.replace(', ', '-')}.plan"
            words = ["build", graph, f"--{arguments.precision}", "--batch", batches, "-o", plan]
            built = subprocess.run(
                [sys.executable, "-m", "ddpm_deploy", *map(str, words), *options],
                capture_output=True,
                text=True,
                check=False,
            )
            if built.returncode == 0:
                yield f"{name} {arguments.precision}", plan
            else:
                print(f"  no {name}: {built.stderr.strip()}")
    yield "onnxruntime fp32", graph
    fused = folder / "fused.onnx"
    with contextlib.suppress(ImportError):
        from ddpm_deploy.export.fuse_step import fuse_file

        fuse_file(graph, fused)
        yield "onnxruntime fp32, fused", fused


def engine_rows(name: str, path: Path, batch: int, arguments: argparse.Namespace) -> Iterator[Row]:
    """Times our loop with an engine; nothing, and the reason, where it does not run."""
    try:
        with open_engine(path, device=arguments.device) as engine:
            run = engine_loop(engine, Recipe(sampler="ddpm"), batch)

            def loop(steps: int) -> None:
                for _ in run(steps):
                    pass

            step = _seconds(loop, arguments.steps)
            yield Row(name, step, _network_seconds(engine, batch, arguments.steps))
    except DDPMDeployError as error:
        print(f"  {name}: {error}")


def _network_seconds(engine: Engine, batch: int, steps: int) -> float:
    if hasattr(engine, "network_seconds"):
        return float(engine.network_seconds(batch, repeat=steps))
    import numpy as np

    x = np.zeros((batch, *engine.spec.sample_shape), dtype=np.float32)
    t = np.zeros(batch, dtype=np.int64)

    def alone(count: int) -> None:
        for _ in range(count):
            engine(x, t)

    return _seconds(alone, steps)


def _seconds(loop: Loop, steps: int) -> float:
    """Returns the least time a step of three turns, after one that is not counted."""
    loop(max(2, steps // 5))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        loop(steps)
        times.append((time.perf_counter() - start) / steps)
    return min(times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64], help="pixels a side")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=100, help="steps a turn")
    parser.add_argument("--precision", choices=["fp16", "fp32"], default="fp16")
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave torch.compile out"
    )
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        arguments.precision = "fp32"
    return arguments


if __name__ == "__main__":
    main()
