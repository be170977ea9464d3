"""What arithmetics should err by in a loop, beside what they do.

    python benchmarks/expected_errors.py [ckpt.pt or unet.onnx ...] [--sampler ddim --steps 50]

For each network the errors that `ddpm-deploy budget` expects of its float32 loop, and those that
`ddpm-deploy verify` measures with engines that compute so:

    fp32    the graph in ONNX Runtime, against the checkpoint in PyTorch
    tf32    factors of every product rounded to 10 bits behind the point, the rest float32
    fp16    this package's mixed graph, every half-precision result rounded once
    bf16    the same
    int8    ONNX Runtime's static quantisation: Q/DQ, weights per channel
    bf16 OpenVINO, fp32 OpenVINO    its CPU plugin, where the processor has bfloat16

`share` and `persistent` are what ddpm_deploy/verify/expect.py calls SHARE and PERSISTENT, measured.
The demo's whole loop takes three minutes, of which PyTorch's calls are two.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table

from ddpm_deploy import Engine, open_engine
from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.export.calibrate import sampled
from ddpm_deploy.export.precision import convert
from ddpm_deploy.export.rounding import rounded
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.model.checkpoint import load_network
from ddpm_deploy.precision import Half
from ddpm_deploy.run import Recipe
from ddpm_deploy.sampling import Sampler
from ddpm_deploy.verify import Comparison, Loop, Verifier, engine_loop
from ddpm_deploy.verify.budget import UNIT_ROUNDOFF, Arithmetic, ErrorKind, Quantity
from ddpm_deploy.verify.expect import LEAST, Expectation, expected, rounding_gain

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
LIMITED: tuple[tuple[ErrorKind, Quantity], ...] = (
    ("local", "out"),
    ("local", "x0"),
    ("local", "x"),
    ("accumulated", "x0"),
    ("accumulated", "x"),
)


def tf32(model: onnx.ModelProto) -> onnx.ModelProto:
    """Returns the graph whose products' factors are rounded to TF32, to nearest.

    By Dekker's splitting: of c = (2¹³ + 1)·x the head c - (c - x) has the 24 - 13 leading digits.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    graph.initializer.append(numpy_helper.from_array(np.array(2**13 + 1, np.float32), "tf32.split"))
    nodes: list[onnx.NodeProto] = []
    heads: dict[str, str] = {}
    for node in model.graph.node:
        written = onnx.NodeProto()
        written.CopyFrom(node)
        for i in (0, 1) if node.op_type in PRODUCTS else ():
            x = node.input[i]
            if x not in heads:
                c, tail, heads[x] = f"{x}.split", f"{x}.tail", f"{x}.tf32"
                nodes += [
                    helper.make_node("Mul", [x, "tf32.split"], [c]),
                    helper.make_node("Sub", [c, x], [tail]),
                    helper.make_node("Sub", [c, tail], [heads[x]]),
                ]
            written.input[i] = heads[x]
        nodes.append(written)
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def int8(graph: Path, output: Path, engine: Engine) -> None:
    """Writes ONNX Runtime's quantised graph, calibrated on a short loop of other noise."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantise

    class Calls(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter([dict(call.feeds) for call in sampled(engine, 10, 2, seed=1)])

        def get_next(self) -> dict[str, Array] | None:
            return next(self.feeds, None)

    quantise(
        str(graph),
        str(output),
        Calls(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QInt8,
        op_types_to_quantize=list(PRODUCTS),
    )


class OpenVino(Engine):
    """A graph in OpenVINO's CPU plugin, in the precision that it is told."""

    def __init__(self, graph: Path, reference: Engine, precision: str) -> None:
        import openvino

        self.path, self.spec = graph, reference.spec
        hints = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1}
        self._model = openvino.Core().compile_model(str(graph), "CPU", hints)
        found = self._model.get_property("INFERENCE_PRECISION_HINT").to_string()
        if found != precision:
            raise RuntimeError(f"the plugin computes in {found}")
        self.name = f"OpenVINO {precision}"

    def _run(self, feeds: Mapping[str, Array]) -> Samples:
        return np.array(self._model(dict(feeds))[0], dtype=np.float32)


def engines(
    graph: Path, reference: Engine, folder: Path
) -> Iterator[tuple[str, Arithmetic, Engine]]:
    """Yields a name, the arithmetic and an engine of it."""
    if reference.path != graph:
        yield "fp32", "fp32", open_engine(graph, threads=1, device="cpu")
    model = onnx.load(graph)
    onnx.save_model(tf32(model), folder / "tf32.onnx")
    halves: tuple[Half, ...] = ("fp16", "bf16")
    for precision in halves:
        mixed = convert(model, precision).model
        onnx.save_model(rounded(mixed), folder / f"{precision}.onnx")
    int8(graph, folder / "int8.onnx", reference)
    names: tuple[Arithmetic, ...] = ("tf32", "fp16", "bf16", "int8")
    for name in names:
        yield name, name, open_engine(folder / f"{name}.onnx", threads=1, device="cpu")
    hints: tuple[tuple[str, Arithmetic], ...] = (("f32", "fp32"), ("bf16", "bf16"))
    for kind, arithmetic in hints:
        try:
            engine = OpenVino(graph, reference, kind)
        except Exception as error:  # noqa: BLE001  (whatever it lacks, the others are measured)
            print(f"no OpenVINO {kind}: {str(error).splitlines()[0][:80]}")
            continue
        yield f"{arithmetic} OpenVINO", arithmetic, engine


