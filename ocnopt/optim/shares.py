"""What backward passes tell about the end time T of a Neural ODE: the share of each sample in dL/dT.

With x_i(T) the end of sample i, its share is s_i = F_i . dL/dx_i at T. The gradient of sample i in the parameters, g_i,
is never formed: a solve that was noted with its cotangents is taken again, and sum_i w_i g_i comes by one product.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ocnopt.differential.kronecker import is_gone, is_within_backward, present_pass
from ocnopt.neural.evaluation import Surroundings
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.neural.state_layout import State, StateLayout
from ocnopt.neural.times import as_times
from ocnopt.neural.trees import mapped
from ocnopt.optim.policy_checks import check_times

Pair = tuple[Tensor, Tensor]


def dot(x: Tensor, y: Tensor) -> Tensor:
    """The sum of products in double precision."""
    return (x.double() * y.double()).sum()


class Solve:
    """One solve as it was: its start, and what the field saw besides."""

    def __init__(self, neural_ode: NeuralODE, x: State, times: Any) -> None:
        layout = StateLayout.of(x)
        parts = x if isinstance(x, tuple) else (x,)
        kept = tuple(part.detach().clone() for part in parts)
        self._x, self._times, self._rows_axis = kept if isinstance(x, tuple) else kept[0], times, int(times is not None)
        self.rows = layout.rows if isinstance(x, tuple) else len(x) if x.ndim > 1 else 1
        self._surroundings = Surroundings(neural_ode.field, parts[0].device)
        self._surroundings.note_buffers()
        self._noise = self._surroundings.noise()

    def product(
        self, neural_ode: NeuralODE, cotangents: Sequence[Tensor | None], weights: Tensor, directions: Sequence[Pair]
    ) -> Tensor:
        """sum_i w_i g_i . dp for weights ``(rows,)`` of the samples, and pairs of a parameter and its dp."""
        again, parameters = copy.copy(neural_ode), [parameter for parameter, _ in directions]  # nobody observes a copy
        with torch.enable_grad(), self._surroundings.restored():
            self._surroundings.set_noise(self._noise)
            ends = _parts(again.forward(self._x, self._times))
        size = weights.abs().amax().clamp(min=torch.finfo(weights.dtype).tiny)  # half precision would lose small ones
        pairs = [
            (output, _weigh(cotangent, weights / size, self._rows_axis))
            for output, cotangent in zip(ends, cotangents, strict=True)
            if cotangent is not None and output.requires_grad
        ]
        if not pairs:
            return weights.new_zeros(())
        outputs, weighed = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, parameters, weighed, allow_unused=True, materialize_grads=True)
        terms = [dot(g, dp) for g, (_, dp) in zip(found, directions, strict=True)]
        return size * sum(terms, weights.new_zeros(()))


def _parts(state: State) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def _weigh(cotangent: Tensor, weights: Tensor, axis: int) -> Tensor:
    if len(weights) > 1:
        weights = weights.view(*[1] * axis, -1, *[1] * (cotangent.ndim - axis - 1))
    return (cotangent.double() * weights).to(cotangent.dtype)


@dataclass(eq=False)
class Seen:
    """Samples that passes saw: their shares ``(B,)``, none if T is no end of theirs, and their solves, if noted.

    Of each solve the cotangents of its outputs are kept.
    """

    shares: Tensor | None = None
    solves: dict[Solve, list[Tensor | None]] = field(default_factory=dict)

    def add(self, shares: Tensor) -> None:
        """Add the shares of a solve."""
        self.shares = shares if self.shares is None else self.shares + shares

    def feel(self, solve: Solve, cotangents: Sequence[Tensor | None]) -> None:
        """Add to the cotangents of a solve."""
        old = self.solves.get(solve, [None] * len(cotangents))
        pairs = zip(old, cotangents, strict=True)
        self.solves[solve] = [y if x is None else x if y is None else x + y for x, y in pairs]

    def join(self, other: "Seen") -> None:
        """Add what another pass saw of the same samples."""
        if other.shares is not None:
            self.add(other.shares)
        for solve, cotangents in other.solves.items():
            self.feel(solve, cotangents)


class Shares:
    """The samples of one iteration, and the parameters that they belong to: watches one Neural ODE.

    Samples count once the pass that saw them has reached a parameter's ``.grad``, and for as long as it is there: what
    torch.autograd.grad sees belongs to no step. Further solves of as many samples in the same pass are of the same
    ones; a new forward pass, after a backward pass, is of others.

    Args:
        parameters: of the Neural ODE.
        scaler: of the loss, if there is one.
        keep: whether to keep the values of the parameters.
        replay: whether to note the solves, too.
    """

    def __init__(
        self, parameters: list[nn.Parameter], scaler: torch.amp.GradScaler | None, keep: bool, replay: bool
    ) -> None:
        self._parameters, self._scaler, self._keep, self._replay = parameters, scaler, keep, replay
        self._handles: list[RemovableHandle] = []
        self._hooked: set[Tensor] = set()
        self.before: list[Pair] = []
        self._closed: list[Seen] = []
        self._present: dict[int, Seen] = {}
        self._found: dict[tuple[int, int], Seen] = {}  # by pass and number of samples
        self._pending: Solve | None = None
        self.witness: Pair | None = None  # a parameter, and the norm of its gradient as it arrived

    def attach(self, neural_ode: NeuralODE, handles: list[RemovableHandle]) -> None:
        """Watch until the handles, which are added to a list, are removed."""
        self._handles = handles
        handles += [neural_ode.observe(self), neural_ode.register_forward_pre_hook(self._begin, with_kwargs=True)]
        if self._replay:
            handles.append(neural_ode.register_forward_hook(self._end))

    def terminal(self, x: Tensor, slope: Tensor, costate: Tensor) -> None:
        """Note the shares, and the parameters before they move."""
        products = slope.double() * costate.double()
        products = products.flatten(1).sum(1) if x.ndim > 1 else products.sum()[None]
        self._found_of(len(products)).add(self._unscaled(products))

    def take(self) -> list[Seen]:
        """The samples that count."""
        if not self._live():
            self._count(-1)
        self._closed += [seen for seen in self._present.values() if seen.shares is not None]
        if not self._closed:
            self.before = []
        self._present, self._found = {}, {}
        return self._closed

    def _found_of(self, rows: int) -> Seen:
        """What the present pass sees, after those whose gradients are gone have been forgotten."""
        live = self._live()
        if live and (self._closed or self._present) and all(is_gone(parameter.grad) for parameter in live):
            self._closed, self._present, self.before = [], {}, []
        if self._keep and not self.before:
            self.before = [(parameter, parameter.detach().clone()) for parameter in live]
        return self._found.setdefault((present_pass(), rows), Seen())

    def _count(self, since: int) -> None:
        """What was found from a pass on has reached ``.grad``."""
        for found, rows in [key for key in self._found if key[0] >= since]:
            self._present.setdefault(rows, Seen()).join(self._found.pop((found, rows)))

    def _unscaled(self, gradient: Tensor) -> Tensor:
        return gradient if self._scaler is None else gradient / self._scaler.scale(gradient.new_ones(()))

    def _live(self) -> list[nn.Parameter]:
        return [parameter for parameter in self._parameters if parameter.requires_grad]

    def _arrive(self, parameter: Tensor) -> None:
        self._count(present_pass())
        gradient = parameter.grad
        if gradient is not None and (self.witness is None or self.witness[0] is parameter):
            self.witness = parameter, gradient.norm()

    def _begin(self, neural_ode: NeuralODE, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, times = (*args, kwargs.get("x"))[0], kwargs.get("times", args[1] if len(args) > 1 else None)
        self._pending = Solve(neural_ode, x, times) if self._replay and torch.is_grad_enabled() else None
        if is_within_backward():
            return None
        if times is not None and torch.is_grad_enabled():
            given = as_times(times).detach()
            for row in given.T if given.ndim == 2 else [given]:
                check_times(neural_ode._read_times(row)[0], float(neural_ode.T))
        self.take()
        self._hook(neural_ode)
        if self._live() or not torch.is_grad_enabled() or any(part.requires_grad for part in _parts(x)):
            return None
        # Nothing else would let a gradient come back to the end.
        felt = mapped(x, lambda part: part.detach().requires_grad_())
        return ((felt, *args[1:]), kwargs) if args else ((), {**kwargs, "x": felt})

    def _hook(self, neural_ode: NeuralODE) -> None:
        """Hear of the gradients of the parameters as they are by now."""
        now = [*neural_ode.parameters()]
        if all(isinstance(parameter, nn.Parameter) for parameter in now):  # torch.func lends tensors for one call
            self._parameters = now  # load_state_dict(assign=True) may have exchanged them
        new = [parameter for parameter in self._live() if parameter not in self._hooked]
        self._handles += [parameter.register_post_accumulate_grad_hook(self._arrive) for parameter in new]
        self._hooked.update(new)

    def _end(self, neural_ode: NeuralODE, args: tuple[Any, ...], output: State) -> None:
        parts = _parts(output)
        if self._pending is not None:
            for i, part in enumerate(parts):
                if part.requires_grad:
                    part.register_hook(self._receiver(self._pending, i, len(parts)))
        self._pending = None

    def _receiver(self, solve: Solve, i: int, parts: int) -> Callable[[Tensor], None]:
        def receive(cotangent: Tensor) -> None:
            felt: list[Tensor | None] = [None] * parts
            felt[i] = self._unscaled(cotangent.detach()).clone()
            self._found_of(solve.rows).feel(solve, felt)

        return receive

    def __reduce__(self) -> tuple[Any, ...]:
        return Shares, ([], None, False, False)  # a copy of a watched module is not watched
