"""The names of TensorRT's programming interface that the package uses, by class.

`test_trt_api` holds both ends: no file uses another name, and each release's bindings have these.
"""

from __future__ import annotations

from collections.abc import Mapping

FILES = ("engines/trt_network.py",)
"""The files that touch TensorRT."""

RTX = "tensorrt-rtx-cu13-bindings==1.7.1.116"

EVERYWHERE: Mapping[str, tuple[str, ...]] = {
    "": ("__version__", "ILogger", "Runtime"),
    "DataType": ("BOOL", "FLOAT", "HALF", "INT32", "INT64"),
    "ICudaEngine": (
        "create_execution_context",
        "get_tensor_dtype",
        "get_tensor_mode",
        "get_tensor_name",
        "get_tensor_shape",
        "num_io_tensors",
    ),
    "IExecutionContext": (
        "execute_async_v3",
        "infer_shapes",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
    ),
    "ILogger": ("__init__", "log"),
    "ILogger.Severity": ("ERROR", "INTERNAL_ERROR"),
    "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed"),
    "TensorIOMode": ("INPUT",),
}
"""Used without asking, so in every release."""

ASKED_FOR: Mapping[str, tuple[str, ...]] = {
    "CudaGraphStrategy": ("WHOLE_GRAPH_CAPTURE",),
    "DynamicShapesKernelSpecializationStrategy": ("EAGER",),
    "IRuntimeCache": ("deserialize", "serialize"),
    "IRuntimeConfig": (
        "create_runtime_cache",
        "cuda_graph_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
        "set_runtime_cache",
    ),
}
"""Used behind `hasattr(trt, "CudaGraphStrategy")`: in TensorRT-RTX, and in no TensorRT so far."""

BOTH: Mapping[str, tuple[str, ...]] = {"ICudaEngine": ("create_runtime_config",)}
"""Used behind the same question, and in some releases of TensorRT too."""

PYTHON = {
    # Attributes of our own objects, of NumPy and of Python in these files.
    "append", "get", "items", "join", "last", "name", "read", "read_bytes", "runtime", "strip",
    "version_compatible", "write",
}  # fmt: skip
