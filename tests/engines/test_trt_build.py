from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from ddpm_deploy import ModelSpec
from ddpm_deploy.engines import flavour as flavour_module
from ddpm_deploy.engines import trt_build
from ddpm_deploy.engines.build_settings import BuildSettings
from ddpm_deploy.engines.flavour import installed
from ddpm_deploy.engines.plan import PlanRecord, Profile, read_record, sidecar
from ddpm_deploy.engines.trt_build import (
    Building,
    OutOfMemoryError,
    PlanBuilt,
    Prepared,
    TooLargeError,
    build_plan,
    differences,
)
from ddpm_deploy.errors import EngineBuildError, MissingDependencyError, SpecError
from ddpm_deploy.files import sha256
from ddpm_deploy.spec import METADATA_KEY
from tests.commands import contents
from tests.support import tiny_spec, write_graph

rtx = pytest.mark.skipif(
    "tensorrt_rtx" not in installed(), reason="tensorrt_rtx is not installed: no plan can be built"
)

RTX = BuildSettings(
    flavour="tensorrt_rtx", precision="fp32", profiles=(Profile(least=1, best=2, most=4),)
)
SPEC = tiny_spec()
GRAPH, PLAN = Path("unet.onnx"), Path("unet.plan")
ORIN = {
    "name": "Orin",
    "compute_capability": "8.7",
    "memory": 8 * 2**30,
    "integrated": True,
    "driver": "12.6",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_graph(GRAPH, SPEC)
    return tmp_path


def build(
    settings: BuildSettings = RTX, *, spec: ModelSpec = SPEC, memory: int = 0, **options: Any
) -> PlanBuilt:
    prepared = Prepared(path=GRAPH, memory=memory)
    return build_plan(GRAPH, PLAN, settings, spec=spec, prepare=lambda _: prepared, **options)


@rtx
def test_a_plan_appears_with_a_sidecar_that_says_what_it_is() -> None:
    built = build()
    assert sorted(contents(Path())) == ["unet.onnx", "unet.plan", "unet.plan.json"]
    record = read_record(PLAN)
    assert record == built.record
    assert (record.plan_sha256, record.graph_sha256) == (sha256(PLAN), sha256(GRAPH))
    assert PLAN.read_bytes()[:4] == b"vtrt"  # how a plan of TensorRT begins
    assert record.spec == SPEC
    assert record.profiles == RTX.profiles
    assert record.platform == f"{platform.system()} {platform.machine()}"
    assert (record.device, record.compute_capabilities) == ("", ())  # built ahead of time
    assert record.command.startswith("ddpm-deploy build unet.onnx --fp32 --runtime rtx ")
    assert record.seconds > 0


@rtx
def test_the_layers_of_the_network_are_read_back() -> None:
    layers = build().record.layers
    # write_graph: Tanh; two Mul and two Add; the cast of t.
    assert layers["ACTIVATION FLOAT"] == 1
    assert layers["ELEMENTWISE FLOAT"] == 4
    assert layers["CAST FLOAT"] == 1


@rtx
def test_a_build_whose_inputs_did_not_change_is_not_repeated() -> None:
    first = build()
    plan = PLAN.read_bytes()
    again = build()
    assert (first.reused, again.reused) == (False, True)
    assert again.record == first.record
    assert PLAN.read_bytes() == plan
    forced = build(force=True)
    assert not forced.reused
    assert forced.changed == ()


@rtx
def test_another_graph_is_another_build_and_the_last_duration_is_remembered() -> None:
    before = build().record
    write_graph(GRAPH, SPEC, bias=0.5)
    seen: list[Building] = []
    built = build(watch=seen.append)
    assert not built.reused
    assert built.changed == ("graph_sha256",)
    assert seen[0].last == before.seconds
    assert read_record(PLAN).graph_sha256 == sha256(GRAPH)


@rtx
def test_other_weights_in_another_file_are_another_build() -> None:
    weights = Path("weights.bin")
    weights.write_bytes(b"before")
    first = build(weights=[weights])
    assert build(weights=[weights]).reused
    weights.write_bytes(b"after.")
    again = build(weights=[weights])
    assert not again.reused
    assert again.changed == ("graph_sha256",)
    assert again.record.graph_sha256 != first.record.graph_sha256 != sha256(GRAPH)


@rtx
def test_a_plan_that_was_damaged_is_built_again() -> None:
    build()
    PLAN.write_bytes(PLAN.read_bytes()[:-1])
    assert not build().reused
    sidecar(PLAN).unlink()
    assert not build().reused
    read_record(PLAN)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("graph_sha256", "0" * 64),
        ("flavour", "tensorrt_rtx"),
        ("version", "10.3.1"),
        ("platform", "Linux x86_64"),
        ("device", "Thor"),
        ("compute_capabilities", ("11.0",)),
        ("profiles", (Profile(least=1, best=1, most=2),)),
        ("precision", "bf16"),
        ("fused_step", True),
        ("hardware_compatible", True),
        ("version_compatible", True),
        ("options", {"workspace": 256}),
        ("tool", "ddpm-deploy 99"),
    ],
)
def test_each_ingredient_makes_another_build(name: str, value: object) -> None:
    record = PlanRecord(
        spec=SPEC,
        plan_sha256="a",
        plan_bytes=1,
        graph="unet.onnx",
        graph_sha256="b",
        flavour="tensorrt",
        version="10.3.0",
        platform="Linux aarch64",
        device="Orin",
        compute_capabilities=("8.7",),
        profiles=RTX.profiles,
        precision="fp16",
    )
    assert differences(record, replace(record, **{name: value})) == (name,)  # type: ignore[arg-type]
    for made in ("plan_sha256", "seconds", "command", "graph"):
        assert differences(record, replace(record, **{made: 2})) == ()  # type: ignore[arg-type]


