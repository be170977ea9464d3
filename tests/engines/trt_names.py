"""The names of TensorRT's programming interface that the package uses, by class.

`test_trt_api` holds both ends: no file uses another name, and each release's bindings have these.
"""

from __future__ import annotations

from collections.abc import Mapping

FILES = ("engines/trt_network.py", "engines/trt_worker.py")
"""The files that touch TensorRT."""

RTX = "tensorrt-rtx-cu13-bindings==1.7.1.116"

EVERYWHERE: Mapping[str, tuple[str, ...]] = {
    "": ("__version__", "ILogger", "OnnxParser", "Runtime"),
    "BuilderFlag": ("TF32",),
    "DataType": ("BOOL", "FLOAT", "HALF", "INT32", "INT64"),
    "HardwareCompatibilityLevel": ("AMPERE_PLUS",),
    "IBuilderConfig": ("clear_flag", "get_timing_cache"),
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
    "ILayer": ("get_output", "num_outputs", "type"),
    "ILogger": ("__init__", "log"),
    "ILogger.Severity": ("ERROR", "INTERNAL_ERROR"),
    "INetworkDefinition": ("__getitem__", "get_input", "num_inputs"),
    "ITensor": ("dtype", "name", "shape"),
    "ITimingCache": ("serialize",),
    "MemoryPoolType": ("WORKSPACE",),
    "OnnxParser": ("get_error", "num_errors", "parse_from_file"),
    "ParserError": ("code", "desc", "node_name", "node_operator"),
    "Runtime": ("deserialize_cuda_engine", "engine_host_code_allowed"),
    "TensorIOMode": ("INPUT",),
}
"""Used without asking, or asked for only because releases before these lack it."""

ASKED_FOR: Mapping[str, tuple[str, ...]] = {
    "ComputeCapability": ("__members__",),
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
"""Used for TensorRT-RTX alone: there, and in no TensorRT so far."""

BOTH: Mapping[str, tuple[str, ...]] = {"ICudaEngine": ("create_runtime_config",)}
"""Used for TensorRT-RTX alone, and in some releases of TensorRT too."""

PYTHON = {
    # Attributes of our own objects, of NumPy and of Python in these files.
    "__name__", "add", "append", "best", "clear", "flush", "get", "hint", "is_file", "items",
    "join", "last", "least", "lower", "most", "open", "read", "read_bytes", "replace", "rpartition",
    "runtime", "split", "startswith", "strip", "version_compatible", "write",
}  # fmt: skip
