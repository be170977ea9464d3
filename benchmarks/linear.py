"""Does the cost grow with the images and the steps alone? python benchmarks/linear.py unet.onnx.

Prints the time of an image's step over the batch, the time of a step over the length of the loop,
and the peak memory of `sample` over the number of images, each of which should stay as it is, or
fall where a larger batch fills the processor better.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from ddpm_deploy.bench import engine_loop
from ddpm_deploy.engines.base import Engine, open_engine
from ddpm_deploy.run import Recipe, sample

PEAK = """
import resource, sys
from ddpm_deploy.cli.app import app
try:
    app(sys.argv[1:])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def over_batches(engine: Engine, batches: list[int], *, steps: int, rounds: int) -> None:
    """Prints the median milliseconds of an image's step, the batches taking turns."""
    recipe = Recipe(sampler="ddpm", steps=steps)
    taken: dict[int, list[float]] = defaultdict(list)
    for n in batches:
        list(engine_loop(engine, recipe, n)(1))
    for _ in range(rounds):
        for n in batches:
            taken[n] += [step.total for step in engine_loop(engine, recipe, n)(steps)]
    print("batch    ms a step    ms an image's step")
    for n in batches:
        median = 1000 * statistics.median(taken[n])
        print(f"{n:5} {median:12.3f} {median / n:21.3f}")


def over_steps(engine: Engine, lengths: list[int], *, rounds: int) -> None:
    """Prints the median milliseconds of a step in loops of several lengths."""
    taken: dict[int, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for steps in lengths:
            start = time.perf_counter()
            sample(engine, Recipe(sampler="ddpm", steps=steps), [0])
            taken[steps].append(time.perf_counter() - start)
    print("steps    ms an image    ms a step")
    for steps in lengths:
        median = 1000 * statistics.median(taken[steps])
        print(f"{steps:5} {median:14.1f} {median / steps:12.3f}")


def over_images(path: Path, counts: list[int]) -> None:
    """Prints the peak memory of runs of two steps."""
    print("images    peak MiB")
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            loop = ["--sampler", "ddim", "--steps", "2"]
            arguments = ["sample", "-e", str(path), "-n", str(count), "-o", folder, *loop]
            done = subprocess.run(
                [sys.executable, "-c", PEAK, *arguments], check=True, capture_output=True, text=True
            )
        print(f"{count:6} {int(done.stderr.splitlines()[-1]) / 1024:11.0f}")


def main() -> None:
    """Prints the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[5, 10, 20, 40])
    parser.add_argument("--counts", type=int, nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=4, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with open_engine(arguments.engine) as engine:
        print(f"{engine.path} on {engine.name}")
        over_batches(engine, arguments.batches, steps=arguments.steps, rounds=arguments.rounds)
        over_steps(engine, arguments.lengths, rounds=arguments.rounds)
    if arguments.counts:
        over_images(arguments.engine, arguments.counts)


if __name__ == "__main__":
    main()
