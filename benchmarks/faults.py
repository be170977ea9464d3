"""Faults planted between a trained network and a deployed loop: is each seen, and named?

    python benchmarks/faults.py demo/out/unet.onnx

The graph is the demo's, exported (`make demo`). Every fault of tests/verify/faults.py and
graph_faults.py is planted and compared with the healthy graph at 24 timesteps. A row says how far
it moves the loop, and what `verify` names first.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).parents[1]))

from ddpm_deploy import Engine, Recipe, open_engine
from ddpm_deploy.export.explain import explain
from ddpm_deploy.verify.compare import Side
from ddpm_deploy.verify.sampled import stratified
from ddpm_deploy.verify.verification import verify
from tests.verify.faults import LOOPS, NETWORKS, PICTURES, World
from tests.verify.graph_faults import GRAPHS


def planted(world: World, graph: Path, folder: Path) -> Iterator[tuple[str, str, Side]]:
    """Yields each fault's name, the cause to be named, and the faulty side."""
    for name, (cause, plant_loop) in LOOPS.items():
        yield name, cause, plant_loop(world)
        yield f"{name}, recorded", cause, world.trace(plant_loop(world))
    for name, (cause, plant) in (*NETWORKS.items(), *PICTURES.items()):
        yield name, cause, plant(world)
    for name, (cause, edit) in GRAPHS.items():
        model = onnx.load(graph)
        edit(model)
        onnx.save_model(model, folder / "fault.onnx")
        yield name, cause, open_engine(folder / "fault.onnx", threads=1)


def row(name: str, cause: str, side: Side, good: Engine, world: World) -> tuple[bool, bool]:
    """Prints a fault's row; returns whether it was seen and named."""
    start = time.perf_counter()
    found = verify(side, good, world.recipe, world.images)
    causes = explain(found, good, side) if not found.passed else ()
    took = time.perf_counter() - start
    steps = found.comparison.steps
    local = max((step.local.out.max for step in steps), default=float("nan"))
    free = max((step.accumulated.x.max for step in steps), default=float("nan"))
    named = causes[0].name if causes else "-"
    right = "" if named == cause else f"   (should be {cause})"
    print(f"{name:38} {local:8.1e} {free:8.1e}  {named}{right}  {took:.1f} s", flush=True)
    return not found.passed, named == cause


def main() -> None:
    """Plants every fault and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("graph", type=Path, help="the demo's graph, exported")
    graph = parser.parse_args().graph
    recipe = Recipe(sampler="ddpm", steps=stratified(1000, 24, seed=0))
    good, other = (open_engine(graph, threads=1) for _ in range(2))
    world = World(good=other, recipe=recipe, images=range(4))
    print(f"{'fault':38} {'local ε':>8} {'free x':>8}  cause named first")
    with tempfile.TemporaryDirectory() as folder:
        results = [
            row(name, cause, side, good, world)
            for name, cause, side in planted(world, graph, Path(folder))
        ]
    print(
        f"\n{len(results)} faults: {sum(seen for seen, _ in results)} seen, "
        f"{sum(named for _, named in results)} named right"
    )
    healthy = verify(other, good, recipe, world.images)
    print(f"healthy: {'inside the budget' if healthy.passed else 'OUTSIDE THE BUDGET'}")


if __name__ == "__main__":
    main()
