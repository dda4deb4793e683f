r"""Derivatives in a free end time by formulas at the end of the path: an oracle for T as a static control.

With g(T, x, p) = Phi_T + Phi_x . F + l at the end,

    Q_T = g      Q_TT = g_T + g_x . F      Q_Tp = J^T g_x + g_p,   J = dx(T)/dp

J^T g_x takes one adjoint solve with the terminal value g_x and no running cost. Only for problems without staged
controls, whose grid stretches with T.
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.differential.columns import columns_of
from ocnopt.differential.flow import Flow, read_request
from ocnopt.differential.stretches import back, trace
from ocnopt.differential.sweep import sweep
from ocnopt.linearise import gradient
from ocnopt.ocp import OCP


class EndTimeDerivatives(NamedTuple):
    """Means over the batch: T ``()``, TT ``()``, Tp ``(q,)``."""

    T: Tensor
    TT: Tensor
    Tp: Tensor


def end_time_derivatives(
    problem: OCP, parameters: Tensor | None = None, horizon: float | None = None
) -> EndTimeDerivatives:
    """Differentiate the mean cost in the end time, at the end of the path."""
    free, controls = read_request(problem, parameters, None, horizon, 1e-8, 1e-8)
    p, T = free.lifted.split(free.p)
    lifted = replace(free.lifted, t0=problem.horizon.t0, t1=float(T), parameters=p, parameter_bounds=None, free=False)
    fixed = replace(free, lifted=lifted, p=p)
    path, _ = trace(fixed, controls)
    g, gT, gx, gp = _at_the_end(free, fixed, path.end[0])
    none = p.new_zeros((*fixed.batch, 1))
    terminal = columns_of(fixed, gx[..., None, :], p.new_zeros((*none.shape, len(p))), none)
    J_gx = sweep(partial(back, fixed), path.stretches, terminal)[0].p
    return EndTimeDerivatives(g / free.samples, gT / free.samples, (J_gx + gp) / free.samples)


@torch.enable_grad()
def _at_the_end(free: Flow, fixed: Flow, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g, dg/dT along the path, g_x, g_p; all but g_x summed over the samples."""
    point, p, T = (v.detach().clone().requires_grad_() for v in (x, fixed.p, free.p[-1]))
    Phi = free.lifted.terminal_cost(point, torch.cat([p, T[None]])).sum()
    Phi_x, Phi_T = gradient(Phi, (point, T), create_graph=True)
    F = fixed.dynamics(T, point, p)
    g = Phi_T + (Phi_x * F).sum() + fixed.running_cost(T, point, p).sum()
    gx, gp, gT = gradient(g, (point, p, T))
    return g.detach(), gT + (gx * F.detach()).sum(), gx, gp
