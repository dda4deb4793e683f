"""A forward pass as a tape: the layer graph of an ordinary module, recorded while it runs.

Every operation that touches the path from a trained parameter to the output becomes a *call*, every tensor that it
makes a *slot*; control flow, functional layers, modules called twice and several branches need no tracing of their own.
The recording costs no second pass: hooks of the tensors collect dL/d(slot) in the user's own backward pass, and where a
slot is used more than once each further use goes through a view of its own, whose gradient is that of the one edge.
So what the loss feels along every edge is known, and with it what it feels on any *cut*, the edges that lead from what
has been computed to what has not.

A replay (:mod:`ocnopt.neural.replay`) takes the calls again, after some parameters have moved.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from ocnopt.differential.kronecker import present_pass
from ocnopt.errors import ProblemError
from ocnopt.neural.evaluation import Noise, Surroundings
from ocnopt.neural.trees import like, mapped, tensors

# Attributes of a tensor that are tensors on its path; all others are only looked at.
_VIEWS = frozenset({"T", "mT", "H", "mH", "real", "imag"})
_RANDOM = (
    *("dropout", "rand", "bernoulli", "multinomial", "normal", "rrelu", "gumbel", "poisson", "attention", "fractional"),
    *("lstm", "gru", "rnn"),
)
# Methods that speak of the tensor itself, or of its shape: a view in its place would not hear them.
_INPLACE = frozenset(f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow"))
_LOOKS = frozenset(
    (
        *("__set__", "__len__", "__repr__", "__format__", "__hash__", "register_hook", "retain_grad", "requires_grad_"),
        *("size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "item", "tolist"),
    )
)


@dataclass(frozen=True, slots=True)
class Slot:
    """Stands for a recorded tensor among the arguments of a call."""

    index: int


@dataclass(slots=True)
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
    has_samples: bool = False

    @property
    def name(self) -> str:
        """What the operation is called."""
        return str(getattr(self.function, "__name__", self.function))


class Tape:
    """What one forward pass has recorded, and what its backward pass has found.

    Attributes:
        calls: in the order in which they ran.
        uses: the calls that read each slot, in order; one edge each.
        maker: the call that made each slot.
        returned: slots of what the module returned.
        rows: samples, the leading axis of the first of them.
        shapes: of each slot.
        old: value and version of the slots that are kept.
        gradients: dL/d(slot) of those, as far as it has arrived.
        given: tensors that the module was given, with their versions.
        surroundings: flags, buffers and autocast of the pass.
        plan: what its reader made of it.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        self.surroundings = surroundings
        self.plan: Any = None
        self.calls: list[Call] = []
        self.uses: list[list[int]] = []
        self.maker: list[int] = []
        self.shapes: list[torch.Size] = []
        self.returned: list[int] = []
        self.rows = 0
        self.old: dict[int, tuple[Tensor, int]] = {}
        self.gradients: dict[int, Tensor] = {}
        self.given: list[tuple[Tensor, int]] = []
        self._edges: dict[tuple[int, int], Tensor] = {}
        self._pass = -1
        self._arriving: list[tuple[int | tuple[int, int], Tensor]] = []

    def value(self, slot: int) -> Tensor:
        """The slot as the forward pass saw it.

        Raises:
            ProblemError: it was modified in place since.
        """
        tensor, version = self.old[slot]
        if tensor._version != version:
            made = self.calls[self.maker[slot]].name
            used = ["the model's caller" if use == len(self.calls) else self.calls[use].name for use in self.uses[slot]]
            raise ProblemError(
                f"the output of {made!r}, of shape {tuple(tensor.shape)}, was modified in place after it was used by "
                f"{', '.join(used)}; expected states that stay as they were until step() has returned: "
                "write x = x + y for x += y, or nn.ReLU(inplace=False)"
            )
        return tensor

    def check(self, slots: Iterable[int]) -> None:
        """Refuse to go on where slots, or what the module was given, were modified since.

        Raises:
            ProblemError: one was.
        """
        for slot in slots:
            self.value(slot)
        for tensor, version in self.given:
            if tensor._version != version:
                raise ProblemError(
                    f"a tensor of shape {tuple(tensor.shape)} that the model was given was modified in place before "
                    "the step; expected inputs that stay until step() has returned: hand a copy to the model"
                )

    def is_batched(self, slot: int) -> bool:
        """Whether a slot has one row for each sample."""
        shape = self.shapes[slot]
        return len(shape) > 0 and shape[0] == self.rows and self.calls[self.maker[slot]].has_samples

    def keep(self, slots: Collection[int]) -> None:
        """Let go of all other values."""
        self.old = {slot: kept for slot, kept in self.old.items() if slot in slots}

    def felt(self, slot: int, executed: Callable[[int], bool]) -> Tensor | None:
        """The sum of the gradients along the edges of a slot to calls that are not ``executed``; None where none is."""
        first, *others = self.uses[slot]
        of_first = not executed(first)
        edges = [
            self._edges[slot, place]
            for place, use in enumerate(others, 1)
            if executed(use) is of_first and (slot, place) in self._edges
        ]
        if not of_first:
            return sum(edges[1:], edges[0]) if edges else None
        total = self.gradients.get(slot)
        return total if total is None or not edges else total - sum(edges[1:], edges[0])

    def reached(self) -> dict[int, Tensor]:
        """What the model's caller feels for each slot that was returned to it, where anything was felt."""
        inside = len(self.calls)
        felt = {slot: self.felt(slot, lambda call: call < inside) for slot in self.returned}
        return {slot: p for slot, p in felt.items() if p is not None}

    def arrive(self, where: int | tuple[int, int], gradient: Tensor | None, begun: Callable[["Tape"], None]) -> None:
        """Note the gradient of a slot, or of one of its edges, in the present backward pass."""
        if gradient is None:
            return
        present = present_pass()
        if present != self._pass:
            self._pass, self._arriving = present, []
            begun(self)
        if isinstance(where, tuple) or where in self.old:
            self._arriving.append((where, gradient.detach()))

    def settle(self, *, counts: bool) -> None:
        """A backward pass is over: add what it has found, or leave it out."""
        arrived, self._arriving, self._pass = self._arriving, [], -1
        for where, gradient in arrived if counts else ():
            if isinstance(where, tuple):
                self._edges[where] = self._edges[where] + gradient if where in self._edges else gradient
            else:
                self.gradients[where] = self.gradients[where] + gradient if where in self.gradients else gradient

    def forget(self) -> None:
        """Forget all gradients."""
        self.gradients, self._edges = {}, {}

    def scale(self, factor: Tensor) -> None:
        """Multiply all gradients."""
        self.gradients = {slot: gradient * factor for slot, gradient in self.gradients.items()}
        self._edges = {edge: gradient * factor for edge, gradient in self._edges.items()}


