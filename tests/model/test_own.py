"""A network of the user's own: spec.toml, its code, its weights, and what may be wrong."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ddpm_deploy import open_engine
from ddpm_deploy.errors import CheckpointError, ExportError, SpecError
from ddpm_deploy.export.to_onnx import export_network
from ddpm_deploy.model import LoadedNetwork, load_network
from ddpm_deploy.model.own import Timed
from ddpm_deploy.model.spec_toml import Described, read_spec_toml
from ddpm_deploy.spec import ModelSpec
from tests.commands import refusal, run
from tests.model import mynets
from tests.round_trip import check_round_trip

HERE = "tests.model.mynets"

SPEC = """
sample_shape = [1, 8, 8]

[schedule]
name = "linear"
T = 20
start = 0.001
end = 0.2
"""


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)


def trained(network: nn.Module) -> nn.Module:
    """Gives a network weights and running statistics that are not those of its making."""
    torch.manual_seed(7)
    for value in (*network.parameters(), *network.buffers()):
        if value.is_floating_point():
            value.data = torch.rand_like(value) + 0.1
    return network.eval()


def read(text: str = SPEC) -> Described:
    Path("spec.toml").write_text(text, encoding="utf-8")
    return read_spec_toml(Path("spec.toml"))


def spec_of(text: str = SPEC, **arguments: Any) -> ModelSpec:
    """The spec of a text; None takes the texts' [model] table."""
    spec = read(text).spec
    return spec.with_changes(network={**spec.network, "arguments": arguments})


def save(network: nn.Module, path: str = "ckpt.pt") -> Path:
    torch.save(network.state_dict(), path)
    return Path(path)


def load(model: str, spec: ModelSpec, **settings: Any) -> LoadedNetwork:
    return load_network("ckpt.pt", model=f"{HERE}:{model}", spec=spec, settings=settings)


def refused(model: str, spec: ModelSpec | None = None, **settings: Any) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load(model, spec or spec_of(), **settings)
    assert caught.value.hint
    return caught.value


def test_a_network_of_the_user_s_own_comes_back_as_itself() -> None:
    network = trained(mynets.Net(6, classes=3, cond=5))
    path = save(network)
    text = SPEC + (
        '[[conditions]]\nname = "y"\nmeaning = "class_label"\nclasses = 3\nnull = 3\n'
        '[[conditions]]\nname = "state"\nmeaning = "observation"\nshape = [5]\n'
        "[model]\nbase = 6\nclasses = 3\ncond = 5\n"
    )
    spec = read(text).spec
    loaded = check_round_trip(
        path, network, export=Path("unet.onnx"), model=f"{HERE}:make", spec=spec
    )
    assert loaded.spec.network == {
        "timestep": "index",
        "arguments": {"base": 6, "classes": 3, "cond": 5},
        "model": f"{HERE}:make",
    }
    assert loaded.spec.family == "own"
    again = load_network(path, model=f"{HERE}:make", spec=open_engine("unet.onnx").spec)
    assert again.spec == loaded.spec


def test_what_a_factory_prints_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    save(mynets.Net())
    load("make", spec_of())
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "building the network\n")


