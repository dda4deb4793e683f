r"""One step of a singly diagonally implicit Runge-Kutta method with an explicit first stage, for stiff fields.

Each stage but the first solves y = r + h g F(t, y), with r = x + h sum_{j<i} a_ij k_j and g the entry on the diagonal,
by Newton's method with the matrix M = 1 - h g F_y of the step's start, made anew where it converges slowly. The slope
is k = (y - r) / (h g): F(t, y) itself would multiply what rounding leaves of the error in y by the stiffness.

Newton's way is not recorded. From the solution y*, held constant, the step is one more iteration, with M at y*:

    y' = y* - M^-1 (y* - h g F(t, y*) - r),    dy' = M^-1 (dr + h g F_theta dtheta + ...),

which is the implicit function theorem; a second one makes second derivatives right (:mod:`ocnopt.integrate.implicit`).

A sample is what lies along the leading axis of the state, all of a state without one or of a vector; samples must not
meet in the field, or M is not its derivative. Stages that must be solved for together are those of
:mod:`ocnopt.integrate.implicit`. Source: Hairer and Wanner, Solving Ordinary Differential Equations II, IV.8.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ocnopt.integrate.tableaus import Tableau

# Newton's iterations allowed, and the contraction from which on a new matrix pays.
_MOST, _SLOW = 30, 0.2

Field = Callable[[float | Tensor, Tensor], Tensor]


def solve_stages(
    tableau: Tableau,
    field: Field,
    t: float | Tensor,
    h: float | Tensor,
    x: Tensor,
    first: Tensor | None = None,
    inner: Field | None = None,
) -> tuple[list[float | Tensor], list[Tensor], list[Tensor]]:
    """Times, points and slopes of the stages of one step; all NaN from a stage on that has no solution for some sample.

    Args:
        tableau: singly diagonally implicit, its first stage explicit, its last one the next state.
        field: F(t, x), evaluated once a stage where there is a graph.
        t: time.
        h: size of the step.
        x: the state.
        first: F(t, x), where it is known.
        inner: F(t, x) for Newton's iterations, if these are not to be seen by ``field``; first derivatives alone are
            right then.
    """
    times: list[float | Tensor] = [t + c * h for c in tableau.c]
    newton = _Newton(field if inner is None else inner, x)
    points, slopes = [x], [field(t, x) if first is None else first]
    for time, row in zip(times[1:], tableau.a[1:], strict=True):
        i = len(points)
        step = h * row[i]
        r = x
        for a, slope in zip(row[:i], slopes, strict=True):
            r = r + slope * (h * a)
        with torch.no_grad():
            guess = torch.add(r, slopes[-1], alpha=float(step)).detach()
            y = newton.solve(time, step, r.detach(), guess)
        if torch.is_grad_enabled():
            M = newton.matrix(time, step, y)
            # Still constant, with a derivative of zero: a field that differentiates inside needs a graph to start from.
            y = torch.where(torch.zeros((), dtype=torch.bool, device=y.device), r, y)
            for _ in range(1 if inner is not None else 2):
                y = y - newton.apply(M, y - step * field(time, y) - r)
        points.append(y)
        slopes.append((y - r) / step)
    return times, points, slopes


class _Newton:
    """Solves the equations of one step, samples as rows ``(B, n)``."""

    def __init__(self, field: Field, x: Tensor) -> None:
        self._field, self._shape = field, x.shape
        self._rows = (len(x), -1) if x.ndim > 1 and x.numel() else (1, -1)
        self._x, self._tolerance = x.detach(), 1e2 * torch.finfo(x.dtype).eps
        self._M: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def matrix(self, time: float | Tensor, step: float | Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """M at a point, factorised."""
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            slope = self._field(time, leaf)
            columns = slope.reshape(self._rows).unbind(1) if slope.requires_grad else ()
            rows = [torch.autograd.grad(c.sum(), leaf, retain_graph=True, materialize_grads=True)[0] for c in columns]
        M = torch.eye(leaf.reshape(self._rows).shape[1], dtype=y.dtype, device=y.device)
        if rows:
            M = M - step * torch.stack([row.reshape(self._rows) for row in rows], 1)
        LU, pivots, _ = torch.linalg.lu_factor_ex(M.detach().expand(*leaf.reshape(self._rows).shape, -1))
        return LU, pivots

    def apply(self, M: tuple[Tensor, Tensor], residual: Tensor) -> Tensor:
        """M^-1 residual."""
        return torch.linalg.lu_solve(*M, residual.reshape(self._rows)[..., None])[..., 0].reshape(self._shape)

    def solve(self, time: float | Tensor, step: float | Tensor, r: Tensor, y: Tensor) -> Tensor:
        """The stage point, from a guess; all NaN if some sample has none nearby, as the step is of all."""
        if not y.numel():
            return y
        last = torch.inf
        if self._M is None:
            self._M = self.matrix(time, step, self._x)
        for _ in range(_MOST):
            moved = y - self.apply(self._M, y - step * self._field(time, y) - r)
            rows = (moved - y).reshape(self._rows).abs().amax(1)
            change = rows / (1 + moved.reshape(self._rows).abs().amax(1))
            y, worst = moved, float(change.max())
            if worst <= self._tolerance:
                return y
            if not worst < torch.inf:
                break
            if worst > _SLOW * last:
                self._M = self.matrix(time, step, y)
            last = worst
        return torch.full_like(y, torch.nan)
