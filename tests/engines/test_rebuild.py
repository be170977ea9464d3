from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from ddpm_deploy.engines.build_settings import BuildSettings
from ddpm_deploy.engines.plan import Profile
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
        *("--compute-capability", "7.5", "--force", "-o", f"{tmp_path}/moved.plan"),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        BuildSettings(
            flavour="tensorrt",
            precision="bf16",
            profiles=(Profile(least=1, best=1, most=1), Profile(least=2, best=4, most=8)),
            budget=0.01,
            data="pictures",
            fuse_step=True,
            workspace=256,
            optimization_level=1,
            timing_cache=Path("measured"),
            version_compatible=True,
            hardware_compatible=True,
        ),
        BuildSettings(
            flavour="tensorrt_rtx",
            precision="fp32",
            profiles=(Profile(least=1, best=8, most=8),),
            compute_capabilities=("8.6", "12.0"),
        ),
    ],
)
def test_every_option_that_a_build_writes_down_is_taken(
    tmp_path: Path, settings: BuildSettings
) -> None:
    plan = write_plan(tmp_path / "unet.plan")
    graph = tmp_path / "unet.onnx"
    graph.write_bytes(b"graph")
    mismatch = _mismatch(settings.command(graph, plan))
    here = replace(settings, timing_cache=None, data=None).command(graph, plan)
    wanted = [*shlex.split(here)[1:-2], "--force", "-o", str(plan)]
    assert rebuild_arguments(plan, record(), mismatch) == wanted


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
        "ddpm-deploy build unet.onnx -o",
        "ddpm-deploy build unet.onnx --output=/etc/passwd",
        "ddpm-deploy build unet.onnx -o/etc/passwd",
        "ddpm-deploy build unet.onnx --output /etc/passwd -o x",
        "ddpm-deploy build unet.onnx --timing-cache=/etc/passwd -o x",
        "ddpm-deploy build unet.onnx other.onnx -o x",
        "ddpm-deploy build unet.onnx '",
        "ddpm-deploy build",
        "",
    ],
)
def test_a_command_that_is_no_build_of_the_graph_is_not_run(tmp_path: Path, command: str) -> None:
    plan = write_plan(tmp_path / "unet.plan")
    (tmp_path / "unet.onnx").write_bytes(b"graph")
    with pytest.raises(EngineError, match="names no build of"):
        rebuild_arguments(plan, record(), _mismatch(command))