@pytest.mark.parametrize(
    ("convention", "divisor"), [("index", None), ("float", 1.0), ("fraction", 20.0)]
)
def test_t_is_given_as_the_spec_says(convention: str, divisor: float | None) -> None:
    class Seen(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen.append(t)
            return x

    seen: list[torch.Tensor] = []
    Timed(Seen(), convention, 20)(torch.zeros(3, 1, 8, 8), torch.tensor([0, 7, 19]))
    wanted = torch.tensor([0, 7, 19])
    if divisor:
        wanted = wanted.float() / divisor
    assert seen[0].dtype == wanted.dtype
    assert torch.equal(seen[0], wanted)


@pytest.mark.parametrize("seed", range(3))
def test_random_networks_come_back_as_themselves(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(17):
        base, classes, cond = draw.randint(1, 9), draw.randint(0, 4), draw.randint(0, 4)
        network = trained(mynets.Net(base, classes, cond))
        wrap = draw.choice(["", "module.", "_orig_mod.", "model.", "model.unet."])
        state = {wrap + key: value for key, value in network.state_dict().items()}
        content: Any = draw.choice([state, {"state_dict": state}, {"ema": state, "epoch": 3}])
        torch.save(content, "ckpt.pt")
        text = SPEC.replace("[1, 8, 8]", f"[1, {draw.choice([4, 8])}, {draw.choice([6, 8])}]")
        text = f"timestep = '{draw.choice(['index', 'float'])}'\n" + text
        if classes:
            text += f'[[conditions]]\nname="y"\nmeaning="class_label"\nclasses={classes}\n'
        if cond:
            text += f'[[conditions]]\nname="obs"\nmeaning="observation"\nshape=[{cond}]\n'
        text += f"[model]\nbase = {base}\nclasses = {classes}\ncond = {cond}\n"
        check_round_trip(Path("ckpt.pt"), network, model=f"{HERE}:make", spec=read(text).spec)


def test_set_changes_an_argument_and_is_kept() -> None:
    save(mynets.Net(5))
    assert load("make", spec_of(base=4), base="5").spec.network["arguments"] == {"base": 5}
    assert load("make", spec_of(), base="5").spec.network["arguments"] == {"base": 5}
    loaded = load("make_any", spec_of(), base="5")
    assert loaded.spec.network["arguments"] == {"base": 5}
    assert ("base", 5, "flag") in [(f.name, f.value, f.source) for f in loaded.facts]


def test_names_that_begin_as_a_wrapper_s_do_are_kept() -> None:
    network = trained(mynets.Prefixed())
    for content in (
        {},
        {"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}},
    ):
        torch.save(content or network.state_dict(), "ckpt.pt")
        check_round_trip(Path("ckpt.pt"), network, model=f"{HERE}:Prefixed", spec=spec_of())
    parts = trained(mynets.TwoParts())
    save(parts)
    check_round_trip(Path("ckpt.pt"), parts, model=f"{HERE}:TwoParts", spec=spec_of())
    lightning = {f"model.{k}": v for k, v in parts.state_dict().items()} | {
        f"loss.vgg.{k}": v for k, v in mynets.Net().state_dict().items()
    }
    torch.save({"state_dict": lightning, "hyper_parameters": {"lr": 1e-3}}, "ckpt.pt")
    check_round_trip(Path("ckpt.pt"), parts, model=f"{HERE}:TwoParts", spec=spec_of())


def test_averaged_and_online_weights_are_chosen_by_name() -> None:
    online, ema = trained(mynets.Net()), mynets.Net().eval()
    torch.save({"model": online.state_dict(), "ema": ema.state_dict()}, "ckpt.pt")
    for wanted, network in [(None, ema), ("ema", ema), ("online", online)]:
        loaded = load_network(
            "ckpt.pt",
            model=f"{HERE}:make",
            spec=spec_of(),
            weights=wanted,  # type: ignore[arg-type]
        )
        assert loaded.spec.weights == (wanted or "ema")
        value = loaded.network.state_dict()["network.out.bias"]
        assert torch.equal(value, network.state_dict()["out.bias"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_widths_of_numbers_load_as_float32(dtype: torch.dtype) -> None:
    network = trained(mynets.Net())
    torch.save(
        {k: v.to(dtype) if v.is_floating_point() else v for k, v in network.state_dict().items()},
        "ckpt.pt",
    )
    value = load("make", spec_of()).network.state_dict()["network.out.weight"]
    assert value.dtype == torch.float32
    assert torch.equal(value, network.state_dict()["out.weight"].to(dtype).float())


# What may be wrong with the code


def test_code_is_never_run_because_a_file_names_it(tmp_path: Path) -> None:
    save(mynets.Net())
    spec = load("make", spec_of(base=4)).spec
    with pytest.raises(CheckpointError, match="only where you name it") as caught:
        load_network("ckpt.pt", spec=spec)
    assert f"{HERE}:make(base=4)" in str(caught.value)
    assert caught.value.hint == f"Add: --model {HERE}:make"
    evil = spec.with_changes(network={**spec.network, "model": "os:system; rm -rf ~"})
    with pytest.raises(CheckpointError) as caught:
        load_network("ckpt.pt", spec=evil)
    assert "rm -rf" not in str(caught.value) + caught.value.hint


def test_a_model_without_a_spec_asks_for_it() -> None:
    save(mynets.Net())
    with pytest.raises(CheckpointError, match="nothing says its samples") as caught:
        load_network("ckpt.pt", model=f"{HERE}:make")
    assert "--spec spec.toml" in caught.value.hint
    other = spec_of().with_changes(family="dome272")
    with pytest.raises(CheckpointError, match="is of the family dome272"):
        load_network("ckpt.pt", model=f"{HERE}:make", spec=other)


@pytest.mark.parametrize(
    ("model", "message", "hint"),
    [
        ("mynet", "it must be package.module:factory", "Type --model mynet:make"),
        ("nets/mynet.py:make", "it must be package.module:factory", "--model nets.mynet:make"),
        ("a b:c", "it must be package.module:factory", "--model mynet:make"),
        ("no_such:make", "ModuleNotFoundError: No module named 'no_such'", "folder that holds no_"),
        (f"{HERE}:mkae", "has no mkae; it has ", f"--model {HERE}:make"),
        (f"{HERE}:net", "is a Linear; it must be a function", "def make(): return net"),
        (f"{HERE}:number", "is a int; it must be a function", "def make()"),
        (f"{HERE}:gives_text", "gives a str; it must give a torch.nn.Module", "return the net"),
        (
            f"{HERE}:breaks",
            "KeyError: 'base' (mynets.py, line ",
            "--set NAME=VALUE",
        ),
    ],
)
def test_a_wrong_factory_is_one_message(model: str, message: str, hint: str) -> None:
    save(mynets.Net())
    with pytest.raises(CheckpointError) as caught:
        load_network("ckpt.pt", model=model, spec=spec_of())
    assert message in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nothing_there", "No module named 'nothing_there' (CODE, line 1: import nothing_"),
        ("def make(:\n  pass", "SyntaxError: invalid syntax (CODE, line 1: def make(:)"),
        ("raise SystemExit(3)", "SystemExit: it ends the program with 3"),
        ("x = 1 / 0", "ZeroDivisionError: division by zero (CODE, line 1: x = 1 / 0)"),
    ],
)
def test_code_that_fails_on_import_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    name = f"broken_{abs(hash(code))}"
    Path(f"{name}.py").write_text(code)
    save(mynets.Net())
    with pytest.raises(CheckpointError) as caught:
        load_network("ckpt.pt", model=f"{name}:make", spec=spec_of())
    assert message.replace("CODE", f"{name}.py") in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message", "hint"),
    [
        ("Pair", "gives a tuple; it must give one tensor (2, 1, 8, 8)", "Wrap it in a module"),
        ("Half", "gives torch.float16; samples are float32", "out.float()"),
        ("Random", "gives other numbers each time", "training=self.training"),
        (
            "Fails",
            "failed when it was called with x float32 (2, 1, 8, 8), t int64 (2,): ValueError: the "
            "picture must be square of 32 (mynets.py, line ",
            "compare sample_shape",
        ),
        ("Strict", "AssertionError: t must be float32 (mynets.py, line ", "timestep"),
    ],
)
def test_a_network_that_is_not_called_so_is_one_message(
    model: str, message: str, hint: str
) -> None:
    save(mynets.Net())
    error = refused(model)
    assert message in str(error)
    assert hint in error.hint


def test_the_convention_of_t_mends_it() -> None:
    save(mynets.Net())
    load("Strict", spec_of('timestep = "fraction"\n' + SPEC))


def test_weights_that_do_not_fit_are_named() -> None:
    state = mynets.Net().state_dict()
    save(mynets.Net(5))
    message = str(refused("make"))
    assert "inp.weight is (5, 1, 3, 3) in the file and (4, 1, 3, 3) in the network" in message
    torch.save({k: v for k, v in state.items() if k != "out.bias"}, "ckpt.pt")
    assert "do not fit" in str(refused("make"))
    assert "out.bias (1,) is missing in the file" in str(refused("make"))
    torch.save({**state, "more": torch.zeros(2)}, "ckpt.pt")
    assert "the file has more (2,) besides" in str(refused("make"))
    torch.save({**state, "out.bias": torch.full((1,), float("nan"))}, "ckpt.pt")
    assert "numbers that are not finite: 1 of 1 in out.bias" in str(refused("make"))
    torch.save({k: (100 * v).to(torch.uint8) for k, v in state.items()}, "ckpt.pt")
    assert "is torch.uint8 in the file and torch.float32 in the network" in str(refused("make"))


def test_of_two_networks_of_one_shape_none_is_guessed() -> None:
    state = mynets.Net().state_dict()
    both = {f"{part}.{k}": v for part in ("gen", "disc") for k, v in state.items()}
    torch.save(both, "ckpt.pt")
    error = refused("make")
    assert str(error) == "ckpt.pt holds several networks that fit: gen, disc."
    assert "torch.save(model.NAME.state_dict(), 'ckpt.pt')" in error.hint


def test_what_stands_under_a_prefix_must_fit_too() -> None:
    state = {f"net.{k}": v for k, v in mynets.Net().state_dict().items()}
    torch.save(
        {**state, "net.head.weight": torch.zeros(2), "loss.weight": torch.ones(2)}, "ckpt.pt"
    )
    assert "the file has head.weight (2,) besides" in str(refused("make"))


def test_online_weights_never_stand_for_averages_that_do_not_fit() -> None:
    state = mynets.Net().state_dict()
    averages = {k: v + 1 for k, v in state.items() if not k.endswith("bias")}
    content = {"model": state, "ema": averages}
    torch.save(content, "ckpt.pt")
    assert "The ema weights of ckpt.pt do not fit the network" in str(refused("make"))
    lightning = {f"model.{k}": v for k, v in state.items()}
    lightning |= {f"model_ema.{k}": v for k, v in averages.items()}
    torch.save({"state_dict": lightning}, "ckpt.pt")
    assert "The ema weights of ckpt.pt do not fit the network" in str(refused("make"))


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"bse": "4"}, {}, "--set bse is no argument of"),
        ({}, {"bse": 4}, "[model] in spec.toml: bse is no argument of"),
        ({"base": "four"}, {}, "--set base=four is not a whole number"),
    ],
)
def test_wrong_arguments_are_named(
    settings: Mapping[str, str], arguments: Mapping[str, Any], message: str
) -> None:
    save(mynets.Net())
    error = refused("make", spec_of(**arguments), **settings)
    assert message in str(error)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([2, 8, 8], "expected input[2, 2, 8, 8] to have 1 channels"),
        ([1, 8], "failed when it was called with x float32 (2, 1, 8)"),
    ],
)
def test_a_wrong_sample_shape_keeps_torch_s_words(shape: list[int], message: str) -> None:
    save(mynets.Net())
    assert message in str(refused("make", spec_of(SPEC.replace("[1, 8, 8]", str(shape)))))


