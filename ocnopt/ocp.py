r"""The problem class.

Minimise over the staged control u(t) and the static control p (and over T where the horizon is free)

    Phi(T, x(T), p) + integral_t0^T l(t, x, u, p) dt     subject to     dx/dt = F(t, x, u, p),   x(t0) given,

with bounds u_lower <= u <= u_upper, p_lower <= p <= p_upper, path constraints c(t, x, u, p) <= 0 and terminal
constraints e(T, x(T), p) = 0.

Shapes: x ``(*extra, *batch, n)``, u ``(*extra, *batch, m)``, t broadcasts against ``x[..., 0]``. p is ``(q,)``, or
``(*batch, q)`` in a batched ``solve``. ``batch`` is the batch shape of the initial state: a function may capture
per-sample data, so it is never mapped over samples, only evaluated on extra leading axes.

:func:`lift` brings a problem to the one form that everything below is written for. Every function takes (t, x, u, p).
Where the horizon is free, T is the last entry of p and time runs over the unit interval: with s = (t - t0)/(T - t0) the
dynamics are (T - t0) F and the running cost (T - t0) l, so that no backward pass needs a special case for T.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ocnopt import bounds, captured, checks, problem_checks
from ocnopt.checks import Bounds
from ocnopt.errors import ProblemError
from ocnopt.names import read_names

Function = Callable[..., Any]


@dataclass(frozen=True)
class Horizon:
    """A fixed interval from ``t0`` to ``t1``.

    Raises:
        ProblemError: an end is not finite, or both are the same.
    """

    t0: float
    t1: float

    def __post_init__(self) -> None:
        checks.as_floats(self)
        if not (math.isfinite(self.t0) and math.isfinite(self.t1)) or self.t0 == self.t1:
            raise ProblemError(
                f"Horizon({self.t0}, {self.t1}) is empty or infinite; expected two different finite times"
            )


@dataclass(frozen=True)
class FreeHorizon:
    """A horizon from ``t0`` to an end time T that is chosen too: ``initial`` guess and bounds, all three end times.

    Raises:
        ProblemError: not finite, or not t0 < lower <= initial <= upper.
    """

    initial: float
    lower: float
    upper: float
    t0: float = 0.0

    def __post_init__(self) -> None:
        checks.as_floats(self)
        ends = (self.t0, self.lower, self.initial, self.upper)
        if not all(math.isfinite(end) for end in ends) or not self.t0 < self.lower <= self.initial <= self.upper:
            raise ProblemError(
                f"FreeHorizon(initial={self.initial}, lower={self.lower}, upper={self.upper}, t0={self.t0}) is out of "
                "order; expected finite end times with t0 < lower <= initial <= upper"
            )


def read_horizon(value: Any) -> Horizon | FreeHorizon:
    """Read a horizon: a number T means from 0 to T.

    Raises:
        ProblemError: anything else.
    """
    if isinstance(value, Horizon | FreeHorizon):
        return value
    if checks.is_number(value):
        return Horizon(0.0, float(value))
    raise ProblemError(
        f"horizon is {value!r}; expected a number T, oc.Horizon(t0, t1) or oc.FreeHorizon(initial, lower, upper)"
    )


@dataclass(frozen=True, eq=False, init=False)
class OCP:
    """An optimal-control problem in continuous time, written as plain torch functions.

    Args:
        dynamics: ``F(t, x, u[, p]) -> (..., n)``.
        running_cost: ``l(t, x, u[, p])``, anything that broadcasts to ``x.shape[:-1]``; none means zero.
        terminal_cost: ``Phi(T, x[, p])``, likewise. A penalty on T belongs here.
        initial_state: x(t0), ``(*batch, n)``; its device is the problem's.
        control_dim: m; 0 for a problem without staged controls.
        horizon: T, :class:`Horizon` or :class:`FreeHorizon`.
        parameters: the static control p ``(q,)``, an initial guess for ``solve``; with it every function takes p as
            its last argument.
        control_bounds: ``(lower, upper)``, scalars, vectors ``(m,)``, or what broadcasts to ``(*batch, N, m)``: ``(N,
            m)`` with a row for each step, ``(*batch, 1, m)`` for each problem (two axes never are problems). Or a
            function of time that returns a pair, ``(m,)`` or ``(*batch, m)``, asked where each step begins. Bounds are
            read once, as copies: what they are made of may not be in ``data``, and carries no gradients.
        state_bounds: likewise, what broadcasts to ``(*batch, N + 1, n)``, at every node but the first, which is given.
        parameter_bounds: likewise ``(q,)`` or ``(*batch, q)``; each problem starts within its own.
        path_constraint: ``c(t, x, u[, p]) -> (..., c)``, <= 0 at every node.
        terminal_constraint: ``e(T, x[, p]) -> (..., e)``, == 0.
        state_names: one for each state, units included; plots, tables and messages use them.
        control_names: likewise.
        constraint_names: those of the path constraint's entries, then those of the terminal constraint's.
        data: tensors that the functions capture and that may change in place between solves of a prepared problem (a
            reference, a mass). Those whose leading axes are the batch's belong to one problem each. Any other captured
            tensor counts as a constant.
        initial_guess: where solvers start unless told otherwise; a mapping with any of ``controls``, ``states``,
            ``parameters``, ``horizon``, or a function of the number of steps that returns one.
        dtype: of all tensors.

    Raises:
        ProblemError: a function fails, mixes leading axes or returns a wrong shape, dtype or a non-finite value;
            bounds or horizon out of order.

    Example:
        >>> cost = lambda t, x, u: (x**2 + u**2).sum(-1)
        >>> problem = OCP(lambda t, x, u: u, cost, initial_state=[1.0], control_dim=1, horizon=1.0)
        >>> problem.state_dim, problem.batch_shape
        (1, ())
    """

    dynamics: Function
    running_cost: Function | None
    terminal_cost: Function | None
    initial_state: Tensor
    control_dim: int
    horizon: Horizon | FreeHorizon
    parameters: Tensor | None
    control_bounds: Bounds | Function | None
    state_bounds: Bounds | None
    parameter_bounds: Bounds | None
    path_constraint: Function | None
    terminal_constraint: Function | None
    state_names: tuple[str, ...] | None
    control_names: tuple[str, ...] | None
    constraint_names: tuple[str, ...] | None
    data: tuple[Tensor, ...]
    initial_guess: Any
    dtype: torch.dtype
    traced_state: Tensor | None = field(init=False)
    """The initial state with its graph, where it came with one."""
    parameters_broadcast: bool = field(init=False)
    """Whether the functions accept p with leading axes, as a batched ``solve`` needs."""
    parameters_of_each: bool = field(init=False)
    """Whether a function of a batch accepts p with its axes only."""

    def __init__(
        self,
        dynamics: Function,
        running_cost: Function | None = None,
        terminal_cost: Function | None = None,
        *,
        initial_state: Any,
        control_dim: int = 0,
        horizon: float | Horizon | FreeHorizon,
        parameters: Any = None,
        control_bounds: Any = None,
        state_bounds: Any = None,
        parameter_bounds: Any = None,
        path_constraint: Function | None = None,
        terminal_constraint: Function | None = None,
        state_names: Any = None,
        control_names: Any = None,
        constraint_names: Any = None,
        data: Any = (),
        initial_guess: Mapping[str, Any] | Function | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        put = object.__setattr__
        functions = (dynamics, running_cost, terminal_cost, path_constraint, terminal_constraint)
        for name, function in zip(problem_checks.FUNCTIONS, functions, strict=True):
            checks.callable_or_none(name, function, required=name == "dynamics")
            put(self, name, function)
        x0, p = checks.start(initial_state, parameters, dtype)
        control_dim = checks.whole("control_dim", control_dim, 0)
        put(self, "initial_state", x0)
        put(self, "traced_state", checks.traced(initial_state, dtype))
        put(self, "control_dim", control_dim)
        put(self, "horizon", read_horizon(horizon))
        put(self, "parameters", p)
        limits: Any = control_bounds
        if not callable(control_bounds):
            limits = bounds.read("control_bounds", control_bounds, control_dim, x0, batch=self.batch_shape, rows="N")
        put(self, "control_bounds", limits)
        n, q, batch = self.state_dim, self.parameter_dim, self.batch_shape
        put(self, "state_bounds", bounds.read("state_bounds", state_bounds, n, x0, batch=batch, rows="N + 1"))
        put(self, "parameter_bounds", bounds.read("parameter_bounds", parameter_bounds, q, x0, batch=batch))
        put(self, "state_names", read_names("state_names", state_names, self.state_dim))
        put(self, "control_names", read_names("control_names", control_names, control_dim))
        put(self, "constraint_names", read_names("constraint_names", constraint_names))
        put(self, "data", checks.data_tensors(data, dtype, x0.device))
        put(self, "initial_guess", checks.start_guess(initial_guess))
        put(self, "dtype", dtype)
        end = self.horizon.initial if isinstance(self.horizon, FreeHorizon) else self.horizon.t1
        problem_checks.check_order(self, end)
        with captured.must_be_read(self.data):
            for name, value in problem_checks.check_functions(self, end).items():
                put(self, name, value)

    @property
    def state_dim(self) -> int:
        """n."""
        return self.initial_state.shape[-1]

    def control_bounds_at(self, t: float, step: int = 0) -> Bounds | None:
        """The bounds of the controls at a time, ``(m,)`` or ``(*batch, m)``; of a step where each has its row."""
        given, x0 = self.control_bounds, self.initial_state
        if callable(given):
            name = f"control_bounds(t = {t:.6g})"
            with captured.must_not_be_read(self.data, name):
                pair = given(x0.new_tensor(t))
            return bounds.read(name, () if pair is None else pair, self.control_dim, x0, batch=self.batch_shape)
        if given is None or given[0].ndim == 1:
            return given
        own = step if given[0].shape[-2] > 1 else 0
        return given[0][..., own, :], given[1][..., own, :]

    def control_bounds_of(self, times: Tensor) -> Bounds | None:
        """The bounds of the controls; those that are a function of time as rows for the steps between N + 1 times."""
        if not callable(self.control_bounds):
            return self.control_bounds
        if isinstance(self.horizon, FreeHorizon):
            raise ProblemError(
                "control_bounds is a function of time, but the end time is free; expected a vector for all steps or "
                "(N, m) with a row for each"
            )
        pairs = [self.control_bounds_at(t) for t in times[:-1].tolist()]
        # with the batch's axes, be they of size one: two axes alone may mean problems
        first = self.initial_state.new_zeros((*(1,) * len(self.batch_shape), self.control_dim))
        sides = zip(*(pair for pair in pairs if pair is not None), strict=True)
        lower, upper = (torch.stack(torch.broadcast_tensors(first, *side)[1:], dim=-2) for side in sides)
        return lower, upper

    @property
    def parameter_dim(self) -> int:
        """q; 0 without static controls. T never counts."""
        return 0 if self.parameters is None else self.parameters.shape[-1]

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The initial state's shape without its last axis."""
        return tuple(self.initial_state.shape[:-1])

    @property
    def device(self) -> torch.device:
        """The initial state's device."""
        return self.initial_state.device


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

    def field(self, u: Tensor, p: Tensor) -> Callable[[float | Tensor, Tensor], Tensor]:
        """F(t, x) for fixed controls: what a Runge-Kutta step takes."""
        return lambda t, x: self.dynamics(t, x, u, p)

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
        if user_p.ndim == 1 and self.problem.parameters_of_each:
            user_p = user_p.expand(*x.shape[:-1], -1)
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
    box = (_append(lower, horizon.lower), _append(upper, horizon.upper))
    return Lifted(problem, 0.0, 1.0, _append(p, horizon.initial), box, free=True)


def _append(vector: Tensor, number: float) -> Tensor:
    return torch.cat([vector, vector.new_full((*vector.shape[:-1], 1), number)], dim=-1)
