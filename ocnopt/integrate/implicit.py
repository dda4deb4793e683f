r"""One step of an implicit Runge-Kutta method, for stiff fields.

Its stage points solve y_i = x + h sum_j a_ij F(t + c_j h, y_j), by Newton's method on all of them together. The points
must be differentiable to second order in whatever the field depends on, as DDP with exact curvature asks. Newton's way
there is not recorded: from the solution y*, held constant, two more steps with the matrix M of the last iteration, held
constant too, are. The first makes first derivatives right, the second second ones:

    y' = y* - M^-1 G(y*),    y'' = y' - M^-1 G(y'),    G(y) = y - x - h A F(y),    M = G_y(y*).

Control problems take this one: few states along the last axis, any axes in front, each with a fate of its own (NaN
where there is no solution), and a new Jacobian in every iteration, which is cheap there. :mod:`ocnopt.integrate.stiff`
is for walks of a Neural ODE: one stage at a time, samples as rows of any shape, a matrix kept as long as it serves.

Source: Hairer and Wanner, Solving Ordinary Differential Equations II, 1996, IV.5 and IV.8 (methods, Newton's method).
"""

import torch
from torch import Tensor

from ocnopt.integrate.runge_kutta import Field, Stages, Time, combine
from ocnopt.integrate.tableaus import Tableau

# Newton's iterations allowed. It converges quadratically: what has not settled by then has no solution nearby.
_MOST = 25


def is_stiffly_accurate(tableau: Tableau) -> bool:
    """Whether the last stage point is the next state."""
    return tableau.a[-1] == tableau.b


def implicit_step(tableau: Tableau, field: Field, t: Time, h: float, x: Tensor) -> tuple[Tensor, Stages]:
    """Take one step of size h from x at time t: the next state and the stages; NaN where no solution was found.

    Args:
        tableau: implicit.
        field: F(t, x), every state on its own.
        t: number, or a tensor that broadcasts against ``x[..., 0]``.
        h: size of the step.
        x: ``(..., n)``.
    """
    times: list[Time] = [t + c * h for c in tableau.c]
    with torch.no_grad():
        points, matrix = _newton(tableau, field, times, h, x.detach())
    if torch.is_grad_enabled():
        for _ in range(2):
            points = _correct(points, matrix, _residual(tableau, field, times, h, x, points))
    slopes = [field(time, y) for time, y in zip(times, points, strict=True)]
    end = points[-1] if is_stiffly_accurate(tableau) else combine(x, h, tableau.b, slopes)
    return end, Stages(times, points, slopes)


def _residual(tableau: Tableau, field: Field, times: list[Time], h: float, x: Tensor, points: list[Tensor]) -> Tensor:
    """G ``(..., s n)``."""
    slopes = [field(time, y) for time, y in zip(times, points, strict=True)]
    return torch.cat([y - combine(x, h, row, slopes) for y, row in zip(points, tableau.a, strict=True)], dim=-1)


def _correct(points: list[Tensor], matrix: Tensor, residual: Tensor) -> list[Tensor]:
    step = torch.linalg.solve_ex(matrix, residual[..., None])[0][..., 0]
    return [y - part for y, part in zip(points, step.chunk(len(points), dim=-1), strict=True)]


def _newton(tableau: Tableau, field: Field, times: list[Time], h: float, x: Tensor) -> tuple[list[Tensor], Tensor]:
    """The stage points, and G_y there."""
    s, n = len(tableau.c), x.shape[-1]
    eye = torch.eye(s * n, dtype=x.dtype, device=x.device)
    lead = torch.broadcast_shapes(x.shape, field(times[0], x).shape)
    points = [x.expand(lead)] * s
    settled, matrix = torch.zeros(lead[:-1], dtype=torch.bool, device=x.device), eye
    tolerance = 1e2 * torch.finfo(x.dtype).eps
    for _ in range(_MOST):
        slopes, blocks = zip(*(_slope(field, time, y) for time, y in zip(times, points, strict=True)), strict=True)
        rows = [torch.cat([a * J for a, J in zip(row, blocks, strict=True)], dim=-1) for row in tableau.a]
        matrix = eye - h * torch.cat(rows, dim=-2)
        residual = torch.cat([y - combine(x, h, row, slopes) for y, row in zip(points, tableau.a, strict=True)], dim=-1)
        moved = _correct(points, matrix, residual)
        change = torch.stack([(new - old).abs().amax(-1) for new, old in zip(moved, points, strict=True)]).amax(0)
        size = torch.stack([y.abs().amax(-1) for y in moved]).amax(0)
        points, settled = moved, settled | (change <= tolerance * (1 + size))
        # what is not finite will not settle
        if bool((settled | ~torch.isfinite(change)).all()):
            break
    return [torch.where(settled[..., None], y, torch.nan) for y in points], matrix


def _slope(field: Field, time: Time, y: Tensor) -> tuple[Tensor, Tensor]:
    """F and its Jacobian ``(..., n, n)`` at a point."""
    with torch.enable_grad():
        leaf = y.detach().requires_grad_()
        slope = field(time, leaf)
        if not slope.requires_grad:
            return slope.detach(), y.new_zeros((*slope.shape, y.shape[-1]))
        rows = [
            torch.autograd.grad(slope[..., i].sum(), leaf, retain_graph=True, materialize_grads=True, allow_unused=True)
            for i in range(slope.shape[-1])
        ]
    return slope.detach(), torch.stack([row for (row,) in rows], dim=-2)
