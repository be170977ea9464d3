"""A network in OpenVINO, which computes in bf16 for real: another runtime to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from ddpm_deploy import Engine, open_engine
from ddpm_deploy.arrays import Samples
from ddpm_deploy.precision import Precision


class OpenVinoEngine(Engine):
    """An exported graph, on the CPU.

    Args:
        path: The `.onnx` file.
        precision: `fp32` or `bf16`.
    """

    name = "openvino CPU"

    def __init__(self, path: Path, *, precision: Precision = "fp32") -> None:
        self.path, self.precision = path, precision
        self.spec = open_engine(path, device="cpu", threads=1).spec
        hint = {"fp32": "f32", "bf16": "bf16"}[precision]
        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": 1}
        self._compiled = openvino.Core().compile_model(path, "CPU", settings)
        self.computes_in = str(self._compiled.get_property("INFERENCE_PRECISION_HINT"))

    def _run(self, feeds: Mapping[str, Any]) -> Samples:
        result = self._compiled(dict(feeds))
        return np.array(result[self._compiled.output("out")], np.float32)
