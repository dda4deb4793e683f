"""Second derivatives of a loss in the end time T of a Neural ODE inside of it, by differentiating the solve twice.

A path from t0 to T that is longer by a factor r runs through r F(t0 + r (t - t0), x) on the old interval, with all its
steps. So with length l = T - t0, dL/dT = (dL/dr) / l at r = 1, and one more product gives d2L/dT2 and d/dp dL/dT.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ocnopt.errors import ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.neural.state_layout import State
from ocnopt.optim.shares import Pair, dot


class Second(NamedTuple):
    """dL/dT, d2L/dT2, and the derivative of the first along a change of the parameters, all 0-d."""

    T: Tensor
    TT: Tensor
    along: Tensor


class _Stretched(nn.Module):
    """A field on a path that is longer by a factor."""

    def __init__(self, field: nn.Module, factor: Tensor, start: float) -> None:
        super().__init__()
        self.field, self.factor, self.start = field, factor, start

    def forward(self, t: Tensor, x: State) -> State:
        slope = self.field(self.start + (t - self.start) * self.factor.to(t), x)
        if isinstance(slope, tuple):
            return tuple(part * self.factor.to(part) for part in slope)
        return slope * self.factor.to(slope)


def second_derivatives(neural_ode: NeuralODE, closure: Callable[[], Tensor], directions: Sequence[Pair]) -> Second:
    """Evaluate a loss with a graph through every step, and differentiate it twice.

    Args:
        neural_ode: with a free horizon.
        closure: computes the loss, without ``backward()``.
        directions: pairs of a parameter and its change.

    Raises:
        ProblemError: the closure returns no loss of one number with its graph, or its solves report at other times
            than T.
    """
    start, factor = neural_ode.horizon.t0, torch.ones((), dtype=torch.float64, device=neural_ode.T.device)
    factor.requires_grad_()
    with torch.enable_grad(), _stretched(neural_ode, factor, start):
        loss: Any = closure()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
            raise ProblemError(
                f"the closure of policy.step() returned {came}; expected the loss, a tensor of one number with its "
                "graph: compute it as before loss.backward(), and return it"
            )
        first = _slope(loss, factor)
        second, *mixed = _gradient(first, [factor, *(parameter for parameter, _ in directions)])
    length = neural_ode.T - start
    along = sum(dot(g, dp) for g, (_, dp) in zip(mixed, directions, strict=True))
    return Second(first.detach() / length, second / length**2, (along + torch.zeros_like(second)) / length)


def _slope(loss: Tensor, factor: Tensor) -> Tensor:
    """dL/dr with its graph."""
    first: Tensor | None = None
    if loss.requires_grad:
        (first,) = torch.autograd.grad(loss.double().sum(), [factor], create_graph=True, allow_unused=True)
    if first is None:
        raise ProblemError(
            "the closure of policy.step() returned a loss whose graph does not lead through the solve, and would hold "
            "T still; expected the loss with its graph: leave out detach() and no_grad(), and call in it the "
            "NeuralODE of the policy"
        )
    return first


def _gradient(value: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    if not value.requires_grad:
        return tuple(torch.zeros_like(each) for each in inputs)
    return torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)


@contextmanager
def _stretched(neural_ode: NeuralODE, factor: Tensor, start: float) -> Iterator[None]:
    field, adjoint = neural_ode.field, neural_ode.adjoint
    neural_ode.field, neural_ode.adjoint = _Stretched(field, factor, start), "backprop"
    handle = neural_ode.register_forward_pre_hook(_refuse_times, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        neural_ode.field, neural_ode.adjoint = field, adjoint


def _refuse_times(neural_ode: NeuralODE, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("times", args[1] if len(args) > 1 else None) is not None:
        raise ProblemError(
            "a HorizonPolicy with curvature='exact' met a solve with output times; expected ode(x), whose steps all "
            "stretch with T: use curvature='gauss_newton'"
        )
