"""Every name of TensorRT that we use, against the bindings of each release that we run on.

The bindings are NVIDIA's own; the libraries below them are a few lines of C that do nothing, since
only names are compared. No GPU and no TensorRT is needed.

Names are compared twice: those in our files one by one, and those that a build and a call come
through, polygraphy's among them, by running both on stand-ins: see `stand_ins`.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import ddpm_deploy
from tests.engines.trt_names import ASKED_FOR, BOTH, EVERYWHERE, FILES, PYTHON, RTX

ROOT = Path(__file__).parents[2]
PACKAGE = Path(ddpm_deploy.__file__).parent
RELEASES = [
    line
    for line in (Path(__file__).with_name("bindings.txt")).read_text().splitlines()
    if not line.startswith("#")
]
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LOOK = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
def has(name):
    at = module
    for part in name.split("."):
        if not hasattr(at, part):
            return False
        at = getattr(at, part)
    return True
print(json.dumps({name: has(name) for name in json.loads(sys.argv[3])}))
"""


def _dotted(table: Mapping[str, tuple[str, ...]]) -> set[str]:
    return {f"{owner}.{name}".lstrip(".") for owner, names in table.items() for name in names}


def _libraries(release: str) -> list[str]:
    if release == RTX:
        return ["libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1"]
    major = release.split("==")[1].split(".", maxsplit=1)[0]
    names = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
    return [f"{name}.so.{major}" for name in names]


def _wheel(release: str) -> Path:
    name, version = release.split("==")
    folder = Path(os.environ.get("DDPM_DEPLOY_BINDINGS", ROOT / ".bindings"))
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted(folder.glob(f"{name.replace('-', '_')}-{version}-{python}-*.whl"))
    if not found:
        pytest.skip(f"{folder} has no wheel of {release} for {python}; `make test` downloads it")
    return found[0]


