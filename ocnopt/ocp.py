r"""The problem class.

Minimise over the staged control u(t) and the static control p (and over T where the horizon is free)

    Phi(T, x(T), p) + integral_t0^T l(t, x, u, p) dt     subject to     dx/dt = F(t, x, u, p),   x(t0) given,

with bounds u_lower <= u <= u_upper, p_lower <= p <= p_upper, path constraints c(t, x, u, p) <= 0 and terminal
constraints e(T, x(T), p) = 0.

Shapes: x ``(*extra, *batch, n)``, u ``(*extra, *batch, m)``, t broadcasts against ``x[..., 0]``. p is ``(q,)``, or
``(*batch, q)`` in a batched ``solve``. ``batch`` is the batch shape of the initial state: a function may capture
per-sample data, so it is never mapped over samples, only evaluated on extra leading axes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocnopt import checks
from ocnopt.errors import ProblemError

Function = Callable[..., Any]
_FUNCTIONS = ("dynamics", "running_cost", "terminal_cost", "path_constraint", "terminal_constraint")


@dataclass(frozen=True)
class Horizon:
    """A fixed interval from ``t0`` to ``t1``.

    Raises:
        ProblemError: an end is not finite, or both are the same.
    """

    t0: float
    t1: float

    def __post_init__(self) -> None:
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
    if isinstance(value, int | float) and not isinstance(value, bool):
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
        control_bounds: ``(lower, upper)``, scalars or vectors ``(m,)``.
        parameter_bounds: likewise, ``(q,)``.
        path_constraint: ``c(t, x, u[, p]) -> (..., c)``, <= 0 at every node.
        terminal_constraint: ``e(T, x[, p]) -> (..., e)``, == 0.
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
    control_bounds: checks.Bounds | None
    parameter_bounds: checks.Bounds | None
    path_constraint: Function | None
    terminal_constraint: Function | None
    initial_guess: Any
    dtype: torch.dtype
    parameters_broadcast: bool
    """Whether the functions accept p with leading axes, as a batched ``solve`` needs."""

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
        parameter_bounds: Any = None,
        path_constraint: Function | None = None,
        terminal_constraint: Function | None = None,
        initial_guess: Mapping[str, Any] | Function | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        put = object.__setattr__
        functions = (dynamics, running_cost, terminal_cost, path_constraint, terminal_constraint)
        for name, function in zip(_FUNCTIONS, functions, strict=True):
            checks.callable_or_none(name, function, required=name == "dynamics")
            put(self, name, function)
        x0, p = read_start(initial_state, parameters, dtype)
        if type(control_dim) is not int or control_dim < 0:
            raise ProblemError(f"control_dim is {control_dim!r}; expected an integer >= 0")
        put(self, "initial_state", x0)
        put(self, "control_dim", control_dim)
        put(self, "horizon", read_horizon(horizon))
        put(self, "parameters", p)
        q = self.parameter_dim
        put(self, "control_bounds", checks.bounds("control_bounds", control_bounds, control_dim, dtype, x0.device))
        put(self, "parameter_bounds", checks.bounds("parameter_bounds", parameter_bounds, q, dtype, x0.device))
        put(self, "initial_guess", initial_guess)
        put(self, "dtype", dtype)
        _check_order(self)
        put(self, "parameters_broadcast", _check_functions(self))

    @property
    def state_dim(self) -> int:
        """n."""
        return self.initial_state.shape[-1]

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


def read_start(initial_state: Any, parameters: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Read x(t0) ``(*batch, n)`` and p ``(q,)``."""
    if not dtype.is_floating_point:
        raise ProblemError(f"dtype is {dtype}; expected a floating-point dtype such as torch.float64")
    x0 = checks.float_tensor("initial_state", initial_state, dtype)
    if x0.ndim == 0 or x0.shape[-1] == 0:
        raise ProblemError(f"initial_state has shape {checks.shape(x0)}; expected (*batch, n) with n >= 1")
    if parameters is None:
        return x0, None
    p = checks.float_tensor("parameters", parameters, dtype, x0.device)
    if p.ndim != 1 or p.shape[0] == 0:
        raise ProblemError(
            f"parameters has shape {checks.shape(p)}; expected a flat vector (q,) with q >= 1: use torch.cat of "
            "flattened tensors"
        )
    return x0, p


