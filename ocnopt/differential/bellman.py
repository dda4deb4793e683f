r"""The Bellman sweep: staged controls minimised out, stage by stage, from the end.

In homogeneous coordinates (1, dx) the cost-to-go is one symmetric matrix V: twice the predicted change of cost in
its corner, V_x beside it, V_xx below. A stage is F and L (see :mod:`ocnopt.expansion`). Splitting (1, dx, du) into
s = (1, dx) and u, a stage's step reads

    Q   = L + F^T V' F          (+ V'_x . f_ww on the block of w, exact curvature)
    K   = argmin over du = K s in the box of  du^T Q_us s + 1/2 du^T (Q_uu + mu I) du,   K = [k  K]
    V   = Q_ss + K^T Q_uu K + K^T Q_us + Q_us^T K

with the last line in its general form because K may be regularised or clamped. Under a step of size alpha (alpha g,
alpha k, K) the cost changes by alpha * linear + alpha^2 * quadratic to second order. V_x holds second-order terms of g
and k, so the linear part needs the plain gradient under the feedback beside it: the row J = (linear, J_x) with J = j_s
+ K^T j_u, j = (0, l_w) + F^T J'.

Static controls are part of the state here and need no line of their own until the first stage, where
:func:`minimise_start` chooses them.

Shapes, the batch in front: V ``(1 + n, 1 + n)``, K ``(m, 1 + n)``, J ``(1 + n)``; mu has the batch shape. Source:
Tassa, Mansard and Todorov, "Control-limited differential dynamic programming", ICRA 2014; Mastalli et al., "Crocoddyl",
ICRA 2020 (gaps).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.checks import Bounds
from ocnopt.expansion import StageModel, TerminalModel

# Projected Newton on the box: iterations allowed, and the step sizes tried at once.
_MAX_ITERATIONS = 50
_STEPS = tuple(0.5**i for i in range(8))


class BellmanStage(NamedTuple):
    """What one step of the sweep needs: the model, how far u may still move, and mu I."""

    model: StageModel
    room: Bounds | None
    damping: Tensor


class CostToGo(NamedTuple):
    """V and J; ``solvable`` is False once a Q_uu was not positive definite, and V, J are meaningless then."""

    V: Tensor
    J: Tensor
    solvable: Tensor

    @property
    def linear(self) -> Tensor:
        """Predicted change of cost, the part in alpha."""
        return self.J[..., 0]

    @property
    def quadratic(self) -> Tensor:
        """Predicted change of cost, the part in alpha^2."""
        return 0.5 * self.V[..., 0, 0] - self.J[..., 0]


class StageGains(NamedTuple):
    """``K (m, 1 + n)`` = [k  K], and J_x at the stage's start: the costate where the path is optimal."""

    K: Tensor
    costate: Tensor


def terminal_value(model: TerminalModel) -> CostToGo:
    """V at the end of the path."""
    return CostToGo(model.L, model.L[..., 0, :], torch.ones_like(model.value, dtype=torch.bool))


def bellman_step(stage: BellmanStage, value: CostToGo) -> tuple[CostToGo, StageGains]:
    """Carry V over one stage and read out its gains."""
    n, F, L, fww = stage.model
    VF = value.V @ F
    Q = L + F.mT @ VF
    if fww is not None:
        curvature = (VF[..., None, 1:, 0] @ fww.flatten(-2)).reshape(fww.shape[:-3] + fww.shape[-2:])
        Q[..., 1:, 1:] += curvature
    s = n + 1
    Qus, Quu = Q[..., s:, :s], Q[..., s:, s:]
    K, fine = minimise_box(Quu + stage.damping, Qus, stage.room)
    cross = K.mT @ (Qus + 0.5 * (Quu @ K))
    j = L[..., 0, :] + (F.mT @ value.J[..., None])[..., 0]
    J = j[..., :s] + (K.mT @ j[..., s:, None])[..., 0]
    return CostToGo(Q[..., :s, :s] + cross + cross.mT, J, value.solvable & fine), StageGains(K, J[..., 1:])


def minimise_start(value: CostToGo, q: int, damping: Tensor, room: Bounds | None) -> tuple[Tensor, CostToGo]:
    """Choose the static controls: minimise V over the last q entries of the first state; the others are fixed."""
    Vpp, Vp = value.V[..., -q:, -q:], value.V[..., -q:, :1]
    dp, fine = minimise_box(Vpp + damping, Vp, room)
    V, J = value.V.clone(), value.J.clone()
    V[..., :1, :1] += dp.mT @ (2 * Vp + Vpp @ dp)
    J[..., 0] += (dp[..., 0] * value.J[..., -q:]).sum(-1)
    return dp[..., 0], CostToGo(V, J, value.solvable & fine)


