r"""Hessian-vector products: one solve forward, one backward, no matrix.

With H = l + a . F, a direction v in p and the state's own direction dx, forward

    d(dx)/dt = F_x dx + F_p v,   dx(t0) = 0

and backward, from a = Phi_x, da = Phi_xx dx + Phi_xp v, hv = Phi_px dx + Phi_pp v at the end,

    -d(a)/dt  = H_x
    -d(da)/dt = H_xx dx + H_xp v + F_x^T da
    -d(hv)/dt = H_px dx + H_pp v + F_p^T da

All of it is one gradient: S = H_x . dx + H_p . v + F . da has S_x and S_p on the right of the last two lines, and
S_a = F_x dx + F_p v. hv is a sum over the samples, so the Hessian of the mean cost times v is hv(t0)/B.
Shapes: x, dx, a, da ``(*batch, n)``; v, hv ``(q,)``.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt import checks
from ocnopt.differential.flow import Flow
from ocnopt.differential.path import Piece, walk, walk_back
from ocnopt.differential.request import read_request
from ocnopt.differential.sweep import sweep
from ocnopt.errors import ProblemError
from ocnopt.linearise import gradient, leaves
from ocnopt.ocp import OCP


class Directional(NamedTuple):
    """The costate a, its derivative da along the direction, and hv."""

    a: Tensor
    da: Tensor
    hv: Tensor


def hvp(
    problem: OCP,
    p: Tensor | None,
    v: Tensor,
    *,
    controls: Tensor | None = None,
    horizon: float | Tensor | None = None,
    rtol: float = 1e-8,
    atol: float = 1e-8,
) -> Tensor:
    """Multiply the Hessian of the mean cost in the static controls with a vector.

    Args:
        problem: a problem in continuous time, its batch read as samples that share p and T.
        p: where, ``(q,)``; None takes the problem's parameters.
        v: ``(q,)``; with a free horizon also ``(q + 1,)``, T last, for the Hessian in (p, T).
        controls: ``(..., N, m)``, constant on each of N equal steps; required where the problem has staged controls.
        horizon: the end time T; None takes the problem's (a free horizon's initial guess).
        rtol: relative tolerance of one step; no tighter than the rounding of the problem's dtype.
        atol: absolute tolerance, likewise.

    Returns:
        The product, of the size of v.

    Raises:
        ProblemError: an argument does not fit the problem.
        NonFiniteError: the path leaves the finite numbers.
        ConvergenceError: the tolerance cannot be met.

    Example:
        With dx/dt = p x and the cost x(1)^2 / 2 from x(0) = 1 the Hessian is 2 exp(2 p).

        >>> problem = OCP(lambda t, x, u, p: p[..., :1] * x, None, lambda t, x, p: x[..., 0] ** 2 / 2,
        ...               initial_state=[1.0], parameters=[0.0], horizon=1.0)
        >>> round(float(hvp(problem, torch.zeros(1), torch.tensor([3.0]))), 6)
        6.0
    """
    flow, controls = read_request(problem, p, controls, horizon, rtol, atol)
    vector = checks.float_tensor("v", v, problem.dtype, problem.device)
    sizes = [size for size in (problem.parameter_dim, flow.p.shape[0]) if size]
    if vector.ndim != 1 or vector.shape[0] not in sizes:
        raise ProblemError(f"v has shape {checks.shape(vector)}; expected {_wanted(sizes)}")
    padded = pad(vector, (0, flow.p.shape[0] - vector.shape[0]))
    return _hessian_times(flow, controls, padded)[: vector.shape[0]]


def _wanted(sizes: list[int]) -> str:
    if not sizes:
        return "a problem with parameters or a FreeHorizon: this one has nothing to differentiate in"
    return (
        " or ".join(f"({size},)" for size in dict.fromkeys(sizes))
        + ": one entry per parameter, then T where it is free"
    )


def _hessian_times(flow: Flow, controls: Tensor, v: Tensor) -> Tensor:
    """The Hessian in (p, T) times v."""
    x = flow.lifted.initial_state
    path = walk(flow, controls, partial(_forward_rates, flow, v), (x, torch.zeros_like(x)), kept=2)
    terminal = _terminal(flow, v, *path.end)
    value, _ = sweep(partial(_carry, flow, v), path.pieces, terminal)
    return value.hv / flow.samples


@torch.enable_grad()
def _forward_rates(flow: Flow, v: Tensor, t: float, u: Tensor, x: Tensor, dx: Tensor) -> list[Tensor]:
    (point, p), w = leaves(x, flow.p, False), torch.ones_like(x).requires_grad_()
    F = flow.lifted.dynamics(t, point, u, p)
    Fx, Fp = gradient(F * w, (point, p), create_graph=True)
    return [F.detach(), *gradient((Fx * dx).sum() + (Fp * v).sum(), (w,))]


@torch.enable_grad()
def _terminal(flow: Flow, v: Tensor, x: Tensor, dx: Tensor) -> Directional:
    point, p = leaves(x, flow.p, False)
    gx, gp = gradient(flow.lifted.terminal_cost(point, p), (point, p), create_graph=True)
    da, hv = gradient((gx * dx).sum() + (gp * v).sum(), (point, p))
    return Directional(gx.detach(), da, hv)


def _carry(flow: Flow, v: Tensor, piece: Piece, value: Directional) -> tuple[Directional, None]:
    a, da, hv = walk_back(flow, piece, partial(_backward_rates, flow, v, piece.u), value)
    return Directional(a, da, hv), None


@torch.enable_grad()
def _backward_rates(
    flow: Flow, v: Tensor, u: Tensor, t: float, x: Tensor, dx: Tensor, a: Tensor, da: Tensor, _: Tensor
) -> list[Tensor]:
    (point, p), costate = leaves(x, flow.p, False), a.detach().requires_grad_()
    F = flow.lifted.dynamics(t, point, u, p)
    H = flow.lifted.running_cost(t, point, u, p) + (costate * F).sum(-1)
    Hx, Hp = gradient(H, (point, p), create_graph=True)
    S = (Hx * dx).sum() + (Hp * v).sum() + (F * da).sum()
    Sx, Sp, Sa = gradient(S, (point, p, costate))
    return [F.detach(), Sa, -Hx.detach(), -Sx, -Sp]
