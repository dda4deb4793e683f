r"""A solution as a stationary point: first derivatives, costates and multipliers, second derivatives along the path.

Constraints that hold with equality there, c_k = 0 along the path and e = 0 at its end, belong to the Lagrangian with
their multipliers, which follow from the solver's costates: at each node alone they are what stationarity in x_k and
u_k still lacks. Inequalities whose multiplier does not exceed their distance are left out, as are bounds that their
gradient does not hold.

What a step is asked for are its outputs (f, c, l), and the end (e, c_N, Phi); they count for the weights (costate,
multipliers, 1). Shapes: time in front, p behind the states: z ``(N + 1, *lead, n)``.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt.checks import Bounds
from ocnopt.errors import ProblemError
from ocnopt.linearise import derivatives
from ocnopt.paths import Widened, evaluate, fitted, step_number, step_numbers
from ocnopt.solvers.solution import Result
from ocnopt.staged import Group, Index, StagedOCP

# Points in one evaluation, times the size of what is differentiated.
_POINTS = 100_000
# A path whose gaps are larger than this, relative to its states, belongs to another discretisation.
_GAP = 1e-6
# Inequalities and bounds farther away than this, relative to one, are not active.
_NEAR = 1e-5


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
        self._leave_out_gaps(states, controls, result.converged)
        self.rows = self.wide.path_excess(self.wide.groups[0], 0, self.states[0], self.controls[0]).shape[-1]
        self.end_rows = self.rows + self.wide.end_error(self.states[-1]).shape[-1]
        if self.end_rows and result.costates is None:
            raise ProblemError(
                "differentiable=True came with constraints and a solver that returns no costates, from which their "
                "multipliers follow; expected one that does: solver 'casadi'"
            )
        costates = torch.zeros_like(states) if result.costates is None else self.wide.join(result.costates, self.p)
        self.costates = _at_fine_places(costates, self.fine)[..., : self.wide.n - self.wide.q]

    def _leave_out_gaps(self, states: Tensor, controls: Tensor, converged: Tensor) -> None:
        """Take the problems of a batch that did not converge and miss the dynamics for given up."""
        with torch.no_grad():
            gaps = evaluate(self.wide, self.states, self.controls).gaps
        if gaps is None:
            return
        size = gaps.abs().amax((0, -1)) / (1 + self.states.abs().amax((0, -1))) * self.fine
        missed = size > _GAP
        alone = bool(size.ndim) and not self.shared and not bool((missed & converged).any())
        if not alone and bool(missed.any()):
            raise ProblemError(
                "differentiable=True came with a solution that misses the discrete dynamics by "
                f"{float(size.max()):.1e} of its states; expected a solve of the discrete problem, by 'ddp' or "
                "'casadi', that converged: read its status"
            )
        self.fine = self.fine & ~missed
        self.states, self.controls = _at_fine_places(states, self.fine), _at_fine_places(controls, self.fine)

    @property
    def bounds(self) -> Bounds | None:
        """Of the controls, shaped to fit them."""
        sides = self.wide.control_bounds
        return None if sides is None else fitted(sides, self.controls)

    @property
    def p(self) -> Tensor:
        """Static controls ``(*lead, q)``."""
        return self.states[0, ..., self.wide.n - self.wide.q :]

    def outputs(self, group: Group, k: Index) -> Callable[[Tensor], Tensor]:
        """(f, c, l) of steps as a function of w = (z, u)."""
        plain, n = self.wide.outputs(group, k), self.wide.n
        if not self.rows:
            return plain

        def outputs(w: Tensor) -> Tensor:
            value = plain(w)
            excess = self.wide.path_excess(group, k, w[..., :n], w[..., n:]).expand(*value.shape[:-1], self.rows)
            return torch.cat([value[..., :-1], excess, value[..., -1:]], dim=-1)

        return outputs

    def end(self, z: Tensor, u: Tensor | None = None) -> Tensor:
        """(e, c_N, Phi) as a function of the last z, and of the last control."""
        if not self.end_rows:
            return self.wide.phi(z)
        last = self.wide.groups[-1]
        u = self.controls[-1].expand(*z.shape[:-1], self.wide.m) if u is None else u
        excess = self.wide.path_excess(last, step_number(last, self.wide.steps, self.states), z, u)
        parts = [self.wide.end_error(z), excess, self.wide.phi(z)]
        return torch.cat([part.expand(*z.shape[:-1], part.shape[-1]) for part in parts], dim=-1)

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


class Rows(NamedTuple):
    """Constraints of a step or of the end that hold with equality: Jacobian ``(..., r, d)``, multipliers ``(..., r)``.

    Rows that do not hold are zero.
    """

    jacobian: Tensor
    multipliers: Tensor


class Models(NamedTuple):
    """F and L of all steps in homogeneous coordinates, L with the Lagrangian's curvature and without linear part.

    ``end (*lead, n, n)`` is its curvature at the end. Held entries have neither effect nor cost: ``held (N, *lead, m)``
    of the controls, ``held_p (*lead, q)`` of p. ``weights`` and ``end_weights`` are those of the outputs.
    """

    F: Tensor
    L: Tensor
    end: Tensor
    costates: Tensor
    held: Tensor
    held_p: Tensor
    along: Rows
    last: Rows
    weights: Tensor
    end_weights: Tensor


def expand(at: Point) -> Models:
    """Expand the Lagrangian at a solution.

    Raises:
        ProblemError: a constraint of states and controls together is active at the last node.
    """
    wide, n, nx = at.wide, at.wide.n, at.wide.n - at.wide.q
    size = nx + at.rows + 1
    parts = [derivatives(at.outputs(g, k), w, size, hessian=False)[:2] for _, g, k, w in at.points()]
    value, slopes = (torch.cat(columns) for columns in zip(*parts, strict=True))
    F = slopes.new_zeros((*slopes.shape[:-2], 1 + n, 1 + n + wide.m))
    F[..., 0, 0] = 1.0
    F[..., 1 : 1 + nx, 1:] = slopes[..., :nx, :]
    F[..., 1 + nx :, 1 + nx : 1 + n] = torch.eye(wide.q).to(F)
    along, last = _along(at, value[..., nx:-1], slopes), _last(at)
    lw = slopes[..., -1, :] + matvec(along.jacobian.mT, along.multipliers)
    end_weights = pad(last.multipliers, (0, 1), value=1.0)
    weighed = lambda z: (at.end(z) * end_weights).sum(-1, keepdim=True)  # noqa: E731
    _, end_slope, end = derivatives(weighed, at.states[-1], 1, hessian=True)
    costates, pushes = [end_slope[..., 0, :]], []
    for A, slope in zip(F[..., 1:, 1:].flip(0), lw.flip(0), strict=True):
        slope = slope + matvec(A.mT, costates[-1])
        costates.append(slope[..., :n])
        pushes.append(slope[..., n:])
    c = torch.stack(costates[::-1])
    held, held_p = _held(at, torch.stack(pushes[::-1]), c[0, ..., nx:])
    weights = pad(torch.cat([c[1:, ..., :nx], along.multipliers], dim=-1), (0, 1), value=1.0)
    L = pad(torch.cat([_curvature(at, *point, weights) for point in at.points()]), (1, 0, 1, 0))
    F[..., 1 + n :].masked_fill_(held[..., None, :], 0.0)
    still = pad(held, (1 + n, 0))
    L.masked_fill_(still[..., None, :] | still[..., None], 0.0)
    torch.diagonal(L, dim1=-2, dim2=-1)[..., 1 + n :] += held
    along = along._replace(jacobian=along.jacobian.masked_fill(still[..., None, 1:], 0.0))
    return Models(F, L, end[..., 0, :, :], c, held, held_p, along, last, weights, end_weights)


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrices times vectors."""
    return (matrix @ vector[..., None])[..., 0]


