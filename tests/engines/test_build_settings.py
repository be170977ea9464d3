from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from ddpm_deploy.engines.build_settings import BuildSettings
from ddpm_deploy.engines.plan import Profile
from ddpm_deploy.errors import EngineBuildError

ONE_TO_EIGHT = (Profile(least=1, best=4, most=8),)
ONE = (Profile(least=1, best=1, most=1),)


def settings(flavour: str, **chosen: Any) -> BuildSettings:
    return BuildSettings(
        flavour=flavour,  # type: ignore[arg-type]
        **{"precision": "fp16", "profiles": ONE_TO_EIGHT, **chosen},
    )


@pytest.mark.parametrize(
    ("flavour", "chosen", "message"),
    [
        ("tensorrt_rtx", {"timing_cache": Path("t")}, "TensorRT-RTX measures nothing while it"),
        ("tensorrt_rtx", {"version_compatible": True}, "TensorRT-RTX has no lean runtime"),
        ("tensorrt_rtx", {"hardware_compatible": True}, "runs on GPUs of Ampere and later as it"),
        ("tensorrt_rtx", {"compute_capabilities": ("86",)}, "'86' is no compute capability"),
        ("tensorrt_rtx", {"compute_capabilities": ("8.6.",)}, "'8.6.' is no compute capability"),
        ("tensorrt", {"compute_capabilities": ("8.6",)}, "measures its kernels on the GPU in this"),
        (
            "tensorrt_rtx",
            {"compute_capabilities": ("7.5", "8.6"), "precision": "bf16"},
            "of compute capability 7.5 has no bfloat16",
        ),
    ],
)
def test_an_option_that_a_runtime_lacks_is_refused_with_the_reason(
    flavour: str, chosen: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineBuildError, match=message) as caught:
        settings(flavour, **chosen)
    assert caught.value.hint


def test_the_command_is_what_to_type() -> None:
    chosen = settings(
        "tensorrt",
        profiles=(*ONE, *ONE_TO_EIGHT),
        workspace=512,
        optimization_level=2,
        timing_cache=Path("my cache"),
        version_compatible=True,
        hardware_compatible=True,
    )
    assert shlex.split(chosen.command(Path("unet.onnx"), Path("unet.plan"))) == [
        *("ddpm-deploy", "build", "unet.onnx", "--fp16", "--runtime", "tensorrt"),
        *("--batch", "1:1:1", "--batch", "1:4:8", "--workspace", "512"),
        *("--optimization-level", "2", "--timing-cache", "my cache"),
        *("--version-compatible", "--hardware-compatible", "-o", "unet.plan"),
    ]
    rtx = settings("tensorrt_rtx", compute_capabilities=("8.6", "12.0"))
    assert "--compute-capability 8.6 --compute-capability 12.0" in rtx.command(
        Path("a.onnx"), Path("a.plan")
    )


def test_each_rung_of_the_ladder_gives_up_more() -> None:
    rungs = settings("tensorrt").smaller()
    given_up = [
        (r.settings.workspace, r.settings.optimization_level, r.settings.profiles) for r in rungs
    ]
    assert given_up == [(256, None, ONE_TO_EIGHT), (256, 1, ONE_TO_EIGHT), (256, 1, ONE)]
    assert len({rung.gives_up for rung in rungs}) == 3


def test_what_was_given_up_already_is_no_rung() -> None:
    (last,) = settings("tensorrt", workspace=128, optimization_level=0).smaller()
    assert (last.settings.workspace, last.settings.optimization_level) == (128, 0)
    assert last.settings.smaller() == []
    (only,) = settings("tensorrt_rtx").smaller()
    assert only.settings.profiles == ONE


def test_what_a_device_cannot_hold_is_mended_by_the_batch_alone() -> None:
    (only,) = settings("tensorrt").smaller(batch_alone=True)
    assert only.settings == settings("tensorrt", profiles=ONE)