def minimise_box(H: Tensor, G: Tensor, room: Bounds | None) -> tuple[Tensor, Tensor]:
    r"""Minimise d^T (g + H_x x) + 1/2 d^T H d over lower <= d <= upper at x = 0, with the minimiser's response to x.

    Projected Newton steps (Bertsekas 1982; Tassa et al. 2014, section III). d = k + K x with K = -H_ff^-1 H_x on the
    free entries, zero on the clamped.

    Args:
        H: ``(..., m, m)``; the leading axes are independent problems.
        G: [g  H_x], ``(..., m, 1 + n)``.
        room: (lower, upper), each ``(..., m)``; None without bounds.

    Returns:
        [k  K] ``(..., m, 1 + n)`` and whether H was positive definite (the result is meaningless where it was not).
    """
    K, fine = _minimise(H, G, room)
    if room is None or bool(fine.all()):
        return K, fine
    # curvature along an entry that its gradient holds at a bound does not count (Tassa et al. 2014, eq. 15-16)
    g = G[..., 0]
    free = ~(((room[0] >= 0) & (g > 0)) | ((room[1] <= 0) & (g < 0)))
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    held, solvable = _minimise(_restrict(H, free, eye), torch.where(free[..., None], G, 0.0), room)
    return torch.where(fine[..., None, None], K, held), fine | solvable


def _minimise(H: Tensor, G: Tensor, room: Bounds | None) -> tuple[Tensor, Tensor]:
    """The same where H is positive definite."""
    m = G.shape[-2]
    if m == 0:
        return G, torch.ones(G.shape[:-2], dtype=torch.bool, device=G.device)
    if m == 1:
        fine = (H > 0)[..., 0, 0]
        K = -G / H
    else:
        factor, info = torch.linalg.cholesky_ex(H)
        fine = info == 0
        K = -torch.cholesky_solve(G, factor)
    if room is None:
        return K, fine
    k, (lower, upper) = K[..., 0], room
    inside = (k > lower) & (k < upper)
    if bool(inside.all()):
        return K, fine
    if m == 1:
        return torch.cat([k.clamp(lower, upper)[..., None], K[..., 1:] * inside[..., None]], dim=-1), fine
    return _clamped(H, G, k.clamp(lower, upper), lower, upper), fine


def _clamped(H: Tensor, G: Tensor, k: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """[k  K] with some entries at their bounds."""
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    k, free = _projected_newton(H, G[..., 0], k, eye, lower, upper)
    K = -_solve(_restrict(H, free, eye), torch.where(free[..., None], G[..., 1:], 0.0))
    return torch.cat([k[..., None], K], dim=-1)


def _projected_newton(
    H: Tensor, g: Tensor, k: Tensor, eye: Tensor, lower: Tensor, upper: Tensor
) -> tuple[Tensor, Tensor]:
    """The minimiser and which of its entries are free."""
    alphas = g.new_tensor(_STEPS).reshape((-1, *(1,) * g.ndim))
    size = H.abs().amax((-2, -1))[..., None]
    free = torch.ones_like(k, dtype=torch.bool)
    for _ in range(_MAX_ITERATIONS):
        gradient = g + _times(H, k)
        free = ~(((k <= lower) & (gradient > 0)) | ((k >= upper) & (gradient < 0)))
        downhill = torch.where(free, gradient, 0.0)
        # written so that a NaN (a problem already given up) ends the loop
        if not bool((downhill.abs() > 1e-14 * size * (1 + k.abs())).any()):
            break
        newton = -_solve(_restrict(H, free, eye), downhill[..., None])[..., 0]
        trials = (k + alphas * newton).clamp(lower, upper)
        values = ((g + 0.5 * _times(H, trials)) * trials).sum(-1)
        best = values.argmin(0)[None, ..., None].expand(1, *k.shape)
        k = torch.gather(trials, 0, best)[0]
    return k, free


def _restrict(H: Tensor, free: Tensor, eye: Tensor) -> Tensor:
    """H on the free entries, the identity on the clamped ones."""
    return torch.where(free[..., :, None] & free[..., None, :], H, eye)


def _solve(H: Tensor, right: Tensor) -> Tensor:
    """H^-1 right without an error where one of many problems is singular."""
    return torch.linalg.solve_ex(H, right)[0]


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
