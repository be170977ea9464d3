from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddpm_deploy import ModelSpec, open_engine
from ddpm_deploy.errors import EngineInputError, MissingDependencyError, TraceError
from ddpm_deploy.run import Recipe
from ddpm_deploy.spec import Condition
from ddpm_deploy.verify import Trace, engine_loop, record
from ddpm_deploy.verify.goldens import calls, check_calls, write_polygraphy, write_trtexec
from ddpm_deploy.verify.trace import loop_steps
from tests.commands import contents
from tests.support import tiny_spec, write_graph

STAND_IN = Path(__file__).with_name("stand_in_trtexec.py")


def traced(folder: Path, spec: ModelSpec, recipe: Recipe, *, keep: int | None = None) -> Trace:
    """Records the loop of `unet.onnx`, which is written on the way."""
    with open_engine(write_graph(folder / "unet.onnx", spec)) as engine:
        return record(
            loop_steps(engine_loop(engine, recipe, [3, 4])),
            spec=engine.spec,
            recipe=recipe,
            images=[3, 4],
            keep=keep,
        )


DDIM = Recipe(sampler="ddim", steps=4)


def test_a_call_is_the_network_s_and_no_sampler_is_in_it(tmp_path: Path) -> None:
    recipe = Recipe(sampler="ddim", steps=4, labels=(2, 0, 1))
    trace = traced(tmp_path, tiny_spec(classes=4), recipe)
    made = list(calls(trace))
    assert [call.k for call in made] == [1, 2, 3, 4]
    with open_engine(tmp_path / "unet.onnx") as engine:
        for call, t in zip(made, [15, 10, 5, 0], strict=True):
            assert call.feeds["t"].tolist() == [t, t]
            assert call.feeds["t"].dtype == call.feeds["y"].dtype == np.int64
            assert call.feeds["y"].tolist() == [2, 0]  # images 3 and 4 of labels in turn
            assert np.array_equal(engine(**call.feeds), call.out)


def test_a_spec_is_enough_for_the_conditions_of_an_engine(tmp_path: Path) -> None:
    recipe = Recipe(labels=(9,))
    with open_engine(write_graph(tmp_path / "a.onnx", tiny_spec(classes=4))) as engine:
        good = Recipe(labels=(1, 3))
        ours = good.conditions_of(engine.spec, range(3), called="it")
        assert {k: v.tolist() for k, v in ours.items()} == {"y": [1, 3, 1]}
        assert np.array_equal(ours["y"], good.conditions(engine, range(3))["y"])
    with pytest.raises(EngineInputError, match=r"The label is 9; this network has labels 0\.\.3"):
        recipe.conditions_of(tiny_spec(classes=4), range(1), called="it")
    with pytest.raises(EngineInputError, match="it is unconditional"):
        recipe.conditions_of(tiny_spec(), range(1), called="it")


def test_what_is_no_call_of_the_network_is_refused(tmp_path: Path) -> None:
    guided = Recipe(sampler="ddim", steps=4, guidance=2.5)
    trace = traced(tmp_path, tiny_spec(classes=4), guided)
    with pytest.raises(TraceError, match=r"guidance 2\.5 an output is made of two calls"):
        write_polygraphy(tmp_path / "out", trace)
    plain = traced(tmp_path, tiny_spec(), DDIM)
    learned = replace(plain, spec=replace(plain.spec, variance="learned_range"))
    with pytest.raises(TraceError, match="keeps the prediction alone"):
        write_trtexec(tmp_path / "out", learned)
    observing = Condition(name="seen", meaning="observation", dtype="float32", shape=(3,))
    with pytest.raises(TraceError, match="also takes seen, which a trace does not keep"):
        check_calls(replace(plain.spec, conditions=(observing,)), DDIM)
    plain.steps[2].out[0, 0, 0, 0] = np.inf
    with pytest.raises(TraceError, match=r"output of step 2 \(t = 10\) is not finite"):
        write_polygraphy(tmp_path / "out", plain)
    assert not (tmp_path / "out").exists()


def polygraphy(folder: Path, graph: Path, *, atol: float) -> subprocess.CompletedProcess[str]:
    """Runs Polygraphy as its user does."""
    code = "import sys; from polygraphy.tools import main; sys.exit(main())"
    files = ["--load-inputs", folder / "inputs.json", "--load-outputs", folder / "outputs.json"]
    tolerance = ["--atol", atol, "--rtol", 0]
    arguments = map(str, ["run", graph, "--onnxrt", *files, *tolerance])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "POLYGRAPHY_AUTOINSTALL_DEPS": "0"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("classes", [0, 4])
def test_polygraphy_passes_the_graph_and_fails_another(tmp_path: Path, classes: int) -> None:
    spec = tiny_spec(classes=classes)
    trace = traced(tmp_path, spec, DDIM)
    paths = write_polygraphy(tmp_path / "goldens", trace)
    assert paths == [tmp_path / "goldens" / name for name in ("inputs.json", "outputs.json")]
    good = polygraphy(tmp_path / "goldens", tmp_path / "unet.onnx", atol=1e-6)
    assert good.returncode == 0, good
    assert "Passed: 4/4 iterations" in good.stdout
    other = write_graph(tmp_path / "other.onnx", spec, bias=1e-3)
    bad = polygraphy(tmp_path / "goldens", other, atol=1e-4)
    assert bad.returncode == 1, bad
    assert "FAILED" in bad.stdout


