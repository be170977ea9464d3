from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddpm_deploy import Condition, Engine, ModelSpec, open_engine
from ddpm_deploy.engines import base as base_module
from ddpm_deploy.engines.base import CHECKPOINT_SUFFIXES, read_spec
from ddpm_deploy.errors import (
    EngineError,
    EngineInputError,
    MissingDependencyError,
    SpecError,
)
from ddpm_deploy.files import sha256
from tests.engines.plans import BYTES, record, write_plan
from tests.support import tiny_spec, write_checkpoint, write_graph


class Echo(Engine):
    """Gives back x, cut as asked."""

    name = "echo"
    path = Path("echo.onnx")

    def __init__(self, spec: ModelSpec, *, keep: int | None = None) -> None:
        self.spec, self.keep = spec, keep
        self.fed: Mapping[str, Any] = {}

    def _run(self, feeds: Mapping[str, Any]) -> np.ndarray:
        self.fed = feeds
        return np.asarray(feeds["x"][: self.keep])


X = np.zeros((2, 1, 8, 8), dtype=np.float32)
T = np.zeros(2, dtype=np.int64)
Y = np.zeros(2, dtype=np.int64)


def test_what_fits_reaches_the_runtime_by_name() -> None:
    engine = Echo(tiny_spec(classes=4))
    assert engine(X, T, y=Y) is not None
    assert list(engine.fed) == ["x", "t", "y"]


