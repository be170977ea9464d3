"""Programs of torch.export: the same contract, and nothing run that a file may smuggle in."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ddpm_deploy.errors import CheckpointError
from ddpm_deploy.model import load_network
from ddpm_deploy.spec import ModelSpec
from tests.commands import refusal, run
from tests.model.mynets import Net
from tests.model.test_own import LABEL, SPEC, read, trained
from tests.round_trip import check_round_trip


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)


def write_program(
    network: nn.Module | None = None,
    *,
    conditions: int = 0,
    fixed: bool = False,
    most: int | None = None,
    path: str = "program.pt2",
    x: torch.Tensor | None = None,
) -> Path:
    batch: Any = torch.export.Dim("batch", max=most) if most else torch.export.Dim("batch")
    inputs = (
        torch.zeros(2, 1, 8, 8) if x is None else x,
        torch.zeros(2, dtype=torch.int64),
        *(torch.zeros(2, dtype=torch.int64) for _ in range(conditions)),
    )
    free: Any = [{0: batch} for _ in inputs]
    if conditions:
        free[2:] = [tuple(free[2:])]
    program = torch.export.export(
        network or trained(Net()), inputs, dynamic_shapes=None if fixed else tuple(free)
    )
    torch.export.save(program, path)
    return Path(path)


def spec_of(text: str = SPEC) -> ModelSpec:
    return read(text).spec


def refused(path: Path | str = "program.pt2", spec: ModelSpec | None = None) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_network(path, spec=spec or spec_of())
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize("labelled", [False, True])
def test_a_program_comes_back_as_itself(labelled: bool) -> None:
    network = trained(Net(5, classes=3 if labelled else 0))
    path = write_program(network, conditions=int(labelled))
    spec = spec_of(SPEC + (LABEL if labelled else ""))
    loaded = check_round_trip(path, network, export=Path("unet.onnx"), spec=spec)
    assert loaded.spec.family == "torch.export"
    assert loaded.spec.network == {"timestep": "index"}
    assert loaded.spec.checkpoint_sha256


def test_export_and_verify_take_a_program() -> None:
    write_program()
    Path("spec.toml").write_text(SPEC)
    assert "add: --spec spec.toml" in run("export", "program.pt2").err
    outcome = run("export", "program.pt2", "--spec", "spec.toml")
    assert outcome.code == 0, outcome.err
    assert "program.pt2: torch.export, 1x8x8" in outcome.err
    verified = run("verify", "-e", "unet.onnx", "--against", "program.pt2", "-n", 1, "--bisect")
    assert verified.code == 0, verified.err
    assert "verdict: the same model" in verified.out
    for options in (["--model", "mynet:make"], ["--set", "base=3"]):
        message = refusal(run("export", "program.pt2", "--spec", "spec.toml", *options))
        assert "which takes no --" in message


def test_a_batch_that_is_fixed_says_what_to_type() -> None:
    write_program(fixed=True)
    error = refused()
    assert "takes x in batches of 2 alone; its batch must be free" in str(error)
    assert (
        'batch = torch.export.Dim("batch"); torch.export.export(model, (x, t), '
        "dynamic_shapes=({0: batch}, {0: batch}))"
    ) in error.hint
    write_program(most=64)
    assert "takes batches of 0 to 64" in str(refused()) or "of 1 to 64" in str(refused())


def test_inputs_that_are_not_the_spec_s_are_named() -> None:
    write_program()
    error = refused(spec=spec_of(SPEC + LABEL))
    assert "takes 2 inputs ((N, 1, 8, 8), (N)); the spec has x, t, y" in str(error)
    error = refused(spec=spec_of(SPEC.replace("[1, 8, 8]", "[1, 8, 16]")))
    assert "takes x of the shape (N, 1, 8, 8); the spec says (N, 1, 8, 16)" in str(error)


def test_a_program_in_training_mode_is_told_by_its_numbers() -> None:
    class Dropped(Net):
        def forward(self, x: torch.Tensor, t: torch.Tensor, *c: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(super().forward(x, t), 0.5)

    write_program(trained(Dropped()))
    assert "gives other numbers each time" in str(refused())


Records = dict[str, bytes]


def rewrite(change: Callable[[Records], None]) -> None:
    """Writes the program anew with other records."""
    with zipfile.ZipFile("program.pt2") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    top = next(iter(records)).partition("/")[0]
    records = {name.removeprefix(f"{top}/"): content for name, content in records.items()}
    change(records)
    with zipfile.ZipFile("program.pt2", "w") as archive:
        for name, content in records.items():
            archive.writestr(f"{top}/{name}", content)


class Runs:
    """Its pickle runs a command when it is read."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


