r"""Constraints by an augmented Lagrangian: the discrete problem becomes one without them, solved again and again.

Every constraint g of a node has a multiplier lambda, every problem of a batch a penalty rho. With s = lambda / rho and
the set that g has to lie in ({0} for a terminal constraint, g <= 0 for a path constraint, an interval for a bound on
the state) the cost grows by

    rho/2 (d^2 - s^2),    d = v - P(v),    v = g + s,    P(v) the nearest point of the set,

which is lambda g + rho/2 g^2 for an equality. Where the sum is least, rho d are the multipliers of the problem's own
Lagrangian, and |d - s| says how far the constraints are from being met, slack beside a multiplier included.

s and rho are data of the inner problem (its ``step_data``), so its kernel is built once. A path constraint at the end
holds with the last control: where it depends on that, it is part of the last step's cost.

Source: Bertsekas, Constrained Optimization and Lagrange Multiplier Methods, 1982, 3.1; Birgin and Martinez, Practical
Augmented Lagrangian Methods, 2014, algorithm 4.1; Howell, Jackson and Manchester, ALTRO, IROS 2019.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ocnopt.bounds import finite
from ocnopt.paths import Widened, fitted, looked_up, step_number
from ocnopt.problem_checks import nearby
from ocnopt.staged import Advance, Group, Index, Stage, StagedOCP

# rho of the first inner solve. With ten times more, planar_quadrotor_min_time takes more than twice the sweeps: where
# controls cost nothing, the constraints alone make the problem stiff.
FIRST_PENALTY = 1.0


class Multipliers(NamedTuple):
    """One number for each constraint: end ``(*batch, e)``, path ``(N + 1, *batch, c)``, state ``(N + 1, *batch, n)``.

    The same shapes hold the constraints themselves; n is 0 without bounds on the states.
    """

    end: Tensor
    path: Tensor
    state: Tensor

    def named(self) -> dict[str, Tensor]:
        """Those that there are, by the names that a problem gives its constraints."""
        pairs = zip(("terminal_constraint", "path_constraint", "state_bounds"), self, strict=True)
        return {name: value for name, value in pairs if value.shape[-1]}


def no_multipliers(problem: StagedOCP) -> Multipliers:
    """All multipliers, zero."""
    wide = Widened(problem)
    x0, p = problem.initial_state, problem.start_parameters()
    Z = wide.join([x0.new_zeros((*problem.batch_shape, size)) for size in wide.state_sizes], p)
    return Multipliers(*map(torch.zeros_like, measure(wide, Z, x0.new_zeros((wide.steps, *Z.shape[1:-1], wide.m)))))


def measure(wide: Widened, Z: Tensor, U: Tensor) -> Multipliers:
    """The constraints along a path, before they are compared with zero or bounds; zeros where there are fewer."""
    rows = [row for _, row in wide.path_excesses(Z, U)]
    width = max(row.shape[-1] for row in rows)
    path = torch.cat([pad(row, (0, width - row.shape[-1])) for row in rows])
    n = 0 if wide.problem.state_bounds is None else wide.n - wide.q
    return Multipliers(wide.end_error(Z[-1]), path, Z[..., :n])


def distances(problem: StagedOCP, shifted: Multipliers) -> Multipliers:
    """v - P(v) for shifted constraints v."""
    state, bounds = shifted.state, Widened(problem).state_bounds
    if bounds is not None:
        state = state - state.clamp(*fitted(bounds, state))
    return Multipliers(shifted.end, shifted.path.clamp(min=0.0), state)


class _Row:
    """What a step is given: where in its row of ``step_data`` the shifts s and the weights rho stand."""

    def __init__(self, problem: StagedOCP, multipliers: Multipliers) -> None:
        self.late = _reads_last_control(problem)
        c = multipliers.path.shape[-1]
        sizes = {
            "given": 0 if problem.step_data is None else problem.step_data.shape[-1],
            "end": multipliers.end.shape[-1],
            "path": c,
            "state": multipliers.state.shape[-1],
            "after": c if self.late else 0,
            "lower": 0,
            "upper": 0,
        }
        # of each state that has a bound anywhere: numbers, or none where they stand in the row
        self.limits: dict[int, tuple[float, float] | None] = {}
        if problem.state_bounds is not None:
            lower, upper = problem.state_bounds
            bounded = (lower.isfinite() | upper.isfinite()).reshape(-1, lower.shape[-1]).any(0)
            self.limits = dict.fromkeys(bounded.nonzero()[:, 0].tolist())
            if lower.ndim == 1:
                self.limits = {i: (float(lower[i]), float(upper[i])) for i in self.limits}
            else:
                sizes["lower"] = sizes["upper"] = lower.shape[-1]
        sizes |= {"rho": 1, "rho_state": 1, "rho_after": 1}
        self.places: dict[str, slice] = {}
        start = 0
        for name, size in sizes.items():
            self.places[name] = slice(start, start + size)
            start += size

    def part(self, row: Tensor, name: str) -> Tensor:
        """One part of a row."""
        return row[..., self.places[name]]

    def table(self, problem: StagedOCP, multipliers: Multipliers, penalty: Tensor) -> Tensor:
        """The rows of all nodes, ``(N + 1, *batch, s)``."""
        end, path, state = (value / penalty[..., None] for value in multipliers)
        nodes = len(path)
        rho = penalty[..., None].expand(nodes, *penalty.shape, 1)
        steps = torch.arange(nodes, device=rho.device).reshape(-1, *(1,) * (rho.ndim - 1))
        # the first state is given, and the last step alone looks after the end
        after_first, last = rho * (steps > 0), rho * (steps == nodes - 2)
        parts = [] if problem.step_data is None else [problem.step_data]
        parts += [end.expand(nodes, *end.shape), path, state]
        parts += [path[-1:].expand(nodes, *path[-1].shape)] if self.late else []
        if None in self.limits.values() and problem.state_bounds is not None:
            # the numbers of a row are moved about when functions are compared
            parts += [side.expand_as(state) for side in fitted(finite(problem.state_bounds), state)]
        return torch.cat([*parts, rho, after_first, last], dim=-1)


def _reads_last_control(problem: StagedOCP) -> bool:
    """Whether the path constraint at the end depends on the control."""
    if problem.path_constraint is None:
        return False
    wide, group = Widened(problem), problem.groups[-1]
    z = nearby(
        wide.join(
            [problem.initial_state.new_zeros((*problem.batch_shape, wide.n - wide.q))], problem.start_parameters()
        )[0]
    )
    u = z.new_zeros((*z.shape[:-1], wide.m))
    k = step_number(group, wide.steps, z)
    return not torch.equal(*(wide.path_excess(group, k, z, v).nan_to_num() for v in (u, nearby(u))))


def augment(problem: StagedOCP, multipliers: Multipliers, penalty: Tensor) -> StagedOCP:
    """The problem without its constraints, whose cost holds the augmented Lagrangian.

    Args:
        problem: the discrete problem.
        multipliers: of its constraints.
        penalty: rho ``(*batch)``.

    Returns:
        A problem that differs from that for other multipliers and penalties in its ``step_data`` alone.

    Example:
        >>> stage = Stage(lambda k, x, u: x + u, lambda k, x, u: (u**2).sum(-1), control_dim=1)
        >>> problem = StagedOCP(stage, initial_state=[0.0], steps=1, terminal_constraint=lambda x: x - 1)
        >>> free = augment(problem, no_multipliers(problem), torch.tensor(10.0).double())
        >>> free.terminal(torch.zeros(1).double(), problem.start_parameters())  # rho / 2 * 1^2
        tensor(5., dtype=torch.float64)
    """
    row = _Row(problem, multipliers)
    groups = tuple(replace(group, stage=_stage(problem, group, row)) for group in problem.groups)
    return problem.altered(
        groups=groups,
        terminal_cost=_terminal(problem, row),
        step_data=row.table(problem, multipliers, penalty),
        path_constraint=None,
        terminal_constraint=None,
        state_bounds=None,
    )


def first_augmented(problem: StagedOCP) -> StagedOCP:
    """The problem of the first inner solve."""
    return augment(problem, no_multipliers(problem), problem.initial_state.new_full(problem.batch_shape, FIRST_PENALTY))


def _stage(problem: StagedOCP, group: Group, row: _Row) -> Stage:
    return Stage(None, None, group.stage.control_dim, _joint(problem, group, row), _parts(problem, group, row))


def _joint(problem: StagedOCP, group: Group, row: _Row) -> Advance:
    """A stage with its share of the augmented Lagrangian."""
    stage = group.stage
    counted = stage.joint is None and not group.single
    ends = row.late and group.stop == problem.steps

    def joint(k: Index, x: Tensor, u: Tensor, p: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        if counted and isinstance(k, Tensor) and k.is_floating_point():
            # being lowered
            x_next, cost = looked_up(joint, k.to(torch.int64), x, u, p, own)
            return x_next, cost
        number = torch.tensor(k, device=x.device) if counted and isinstance(k, int) else k
        x_next, cost = problem.advance(stage, number, x, u, p, row.part(own, "given"))
        rho = row.part(own, "rho")
        if problem.path_constraint is not None:
            cost = cost + _path_toll(problem.path_excess(number, x, u, p), row.part(own, "path"), rho)
        cost = cost + _state_toll(row, x, own, "rho_state")
        if ends:
            after = problem.path_excess(number + 1, x_next, u, p)
            cost = cost + _path_toll(after, row.part(own, "after"), row.part(own, "rho_after"))
        return x_next, cost

    return joint


def _parts(problem: StagedOCP, group: Group, row: _Row) -> Callable[..., tuple[Tensor, ...]] | None:
    """What a stage is made of, with the constraint along the path."""
    own, counted = group.stage.parts, group.stage.joint is None
    if own is None:
        return None

    def parts(k: Index, x: Tensor, u: Tensor, p: Tensor, given: Tensor) -> tuple[Tensor, ...]:
        if counted and isinstance(k, Tensor) and k.is_floating_point():
            return looked_up(parts, k.to(torch.int64), x, u, p, given)
        before = () if problem.step_data is None else (row.part(given, "given"),)
        return (*own(k, x, u, p, *before), problem.path_excess(k, x, u, p))

    return parts


def _terminal(problem: StagedOCP, row: _Row) -> Callable[..., Tensor]:
    """The terminal cost with its share of the augmented Lagrangian."""
    last, m = problem.groups[-1], problem.groups[-1].stage.control_dim

    def terminal(x: Tensor, *given: Tensor) -> Tensor:
        own, p = given[-1], given[0] if len(given) > 1 else x.new_zeros(0)
        rho = row.part(own, "rho")
        cost = problem.terminal(x, p, row.part(own, "given"))
        s = row.part(own, "end")
        v = problem.end_error(x, p) + s
        cost = cost + _toll(v, s, rho)
        cost = cost + _state_toll(row, x, own, "rho")
        if problem.path_constraint is None or row.late:
            return cost
        excess = problem.path_excess(step_number(last, problem.steps, x), x, x.new_zeros((*x.shape[:-1], m)), p)
        return cost + _path_toll(excess, row.part(own, "path"), rho)

    return terminal


def _toll(d: Tensor, s: Tensor, rho: Tensor) -> Tensor:
    """What constraints add to the cost."""
    return (0.5 * rho * (d**2 - s**2)).sum(-1)


def _path_toll(excess: Tensor, s: Tensor, rho: Tensor) -> Tensor:
    s = s[..., : excess.shape[-1]]
    return _toll((excess + s).clamp(min=0.0), s, rho)


def _state_toll(row: _Row, x: Tensor, own: Tensor, weight: str) -> Tensor:
    """What the bounds on a state add."""
    total, shifts, rho = x.new_zeros(x.shape[:-1]), row.part(own, "state"), row.part(own, weight)
    for i, limits in row.limits.items():
        if i >= x.shape[-1]:
            continue
        s = shifts[..., i : i + 1]
        v = x[..., i : i + 1] + s
        if limits is not None:
            nearest = v.clamp(*limits)
        else:
            lower, upper = (row.part(own, name)[..., i : i + 1] for name in ("lower", "upper"))
            nearest = torch.minimum(torch.maximum(v, lower), upper)
        total = total + _toll(v - nearest, s, rho)
    return total
