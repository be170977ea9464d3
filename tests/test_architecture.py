"""The arrows between rooms, and what each room may need of the machine."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddpm_deploy
from ddpm_deploy.cli.app import COMMANDS
from ddpm_deploy.engines.flavour import installed
from tests.commands import finish, start
from tests.support import tiny_spec, write_graph

PACKAGE = Path(ddpm_deploy.__file__).parent

HEAVY = {
    "cuda",
    "jinja2",
    "lightning_fabric",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "polygraphy",
    "safetensors",
    "sklearn",
    "tensorboard",
    "tensorrt",
    "tensorrt_rtx",
    "torch",
}

ARROWS = {
    # A file or a room, and the rooms that it may import from. All may import the top.
    "top": set[str](),
    "model": {"model"},
    "train": {"train", "model"},
    "export": {"export"},
    "export.calibrate": {"export", "engines"},
    "export.inside": {"export", "engines"},
    "export.prove": {"export", "engines"},
    "export.lift": {"export", "engines"},
    "export.explain": {"export", "engines", "model", "verify"},
    "export.qdq": {"export", "engines"},
    "export.quantize": {"export", "engines", "verify"},
    "export.check": {"export", "model", "engines"},
    "export.prepare": {"export", "engines"},  # the passes in a row, for a plan
    "export.to_onnx": {"export", "model", "engines"},
    "engines": {"engines"},
    "engines.base": {"engines"},
    "engines.pytorch": {"engines", "model"},
    "doctor": {"doctor"},
    "verify": {"verify", "engines"},  # the door and the abstract class
    "testing": {"verify", "export"},
    "report": {"report", "verify"},
    "cli": {"cli", "doctor", "engines", "export", "model", "report", "train", "verify"},
}

ROOMS_OF = {
    # What a room may import where its files begin.
    "model": {"torch"},
    "train": {"torch", "lightning_fabric"},
    "export": {"onnx"},  # the passes, which a device without torch runs
    "export.check": {"torch"},
    "export.to_onnx": {"torch", "onnx"},
    "report": {"jinja2", "matplotlib"},
    "engines.cuda": {"cuda"},
    "engines.openvino": {"openvino"},
    "engines.ort": {"onnxruntime"},
    "engines.pytorch": {"torch"},
    "engines.trt_worker": {"polygraphy"},
}

INSIDE_FUNCTIONS = {
    # Deliberate: a file that only sometimes needs the package asks for it then.
    ("cli.cpu", "openvino"): "says so before the work",
    ("cli.export", "onnxruntime"): "the check needs it, and says so before the work",
    ("data", "sklearn"): "the digits",
    ("engines.peers", "onnxruntime"): "a peer asks for its own runtime alone",
    ("engines.peers", "openvino"): "as above",
    ("engines.peers", "torch"): "diffusers is in PyTorch",
    ("engines.device", "cuda"): "what describes a GPU is of use where none can be asked",
    ("export.qdq", "onnxruntime"): "the quantiser, which the other passes over pairs do not need",
    ("model.opening", "safetensors"): "files of that kind",
    ("verify.goldens", "polygraphy"): "a form that it alone reads",
}


def files() -> Iterator[tuple[str, ast.Module]]:
    """Yields each file of the package as (dotted name below it, its syntax)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__" and len(parts) > 1:
            parts.pop()
        yield ".".join(parts), ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    """Yields the dotted names that a piece of code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package"
            assert node.module
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """Returns the room of a file below the package; `top` for those in none."""
    first = name.split(".", maxsplit=1)[0]
    return first if (PACKAGE / first).is_dir() else "top"


def test_arrows_between_rooms_point_one_way() -> None:
    wrong = []
    for name, tree in files():
        if name == "__main__":
            continue  # a door to cli
        allowed = ARROWS.get(name, ARROWS[room(name)])
        for target in imported(tree):
            if not target.startswith("ddpm_deploy."):
                continue
            below = target.removeprefix("ddpm_deploy.")
            if room(below) == "top" or room(below) in allowed or room(name) == room(below):
                continue
            if name == "__init__" or room(name) == "top":
                # The top knows what an engine is, and no runtime.
                doors = {"engines", "engines.Engine", "engines.open_engine"}
                if below in doors or below.startswith("engines.base"):
                    continue
            wrong.append(f"{name} imports {below}")
    assert wrong == []


def test_one_engine_knows_no_other() -> None:
    runtimes = {"ort", "pytorch", "trt"}
    openers = {"engines.base", "engines.build", "engines.contenders"}
    for name, tree in files():
        if name.startswith("engines.") and name not in openers:
            others = runtimes - {name.removeprefix("engines.")}
            found = {target.removeprefix("ddpm_deploy.engines.") for target in imported(tree)}
            assert not others & found, name


def heavy(tree: ast.AST) -> set[str]:
    return {target.split(".")[0] for target in imported(tree)} & HEAVY


def test_heavy_packages_are_imported_in_their_rooms_alone() -> None:
    for name, tree in files():
        functions = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        inside = set[str]().union(*(heavy(function) for function in functions))
        allowed = ROOMS_OF.get(name, ROOMS_OF.get(room(name), set()))
        at_the_top = heavy(tree) - inside
        assert at_the_top <= allowed, name
        lazy = {package for file, package in INSIDE_FUNCTIONS if file == name}
        assert inside - allowed == lazy, name


def test_the_door_opens_a_runtime_only_when_it_is_asked_for() -> None:
    tree = dict(files())["engines.base"]
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    targets = {target for node in top for target in imported(node)}
    assert not any(t.startswith("ddpm_deploy.engines.") for t in targets)


def python(code: str, *arguments: object) -> str:
    """Runs code in a fresh Python; returns what it prints."""
    outcome = finish(start(*arguments, python=["-c", code]))
    assert outcome.code == 0, outcome
    return outcome.out


def passes() -> list[str]:
    """Returns the files of `export` that may need neither torch nor a runtime."""
    exporters = {"export.check", "export.to_onnx"}
    return [name for name, _ in files() if room(name) == "export" and name not in exporters]


@pytest.mark.parametrize("name", passes())
def test_a_graph_pass_needs_onnx_and_numpy_alone(name: str) -> None:
    others = HEAVY - {"onnx"}
    blocked = "".join(f"sys.modules[{package!r}] = None; " for package in sorted(others))
    assert python(f"import sys; {blocked}import ddpm_deploy.{name}; print('imported')")


@pytest.mark.parametrize("module", ["ddpm_deploy", "ddpm_deploy.cli.app"])
def test_importing_the_device_s_side_imports_nothing_heavy(module: str) -> None:
    loaded = json.loads(
        python(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))")
    )
    tops = {name.split(".")[0] for name in loaded}
    assert not tops & (HEAVY | {"PIL", "scipy", "rich", "pandas"})


WITHOUT = """
import sys
for name in ("torch", "onnx", "onnxscript", "safetensors", "lightning_fabric", "sklearn",
             "matplotlib", "jinja2"):
    sys.modules[name] = None