def pickled() -> bytes:
    buffer = io.BytesIO()
    torch.save(Runs(), buffer)
    return buffer.getvalue()


def edit(place: str, change: Callable[[Any], None]) -> Callable[[Records], None]:
    def apply(records: Records) -> None:
        data = json.loads(records[place])
        change(data)
        records[place] = json.dumps(data).encode()

    return apply


MODEL, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


def _pickled_weight(records: Records) -> None:
    config = json.loads(records[WEIGHTS])
    one = next(iter(config["config"].values()))
    one["use_pickle"] = True
    records[f"data/weights/{one['path_name']}"] = pickled()
    records[WEIGHTS] = json.dumps(config).encode()


def _opaque(records: Records) -> None:
    config = json.loads(records[CONSTANTS])
    config["config"]["evil"] = {"path_name": "opaque_obj_0", "use_pickle": True}
    records["data/constants/opaque_obj_0"] = pickle.dumps(Runs())
    records[CONSTANTS] = json.dumps(config).encode()


def _operator(target: str) -> Callable[[Records], None]:
    def change(data: Any) -> None:
        data["graph_module"]["graph"]["nodes"][0]["target"] = target

    return edit(MODEL, change)


def _expression(text: str) -> Callable[[Records], None]:
    def change(data: Any) -> None:
        x = data["graph_module"]["graph"]["tensor_values"]["x"]
        x["sizes"][0]["as_expr"]["expr_str"] = text

    return edit(MODEL, change)


def _tree(data: Any) -> None:
    spec = data["graph_module"]["module_call_graph"][0]["signature"]
    spec["in_spec"] = json.dumps(
        [1, {"type": "collections.defaultdict", "context": "{}", "children_spec": []}]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_pickled_weight, "a pickle in place of"),
        (_opaque, "the record data/constants/opaque_obj_0"),
        (lambda r: r.update({"data/sample_inputs/model.pt": pickled()}), "a pickle in its example"),
        (_operator("torch.os.system"), "a call of torch.os.system"),
        (_operator("torch.ops.aten.from_file.default"), "a call of torch.ops.aten.from_file"),
        (_operator("torch.ops.aten.add.__init__"), "a call of torch.ops.aten.add.__init__"),
        (_operator("torch.ops.mine.conv.default"), "a call of torch.ops.mine.conv.default"),
        (_operator("_operator.attrgetter"), "a call of _operator.attrgetter"),
        (_operator("torch.load"), "a call of torch.load"),
        (_expression("__import__('os').system('touch ran')"), "the expression __import__"),
        (
            _expression("Symbol('s0', a=exec(\"import os\"))"),
            "the expression Symbol('s0', a=exec(",
        ),
        (_expression("open('ran', 'w')"), "the expression open("),
        (_expression("\uff45\uff58\uff49\uff54()"), "the expression \uff45"),  # Python reads exit
        (_expression("9**9**9**9"), "the expression 9**9**9**9"),
        (_expression("9* *9"), "the expression 9* *9"),
        (_expression("Symbol('s0')**99999"), "the expression Symbol('s0')**99999"),
        (_expression("9<<9999999999"), "the expression 9<<9999999999"),
        (_expression("9>>Integer(9)"), "the expression 9>>Integer(9)"),
        (_expression("Pow(Integer(9), Integer(999))"), "the expression Pow("),
        (_expression("Integer(99999999999)"), "the expression Integer(99999999999)"),
        (_expression("1+" * 500 + "1"), "an expression of 1001 letters"),
        (_operator("_operator.pow"), "a call of _operator.pow"),
        (edit(MODEL, _tree), "an argument of the type collections.defaultdict"),
        (
            lambda r: r.update({"data/aotinductor/model/x.so": b"\x7fELF"}),
            "is a package of AOTInductor: machine code",
        ),
        (lambda r: r.update({"code/x.py": b"import os"}), "the record code/x.py"),
        (lambda r: r.pop(MODEL), "is no program that this release reads: KeyError"),
        (lambda r: r.update({MODEL: b"{"}), "is no program that this release reads: JSONDecode"),
        (lambda r: r.update({MODEL: b"[" * 100000}), "is no program that this release reads"),
        (lambda r: r.update({MODEL: b"{}"}), "torch"),
        (lambda r: r.update({WEIGHTS: b"[]"}), "is no program that this release reads"),
        (lambda r: r.update({"data/weights/weight_0": b""}), "is damaged: the record of inp."),
    ],
)
def test_what_would_be_run_is_refused_and_does_not_run(
    change: Callable[[Records], None], message: str, tmp_path: Path
) -> None:
    write_program()
    rewrite(change)
    begun = time.process_time()
    assert message in str(refused())
    assert time.process_time() - begun < 10
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        "*".join(["9999999999"] * 90),
        "Integer(9999999999)*(" * 45 + "1" + ")" * 45,
        "(" * 499 + "1" + ")" * 499,
        "Max(" + ", ".join(f"Symbol('s{k}')" for k in range(60)) + ")",
        "Mod(" * 120 + "Symbol('s0')" + ", 7)" * 120,
        "FloorDiv(" * 60 + "Symbol('s0')" + ", 7)" * 60,
        "*".join(f"(s{k}+1)" for k in range(120)),
        "*".join(f"(s{k}+1)" for k in range(8)),
        "*".join(f"(s{k}+s{k + 1}+1)" for k in range(0, 10, 2)),
        "*".join(f"Mod(s{k}+1, s{k + 1})" for k in range(0, 10, 2)),
        "FloorDiv(" * 8 + "Symbol('s0')" + ", s1+1)" * 4 + ", s2)" * 4,
        "Max(" + ", ".join(f"Min(s{k}, s{k + 8})" for k in range(8)) + ")",
    ],
)
def test_the_longest_expression_takes_little_time(text: str) -> None:
    write_program()
    rewrite(_expression(text))
    assert len(text) <= 1000
    begun = time.process_time()
    with suppress(CheckpointError):
        load_network("program.pt2", spec=spec_of())
    assert time.process_time() - begun < 20


