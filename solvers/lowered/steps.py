r"""One step of the problem in CasADi, and the four functions of a kernel made from it.

The static controls are part of the state z = (x, p), p_{k+1} = p_k. With w = (z, u), a step is w -> (f, l). Derivatives
are CasADi's own, contracted with the cost-to-go inside the Bellman step, so no tensor f_ww exists; matrices are sparse,
so a zero costs nothing. Every function is a fold over time: it takes what is carried from step to step first, then what
each step is given, and returns what is carried on, then what each step yields.

The algebra is that of :mod:`ocnopt.differential.sweep`, in the same homogeneous coordinates and letters, written
without branches; it stands a second time because its Hessian is contracted by CasADi and its zeros are structural.
"""

import functools
import math
from typing import Any, NamedTuple

import casadi

# CasADi ships no annotations: a casadi.SX matrix.
SX = Any


# Lower and upper bounds as numbers, None where they vary from step to step; and as expressions.
Limits = tuple[list[float | None], list[float | None]]
Box = tuple[list[SX], list[SX]]


class Fold(NamedTuple):
    """A function of one step; its first ``carried`` arguments and results go from step to step.

    The results numbered in ``kept`` are wanted at every step, the others only at the last.
    """

    name: str
    function: casadi.Function
    carried: int
    kept: tuple[int, ...]


class Steps(NamedTuple):
    """The lowered functions of a problem whose state z holds the static controls.

    ``walk``: z, cost; number, zbar, ubar, k, K, gap, alpha, d -> z, cost; u. ``gaps``: cost; number, z, u, z_next, d ->
    cost; gap. ``exact`` and ``gauss_newton``: V, J, solvable; number, z, u, gap, mu, d -> V, J, solvable; k, K, J_z.
    ``end``: z, d -> Phi. ``end_value``: z, d -> V, J. V is the upper triangle of the symmetric matrix, column by
    column; K is row by row; d is what a step is given besides.
    """

    walk: Fold
    gaps: Fold
    exact: Fold
    gauss_newton: Fold
    end: Fold
    end_value: Fold


def make_steps(step: casadi.Function, end: casadi.Function, n: int, m: int, q: int, bounds: Limits | None) -> Steps:
    """Write the kernel's functions down.

    Args:
        step: (k, x, u, p, d) -> (x_next, cost).
        end: (x, p, d) -> Phi.
        n: size of z, static controls included.
        m: number of staged controls.
        q: number of static controls.
        bounds: lower and upper of the staged controls, infinite where there is none. What varies stands in d behind
            what the functions themselves are given, all lower ones first.
    """
    k, z, u = casadi.SX.sym("k"), casadi.SX.sym("z", n), casadi.SX.sym("u", m)
    own = int(step.numel_in(4))
    d = casadi.SX.sym("d", own + sum(value is None for side in bounds or () for value in side))
    f, cost = _widened(step, k, z, u, d, n - q)
    (value,) = casadi.cse([end(z[: n - q, 0], z[n - q :, 0], d[:own, 0])])
    varying = iter([d[i] for i in range(own, int(d.numel()))])
    sides = [[next(varying) if value is None else casadi.SX(value) for value in side] for side in bounds or ()]
    box = (sides[0], sides[1]) if sides else None
    hessian, gradient = casadi.hessian(value, z)
    L = _quadratic(gradient, hessian)
    return Steps(
        _walk(step, d, n, m, q, box),
        _gaps(k, z, u, d, f, cost),
        _bellman(k, z, u, d, f, cost, q, box, exact=True),
        _bellman(k, z, u, d, f, cost, q, box, exact=False),
        _fold("end", [z, d], [value], 0, (0,)),
        _fold("end_value", [z, d], [_packed(L), L[0, :].T], 0, (0, 1)),
    )


def _widened(step: casadi.Function, k: SX, z: SX, u: SX, d: SX, n: int) -> tuple[SX, SX]:
    """The next z and the cost of a step."""
    f, cost = step(k, z[:n, 0], u, z[n:, 0], d[: step.numel_in(4), 0])
    f, cost = casadi.cse([casadi.vertcat(f, z[n:, 0]), cost])
    return f, cost


