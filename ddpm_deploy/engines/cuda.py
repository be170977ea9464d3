"""CUDA without torch: memory, streams, events and graphs, on cuda-bindings.

Thin on purpose: every call's error code is checked here, and nowhere else is there one. The module
imports on a machine without a driver; `Cuda.open` says what is missing there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart

from ddpm_deploy.arrays import Array
from ddpm_deploy.engines.device import Device
from ddpm_deploy.errors import EngineError


@dataclass(eq=False)
class Buffer:
    """Memory that the device reads and writes.

    Attributes:
        address: Where the device finds it.
        nbytes: Its size.
        host: The same bytes for the host, uint8, (nbytes,); None for memory of the device alone.
    """

    address: int
    nbytes: int
    host: Array | None = None

    def view(self, shape: tuple[int, ...], dtype: str) -> Array:
        """Returns the host's bytes as an array; nobody may keep it after the buffer is freed.

        Raises:
            TypeError: It is memory of the device alone.
        """
        if self.host is None:
            raise TypeError("memory of the device alone has no view")
        return (
            self.host[: int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
        )


class Graph:
    """Work on a stream, recorded once and launched with one call."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def launch(self, stream: int) -> None:
        """Begins the work on a stream."""
        _call(cudart.cudaGraphLaunch, self._handle, stream)

    def close(self) -> None:
        """Gives it back; once more does nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            _tried(cudart.cudaGraphExecDestroy, handle)


class Cuda:
    """A device that was opened: the primary context, which TensorRT uses too.

    Giving something back raises nothing: after an error of the device every call reports that error
    again, and it was raised where the work was waited for.

    Args:
        device: What it is.
    """

    def __init__(self, device: Device) -> None:
        self.device = device

    @classmethod
    def open(cls, number: int = 0) -> Cuda:
        """Opens a GPU, of those that CUDA_VISIBLE_DEVICES shows.

        Raises:
            EngineError: There is no driver, it is too old, or there is no GPU: a message each.
        """
        driver = _driver()
        count, found = _tried(cudart.cudaGetDeviceCount)
        if count == cudart.cudaError_t.cudaErrorInsufficientDriver:
            raise EngineError(
                f"The NVIDIA driver here knows CUDA up to {driver}, which is too old for "
                f"cuda-bindings' CUDA {_runtime()}.",
                hint="Update the driver, or: pip install 'cuda-bindings<13'",
            )
        if count == cudart.cudaError_t.cudaErrorNoDevice or (not int(count) and not found[0]):
            raise EngineError(
                "There is an NVIDIA driver, but it finds no GPU.",
                hint="Check: nvidia-smi; and that CUDA_VISIBLE_DEVICES is not empty.",
            )
        _check(cudart.cudaGetDeviceCount, count)
        _call(cudart.cudaSetDevice, number)
        (properties,) = _call(cudart.cudaGetDeviceProperties, number)
        device = Device(
            name=properties.name.split(b"\0")[0].decode(errors="replace"),
            compute_capability=f"{properties.major}.{properties.minor}",
            memory=int(properties.totalGlobalMem),
            integrated=bool(properties.integrated),
            driver=driver,
        )
        return cls(device)

    def stream(self) -> int:
        """Makes a stream that does not wait for the default one; returns its handle."""
        (stream,) = _call(cudart.cudaStreamCreateWithFlags, cudart.cudaStreamNonBlocking)
        return int(stream)

    def close_stream(self, stream: int) -> None:
        """Gives a stream back."""
        _tried(cudart.cudaStreamDestroy, stream)

    def synchronise(self, stream: int) -> None:
        """Waits until a stream's work is done; errors of that work are raised here."""
        _call(cudart.cudaStreamSynchronize, stream)

    def settle(self, stream: int) -> None:
        """Waits until a stream does nothing more, be it for an error: then memory can be freed."""
        _tried(cudart.cudaStreamSynchronize, stream)

    def event(self) -> int:
        """Makes a mark for streams, without a clock; returns its handle."""
        (event,) = _call(cudart.cudaEventCreateWithFlags, cudart.cudaEventDisableTiming)
        return int(event)

    def close_event(self, event: int) -> None:
        """Gives an event back."""
        _tried(cudart.cudaEventDestroy, event)

    def record(self, event: int, stream: int) -> None:
        """Sets the mark behind what a stream was given so far."""
        _call(cudart.cudaEventRecord, event, stream)

    def wait(self, event: int) -> None:
        """Waits until the stream has passed the mark; at once where none was ever set."""
        _call(cudart.cudaEventSynchronize, event)

    def on_device(self, nbytes: int) -> Buffer:
        """Takes memory of the device alone.

        Raises:
            EngineError: There is not enough; the message says how much is free.
        """
        (address,) = self._take("device", nbytes, cudart.cudaMalloc, nbytes)
        return Buffer(address=int(address), nbytes=nbytes)

    def pinned(self, nbytes: int) -> Buffer:
        """Takes memory of the host that the device copies from and to by itself, zeros at first.

        On an integrated GPU it is mapped: the device reads and writes the same bytes.

        Raises:
            EngineError: There is not enough.
        """
        mapped = self.device.integrated
        flags = cudart.cudaHostAllocMapped if mapped else cudart.cudaHostAllocDefault
        (host,) = self._take("pinned host", nbytes, cudart.cudaHostAlloc, nbytes, flags)
        address = int(host)
        array = _bytes_at(address, nbytes)
        array[:] = 0
        if mapped:
            (address,) = _call(cudart.cudaHostGetDevicePointer, address, 0)
        return Buffer(address=int(address), nbytes=nbytes, host=array)

    def free(self, buffer: Buffer) -> None:
        """Gives memory back; once more does nothing."""
        if not buffer.address:
            return
        if buffer.host is None:
            _tried(cudart.cudaFree, buffer.address)
        else:
            _tried(cudart.cudaFreeHost, buffer.host.ctypes.data)
        buffer.address, buffer.host = 0, None

    def copy(self, to: Buffer, source: Buffer, nbytes: int, stream: int) -> None:
        """Copies bytes once the stream comes to it; the driver sees from the addresses where."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDefault
        _call(cudart.cudaMemcpyAsync, to.address, source.address, nbytes, kind, stream)

    def zero(self, buffer: Buffer, stream: int) -> None:
        """Sets every byte to 0 once the stream comes to it."""
        _call(cudart.cudaMemsetAsync, buffer.address, 0, buffer.nbytes, stream)

    def capture(self, stream: int, work: Callable[[], None]) -> Graph:
        """Records what `work` gives to a stream, which does none of it.

        Other threads may go on using CUDA meanwhile.

        Raises:
            EngineError: The work cannot be recorded, or `work` raised this; the stream is as it was
                before.
        """
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _call(cudart.cudaStreamBeginCapture, stream, mode)
        try:
            work()
        except BaseException:
            _, (graph,) = _tried(cudart.cudaStreamEndCapture, stream)
            if graph is not None and int(graph):
                _tried(cudart.cudaGraphDestroy, graph)
            _tried(cudart.cudaGetLastError)  # or the next call would report it again
            raise
        (graph,) = _call(cudart.cudaStreamEndCapture, stream)
        try:
            (executable,) = _call(cudart.cudaGraphInstantiate, graph, 0)
        finally:
            _tried(cudart.cudaGraphDestroy, graph)
        return Graph(executable)

    def _take(self, what: str, nbytes: int, function: Any, *arguments: Any) -> tuple[Any, ...]:
        code, results = _tried(function, *arguments)
        if code == cudart.cudaError_t.cudaErrorMemoryAllocation:
            _tried(cudart.cudaGetLastError)
            free, total = _call(cudart.cudaMemGetInfo)
            raise EngineError(
                f"{self.device.name} has no room for {nbytes:,} bytes of {what} memory: "
                f"{free:,} of {total:,} are free.",
                hint="Type a smaller --batch, or end other programs that use the GPU.",
            )
        _check(function, code)
        return results


def _driver() -> str:
    """Returns the latest CUDA that the driver knows."""
    nothing = EngineError(
        "There is no NVIDIA driver here (libcuda.so.1 is missing), so no plan runs.",
        hint="Install the driver of this machine's GPU; see ddpm-deploy doctor.",
    )
    try:
        code, (version,) = _tried(cudart.cudaDriverGetVersion)
    except RuntimeError as error:  # how cuda-bindings 12 says that there is no libcuda
        raise nothing from error
    if int(code) or not version:
        raise nothing
    return _version(version)


def _runtime() -> str:
    _, (version,) = _tried(cudart.cudaRuntimeGetVersion)
    return _version(version)


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _bytes_at(address: int, nbytes: int) -> Array:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def _tried(function: Any, *arguments: Any) -> tuple[Any, tuple[Any, ...]]:
    code, *results = function(*arguments)
    return code, tuple(results)


def _call(function: Any, *arguments: Any) -> tuple[Any, ...]:
    """Calls CUDA; returns the results without the error code, which must be 0.

    Raises:
        EngineError: It is not; the message has the code's name and CUDA's words for it.
    """
    code, results = _tried(function, *arguments)
    _check(function, code)
    return results


def _check(function: Any, code: Any) -> None:
    if not int(code):
        return
    _, (name,) = _tried(cudart.cudaGetErrorName, code)
    _, (words,) = _tried(cudart.cudaGetErrorString, code)
    _tried(cudart.cudaGetLastError)
    raise EngineError(
        f"{function.__name__} failed: {name.decode()} ({words.decode()}).",
        hint="Run it again on its own; if it stays, see ddpm-deploy doctor.",
    )
