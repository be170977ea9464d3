"""Half precision by three tools, measured on the same calls of the same networks.

    python benchmarks/precision.py unet.onnx [another.onnx ...] [--precision fp16] [--json FILE]

For each graph: this package's pass, ModelOpt AutoCast (`pip install 'nvidia-modelopt[onnx]'`) and
onnxconverter-common. A tool that is not installed, or fails on the graph, has its reason in the
table. The x_t are those of a sampling loop whose noise no tool has seen. Errors are of the mixed
graph with every half-precision result rounded once (`ddpm_deploy.export.rounding`), which runs at
full size on a CPU; with --true also by onnx.reference, which computes in NumPy's float16 and takes
minutes for a network of millions of weights.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table

from ddpm_deploy import open_engine
from ddpm_deploy.engines.ort import run_graph
from ddpm_deploy.export.calibrate import Call, calibrate, sampled
from ddpm_deploy.export.rounding import rounded
from ddpm_deploy.parity import relative_error

Convert = Callable[[Path], onnx.ModelProto]


def ours(precision: Any) -> Convert:
    """This package's pass, calibrated as `build` does it."""

    def convert(graph: Path) -> onnx.ModelProto:
        return calibrate(graph, precision).mixed.model

    return convert


def autocast(precision: str) -> Convert:
    """ModelOpt AutoCast with its own settings, float32 inputs and outputs."""

    def convert(graph: Path) -> onnx.ModelProto:
        from modelopt.onnx.autocast import convert_to_mixed_precision

        model: onnx.ModelProto = convert_to_mixed_precision(
            onnx_path=str(graph), low_precision_type=precision, keep_io_types=True
        )
        del model.graph.value_info[:]  # it leaves wrong ones, which runtimes refuse
        return model

    return convert


def converter_common(precision: str) -> Convert:
    """onnxconverter-common with its own settings, float32 inputs and outputs."""

    def convert(graph: Path) -> onnx.ModelProto:
        from onnxconverter_common import float16

        if precision != "fp16":
            raise ValueError("it knows fp16 alone")
        model = onnx.load(graph)
        # Its Cast of the timestep would be typed half and still give float.
        casts = [node.name for node in model.graph.node if node.op_type == "Cast"]
        converted: onnx.ModelProto = float16.convert_float_to_float16(
            model, keep_io_types=True, node_block_list=casts
        )
        del converted.graph.value_info[:]
        return converted

    return convert


def loud(graph: Path, folder: Path) -> Path:
    """Writes the graph with one convolution 10⁶ times larger, which its normalisation undoes."""
    model = onnx.load(graph)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    weight = weights[convolutions[len(convolutions) // 2].input[1]]
    values = numpy_helper.to_array(weight) * np.float32(1e6)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    path = folder / f"{graph.stem} with a loud layer.onnx"
    onnx.save_model(model, path)
    return path


def errors(model: onnx.ModelProto, calls: Sequence[Call], *, true: bool) -> list[float]:
    """Returns max |mixed - float32| over max |float32| for each call."""
    if true:
        from onnx.reference import ReferenceEvaluator

        evaluator: Any = ReferenceEvaluator(model)
        outs = [evaluator.run(["out"], dict(call.feeds))[0] for call in calls]
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.onnx"
            onnx.save_model(rounded(model), path)
            outs = [out for (out,) in run_graph(path, [call.feeds for call in calls], ["out"])]
    return [relative_error(out, call.out) for out, call in zip(outs, calls, strict=True)]


def measure(graph: Path, precision: str, *, true: bool) -> list[dict[str, Any]]:
    """Returns a row for each tool: its errors, or the reason why there are none."""
    tools = {
        "ddpm-deploy": ours(precision),
        f"ModelOpt AutoCast {version('nvidia-modelopt')}": autocast(precision),
        f"onnxconverter-common {version('onnxconverter-common')}": converter_common(precision),
    }
    with open_engine(graph, device="cpu") as engine:
        calls = sampled(engine, 10, 2, seed=1)
    rows = []
    for tool, convert in tools.items():
        row: dict[str, Any] = {"graph": graph.stem, "tool": tool}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = convert(graph)
                by_call = errors(model, calls, true=true)
            row |= {
                "worst": max(by_call),
                "median": float(np.median(by_call)),
                "bytes": model.ByteSize(),
            }
        except Exception as error:  # noqa: BLE001  (whatever a tool does, the others are measured)
            row["reason"] = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
        rows.append(row)
    return rows


def version(package: str) -> str:
    """Returns a package's version in words."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("graphs", nargs="+", type=Path)
    parser.add_argument("--precision", choices=["fp16", "bf16"], default="fp16")
    parser.add_argument("--true", action="store_true", help="compute in NumPy's float16")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for graph in arguments.graphs:
            for case in (graph, loud(graph, Path(folder))):
                rows += measure(case, arguments.precision, true=arguments.true)
    table = Table(title=f"error of the output over its peak, {arguments.precision}")
    for heading in ("graph", "tool", "worst of 10 timesteps", "median", "MB"):
        table.add_column(heading)
    for row in rows:
        if "reason" in row:
            table.add_row(row["graph"], row["tool"], row["reason"], "", "")
        else:
            numbers = f"{row['worst']:.1e}", f"{row['median']:.1e}", f"{row['bytes'] / 1e6:.1f}"
            table.add_row(row["graph"], row["tool"], *numbers)
    Console(width=120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