def persistent(errors: Sequence[Array]) -> float:
    """Returns the part of the errors that is the same at all steps, 0 to 1."""
    unit = [error.ravel() / np.linalg.norm(error) for error in errors if np.any(error)]
    energy = float(np.mean([a @ b for a, b in combinations(unit, 2)]))
    return float(np.sqrt(max(energy, 0.0)))


def row(
    name: str, arithmetic: Arithmetic, loop: Loop, result: Comparison, wanted: Expectation
) -> dict[str, Any]:
    """Returns what was measured of an engine beside what was expected."""
    ratios = [
        max(
            getattr(getattr(step, error), quantity).max
            for step in result.steps
            if part.first <= step.t <= part.last
        )
        / max(part.errors[error, quantity], LEAST)
        for error, quantity in LIMITED
        for part in wanted.ranges
    ]
    shares, errors = [], []
    for pair in result.kept:
        step = pair.local_wanted
        t = np.full(len(step.x_t), step.t, dtype=np.int64)
        errors.append(pair.local_given.out.astype(np.float64) - step.out)
        gain = rounding_gain(loop.predict, step.x_t, t, step.out)
        shares.append(np.sqrt(np.mean(errors[-1] ** 2)) / (UNIT_ROUNDOFF[arithmetic] * gain))
    pictures = result.pictures
    return {
        "engine": name,
        "local": [wanted.worst("local", "out"), result.worst_local.local.out.max],
        "accumulated": [
            wanted.worst("accumulated", "x"),
            result.worst_accumulated.accumulated.x.max,
        ],
        "pixels": [wanted.pictures.close, pictures.close if pictures else None],
        "psnr": [min(wanted.pictures.psnr), min(pictures.psnr) if pictures else None],
        "amplification": [wanted.amplification, result.amplification],
        "ratios": [min(ratios), max(ratios)],
        "share": [float(f(shares)) for f in (np.min, np.median, np.max)],
        "persistent": persistent(errors),
        "inside": not result.failures,
        "failures": result.failures,
        "bias": pictures.bias if pictures else None,
    }


def measure(network: Path, recipe: Recipe, images: Sequence[int]) -> list[dict[str, Any]]:
    """Returns a row for each engine of a network."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        graph = network
        reference = open_engine(network, threads=1, device="cpu")
        if network.suffix != ".onnx":
            graph = folder / "unet.onnx"
            loaded = load_network(network)
            export_network(loaded.network, loaded.spec, graph)
        loop = engine_loop(reference, recipe, images)
        wanted = expected(loop, recipe, images)
        rows = []
        for engine_name, arithmetic, engine in engines(graph, reference, folder):
            budget = wanted[arithmetic].budget()
            verifier = Verifier(reference, engine, recipe, images, budget=budget)
            for _ in verifier:
                pass
            rows.append(
                row(engine_name, arithmetic, loop, verifier.result, wanted[arithmetic])
                | {"network": network.name}
            )
    return rows


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", type=Path, default=[Path("demo/digits.pt")])
    parser.add_argument("--sampler")
    parser.add_argument("--steps", type=int)
    parser.add_argument("-n", "--count", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    recipe = Recipe(sampler=cast("Sampler | None", arguments.sampler), steps=arguments.steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [
            r for path in arguments.networks for r in measure(path, recipe, range(arguments.count))
        ]
    table = Table(title="expected, measured; errors over the reference's peak, the worst timestep")
    for heading in (
        *("network", "engine", "local ε", "free x", "in a level", "PSNR", "amplification"),
        *("measured/expected", "share: min, median, max", "persistent", "budget"),
    ):
        table.add_column(heading)
    for r in rows:
        table.add_row(
            r["network"],
            r["engine"],
            *("{:.1e}, {:.1e}".format(*r[name]) for name in ("local", "accumulated")),
            "{:.2%}, {:.2%}".format(*r["pixels"]),
            "{:.1f}, {:.1f}".format(*r["psnr"]),
            "{:.3g}, {:.3g}".format(*r["amplification"]),
            "{:.2f} to {:.2f}".format(*r["ratios"]),
            "{:.2f}, {:.2f}, {:.2f}".format(*r["share"]),
            f"{r['persistent']:.2f}",
            "inside" if r["inside"] else "OUTSIDE",
        )
    Console(width=190).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