def test_a_learned_variance_that_is_not_said_is_asked_for() -> None:
    Path("two.py").write_text(
        "import torch\nclass Two(torch.nn.Conv2d):\n"
        "    def forward(self, x, t):\n        return super().forward(x)\n"
        "def make():\n    return Two(1, 2, 1)\n"
    )
    torch.save(nn.Conv2d(1, 2, 1).state_dict(), "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"gives \(2, 2, 8, 8\)") as caught:
        load_network("ckpt.pt", model="two:make", spec=spec_of())
    assert 'variance = "learned_range"' in caught.value.hint
    spec = spec_of('variance = "learned_range"\n' + SPEC)
    assert load_network("ckpt.pt", model="two:make", spec=spec).spec.output_shape == (2, 8, 8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("Branches", "data-dependent"),
        ("FixedBatch", "inferred a static shape of 2"),
        ("NoOnnx", "No ONNX function found for"),
    ],
)
def test_a_network_that_cannot_be_exported_says_why(
    model: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save(mynets.Net())
    loaded = load(model, spec_of())
    with pytest.raises(ExportError) as caught:
        export_network(loaded.network, loaded.spec, Path("unet.onnx"))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 700
    if model == "Branches":
        assert "(mynets.py, line " in str(caught.value)
        assert "if x.sum() > 0:" in str(caught.value)
    assert capsys.readouterr().out == ""  # torch prints the graph there
    assert not Path("unet.onnx").exists()


# The commands


def write_project(conditions: str = "") -> None:
    Path("mynet_of_cwd.py").write_text(
        "import torch\nfrom tests.model.mynets import Net\n\n"
        "def make(base: int = 4):\n    return Net(base)\n"
    )
    Path("spec.toml").write_text(SPEC + "[model]\nbase = 6\n" + conditions)
    save(trained(mynets.Net(6)))


def test_export_verify_trace_bench_budget_and_inspect_take_the_code_of_the_folder() -> None:
    write_project()
    model = ("--model", "mynet_of_cwd:make")
    outcome = run("export", "ckpt.pt", *model, "--spec", "spec.toml")
    assert outcome.code == 0, outcome.err
    assert outcome.out == "unet.onnx\n"
    for text in ("ckpt.pt: own, online weights, 1x8x8", "base", "ASSUMED", "mynet_of_cwd:make"):
        assert text in outcome.err
    verified = run("verify", "-e", "unet.onnx", "--against", "ckpt.pt", *model, "-n", 2)
    assert verified.code == 0, verified.err
    message = refusal(run("verify", "-e", "unet.onnx", "--against", "ckpt.pt"))
    assert "mynet_of_cwd:make(base=6)" in message
    asked = run("verify", "-e", "unet.onnx", "--against", "ckpt.pt")
    assert " hint: Add: --model mynet_of_cwd:make" in asked.err
    both = (*model, "--spec", "spec.toml")
    for command in (
        ("trace", "ckpt.pt", *both, "-n", 1),
        ("budget", "ckpt.pt", *both, "-n", 1, "--timesteps", 2),
        ("inspect", "ckpt.pt", *both),
        ("bench", "-e", "unet.onnx", "--against", "ckpt.pt", *model, "--steps", 2, "--repeat", 1),
    ):
        outcome = run(*command)
        assert outcome.code == 0, (command, outcome.err)
    for name in ("trace", "inspect"):
        assert "--model package.module:factory --spec spec.toml" in run(name, "ckpt.pt").err


def test_bisect_walks_a_network_of_the_user_s_own() -> None:
    write_project()
    model = ("--model", "mynet_of_cwd:make")
    assert run("export", "ckpt.pt", *model, "--spec", "spec.toml").code == 0
    save(trained(mynets.Net(6)).requires_grad_(False))
    state = torch.load("ckpt.pt", weights_only=True)
    state["out.bias"] += 0.5
    torch.save(state, "ckpt.pt")
    outcome = run("verify", "-e", "unet.onnx", "--against", "ckpt.pt", *model, "-n", 1, "--bisect")
    assert outcome.code == 1, outcome.err
    assert "out.bias" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mynet_of_cwd:make"], "nothing says its samples and its schedule"),
        (["--spec", "spec.toml"], "the weights of a network of your own"),
        (["--model", "mynet_of_cwd:make", "--spec", "no.toml"], "There is no file no.toml."),
        (["--model", "mynet_of_cwd:no", "--spec", "spec.toml"], "has no no; it has "),
    ],
)
def test_what_is_missing_is_one_message(arguments: list[str], message: str) -> None:
    write_project()
    assert message in refusal(run("export", "ckpt.pt", *arguments))
    assert not Path("unet.onnx").exists()


