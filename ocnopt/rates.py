r"""Bounds on how fast controls may change: the control becomes a state, its rate the control.

With z = (x, u) and the new control w = du/dt,

    dx/dt = F(t, x, u, p),   du/dt = w,   rate bounds on w,   the old control bounds on the state u

so every solver that takes bounds on controls and states takes bounds on rates. Within a step u runs linearly; with the
Euler method it is constant, and u_{k+1} - u_k is what is bounded, as is usual in model predictive control.

Source: Rawlings, Mayne and Diehl, Model Predictive Control, 2017, section 1.2.5 (penalties and bounds on the rate).
"""

from typing import Any

import torch
from torch import Tensor

from ocnopt import bounds, checks
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP, Function


def limit_rates(problem: Any, rate_bounds: Any, *, initial_control: Any) -> OCP:
    """The problem with its controls among the states, behind them, and bounds on their rates.

    Args:
        problem: an :class:`ocnopt.OCP`, with control bounds that are the same at all times, or none.
        rate_bounds: ``(lower, upper)`` of du/dt, as ``control_bounds`` of an OCP: scalars, vectors ``(m,)``, a row for
            each step or problem, or a function of time.
        initial_control: u(t0) ``(m,)`` or ``(*batch, m)``: what was applied last; a tensor keeps its graph, as the
            initial state does.

    Returns:
        A problem with state ``(*batch, n + m)`` and control du/dt. Its own ``initial_guess`` is none: controls of the
        old problem are no rates.

    Raises:
        ProblemError: no continuous problem, no controls, bounds that vary in time, or an initial control that is out of
            its bounds or of another shape.

    Example:
        >>> cost = lambda t, x, u: (x**2 + u**2).sum(-1)
        >>> problem = OCP(lambda t, x, u: u, cost, initial_state=[1.0], control_dim=1, horizon=1.0)
        >>> slow = limit_rates(problem, (-2.0, 2.0), initial_control=[0.0])
        >>> slow.state_dim, slow.control_dim
        (2, 1)
    """
    if not isinstance(problem, OCP) or problem.control_dim == 0:
        came = "has no controls" if isinstance(problem, OCP) else f"is {type(problem).__name__}"
        raise ProblemError(f"limit_rates got a problem that {came}; expected an oc.OCP with controls: limit that one")
    given = problem.control_bounds
    if callable(given) or (given is not None and given[0].ndim > 1 and given[0].shape[-2] > 1):
        raise ProblemError(
            "limit_rates got control_bounds that vary in time, but bounds on states hold at all times; expected one "
            "vector: write the others as path_constraint"
        )
    n, m = problem.state_dim, problem.control_dim
    u0 = _initial(problem, initial_control)
    x0 = problem.initial_state if problem.traced_state is None else problem.traced_state
    rates = rate_bounds
    if not callable(rate_bounds):
        rates = bounds.read("rate_bounds", rate_bounds, m, problem.initial_state, batch=problem.batch_shape, rows="N")
    if rates is None:
        raise ProblemError("limit_rates got rate_bounds=None; expected a pair (lower, upper): leave the problem as is")

    def split(function: Function | None, *, end: bool = False) -> Function | None:
        """A function of (t, x, u, p) or (t, x, p) as one of (t, z, w, p) or (t, z, p)."""
        if function is None:
            return None
        if end:
            return lambda t, z, *p: function(t, z[..., :n], *p)
        return lambda t, z, w, *p: function(t, z[..., :n], z[..., n:], *p)

    def dynamics(t: Any, z: Tensor, w: Tensor, *p: Tensor) -> Tensor:
        return torch.cat([problem.dynamics(t, z[..., :n], z[..., n:], *p), w], dim=-1)

    return OCP(
        dynamics,
        split(problem.running_cost),
        split(problem.terminal_cost, end=True),
        initial_state=torch.cat([x0, u0.expand(*problem.batch_shape, m)], dim=-1),
        control_dim=m,
        horizon=problem.horizon,
        parameters=problem.parameters,
        control_bounds=rates,
        state_bounds=_state_bounds(problem),
        parameter_bounds=problem.parameter_bounds,
        path_constraint=split(problem.path_constraint),
        terminal_constraint=split(problem.terminal_constraint, end=True),
        state_names=_names(problem, "state_names", n) + _names(problem, "control_names", m),
        control_names=[f"rate of {name}" for name in _names(problem, "control_names", m)],
        constraint_names=problem.constraint_names,
        data=problem.data,
        dtype=problem.dtype,
    )


def _initial(problem: OCP, value: Any) -> Tensor:
    """u(t0), within its bounds."""
    u0 = checks.float_tensor("initial_control", value, problem.dtype, problem.device)
    m, box = problem.control_dim, problem.control_bounds_at(problem.horizon.t0)
    if tuple(u0.shape) not in ((m,), (*problem.batch_shape, m)):
        batch = f" or {(*problem.batch_shape, m)}" if problem.batch_shape else ""
        raise ProblemError(f"initial_control has shape {checks.shape(u0)}; expected {(m,)}{batch}: u at the beginning")
    if box is not None and bool(((u0 < box[0]) | (u0 > box[1])).any()):
        raise ProblemError(
            f"initial_control {u0.tolist()} is outside control_bounds; expected it within: clip it, or widen the bounds"
        )
    graph = checks.traced(value, problem.dtype)
    return u0 if graph is None else graph


def _state_bounds(problem: OCP) -> tuple[Tensor, Tensor] | None:
    """Bounds of (x, u); None where there are none."""
    if problem.state_bounds is None and problem.control_bounds is None:
        return None
    infinite = problem.initial_state.new_tensor(torch.inf)
    sides = []
    for i, free in enumerate((-infinite, infinite)):
        given = ((problem.state_bounds, problem.state_dim), (problem.control_bounds, problem.control_dim))
        parts = [pair[i] if isinstance(pair, tuple) else free.expand(size) for pair, size in given]
        lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        sides.append(torch.cat([part.expand(*lead, part.shape[-1]) for part in parts], dim=-1))
    return sides[0], sides[1]


def _names(problem: OCP, kind: str, size: int) -> list[str]:
    known = getattr(problem, kind)
    letter = "x" if kind == "state_names" else "u"
    return [f"{letter}[{i}]" for i in range(size)] if known is None else list(known)
