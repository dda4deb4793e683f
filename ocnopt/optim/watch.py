"""Hooks of a model that record its forward passes for an optimiser."""

import sys
import threading
import weakref
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ocnopt.neural.evaluation import Surroundings
from ocnopt.neural.tape import Recorder, Tape


@runtime_checkable
class Records(Protocol):
    """Who wants recordings."""

    def begin(self, tape: Tape) -> Recorder:
        """A recorder for one forward pass."""

    def end(self, tape: Tape) -> None:
        """A recording is complete."""


class Watch:
    """Hooks of a model that do not keep its optimiser alive; a copy of the model leaves them behind."""

    def __init__(self, optimizer: Records | None = None) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._of_thread = threading.local()  # each is in forward passes of its own

    @property
    def _running(self) -> list[tuple[Recorder, Tape] | None]:
        running: list[tuple[Recorder, Tape] | None] = self._of_thread.__dict__.setdefault("running", [])
        return running

    def __reduce__(self) -> tuple[Any, ...]:
        return Watch, ()

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward pass begins: record it if gradients are wanted."""
        optimizer = None if self._optimizer is None else self._optimizer()
        self._abandon(model)
        is_transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if optimizer is None or is_transformed or not torch.is_grad_enabled() or any(self._running):
            self._running.append(None)
            return
        given = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), torch.empty(0))
        surroundings = Surroundings(model, given.device)
        surroundings.note_buffers()
        tape = Tape(surroundings)
        recorder = optimizer.begin(tape)
        recorder.begin((args, kwargs))
        self._running.append((recorder, tape))
        recorder.__enter__()

    def _abandon(self, model: nn.Module) -> None:
        """Leave recordings that an interrupt (Ctrl-C runs no hook) has left open."""
        if not self._running:
            return
        depth = -1
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            depth += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is model
            frame = frame.f_back
        while len(self._running) > depth:
            running = self._running.pop()
            if running is not None:
                running[0].leave()

    def end(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The forward pass is over, or has failed."""
        running = self._running.pop() if self._running else None
        if running is None:
            return None
        recorder, tape = running
        recorder.leave()
        result = recorder.end(output)
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None:
            optimizer.end(tape)
        return result
