r"""Gradients of a solution in the initial state and in the problem's data, by implicit differentiation.

A solution y = (x_0..x_N, u_0..u_{N-1}, p) with costates c is a stationary point of the Lagrangian

    L = Phi(x_N, p) + sum_k h_k,   h_k = l_k(x_k, u_k, p) + c_{k+1} . (f_k(x_k, u_k, p) - x_{k+1}),   x_0 given,

in all entries but those that stand at a bound, which stay there. For cotangents v of y let (dy, dc) solve

    L_yy dy + A^T dc = v,   A dy = 0        (A: the linearised dynamics; dy = 0 at a bound and at x_0),

a linear-quadratic problem with -v as its linear cost: one Riccati sweep, a walk forwards for dy and one back for dc.
Then the gradient in theta, data or x_0, of what v came from, and of the cost with its cotangent g besides (the envelope
theorem: only the explicit dependence of L counts), is

    d/dtheta [ g L - dy . L_y - dc . L_c ],

a derivative of the problem's functions alone. With shared parameters one dp is chosen for the whole batch.

Shapes: as in :mod:`ocnopt.paths`, time in front, p behind the states: z ``(N + 1, *lead, n)``.

Source: Amos et al., "Differentiable MPC", NeurIPS 2018 (the sweep); Jin et al., "Pontryagin Differentiable
Programming", NeurIPS 2020.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt.captured import substituted
from ocnopt.checks import Bounds
from ocnopt.differential.sweep import BellmanStep, CostToGo, bellman_step, minimise_box, sweep
from ocnopt.errors import ProblemError
from ocnopt.linearise import derivatives, gradient
from ocnopt.paths import Widened, evaluate, step_numbers
from ocnopt.solvers.solution import Result
from ocnopt.staged import Group, Index, StagedOCP

# Points in one evaluation, times the size of what is differentiated.
_POINTS = 100_000
# A path whose gaps are larger than this, relative to its states, belongs to another discretisation.
_GAP = 1e-6


def refuse_gradients(problem: StagedOCP, solver: Any) -> None:
    """Refuse what cannot be differentiated before anything is solved.

    Raises:
        ProblemError: nothing asks for a gradient, or the answer of the solver solves another problem than the discrete.
    """
    if not any(tensor is not None and tensor.requires_grad for tensor in (problem.traced_state, *problem.data)):
        raise ProblemError(
            "differentiable=True came with an initial state and data that need no gradients; expected one that does: "
            "call requires_grad_() on the tensor given as initial_state=, or on one named in data="
        )
    if getattr(getattr(solver, "solver", solver), "method", None) == "collocation":
        raise ProblemError(
            "differentiable=True came with method='collocation', whose answer solves another problem than the discrete "
            "one that is differentiated; expected 'multiple_shooting', or solver 'ddp'"
        )
    for name in ("terminal_constraint", "path_constraint"):
        if getattr(problem, name) is not None:
            raise ProblemError(
                f"differentiable=True came with a {name}, of which no gradients are known here; expected bounds alone: "
                "put a penalty into the cost"
            )


def with_gradients(problem: StagedOCP, result: Result, *, shared: bool = False) -> Result:
    """The same result, with a graph from its states, controls, parameters and cost to the initial state and the data.

    Args:
        problem: as it was solved; its data may change in place afterwards.
        result: of any solver of the discrete problem.
        shared: whether the whole batch has one p.

    Raises:
        ProblemError: the states do not obey the discrete dynamics.
    """
    if not torch.is_grad_enabled():
        return result
    at = Point(problem, result, shared)
    _warn_of_unfinished(result.converged)
    states, controls, p, cost = _Solved.apply(at, problem.traced_state, *problem.data)
    wide = at.wide
    return result._replace(
        states=wide.cut(states, wide.state_sizes),
        controls=wide.cut(controls, wide.control_sizes),
        parameters=p,
        cost=cost,
    )


def _warn_of_unfinished(converged: Tensor) -> None:
    missing = converged.numel() - int(converged.sum())
    if missing:
        which = f" of {missing} of {converged.numel()} problems" if converged.ndim else ""
        warnings.warn(
            f"differentiable=True, but the solve{which} did not converge: the gradients are those of a point that is "
            "no optimum; read the status",
            stacklevel=4,
        )


class Point:
    """A solution as it is differentiated: its path, and the data as they were."""

    def __init__(self, problem: StagedOCP, result: Result, shared: bool) -> None:
        self.problem, self.wide, self.shared = problem, Widened(problem), shared
        states = self.wide.join(result.states, result.parameters)
        controls = self.wide.join_controls(result.controls)
        self.solution = (states[..., : self.wide.n - self.wide.q], controls, result.parameters, result.cost)
        # problems given up at NaN stand at another's place: without cotangents nothing comes of them
        self.fine = states.isfinite().all(-1).all(0) & result.cost.isfinite()
        self.states, self.controls = _at_fine_places(states, self.fine), _at_fine_places(controls, self.fine)
        # an optimiser may move them before the backward pass
        self.data = [tensor.detach().clone() for tensor in problem.data]
        with torch.no_grad():
            gaps = evaluate(self.wide, self.states, self.controls).gaps
        size = 0.0 if gaps is None else float((gaps.abs().amax((0, -1)) / (1 + self.states.abs().amax((0, -1)))).max())
        if size > _GAP:
            raise ProblemError(
                f"differentiable=True came with a solution that misses the discrete dynamics by {size:.1e} of its "
                "states; expected a solver of the discrete problem, 'ddp' or 'casadi', and one that converged"
            )

    @property
    def p(self) -> Tensor:
        """Static controls ``(*lead, q)``."""
        return self.states[0, ..., self.wide.n - self.wide.q :]

    def points(self) -> Iterator[tuple[slice, Group, Index, Tensor]]:
        """Runs of steps with their numbers and w = (z, u)."""
        wide, lead = self.wide, math.prod(self.states.shape[1:-1])
        for group, start, stop in wide.stretches(max(1, _POINTS // (lead * (wide.n + wide.m)))):
            w = torch.cat([self.states[start:stop], self.controls[start:stop]], dim=-1)
            yield slice(start, stop), group, step_numbers(group, start, stop, self.states), w


def _at_fine_places(values: Tensor, fine: Tensor) -> Tensor:
    """Values with time in front, those of the first fine problem where one is not fine."""
    if bool(fine.all()):
        return values
    flat = fine.reshape(-1)
    place = torch.where(flat, torch.arange(len(flat), device=flat.device), flat.to(torch.int8).argmax())
    return values.flatten(1, -2)[:, place].reshape(values.shape)


def _only_fine(v: Tensor, fine: Tensor) -> Tensor:
    """Cotangents: a problem that was given up has no gradients but NaN."""
    lead = 1 if v.ndim > fine.ndim + 1 else 0
    mask = fine.reshape((1,) * lead + fine.shape + (1,) * (v.ndim - lead - fine.ndim))
    return torch.where(mask | (v == 0), v, torch.nan)


class _Solved(torch.autograd.Function):
    """The solution as a function of the initial state and the data."""

    @staticmethod
    def forward(ctx: Any, at: Point, x0: Tensor | None, *data: Tensor) -> tuple[Tensor, ...]:
        """Hand the solution on."""
        ctx.at = at
        ctx.set_materialize_grads(False)
        return tuple(value.clone() for value in at.solution)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Solve for (dy, dc) and pull back through the problem's functions.

        Raises:
            ProblemError: a graph of this pass is wanted, for second derivatives.
        """
        if torch.is_grad_enabled():
            raise ProblemError(
                "a graph of the gradients of a solution was asked for (create_graph=True), but they are of first order "
                "only; expected a plain backward(): for second derivatives difference these gradients"
            )
        at, (_, state_wanted, *wanted) = ctx.at, ctx.needs_input_grad
        seen = [v if v is None else _only_fine(v, at.fine) for v in cotangents]
        with substituted(at.problem.data, at.data):
            models = _expand(at)
            n, g = at.wide.n - at.wide.q, at.solution[3].new_zeros(at.fine.shape) if seen[3] is None else seen[3]
            if at.shared and seen[3] is not None:
                # p is stationary for the sum of all costs alone
                of_cost = g[..., None] * models.costates[0, ..., n:]
                seen[2] = of_cost if seen[2] is None else seen[2] + of_cost
            change = _respond(at, models, seen[:3])
        x0 = g[..., None] * models.costates[0] - change.costates[0]
        return None, x0[..., :n] if state_wanted else None, *_pull_back(at, models.costates, change, g, wanted)