class Recorder(TorchFunctionMode):
    """Records one forward pass.

    Args:
        tape: what to write to.
        parameters: the trained ones, by their id.
        begun: called when the first gradient of a backward pass reaches the tape.
    """

    def __init__(self, tape: Tape, parameters: Mapping[int, Tensor], begun: Callable[[Tape], None]) -> None:
        super().__init__()
        self._tape, self._parameters, self._begun = tape, parameters, begun
        # Buffers, and constants made without samples; alive, so that no id comes twice.
        self._fixed = {id(buffer): buffer for buffer, _ in tape.surroundings.buffers}
        self._slots: dict[int, tuple[Tensor, int]] = {}
        self._foreign: dict[int, Tensor] = {}

    def begin(self, inputs: object) -> None:
        """Note what the module was given: it may come from a graph of its own."""
        self._foreign = {id(tensor): tensor for tensor in tensors(inputs)}
        self._tape.given = [(tensor, tensor._version) for tensor in self._foreign.values()]

    def __torch_function__(self, function: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        only_looks, is_random, written = _traits(function)
        if only_looks:
            return function(*args, **kwargs)
        tape, place = self._tape, len(self._tape.calls)
        call = Call(function, (), {})
        given = [self._read(value, call, place) for value in args]
        named = {name: self._read(value, call, place) for name, value in kwargs.items()}
        call.has_samples = is_random or call.has_samples
        if not call.inputs and not call.parameters:
            return self._pass_by(function(*args, **kwargs), call)
        if is_random:
            call.noise = tape.surroundings.noise()
        if written is not None:
            call.is_inplace = written < 0 or bool(kwargs.get("inplace", written < len(args) and args[written]))
        if call.is_inplace and given:
            given[0] = self._saved(given[0][0]), given[0][1]
        out = function(*[value for _, value in given], **{name: value for name, (_, value) in named.items()})
        made = tensors(out)
        if not self._parameters.keys().isdisjoint(map(id, made)):
            self._forget(call, place)
            return out  # the parameter itself (p.float(), p.contiguous()): a hook on it would outlive the pass
        if True not in [tensor.requires_grad for tensor in made]:
            self._forget(call, place)
            if call.name == "__setitem__":
                raise ProblemError(
                    "the model writes into a tensor by x[...] = y, which feedback cannot follow; expected operations "
                    "that return new tensors: torch.cat, torch.where or torch.scatter"
                )
            return self._pass_by(out, call)
        call.args, call.kwargs = tuple([slot for slot, _ in given]), {name: slot for name, (slot, _) in named.items()}
        tape.calls.append(call)
        for tensor in made:
            call.outputs.append(self._write(tensor, place) if tensor.requires_grad else None)
        return out

    def leave(self) -> None:
        """Stop to record, whatever modes have been entered since."""
        above = []
        while (mode := _pop_mode()) is not self:
            above.append(mode)
        for mode in reversed(above):
            _push_mode(mode)

    def end(self, output: object) -> Any:
        """What the module is to return: its outputs, each an edge of its own."""
        tape = self._tape
        tape.returned = [self._slots[id(tensor)][1] for tensor in tensors(output) if id(tensor) in self._slots]
        tape.rows = next((shape[0] for shape in map(tape.shapes.__getitem__, tape.returned) if shape), 0)
        call = Call(self.end, (), {})
        result = mapped(output, lambda tensor: self._read_tensor(tensor, call, len(tape.calls))[1])
        for kept in (self._slots, self._foreign, self._fixed):
            kept.clear()
        return result

    def _read(self, value: Any, call: Call, place: int) -> tuple[Any, Any]:
        """An argument as the tape keeps it, and as the operation receives it."""
        if isinstance(value, Tensor):
            return self._read_tensor(value, call, place)
        if isinstance(value, (list, tuple)):
            pairs = [self._read(item, call, place) for item in value]
            return like(value, [slot for slot, _ in pairs]), like(value, [item for _, item in pairs])
        return value, value

    def _read_tensor(self, tensor: Tensor, call: Call, place: int) -> tuple[Any, Tensor]:
        key = id(tensor)
        known = self._slots.get(key)
        if known is None:
            if key in self._parameters:
                call.parameters.append(tensor)
                return tensor, tensor
            if tensor.grad_fn is not None and key not in self._foreign:
                raise ProblemError(
                    f"the operation {call.name!r} reads a tensor of shape {tuple(tensor.shape)} made by "
                    f"{tensor.grad_fn.name()}, which was not seen at work; expected torch operations: custom autograd "
                    "functions, compiled or checkpointed parts and the adjoints of a NeuralODE or RungeKuttaNet cannot "
                    'be followed; leave them out of the model, give these adjoint="backprop", or use feedback=False'
                )
            call.has_samples |= key not in self._fixed
            return tensor, tensor
        tape, slot = self._tape, known[1]
        if tensor._version != tape.old[slot][1]:
            raise ProblemError(
                f"the operation {call.name!r} reads the output of {tape.calls[tape.maker[slot]].name!r}, of shape "
                f"{tuple(tensor.shape)}, which was modified in place through another tensor; expected tensors that "
                "change under their own name alone: write x = f(x) for f_(x), and torch.cat for x[...].f_()"
            )
        call.inputs.append(slot)
        call.has_samples |= tape.calls[tape.maker[slot]].has_samples
        edge, begun = (slot, len(tape.uses[slot])), self._begun
        if edge[1] and torch.is_grad_enabled():
            tensor = tensor.view_as(tensor)
            _hook(tensor, lambda gradient: tape.arrive(edge, gradient, begun))
        tape.uses[slot].append(place)
        return Slot(slot), tensor

    def _saved(self, written: Any) -> Any:
        """What is about to be written to, as it was."""
        if isinstance(written, Slot):
            value = self._tape.old[written.index][0].clone()
            self._tape.old[written.index] = value, value._version
        elif isinstance(written, Tensor) and id(written) not in self._parameters:
            return written.detach().clone()
        return written

    def _pass_by(self, out: Any, call: Call) -> Any:
        """Remember what a call that is not recorded has made."""
        for tensor in tensors(out):
            if tensor.grad_fn is not None:
                self._foreign[id(tensor)] = tensor
            if not call.has_samples:
                self._fixed[id(tensor)] = tensor
        return out

    def _forget(self, call: Call, place: int) -> None:
        """Take back the edges of a call that nothing flows through."""
        for slot in call.inputs:
            self._tape.uses[slot] = [use for use in self._tape.uses[slot] if use != place]

    def _write(self, tensor: Tensor, place: int) -> int:
        tape, slot, begun = self._tape, len(self._tape.uses), self._begun
        tape.uses.append([])
        tape.maker.append(place)
        tape.shapes.append(tensor.shape)
        tape.old[slot] = tensor.detach(), tensor._version
        self._slots[id(tensor)] = tensor, slot
        _hook(tensor, lambda gradient: tape.arrive(slot, gradient, begun))
        return slot


@cache
def _traits(function: Callable[..., Any]) -> tuple[bool, bool, int | None]:
    """Whether it only looks at tensors, whether it is random, the place of ``inplace``: -1 always, None never."""
    name, code = str(getattr(function, "__name__", function)), getattr(function, "__code__", None)
    of_attribute = getattr(getattr(function, "__self__", None), "__name__", "")
    looks = name in _LOOKS or (name == "__get__" and of_attribute not in _VIEWS)
    names = () if code is None else code.co_varnames[: code.co_argcount]
    written = names.index("inplace") if "inplace" in names else None
    if name in _INPLACE or (name.endswith("_") and not name.endswith("__")):
        written = -1
    return looks, any(word in name for word in _RANDOM), written


def _hook(tensor: Tensor, hook: Callable[[Tensor | None], None]) -> None:
    """``register_hook`` without a handle to remove it by, which is most of its price."""
    node = tensor.grad_fn
    if tensor._backward_hooks or node is None:
        tensor.register_hook(hook)
    else:
        tensor._backward_hooks = OrderedDict({-1: hook})
        node._register_hook_dict(tensor)


def working(tensor: Tensor) -> torch.dtype:
    """The precision to add up in: that of the tensor, at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def precise(tensor: Tensor) -> Tensor:
    """The tensor in that precision."""
    dtype = working(tensor)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