def test_an_option_that_spec_toml_answers_is_refused() -> None:
    write_project()
    outcome = run("export", "ckpt.pt", "--spec", "spec.toml", "--schedule", "cosine")
    assert outcome.code == 2
    assert "leave --schedule out" in outcome.err


# spec.toml


def test_a_whole_spec_toml_is_read() -> None:
    described = read(
        """
sample_shape = [2, 16]
timestep = "fraction"
prediction = "v_prediction"
variance = "fixed_large"
clip = false
value_range = [0, 1]
rounding = "truncate"
first_timestep = 1
sampler = "ddim"

[schedule]
name = "cosine"
T = 100
s = 0.01

[sampling]
steps = 10
eta = 0.5
spacing = "trailing"
direction = "network"

[[conditions]]
name = "y"
meaning = "class_label"
classes = 2
names = ["cat", "dog"]

[[conditions]]
name = "before"
meaning = "self_condition"

[model]
width = 64
mults = [1, 2]

[restore]
scale = [1.0, 2.0]
offset = [0.0, 0.5]
axis = 0
"""
    )
    spec = described.spec
    assert (spec.sample_shape, spec.schedule.name, spec.schedule.T) == ((2, 16), "cosine", 100)
    assert (spec.prediction, spec.variance, spec.clip) == ("v_prediction", "fixed_large", None)
    assert (spec.value_range, spec.rounding, spec.first_timestep) == ((0.0, 1.0), "truncate", 1)
    assert (spec.sampler, spec.sampling.steps, spec.sampling.eta) == ("ddim", 10, 0.5)
    assert [c.meaning for c in spec.conditions] == ["class_label", "self_condition"]
    assert spec.conditions[1].shape == (2, 16)
    assert spec.network == {
        "timestep": "fraction",
        "arguments": {"width": 64, "mults": [1, 2]},
    }
    assert spec.restore is not None
    assert spec.restore.axis == 0
    assert {fact.source for fact in described.facts} == {"config"}
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_the_least_spec_toml_says_what_it_leaves_out() -> None:
    described = read()
    assumed = {fact.name: fact.value for fact in described.facts if fact.source == "assumed"}
    assert assumed == {
        "t is given as": "the index, int64",
        "prediction": "epsilon",
        "variance": "fixed_small",
        "clip of x_0": 1.0,
        "value range": [-1.0, 1.0],
        "rounding": "nearest",
        "sampler": "ddpm",
    }