def test_polygraphy_reads_every_bit_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    trace = traced(tmp_path, tiny_spec(classes=4), DDIM, keep=2)
    inputs, outputs = write_polygraphy(tmp_path, trace)
    assert capfd.readouterr() == ("", "")
    feeds = load_json(str(inputs))
    results = RunResults.load(str(outputs))["ddpm-deploy"]
    assert len(feeds) == len(results) == 2
    for given, result, call in zip(feeds, results, calls(trace), strict=True):
        assert given.keys() == call.feeds.keys()
        for name, array in call.feeds.items():
            assert given[name].dtype == array.dtype
            assert np.array_equal(given[name], array)
        assert np.array_equal(result["out"], call.out)


def test_without_polygraphy_the_error_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = traced(tmp_path, tiny_spec(), DDIM)
    monkeypatch.setitem(sys.modules, "polygraphy.comparator", None)
    with pytest.raises(MissingDependencyError, match="polygraphy is needed") as caught:
        write_polygraphy(tmp_path / "out", trace)
    assert caught.value.hint == "pip install 'ddpm-deploy[tensorrt]'"
    assert not (tmp_path / "out").exists()


def test_trtexec_s_files_are_raw_and_in_the_order_of_bytes(tmp_path: Path) -> None:
    trace = traced(tmp_path, tiny_spec(classes=4), DDIM)
    write_trtexec(tmp_path / "goldens", trace)
    folders = sorted(path.name for path in (tmp_path / "goldens").iterdir())
    assert folders == ["step0001", "step0002", "step0003", "step0004"]
    for folder, call in zip(folders, calls(trace), strict=True):
        place = tmp_path / "goldens" / folder
        files = {path.name for path in place.iterdir()}
        assert files == {"x.bin", "t.bin", "y.bin", "out.bin", "out.json"}
        assert np.array_equal(np.fromfile(place / "x.bin", "<f4"), call.feeds["x"].ravel())
        assert np.array_equal(np.fromfile(place / "t.bin", "<i8"), call.feeds["t"])
        assert np.array_equal(np.fromfile(place / "y.bin", "<i8"), call.feeds["y"])
        assert np.array_equal(np.fromfile(place / "out.bin", "<f4"), call.out.ravel())
        (exported,) = json.loads((place / "out.json").read_text())
        assert (exported["name"], exported["dimensions"]) == ("out", "2x1x8x8")
        assert np.array_equal(np.float32(exported["values"]), call.out.ravel())


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment whose `trtexec` is the stand-in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "trtexec").write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    (folder / "trtexec").chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("keep", [1, 2])
def test_trtexec_s_commands_run_in_a_shell(
    tmp_path: Path, shell: dict[str, str], keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(sampler="ddim", steps=keep)
    trace = traced(tmp_path, tiny_spec(classes=4), recipe)
    export, compare = write_trtexec(Path("my $goldens"), trace, plan="my unet.plan")

    def run(command: str) -> int:
        return subprocess.run(["/bin/sh", "-c", command], env=shell, check=False).returncode

    shutil.copy("unet.onnx", "my unet.plan")
    assert (run(export), run(compare)) == (0, 0)
    for call in calls(trace):
        place = Path("my $goldens") / f"step{call.k:04d}"
        (wanted,), (got,) = (
            json.loads((place / f"{name}.json").read_text()) for name in ("out", "got")
        )
        assert wanted["dimensions"] == got["dimensions"]
        # Six digits of it.
        assert np.allclose(wanted["values"], got["values"], rtol=5e-6, atol=0)
    write_graph(Path("my unet.plan"), tiny_spec(classes=4), bias=1e-3)
    assert run(compare) == 1


@pytest.mark.parametrize("name", ["a,b", "a:b", "a'b"])
def test_a_folder_that_trtexec_would_split_is_refused(tmp_path: Path, name: str) -> None:
    trace = traced(tmp_path, tiny_spec(), DDIM)
    with pytest.raises(TraceError, match="trtexec splits its options at"):
        write_trtexec(tmp_path / name, trace)
    assert not (tmp_path / name).exists()


def test_goldens_appear_all_or_none(tmp_path: Path) -> None:
    trace = traced(tmp_path, tiny_spec(), DDIM)
    blocked = tmp_path / "goldens" / "step0003" / "out.bin"
    blocked.mkdir(parents=True)
    before = contents(tmp_path / "goldens")
    with pytest.raises(IsADirectoryError):
        write_trtexec(tmp_path / "goldens", trace)
    assert contents(tmp_path / "goldens") == before
    (tmp_path / "p" / "outputs.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        write_polygraphy(tmp_path / "p", trace)
    assert list((tmp_path / "p").iterdir()) == [tmp_path / "p" / "outputs.json"]
