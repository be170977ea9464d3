from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest

from ddpm_deploy import open_engine
from ddpm_deploy.arrays import Array
from ddpm_deploy.engines.openvino import OpenVinoEngine, has_bf16
from ddpm_deploy.engines.race import race, winner
from ddpm_deploy.errors import EngineError, SpecError
from ddpm_deploy.export.lower import lower_graph, write_engine
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.parity import relative_error
from ddpm_deploy.runtime import RuntimeRecord
from tests.support import tiny_network, tiny_spec, write_fused, write_graph

SPEC = tiny_spec()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openvino") / "unet.onnx"
    export_network(tiny_network(), SPEC, path)
    return path


def inputs(batch: int) -> tuple[Array, Array]:
    x = np.random.default_rng(batch).standard_normal((batch, 1, 8, 8)).astype(np.float32)
    return x, np.arange(batch, dtype=np.int64) % SPEC.schedule.T


def written(graph: Path, path: Path, **record: object) -> Path:
    said = RuntimeRecord(runtime="openvino", **record)  # type: ignore[arg-type]
    write_engine(lower_graph(graph, "openvino"), said, path)
    return path


@pytest.mark.parametrize("streams", [1, 2, 3, 8])
def test_a_batch_of_any_size_in_any_number_of_streams_is_the_graph(
    exported: Path, tmp_path: Path, streams: int
) -> None:
    graph = open_engine(exported)
    with open_engine(written(exported, tmp_path / "unet.ov.onnx", streams=streams)) as engine:
        assert isinstance(engine, OpenVinoEngine)
        for batch in (1, 2, 5, 7, 2):
            x, t = inputs(batch)
            assert relative_error(engine(x, t), graph(x, t)) < 2e-5


@pytest.mark.skipif(not has_bf16(), reason="this processor has no bfloat16")
def test_bfloat16_is_computed_in_and_stays_within_its_budget(
    exported: Path, tmp_path: Path
) -> None:
    path = written(exported, tmp_path / "unet.onnx", precision="bf16", arithmetic="bf16")
    with open_engine(path) as engine, open_engine(exported) as graph:
        assert engine.precision == "bf16"
        assert engine.name == "openvino CPU bf16"
        x, t = inputs(4)
        # Eight bits of fraction leave 2^-9 a number; float32's own rounding is 1e-6.
        assert 1e-4 < relative_error(engine(x, t), graph(x, t)) < 4e-2


def test_what_was_compiled_is_kept_and_used(exported: Path, tmp_path: Path) -> None:
    path = written(exported, tmp_path / "unet.ov.onnx")
    x, t = inputs(3)
    with open_engine(path) as engine:
        first = engine(x, t)
    cache = tmp_path / "unet.ov.onnx.cache"
    kept = cache.read_bytes()
    assert kept.startswith(b'{"abilities": ')
    with open_engine(path) as engine:
        assert np.array_equal(engine(x, t), first)
    assert cache.read_bytes() == kept


def header(content: bytes) -> dict[str, str]:
    """What a cache is for; what OpenVINO writes below is never twice the same."""
    said: dict[str, str] = json.loads(content.split(b"\n", 1)[0])
    return {name: text for name, text in said.items() if name != "sha256"}


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another's"])
def test_a_cache_that_is_no_good_is_written_anew(
    exported: Path, tmp_path: Path, damage: str
) -> None:
    path = written(exported, tmp_path / "unet.ov.onnx")
    x, t = inputs(2)
    with open_engine(path) as engine:
        wanted = engine(x, t)
    cache = tmp_path / "unet.ov.onnx.cache"
    good = cache.read_bytes()
    flipped = bytearray(good)
    flipped[-100] ^= 1
    bad = {"cut": good[:-10], "flipped": bytes(flipped), "empty": b""}
    cache.write_bytes(bad.get(damage, good.replace(b'"batch": "2"', b'"batch": "3"')))
    with open_engine(path) as engine:
        assert np.array_equal(engine(x, t), wanted)
    assert header(cache.read_bytes()) == header(good)


def test_a_cache_of_another_engine_is_not_taken(exported: Path, tmp_path: Path) -> None:
    path = written(exported, tmp_path / "unet.ov.onnx")
    x, t = inputs(2)
    with open_engine(path) as engine:
        engine(x, t)
    other = tmp_path / "other.onnx"
    export_network(tiny_network(seed=1), SPEC, other)
    written(other, path)
    with open_engine(path) as engine, open_engine(other) as graph:
        assert relative_error(engine(x, t), graph(x, t)) < 2e-5


def test_threads_that_share_an_engine_wait_for_each_other(exported: Path, tmp_path: Path) -> None:
    with open_engine(written(exported, tmp_path / "unet.ov.onnx", streams=2)) as engine:
        asked = [inputs(2 + k % 2) for k in range(12)]
        wanted = [engine(x, t) for x, t in asked]
        with ThreadPoolExecutor(3) as pool:
            given = list(pool.map(lambda each: engine(*each), asked))
    assert all(np.array_equal(a, b) for a, b in zip(given, wanted, strict=True))


def test_a_graph_leaves_nothing_beside_it(exported: Path, tmp_path: Path) -> None:
    graph = tmp_path / "unet.onnx"
    graph.write_bytes(exported.read_bytes())
    with OpenVinoEngine(graph) as engine:
        engine(*inputs(1))
    assert list(tmp_path.iterdir()) == [graph]


def test_a_layer_s_times_are_there(exported: Path, tmp_path: Path) -> None:
    engine = OpenVinoEngine(exported)
    times = engine.layer_times(2, calls=1)
    assert any("Convolution" in kind for kind, _ in times.values())
    assert all(seconds > 0 for _, seconds in times.values())


def test_a_damaged_file_is_one_error(exported: Path, tmp_path: Path) -> None:
    model = onnx.load_model(exported)
    model.graph.node[3].op_type = "Nonsense"
    bad = tmp_path / "bad.onnx"
    onnx.save_model(model, bad)
    with pytest.raises(EngineError, match=r"OpenVINO 20\d\d\.\d+\.\d+ cannot load .*bad\.onnx"):
        OpenVinoEngine(bad)


def test_what_its_engine_does_not_do_is_refused(tmp_path: Path) -> None:
    path = write_graph(tmp_path / "unet.onnx", SPEC)
    with pytest.raises(EngineError, match=r"OpenVINO runs .* on the CPU"):
        OpenVinoEngine(path, device="cuda")
    with pytest.raises(EngineError, match="has its step fused"):
        OpenVinoEngine(write_fused(tmp_path / "fused.onnx", SPEC))
    with pytest.raises(SpecError):
        OpenVinoEngine(write_graph(tmp_path / "bare.onnx", None))


def test_the_fastest_wins_and_of_equals_the_first() -> None:
    assert winner({"a": 1.0, "b": 0.9, "c": 0.95}) == "b"
    assert winner({"a": 1.0, "b": 0.99, "c": 2.0}) == "a"


def test_engines_take_turns_and_each_is_timed_at_its_own_batch(exported: Path) -> None:
    with open_engine(exported) as engine, OpenVinoEngine(exported) as other:
        taken = race({"one": engine, "two": other}, {"one": 2, "two": 3}, turns=2)
    assert taken.keys() == {"one", "two"}
    assert all(seconds > 0 for seconds in taken.values())
