"""Small networks for tests: a graph written by hand, and checkpoints with few weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from ddpm_deploy import Condition, ModelSpec, linear
from ddpm_deploy.export.fuse_step import fuse_file
from ddpm_deploy.model import UNet, UNetWidths
from ddpm_deploy.model.family import label_condition
from ddpm_deploy.spec import METADATA_KEY

TINY_WIDTHS = UNetWidths(
    inc=4, down=(8, 8, 8), bottom=(8, 8, 8), up=(8, 4, 4), up_middle=(8, 8, 4), time=16
)


def tiny_spec(*, classes: int = 0, size: int = 8, timesteps: int = 20) -> ModelSpec:
    """A spec of one-channel images whose loop takes a moment."""
    return ModelSpec(
        sample_shape=(1, size, size),
        schedule=linear(timesteps, start=1e-3, end=0.2),
        conditions=(label_condition(classes),) if classes else (),
        family="test",
    )


def write_graph(path: Path, spec: ModelSpec | None, *, bias: float = 0.0) -> Path:
    """Writes out = 0.9·tanh(x) + t/1000 [+ 0.01·y] + bias as an ONNX file, by hand.

    Args:
        path: Where to.
        spec: Carried in the metadata; None writes a graph without one, of (1, 8, 8) images.
        bias: Added to the output.
    """
    shape = (1, 8, 8) if spec is None else spec.sample_shape
    labelled = spec is not None and spec.label is not None
    column = numpy_helper.from_array(np.array([-1, 1, 1, 1], dtype=np.int64), "column")
    constants = [
        column,
        numpy_helper.from_array(np.array(0.9, dtype=np.float32), "gain"),
        numpy_helper.from_array(np.array(1e-3, dtype=np.float32), "per_step"),
        numpy_helper.from_array(np.array(1e-2, dtype=np.float32), "per_label"),
        numpy_helper.from_array(np.array(bias, dtype=np.float32), "bias"),
    ]
    nodes = [
        helper.make_node("Tanh", ["x"], ["tanh"]),
        helper.make_node("Mul", ["tanh", "gain"], ["scaled"]),
        helper.make_node("Cast", ["t"], ["tf"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["tf", "per_step"], ["shift"]),
        helper.make_node("Reshape", ["shift", "column"], ["shift4"]),
        helper.make_node("Add", ["scaled", "shift4"], ["timed"]),
    ]
    last = "timed"
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape]),
        helper.make_tensor_value_info("t", TensorProto.INT64, ["batch"]),
    ]
    if labelled:
        inputs.append(helper.make_tensor_value_info("y", TensorProto.INT64, ["batch"]))
        nodes += [
            helper.make_node("Cast", ["y"], ["yf"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["yf", "per_label"], ["y_shift"]),
            helper.make_node("Reshape", ["y_shift", "column"], ["y4"]),
            helper.make_node("Add", ["timed", "y4"], ["labelled"]),
        ]
        last = "labelled"
    nodes.append(helper.make_node("Add", [last, "bias"], ["out"]))
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", *shape])
    graph = helper.make_graph(nodes, "tiny", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if spec is not None:
        helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, path)
    return path


def tiny_network(*, channels: int = 1, classes: int = 0, seed: int = 0) -> UNet:
    """A UNet of the real architecture with a few thousand weights."""
    torch.manual_seed(seed)
    return UNet(channels, classes=classes, widths=TINY_WIDTHS).eval()


def write_checkpoint(path: Path, *, classes: int = 0, seed: int = 0) -> Path:
    """Writes a checkpoint of a tiny network in the form of `ddpm-deploy train`."""
    own = {"format": 1, "spec": tiny_spec(classes=classes).to_json()}
    network = tiny_network(classes=classes, seed=seed)
    torch.save({"ddpm_deploy": own, "ema": network.state_dict()}, path)
    return path


def write_state_dict(path: Path, *, channels: int = 3, classes: int = 0, prefix: str = "") -> Path:
    """Writes a bare state dict, as dome272's code does."""
    state = tiny_network(channels=channels, classes=classes).state_dict()
    torch.save({prefix + key: value for key, value in state.items()}, path)
    return path


def write_fused(path: Path, spec: ModelSpec, *, bias: float = 0.0) -> Path:
    """Writes the graph of `write_graph` with its step fused."""
    fuse_file(write_graph(path, spec, bias=bias), path)
    return path


def conditioned_spec(**changes: object) -> ModelSpec:
    """A spec of sequences of 6 values in 4 channels, which see an observation and the last x_0."""
    spec = ModelSpec(
        sample_shape=(4, 6),
        schedule=linear(20, start=1e-3, end=0.2),
        conditions=(
            Condition(name="obs", meaning="observation", dtype="float32", shape=(2, 3)),
            Condition(name="last", meaning="self_condition", dtype="float32", shape=(4, 6)),
        ),
        family="test",
    )
    return spec.with_changes(**changes)


def write_conditioned(path: Path, spec: ModelSpec, *, seen: float = 0.5) -> Path:
    """Writes out = 0.8·tanh(x) + seen·last + 0.3·mean(obs) + t/100 as an ONNX file, by hand."""
    column = numpy_helper.from_array(np.array([-1, 1, 1], dtype=np.int64), "column")
    numbers = {"gain": 0.8, "seen": seen, "of_obs": 0.3, "per_step": 1e-2}
    constants = [
        column,
        *(numpy_helper.from_array(np.array(v, np.float32), name) for name, v in numbers.items()),
        numpy_helper.from_array(np.array([1, 2], dtype=np.int64), "axes"),
    ]
    nodes = [
        helper.make_node("Tanh", ["x"], ["tanh"]),
        helper.make_node("Mul", ["tanh", "gain"], ["scaled"]),
        helper.make_node("Mul", ["last", "seen"], ["of_last"]),
        helper.make_node("ReduceMean", ["obs", "axes"], ["mean"], keepdims=1),
        helper.make_node("Mul", ["mean", "of_obs"], ["observed"]),
        helper.make_node("Cast", ["t"], ["tf"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["tf", "per_step"], ["shift"]),
        helper.make_node("Reshape", ["shift", "column"], ["shift3"]),
        helper.make_node("Add", ["scaled", "of_last"], ["a"]),
        helper.make_node("Add", ["a", "observed"], ["b"]),
        helper.make_node("Add", ["b", "shift3"], ["out"]),
    ]
    shapes = {"x": spec.sample_shape, **{c.name: c.shape for c in spec.conditions}}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in shapes.items()
    ]
    inputs.append(helper.make_tensor_value_info("t", TensorProto.INT64, ["batch"]))
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", *spec.sample_shape])
    graph = helper.make_graph(nodes, "tiny", inputs, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, path)
    return path