def test_betas_may_be_given_themselves() -> None:
    spec = read("sample_shape = [3]\n[schedule]\nbetas = [0.1, 0.2, 0.3]\n").spec
    np.testing.assert_array_equal(spec.schedule.beta, [0.1, 0.2, 0.3])


SCHEDULE = '[schedule]\nname = "linear"\nT = 20\n'
LABEL = '[[conditions]]\nname = "y"\nmeaning = "class_label"\nclasses = 3\n'


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "does not say sample_shape", "sample_shape = [3, 32, 32]"),
        ("sample_shape = [3, 8, 8]", "does not say [schedule]", 'name = "linear"'),
        ("sample_shape = [3, 8\n", "is no TOML: ", "brackets"),
        ("prediction = epsilon", "is no TOML: ", "quotes"),
        ("sampel_shape = [1]\n" + SCHEDULE, "line 1: sampel_shape is no key", "sample_shape?"),
        ("sample_shape = [1, 0]\n" + SCHEDULE, "line 1: sample_shape is [1, 0]", "[3, 32, 32]"),
        ('sample_shape = "3x8x8"\n' + SCHEDULE, 'sample_shape is "3x8x8"', "[3, 32, 32]"),
        ("sample_shape = []\n" + SCHEDULE, "sample_shape is []", "[3, 32, 32]"),
        (
            'prediction = "eps"\n' + SPEC,
            'line 1: prediction is "eps"; it must be one of eps',
            '"ep',
        ),
        ('variance = "small"\n' + SPEC, "one of fixed_small, fixed_large", '"fixed_small"'),
        ("clip = 0\n" + SPEC, "clip is 0; it must be a number above 0, or false", "clip = 1.0"),
        ("clip = true\n" + SPEC, "clip is true", "clip = 1.0"),
        ("value_range = [1, -1]\n" + SPEC, "darkest, then brightest", "[-1.0, 1.0]"),
        ("value_range = [1]\n" + SPEC, "two numbers", "[-1.0, 1.0]"),
        ('timestep = "t/T"\n' + SPEC, "one of index, float, fraction", '"index"'),
        ('sampler = "euler"\n' + SPEC, "one of ddpm, ddim", '"ddpm"'),
        ("first_timestep = 20\n" + SPEC, "at most T-1, 19", "first_timestep = 0"),
        ("first_timestep = -1\n" + SPEC, "a whole number from 0 on", "first_timestep = 0"),
        ('rounding = "up"\n' + SPEC, "one of nearest, truncate", '"nearest"'),
        ("schedule = 3\nsample_shape = [1]", "schedule is 3; it must be a table", "[schedule]"),
        (SPEC.replace("linear", "square"), 'schedule.name is "square"', '"linear"'),
        (SPEC.replace("T = 20", 'T = "20"'), 'line 6: schedule.T is "20"', "T = 1000"),
        (SPEC.replace("T = 20", "T = 0"), "schedule.T is 0", "T = 1000"),
        (SPEC.replace("T = 20", ""), "does not say schedule.T", "T = 1000"),
        (SPEC.replace('name = "linear"', ""), "does not say schedule.name", "linear"),
        (SPEC.replace("start", "beta_start"), "schedule.beta_start is no key in [sc", "start?"),
        (SPEC.replace("0.2", "2.0"), "gives no schedule: beta[", "other parameters"),
        (SPEC.replace("0.2", "nan"), "schedule.end is nan; it must be a number", "end = 0.02"),
        ("sample_shape = [1]\n[schedule]\nbetas = []", "schedule.betas is []", "betas = [0.0001"),
        ("sample_shape = [1]\n[schedule]\nbetas = [2.0]", "beta[0] is 2.0", "each above 0"),
        ("sample_shape = [1]\n[schedule]\nbetas = [0.1]\nT = 1", "schedule.T is no key", ""),
        (SPEC + "[sampling]\nsteps = 0", "sampling.steps is 0", "steps = 50"),
        (SPEC + "[sampling]\nsteps = 21", "at most T, 20", "steps = 20"),
        (SPEC + "[sampling]\nsteps = [20, 3]", "timesteps of 0..19", "steps = [9, 5, 0]"),
        (SPEC + "[sampling]\nsteps = [3, 3]", "each once", "steps = [9, 5, 0]"),
        (SPEC + "[sampling]\neta = 2", "a number from 0 to 1", "eta = 0.0"),
        (SPEC + "[sampling]\neta = 0.5", "eta belongs to ddim", ""),
        (SPEC + '[sampling]\nspacing = "even"', "one of leading, linspace, trailing", "leading"),
        (SPEC + "[sampling]\nsampler = 3", "sampling.sampler is no key in [sampling]", ""),
        (SPEC + "[sampling]\nnoise_at_end = 1", "true or false", "noise_at_end = true"),
        (SPEC + "[conditions]\nname = 3", "tables, one an input", "[[conditions]]"),
        (SPEC + '[[conditions]]\nname = "y"', "does not say conditions[0].meaning", "class_label"),
        (SPEC + LABEL.replace("classes = 3", ""), "conditions[0].classes", "classes = 10"),
        (SPEC + LABEL.replace('"y"', '"x"'), "a name of its own, not x or t", 'name = "y"'),
        (SPEC + LABEL.replace('"y"', '"a b"'), "a name such as y", 'name = "y"'),
        (SPEC + LABEL + LABEL, "line 14: conditions[1].name", 'name = "y"'),
        (SPEC + LABEL + LABEL.replace('"y"', '"z"'), "has two class_labels", "observation"),
        (SPEC + LABEL + 'names = ["cat"]', "3 texts, as classes says", "names = "),
        (SPEC + LABEL + "shape = [3]", "conditions[0].shape is no key", ""),
        (SPEC + LABEL.replace("class_label", "label"), "one of class_label", "class_label"),
        (
            SPEC + '[[conditions]]\nname = "o"\nmeaning = "observation"',
            "does not say conditions[0].shape",
            "shape = [20]",
        ),
        (SPEC + '[model]\n"a b" = 3', "is no name of an argument", "base = 64"),
        (SPEC + "[model]\nwhen = 2020-01-01", "model.when is 2020-01-01", "when = 64"),
        (SPEC + "[restore]\nscale = [1.0]", "does not say restore.offset", "offset = [1.0]"),
        (SPEC + "[restore]\nscale = [1, 2]\noffset = [0, 0]", "1 or 8 numbers", "scale = [1.0]"),
        (SPEC + "[restore]\nscale = [1]\noffset = [0]\naxis = 3", "an axis of", "axis = -1"),
        (SPEC + "[optimizer]\nlr = 1", "optimizer is no key; there are ", ""),
    ],
)
def test_every_wrong_key_or_value_is_one_message(text: str, message: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        read(text)
    assert message in str(caught.value)
    assert hint in caught.value.hint
    assert str(caught.value).startswith("spec.toml")
    assert caught.value.hint


def test_files_that_are_no_text_are_refused() -> None:
    Path("spec.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SpecError, match="cannot be read"):
        read_spec_toml(Path("spec.toml"))
    with pytest.raises(SpecError, match="cannot be read"):
        read_spec_toml(Path())
    Path("spec.toml").write_text("a = " + "[" * 5000)
    with pytest.raises(SpecError, match="is no TOML"):
        read_spec_toml(Path("spec.toml"))