from ddpm_deploy.cli.app import main
main()
"""


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        *(f"{name} --help" for name in COMMANDS),
        "doctor",
        "inspect unet.onnx",
        "sample -e unet.onnx -n 2 --gif --npz",
        "build unet.onnx",
        "verify -e unet.onnx --against same.onnx",
        "bench -e unet.onnx --steps 2 --repeat 1 --warm-up 1",
    ],
)
def test_a_device_needs_neither_torch_nor_onnx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("unet.onnx", "same.onnx"):
        write_graph(Path(name), tiny_spec())
    assert python(WITHOUT, *command.split())


@pytest.mark.skipif("tensorrt_rtx" not in installed(), reason="tensorrt_rtx is not installed")
def test_a_plan_is_built_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_graph(Path("unet.onnx"), tiny_spec())
    code = WITHOUT.replace('"onnx", ', "")
    assert python(code, "build", "unet.onnx", "--fp16", "--runtime", "rtx") == "unet.plan\n"


def test_without_torch_the_commands_that_need_it_say_so(tmp_path: Path) -> None:
    checkpoint = tmp_path / "ckpt.pt"
    checkpoint.write_bytes(b"weights")
    for command in ("export", "inspect"):
        outcome = finish(start(command, checkpoint, python=["-c", WITHOUT]))
        assert outcome.code == 2
        assert "error: torch is needed here" in outcome.err
        assert " hint: pip install 'ddpm-deploy[export]'" in outcome.err


def test_a_device_with_one_runtime_samples_what_this_machine_samples(tmp_path: Path) -> None:
    device = os.environ.get("DDPM_DEPLOY_DEVICE_PYTHON")
    if not device:
        pytest.skip(
            "DDPM_DEPLOY_DEVICE_PYTHON names no Python with ddpm-deploy[cpu] alone; "
            "`make test` makes one"
        )
    graph = write_graph(tmp_path / "unet.onnx", tiny_spec())

    def on_device(*arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [device, *map(str, arguments)],
            cwd=tmp_path,
            env=environment,
            check=False,
            capture_output=True,
            text=True,
        )

    for package in ("torch", "onnx"):
        missing = on_device("-c", f"import {package}")
        assert f"No module named '{package}'" in missing.stderr
    drawn = on_device("-m", "ddpm_deploy", "sample", "-e", graph, "-n", 3, "-o", "there")
    assert drawn.returncode == 0, drawn.stderr
    assert drawn.stdout.splitlines()[0] == "there/000000.png"
    here = finish(start("sample", "-e", graph, "-n", 3, "-o", tmp_path / "here"))
    assert here.code == 0
    for name in ("000000.png", "000001.png", "000002.png"):
        assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert on_device("-m", "ddpm_deploy", "doctor").returncode == 0
    assert sys.executable != device