def _along(at: Point, value: Tensor, slopes: Tensor) -> Rows:
    """Path constraints that hold at the nodes 0..N-1."""
    nx, n = at.wide.n - at.wide.q, at.wide.n
    jacobian = slopes[..., nx:-1, :]
    if not at.rows:
        return Rows(jacobian, value)
    c = at.costates
    rest = slopes[..., -1, :] + matvec(slopes[..., :nx, :].mT, c[1:])
    lacking = torch.cat([c[:-1] - rest[..., :nx], -rest[..., n:]], dim=-1)
    counts = torch.cat([torch.ones_like(rest[..., :nx], dtype=torch.bool), ~_near_bounds(at)], dim=-1)
    # x_0 is given: nothing is stationary in it
    counts[0, ..., :nx] = False
    seen = torch.cat([jacobian[..., :nx], jacobian[..., n:]], dim=-1) * counts[..., None, :]
    return _active(jacobian, seen, lacking * counts, value, torch.zeros_like(value, dtype=torch.bool))


def _last(at: Point) -> Rows:
    """What holds at the end: terminal constraints, and path constraints of the last state."""
    wide, nx, n = at.wide, at.wide.n - at.wide.q, at.wide.n
    w = torch.cat([at.states[-1], at.controls[-1]], dim=-1)
    size = at.end_rows + 1
    value, slopes, _ = derivatives(lambda v: at.end(v[..., :n], v[..., n:]), w, size, hessian=False)
    jacobian, value = slopes[..., :-1, :n], value[..., :-1]
    if not at.end_rows:
        return Rows(jacobian, value)
    equality = torch.arange(at.end_rows, device=w.device).expand(value.shape) < at.end_rows - at.rows
    lacking = at.costates[-1] - slopes[..., -1, :nx]
    rows = _active(jacobian, jacobian[..., :nx], lacking, value, equality)
    both = (
        (rows.jacobian.abs().amax(-1) > 0) & (slopes[..., :-1, n:].abs().amax(-1) > 0) if wide.m else equality & False
    )
    if bool(both.any()):
        raise ProblemError(
            "gradients of a solution met an active path constraint of states and controls together at the last node, "
            "where it takes the control of the step before; expected one of states or of controls there: leave the "
            "controls out of it at the end, or take one step more"
        )
    return rows


