r"""The one backward pass, a right fold over the links of a path; and its step over control steps, Bellman's.

A *link* is a piece of the path (a control step, an accepted Runge-Kutta step, a stretch of continuous time, a layer), a
*value* a local model of the cost-to-go Q from its end on. ``step`` carries the value from the end of a link to its
start and may read something out (gains, gradients, factors); the methods of this library differ in ``step`` alone (see
the table in :mod:`ocnopt.differential`). What accumulates along the path is part of the value, so nothing of the size
of the parameters is stored per link.

**The Bellman step** minimises the staged control out.

In homogeneous coordinates (1, dx) the cost-to-go is one symmetric matrix V: twice the predicted change of cost in
its corner, V_x beside it, V_xx below. A step is F and L (see :mod:`ocnopt.linearise`). Splitting (1, dx, du)
into s = (1, dx) and u, the sweep over a step reads

    Q   = L + mu I + F^T V' F   (mu on x and u; + V'_x . f_ww on the block of w, exact curvature)
    K   = argmin over du = K s in the box of  du^T Q_us s + 1/2 du^T Q_uu du,   K = [k  K]
    V   = Q_ss + K^T Q_uu K + K^T Q_us + Q_us^T K

with the last line in its general form because K may be clamped. The regularisation mu is a cost of what moves, of every
x_k and u_k alike, and V holds it: the whole sweep minimises the model plus mu/2 (|dx|^2 + |du|^2), as Levenberg and
Marquardt do. A V of the gains alone turns indefinite sooner and asks for a larger mu. Under a step of size alpha (alpha
g, alpha k, K) cost and regularisation change by alpha * linear + alpha^2 * quadratic to second order. V_x holds
second-order terms of g and k, so the linear part needs the plain gradient under the feedback beside it: the row J =
(linear, J_x) with J = j_s + K^T j_u, j = (0, l_w) + F^T J'.

Static controls are part of the state here and need no line of their own until the first step, where
:func:`minimise_start` chooses them. Nothing here asks the values which way to go, so that a GPU never waits for its
host; the one exception is the box of three or more controls.

Shapes, the batch in front: V ``(1 + n, 1 + n)``, K ``(m, 1 + n)``, J ``(1 + n)``; mu has the batch shape. Source:
Tassa, Mansard and Todorov, "Control-limited differential dynamic programming", ICRA 2014; Mastalli et al., "Crocoddyl",
ICRA 2020 (gaps).
"""

from collections.abc import Callable, Reversible, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ocnopt.checks import Bounds
from ocnopt.linearise import StepCurvature, StepModels
from ocnopt.paths import Path, Widened, fitted

# Projected Newton on the box: iterations allowed, and the step sizes tried at once.
_MAX_ITERATIONS = 50
_STEPS = tuple(0.5**i for i in range(8))

Link = TypeVar("Link")
Value = TypeVar("Value")
Out = TypeVar("Out")


def sweep(
    step: Callable[[Link, Value], tuple[Value, Out]], links: Reversible[Link], terminal: Value
) -> tuple[Value, list[Out]]:
    """Fold ``step`` over ``links`` from the last to the first.

    Args:
        step: ``step(link, value at its end) -> (value at its start, readout)``.
        links: the links in the order of the path; anything that ``reversed`` accepts.
        terminal: the value at the end of the path.

    Returns:
        The value at the start of the path, and the readouts in the order of the path.

    >>> sweep(lambda cost, value: (cost + value, value), [1, 2, 3], 10)
    (16, [15, 13, 10])
    """
    value = terminal
    readouts: list[Out] = []
    for link in reversed(links):
        value, readout = step(link, value)
        readouts.append(readout)
    return value, readouts[::-1]


class BellmanStep(NamedTuple):
    """What the sweep needs at step k: its model, c . f_ww, how far u may still move, and mu I on u and on s."""

    F: Tensor
    L: Tensor
    curvature: StepCurvature | None
    room: Bounds | None
    damping: Tensor
    state_damping: Tensor | None = None


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


class StepGains(NamedTuple):
    """``K (m, 1 + n)`` = [k  K], and J_x at the step's start: the costate where the path is optimal."""

    K: Tensor
    costate: Tensor


def bellman_step(step: BellmanStep, value: CostToGo) -> tuple[CostToGo, StepGains]:
    """Carry V over one step and read out its gains."""
    F, L, s = step.F, step.L, step.L.shape[-1] - step.damping.shape[-1]
    VF = value.V @ F
    Q = L + F.mT @ VF
    if step.curvature is not None:
        Q[..., 1:, 1:] += step.curvature.times(VF[..., 1:, 0])
    if step.state_damping is not None:
        Q[..., :s, :s] += step.state_damping
    Qus, Quu = Q[..., s:, :s], Q[..., s:, s:] + step.damping
    K, fine = minimise_box(Quu, Qus, step.room)
    cross = K.mT @ (Qus + 0.5 * (Quu @ K))
    j = L[..., 0, :] + (F.mT @ value.J[..., None])[..., 0]
    J = j[..., :s] + (K.mT @ j[..., s:, None])[..., 0]
    return CostToGo(Q[..., :s, :s] + cross + cross.mT, J, value.solvable & fine), StepGains(K, J[..., 1:])