@rtx
@pytest.mark.parametrize("texts", [["3"], ["1:2:8"], ["1", "2:4:8"]])
def test_static_dynamic_and_several_profiles(texts: list[str]) -> None:
    profiles = tuple(Profile.parse(text) for text in texts)
    record = build(replace(RTX, profiles=profiles, compute_capabilities=("8.6",))).record
    assert record.profiles == profiles
    assert record.compute_capabilities == ("8.6",)


@rtx
def test_what_this_version_cannot_name_is_refused() -> None:
    with pytest.raises(EngineBuildError, match=r"cannot build for 8\.7 by name; it knows 7\.5, "):
        build(replace(RTX, compute_capabilities=("8.7",)))
    assert not PLAN.exists()


def unknown_operators() -> None:
    """Writes a graph with an operator that TensorRT lacks, and one of another domain."""
    nodes = [
        helper.make_node("BitShift", ["t", "t"], ["s"], name="shifts", direction="LEFT"),
        helper.make_node("Tanh", ["x"], ["h"], name="fine"),
        helper.make_node("Wish", ["h", "s"], ["out"], name="hopes", domain="mine"),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8]),
        helper.make_tensor_value_info("t", TensorProto.UINT64, ["batch"]),
    ]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 1, 8, 8])
    graph = helper.make_graph(nodes, "unknown", inputs, [output])
    sets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=10)
    helper.set_model_props(model, {METADATA_KEY: SPEC.to_json()})
    onnx.save_model(model, GRAPH)


@rtx
def test_a_parser_s_error_names_every_node_and_its_operator(folder: Path) -> None:
    unknown_operators()
    before = contents(folder)
    with pytest.raises(EngineBuildError, match="cannot parse the graph") as caught:
        build()
    assert "BitShift 'shifts': " in str(caught.value)
    assert "Wish 'hopes': " in str(caught.value)
    assert "fine" not in str(caught.value)
    assert contents(folder) == before


@rtx
def test_a_graph_that_is_none_is_refused(folder: Path) -> None:
    GRAPH.write_bytes(b"garbage")
    with pytest.raises(EngineBuildError, match="cannot parse the graph"):
        build()
    assert sorted(contents(folder)) == ["unet.onnx"]


@rtx
def test_a_graph_that_is_not_what_its_spec_says_is_refused(folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(SpecError, match=r"t int64 \(N\), x float32 \(N, 1, 8, 8\), but its spec"):
        build(spec=tiny_spec(classes=4))
    assert contents(folder) == before


@rtx
def test_a_graph_of_one_batch_takes_that_profile_alone(folder: Path) -> None:
    model = onnx.load_model(GRAPH)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save_model(model, GRAPH)
    with pytest.raises(EngineBuildError, match=r"takes batches of 3 alone; the profile is 1:2:4"):
        build()
    assert build(replace(RTX, profiles=(Profile.parse("3"),))).record.largest_batch == 3


@rtx
@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (signal.SIGKILL, OutOfMemoryError, r"The system killed the build .* \(signal 9\)"),
        (signal.SIGSEGV, EngineBuildError, "TensorRT-RTX .* died of SIGSEGV after"),
        (signal.SIGABRT, EngineBuildError, "TensorRT-RTX .* died of SIGABRT after"),
    ],
)
def test_the_death_of_the_build_s_process_is_an_error_and_leaves_nothing(
    folder: Path, number: signal.Signals, error: type[EngineBuildError], message: str
) -> None:
    before = contents(folder)

    def kill(_: Building) -> None:
        for child in children():
            os.kill(child, number)

    with pytest.raises(error, match=message):
        build(watch=kill)
    assert contents(folder) == before
    assert children() == []


