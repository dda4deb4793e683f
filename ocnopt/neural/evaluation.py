"""The field as the solvers see it: a time and one tensor in, one tensor out, and its vector-Jacobian product.

A user's module ``field(t, x)`` takes t as a 0-d tensor and x as a tensor or a tuple. Here it is called, counted,
checked and differentiated. A backward pass evaluates it again and must see what the forward pass saw: the same random
numbers, autocast and flags, and no buffers moved twice: :class:`Surroundings`, as torch.utils.checkpoint does it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ocnopt.differential.discrete import Pull
from ocnopt.integrate.runge_kutta import Field, Time
from ocnopt.integrate.walk import StageLog
from ocnopt.neural import checks
from ocnopt.neural.memory_checks import Slopes
from ocnopt.neural.state_layout import StateLayout
from ocnopt.neural.statistics import Statistics

Noise = tuple[Tensor, Tensor | None]
_NO_TIME = float("nan"), torch.empty(())


class Surroundings:
    """What a field sees besides its arguments, as it was in the forward pass."""

    def __init__(self, field: nn.Module, device: torch.device) -> None:
        self.field, self.device = field, device
        self.training = [(module, module.training) for module in checks.modules(field)]
        self.parameters = self.parameters_now()
        kinds = (kind for kind in {"cpu", device.type} if torch.amp.is_autocast_available(kind))
        self.autocast = {kind: _autocast(kind) for kind in kinds}
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def parameters_now(self) -> list[Tensor]:
        """The field's parameters; without the search for shared ones that ``field.parameters()`` spends its time on."""
        return [value for module, _ in self.training for value in module._parameters.values() if value is not None]

    def buffers_now(self) -> list[Tensor]:
        """The field's buffers, likewise."""
        return [value for module, _ in self.training for value in module._buffers.values() if value is not None]

    def note_buffers(self) -> None:
        """Note the values of the buffers."""
        self.buffers = [(buffer, buffer.clone()) for buffer in self.buffers_now()]

    def set_buffers(self) -> None:
        """Put them back; through .data, as batch normalisation moves its statistics without telling autograd."""
        for buffer, was in self.buffers:
            if not torch.equal(buffer, was):
                buffer.data.copy_(was)

    def still(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers that stand where they stood when they were noted: those that the field itself does not move."""
        return [(buffer, was) for buffer, was in self.buffers if torch.equal(buffer, was)]

    def close(self) -> None:
        """The forward pass is over."""
        if any(enabled for enabled, _, _ in self.autocast.values()):
            # Weights that autocast has cast without a graph: later uses in the same region would lose gradients.
            torch.clear_autocast_cache()

    def noise(self) -> Noise:
        """The state of the random generators that a field may draw from."""
        on_device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), on_device

    def set_noise(self, noise: Noise | None) -> None:
        """Put the generators back, if there is a note of them."""
        if noise is None:
            return
        torch.set_rng_state(noise[0])
        if noise[1] is not None:
            torch.cuda.set_rng_state(noise[1], self.device)

    def moved(self, noise: Noise) -> bool:
        """Whether random numbers were drawn since ``noise``."""
        now, before = self.noise(), noise[1]
        on_device = now[1] is not None and before is not None and not torch.equal(now[1], before)
        return on_device or not torch.equal(now[0], noise[0])

    @contextmanager
    def restored(self) -> Iterator[None]:
        """As in the forward pass; afterwards as before."""
        flags = [(module, flag) for module, flag in self.training if module.training != flag]
        noise, buffers = self.noise(), [(buffer, buffer.clone()) for buffer, was in self.buffers]
        try:
            for module, flag in flags:
                module.training = flag
            self.set_buffers()
            with self.autocasting():
                yield
        finally:
            for module, flag in flags:
                module.training = not flag
            self.set_noise(noise)
            for buffer, now in buffers:
                if not torch.equal(buffer, now):
                    buffer.data.copy_(now)

    def autocasting(self) -> ExitStack:
        """The autocast of the forward pass."""
        stack = ExitStack()
        for kind, was in self.autocast.items():
            if was != _autocast(kind):
                on, dtype, cached = was
                stack.enter_context(torch.autocast(kind, enabled=on, dtype=dtype, cache_enabled=cached))
        return stack


def _autocast(kind: str) -> tuple[bool, torch.dtype, bool]:
    """Whether autocast is on, to what it casts and whether it remembers."""
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()


class Root(NamedTuple):
    """Where a walk starts: x, F(t, x), and about how many bytes the graph of one evaluation keeps, if it has one."""

    x: Tensor
    slope: Tensor
    nbytes: int | None = None


class Evaluation:
    """A user's field as ``F(t: float, x: Tensor) -> Tensor``.

    Args:
        field: the user's module.
        layout: the layout of the state.
        parameters: what vector-Jacobian products differentiate besides x.
        surroundings: random numbers, flags and autocast of the forward pass.
        moving: whether dL/dt is wanted.
        weights: what a graph weighs, by the shape of the state, where that was found before.
        followed: whether autograd goes through the evaluations itself, so that no gradient is lost.
    """

    def __init__(
        self,
        field: nn.Module,
        layout: StateLayout,
        parameters: Sequence[Tensor],
        surroundings: Surroundings,
        moving: bool = False,
        weights: dict[object, int] | None = None,
        *,
        followed: bool = False,
    ) -> None:
        self.field, self.layout, self.parameters = field, layout, parameters
        self.surroundings, self.moving = surroundings, moving
        self._weights = {} if weights is None else weights
        self.statistics, self.is_backward = Statistics(), False
        self._noted_attributes: list[tuple[nn.Module, dict[str, object]]] = []
        self.log: StageLog[Noise] | None = None
        self._differentiates = False
        self._looks = torch.is_grad_enabled() and not parameters and not followed
        self._clock, self._slopes = _NO_TIME, Slopes()

    def __call__(self, t: Time, x: Tensor) -> Tensor:
        """F(t, x) in the current gradient mode."""
        note = None if self.log is None else self.surroundings.noise()
        if self.log is not None and note is not None:
            self.log.add(note)
        if torch.is_grad_enabled():
            return self.at(t, x)
        if not self._differentiates:
            try:
                with torch.set_grad_enabled(self._looks):
                    return self._without_graph(self.at(t, x), x)
            except RuntimeError as error:
                if "does not require grad" not in str(error) or checks.in_forward_mode():
                    raise
                # The field differentiates inside (a divergence, an energy): it needs a graph even where we do not.
                self._differentiates = True
                self.surroundings.set_noise(note)
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            return self._without_graph(self.at(t, leaf), leaf)

    def _without_graph(self, slope: Tensor, x: Tensor) -> Tensor:
        """F(t, x) without its graph, in which nothing else may need gradients where no backward pass would tell."""
        if self._looks and slope.requires_grad:
            self.require_known(slope, (x,))
        # Without gradients forward mode goes on; detached, it would lose its tangents.
        return slope if checks.in_forward_mode() else slope.detach()

    def root(self, t: Time, x: Tensor, *, joins: bool = False) -> "Root":
        """The first F(t, x), with a look at what it depends on; its graph ``joins`` that of x, or none is kept.

        Raises:
            ProblemError: it depends on a tensor whose gradient would be lost.
        """
        if not joins:
            checks.check_not_transformed()
        leaf = x if joins else x.detach().requires_grad_()
        key = (x.shape, x.dtype, x.device, x.requires_grad, len(self.parameters), self.field.training)
        # torch.func refuses the hooks that weigh; what it differentiates counts by its nodes alone.
        unknown = joins and key not in self._weights and torch._C._functorch.peek_interpreter_stack() is None
        own = (*self.surroundings.parameters, *self.surroundings.buffers_now(), *self.parameters) if unknown else ()
        weigh: AbstractContextManager[dict[int, int]] = checks.weighed(own) if unknown else nullcontext({})
        with torch.enable_grad(), weigh as sizes:
            slope = self.at(t, leaf)
        nodes = self.require_known(slope, (leaf, *self.parameters))
        self.surroundings.note_buffers()
        if not joins:
            return Root(leaf.detach(), slope.detach())
        if unknown:
            self._weights[key] = sum(sizes.values()) + checks.NODE * nodes
        return Root(leaf, slope, self._weights.get(key, (x.nbytes + checks.NODE) * nodes))

    def require_known(self, came: Tensor, inputs: Sequence[Tensor]) -> int:
        """The size of a graph whose leaves must be its inputs, at each replay: others may be met on the way alone.

        Raises:
            ProblemError: there is one, whose gradient would be lost.
        """
        stray, nodes = checks.search(came, inputs)
        if stray is not None:
            raise checks.is_lost(self._name(stray), stray.shape)
        return nodes

    def _name(self, tensor: Tensor) -> str | None:
        """How the field calls a tensor, in quotes."""
        return next((repr(name) for name, value in checks.attributes(self.field) if value is tensor), None)

    def noted(
        self, notes: Sequence[Noise | None], stages: Iterator[AbstractContextManager[Any]] | None = None
    ) -> Field:
        """Return the field for a row of evaluations, each with the random numbers of its note, within its context."""
        if stages is None and (not notes or notes[0] is None):
            return self
        following = iter(notes)

        def field(t: Any, x: Tensor) -> Tensor:
            self.surroundings.set_noise(next(following))
            with next(stages) if stages is not None else nullcontext():
                return self(t, x)

        return field

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
            slope = self.at(t, leaf)
        self.require_known(slope, (leaf, *self.parameters))
        if not slope.requires_grad:
            return Pull(slope, torch.zeros_like(x), (None,) * len(parameters))
        found: Sequence[Tensor | None] = torch.autograd.grad(slope, (leaf, *parameters), cotangent, allow_unused=True)
        return Pull(slope.detach(), torch.zeros_like(x) if found[0] is None else found[0], found[1:])

    def note_attributes(self) -> None:
        """Note what the field has stored, for the message where a replay differs."""
        self._noted_attributes = [(m, vars(m) | m._buffers) for m, _ in self.surroundings.training]

    def watch_buffers(self, states: Iterable[Tensor]) -> None:
        """Raise in the backward pass of the states' graph if somebody has meanwhile edited a buffer that it read.

        Autograd sees edits, but for those through ``.data`` and by batch normalisation. Buffers that the field moves by
        itself are left alone: what does so (running statistics, power iterations) is made for several passes.
        """
        still = self.surroundings.still()

        def check(_: Tensor) -> None:
            changed = [buffer for buffer, was in still if not torch.equal(buffer, was)]
            if changed:
                raise checks.has_changed([self._name(buffer) for buffer in changed])

        for state in states if still else ():
            state.register_hook(check)

    def require_same(self, came: Tensor, expected: Tensor | None, inputs: Sequence[Tensor] = ()) -> None:
        """Compare a replayed tensor with that of the forward pass: equal but for rounding.

        Args:
            came: the replayed one.
            expected: that of the forward pass, where it is known.
            inputs: all that it may depend on, if that is to be looked at.

        Raises:
            OcnoptError: they differ.
            ProblemError: it depends on other tensors, whose gradients would be lost.
        """
        # Compiled fields and some kernels round differently with a graph than without.
        slack = 256 * torch.finfo(came.dtype).eps
        is_same = expected is None or torch.equal(came, expected)
        if not is_same and expected is not None:
            is_same = bool((came.detach() - expected).abs().max() <= slack * expected.abs().max())
        stray = checks.search(came, inputs)[0] if inputs else None
        if is_same and stray is None:
            return
        was = {(m, name): value for m, noted in self._noted_attributes for name, value in noted.items()}
        changed = [
            repr(f"{prefix}.{name}".lstrip("."))
            for prefix, m in self.field.named_modules()
            for name, value in (vars(m) | m._buffers).items()
            if was.get((m, name)) is not value
        ]
        if is_same and stray is not None and not changed:
            raise checks.is_lost(self._name(stray), stray.shape)
        raise checks.has_changed(changed)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """The backward pass: surroundings as in the forward pass, evaluations counted apart."""
        self.is_backward, self.statistics.backward = True, 0
        # When autograd has a whole gradient from us, hooks act on it, once; it drops that of frozen parameters.
        touched = (p for p in self.parameters if p._backward_hooks or not p.requires_grad)
        were = [(p, p._backward_hooks, p.requires_grad) for p in touched]
        try:
            for p, *_ in were:
                p._backward_hooks = None
                p.requires_grad_()
            with torch.no_grad(), self.surroundings.restored():
                yield
        finally:
            for p, hooks, required in were:
                p._backward_hooks = hooks
                p.requires_grad_(required)

    def _require_own_parameters(self) -> None:
        now, owned = self.surroundings.parameters_now(), self.surroundings.parameters
        if len(now) != len(owned) or any(new is not old for new, old in zip(now, owned, strict=True)):
            raise checks.were_exchanged()

    def at(self, t: Time, x: Tensor) -> Tensor:
        """F(t, x): the one place where the field is called, with the time as a 0-d tensor.

        Raises:
            ProblemError: the field, or what it returns, does not fit the state.
            OcnoptError: the field's parameters were exchanged since the forward pass.
        """
        if self.is_backward:
            if not self.statistics.backward:
                self._require_own_parameters()
            self.statistics.backward += 1
        else:
            self.statistics.forward += 1
        if isinstance(t, Tensor):
            clock = t.to(x.dtype)
        elif t == self._clock[0] and not self._clock[1]._version:  # stages often share a time
            clock = self._clock[1]
        else:
            clock = x.new_full((), t)
            self._clock = t, clock
        shapes, version = self.layout.shapes, x._version
        try:
            slope = self.field(clock, x if shapes is None else self.layout.split(x))
        except RuntimeError as error:
            checks.check_dtypes(error, x.dtype, (*self.surroundings.parameters, *self.surroundings.buffers_now()))
            raise
        if shapes is not None or not isinstance(slope, Tensor) or slope.shape != x.shape:
            slope = self.layout.join(checks.check_slope(slope, shapes or (x.shape,), is_tuple=shapes is not None))
        slope = slope if slope.dtype == x.dtype else checks.as_real(slope, x.dtype)
        self._slopes.check(slope, is_edited=x._version != version)
        return slope
