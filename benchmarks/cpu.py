"""The tables of speed on a CPU: ours beside what people use instead.

    python benchmarks/cpu.py unet.onnx --against ckpt.pt
    python benchmarks/cpu.py unet.onnx unet.openvino.onnx --against ckpt.pt --batches 1 4 16

Prints a Markdown table for each batch size: engines and peers in turns in one process, the error of
each output against PyTorch's beside its speed, memory and the time to start from a process of its
own. Files are made with `ddpm-deploy export` and `ddpm-deploy build`; the first plain graph is what
the peers run. Nothing else should want the cores meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ddpm_deploy import Recipe
from ddpm_deploy._version import __version__
from ddpm_deploy.doctor import read_system
from ddpm_deploy.engines.contenders import (
    LABELS,
    Contender,
    Contest,
    Failure,
    Opened,
    close_all,
    contest,
    is_plain,
    open_all,
    peers,
    spec_of_first,
)
from ddpm_deploy.engines.footprint import Footprint, footprint
from ddpm_deploy.errors import DDPMDeployError

COLUMNS = ("", "step ms", "p90", "loop s", "images/s", "error", "ratio", "memory MB", "load s")
PACKAGES = ("torch", "onnxruntime", "openvino", "diffusers")


def main() -> None:
    """Prints the machine, then a table for each batch size."""
    arguments = _arguments()
    system = read_system(runtimes=())
    threads = arguments.threads or system.physical_cores(os.sched_getaffinity(0))
    versions = [
        f"{name} {system.distributions[name].version}"
        for name in PACKAGES
        if name in system.distributions
    ]
    print(
        f"{system.cpu or system.processor}, {threads} threads; ddpm-deploy {__version__}, "
        f"{', '.join(versions)}. Load {os.getloadavg()[0]:.1f} at the start."
    )
    contenders = [*_peers(arguments, threads), *_ours(arguments, threads)]
    spec = spec_of_first(contenders)
    if spec is None:
        raise SystemExit("None of the files says what the network is.")
    recipe = Recipe(steps=arguments.sampler_steps)
    # Before anything is open here: what fills the memory does so in a process of its own.
    costs: dict[tuple[str, int], Footprint] = {}
    if arguments.memory:
        for batch in arguments.batches:
            for each in contenders:
                with suppress(DDPMDeployError):  # it will fail below, too, with its reason
                    costs[each.label, batch] = footprint(each, recipe, batch, spec=spec)
                    print(f"  started {each.label} at batch {batch}", file=sys.stderr)
    opened, failures = open_all(contenders, spec=spec)
    by_name = {each.name: each for each in opened}
    for batch in arguments.batches:
        found = contest(
            opened,
            recipe,
            batch=batch,
            steps=arguments.steps,
            repeat=arguments.repeat,
            warm_up=arguments.warm_up,
        )
        print(f"\n{arguments.name or contenders[-1].label}, batch {batch}\n")
        for line in _table(found, by_name, costs):
            print(line)
        _print_reasons(found.failures)
    _print_reasons(failures)
    close_all(opened)


def _peers(arguments: argparse.Namespace, threads: int) -> list[Contender]:
    torch = Contender(
        kind="torch", path=arguments.against, label=LABELS["torch"], threads=threads, device="cpu"
    )
    others = peers(arguments.against, arguments.engines, threads=threads, device="cpu")
    return [each for each in (torch, *others) if each.kind not in arguments.without]


def _ours(arguments: argparse.Namespace, threads: int) -> list[Contender]:
    return [
        Contender(kind="engine", path=path, label=path.name, threads=threads, device="cpu")
        for path in arguments.engines
        if not is_plain(path)  # that is the peers'
    ]


def _table(
    found: Contest, by_name: Mapping[str, Opened], costs: Mapping[tuple[str, int], Footprint]
) -> Iterator[str]:
    yield _row(COLUMNS)
    yield _row(["---", *["---:"] * (len(COLUMNS) - 1)])
    for result in found.results:
        cost = costs.get((by_name[result.name].contender.label, found.batch))
        memory = cost.peak_memory if cost else None
        error = found.errors[result.name]
        yield _row(
            [
                result.name,
                f"{1000 * result.median:.1f}",
                f"{1000 * result.p90:.1f}",
                f"{result.loop:.1f}",
                f"{result.images_per_second:.3g}",
                "" if error is None else f"{error:.0e}" if error else "0",
                f"{found.results[0].median / result.median:.2f}",
                "" if memory is None else f"{memory / 1e6:.0f}",
                "" if cost is None else f"{cost.load:.1f}",
            ]
        )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _print_reasons(failures: Sequence[Failure]) -> None:
    for each in failures:
        print(f"\nNot timed: {each.name}: {each.reason}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("engines", type=Path, nargs="+", help="what export and build wrote")
    parser.add_argument("--against", type=Path, help="the checkpoint, for PyTorch")
    parser.add_argument("--name", default="", help="what to call the network")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, help="of every row; one a core if left out")
    parser.add_argument("--sampler-steps", type=int, help="steps of a loop; the family's own")
    parser.add_argument("--steps", type=int, default=10, help="steps a turn")
    parser.add_argument("--repeat", type=int, default=5, help="turns each")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the clock starts")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=list(LABELS), help="peers to leave out"
    )
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="leave memory and load out"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
