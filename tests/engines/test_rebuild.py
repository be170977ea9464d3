from __future__ import annotations

from pathlib import Path

import pytest

from ddpm_deploy.engines.rebuild import rebuild_arguments
from ddpm_deploy.errors import EngineError, PlanMismatchError
from tests.engines.plans import record, write_plan


def _mismatch(command: str) -> PlanMismatchError:
    return PlanMismatchError("other version", command=command)


def test_a_plan_is_built_again_in_its_place(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "moved.plan")
    (tmp_path / "unet.onnx").write_bytes(b"graph")
    command = (
        "ddpm-deploy build '/home/me/my models/unet.onnx' --fp16 --timing-cache /etc/passwd "
        "--batch 1:8:8 -o out/unet.plan --compute-capability 7.5"
    )
    assert rebuild_arguments(plan, record(), _mismatch(command)) == [
        *("build", f"{tmp_path}/unet.onnx", "--fp16", "--batch", "1:8:8"),
        *("-o", f"{tmp_path}/moved.plan", "--compute-capability", "7.5"),
    ]


def test_a_graph_that_is_elsewhere_is_asked_for(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "unet.plan")
    for graph in ("unet.onnx", "../unet.onnx"):
        with pytest.raises(EngineError, match=r"its graph .*unet\.onnx is not beside it") as caught:
            rebuild_arguments(plan, record(graph=graph), _mismatch(record().command))
        assert caught.value.hint.startswith(f"Copy unet.onnx to {tmp_path}, or: ddpm-deploy build")


@pytest.mark.parametrize(
    "command",
    [
        "rm -rf unet.onnx -o x",
        "ddpm-deploy sample unet.onnx -o x",
        "ddpm-deploy build other.onnx -o x",
        "ddpm-deploy build unet.onnx",
        "ddpm-deploy build unet.onnx -o x -o y",
        "ddpm-deploy build unet.onnx -o",
        "ddpm-deploy build",
        "",
    ],
)
def test_a_command_that_is_no_build_of_the_graph_is_not_run(tmp_path: Path, command: str) -> None:
    plan = write_plan(tmp_path / "unet.plan")
    (tmp_path / "unet.onnx").write_bytes(b"graph")
    with pytest.raises(EngineError, match="names no build of"):
        rebuild_arguments(plan, record(), _mismatch(command))
