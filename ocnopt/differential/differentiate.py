"""First and second derivatives of the mean cost of a problem, by one backward solve."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ocnopt.checks import check_choice, dense_memory, is_whole
from ocnopt.differential.columns import Columns, columns_suffice, terminal_columns
from ocnopt.differential.flow import Flow, read_request
from ocnopt.differential.matrix import Matrix
from ocnopt.differential.stretches import ContinuousPath, Readout, back, trace
from ocnopt.differential.sweep import sweep
from ocnopt.errors import ProblemError
from ocnopt.ocp import OCP


@dataclass(frozen=True, eq=False)
class Expansion:
    """Derivatives of the cost Q at the start of the path; None where there is no such variable or form.

    Means over the batch: ``value ()``, ``p (q,)``, ``pp (q, q)``, without T; where the horizon is free also ``T ()``,
    ``TT ()`` and ``Tp (q,)``.

    Per sample, not divided by the batch: ``x (..., n)``, ``xx (..., n, n)``, ``px (..., q, n)``; with staged controls
    ``u (..., N, m)``, ``uu (..., N, m, m)``, ``ux (..., N, m, n)``: derivatives in the control of a step and the state
    at its start, later controls held.

    Low rank, instead of xx, px and pp: ``x_factors (..., R, n)``, ``p_factors (..., R, q)``, ``signs (..., R)`` with
    xx = sum_i s_i x_i x_i^T, px = sum_i s_i p_i x_i^T, and pp the mean over the batch of sum_i s_i p_i p_i^T.
    """

    value: Tensor
    x: Tensor
    xx: Tensor | None = None
    p: Tensor | None = None
    pp: Tensor | None = None
    px: Tensor | None = None
    T: Tensor | None = None
    TT: Tensor | None = None
    Tp: Tensor | None = None
    u: Tensor | None = None
    uu: Tensor | None = None
    ux: Tensor | None = None
    x_factors: Tensor | None = None
    p_factors: Tensor | None = None
    signs: Tensor | None = None


def differentiate(
    problem: OCP,
    *,
    parameters: Tensor | None = None,
    controls: Tensor | None = None,
    horizon: float | Tensor | None = None,
    curvature: str | None = None,
    representation: str = "dense",
    rank: int | None = None,
    rtol: float = 1e-8,
    atol: float = 1e-8,
) -> Expansion:
    r"""Differentiate the cost of a problem, its batch read as samples of one problem that share p and T.

    One solve forward, with error control, and one backward: the second-order adjoint, or, for Gauss-Newton curvature
    without a running cost, columns that travel as the gradient does, which is far cheaper.

    Args:
        problem: a problem in continuous time; bounds and constraints play no part.
        parameters: p ``(q,)``; None takes the problem's.
        controls: ``(..., N, m)``, constant on each of N equal steps; required where the problem has staged controls.
        horizon: the end time T; None takes the problem's (a free horizon's initial guess).
        curvature: "exact" for the Hessian, "gauss_newton" to leave out the second derivatives of the dynamics; None
            means "exact", and with "low_rank" the only one it has, "gauss_newton".
        representation: "dense", or "low_rank" for factors of the Gauss-Newton matrices (no running cost).
        rank: keep at most so many factors, those of the largest terminal eigenvalues.
        rtol: relative tolerance of one step; no tighter than the rounding of the problem's dtype.
        atol: absolute tolerance, likewise.

    Raises:
        ProblemError: an argument does not fit the problem, or the dense matrices would not fit in memory.
        NonFiniteError: the path leaves the finite numbers.
        ConvergenceError: the tolerance cannot be met.

    Source: SNOpt, arXiv 2109.14158, Theorem 1 and Proposition 2.

    Example:
        With dx/dt = p x, x(0) = 1 and the cost x(1)^2 / 2 = exp(2 p) / 2, the derivatives at p = 0 are 1 and 2.

        >>> problem = OCP(lambda t, x, u, p: p[..., :1] * x, None, lambda t, x, p: x[..., 0] ** 2 / 2,
        ...               initial_state=[1.0], parameters=[0.0], horizon=1.0)
        >>> result = differentiate(problem)
        >>> [round(float(d), 6) for d in (result.value, result.p, result.pp, result.x, result.xx)]
        [0.5, 1.0, 2.0, 1.0, 1.0]
    """
    flow, u = read_request(problem, parameters, controls, horizon, rtol, atol)
    exact, low_rank = _check_options(problem, curvature, representation, rank), representation == "low_rank"
    if not low_rank:
        dense_memory(flow.p, flow.samples, flow.n, flow.lifted.control_dim)
    path, costs = trace(flow, u)
    x = path.end[0]
    if not low_rank and (exact or not columns_suffice(flow, x)):
        return _expansion(flow, costs, *_by_matrix(flow, path, exact=exact))
    terminal = terminal_columns(flow, x, rank)
    columns, readouts = sweep(partial(back, flow), path.stretches, terminal)
    return _expansion(flow, costs, columns, readouts, factors=low_rank)


def _by_matrix(flow: Flow, path: ContinuousPath, *, exact: bool) -> tuple[Matrix, list[Readout | None]]:
    """Q's derivatives at the start of the path, and those in the control at the start of every interval."""
    # The costliest pass: its own steps need less accuracy than the path that it runs along.
    coarse = replace(flow, rtol=8 * flow.rtol, atol=8 * flow.atol)
    return sweep(partial(back, coarse), path.stretches, Matrix.terminal(coarse, path.end[0], exact=exact))


