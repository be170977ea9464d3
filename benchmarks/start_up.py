"""How long does a start take? python benchmarks/start_up.py [--engine unet.onnx --checkpoint x.pt].

Times new processes, several of each in turn, and prints the median in milliseconds, and how many
times Python's own start that is. With an engine also the time from the start of `sample` until its
first step is done, as run.json tells it; with a checkpoint as well, the same of a script that
imports PyTorch, loads the checkpoint and calls the network once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

ROUNDS = 9
COMMANDS = {
    "python alone": ["-c", "pass"],
    "import numpy": ["-c", "import numpy"],
    "import ddpm_deploy": ["-c", "import ddpm_deploy"],
    "ddpm-deploy --help": ["-m", "ddpm_deploy", "--help"],
    "import onnxruntime": ["-c", "import onnxruntime"],
    "import openvino": ["-c", "import openvino"],
    "import torch": ["-c", "import torch"],
}

# Through the package's own loader, which also tells the family and hashes the file.
IN_TORCH = """
import sys, time
import numpy as np, torch
from ddpm_deploy.engines.pytorch import TorchEngine
from ddpm_deploy.parity import example_conditions
from pathlib import Path
engine = TorchEngine.open(Path(sys.argv[1]), device="cpu")
x = np.zeros((1, *engine.spec.sample_shape), np.float32)
engine(x, np.zeros(1, np.int64), **example_conditions(engine.spec, 1))
from ddpm_deploy.process import seconds_since_start
print(seconds_since_start())
"""


def whole(arguments: list[str]) -> float:
    """Returns the seconds that a process takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def to_the_first_step(engine: Path) -> float:
    """Returns the seconds until the first step of `sample` is done."""
    with tempfile.TemporaryDirectory() as folder:
        loop = ["--sampler", "ddim", "--steps", "1", "--batch", "1", "-n", "1", "-o", folder]
        whole(["-m", "ddpm_deploy", "sample", "-e", str(engine), *loop])
        timing = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))["timing"]
    return float(timing["seconds to the first step"])


def in_torch(checkpoint: Path) -> float:
    """Returns the seconds until PyTorch has called the network of a checkpoint once."""
    arguments = [sys.executable, "-c", IN_TORCH, str(checkpoint)]
    return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Prints a line for each command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", type=Path, nargs="*", default=[])
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    cases: dict[str, Callable[[], float]] = {
        name: partial(whole, command)
        for name, command in COMMANDS.items()
        if not name.startswith("import ") or find_spec(name.removeprefix("import "))
    }
    for engine in arguments.engine:
        cases[f"first step, {engine.name}"] = partial(to_the_first_step, engine)
    if arguments.checkpoint:
        cases["first step, PyTorch"] = partial(in_torch, arguments.checkpoint)
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(arguments.rounds):
        for name, measured in cases.items():
            times[name].append(measured())
    alone = statistics.median(times["python alone"])
    for name in cases:
        median = statistics.median(times[name])
        print(f"{name:28} {1000 * median:6.0f} ms {median / alone:6.1f}")


if __name__ == "__main__":
    main()