class _Models(NamedTuple):
    """F and L of all steps in homogeneous coordinates, L with the Lagrangian's curvature and without linear part.

    ``end (*lead, n, n)`` is Phi_zz. Held entries have neither effect nor cost: ``held (N, *lead, m)`` of the controls,
    ``held_p (*lead, q)`` of p.
    """

    F: Tensor
    L: Tensor
    end: Tensor
    costates: Tensor
    held: Tensor
    held_p: Tensor


class _Change(NamedTuple):
    """dz ``(N + 1, *lead, n)``, du ``(N, *lead, m)``, dc ``(N + 1, *lead, n)``."""

    states: Tensor
    controls: Tensor
    costates: Tensor


def _expand(at: Point) -> _Models:
    """First derivatives along the path, the costates that follow from them, second derivatives of the Lagrangian."""
    wide, n = at.wide, at.wide.n
    nx = n - wide.q
    slopes = torch.cat([derivatives(wide.outputs(g, k), w, nx + 1, hessian=False)[1] for _, g, k, w in at.points()])
    F = slopes.new_zeros((*slopes.shape[:-2], 1 + n, 1 + n + wide.m))
    F[..., 0, 0] = 1.0
    F[..., 1 : 1 + nx, 1:] = slopes[..., :-1, :]
    F[..., 1 + nx :, 1 + nx : 1 + n] = torch.eye(wide.q).to(F)
    _, end_slope, end = derivatives(wide.phi, at.states[-1], 1, hessian=True)
    costate, costates, pushes = end_slope[..., 0, :], [end_slope[..., 0, :]], []
    for A, lw in zip(F[..., 1:, 1:].flip(0), slopes[..., -1, :].flip(0), strict=True):
        slope = lw + (A.mT @ costate[..., None])[..., 0]
        costate = slope[..., :n]
        costates.append(costate)
        pushes.append(slope[..., n:])
    c = torch.stack(costates[::-1])
    held, held_p = _held(at, torch.stack(pushes[::-1]), c[0, ..., nx:])
    L = pad(torch.cat([_curvature(wide, *point, c) for point in at.points()]), (1, 0, 1, 0))
    F[..., 1 + n :].masked_fill_(held[..., None, :], 0.0)
    L.masked_fill_(pad(held, (1 + n, 0))[..., None, :] | pad(held, (1 + n, 0))[..., None], 0.0)
    torch.diagonal(L, dim1=-2, dim2=-1)[..., 1 + n :] += held
    return _Models(F, L, end[..., 0, :, :], c, held, held_p)


