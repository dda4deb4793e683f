"""Dense derivatives of a problem by differentiating a fixed grid on unit time, without any of the library's passes.

From the start of control step k on, w = (x_k, u_k, p, T) fixes the path: six or more steps of scipy's Runge-Kutta
method of order 8, the running cost one more state. The Hessian of that cost is exact; with the path replaced by its
linearisation around w0 (a state delta beside x, moving by F_x delta + F_w (w - w0)) it is the Gauss-Newton matrix.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy.integrate._ivp import dop853_coefficients as dop853
from torch import Tensor

from ocnopt.ocp import OCP, FreeHorizon

A, B, C = dop853.A[:12, :12].tolist(), dop853.B.tolist(), dop853.C[:12].tolist()
STEPS = 6


class Dense(NamedTuple):
    """Means over the batch: value, p, pp (T last, if free); per sample x, xx, px (T last) and those in u_k."""

    value: Tensor
    p: Tensor
    pp: Tensor
    x: Tensor
    xx: Tensor
    px: Tensor
    u: Tensor
    uu: Tensor
    ux: Tensor


class Point(NamedTuple):
    """w in its parts."""

    x: Tensor
    u: Tensor
    p: Tensor
    T: Tensor


def fixed_steps(field: Callable, y: Sequence[Tensor], start: float, end: float, count: int) -> list[Tensor]:
    """Equal steps of the method of order 8 for a list of tensors."""
    h, y = (end - start) / count, list(y)
    for j in range(count):
        slopes: list[Sequence[Tensor]] = []
        for a, c in zip(A, C, strict=True):
            used = [(weight, k) for weight, k in zip(a, slopes, strict=False) if weight]
            point = [v + sum(h * weight * k[i] for weight, k in used) for i, v in enumerate(y)]
            slopes.append(field(start + (j + c) * h, point))
        used = [(weight, k) for weight, k in zip(B, slopes, strict=True) if weight]
        y = [v + sum(h * weight * k[i] for weight, k in used) for i, v in enumerate(y)]
    return y


class Oracle:
    """A problem at its own parameters and end time, with controls ``(N, m)`` or ``(*batch, N, m)``."""

    def __init__(self, problem: OCP, controls: Tensor | None = None) -> None:
        x0, batch = problem.initial_state, problem.batch_shape
        self.problem = problem
        u = x0.new_zeros(1, 0) if controls is None else controls
        self.u = u.expand(*batch, *u.shape[-2:]).clone()
        self.N = self.u.shape[-2]
        self.free = isinstance(problem.horizon, FreeHorizon)
        self.T = x0.new_tensor(problem.horizon.initial if self.free else problem.horizon.t1)
        self.p = x0.new_zeros(0) if problem.parameters is None else problem.parameters
        self.samples = max(1, x0[..., 0].numel())

    def call(self, name: str, s: float, w: Point) -> Tensor:
        """A problem's function at unit time s, zero where there is none; slopes and rates per unit time."""
        function, t0 = getattr(self.problem, name), self.problem.horizon.t0
        zero = w.x[..., 0] * 0
        if function is None:
            return zero
        arguments = [t0 + s * (w.T - t0), w.x, *([] if name == "terminal_cost" else [w.u])]
        value = function(*arguments) if self.problem.parameters is None else function(*arguments, w.p)
        if name == "dynamics":
            return (w.T - t0) * value
        return value + zero if name == "terminal_cost" else (w.T - t0) * value + zero

    def along(self, k: int, field: Callable, y: Sequence[Tensor]) -> Sequence[Tensor]:
        """Walk from the start of interval k to the end; ``field(i, s, y)``."""
        for i in range(k, self.N):
            y = fixed_steps(lambda s, y, i=i: field(i, s, y), y, i / self.N, (i + 1) / self.N, max(1, STEPS // self.N))
        return y

    def control(self, k: int, i: int, u: Tensor) -> Tensor:
        return u if i == k else self.u[..., i, :]

    def exact(self, k: int, w: Point) -> Tensor:
        """The sum over the samples of the cost from the start of interval k on."""

        def field(i, s, y):
            here = Point(y[0], self.control(k, i, w.u), w.p, w.T)
            return self.call("dynamics", s, here), self.call("running_cost", s, here)

        x, cost = self.along(k, field, (w.x, w.x[..., 0] * 0))
        return (cost + self.call("terminal_cost", 1.0, w._replace(x=x))).sum()

    def gauss_newton(self, k: int, w0: Point, w: Point) -> Tensor:
        """The same along the linearised path."""
        change = [v - v0 for v, v0 in zip(w, w0, strict=True)]

        def field(i, s, y):
            x, delta, _ = y
            nominal = Point(x, self.control(k, i, w0.u), w0.p, w0.T)
            moved = Point(x + delta, self.control(k, i, w.u), w.p, w.T)
            tangent = (delta, change[1] if i == k else torch.zeros_like(change[1]), *change[2:])
            F, dF = torch.func.jvp(lambda *v: self.call("dynamics", s, Point(*v)), tuple(nominal), tangent)
            return F, dF, self.call("running_cost", s, moved)

        x, delta, cost = self.along(k, field, (w0.x, change[0], w0.x[..., 0] * 0))
        return (cost + self.call("terminal_cost", 1.0, w._replace(x=x + delta))).sum()

    def state(self, k: int) -> Tensor:
        """x at the start of interval k."""
        y = [self.problem.initial_state]
        for i in range(k):
            field = lambda s, y, i=i: [self.call("dynamics", s, Point(y[0], self.u[..., i, :], self.p, self.T))]  # noqa: E731
            y = fixed_steps(field, y, i / self.N, (i + 1) / self.N, max(1, STEPS // self.N))
        return y[0]

    def dense(self, k: int = 0, *, exact: bool = True) -> Dense:
        """Derivatives at the start of interval k."""
        w0 = Point(self.state(k), self.u[..., k, :], self.p, self.T)
        shapes, sizes = [part.shape for part in w0], [part.numel() for part in w0]

        def cost(flat: Tensor) -> Tensor:
            w = Point(*(part.reshape(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)))
            return self.exact(k, w) if exact else self.gauss_newton(k, w0, w)

        start = torch.cat([part.reshape(-1) for part in w0]).requires_grad_()
        value = cost(start)
        (g,) = torch.autograd.grad(value, start, create_graph=True)
        rows = torch.eye(len(start), dtype=start.dtype)
        g = g + 0 * start  # a graph to differentiate, where the cost is linear
        (H,) = torch.autograd.grad(g, start, rows, is_grads_batched=True)
        return self.blocks(value.detach(), g.detach(), H, sizes)

    def blocks(self, value: Tensor, g: Tensor, H: Tensor, sizes: list[int]) -> Dense:
        S, batch, (nx, nu, q, _) = self.samples, self.problem.batch_shape, sizes
        n, m, each = nx // S, nu // S, range(S)
        of_x, of_u, tail = slice(0, nx), slice(nx, nx + nu), slice(nx + nu, nx + nu + q + self.free)

        def per_sample(rows, columns, a, b):
            return H[rows, columns].reshape(S, a, S, b)[each, :, each].reshape(*batch, a, b)

        px = H[tail, of_x].reshape(-1, S, n).movedim(0, 1).reshape(*batch, q + self.free, n)
        return Dense(
            value / S, g[tail] / S, H[tail, tail] / S, g[of_x].reshape(*batch, n), per_sample(of_x, of_x, n, n), px,
            g[of_u].reshape(*batch, m), per_sample(of_u, of_u, m, m), per_sample(of_u, of_x, m, n),
        )  # fmt: skip