@pytest.fixture(params=RELEASES)
def bindings(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A release, and a folder with its bindings and libraries that do nothing."""
    release: str = request.param
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make empty libraries with")
    with zipfile.ZipFile(_wheel(release)) as wheel:
        wheel.extractall(tmp_path)
    source = tmp_path / "empty.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS))
    for library in _libraries(release):
        subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / library, source], check=True)
    return release, tmp_path


def look(bindings: tuple[str, Path], names: set[str]) -> dict[str, bool]:
    """Asks a release's bindings for names, in a Python of their own."""
    release, folder = bindings
    module, _ = _modules(release)
    done = subprocess.run(
        [sys.executable, "-S", "-c", LOOK, folder, module, json.dumps(sorted(names))],
        env={"LD_LIBRARY_PATH": str(folder), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, bool] = json.loads(done.stdout)
    return found


def test_a_release_has_every_name_that_is_used(bindings: tuple[str, Path]) -> None:
    names = _dotted(EVERYWHERE)
    if bindings[0] == RTX:
        names |= _dotted(ASKED_FOR) | _dotted(BOTH)
    found = look(bindings, names)
    assert [name for name in names if not found[name]] == []


def test_a_release_without_a_name_is_recognised(bindings: tuple[str, Path]) -> None:
    # IStreamReader left with TensorRT 11, build_route came with 11.4: the check can say no.
    found = look(bindings, {"IStreamReader", "IBuilderConfig.build_route", "NoSuchName"})
    version = bindings[0].split("==")[1]
    assert found["NoSuchName"] is False
    if bindings[0] != RTX:
        assert found["IStreamReader"] is version.startswith("10.")
        assert found["IBuilderConfig.build_route"] is version.startswith("11.4")


def test_what_is_asked_for_is_where_the_question_says(bindings: tuple[str, Path]) -> None:
    found = look(bindings, _dotted(ASKED_FOR))
    assert set(found.values()) == {bindings[0] == RTX}


def _used() -> Iterator[tuple[str, str]]:
    """Yields (file, name) of every attribute in the files that touch TensorRT.

    A chain that begins at the module keeps its path: `trt.DataType.FLOAT` is `.DataType.FLOAT`. Of
    others there is the last name, since the syntax does not tell what the object is; what is
    imported at the top of the file is not TensorRT's.
    """
    for file in FILES:
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and _root(node) not in _imported(tree):
                chain = ast.unparse(node)
                for module in ("trt.", "self._trt."):
                    if chain.startswith(module):
                        yield file, "." + chain.removeprefix(module)
                        break
                else:
                    if not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"}):
                        yield file, node.attr


def _root(node: ast.expr) -> str:
    """Returns the name that a chain of attributes and calls begins with."""
    while isinstance(node, ast.Attribute | ast.Call):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    return node.id if isinstance(node, ast.Name) else ""


def _imported(tree: ast.Module) -> set[str]:
    statements = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name for node in statements for alias in node.names}


def test_no_file_uses_a_name_that_is_not_compared() -> None:
    tables = [EVERYWHERE, ASKED_FOR, BOTH]
    dotted = set[str]().union(*map(_dotted, tables))
    owners = {name.rsplit(".", 1)[0] for name in dotted if "." in name}
    members = {name.rsplit(".", 1)[-1] for name in dotted}
    unknown = []
    for file, name in _used():
        known = name[1:] in dotted | owners if name[0] == "." else name in members | PYTHON
        if not known:
            unknown.append(f"{file}: {name}")
    assert unknown == []


def test_no_name_is_compared_that_no_file_uses() -> None:
    used = {name.rsplit(".", 1)[-1] for _, name in _used()}
    elsewhere = {"__getitem__", "__version__", "log"}  # called by a loop, `match` and the runtime
    dotted = _dotted(EVERYWHERE) | _dotted(ASKED_FOR) | _dotted(BOTH)
    assert {name.rsplit(".", 1)[-1] for name in dotted} - elsewhere - used == set()
    assert PYTHON - used == set()


def rehearse(bindings: tuple[str, Path], piece: str, argument: object) -> list[dict[str, Any]]:
    """Runs a piece of the package on stand-ins of a release; returns the lines that it says."""
    release, folder = bindings
    module, flavour = _modules(release)
    program = str(Path(__file__).with_name("stand_ins.py"))
    process = subprocess.Popen(
        [sys.executable, program, module, flavour, piece, str(argument)],
        env={
            **os.environ,
            "LD_LIBRARY_PATH": str(folder),
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
            "POLYGRAPHY_USE_TENSORRT_RTX": str(int(release == RTX)),
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin
    assert process.stdout
    with process:  # the worker ends with its input, so that stays open until it has said all
        process.stdin.write(json.dumps(argument, default=str) + "\n")
        process.stdin.flush()
        return [json.loads(line) for line in process.stdout]


def _modules(release: str) -> tuple[str, str]:
    flavour = "tensorrt_rtx" if release == RTX else "tensorrt"
    return f"{flavour}_bindings", flavour


def _request(folder: Path, graph: str, *, rtx: bool) -> dict[str, Any]:
    (folder / "old.cache").write_bytes(b"what was measured before")
    return {
        "graph": graph,
        "plan": str(folder / "unet.plan"),
        "profiles": ["1:2:4", "8"],
        "workspace": 512,
        "optimization_level": 3,
        "compute_capabilities": ["8.6", "8.9"] if rtx else [],
        "hardware_compatible": not rtx,
        "version_compatible": not rtx,
        "timing_cache": "" if rtx else str(folder / "old.cache"),
        "new_timing_cache": str(folder / "new.cache"),
    }


def test_a_build_goes_through_what_the_release_has(
    bindings: tuple[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("polygraphy")
    rtx = bindings[0] == RTX
    ready, parsed, built = rehearse(bindings, "worker", _request(tmp_path, "unet.onnx", rtx=rtx))
    assert ready["version"] == bindings[0].split("==")[1]
    assert ready["capabilities"][:3] == (["7.5", "8.0", "8.6"] if rtx else [])
    assert parsed["layers"] == {"CONVOLUTION HALF": 1}
    assert parsed["inputs"] == {"x": ["FLOAT", [-1, 1, 8, 8]], "t": ["INT64", [-1]]}
    assert built["kind"] == "built"
    assert (tmp_path / "unet.plan").read_bytes() == b"a plan"
    assert (tmp_path / "new.cache").exists() is not rtx


def test_a_graph_that_a_release_refuses_is_told_by_its_node(
    bindings: tuple[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("polygraphy")
    request = _request(tmp_path, "bad.onnx", rtx=bindings[0] == RTX)
    *_, failed = rehearse(bindings, "worker", request)
    assert failed["message"].endswith(
        "cannot parse the graph: Attention '/attention': unsupported node (no such operator)"
    )


def test_a_call_goes_through_what_the_release_has(
    bindings: tuple[str, Path], tmp_path: Path
) -> None:
    plan = tmp_path / "unet.plan"
    plan.write_bytes(b"a plan")
    (said,) = rehearse(bindings, "network", plan)
    assert said["tensors"] == {"x": ["float32", True], "out": ["float32", False]}
    context = [name for name in said["called"] if name.startswith("IExecutionContext")]
    first = context.index("IExecutionContext.set_optimization_profile_async")
    assert first < context.index("IExecutionContext.set_input_shape")
    assert context[-1] == "IExecutionContext.execute_async_v3"
    # The second start reads what the first one stored.
    assert said["called"].count("IRuntimeCache.deserialize") == (bindings[0] == RTX)
    assert said["loggers"] == 1  # TensorRT registers one, and may call it after its runtime is gone


def test_what_a_context_refuses_is_an_error_of_ours(
    bindings: tuple[str, Path], tmp_path: Path
) -> None:
    plan = tmp_path / "unet.plan"
    plan.write_bytes(b"a plan")
    (said,) = rehearse(bindings, "network", plan)
    assert {name.rpartition(".")[2] for name in said["refused"]} == {
        "infer_shapes",
        "set_input_shape",
        "set_optimization_profile_async",
        "set_tensor_address",
    }
    assert all("does not take {'x': (2, 1, 8, 8)}" in text for text in said["refused"].values())


def test_a_stand_in_refuses_what_the_bindings_refuse(bindings: tuple[str, Path]) -> None:
    (said,) = rehearse(bindings, "refusals", None)
    names = {name for name, kind in said.items() if kind == "AttributeError"}
    assert names == {"no such name", "no such flag"}
    assert {kind for name, kind in said.items() if name not in names} == {"TypeError"}