def _fold(name: str, inputs: list[SX], outputs: list[SX], carried: int, kept: tuple[int, ...]) -> Fold:
    """A function of dense arguments and results that computes nothing twice."""
    function = casadi.Function(name, inputs, [casadi.densify(out) for out in casadi.cse(outputs)])
    return Fold(name, function, carried, kept)


def _walk(step: casadi.Function, d: SX, n: int, m: int, q: int, box: Box | None) -> Fold:
    """The closed loop: u = clip(ubar + alpha k + K (z - zbar)), z_next = f(z, u) - (1 - alpha) gap."""
    sym = casadi.SX.sym
    k, alpha, cost = sym("k"), sym("alpha"), sym("cost")
    z, zbar, gap, ubar, forward = sym("z", n), sym("zbar", n), sym("gap", n), sym("ubar", m), sym("forward", m)
    K = sym("K", n, m)
    u = ubar + alpha * forward + K.T @ (z - zbar)
    if box is not None:
        u = casadi.vertcat(*(_clamp(u[i], lo, hi) for i, (lo, hi) in enumerate(zip(*box, strict=True))))
    f, running = _widened(step, k, z, u, d, n - q)
    inputs = [z, cost, k, zbar, ubar, forward, casadi.vec(K), gap, alpha, d]
    return _fold("walk", inputs, [f - (1 - alpha) * gap, cost + running, u], 2, (0, 2))


def _gaps(k: SX, z: SX, u: SX, d: SX, f: SX, running: SX) -> Fold:
    """Cost and gap of a step from z to a given next z."""
    cost, after = casadi.SX.sym("cost"), casadi.SX.sym("after", *z.shape)
    return _fold("gaps", [cost, k, z, u, after, d], [cost + running, f - after], 1, (1,))


