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

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ocnopt.bounds import FAR, finite
from ocnopt.captured import substituted
from ocnopt.checks import shape
from ocnopt.differential.sweep import BellmanStep, CostToGo, bellman_step, minimise_box, sweep
from ocnopt.errors import ProblemError
from ocnopt.linearise import gradient
from ocnopt.paths import Widened
from ocnopt.problem_checks import nearby
from ocnopt.solvers.solution import Result
from ocnopt.solvers.stationary import Models, Point, Rows, expand, matvec
from ocnopt.staged import Index, StagedOCP

# The penalty on constraints that hold, relative to the largest second derivative; how often their multipliers are
# mended at most, and what may be missed relative to the response.
_PENALTY, _MENDINGS, _MENDED = 1e4, 30, 1e-11


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
    if problem.state_bounds is not None and len(set(problem.state_sizes)) > 1:
        raise ProblemError(
            "differentiable=True came with state_bounds and a state whose size varies by stage, so that their number "
            "does; expected one size: write the bounds into the cost as a penalty"
        )
    _refuse_unnamed(problem)


class _Handed(TorchFunctionMode):
    """Notes the tensors with gradients that operations are handed and that none of them made."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        # kept alive, so that an id stays its own
        self._made = {id(tensor): tensor for tensor in known}
        self.found: dict[int, Tensor] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.found |= {id(v): v for v in given if id(v) not in self._made and v.requires_grad}
        value = function(*args, **(kwargs or {}))
        self._made |= {id(leaf): leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}
        return value


def _refuse_unnamed(problem: StagedOCP) -> None:
    """Refuse captured tensors that require gradients and are not among the data; warn of modules' parameters."""
    wide = Widened(problem)
    z = wide.join([problem.initial_state], problem.start_parameters())[0].detach()
    z, u = nearby(z), nearby(z.new_zeros((*z.shape[:-1], wide.m)))
    data = [tensor.detach().clone() for tensor in problem.data]
    with torch.enable_grad(), substituted(problem.data, data), _Handed(problem.data) as handed:
        outputs = wide.everything(z, u)
    traced, seen = [output for output in outputs if output.requires_grad], list(handed.found.values())
    if not traced or not seen:
        return
    ones = [torch.ones_like(v) for v in traced]
    slopes: Sequence[Tensor | None] = torch.autograd.grad(traced, seen, ones, allow_unused=True)
    read = [tensor for tensor, slope in zip(seen, slopes, strict=True) if slope is not None]
    plain = [tensor for tensor in read if not isinstance(tensor, nn.Parameter)]
    if plain:
        raise ProblemError(
            f"differentiable=True came with functions that capture a tensor of shape {shape(plain[0])} which requires "
            "grad but is not named in data, so that no gradient would reach it; expected it there: data=(tensor, ..), "
            "or capture its detach()"
        )
    if read:
        warnings.warn(
            f"differentiable=True: the functions capture parameters of a module ({len(read)}) that require grad but "
            "are not named in data, and no gradient of the solution reaches them. Name those that should get one, "
            "data=tuple(module.parameters()); call module.requires_grad_(False) where none should",
            stacklevel=4,
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
    at = Point(_with_bounds_as_constraints(problem), result, shared)
    _warn_of_unfinished(result.converged, at.fine)
    states, controls, p, cost = _Solved.apply(at, problem.traced_state, *problem.data)
    wide = at.wide
    return result._replace(
        states=wide.cut(states, wide.state_sizes),
        controls=wide.cut(controls, wide.control_sizes),
        parameters=p,
        cost=cost,
    )


def _with_bounds_as_constraints(problem: StagedOCP) -> StagedOCP:
    """Bounds on the states as further entries of the path constraint; those of the first state, which is given, too."""
    if problem.state_bounds is None:
        return problem
    given = problem.path_constraint
    lower, upper = finite(problem.state_bounds)
    places = [
        (sign, side, i)
        for sign, side in ((-1.0, lower), (1.0, upper))
        for i in range(side.shape[-1])
        if bool((side[..., i].abs() < FAR).any())
    ]

    def along(k: Index, x: Tensor, u: Tensor, *p: Tensor) -> Tensor:
        step = k if isinstance(k, int) or k.ndim == 0 else k.reshape(-1)
        rows = [sign * (x[..., i] - (side if side.ndim == 1 else side[step])[..., i]) for sign, side, i in places]
        bounded = torch.stack(rows, dim=-1) if rows else x[..., :0]
        return bounded if given is None else torch.cat([given(k, x, u, *p), bounded], dim=-1)

    return problem.altered(path_constraint=along, state_bounds=None)


def _warn_of_unfinished(converged: Tensor, fine: Tensor) -> None:
    missing, lost = converged.numel() - int(converged.sum()), fine.numel() - int(fine.sum())
    if missing:
        which = f" of {missing} of {converged.numel()} problems" if converged.ndim else ""
        warnings.warn(
            f"differentiable=True, but the solve{which} did not converge: the gradients are those of a point that is "
            f"no optimum{f', NaN for {lost} without a path' if lost else ''}; read the status",
            stacklevel=4,
        )


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
            models = expand(at)
            n, g = at.wide.n - at.wide.q, at.solution[3].new_zeros(at.fine.shape) if seen[3] is None else seen[3]
            if at.shared and seen[3] is not None:
                # p is stationary for the sum of all costs alone
                of_cost = g[..., None] * models.costates[0, ..., n:]
                seen[2] = of_cost if seen[2] is None else seen[2] + of_cost
            change = _respond(at, models, seen[:3])
        x0 = g[..., None] * models.costates[0] - change.costates[0]
        return None, x0[..., :n] if state_wanted else None, *_pull_back(at, models, change, g, wanted)


class _Change(NamedTuple):
    """dz ``(N + 1, *lead, n)``, du ``(N, *lead, m)``, dc ``(N + 1, *lead, n)``, and the multipliers' changes."""

    states: Tensor
    controls: Tensor
    costates: Tensor
    along: Tensor
    last: Tensor


def _respond(at: Point, models: Models, cotangents: Sequence[Tensor | None]) -> _Change:
    """Solve the linear-quadratic problem for cotangents of states ``(N + 1, ..)``, controls and p.

    Constraints that hold are a penalty, whose multipliers are mended until they hold to rounding.
    """
    wide, n = at.wide, at.wide.n
    vx, vu, vp = cotangents
    along, end_rows = _unit(models.along), _unit(models.last)
    mended, end_mended = torch.zeros_like(along.multipliers), torch.zeros_like(end_rows.multipliers)
    if vx is None and vu is None and vp is None:
        still, no_change = torch.zeros_like(at.states), torch.zeros_like(at.controls)
        return _Change(still, no_change, still, mended, end_mended)
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
    weight = _PENALTY * torch.maximum(L.abs().amax((0, -1, -2)), end.abs().amax((-1, -2)))[..., None]
    C, E, scale = along.jacobian, end_rows.jacobian, torch.zeros_like(end[..., 0, 0])
    L[..., 1:, 1:] += weight[..., None] * (C.mT @ C)
    end[..., 1:, 1:] += weight[..., None] * (E.mT @ E)
    for _ in range(_MENDINGS if at.end_rows else 1):
        L[..., 0, 1:] = L[..., 1:, 0] = matvec(C.mT, mended) - v
        end[..., 0, 1:] = end[..., 1:, 0] = matvec(E.mT, end_mended) - v_end
        change = _respond_freely(at, models, L, end)
        both = torch.cat([change.states[:-1], change.controls], dim=-1)
        missed, end_missed = matvec(C, both), matvec(E, change.states[-1])
        mended, end_mended = mended + weight * missed, end_mended + weight * end_missed
        # where constraints leave no freedom at all, nothing responds: then the first, soft response is the measure
        scale = torch.maximum(scale, both.abs().amax((0, -1)))
        most = torch.maximum(pad(missed, (0, 1)).abs().amax((0, -1)), pad(end_missed, (0, 1)).abs().amax(-1))
        # written so that a NaN ends the loop
        if not bool((most > _MENDED * scale).any()):
            break
    else:
        warnings.warn(
            "the active constraints at the solution depend on each other: gradients of it are not exact; leave out "
            "constraints that follow from others",
            stacklevel=2,
        )
    return change._replace(along=mended / _sizes(models.along), last=end_mended / _sizes(models.last))


def _sizes(rows: Rows) -> Tensor:
    """The norm of each row; one where it is zero."""
    size = rows.jacobian.norm(dim=-1)
    return torch.where(size > 0, size, 1.0)


def _unit(rows: Rows) -> Rows:
    """Rows of length one."""
    return rows._replace(jacobian=rows.jacobian / _sizes(rows)[..., None])


def _respond_freely(at: Point, models: Models, L: Tensor, end: Tensor) -> _Change:
    """Solve it without constraints."""
    nothing = L.new_zeros(*L.shape[1:-2], at.wide.m, at.wide.m)
    steps = [BellmanStep(F, Lk, None, None, nothing) for F, Lk in zip(models.F, L, strict=True)]
    value, gains = sweep(bellman_step, steps, CostToGo(end, end[..., 0, :], torch.ones_like(at.fine)))
    dp, fine = _respond_in_p(at, models, value)
    _warn_of_saddle((value.solvable & fine) | ~value.J[..., 0].isfinite())
    return _walk(models, L, end, dp, [gain.K for gain in gains])


def _respond_in_p(at: Point, models: Models, value: CostToGo) -> tuple[Tensor, Tensor]:
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


def _walk(models: Models, L: Tensor, end: Tensor, dp: Tensor, gains: Sequence[Tensor]) -> _Change:
    """Walk the response forwards, and its costates back."""
    lead, rest = dp.shape[:-1], end.shape[-1] - 1 - dp.shape[-1]
    s = torch.cat([dp.new_ones((*lead, 1)), dp.new_zeros((*lead, rest)), dp], dim=-1)
    rows, responses = [s], []
    for F, K in zip(models.F, gains, strict=True):
        responses.append(torch.cat([s, matvec(K, s)], dim=-1))
        s = matvec(F, responses[-1])
        rows.append(s)
    dc = matvec(end, s)[..., 1:]
    costates = [dc]
    for F, Lk, response in zip(models.F.flip(0), L.flip(0), responses[::-1], strict=True):
        dc = (matvec(Lk, response)[..., 1:] + matvec(F[..., 1:, 1:].mT, dc))[..., : s.shape[-1] - 1]
        costates.append(dc)
    states, both = torch.stack(rows)[..., 1:], torch.stack(responses)
    zero = torch.zeros_like
    changes = states, both[..., s.shape[-1] :], torch.stack(costates[::-1])
    return _Change(*changes, zero(models.along.multipliers), zero(models.last.multipliers))


def _pull_back(
    at: Point, models: Models, change: _Change, g: Tensor, wanted: Sequence[bool]
) -> Sequence[Tensor | None]:
    """The gradient of g L - dy . L_y - dc . L_c in the data."""
    leaves = [tensor.clone().requires_grad_() for tensor in at.data]
    asked = [leaf for leaf, want in zip(leaves, wanted, strict=True) if want]
    found = [torch.zeros_like(leaf) for leaf in asked]
    if not asked:
        return [None] * len(leaves)
    nx = at.wide.n - at.wide.q

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
        dc = torch.cat([change.costates[1:][steps][..., :nx], change.along[steps]], dim=-1)
        add(at.outputs(group, k), w, dw, models.weights[steps], pad(dc, (0, 1)))
    add(at.end, at.states[-1], change.states[-1], models.end_weights, pad(change.last, (0, 1)))
    parts = iter(found)
    return [next(parts) if want else None for want in wanted]
