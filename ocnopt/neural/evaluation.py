"""The field as the solvers see it: a time and one tensor in, one tensor out, and its vector-Jacobian product.

A user's module ``field(t, x)`` takes t as a 0-d tensor and x as a tensor or a tuple. Here it is called, counted,
checked and differentiated. A backward pass evaluates it again and must see what the forward pass saw: the same random
numbers, autocast and training flags, and buffers (batch statistics) must not move twice. :class:`Surroundings` takes
care of that, as torch.utils.checkpoint does for a plain function.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ocnopt.differential.discrete import Pull
from ocnopt.errors import OcnoptError, ProblemError
from ocnopt.integrate.runge_kutta import Field, Time
from ocnopt.integrate.walk import StageLog

# Bytes of a node of a graph besides what it saves, measured on small networks: there the nodes weigh more than tensors.
_NODE = 1024

State = Tensor | tuple[Tensor, ...]
Noise = tuple[Tensor, Tensor | None]


class StateLayout(NamedTuple):
    """How a state travels as one tensor.

    A tensor stays as it is. A tuple becomes ``(batch, sum of sizes)`` where all parts share their leading axis, else
    ``(1, sum of sizes)``.
    """

    shapes: tuple[torch.Size, ...] | None = None
    rows: int = 1
    sizes: tuple[int, ...] = ()

    @staticmethod
    def of(state: object) -> "StateLayout":
        """Read the layout of a state.

        Raises:
            ProblemError: not a floating-point tensor or a tuple of such, or parts of different dtype or device.
        """
        parts = state if isinstance(state, tuple) else (state,)
        for part in parts:
            if not (isinstance(part, Tensor) and part.is_floating_point()):
                came = f"a tensor of {part.dtype}" if isinstance(part, Tensor) else type(part).__name__
                raise ProblemError(
                    f"the state holds {came}; expected a floating-point tensor or a tuple of them: convert it with "
                    ".float()"
                )
        kinds = {(part.dtype, part.device) for part in parts}
        if len(kinds) != 1:
            raise ProblemError(
                f"the parts of the state differ: {sorted(f'{dtype} on {device}' for dtype, device in kinds)}; expected "
                "one dtype and one device (a non-empty tuple): convert them with .to(...)"
            )
        if not isinstance(state, tuple):
            return StateLayout()
        shapes = tuple(part.shape for part in parts)
        leading = {shape[:1] for shape in shapes}
        together = len(leading) == 1 and leading != {torch.Size()}
        sizes = tuple((shape[1:] if together else shape).numel() for shape in shapes)
        return StateLayout(shapes, shapes[0][0] if together else 1, sizes)

    def join(self, state: State) -> Tensor:
        """A state as one tensor."""
        if isinstance(state, Tensor):
            return state
        return torch.cat([part.reshape(self.rows, size) for part, size in zip(state, self.sizes, strict=True)], dim=1)

    def split(self, x: Tensor) -> State:
        """The inverse of :meth:`join`; an axis in front (output times) stays in front."""
        if self.shapes is None:
            return x
        parts = torch.split(x, [*self.sizes], dim=-1)
        lead = x.shape[:-2]
        return tuple(part.reshape(lead + shape) for part, shape in zip(parts, self.shapes, strict=True))


class Surroundings:
    """What a field sees besides its arguments, as it was in the forward pass."""

    def __init__(self, field: nn.Module, device: torch.device) -> None:
        self.field, self.device = field, device
        self.training = [(module, module.training) for module in field.modules()]
        self.parameters = self.parameters_now()
        self.autocast = {
            kind: (
                torch.is_autocast_enabled(kind),
                torch.get_autocast_dtype(kind),
                torch.is_autocast_cache_enabled(),
            )
            for kind in {"cpu", device.type}
            if torch.amp.is_autocast_available(kind)
        }
        self.buffers: list[tuple[Tensor, Tensor]] = []
        self.attributes: list[tuple[str, object]] = []

    def parameters_now(self) -> list[Tensor]:
        """The field's parameters; without the search for shared ones that ``field.parameters()`` spends its time on."""
        return [value for module, _ in self.training for value in module._parameters.values() if value is not None]

    def buffers_now(self) -> list[Tensor]:
        """The field's buffers, likewise."""
        return [value for module, _ in self.training for value in module._buffers.values() if value is not None]

    def close(self, *, repeats: bool) -> None:
        """The forward pass is over; note what a backward pass needs, which ``repeats`` evaluations or not."""
        self.buffers = [(buffer, buffer.clone()) for buffer in self.buffers_now()]
        if any(enabled for enabled, _, _ in self.autocast.values()):
            # Weights that autocast has cast without a graph: later uses in the same region would lose gradients.
            torch.clear_autocast_cache()
        if not repeats:
            self.training, self.autocast = [], {}

    def note_attributes(self) -> None:
        """Note which tensors the field has stored, for the message where a replay differs."""
        self.attributes = [*_attributes(self.field)]

    def noise(self) -> Noise:
        """The state of the random generators that a field may draw from."""
        on_device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), on_device

    def set_noise(self, noise: Noise) -> None:
        """Put the generators back."""
        torch.set_rng_state(noise[0])
        if noise[1] is not None:
            torch.cuda.set_rng_state(noise[1], self.device)

    def moved(self, noise: Noise) -> bool:
        """Whether random numbers were drawn since ``noise``."""
        now = self.noise()
        pairs = zip(now, noise, strict=True)
        return any(new is not None and old is not None and not torch.equal(new, old) for new, old in pairs)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As in the forward pass; afterwards as before."""
        flags = [(module, flag) for module, flag in self.training if module.training != flag]
        noise = self.noise()
        # Through .data: batch normalisation moves its statistics without telling autograd, and so do we.
        buffers = [(buffer, was, buffer.clone()) for buffer, was in self.buffers if not torch.equal(buffer, was)]
        try:
            for module, flag in flags:
                module.training = flag
            for buffer, was, _ in buffers:
                buffer.data.copy_(was)
            with self._autocasting():
                yield
        finally:
            for module, flag in flags:
                module.training = not flag
            self.set_noise(noise)
            for buffer, value in self.buffers:
                if not torch.equal(buffer, value):
                    buffer.data.copy_(value)
            for buffer, _, now in buffers:
                buffer.data.copy_(now)

    def _autocasting(self) -> ExitStack:
        stack = ExitStack()
        for kind, (enabled, dtype, cached) in self.autocast.items():
            stack.enter_context(torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=cached))
        return stack


@dataclass
class Statistics:
    """What one solve cost: evaluations of the field forward and in its backward pass, steps taken and steps rejected.

    Steps are counted for methods of ours alone.
    """

    forward: int = 0
    backward: int = 0
    steps: int = 0
    rejected: int = 0


class Root(NamedTuple):
    """The start of a graph: its leaf x, F(t, x), and about how many bytes autograd keeps of one evaluation."""

    x: Tensor
    slope: Tensor
    nbytes: int


class Evaluation:
    """A user's field as ``F(t: float, x: Tensor) -> Tensor``.

    Args:
        field: the user's module.
        layout: the layout of the state.
        parameters: what vector-Jacobian products differentiate besides x.
        surroundings: random numbers, flags and autocast of the forward pass.
        moving: whether dL/dt is wanted.
    """

    def __init__(
        self,
        field: nn.Module,
        layout: StateLayout,
        parameters: Sequence[Tensor],
        surroundings: Surroundings,
        moving: bool = False,
    ) -> None:
        self.field, self.layout, self.parameters = field, layout, parameters
        self.surroundings, self.moving = surroundings, moving
        self.statistics, self.is_backward = Statistics(), False
        self.log: StageLog[Noise] | None = None
        self._differentiates = False

    def __call__(self, t: Time, x: Tensor) -> Tensor:
        """F(t, x) in the current gradient mode."""
        if self.log is not None:
            self.log.add(self.surroundings.noise())
        if torch.is_grad_enabled():
            return self.at(self._time(t, x), x)
        if not self._differentiates:
            try:
                return self.at(self._time(t, x), x).detach()
            except RuntimeError as error:
                if "does not require grad" not in str(error):
                    raise
                # The field differentiates inside (a divergence, an energy): it needs a graph even where we do not.
                self._differentiates = True
        with torch.enable_grad():
            return self.at(self._time(t, x), x.detach().requires_grad_()).detach()

    def root(self, t: Time, x: Tensor) -> "Root":
        """Begin a graph with F(t, x), after a look at what that depends on and how much of it autograd keeps.

        Raises:
            ProblemError: it depends on a tensor whose gradient would be lost.
        """
        leaf, saved = x.detach().requires_grad_(), []

        def pack(tensor: Tensor) -> Tensor:
            # A saved output that kept itself would keep its graph for ever: output, node, hook's result, output.
            saved.append(tensor.detach())
            return saved[-1]

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            slope = self.at(self._time(t, x), leaf)
        stray, nodes = _search(slope, (leaf, *self.parameters))
        if stray is not None:
            name = next((repr(name) for name, value in _attributes(self.field) if value is stray), "a tensor")
            raise ProblemError(
                f"the field uses {name} of shape {tuple(stray.shape)}, which requires gradients and is neither its "
                "input nor one of its parameters: its gradient would be lost; make it an nn.Parameter of the field, "
                "hand it over as adjoint_params=[...] (or a function that returns such a list), detach it, or use "
                'adjoint="backprop"'
            )
        shared = (*self.surroundings.parameters, *self.surroundings.buffers_now(), *self.parameters)
        sizes = dict.fromkeys((tensor.data_ptr() for tensor in shared), 0)
        for tensor in saved:
            if tensor.data_ptr() not in sizes:
                # A view keeps all of its storage; asking for the storage of every tensor would be slow.
                whole = tensor.untyped_storage() if tensor._is_view() else tensor
                size = whole.nbytes() if isinstance(whole, torch.UntypedStorage) else whole.nbytes
                sizes.setdefault(whole.data_ptr(), size)
        return Root(leaf, slope, sum(sizes.values()) + _NODE * nodes)

    def noted(
        self, notes: Sequence[Noise | None], stages: Iterator[AbstractContextManager[Any]] | None = None
    ) -> Field:
        """Return the field for a row of evaluations, each with the random numbers of its note, within its context."""
        if stages is None and (not notes or notes[0] is None):
            return self
        following = iter(notes)

        def field(t: Any, x: Tensor) -> Tensor:
            self._hear(next(following))
            with next(stages) if stages is not None else nullcontext():
                return self(t, x)

        return field

    def _hear(self, note: Noise | None) -> None:
        if note is not None:
            self.surroundings.set_noise(note)

    def pull(
        self,
        t: Time,
        x: Tensor,
        cotangent: Tensor,
        *,
        wanted: bool = True,
        watch: AbstractContextManager[Any] | None = None,
    ) -> Pull:
        """F(t, x), evaluated within ``watch``, and F_x^T c, F_theta^T c (if ``wanted``)."""
        parameters = self.parameters if wanted else ()
        leaf = x.detach().requires_grad_()
        with torch.enable_grad(), watch or nullcontext():
            slope = self.at(self._time(t, x), leaf)
        if not slope.requires_grad:
            return Pull(slope, torch.zeros_like(x), (None,) * len(parameters))
        found: Sequence[Tensor | None] = torch.autograd.grad(slope, (leaf, *parameters), cotangent, allow_unused=True)
        return Pull(slope.detach(), torch.zeros_like(x) if found[0] is None else found[0], found[1:])

    def require_same(self, came: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> None:
        """Compare a replayed state with that of the forward pass, bit for bit, or up to rounding.

        Raises:
            OcnoptError: they differ, or it depends on other tensors than ``inputs``, whose gradients would be lost.
        """
        eps, start = torch.finfo(came.dtype).eps, inputs[0].detach()
        # Compiled fields and some kernels round differently with a graph than without.
        slack = eps**0.5 * (expected - start).abs().max() + 16 * eps * expected.abs().max() if came.numel() else 0.0
        is_same = torch.equal(came, expected) or bool((came.detach() - expected).abs().max() <= slack)
        if is_same and _search(came, inputs)[0] is None:
            return
        now = dict(_attributes(self.field))
        changed = [repr(name) for name, was in self.surroundings.attributes if now.get(name) is not was]
        raise OcnoptError(
            "the field has changed between the forward and the backward pass, which evaluates it again: "
            f"{', '.join(changed) or 'something it depends on'} is not what it was; expected the same field: call "
            "backward() before changing attributes, buffers or adjoint_params, keep the forward pass in memory (raise "
            'checkpoint_bytes), or use adjoint="backprop"'
        )

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """The backward pass: surroundings as in the forward pass, evaluations counted apart."""
        self.is_backward, self.statistics.backward = True, 0
        with torch.no_grad(), self.surroundings.restored():
            yield

    def _require_own_parameters(self) -> None:
        now, owned = self.surroundings.parameters_now(), self.surroundings.parameters
        if len(now) != len(owned) or any(new is not old for new, old in zip(now, owned, strict=True)):
            raise OcnoptError(
                "the field's parameters were exchanged between the forward and the backward pass "
                "(torch.func.functional_call does that); expected the same tensors, since the backward pass evaluates "
                'the field again: use adjoint="backprop"'
            )

    def _time(self, t: Time, x: Tensor) -> Tensor:
        return t.to(x.dtype) if isinstance(t, Tensor) else x.new_full((), t)

    def at(self, t: Tensor, x: Tensor) -> Tensor:
        """F(t, x) with t a 0-d tensor: the one place where the field is called.

        Raises:
            ProblemError: what it returns does not fit the state.
            OcnoptError: the field's parameters were exchanged since the forward pass.
        """
        if self.is_backward:
            if not self.statistics.backward:
                self._require_own_parameters()
            self.statistics.backward += 1
        else:
            self.statistics.forward += 1
        if self.layout.shapes is None:
            slope = self.field(t, x)
            if isinstance(slope, Tensor) and slope.shape == x.shape:
                return slope if slope.dtype == x.dtype else slope.to(x.dtype)
        else:
            slope = self.field(t, self.layout.split(x))
        return self.layout.join(self._checked(slope, x)).to(x.dtype)

    def _checked(self, slope: object, x: Tensor) -> State:
        expected = [tuple(shape) for shape in self.layout.shapes or (x.shape,)]
        parts = slope if isinstance(slope, tuple | list) and self.layout.shapes is not None else (slope,)
        came = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        if came != expected:
            raise ProblemError(
                f"the field returned {came}; expected its derivative for every part of the state, of shapes "
                f"{expected}: field(t, x) returns dx/dt, shaped like x"
            )
        return tuple(part for part in parts if isinstance(part, Tensor))


def _search(slope: Tensor, known: Sequence[Tensor]) -> tuple[Tensor | None, int]:
    """A leaf that ``slope`` depends on and that is not reached through ``known``, and the size of the graph."""
    leaves = {id(tensor) for tensor in known}
    above = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    seen, pending = set(above), [slope.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        edges = node.next_functions
        leaf = None if edges else getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in leaves:
            return leaf, len(seen)
        pending += [following for following, _ in edges]
    return None, len(seen) - len(above)


def _attributes(field: nn.Module) -> Iterator[tuple[str, object]]:
    """Tensors stored on a module and its submodules as plain attributes."""
    for prefix, module in field.named_modules():
        for name, value in (vars(module) | module._buffers).items():
            yield f"{prefix}.{name}".lstrip("."), value