def _bellman(k: SX, z: SX, u: SX, d: SX, f: SX, running: SX, q: int, box: Box | None, *, exact: bool) -> Fold:
    """Carry V and J over one step."""
    n, m = int(z.shape[0]), int(u.shape[0])
    s, w = n + 1, casadi.vertcat(z, u)
    sym = casadi.SX.sym
    gap, mu, solvable, J, upper = sym("gap", n), sym("mu"), sym("solvable"), sym("J", s), sym("V", s * (s + 1) // 2)
    V = _unpacked(upper, s)
    F = casadi.blockcat([[casadi.SX(1), casadi.SX(1, n + m)], [gap, casadi.jacobian(f, w)]])
    VF = V @ F
    # Curvature of the dynamics counts with the cost-to-go's gradient where the step really ends: V_x + V_xx g.
    c = sym("c", n)
    (hessian,) = casadi.substitute([casadi.hessian(running + c.T @ f if exact else running, w)[0]], [c], [VF[1:, 0]])
    L = _quadratic(casadi.gradient(running, w), hessian)
    damping = casadi.diag(casadi.vertcat(0, mu * casadi.SX.ones(n - q), casadi.SX(q, 1), mu * casadi.SX.ones(m)))
    # Only the upper triangle is read, so only that is ever computed.
    Q = L + damping + F.T @ VF
    Quu, Qus = casadi.triu2symm(casadi.triu(Q[s:, s:])), Q[:s, s:].T
    room = None if box is None else (_left(box[0], u), _left(box[1], u))
    K, fine = minimise_box(Quu, Qus, room)
    cross = K.T @ (Qus + 0.5 * (Quu @ K))
    j = L[0, :].T + F.T @ J
    J_after = j[:s] + K.T @ j[s:]
    inputs = [upper, J, solvable, k, z, u, gap, mu, d]
    carried = [_packed(Q[:s, :s] + cross + cross.T), J_after, solvable * fine]
    name = "exact" if exact else "gauss_newton"
    yielded = [K[:, 0], casadi.vec(K[:, 1:].T), J_after[1:]]
    return _fold(name, inputs, [*carried, *yielded], 3, (3, 4, 5))


def _quadratic(gradient: SX, hessian: SX) -> SX:
    """The symmetric matrix of gradient^T w + 1/2 w^T hessian w on (1, w)."""
    return casadi.blockcat([[casadi.SX(1, 1), gradient.T], [gradient, hessian]])


def _packed(symmetric: SX) -> SX:
    """The upper triangle, column by column."""
    size = int(symmetric.shape[0])
    return casadi.vertcat(*(symmetric[: j + 1, j] for j in range(size)))


def _unpacked(upper: SX, size: int) -> SX:
    """Inverse of :func:`_packed`."""
    place = lambda i, j: j * (j + 1) // 2 + i  # noqa: E731
    rows = [[upper[place(min(i, j), max(i, j))] for j in range(size)] for i in range(size)]
    return casadi.blockcat(rows)


def minimise_box(H: SX, Hs: SX, room: tuple[SX, SX] | None) -> tuple[SX, SX]:
    """[k  K] of :func:`ocnopt.differential.sweep.minimise_box` and whether H counts as positive definite.

    With at most two controls all active sets are looked at; with more, a fixed number of steps find the minimum.
    """
    m = int(Hs.shape[0])
    if m == 0:
        return Hs, casadi.SX(1)
    if room is None:
        return _newton(H, Hs)
    _, fine = _newton(H, Hs)
    lower, upper = room
    # Curvature along an entry that its gradient holds at a bound does not count (Tassa et al. 2014, eq. 15-16).
    g = Hs[:, 0]
    use = [_or(fine, _not(_or(_and(lower[i] >= 0, g[i] > 0), _and(upper[i] <= 0, g[i] < 0)))) for i in range(m)]
    H, Hs = _restrict(H, use), casadi.vertcat(*(casadi.if_else(use[i], Hs[i, :], 0) for i in range(m)))
    K, fine = _newton(H, Hs)
    if m == 1:
        inside = _and(K[0, 0] > lower, K[0, 0] < upper)
        return casadi.horzcat(_clamp(K[0, 0], lower, upper), casadi.if_else(inside, K[0, 1:], 0)), fine
    return (_on_the_square if m == 2 else _in_the_box)(H, Hs, K, lower, upper), fine


def _newton(H: SX, Hs: SX) -> tuple[SX, SX]:
    """-H^-1 Hs by H = L D L^T, and whether all of D is positive."""
    m = int(Hs.shape[0])
    L: list[list[SX]] = [[casadi.SX(0)] * m for _ in range(m)]
    D: list[SX] = []
    for j in range(m):
        D.append(H[j, j] - sum((L[j][i] ** 2 * D[i] for i in range(j)), casadi.SX(0)))
        for i in range(j + 1, m):
            L[i][j] = (H[i, j] - sum((L[i][p] * L[j][p] * D[p] for p in range(j)), casadi.SX(0))) / D[j]
    rows: list[SX] = []
    for i in range(m):
        rows.append(Hs[i, :] - sum((L[i][j] * rows[j] for j in range(i)), casadi.SX(0)))
    rows = [row * (-1 / D[i]) for i, row in enumerate(rows)]
    for i in reversed(range(m)):
        rows[i] = rows[i] - sum((L[j][i] * rows[j] for j in range(i + 1, m)), casadi.SX(0))
    fine = D[0] > 0
    for d in D[1:]:
        fine = _and(fine, d > 0)
    return casadi.vertcat(*rows), fine


def _on_the_square(H: SX, Hs: SX, K: SX, lower: SX, upper: SX) -> SX:
    """The minimiser over a rectangle: the free one if it lies inside, else the best of the four edges."""
    g = Hs[:, 0]
    within = [_and(lower[i] < K[i, 0], K[i, 0] < upper[i]) for i in range(2)]
    inside = _and(*within)
    best, k = casadi.SX(casadi.inf), K[:, 0]
    for i, j in ((0, 1), (1, 0)):
        for edge in filter(_finite, (lower[i], upper[i])):
            along = _clamp(-(g[j] + H[i, j] * edge) / H[j, j], lower[j], upper[j])
            point = casadi.vertcat(edge, along) if i == 0 else casadi.vertcat(along, edge)
            value = point.T @ (g + 0.5 * (H @ point))
            smaller = value < best
            best, k = casadi.if_else(smaller, value, best), casadi.if_else(smaller, point, k)
    k = casadi.if_else(inside, K[:, 0], k)
    slope = g + H @ k
    free = [
        _or(inside, _not(_or(_and(k[i] <= lower[i], slope[i] > 0), _and(k[i] >= upper[i], slope[i] < 0))))
        for i in range(2)
    ]
    alone = [casadi.if_else(free[i], -Hs[i, 1:] / H[i, i], 0) for i in range(2)]
    both = _and(*free)
    return casadi.horzcat(k, casadi.vertcat(*(casadi.if_else(both, K[i, 1:], alone[i]) for i in range(2))))


def _in_the_box(H: SX, Hs: SX, K: SX, lower: SX, upper: SX) -> SX:
    """The minimiser over a box of three or more entries, from the free one clipped.

    Minimising along the axes in turn finds which bounds hold; a Newton step on the other entries, whole or up to the
    first bound, then leads to the minimum. Of 40,000 random problems with condition numbers up to 1e6, all but some in
    ten thousand are exact after m + 1 rounds; the others end at a lower point of the model, which is still a step.
    """
    m, g = int(Hs.shape[0]), Hs[:, 0]
    k = casadi.vertcat(*(_clamp(K[i, 0], lower[i], upper[i]) for i in range(m)))
    for _ in range(m + 1):
        k = _round(m)(H, g, k, lower, upper)
    newton, feedback = _respond(H, g, Hs[:, 1:], k, lower, upper)
    return casadi.horzcat(casadi.fmin(casadi.fmax(k + newton, lower), upper), feedback)


@functools.cache
def _round(m: int) -> casadi.Function:
    """One round of :func:`_in_the_box`: (H, g, k, lower, upper) -> k."""
    sym = casadi.SX.sym
    H, g, start, lower, upper = sym("H", m, m), sym("g", m), sym("k", m), sym("lower", m), sym("upper", m)
    k = casadi.SX(start)
    for i in (*range(m), *range(m)):
        k[i] = _clamp(k[i] - (g[i] + H[i, :] @ k) / H[i, i], lower[i], upper[i])
    newton, _ = _respond(H, g, casadi.SX(m, 0), k, lower, upper)
    first = casadi.SX(1)
    for i in range(m):
        reach = casadi.if_else(newton[i] > 0, upper[i] - k[i], lower[i] - k[i]) / newton[i]
        first = casadi.fmin(first, casadi.if_else(_and(newton[i] != 0, reach > 0), reach, casadi.inf))
    best = k.T @ (g + 0.5 * (H @ k))
    for size in (first, casadi.SX(1)):
        point = casadi.fmin(casadi.fmax(k + size * newton, lower), upper)
        value = point.T @ (g + 0.5 * (H @ point))
        falls = value <= best
        best, k = casadi.if_else(falls, value, best), casadi.if_else(falls, point, k)
    return casadi.Function("round", [H, g, start, lower, upper], casadi.cse([k]))


def _respond(H: SX, g: SX, Hx: SX, k: SX, lower: SX, upper: SX) -> tuple[SX, SX]:
    """The Newton step from k on the entries that no bound holds, and their response to x; zero on the others."""
    slope, m = g + H @ k, int(k.shape[0])
    free = [_not(_or(_and(k[i] <= lower[i], slope[i] > 0), _and(k[i] >= upper[i], slope[i] < 0))) for i in range(m)]
    right = casadi.horzcat(slope, Hx)
    rows = casadi.vertcat(*(casadi.if_else(free[i], right[i, :], 0) for i in range(m)))
    found, _ = _newton(_restrict(H, free), rows)
    return found[:, 0], found[:, 1:]


def _restrict(H: SX, use: list[SX]) -> SX:
    """H on the entries in use, the identity on the others."""
    m = len(use)
    eye = casadi.SX.eye(m)
    return casadi.blockcat(
        [[casadi.if_else(_and(use[i], use[j]), H[i, j], eye[i, j]) for j in range(m)] for i in range(m)]
    )


def _clamp(value: SX, lower: SX, upper: SX) -> SX:
    return casadi.fmin(casadi.fmax(value, lower), upper)


def _left(bound: list[SX], u: SX) -> SX:
    """How far u is from its bound; a bound at infinity stays a number, so that CasADi can drop it."""
    return casadi.vertcat(*(b - u[i] if _finite(b) else b for i, b in enumerate(bound)))


def _finite(value: SX) -> bool:
    return not (value.is_constant() and math.isinf(float(value)))


def _and(a: SX, b: SX) -> SX:
    return casadi.logic_and(a, b)


def _or(a: SX, b: SX) -> SX:
    return casadi.logic_or(a, b)


def _not(a: SX) -> SX:
    return casadi.logic_not(a)