def _check_order(problem: OCP) -> None:
    if isinstance(problem.horizon, Horizon) and problem.horizon.t1 <= problem.horizon.t0:
        raise ProblemError(
            f"horizon runs from {problem.horizon.t0} to {problem.horizon.t1}; expected an end after the start"
        )
    for name, given in (("parameter_bounds", problem.parameter_bounds), ("control_bounds", problem.control_bounds)):
        size = problem.parameter_dim if name == "parameter_bounds" else problem.control_dim
        if given is not None and size == 0:
            raise ProblemError(
                f"{name} is given for a problem without such controls; expected none, or parameters= / control_dim="
            )


def _probe(problem: OCP) -> tuple[list[Tensor], list[Tensor]]:
    """Arguments (t, x, u) of two rows: the initial state, controls clipped to their bounds; a seeded point nearby."""
    generator = torch.Generator().manual_seed(0)
    x0 = problem.initial_state
    u0 = x0.new_zeros((*problem.batch_shape, problem.control_dim))
    dx, u1 = (0.01 * torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v) for v in (x0, u0))
    if problem.control_bounds is not None:
        u0, u1 = u0.clamp(*problem.control_bounds), (u0 + u1).clamp(*problem.control_bounds)
    end = problem.horizon.initial if isinstance(problem.horizon, FreeHorizon) else problem.horizon.t1
    return [x0.new_tensor(problem.horizon.t0), x0, u0], [x0.new_tensor(end), x0 + dx, u1]


def _check_functions(problem: OCP) -> bool:
    """Call every function and check what it returns; return whether p may carry leading axes."""
    near, far = _probe(problem)
    p, broadcast = problem.parameters, True
    for name in _FUNCTIONS:
        if getattr(problem, name) is None:
            continue
        # A terminal function belongs to the end: Phi may not even exist at t0.
        rows = ([far[0], *near[1:]] if name.startswith("terminal") else near), far
        evaluate = partial(_evaluate, problem, name)
        with torch.no_grad():
            alone = [evaluate(row, p) for row in rows]
            checks.finite_output(name, alone[0])
            together = _stack(*rows)
            checks.same_rows(name, evaluate(together, p), alone)
            broadcast = broadcast and (p is None or _accepts_leading_axes(evaluate, rows, together, p))
    return broadcast


def _stack(first: list[Tensor], second: list[Tensor]) -> list[Tensor]:
    """Two rows of arguments on a leading axis; t broadcasts against ``x[..., 0]``."""
    t, x, u = (torch.stack(pair) for pair in zip(first, second, strict=True))
    return [t.reshape(-1, *(1,) * (x.ndim - 2)), x, u]


def _evaluate(problem: OCP, name: str, arguments: list[Tensor], p: Tensor | None) -> Tensor:
    """Call one function of the problem; check shape and dtype of what it returns."""
    t, x, u = arguments
    terminal = name.startswith("terminal")
    signature = f"(t, x{'' if terminal else ', u'}{'' if p is None else ', p'})"
    given = (t, x) if terminal else (t, x, u)
    value = checks.call(name, signature, getattr(problem, name), *given, *(() if p is None else (p,)))
    lead = tuple(x.shape[:-1])
    if name.endswith("cost"):
        return checks.scalar_output(name, value, lead, problem.dtype)
    return checks.vector_output(name, value, tuple(x.shape) if name == "dynamics" else None, lead, problem.dtype)


def _accepts_leading_axes(
    evaluate: Callable[[list[Tensor], Tensor], Tensor], rows: Sequence[list[Tensor]], together: list[Tensor], p: Tensor
) -> bool:
    """Whether p (2, *batch, q) with different rows gives what each row of p gives alone."""
    ps = torch.stack([p, p + 0.01 + 0.01 * p.abs()])
    batch = together[1].shape[1:-1]
    stacked = ps.reshape(2, *(1,) * len(batch), -1).expand(2, *batch, -1)
    try:
        checks.same_rows("", evaluate(together, stacked), [evaluate(row, q) for row, q in zip(rows, ps, strict=True)])
    except ProblemError:
        return False
    return True