def minimise_start(value: CostToGo, q: int, damping: Tensor, room: Bounds | None) -> tuple[Tensor, CostToGo]:
    """Choose the static controls: minimise V over the last q entries of the first state; the others are fixed."""
    Vpp, Vp = value.V[..., -q:, -q:], value.V[..., -q:, :1]
    dp, fine = minimise_box(Vpp + damping, Vp, room)
    V, J = value.V.clone(), value.J.clone()
    V[..., :1, :1] += dp.mT @ (2 * Vp + Vpp @ dp)
    J[..., 0] += (dp[..., 0] * value.J[..., -q:]).sum(-1)
    return dp[..., 0], CostToGo(V, J, value.solvable & fine)


class Direction(NamedTuple):
    """What a sweep finds, time in front: gains, costates, the step dp of the static controls, the predicted change.

    k ``(N, *lead, m)``, K ``(N, *lead, m, n)``, costates ``(N + 1, *lead, n)``, dp ``(*lead, q)``. With a step of size
    alpha the cost changes by alpha * linear + alpha^2 * quadratic, both ``(*lead)``, where ``solvable``.
    """

    k: Tensor
    K: Tensor
    costates: Tensor
    dp: Tensor
    linear: Tensor
    quadratic: Tensor
    solvable: Tensor


StartRule = Callable[[CostToGo, int, Tensor, Bounds | None], tuple[Tensor, CostToGo]]


def sweep_path(
    wide: Widened,
    path: Path,
    models: StepModels,
    terminal: Tensor,
    mu: Tensor,
    start: StartRule = minimise_start,
) -> Direction:
    """Sweep backwards over the models of a path, then let ``start`` minimise over the static controls."""
    damping = mu[..., None, None] * torch.eye(wide.m, dtype=mu.dtype, device=mu.device)
    moving = torch.zeros(1 + wide.n, dtype=mu.dtype, device=mu.device)
    moving[1 : 1 + wide.n - wide.q] = 1
    state_damping = mu[..., None, None] * torch.diag(moving)
    rooms = _rooms(wide, path)
    curvature: Sequence[StepCurvature | None] = models.curvature or [None] * wide.steps
    steps = [
        BellmanStep(F, L, curved, room, damping, state_damping)
        for F, L, curved, room in zip(models.F.unbind(0), models.L.unbind(0), curvature, rooms, strict=True)
    ]
    end = CostToGo(terminal, terminal[..., 0, :], torch.ones_like(path.cost, dtype=torch.bool))
    value, gains = sweep(bellman_step, steps, end)
    K = torch.stack([gain.K for gain in gains])
    dp = path.states[0][..., :0]
    if wide.q:
        p, damping = path.states[0][..., -wide.q :], mu[..., None, None] * torch.eye(wide.q).to(mu)
        dp, value = start(value, wide.q, damping, _room(wide.parameter_bounds, p))
    return Direction(
        k=K[..., 0],
        K=K[..., 1:],
        costates=torch.stack([*(gain.costate for gain in gains), terminal[..., 0, 1:]]),
        dp=dp,
        linear=value.linear,
        quadratic=value.quadratic,
        solvable=value.solvable & torch.isfinite(value.linear),
    )


def _room(bounds: Bounds | None, value: Tensor) -> Bounds | None:
    return None if bounds is None else (bounds[0] - value, bounds[1] - value)


def _rooms(wide: Widened, path: Path) -> list[Bounds] | list[None]:
    """How far the controls of each step may move."""
    if wide.control_bounds is None:
        return [None] * wide.steps
    lower, upper = fitted(wide.control_bounds, path.controls)
    return list(zip((lower - path.controls).unbind(0), (upper - path.controls).unbind(0), strict=True))