def _active(jacobian: Tensor, seen: Tensor, lacking: Tensor, value: Tensor, equality: Tensor) -> Rows:
    """The rows that hold, with multipliers that explain what stationarity lacks in the columns that count."""
    near = equality | (value > -_NEAR)
    seen = seen * near[..., None]
    multipliers = matvec(torch.linalg.pinv(seen.mT, rtol=1e-9), lacking)
    holds = equality | (near & (multipliers > -value) & (multipliers > 0))
    return Rows(jacobian * holds[..., None], multipliers * holds)


def _near_bounds(at: Point) -> Tensor:
    """Controls at or next to a bound."""
    bounds = at.bounds
    if bounds is None:
        return torch.zeros_like(at.controls, dtype=torch.bool)
    return (at.controls - bounds[0] < _NEAR) | (bounds[1] - at.controls < _NEAR)


def _curvature(at: Point, steps: slice, group: Group, k: Index, w: Tensor, weights: Tensor) -> Tensor:
    """Second derivatives of the weighed outputs of some steps."""
    outputs = at.outputs(group, k)
    _, _, H = derivatives(lambda v: (outputs(v) * weights[steps]).sum(-1, keepdim=True), w, 1, hessian=True)
    return 0.5 * (H + H.mT)[..., 0, :, :]


def _held(at: Point, push: Tensor, push_p: Tensor) -> tuple[Tensor, Tensor]:
    """Which controls and static controls are held at a bound by their gradients, or only fill up."""
    wide = at.wide
    sizes = torch.tensor(wide.control_sizes, device=push.device).reshape(-1, *(1,) * (push.ndim - 1))
    held = torch.arange(wide.m, device=push.device).expand(push.shape) >= sizes
    if at.bounds is not None:
        held = held | _pushed(at.bounds, at.controls, push)
    if at.shared:
        push_p = push_p.sum(tuple(range(push_p.ndim - 1))).expand(push_p.shape)
    bounds = wide.parameter_bounds
    return held, torch.zeros_like(push_p, dtype=torch.bool) if bounds is None else _pushed(bounds, at.p, push_p)


def _pushed(bounds: Bounds, value: Tensor, push: Tensor) -> Tensor:
    """Whether the gradient is larger than the distance to the bound it pushes against: interior points never touch."""
    moved = value - push
    return ((moved <= bounds[0]) & (push > 0)) | ((moved >= bounds[1]) & (push < 0))