def _weights(c: Tensor, nx: int) -> Tensor:
    """What the outputs (f, l) of a step count for: the costates at its end, and one."""
    return pad(c[..., :nx], (0, 1), value=1.0)


def _curvature(wide: Widened, steps: slice, group: Group, k: Index, w: Tensor, c: Tensor) -> Tensor:
    """Second derivatives of h_k at some steps."""
    weights, outputs = _weights(c[1:][steps], wide.n - wide.q), wide.outputs(group, k)
    _, _, H = derivatives(lambda v: (outputs(v) * weights).sum(-1, keepdim=True), w, 1, hessian=True)
    return 0.5 * (H + H.mT)[..., 0, :, :]


def _held(at: Point, push: Tensor, push_p: Tensor) -> tuple[Tensor, Tensor]:
    """Which controls and static controls are held at a bound by their gradients, or only fill up."""
    wide = at.wide
    sizes = torch.tensor(wide.control_sizes, device=push.device).reshape(-1, *(1,) * (push.ndim - 1))
    held = torch.arange(wide.m, device=push.device).expand(push.shape) >= sizes
    if wide.control_bounds is not None:
        lower, upper = (s.reshape(s.shape[0], *(1,) * at.fine.ndim, wide.m) for s in wide.control_bounds)
        held = held | _pushed((lower, upper), at.controls, push)
    if at.shared:
        push_p = push_p.sum(tuple(range(push_p.ndim - 1))).expand(push_p.shape)
    bounds = wide.parameter_bounds
    return held, torch.zeros_like(push_p, dtype=torch.bool) if bounds is None else _pushed(bounds, at.p, push_p)


def _pushed(bounds: Bounds, value: Tensor, push: Tensor) -> Tensor:
    """Whether the gradient is larger than the distance to the bound it pushes against: interior points never touch."""
    moved = value - push
    return ((moved <= bounds[0]) & (push > 0)) | ((moved >= bounds[1]) & (push < 0))


def _respond(at: Point, models: _Models, cotangents: Sequence[Tensor | None]) -> _Change:
    """Solve the linear-quadratic problem for cotangents of states ``(N + 1, ..)``, controls and p."""
    wide, n = at.wide, at.wide.n
    vx, vu, vp = cotangents
    if vx is None and vu is None and vp is None:
        return _Change(*(torch.zeros_like(v) for v in (at.states, at.controls, at.states)))
    v = torch.cat([torch.zeros_like(at.states[:-1]), torch.zeros_like(at.controls)], dim=-1)
    v_end = torch.zeros_like(at.states[-1])
    if vx is not None:
        v[..., : n - wide.q] += vx[:-1]
        v_end[..., : n - wide.q] += vx[-1]
    if vp is not None:
        v[0, ..., n - wide.q : n] += vp
    if vu is not None:
        v[..., n:] += vu.masked_fill(models.held, 0.0)
    L, end = models.L.clone(), pad(models.end, (1, 0, 1, 0))
    L[..., 0, 1:] = L[..., 1:, 0] = -v
    end[..., 0, 1:] = end[..., 1:, 0] = -v_end
    nothing = L.new_zeros(*L.shape[1:-2], wide.m, wide.m)
    steps = [BellmanStep(F, Lk, None, None, nothing) for F, Lk in zip(models.F, L, strict=True)]
    value, gains = sweep(bellman_step, steps, CostToGo(end, end[..., 0, :], torch.ones_like(at.fine)))
    dp, fine = _respond_in_p(at, models, value)
    _warn_of_saddle((value.solvable & fine) | ~value.J[..., 0].isfinite())
    return _walk(models, L, end, dp, [gain.K for gain in gains])