def minimise_box(H: Tensor, Hs: Tensor, room: Bounds | None) -> tuple[Tensor, Tensor]:
    r"""Minimise d^T H_s s + 1/2 d^T H d over lower <= d <= upper at s = (1, 0), and the response to x in s = (1, x).

    d = k + K x with K = -H_ff^-1 H_x on the free entries, zero on the clamped. One entry is clamped, two take the best
    point of four edges, more are found by projected Newton steps (Bertsekas 1982; Tassa et al. 2014, section III).

    Args:
        H: ``(..., m, m)``; the leading axes are independent problems.
        Hs: H_s = [g  H_x], ``(..., m, 1 + n)``.
        room: (lower, upper), each ``(..., m)``; None without bounds.

    Returns:
        [k  K] ``(..., m, 1 + n)`` and whether H was positive definite (the result is meaningless where it was not).
    """
    m, fine = Hs.shape[-2], _positive_definite(H)
    if room is None or m == 0:
        return -_solve(H, Hs) if m else Hs, fine
    # curvature along an entry that its gradient holds at a bound does not count (Tassa et al. 2014, eq. 15-16)
    lower, upper = room
    held = _pushing(torch.zeros_like(Hs[..., 0]), Hs[..., 0], lower, upper) & ~fine[..., None]
    eye = torch.eye(m, dtype=H.dtype, device=H.device)
    H, Hs = _restrict(H, ~held, eye), torch.where(held[..., None], 0.0, Hs)
    fine = _positive_definite(H)
    if m == 1:
        k = -Hs / H
        inside = (k[..., 0] > lower) & (k[..., 0] < upper)
        return torch.cat([k[..., 0].clamp(lower, upper)[..., None], k[..., 1:] * inside[..., None]], dim=-1), fine
    start = -_solve(H, Hs[..., :1])[..., 0]
    k = (_best_edge if m == 2 else _projected_newton)(H, Hs[..., 0], start, lower, upper)
    free = ~_pushing(k, Hs[..., 0] + _times(H, k), lower, upper)
    K = -_solve(_restrict(H, free, eye), torch.where(free[..., None], Hs[..., 1:], 0.0))
    return torch.cat([k[..., None], K], dim=-1), fine


def _pushing(d: Tensor, gradient: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Which entries stand at a bound and are pushed against it."""
    return ((d <= lower) & (gradient > 0)) | ((d >= upper) & (gradient < 0))


def _best_edge(H: Tensor, g: Tensor, d: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The minimiser over a rectangle: d, the one without bounds, if it lies inside; else the best point of an edge."""
    other = d.new_tensor([1, 0], dtype=torch.long)
    fixed = torch.stack([lower.expand_as(d), upper.expand_as(d)])
    # entry i at a bound, the other one free: clipped to its own bounds this covers the corners too
    curvature, cross = torch.diagonal(H, dim1=-2, dim2=-1)[..., other], H[..., :1, 1]
    along = (-(g[..., other] + cross * fixed) / curvature).clamp(lower[..., other], upper[..., other])
    first, second = torch.stack([fixed[..., 0], along[..., 0]], -1), torch.stack([along[..., 1], fixed[..., 1]], -1)
    edges = torch.cat([first, second])
    value = ((g + 0.5 * _times(H, edges)) * edges).sum(-1)
    # an infinite bound has no edge
    best = torch.where(torch.isfinite(value), value, torch.inf).argmin(0)[None, ..., None].expand(1, *d.shape)
    inside = ((d >= lower) & (d <= upper)).all(-1, keepdim=True)
    return torch.where(inside, d, torch.gather(edges, 0, best)[0])


def _projected_newton(H: Tensor, g: Tensor, d: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The minimiser over a box."""
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    alphas = g.new_tensor(_STEPS).reshape((-1, *(1,) * g.ndim))
    size = H.abs().amax((-2, -1))[..., None]
    k = d.clamp(lower, upper)
    for _ in range(_MAX_ITERATIONS):
        gradient = g + _times(H, k)
        free = ~_pushing(k, gradient, lower, upper)
        downhill = torch.where(free, gradient, 0.0)
        # written so that a NaN (a problem already given up) ends the loop
        if not bool((downhill.abs() > 1e-14 * size * (1 + k.abs())).any()):
            break
        newton = -_solve(_restrict(H, free, eye), downhill[..., None])[..., 0]
        trials = (k + alphas * newton).clamp(lower, upper)
        values = ((g + 0.5 * _times(H, trials)) * trials).sum(-1)
        best = values.argmin(0)[None, ..., None].expand(1, *k.shape)
        k = torch.gather(trials, 0, best)[0]
    return k


def _positive_definite(H: Tensor) -> Tensor:
    m = H.shape[-1]
    if m == 0:
        return torch.ones(H.shape[:-2], dtype=torch.bool, device=H.device)
    if m <= 2:
        fine = H[..., 0, 0] > 0
        return fine if m == 1 else fine & (H[..., 1, 1] - H[..., 0, 1].square() / H[..., 0, 0] > 0)
    return torch.linalg.cholesky_ex(H)[1] == 0


def _restrict(H: Tensor, free: Tensor, eye: Tensor) -> Tensor:
    """H on the free entries, the identity on the clamped ones."""
    return torch.where(free[..., :, None] & free[..., None, :], H, eye)


def _solve(H: Tensor, right: Tensor) -> Tensor:
    """H^-1 right, for symmetric H, without an error where one of many problems is singular."""
    if H.shape[-1] == 1:
        return right / H
    if H.shape[-1] > 2:
        return torch.linalg.solve_ex(H, right)[0]
    factor = H[..., :1, 1:] / H[..., :1, :1]
    second = (right[..., 1:, :] - factor * right[..., :1, :]) / (H[..., 1:, 1:] - factor * H[..., :1, 1:])
    return torch.cat([(right[..., :1, :] - H[..., :1, 1:] * second) / H[..., :1, :1], second], dim=-2)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]
