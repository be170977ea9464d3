"""What `Cuda` says where there is no GPU, and that every error code reaches the user."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")

from cuda.bindings import runtime as cudart

from ddpm_deploy.engines.cuda import Buffer, Cuda, Graph
from ddpm_deploy.engines.device import Device
from ddpm_deploy.errors import EngineError

Code = cudart.cudaError_t
DEVICE = Device(name="GPU", compute_capability="8.6", memory=8, integrated=False, driver="13.0")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets functions of the CUDA runtime answer what they would elsewhere."""

    def answer(**replies: Any) -> None:
        for name, reply in replies.items():

            def function(*_: Any, reply: Any = reply) -> Any:
                if isinstance(reply, Exception):
                    raise reply
                return reply

            function.__name__ = name
            monkeypatch.setattr(cudart, name, function)

    return answer


@pytest.mark.parametrize(
    ("replies", "said", "hint"),
    [
        (
            {"cudaDriverGetVersion": (Code.cudaSuccess, 0)},
            r"There is no NVIDIA driver here \(libcuda\.so\.1 is missing\)",
            "see ddpm-deploy doctor",
        ),
        (
            {"cudaDriverGetVersion": RuntimeError("Failed to dlopen libcuda.so.1")},
            "There is no NVIDIA driver here",
            "Install the driver",
        ),
        (
            {
                "cudaDriverGetVersion": (Code.cudaSuccess, 12060),
                "cudaRuntimeGetVersion": (Code.cudaSuccess, 13050),
                "cudaGetDeviceCount": (Code.cudaErrorInsufficientDriver, None),
            },
            r"knows CUDA up to 12\.6, which is too old for cuda-bindings' CUDA 13\.5",
            "pip install 'cuda-bindings<13'",
        ),
        (
            {
                "cudaDriverGetVersion": (Code.cudaSuccess, 13000),
                "cudaGetDeviceCount": (Code.cudaErrorNoDevice, None),
            },
            "There is an NVIDIA driver, but it finds no GPU",
            "nvidia-smi",
        ),
        (
            {
                "cudaDriverGetVersion": (Code.cudaSuccess, 13000),
                "cudaGetDeviceCount": (Code.cudaSuccess, 0),
            },
            "it finds no GPU",
            "CUDA_VISIBLE_DEVICES",
        ),
        (
            {
                "cudaDriverGetVersion": (Code.cudaSuccess, 13000),
                "cudaGetDeviceCount": (Code.cudaErrorInitializationError, None),
            },
            r"cudaGetDeviceCount failed: cudaErrorInitializationError \(initialization error\)",
            "ddpm-deploy doctor",
        ),
    ],
)
def test_a_machine_that_cannot_run_plans_says_what_it_lacks(
    answers: Callable[..., None], replies: dict[str, Any], said: str, hint: str
) -> None:
    answers(**replies)
    with pytest.raises(EngineError, match=said) as caught:
        Cuda.open()
    assert hint in caught.value.hint


def test_a_gpu_says_what_it_is(answers: Callable[..., None]) -> None:
    properties = SimpleNamespace(
        name=b"Orin", major=8, minor=7, totalGlobalMem=7_990_000_000, integrated=1
    )
    answers(
        cudaDriverGetVersion=(Code.cudaSuccess, 12060),
        cudaGetDeviceCount=(Code.cudaSuccess, 1),
        cudaSetDevice=(Code.cudaSuccess,),
        cudaGetDeviceProperties=(Code.cudaSuccess, properties),
    )
    assert Cuda.open().device == Device(
        name="Orin",
        compute_capability="8.7",
        memory=7_990_000_000,
        integrated=True,
        driver="12.6",
    )


@pytest.mark.parametrize("what", ["on_device", "pinned"])
def test_memory_that_is_not_there_says_how_much_is(answers: Callable[..., None], what: str) -> None:
    answers(
        cudaMalloc=(Code.cudaErrorMemoryAllocation, None),
        cudaHostAlloc=(Code.cudaErrorMemoryAllocation, None),
        cudaMemGetInfo=(Code.cudaSuccess, 1_000_000, 8_000_000),
    )
    with pytest.raises(
        EngineError, match=r"no room for 9,000,000 bytes of .* memory: 1,000,000 of 8,000,000 are"
    ) as caught:
        getattr(Cuda(DEVICE), what)(9_000_000)
    assert "a smaller --batch" in caught.value.hint


def test_every_call_reports_its_error(answers: Callable[..., None]) -> None:
    answers(cudaStreamSynchronize=(Code.cudaErrorIllegalAddress,))
    with pytest.raises(
        EngineError, match=r"cudaStreamSynchronize failed: cudaErrorIllegalAddress \(an illegal me"
    ):
        Cuda(DEVICE).synchronise(5)


def test_giving_back_after_an_error_of_the_device_raises_nothing(
    answers: Callable[..., None],
) -> None:
    again = (Code.cudaErrorIllegalAddress,)
    answers(
        cudaStreamSynchronize=again,
        cudaFree=again,
        cudaFreeHost=again,
        cudaEventDestroy=again,
        cudaStreamDestroy=again,
        cudaGraphExecDestroy=again,
    )
    device = Cuda(DEVICE)
    device.settle(5)
    device.free(Buffer(address=256, nbytes=8))
    device.free(Buffer(address=256, nbytes=8, host=np.zeros(8, dtype=np.uint8)))
    device.close_event(5)
    device.close_stream(5)
    Graph(5).close()


def test_a_capture_that_fails_ends(
    answers: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    answers(
        cudaStreamBeginCapture=(Code.cudaSuccess,),
        cudaGraphDestroy=(Code.cudaSuccess,),
    )

    def end(stream: int) -> Any:
        ended.append(stream)
        return Code.cudaErrorStreamCaptureInvalidated, None

    monkeypatch.setattr(cudart, "cudaStreamEndCapture", end)

    def work() -> None:
        raise EngineError("the runtime refuses")

    with pytest.raises(EngineError, match="the runtime refuses"):
        Cuda(DEVICE).capture(5, work)
    assert ended == [5]


@pytest.mark.gpu
def test_bytes_go_to_the_device_and_back() -> None:
    try:
        device = Cuda.open()
    except EngineError as error:
        pytest.skip(f"no GPU: {error}")
    stream = device.stream()
    here, there, back = device.pinned(1000), device.on_device(1000), device.pinned(1000)
    here.view((250,), "float32")[:] = range(250)

    def work() -> None:
        device.copy(there, here, 1000, stream)
        device.copy(back, there, 1000, stream)

    graph = device.capture(stream, work)
    assert not back.view((250,), "float32").any()
    graph.launch(stream)
    device.synchronise(stream)
    assert back.view((250,), "float32").tolist() == list(range(250))
    graph.close()
    for buffer in (here, there, back):
        device.free(buffer)
    device.close_stream(stream)


@pytest.mark.gpu
def test_a_stream_goes_on_after_a_capture_that_failed() -> None:
    try:
        device = Cuda.open()
    except EngineError as error:
        pytest.skip(f"no GPU: {error}")
    stream = device.stream()
    here, there = device.pinned(8), device.on_device(8)

    def wait() -> None:
        device.copy(there, here, 8, stream)
        device.synchronise(stream)

    for _ in range(2):
        with pytest.raises(EngineError, match="cudaErrorStreamCapture"):
            device.capture(stream, wait)
        device.copy(there, here, 8, stream)
        device.synchronise(stream)
    device.free(here)
    device.free(there)
    device.close_stream(stream)