def _respond_in_p(at: Point, models: _Models, value: CostToGo) -> tuple[Tensor, Tensor]:
    """The step of the static controls that are not held."""
    q = at.wide.q
    H, Hs = value.V[..., 1:, 1:][..., at.wide.n - q :, at.wide.n - q :], value.V[..., 1:, :1][..., at.wide.n - q :, :]
    if not q:
        return Hs[..., 0], value.solvable
    if at.shared and H.ndim > 2:
        H, Hs = (v.sum(tuple(range(v.ndim - 2)), keepdim=True).expand(v.shape) for v in (H, Hs))
    free = ~models.held_p
    H = torch.where(free[..., None] & free[..., None, :], H, torch.eye(q).to(H))
    dp, fine = minimise_box(H, torch.where(free[..., None], Hs, 0.0), None)
    return dp[..., 0], fine


def _warn_of_saddle(fine: Tensor) -> None:
    if not bool(fine.all()):
        which = f" of {int((~fine).sum())} of {fine.numel()} problems" if fine.ndim else ""
        warnings.warn(
            f"the second derivative at the solution{which} is not positive definite: it is no strict minimum, and its "
            "gradients may be those of a saddle; solve from another start, or add a cost that decides",
            stacklevel=2,
        )


def _walk(models: _Models, L: Tensor, end: Tensor, dp: Tensor, gains: Sequence[Tensor]) -> _Change:
    """Walk the response forwards, and its costates back."""
    lead, rest = dp.shape[:-1], end.shape[-1] - 1 - dp.shape[-1]
    s = torch.cat([dp.new_ones((*lead, 1)), dp.new_zeros((*lead, rest)), dp], dim=-1)
    rows, responses = [s], []
    for F, K in zip(models.F, gains, strict=True):
        responses.append(torch.cat([s, _times(K, s)], dim=-1))
        s = _times(F, responses[-1])
        rows.append(s)
    dc = _times(end, s)[..., 1:]
    costates = [dc]
    for F, Lk, response in zip(models.F.flip(0), L.flip(0), responses[::-1], strict=True):
        dc = (_times(Lk, response)[..., 1:] + _times(F[..., 1:, 1:].mT, dc))[..., : s.shape[-1] - 1]
        costates.append(dc)
    states, both = torch.stack(rows)[..., 1:], torch.stack(responses)
    return _Change(states, both[..., s.shape[-1] :], torch.stack(costates[::-1]))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _pull_back(
    at: Point, costates: Tensor, change: _Change, g: Tensor, wanted: Sequence[bool]
) -> Sequence[Tensor | None]:
    """The gradient of g L - dy . L_y - dc . L_c in the data."""
    leaves = [tensor.clone().requires_grad_() for tensor in at.data]
    asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
    found = [torch.zeros_like(leaf) for leaf in asked]
    if not asked:
        return [None] * len(leaves)
    wide, nx = at.wide, at.wide.n - at.wide.q

    def add(function: Callable[[Tensor], Tensor], w: Tensor, dw: Tensor, weights: Tensor, dc: Tensor) -> None:
        point = w.detach().requires_grad_()
        with torch.enable_grad(), substituted(at.problem.data, leaves):
            outputs = function(point)
            (slope,) = gradient(outputs * weights, (point,), create_graph=True)
            total = (outputs * (g[..., None] * weights - dc)).sum() - (slope * dw).sum()
            parts = gradient(total, asked)
        for sum_, part in zip(found, parts, strict=True):
            sum_ += part

    for steps, group, k, w in at.points():
        dw = torch.cat([change.states[:-1][steps], change.controls[steps]], dim=-1)
        dc = pad(change.costates[1:][steps][..., :nx], (0, 1))
        add(wide.outputs(group, k), w, dw, _weights(costates[1:][steps], nx), dc)
    one = torch.ones_like(g)[..., None]
    add(wide.phi, at.states[-1], change.states[-1], one, torch.zeros_like(one))
    parts = iter(found)
    return [next(parts) if want else None for want in wanted]
