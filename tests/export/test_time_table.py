from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from ddpm_deploy.arrays import Array
from ddpm_deploy.export import time_table
from ddpm_deploy.export.time_table import tabulate_time
from ddpm_deploy.export.to_onnx import export_network
from tests.export.test_attention import count, graph, reference, runtime, unet_feeds
from tests.support import tiny_network, tiny_spec

TIMED = """
<ir_version: 10, opset_import: ["" : 20], metadata_props: ["kept": "as it was"]>
g (float[batch, 2] x, int64[batch] t) => (float[batch, 2] out)
<int64[1] last = {1}, float[1, 3] frequency = {0.1, 0.01, 0.001},
 float[3, 2] weight = {1, 2, 3, 4, 5, 6}, float[2] bias = {0.5, -0.5}>
{
    wide = Cast <to = 1> (t)
    column = Unsqueeze (wide, last)
    angle = Mul (column, frequency)
    sine = Sin (angle)
    embedded = Gemm (sine, weight, bias)
    out = Mul (x, embedded)
}
"""


def feeds(*t: int) -> dict[str, Array]:
    x = np.random.default_rng(0).standard_normal((len(t), 2)).astype(np.float32)
    return {"x": x, "t": np.array(t, np.int64)}


def test_what_depends_on_the_timestep_alone_becomes_a_table() -> None:
    found = tabulate_time(graph(TIMED), timesteps=50)
    assert [node.op_type for node in found.model.graph.node] == ["Gather", "Mul"]
    assert found.tensors == ("embedded",)
    assert found.table_bytes == 50 * 2 * 4
    given = feeds(0, 49, 7)
    np.testing.assert_allclose(
        reference(found.model, given), reference(graph(TIMED), given), atol=1e-6
    )
    assert {p.key for p in found.model.metadata_props} == {"kept"}
    assert [t.name for t in found.model.graph.initializer] == ["embedded.table"]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("Gemm (sine, weight, bias)", "MatMul (sine, weight)\nmean = ReduceMean (sine)", "read"),
        ("Sin (angle)", "Sub (angle, x3)", "x is in it"),
        ("embedded = Gemm (sine, weight, bias)", "embedded = ReduceSum (sine, last)", "no product"),
    ],
)
def test_only_products_of_the_timestep_alone_are_worth_a_table(
    old: str, new: str, why: str
) -> None:
    text = TIMED.replace(old, new)
    if "x3" in new:
        text = text.replace("sine =", "x3 = Concat <axis = 1> (x, wide_x)\nsine =").replace(
            "column =", "wide_x = ReduceSum (x, last)\ncolumn ="
        )
    model = graph(text)
    found = tabulate_time(model, timesteps=50)
    assert (found.model is model) == (why != "read")


def test_tables_that_would_be_too_large_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_table, "LARGEST_BYTES", 50 * 2 * 4 - 1)
    model = graph(TIMED)
    assert tabulate_time(model, timesteps=50).model is model


def test_a_row_that_depends_on_the_others_is_no_table_s() -> None:
    text = TIMED.replace(
        "sine = Sin (angle)", "sine = Slice (angle, end, start, first, end)"
    ).replace("int64[1] last", "int64[1] end = {-1}, int64[1] start = {-99}, int64[1] first = {0},"
              " int64[1] last")  # fmt: skip
    model = graph(text)
    assert tabulate_time(model, timesteps=50).model is model


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("angle = Mul (column, frequency)", "e = Exp (frequency)\nangle = Mul (column, e)"),
        (
            "wide = Cast <to = 1> (t)\n    column = Unsqueeze (wide, last)",
            "tall = Unsqueeze (t, last)\n    column = Cast <to = 1> (tall)",
        ),
    ],
    ids=["a constant that is computed", "rows of whole numbers"],
)
def test_what_the_timestep_goes_through_is_taken_along(old: str, new: str) -> None:
    assert old in TIMED
    model = graph(TIMED.replace(old, new))
    found = tabulate_time(model, timesteps=50)
    assert [node.op_type for node in found.model.graph.node] == ["Gather", "Mul"]
    given = feeds(0, 49, 7)
    np.testing.assert_allclose(reference(found.model, given), reference(model, given), atol=1e-6)


def test_the_exported_network_is_the_same_function(tmp_path: Path) -> None:
    spec = tiny_spec()
    export_network(tiny_network(), spec, tmp_path / "unet.onnx")
    model = onnx.load_model(tmp_path / "unet.onnx")
    found = tabulate_time(model, spec.schedule.T)
    assert len(found.tensors) == 6, "one a block"
    assert count(found.model, "Sin") == count(found.model, "Gemm") == 0
    for batch in (1, 5):
        given = unet_feeds(spec, batch)
        np.testing.assert_allclose(runtime(found.model, given), runtime(model, given), atol=1e-5)


def test_a_labelled_network_has_no_embedding_of_the_timestep_alone(tmp_path: Path) -> None:
    spec = tiny_spec(classes=3)
    export_network(tiny_network(classes=3), spec, tmp_path / "unet.onnx")
    model = onnx.load_model(tmp_path / "unet.onnx")
    assert tabulate_time(model, spec.schedule.T).model is model