@rtx
def test_whatever_the_watcher_raises_ends_the_build_and_leaves_nothing(folder: Path) -> None:
    before = contents(folder)

    def interrupt(_: Building) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(watch=interrupt)
    assert contents(folder) == before
    assert children() == []


def children() -> list[int]:
    """Returns the numbers of this process's children that build plans."""
    found = []
    for threads in Path("/proc/self/task").glob("*/children"):
        for number in threads.read_text().split():
            command = Path(f"/proc/{number}/cmdline").read_text()
            if "trt_worker" in command:
                found.append(int(number))
    return found


PEER = """
import json, sys
from polygraphy.backend.trt import NetworkFromOnnxPath
builder, network, parser = NetworkFromOnnxPath(sys.argv[1], strongly_typed=True)()
def ends(count, get):
    return {get(i).name: [get(i).dtype.name, list(get(i).shape)] for i in range(count)}
print(json.dumps({
    "inputs": ends(network.num_inputs, network.get_input),
    "outputs": ends(network.num_outputs, network.get_output),
    "types": sorted(layer.type.name for layer in network),
}))
"""


@rtx
def test_polygraphy_s_own_loader_sees_the_same_network() -> None:
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    peer = subprocess.run(
        [sys.executable, "-c", PEER, str(GRAPH)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    seen = json.loads(peer.stdout.splitlines()[-1])
    assert seen["inputs"] == {"x": ["FLOAT", [-1, 1, 8, 8]], "t": ["INT64", [-1]]}
    assert seen["outputs"] == {"out": ["FLOAT", [-1, 1, 8, 8]]}
    layers = build().record.layers
    ours = [name.split()[0] for name, count in layers.items() for _ in range(count)]
    assert sorted(ours) == seen["types"]


@rtx
def test_polygraphy_s_command_builds_a_plan_of_the_same_size() -> None:
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    shapes = [f"x:[{n},1,8,8] t:[{n}]".split() for n in (1, 2, 4)]
    subprocess.run(
        [
            *(sys.executable, "-c", "from polygraphy.tools import main; exit(main())", "convert"),
            *(str(GRAPH), "--convert-to", "trt", "-o", "peer.plan"),
            *("--trt-min-shapes", *shapes[0], "--trt-opt-shapes", *shapes[1]),
            *("--trt-max-shapes", *shapes[2]),
        ],
        env=environment,
        check=True,
        capture_output=True,
    )
    built = build().record
    # Plans of the same build differ in their bytes, not in their length.
    assert Path("peer.plan").stat().st_size == pytest.approx(built.plan_bytes, rel=0.01)


CONFIGURE = """
import json, sys
from pathlib import Path
from ddpm_deploy.engines import trt_worker
from ddpm_deploy.engines.flavour import load
trt = load("tensorrt_rtx")
network = trt_worker._parse(trt, "tensorrt_rtx", Path("unet.onnx"))
config = trt_worker._configure(trt, "tensorrt", network, json.loads(sys.argv[1]))
print(json.dumps({
    "workspace": config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
    "level": config.builder_optimization_level,
    "tf32": config.get_flag(trt.BuilderFlag.TF32),
    "version_compatible": config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE),
    "profiles": config.num_optimization_profiles,
}))
"""


@rtx
@pytest.mark.parametrize("cache", ["", "new.timing", "old.timing"])
def test_tensorrt_s_own_options_reach_its_configuration(cache: str) -> None:
    # TensorRT-RTX has the same interface, up to what it builds of it.
    Path("old.timing").write_bytes(b"")
    request = {
        "profiles": ["1", "1:2:4"],
        "workspace": 64,
        "optimization_level": 2,
        "timing_cache": str(Path(cache).resolve()) if cache else "",
        "version_compatible": True,
        "hardware_compatible": True,
    }
    outcome = subprocess.run(
        [sys.executable, "-c", CONFIGURE, json.dumps(request)],
        env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert json.loads(outcome.stdout.splitlines()[-1]) == {
        "workspace": 64 * 2**20,
        "level": 2,
        "tf32": False,
        "version_compatible": True,
        "profiles": 2,
    }
    assert not list(Path().glob("*.lock"))


Fake = Callable[..., None]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Stands in for TensorRT: `fake(device=..., then=...)`."""
    monkeypatch.setattr(trt_build, "WORKER", (str(Path(__file__).with_name("fake_worker.py")),))
    monkeypatch.setattr(flavour_module, "installed", lambda: ["tensorrt"])

    def tell(*, device: dict[str, Any] | None = ORIN, then: str | int = "build") -> None:
        monkeypatch.setenv("FAKE_WORKER", json.dumps({"device": device, "then": then}))

    tell()
    return tell


TRT = replace(RTX, flavour="tensorrt", precision="fp16")


def test_a_plan_of_tensorrt_belongs_to_the_device_it_was_built_on(fake: Fake) -> None:
    record = build(replace(TRT, hardware_compatible=True, workspace=256)).record
    assert (record.device, record.compute_capabilities) == ("Orin", ("8.7",))
    assert record.runtime == "TensorRT 10.3.0"
    assert record.hardware_compatible
    request = json.loads(PLAN.read_text())  # the stand-in's plan is what it was asked
    assert request["profiles"] == ["1:2:4"]
    assert (request["workspace"], request["hardware_compatible"]) == (256, True)
    fake(device={**ORIN, "name": "Thor", "compute_capability": "11.0"})
    assert build(TRT).changed == (
        *("device", "compute_capabilities", "hardware_compatible", "options"),
    )


def test_tensorrt_without_a_gpu_is_refused(fake: Fake, folder: Path) -> None:
    fake(device=None)
    with pytest.raises(EngineBuildError, match="this machine has none") as caught:
        build(TRT)
    assert "--runtime rtx" in caught.value.hint
    assert sorted(contents(folder)) == ["unet.onnx"]


def test_bfloat16_on_a_gpu_that_lacks_it_is_refused(fake: Fake) -> None:
    fake(device={**ORIN, "compute_capability": "7.2"})
    with pytest.raises(EngineBuildError, match=r"7\.2 has no bfloat16"):
        build(replace(TRT, precision="bf16"))


def test_the_timing_cache_is_kept_and_handed_to_the_next_build(fake: Fake) -> None:
    chosen = replace(TRT, timing_cache=Path("caches/orin.timing"))
    build(chosen)
    assert Path("caches/orin.timing").read_bytes() == b"measured;"
    build(chosen, force=True)
    assert Path("caches/orin.timing").read_bytes() == b"measured;measured;"


def test_a_plan_that_cannot_fit_is_refused_before_it_is_built(fake: Fake, folder: Path) -> None:
    with pytest.raises(TooLargeError, match=r"batch of 4 needs about 9\.0 GiB; Orin has 8\.0"):
        build(TRT, memory=9 * 2**30)
    assert sorted(contents(folder)) == ["unet.onnx"]
    assert build(TRT, memory=2**30).record.memory == 2**30


@pytest.mark.parametrize(
    ("then", "error", "message"),
    [
        ("Cuda Runtime (out of memory)", OutOfMemoryError, r"ran out of memory .*\(out of memory"),
        ("Error 2: OutOfMemory (no pool)", OutOfMemoryError, "10.3.0 ran out of memory after"),
        ("no kernel for Foo", EngineBuildError, "could not build the plan: no kernel for Foo$"),
        (signal.SIGKILL.value, OutOfMemoryError, r"killed the build after 0 s \(signal 9\)"),
        (signal.SIGBUS.value, EngineBuildError, "10.3.0 died of SIGBUS after 0 s: the last words$"),
    ],
)
def test_why_a_build_failed_is_said(
    fake: Fake, folder: Path, then: str | int, error: type[EngineBuildError], message: str
) -> None:
    fake(then=then)
    with pytest.raises(EngineBuildError, match=message) as caught:
        build(TRT)
    assert type(caught.value) is error
    assert sorted(contents(folder)) == ["unet.onnx"]


def test_a_runtime_or_polygraphy_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flavour_module, "installed", list)
    with pytest.raises(MissingDependencyError, match="tensorrt_rtx is not installed") as caught:
        build()
    assert caught.value.hint == "pip install 'ddpm-deploy[rtx]'"
    monkeypatch.setattr(flavour_module, "installed", lambda: ["tensorrt_rtx"])
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="polygraphy is needed"):
        build()
