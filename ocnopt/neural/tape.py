"""A forward pass as a tape: the layer graph of an ordinary module, recorded while it runs.

Every operation that touches the path from a trained parameter to the output becomes a *call*, every tensor that it
makes a *slot*; control flow, functional layers, modules called twice and several branches need no tracing of their own.
The recording costs no second pass: hooks of the tensors collect dL/d(slot) in the user's own backward pass, and where a
slot is used more than once each further use goes through a view of its own, whose gradient is that of the one edge.
So what the loss feels along every edge is known, and with it what it feels on any *cut*, the edges that lead from what
has been computed to what has not.

A :class:`Replay` takes the calls again, after some parameters have moved, and tells how far the cut has moved by then.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ocnopt.errors import ProblemError
from ocnopt.neural.evaluation import Noise, Surroundings

# Attributes of a tensor that are tensors on its path; all others are only looked at.
_VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag"})
_RANDOM = ("dropout", "rand", "bernoulli", "multinomial", "normal", "rrelu", "gumbel", "poisson", "attention")


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for a recorded tensor among the arguments of a call."""

    index: int


@dataclass
class Use:
    """One edge: the call that reads a slot; its own gradient where it is not the first of several."""

    call: int
    gradient: Tensor | None = None


@dataclass
class Call:
    """One operation: arguments with slots in place of recorded tensors, parameters and constants as they are."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[int | None] = field(default_factory=list)
    noise: Noise | None = None
    is_inplace: bool = False
    parameters: list[Tensor] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the operation is called."""
        return str(getattr(self.function, "__name__", self.function))


