r"""The one form of a continuous problem that everything below is written for.

Every function takes (t, x, u, p). Where the horizon is free, T is the last entry of p and time runs over the unit
interval: with s = (t - t0)/(T - t0) the dynamics are (T - t0) F and the running cost (T - t0) l, so that no backward
pass needs a special case for T.

Shapes: t broadcasts against ``x[..., 0]``, x ``(..., n)``, u ``(..., m)``, p ``(q,)`` or with the leading axes of x,
``(..., q)``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ocnopt.checks import Bounds
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, FreeHorizon, Function


@dataclass(frozen=True, eq=False)
class Lifted:
    """A problem in the one form; q counts T where the horizon is free."""

    problem: OCP
    t0: float
    t1: float
    parameters: Tensor
    parameter_bounds: Bounds | None
    free: bool

    @property
    def state_dim(self) -> int:
        """n."""
        return self.problem.state_dim

    @property
    def control_dim(self) -> int:
        """m."""
        return self.problem.control_dim

    @property
    def parameter_dim(self) -> int:
        """q, with T."""
        return self.parameters.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The initial state's batch shape."""
        return self.problem.batch_shape

    @property
    def initial_state(self) -> Tensor:
        """x(t0), ``(*batch, n)``."""
        return self.problem.initial_state

    @property
    def control_bounds(self) -> Bounds | None:
        """Two tensors ``(m,)``."""
        return self.problem.control_bounds

    def split(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """The user's parameters ``(..., q)`` and the end time ``(...)``."""
        if self.free:
            return p[..., :-1], p[..., -1]
        return p, p.new_tensor(self.t1)

    def times(self, steps: int, p: Tensor) -> Tensor:
        """Node times ``(..., steps + 1)`` in the user's time."""
        start = self.problem.horizon.t0
        _, end = self.split(p)
        return start + (end[..., None] - start) * torch.linspace(0, 1, steps + 1, dtype=p.dtype, device=p.device)

    def dynamics(self, t: float | Tensor, x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        """dx/ds, ``(..., n)``."""
        time, scale = self._time(t, p)
        slope = self._call(self.problem.dynamics, time, x, u, p)
        return slope if scale is None else scale[..., None] * slope

    def running_cost(self, t: float | Tensor, x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        """dl/ds, ``(...)``; zeros without a running cost."""
        if self.problem.running_cost is None:
            return x.new_zeros(x.shape[:-1])
        time, scale = self._time(t, p)
        cost = self._scalar(self.problem.running_cost, time, x, u, p)
        return cost if scale is None else scale * cost

    def terminal_cost(self, x: Tensor, p: Tensor) -> Tensor:
        """Phi at the end time, ``(...)``; zeros without a terminal cost."""
        if self.problem.terminal_cost is None:
            return x.new_zeros(x.shape[:-1])
        return self._scalar(self.problem.terminal_cost, self.split(p)[1], x, None, p)

    def path_constraint(self, t: float | Tensor, x: Tensor, u: Tensor, p: Tensor) -> Tensor:
        """c <= 0, ``(..., c)``; empty without one."""
        if self.problem.path_constraint is None:
            return x.new_zeros((*x.shape[:-1], 0))
        return self._call(self.problem.path_constraint, self._time(t, p)[0], x, u, p)

    def terminal_constraint(self, x: Tensor, p: Tensor) -> Tensor:
        """e == 0, ``(..., e)``; empty without one."""
        if self.problem.terminal_constraint is None:
            return x.new_zeros((*x.shape[:-1], 0))
        return self._call(self.problem.terminal_constraint, self.split(p)[1], x, None, p)

    def _time(self, s: float | Tensor, p: Tensor) -> tuple[Tensor, Tensor | None]:
        """The user's time at s, and dt/ds where it is not one."""
        s = torch.as_tensor(s, dtype=p.dtype, device=p.device)
        if not self.free:
            return s, None
        start = self.problem.horizon.t0
        scale = self.split(p)[1] - start
        return start + s * scale, scale

    def _scalar(self, function: Function, t: Tensor, x: Tensor, u: Tensor | None, p: Tensor) -> Tensor:
        cost = self._call(function, t, x, u, p)
        return torch.as_tensor(cost, dtype=x.dtype, device=x.device).expand(x.shape[:-1])

    def _call(self, function: Function, t: Tensor, x: Tensor, u: Tensor | None, p: Tensor) -> Tensor:
        """Call a user's function, with p only where the problem has parameters."""
        arguments = (t, x) if u is None else (t, x, u)
        if self.problem.parameters is None:
            return function(*arguments)
        user_p = self.split(p)[0]
        if user_p.ndim == 1 or self.problem.parameters_broadcast:
            return function(*arguments, user_p)
        if self.batch_shape:
            raise ProblemError(
                "a problem function reads p as one vector (q,), but a batched solve gives each problem its own p "
                "(*batch, q); expected functions that index the last axis: p[..., i]"
            )
        return _one_by_one(function, *arguments, user_p)


def _one_by_one(function: Function, *arguments: Tensor) -> Tensor:
    """Map a function written for p (q,) over extra leading axes; without a batch it captures no per-sample data."""
    t, *rest = arguments
    lead = torch.broadcast_shapes(t.shape, *(v.shape[:-1] for v in rest))
    flat = [t.expand(lead).reshape(-1), *(v.expand(*lead, v.shape[-1]).reshape(-1, v.shape[-1]) for v in rest)]
    value = torch.vmap(function)(*flat)
    return value.reshape(*lead, *value.shape[1:])


def lift(problem: OCP) -> Lifted:
    """Bring a problem to the one form: a free T becomes the last static control, and time runs from 0 to 1."""
    x0, horizon = problem.initial_state, problem.horizon
    p = x0.new_zeros(0) if problem.parameters is None else problem.parameters
    if not isinstance(horizon, FreeHorizon):
        return Lifted(problem, horizon.t0, horizon.t1, p, problem.parameter_bounds, free=False)
    infinite = x0.new_full((problem.parameter_dim,), torch.inf)
    lower, upper = problem.parameter_bounds or (-infinite, infinite)
    bounds = (_append(lower, horizon.lower), _append(upper, horizon.upper))
    return Lifted(problem, 0.0, 1.0, _append(p, horizon.initial), bounds, free=True)


def _append(vector: Tensor, number: float) -> Tensor:
    return torch.cat([vector, vector.new_tensor([number])])