def test_the_guards_of_a_program_are_not_compiled(tmp_path: Path) -> None:
    write_program()

    def change(data: Any) -> None:
        data["guards_code"] = ["__import__('os').system('touch ran')"]
        for node in data["graph_module"]["graph"]["nodes"]:
            node["metadata"]["source_fn_stack"] = "x,torch.os.system"

    rewrite(edit(MODEL, change))
    load_network("program.pt2", spec=spec_of())
    assert not (tmp_path / "ran").exists()


def test_two_records_of_one_name_are_refused() -> None:
    write_program()
    with (
        pytest.warns(UserWarning, match="Duplicate name"),
        zipfile.ZipFile("program.pt2", "a") as archive,
    ):
        archive.writestr("program/" + MODEL, b"{}")
    assert "two records of one name" in str(refused())


def test_a_program_of_an_older_torch_is_named() -> None:
    with zipfile.ZipFile("program.pt2", "w") as archive:
        archive.writestr("serialized_exported_program.json", b"{}")
        archive.writestr("version", b"8.8")
    assert "that PyTorch 2.7 or older saved" in str(refused())


def test_a_truncated_program_is_refused_wherever_it_ends() -> None:
    content = write_program().read_bytes()
    for tenth in range(1, 10):
        Path("program.pt2").write_bytes(content[: len(content) * tenth // 10])
        refused()


def test_a_program_with_flipped_bits_is_refused_or_the_same() -> None:
    content = write_program().read_bytes()
    draw = random.Random(0)
    wanted = load_network("program.pt2", spec=spec_of()).network.state_dict()
    outcomes = {"refused": 0, "the same": 0}
    for _ in range(60):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        Path("program.pt2").write_bytes(flipped)
        try:
            given = load_network("program.pt2", spec=spec_of()).network.state_dict()
        except CheckpointError:
            outcomes["refused"] += 1
        else:
            assert all(torch.equal(value, given[name]) for name, value in wanted.items())
            outcomes["the same"] += 1
    assert min(outcomes.values()) > 5
