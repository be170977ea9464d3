"""The fused loop on a GPU: the state stays there, a step is one launch, noise goes up ahead."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from ddpm_deploy.arrays import Array, Samples
from ddpm_deploy.engines.base import Engine, Stepper
from ddpm_deploy.engines.batches import Cut
from ddpm_deploy.engines.cuda import Buffer, Cuda
from ddpm_deploy.engines.launch import Binding, Graphs, Launch, Slot, nbytes_of
from ddpm_deploy.fused import row_of
from ddpm_deploy.sampling import Transition

SLOTS = 2
"""Pinned copies of what a step is given: one is filled while the device reads the other."""


class DeviceStepper(Stepper):
    """The loop's state for a batch, on the device.

    Args:
        engine: Checks what it is given.
        at: How the batch is cut.
        bind: Binds the engine's network to memory for that cut; the same again unless the engine
            ran another batch in between.
        graphs: Whether a step becomes one launch.
    """

    def __init__(
        self, engine: Engine, at: Cut, bind: Callable[[Cut], Binding], graphs: Graphs
    ) -> None:
        self._engine, self._cut, self._bind, self._graphs = engine, at, bind, graphs
        self._launches: list[list[Launch]] = []
        self._bound: Binding | None = None
        self._steps = 0
        self._parts: list[_Part] = []
        binding = bind(at)
        try:
            for samples in at.slices():
                self._parts.append(_Part(binding, samples))
        except BaseException:
            self.close()
            raise

    def start(self, x: Samples, conditions: Mapping[str, Array]) -> None:
        """Makes x the state; errors as in `Stepper.start`."""
        self._engine.check_start(x, conditions, self._cut.samples)
        for part in self._parts:
            part.start({"x": x, **conditions})

    def step(self, row: Transition, z: Samples | None) -> None:
        """Begins a step; errors as in `Stepper.step`."""
        self._engine.check_step(row, z, self._cut.samples)
        binding = self._bind(self._cut)
        if binding is not self._bound:
            self._prepare(binding)
        number = self._steps % SLOTS
        self._steps += 1
        for part, launches in zip(self._parts, self._launches, strict=True):
            part.fill(number, row, z)
            launches[number]()
            part.mark(number)

    def read(self) -> Samples:
        """Waits for what was begun; returns a copy of the state."""
        return np.concatenate([part.read() for part in self._parts])

    def close(self) -> None:
        """Gives memory, events and graphs back; once more does nothing."""
        self._drop_launches()
        for part in self._parts:
            part.close()
        self._parts = []

    def _prepare(self, binding: Binding) -> None:
        """Makes the launches anew: graphs hold the addresses of a binding."""
        self._drop_launches()
        self._launches = [
            [
                Launch(binding.cuda, binding.stream, part.work(binding, number), self._graphs)
                for number in range(SLOTS)
            ]
            for part in self._parts
        ]
        self._bound = binding

    def _drop_launches(self) -> None:
        for launches in self._launches:
            for launch in launches:
                launch.close()
        self._launches = []


class _Part:
    """Some of the samples: their state and conditions on the device, and their slots."""

    def __init__(self, binding: Binding, samples: slice) -> None:
        self._cuda: Cuda = binding.cuda
        self._stream = binding.stream
        self._samples = samples
        tensors = binding.network.tensors
        stays = [t for t in tensors.values() if t.is_input and t.name not in {"t", "row", "z"}]
        comes = [tensors[name] for name in ("t", "row", "z")]
        self._state: dict[str, Buffer] = {}
        self._slots: list[Slot] = []
        self._events: list[int] = []
        self._host = Slot(self._cuda, stays, binding.batch)
        try:
            for tensor in stays:
                nbytes = nbytes_of(tensor, binding.batch)
                self._state[tensor.name] = self._cuda.on_device(nbytes)
            for _ in range(SLOTS):
                self._slots.append(Slot(self._cuda, comes, binding.batch))
                self._events.append(self._cuda.event())
        except BaseException:
            self.close()
            raise

    def start(self, feeds: Mapping[str, Array]) -> None:
        self._cuda.synchronise(self._stream)
        for name, buffer in self._state.items():
            self._host.put(name, feeds[name][self._samples])
            self._cuda.copy(buffer, self._host.buffers[name], buffer.nbytes, self._stream)
        self._cuda.synchronise(self._stream)

    def fill(self, number: int, row: Transition, z: Samples | None) -> None:
        """Writes what a step is given, once the device has read what stood there."""
        self._cuda.wait(self._events[number])
        slot = self._slots[number]
        slot.views["t"][:] = row.t
        slot.views["row"][:] = row_of(row)
        if z is not None:  # what lies there otherwise is finite, and its factor 0
            slot.put("z", z[self._samples])

    def work(self, binding: Binding, number: int) -> Callable[[], None]:
        """Returns what gives one step to the stream: everything the network reads, itself, x_s."""
        slot, state = self._slots[number], self._state

        def give() -> None:
            for name, buffer in state.items():
                self._cuda.copy(binding.buffers[name], buffer, buffer.nbytes, self._stream)
            binding.upload(slot)
            binding.network.enqueue(self._stream)
            x = state["x"]
            self._cuda.copy(x, binding.buffers["x_s"], x.nbytes, self._stream)

        return give

    def mark(self, number: int) -> None:
        """Notes that the device has read a slot once it comes here."""
        self._cuda.record(self._events[number], self._stream)

    def read(self) -> Samples:
        x = self._state["x"]
        self._cuda.copy(self._host.buffers["x"], x, x.nbytes, self._stream)
        self._cuda.synchronise(self._stream)
        count = self._samples.stop - self._samples.start
        return np.array(self._host.views["x"][:count], dtype=np.float32)

    def close(self) -> None:
        self._cuda.settle(self._stream)
        for slot in [self._host, *self._slots]:
            slot.close()
        for buffer in self._state.values():
            self._cuda.free(buffer)
        for event in self._events:
            self._cuda.close_event(event)
        self._state, self._slots, self._events = {}, [], []
