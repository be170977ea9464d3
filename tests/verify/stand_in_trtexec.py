"""Stands in for trtexec: reads its options as samples/common/sampleOptions.cpp does.

The engine is an ONNX graph in ONNX Runtime. It knows what the commands use, and refuses the rest.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

TYPES = {"tensor(float)": "<f4", "tensor(int64)": "<i8"}

options = []
for word in sys.argv[1:]:
    name, _, value = word.removeprefix("--").partition("=")
    options.append((name, value))
known = dict(options)
allowed = {"loadEngine", "shapes", "iterations", "warmUp", "duration", "avgRuns", "loadInputs"}
allowed |= {"exportOutput", "refPair", "loadRefOutputs", "accuracyAlgorithm", "accuracyThreshold"}
assert set(known) <= allowed, sorted(set(known) - allowed)


def pairs(text: str) -> dict[str, str]:
    return dict(part.rsplit(":", 1) for part in text.split(","))


def load(path: str, dtype: str, shape: Sequence[int]) -> Any:
    array: Any = np.fromfile(path, dtype)
    assert array.nbytes == np.prod(shape) * np.dtype(dtype).itemsize, path
    return array.reshape(shape)


session = onnxruntime.InferenceSession(known["loadEngine"])
shapes = {
    name: [int(n) for n in shape.split("x")] for name, shape in pairs(known["shapes"]).items()
}
inputs = [pairs(value) for name, value in options if name == "loadInputs"]
references = [pairs(value) for name, value in options if name == "loadRefOutputs"]
assert len(inputs) == 1 or [v for n, v in options if n == "refPair"] == [
    str(i) for i in range(len(inputs))
]
failed = False
for i, files in enumerate(inputs):
    assert set(files) == set(shapes)
    feeds = {
        each.name: load(files[each.name], TYPES[each.type], shapes[each.name])
        for each in session.get_inputs()
    }
    (out,) = session.run(["out"], feeds)
    if references:
        assert known["accuracyAlgorithm"] == "lInf"
        wanted = load(references[i]["out"], "<f4", out.shape)
        failed |= float(np.abs(out - wanted).max()) >= float(known["accuracyThreshold"])
if "exportOutput" in known:
    values = [float(f"{value:.6g}") for value in out.ravel()]  # as C++ streams write floats
    dimensions = "x".join(map(str, out.shape))
    said = [{"name": "out", "dimensions": dimensions, "values": values}]
    Path(known["exportOutput"]).write_text(json.dumps(said))
sys.exit(failed)