class Tape:
    """What one forward pass has recorded, and what its backward pass has found.

    Attributes:
        calls: in the order in which they ran.
        uses: of each slot, in order.
        maker: the call that made each slot.
        returned: slots of what the module returned.
        rows: samples, the leading axis of the first of them.
        shapes: of each slot.
        old: value and version of the slots that are kept.
        gradients: dL/d(slot) of those, as far as it has arrived.
        surroundings: flags, buffers and autocast of the pass.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        self.surroundings = surroundings
        self.calls: list[Call] = []
        self.uses: list[list[Use]] = []
        self.maker: list[int] = []
        self.shapes: list[torch.Size] = []
        self.returned: list[int] = []
        self.rows = 0
        self.has_gradients = False
        self.old: dict[int, tuple[Tensor, int]] = {}
        self.gradients: dict[int, Tensor] = {}

    def value(self, slot: int) -> Tensor:
        """The slot as the forward pass saw it.

        Raises:
            ProblemError: it was modified in place since.
        """
        tensor, version = self.old[slot]
        if tensor._version != version:
            made, changed = self.calls[self.maker[slot]].name, [self.calls[use.call].name for use in self.uses[slot]]
            raise ProblemError(
                f"the output of {made!r}, of shape {tuple(tensor.shape)}, was modified in place after it was used by "
                f"{', '.join(changed)}; feedback expects states to stay as they were: write x = x + y for x += y, or "
                "nn.ReLU(inplace=False)"
            )
        return tensor

    def is_batched(self, slot: int) -> bool:
        """Whether a slot has one row for each sample."""
        shape = self.shapes[slot]
        return len(shape) > 0 and shape[0] == self.rows

    def keep(self, slots: set[int]) -> None:
        """Let go of all other values."""
        self.old = {slot: kept for slot, kept in self.old.items() if slot in slots}

    def felt(self, slot: int, executed: Callable[[int], bool]) -> Tensor | None:
        """The sum of the gradients along the edges of a slot to calls that are not ``executed``; None where none is."""
        first, *others = self.uses[slot]
        total = self.gradients.get(slot)
        if not executed(first.call):
            for use in others:
                if executed(use.call) and use.gradient is not None and total is not None:
                    total = total - use.gradient
            return total
        left = [use.gradient for use in others if not executed(use.call) and use.gradient is not None]
        return sum(left[1:], left[0]) if left else None


class Recorder(TorchFunctionMode):
    """Records one forward pass.

    Args:
        tape: what to write to.
        parameters: the trained ones, by their id.
        arrived: called when the first gradient reaches the tape.
    """

    def __init__(self, tape: Tape, parameters: Mapping[int, Tensor], arrived: Callable[[Tape], None]) -> None:
        super().__init__()
        self._tape, self._parameters, self._arrived = tape, parameters, arrived
        self._slots: dict[int, tuple[Tensor, int]] = {}
        self._foreign: dict[int, Tensor] = {}

    def begin(self, inputs: object) -> None:
        """Note what the module was given: it may come from a graph of its own."""
        self._foreign = {id(tensor): tensor for tensor in _tensors(inputs)}

    def __torch_function__(self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.__name__ == "__get__" and function.__self__.__name__ not in _VIEWS:
            return function(*args, **kwargs)
        tape, place = self._tape, len(self._tape.calls)
        call = Call(function, (), {})
        given = [self._read(value, call, place) for value in args]
        named = {name: self._read(value, call, place) for name, value in kwargs.items()}
        if not call.inputs and not call.parameters:
            return function(*args, **kwargs)
        if _is_random(function):
            call.noise = tape.surroundings.noise()
        out = function(*(value for _, value in given), **{name: value for name, (_, value) in named.items()})
        made = [*_tensors(out)]
        if not any(tensor.requires_grad for tensor in made):
            self._forget(call, place)
            if call.name == "__setitem__":
                raise ProblemError(
                    "the model writes into a tensor by x[...] = y, which feedback cannot follow; expected operations "
                    "that return new tensors: torch.cat, torch.where or torch.scatter"
                )
            return out
        call.args, call.kwargs = tuple(slot for slot, _ in given), {name: slot for name, (slot, _) in named.items()}
        tape.calls.append(call)
        for tensor in made:
            call.is_inplace |= id(tensor) in self._slots
            call.outputs.append(self._write(tensor, place) if tensor.requires_grad else None)
        return out

    def end(self, output: object) -> Any:
        """What the module is to return: its outputs, each an edge of its own."""
        tape = self._tape
        tape.returned = [self._slots[id(tensor)][1] for tensor in _tensors(output) if id(tensor) in self._slots]
        shape = tape.shapes[tape.returned[0]] if tape.returned else torch.Size()
        tape.rows = shape[0] if len(shape) else 0
        call = Call(self.end, (), {})
        result = _mapped(output, lambda tensor: self._read_tensor(tensor, call, len(tape.calls))[1])
        self._slots.clear()
        self._foreign.clear()
        return result

    def _read(self, value: Any, call: Call, place: int) -> tuple[Any, Any]:
        """An argument as the tape keeps it, and as the operation receives it."""
        if isinstance(value, Tensor):
            return self._read_tensor(value, call, place)
        if isinstance(value, (list, tuple)):
            pairs = [self._read(item, call, place) for item in value]
            return _like(value, [slot for slot, _ in pairs]), _like(value, [item for _, item in pairs])
        return value, value

    def _read_tensor(self, tensor: Tensor, call: Call, place: int) -> tuple[Any, Tensor]:
        known = self._slots.get(id(tensor))
        if known is None:
            if id(tensor) in self._parameters:
                call.parameters.append(tensor)
            elif tensor.grad_fn is not None and id(tensor) not in self._foreign:
                raise ProblemError(
                    f"the operation {call.name!r} reads a tensor of shape {tuple(tensor.shape)} made by "
                    f"{tensor.grad_fn.name()}, which was not seen at work; expected torch operations: custom autograd "
                    "functions and compiled parts cannot be followed; leave them out of the model, or use "
                    "feedback=False"
                )
            return tensor, tensor
        slot = known[1]
        call.inputs.append(slot)
        uses = self._tape.uses[slot]
        use = Use(place)
        if uses and torch.is_grad_enabled():
            tensor = tensor.view_as(tensor)
            tensor.register_hook(lambda gradient: _keep(use, gradient))
        uses.append(use)
        return Slot(slot), tensor

    def _forget(self, call: Call, place: int) -> None:
        """Take back the edges of a call that nothing flows through."""
        for slot in call.inputs:
            self._tape.uses[slot] = [use for use in self._tape.uses[slot] if use.call != place]

    def _write(self, tensor: Tensor, place: int) -> int:
        tape, slot, arrived = self._tape, len(self._tape.uses), self._arrived
        tape.uses.append([])
        tape.maker.append(place)
        tape.shapes.append(tensor.shape)
        tape.old[slot] = tensor.detach(), tensor._version
        self._slots[id(tensor)] = tensor, slot

        def arrive(gradient: Tensor) -> None:
            if not tape.has_gradients:
                tape.has_gradients = True
                arrived(tape)
            if slot in tape.old:
                before = tape.gradients.get(slot)
                tape.gradients[slot] = gradient if before is None else before + gradient

        tensor.register_hook(arrive)
        return slot


class Replay:
    """The calls of a tape once more, with parameters as they are by now.

    Args:
        tape: the recording.
        order: the calls in the order to take them.
        places: the place of each call in that order.
    """

    def __init__(self, tape: Tape, order: Sequence[int], places: Sequence[int]) -> None:
        self._tape, self._order, self._places, self._next = tape, order, places, 0
        self._new: dict[int, Tensor] = {}

    def advance(self, call: int) -> None:
        """Take the calls before ``call``."""
        while self._next < self._places[call]:
            self._take(self._tape.calls[self._order[self._next]])
            self._next += 1

    def value(self, slot: int) -> Tensor:
        """A slot of the cut as it is by now."""
        return self._new[slot]

    def moved(self, cut: Sequence[int]) -> Tensor:
        """The change of the loss, for each sample ``(rows)``, that the change of the cut brings to first order."""
        total: Tensor | None = None
        for slot in cut:
            felt = self._tape.felt(slot, self._is_executed)
            if felt is not None:
                change = (self._new[slot] - self._tape.value(slot)).flatten(1)
                change = torch.linalg.vecdot(change, felt.flatten(1))
                total = change if total is None else total + change
        like = next(iter(self._tape.gradients.values()))
        return like.new_zeros(self._tape.rows) if total is None else total

    def _is_executed(self, call: int) -> bool:
        return self._places[call] < self._next

    def _take(self, call: Call) -> None:
        if call.noise is not None:
            self._tape.surroundings.set_noise(call.noise)

        def fill(value: Any) -> Any:
            return _filled(value, self._new, copies=call.is_inplace)

        out = call.function(*map(fill, call.args), **{name: fill(value) for name, value in call.kwargs.items()})
        for slot, tensor in zip(call.outputs, _tensors(out), strict=True):
            if slot is not None:
                self._new[slot] = tensor
        for slot in call.inputs:
            if all(self._places[use.call] <= self._next for use in self._tape.uses[slot]):
                self._new.pop(slot, None)


@cache
def _is_random(function: Callable[..., Any]) -> bool:
    name = str(getattr(function, "__name__", function))
    return any(word in name for word in _RANDOM)


def _keep(use: Use, gradient: Tensor) -> None:
    use.gradient = gradient if use.gradient is None else use.gradient + gradient


def _filled(value: Any, new: dict[int, Tensor], *, copies: bool) -> Any:
    if isinstance(value, Slot):
        return new[value.index].clone() if copies else new[value.index]
    if isinstance(value, (list, tuple)):
        return _like(value, [_filled(item, new, copies=copies) for item in value])
    return value


def _like(value: Any, items: list[Any]) -> Any:
    """The items as a list or (named) tuple of the kind that ``value`` is."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return _like(value, [_mapped(item, change) for item in value])
    return value


def _tensors(value: object) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []
