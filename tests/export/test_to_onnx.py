"""An exported graph is the network, for any batch, or it does not appear."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from ddpm_deploy import open_engine
from ddpm_deploy.engines.pytorch import TorchEngine
from ddpm_deploy.errors import ExportError
from ddpm_deploy.export import to_onnx
from ddpm_deploy.export.to_onnx import export_network
from tests.support import tiny_network, tiny_spec


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "unet.onnx"
    export_network(tiny_network(classes=3), tiny_spec(classes=3), path)
    return path


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 16])
def test_every_batch_size_gives_what_torch_gives(exported: Path, batch: int) -> None:
    spec = tiny_spec(classes=3)
    reference = TorchEngine(tiny_network(classes=3), spec, path=exported, device="cpu")
    x = np.random.default_rng(batch).standard_normal((batch, 1, 8, 8)).astype(np.float32)
    t = np.arange(batch, dtype=np.int64) % 20
    y = np.arange(batch, dtype=np.int64) % 4
    wanted = reference(x, t, y=y)
    with open_engine(exported) as engine:
        given = engine(x, t, y=y)
    assert np.abs(given - wanted).max() <= 2e-5 * np.abs(wanted).max()


def test_timestep_and_label_are_inputs_and_the_batch_is_free(exported: Path) -> None:
    graph = onnx.load(exported).graph
    shapes = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in graph.input
    }
    assert shapes == {"x": ["batch", 1, 8, 8], "t": ["batch"], "y": ["batch"]}
    assert [o.name for o in graph.output] == ["out"]
    types = {i.name: i.type.tensor_type.elem_type for i in graph.input}
    assert types == {
        "x": onnx.TensorProto.FLOAT,
        "t": onnx.TensorProto.INT64,
        "y": onnx.TensorProto.INT64,
    }


def test_opset_20_is_the_default_and_its_operators_are_those_of_jetson(exported: Path) -> None:
    model = onnx.load(exported)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    operators = {node.op_type for node in model.graph.node}
    # TensorRT 10.3's parser reads neither; see docs/design.md.
    assert not operators & {"GroupNormalization", "Attention"}


def test_the_spec_travels_in_the_file(exported: Path) -> None:
    with open_engine(exported) as engine:
        assert engine.spec == tiny_spec(classes=3)


def test_the_file_says_nothing_of_the_machine_it_was_made_on(exported: Path) -> None:
    content = exported.read_bytes()
    for trace in (b"/site-packages/", b"unet.py", str(Path.cwd()).encode(), b"stack_trace"):
        assert trace not in content


@pytest.mark.parametrize("opset", [18, 23])
def test_other_opsets_are_checked_like_the_default(tmp_path: Path, opset: int) -> None:
    path = tmp_path / "unet.onnx"
    export_network(tiny_network(), tiny_spec(), path, opset=opset)
    assert onnx.load(path).opset_import[0].version == opset


def test_an_opset_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="opset is 17; this exporter writes 18 to 23"):
        export_network(tiny_network(), tiny_spec(), tmp_path / "unet.onnx", opset=17)
    assert not list(tmp_path.iterdir())


def test_weights_past_the_limit_of_one_file_go_beside_it(
    traced: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_onnx, "EXTERNAL_DATA_BYTES", 0)
    path = tmp_path / "unet.onnx"
    exported = export_network(tiny_network(classes=3), tiny_spec(classes=3), path)
    data = next(tmp_path.glob("*.data"))
    assert sorted(tmp_path.iterdir()) == sorted([path, data])
    assert exported.bytes == path.stat().st_size + data.stat().st_size
    with open_engine(path) as engine:
        assert engine(*_inputs(), y=np.zeros(2, np.int64)).shape == (2, 1, 8, 8)


class _BakesTheBatch(nn.Module):
    """Works for the example's batch of 2 alone."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x.reshape(2, 1, 8, 8) * t.to(torch.float32)[:, None, None, None]


def test_a_network_that_takes_one_batch_size_alone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"torch.onnx could not export"):
        export_network(_BakesTheBatch(), tiny_spec(), tmp_path / "unet.onnx")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def traced(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares tests of what follows the trace its ten seconds."""

    def trace(*_: object, **__: object) -> onnx.ModelProto:
        return onnx.load(exported)

    monkeypatch.setattr(to_onnx, "trace_network", trace)


def test_a_graph_that_answers_otherwise_is_never_written(traced: None, tmp_path: Path) -> None:
    path = tmp_path / "unet.onnx"
    path.write_bytes(b"what stood here before")
    other = tiny_network(classes=3, seed=1)
    with pytest.raises(ExportError, match=r"not the trained network: at batch 1, t = \[0\]"):
        export_network(other, tiny_spec(classes=3), path)
    assert path.read_bytes() == b"what stood here before"
    assert list(tmp_path.iterdir()) == [path]


def _inputs() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((2, 1, 8, 8), np.float32), np.zeros(2, np.int64)