def _check_options(problem: OCP, curvature: str | None, representation: str, rank: Any) -> bool:
    """Refuse options that do not go together; whether exact curvature is wanted."""
    check_choice("curvature", "exact" if curvature is None else curvature, ("exact", "gauss_newton"))
    check_choice("representation", representation, ("dense", "low_rank"))
    if representation == "dense":
        if rank is not None:
            raise ProblemError(
                f"rank={rank} is given for dense matrices; expected it with representation='low_rank' only"
            )
        return curvature != "gauss_newton"
    if curvature == "exact":
        raise ProblemError(
            "representation='low_rank' comes with curvature='exact'; expected curvature='gauss_newton', since the "
            "Hessian has full rank: use representation='dense' or oc.hvp for it"
        )
    if rank is not None and (not is_whole(rank) or rank < 1):
        raise ProblemError(f"rank is {rank!r}; expected an integer >= 1, or None for every factor")
    if problem.running_cost is not None:
        raise ProblemError(
            "the problem has a running cost; representation='low_rank' expects none, since that cost adds curvature "
            "all along the path: use representation='dense' or oc.hvp"
        )
    return False


def _expansion(
    flow: Flow, costs: Tensor, model: Matrix | Columns, readouts: list[Readout | None], *, factors: bool = False
) -> Expansion:
    """The record: means over the batch, T apart from p."""
    q, B = flow.lifted.problem.parameter_dim, flow.samples
    blocks: dict[str, Tensor] = {}
    if q:
        blocks["p"] = model.p[:q] / B
    if flow.lifted.free:
        row = model.row_of_pp(-1) / B
        blocks |= {"T": model.p[-1] / B, "TT": row[-1]} | ({"Tp": row[:-1]} if q else {})
    if flow.lifted.control_dim:
        columns = zip(*(readout for readout in readouts if readout is not None), strict=True)
        blocks |= {
            name: torch.stack(parts, len(flow.batch)) for name, parts in zip(Readout._fields, columns, strict=True)
        }
    blocks |= _factors(model, q) if isinstance(model, Columns) and factors else _matrices(model, q, B)
    return Expansion(value=costs.mean(), x=model.X, **blocks)


def _matrices(model: Matrix | Columns, q: int, B: int) -> dict[str, Tensor]:
    if not q:
        return {"xx": model.XX}
    return {"xx": model.XX, "pp": model.pp.div_(B)[:q, :q], "px": model.pX[..., :q, :]}


def _factors(columns: Columns, q: int) -> dict[str, Tensor]:
    blocks = {"x_factors": columns.q[..., 1:, :], "signs": columns.weights[..., 1:]}
    return blocks | {"p_factors": columns.in_p[..., 1:, :q]} if q else blocks
