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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt import checks
from ocnopt.differential.flow import Flow, read_request
from ocnopt.differential.stretches import Gather, Readout, back, walk
from ocnopt.differential.sweep import sweep
from ocnopt.errors import ProblemError
from ocnopt.integrate.runge_kutta import Time
from ocnopt.linearise import fixed_direction, gradient, leaves
from ocnopt.ocp import OCP


@dataclass(frozen=True, eq=False)
class Directional:
    """The costate a, its derivative da along the direction v, the witness r . hv; hv itself grows in place."""

    integrated: ClassVar[tuple[str, ...]] = ("a", "da", "seen")
    a: Tensor
    da: Tensor
    seen: Tensor
    hv: Tensor
    v: Tensor
    r: Tensor

    @classmethod
    @torch.enable_grad()
    def terminal(cls, flow: Flow, v: Tensor, x: Tensor, dx: Tensor) -> "Directional":
        """The derivatives of Phi."""
        point, p = leaves(x, flow.p, False)
        gx, gp = gradient(flow.lifted.terminal_cost(point, p), (point, p), create_graph=True)
        da, hv = gradient((gx * dx).sum() + (gp * v).sum(), (point, p))
        return cls(gx.detach(), da, v.new_zeros(()), hv, v, fixed_direction(v))

    def widen(self, m: int) -> "Directional":
        """Nothing is asked in u."""
        return self

    def narrow(self, n: int) -> tuple["Directional", Readout | None]:
        """Nothing to read out."""
        return self, None

    @torch.enable_grad()
    def rates(
        self, field: Flow, t: Time, x: Tensor, dx: Tensor, a: Tensor, da: Tensor, *, wanted: bool
    ) -> tuple[Sequence[Tensor], Gather]:
        """The three lines above, as the gradient of S."""
        (point, p), costate = leaves(x, field.p, False), a.detach().requires_grad_()
        F = field.lifted.dynamics(t, point, field.u, p)
        H = field.lifted.running_cost(t, point, field.u, p) + (costate * F).sum(-1)
        Hx, Hp = gradient(H, (point, p), create_graph=True)
        S = (Hx * dx).sum() + (Hp * self.v).sum() + (F * da).sum()
        Sx, Sp, Sa = gradient(S, (point, p, costate))
        rates = [F.detach(), Sa, -Hx.detach(), -Sx, -(Sp @ self.r)]
        return rates, lambda weight: self.hv.add_(Sp, alpha=weight)


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
    path = walk(flow, controls, partial(_forward_rates, v), (x, torch.zeros_like(x)), kept=2)
    value, _ = sweep(partial(back, flow), path.stretches, Directional.terminal(flow, v, *path.end))
    return value.hv / flow.samples


@torch.enable_grad()
def _forward_rates(v: Tensor, flow: Flow, t: Time, x: Tensor, dx: Tensor) -> list[Tensor]:
    (point, p), y = leaves(x, flow.p, False), torch.ones_like(x).requires_grad_()
    F = flow.lifted.dynamics(t, point, flow.u, p)
    Fx, Fp = gradient(F * y, (point, p), create_graph=True)
    return [F.detach(), *gradient((Fx * dx).sum() + (Fp * v).sum(), (y,))]