@pytest.mark.parametrize(
    ("x", "t", "message"),
    [
        (
            X.astype(np.float64),
            T,
            r"x is float64 \(2, 1, 8, 8\); this engine takes float32 \(N, 1, 8, 8\)",
        ),
        (X[:, :, :4], T, r"x is float32 \(2, 1, 4, 8\); this engine takes float32 \(N, 1, 8, 8\)"),
        (X[0], T, r"x is float32 \(1, 8, 8\)"),
        (X[:0], T[:0], r"x is float32 \(0, 1, 8, 8\)"),
        (X.tolist(), T, "x is <class 'list'>"),
        (X, T.astype(np.int32), r"t is int32 \(2,\); this engine takes int64 \(2,\)"),
        (X, T[:1], r"t is int64 \(1,\); this engine takes int64 \(2,\)"),
        (X, T[:, None], r"t is int64 \(2, 1\)"),
        (X, T - 1, r"t is -1\.\.-1; this network has timesteps 0\.\.19"),
        (X, T + 20, r"t is 20\.\.20; this network has timesteps 0\.\.19"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_with_both_shapes(x: Any, t: Any, message: str) -> None:
    with pytest.raises(EngineInputError, match=message):
        Echo(tiny_spec())(x, t)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({}, "The conditions given are none; this engine takes y"),
        ({"z": Y}, "The conditions given are z; this engine takes y"),
        ({"y": Y, "z": Y}, "The conditions given are y, z; this engine takes y"),
        ({"y": Y.astype(np.int32)}, r"y is int32 \(2,\); this engine takes int64 \(2,\)"),
        ({"y": Y[:1]}, r"y is int64 \(1,\)"),
        ({"y": Y + 5}, r"y is 5\.\.5; this network has labels 0\.\.3, and 4 for none"),
        ({"y": Y - 1}, r"y is -1\.\.-1; this network has labels 0\.\.3, and 4 for none"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(conditions: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineInputError, match=message):
        Echo(tiny_spec(classes=4))(X, T, **conditions)


@pytest.mark.parametrize(("null", "refused"), [(0, 4), (9, 7), (None, 4)])
def test_the_null_label_may_stand_anywhere(null: int | None, refused: int) -> None:
    label = Condition(name="y", meaning="class_label", dtype="int64", classes=4, null=null)
    engine = Echo(replace(tiny_spec(), conditions=(label,)))
    for allowed in (3, 0 if null is None else null):
        engine(X, T, y=Y + allowed)
    with pytest.raises(EngineInputError, match=rf"y is {refused}\.\.{refused}; this network"):
        engine(X, T, y=Y + refused)


def test_an_observation_has_its_own_shape() -> None:
    observation = Condition(name="obs", meaning="observation", dtype="float32", shape=(7,))
    engine = Echo(replace(tiny_spec(), conditions=(observation,)))
    engine(X, T, obs=np.zeros((2, 7), dtype=np.float32))
    with pytest.raises(EngineInputError, match=r"obs is float32 \(2, 8\); this engine takes"):
        engine(X, T, obs=np.zeros((2, 8), dtype=np.float32))


def test_an_output_of_another_shape_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"gives \(1, 1, 8, 8\); its spec says \(2, 1, 8, 8\)"):
        Echo(tiny_spec(), keep=1)(X, T)
    learned = replace(tiny_spec(), variance="learned")
    with pytest.raises(EngineError, match=r"gives \(2, 1, 8, 8\); its spec says \(2, 2, 8, 8\)"):
        Echo(learned)(X, T)


def test_the_suffix_decides_the_runtime(tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "unet.onnx", tiny_spec())
    assert open_engine(graph).name == "onnxruntime CPU"
    checkpoint = write_checkpoint(tmp_path / "ckpt.pt")
    for suffix in set(CHECKPOINT_SUFFIXES) - {".safetensors"}:
        renamed = checkpoint.rename(tmp_path / f"ckpt{suffix}")
        assert open_engine(str(renamed)).name == "torch CPU"
        checkpoint = renamed


@pytest.mark.parametrize("name", ["unet", "unet.txt", "unet.engine", "unet.ONNX", ".onnx"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(EngineError, match="is not an engine: its suffix is"):
        open_engine(tmp_path / name)


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"There is no file .*unet\.onnx") as missing:
        open_engine(tmp_path / "unet.onnx")
    assert missing.value.hint == "Make it first: ddpm-deploy export CHECKPOINT -o unet.onnx"
    with pytest.raises(EngineError, match=r"There is no file .*unet\.plan") as plan:
        open_engine(tmp_path / "unet.plan")
    assert plan.value.hint == "Build it first: ddpm-deploy build --fp16"


@pytest.mark.parametrize("graph", ["small.onnx", "unet.onnx"])
def test_a_missing_plan_is_built_of_the_graph_beside_it(tmp_path: Path, graph: str) -> None:
    write_graph(tmp_path / graph, tiny_spec())
    with pytest.raises(EngineError, match=r"There is no file .*small\.plan") as plan:
        open_engine(tmp_path / "small.plan")
    built = f"ddpm-deploy build {tmp_path / graph} --fp16 -o {tmp_path / 'small.plan'}"
    assert plan.value.hint == f"Build it first: {built}"


def test_a_spec_is_read_of_every_kind_of_file(tmp_path: Path) -> None:
    spec = tiny_spec()
    assert read_spec(write_graph(tmp_path / "unet.onnx", spec)) == spec
    # Of a plan that no machine runs, whose bytes are no plan's.
    assert read_spec(str(write_plan(tmp_path / "unet.plan", record(spec=spec)))) == spec
    checkpoint = write_checkpoint(tmp_path / "ckpt.pt")
    assert read_spec(checkpoint) == open_engine(checkpoint).spec


def test_a_graph_s_spec_is_read_without_a_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_graph(tmp_path / "unet.onnx", tiny_spec(classes=3))
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    assert read_spec(path) == tiny_spec(classes=3)
    with pytest.raises(SpecError, match=r"bare\.onnx carries no ddpm-deploy spec"):
        read_spec(write_graph(tmp_path / "bare.onnx", None))


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_graph(tmp_path / "unet.onnx", tiny_spec())
    wanted = sha256(path)
    hashed: list[Path] = []

    def noted(path: Path) -> str:
        hashed.append(path)
        return sha256(path)

    monkeypatch.setattr(base_module, "sha256", noted)
    with open_engine(path) as engine:
        assert engine.sha256 == engine.sha256 == wanted
    assert hashed == [path]


def test_a_spec_is_not_read_of_a_plan_that_was_changed(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "unet.plan", content=BYTES[:-1])
    with pytest.raises(EngineError, match="It was cut short"):
        read_spec(plan)


@pytest.mark.parametrize(
    ("file", "package", "extra"),
    [("unet.onnx", "onnxruntime", "cpu"), ("ckpt.pt", "torch", "export")],
)
def test_a_runtime_that_is_not_installed_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, package: str, extra: str
) -> None:
    write_graph(tmp_path / "unet.onnx", tiny_spec())
    write_checkpoint(tmp_path / "ckpt.pt")
    for name in [
        n for n in sys.modules if n.startswith(("ddpm_deploy.engines.", "ddpm_deploy.model"))
    ]:
        if not name.endswith(".base"):
            monkeypatch.delitem(sys.modules, name)
    for name in {package, "openvino"}:  # which would run the graph instead
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=f"{package} is needed here") as caught:
        open_engine(tmp_path / file)
    assert caught.value.hint == f"pip install 'ddpm-deploy[{extra}]'"


@pytest.mark.parametrize("file", ["unet.onnx", "ckpt.pt"])
def test_cuda_that_is_not_there_is_a_loud_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    import onnxruntime
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    write_graph(tmp_path / "unet.onnx", tiny_spec())
    write_checkpoint(tmp_path / "ckpt.pt")
    with pytest.raises(EngineError, match=r"has no CUDA|finds no CUDA device") as caught:
        open_engine(tmp_path / file, device="cuda")
    assert caught.value.hint
    assert open_engine(tmp_path / file, device="auto").name.endswith("CPU")
    with pytest.raises(EngineError, match="The device is 'tpu'; there are auto, cpu and cuda"):
        open_engine(tmp_path / file, device="tpu")


def test_weights_outside_the_folder_of_a_graph_are_refused(tmp_path: Path) -> None:
    import onnx

    model = onnx.load_model(write_graph(tmp_path / "unet.onnx", tiny_spec()))
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(4))
    (tmp_path / "models").mkdir()
    (bias,) = [t for t in model.graph.initializer if t.name == "bias"]
    bias.ClearField("raw_data")
    bias.data_location = onnx.TensorProto.EXTERNAL
    entry = bias.external_data.add()
    entry.key, entry.value = "location", "../secret"
    path = tmp_path / "models" / "unet.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="cannot load"):
        open_engine(path)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            tiny_spec(classes=4),
            r"t int64 \(N\), x float32 \(N, 1, 8, 8\), y int64",
        ),
        (tiny_spec(size=16), r"x float32 \(N, 1, 16, 16\)"),
    ],
)
def test_a_spec_whose_inputs_are_not_the_graph_s_is_refused(
    tmp_path: Path, spec: ModelSpec, said: str
) -> None:
    import onnx

    model = onnx.load_model(write_graph(tmp_path / "unet.onnx", tiny_spec()))
    model.metadata_props[0].value = spec.to_json()
    onnx.save_model(model, tmp_path / "unet.onnx")
    with pytest.raises(SpecError, match=said):
        open_engine(tmp_path / "unet.onnx")


def test_an_engine_closes_itself(tmp_path: Path) -> None:
    closed = []

    class Closing(Echo):
        def close(self) -> None:
            closed.append(self)

    with Closing(tiny_spec()) as engine:
        assert not closed
    assert closed == [engine]
