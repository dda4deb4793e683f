r"""Derivatives in a free end time by formulas at the end of the path: a second route beside T as a static control.

With g(T, x, p) = Phi_T + Phi_x . F + l at the end,

    Q_T = g      Q_TT = g_T + g_x . F      Q_Tp = J^T g_x + g_p,   J = dx(T)/dp

J^T g_x takes one adjoint solve with the terminal value g_x and no running cost. Both routes agree where there are no
staged controls; with them, the lifted problem stretches the grid of the controls, which this one does not know.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.differential.columns import columns_of
from ocnopt.differential.flow import Flow, read_request
from ocnopt.differential.path import back, trace
from ocnopt.differential.sweep import sweep
from ocnopt.errors import ProblemError
from ocnopt.linearise import gradient
from ocnopt.ocp import OCP


class HorizonDerivatives(NamedTuple):
    """Means over the batch: T ``()``, TT ``()``, Tp ``(q,)``."""

    T: Tensor
    TT: Tensor
    Tp: Tensor


def horizon_derivatives(
    problem: OCP,
    *,
    parameters: Tensor | None = None,
    horizon: float | Tensor | None = None,
    rtol: float = 1e-8,
    atol: float = 1e-8,
) -> HorizonDerivatives:
    """Differentiate the mean cost in the end time, at the end of the path.

    Args:
        problem: a problem with a free horizon and no staged controls.
        parameters: p ``(q,)``; None takes the problem's.
        horizon: T; None takes the problem's initial guess.
        rtol: relative tolerance of the solves.
        atol: absolute tolerance of the solves.

    Raises:
        ProblemError: the horizon is fixed, or there are staged controls.

    >>> from ocnopt.ocp import FreeHorizon
    >>> problem = OCP(lambda t, x, u: 0 * x + 1, None, lambda t, x: x[..., 0] ** 2,
    ...               initial_state=[0.0], horizon=FreeHorizon(3.0, 1.0, 5.0))
    >>> [round(float(d), 6) for d in horizon_derivatives(problem)[:2]]
    [6.0, 2.0]
    """
    if problem.control_dim:
        raise ProblemError(
            f"the problem has {problem.control_dim} staged controls; the formulas at the end expect none: use "
            "oc.differentiate(problem, controls=...)"
        )
    free, controls = read_request(problem, parameters, None, horizon, rtol, atol)
    if not free.lifted.free:
        raise ProblemError("the horizon is fixed; expected a FreeHorizon, whose end time has derivatives")
    p, T = free.lifted.split(free.p)
    lifted = replace(free.lifted, t0=problem.horizon.t0, t1=float(T), parameters=p, parameter_bounds=None, free=False)
    fixed = replace(free, lifted=lifted, p=p)
    path, _ = trace(fixed, controls)
    end = _at_the_end(free, fixed, path.end[0])
    none = p.new_zeros((*fixed.batch, 1))
    terminal = columns_of(fixed, end.x[..., None, :], p.new_zeros((*none.shape, len(p))), none)
    J_gx = sweep(partial(back, fixed), path.stretches, terminal)[0].p
    return HorizonDerivatives(end.value / free.samples, end.T / free.samples, (J_gx + end.p) / free.samples)


class _End(NamedTuple):
    """g, dg/dT along the path and g_p, summed over the samples; g_x per sample."""

    value: Tensor
    T: Tensor
    x: Tensor
    p: Tensor


@torch.enable_grad()
def _at_the_end(free: Flow, fixed: Flow, x: Tensor) -> _End:
    point, p, T = (v.detach().clone().requires_grad_() for v in (x, fixed.p, free.p[-1]))
    Phi = free.lifted.terminal_cost(point, torch.cat([p, T[None]])).sum()
    Phi_x, Phi_T = gradient(Phi, (point, T), create_graph=True)
    F = fixed.dynamics(T, point, p)
    g = Phi_T + (Phi_x * F).sum() + fixed.running_cost(T, point, p).sum()
    gx, gp, gT = gradient(g, (point, p, T))
    return _End(g.detach(), gT + (gx * F.detach()).sum(), gx, gp)
