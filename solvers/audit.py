"""What a discrete problem says of a given path: its cost, its gaps, and what it breaks, in the user's words."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.checks import Bounds
from ocnopt.errors import NonFiniteError
from ocnopt.paths import Widened, evaluate, fitted
from ocnopt.staged import Series, StagedOCP


class Audit(NamedTuple):
    """One number for each problem ``(*batch)``: cost, sum of |f(x_k, u_k) - x_{k+1}|, largest violation."""

    cost: Tensor
    gaps: Tensor
    violation: Tensor


class Violation(NamedTuple):
    """One broken bound, constraint or step.

    Attributes:
        name: of the kind: "dynamics", "control_bounds", "state_bounds", "parameter_bounds", "path_constraint",
            "terminal_constraint", "initial_state".
        component: which entry, by the user's name where it has one.
        step: k, N at the end; None for parameters.
        time: t_k, in the problem's unit; NaN for parameters.
        value: by how much it is broken, NaN where it is no number.
        problem: place in the batch; () without one.
    """

    name: str
    component: str
    step: int | None
    time: float
    value: float
    problem: tuple[int, ...] = ()

    def __str__(self) -> str:
        """One sentence.

        >>> str(Violation("path_constraint", "speed limit", 3, 0.5, 0.25))
        'path_constraint speed limit is broken by 0.25 at step 3, t = 0.5'
        """
        place = "" if self.step is None else f" at step {self.step}, t = {self.time:.6g}"
        which = f" in problem {', '.join(map(str, self.problem))}" if self.problem else ""
        how = "is no number" if math.isnan(self.value) else f"is broken by {self.value:.3g}"
        return f"{self.name} {self.component} {how}{place}{which}"


def audit(problem: StagedOCP, states: Series, controls: Series, p: Tensor) -> Audit:
    """Evaluate every step at its own given state.

    Args:
        problem: the discrete problem.
        states: x_0..x_N, each ``(*batch, n)``.
        controls: u_0..u_{N-1}, each ``(*batch, m)``.
        p: ``(*batch, q)``, with T where it is free.
    """
    wide = Widened(problem)
    Z, U = wide.join(states, p), wide.join_controls(controls)
    path, rows = evaluate(wide, Z, U), [excess for _, _, excess in _excesses(wide, Z, U, p)]
    worst = torch.cat([row.movedim(0, -1).flatten(len(problem.batch_shape)) for row in rows], dim=-1)
    # what is not finite is no path at all
    worst = torch.where(worst.isnan(), torch.inf, worst)
    violation = worst.clamp_min(0.0).amax(-1) if worst.shape[-1] else torch.zeros_like(path.cost)
    gaps = torch.zeros_like(path.cost) if path.gaps is None else path.gaps.abs().sum(-1).sum(0)
    return Audit(path.cost, gaps, violation)


def find_violations(
    problem: StagedOCP, states: Series, controls: Series, p: Tensor, tolerance: float
) -> list[Violation]:
    """Everything that a path breaks by more than a tolerance, the worst first.

    Args:
        problem: the discrete problem.
        states: as for :func:`audit`.
        controls: as for :func:`audit`.
        p: as for :func:`audit`.
        tolerance: what counts as kept.
    """
    wide = Widened(problem)
    Z, U, times = wide.join(states, p), wide.join_controls(controls), problem.times(p)
    times = times.expand(*problem.batch_shape, wide.steps + 1)
    gaps = evaluate(wide, Z, U).gaps
    rows = list(_excesses(wide, Z, U, p))
    rows.append(("initial_state", 0, (Z[:1, ..., : wide.state_sizes[0]] - problem.initial_state).abs()))
    if gaps is not None:
        rows.append(("dynamics", 0, gaps[..., : wide.n - wide.q].abs()))
    ahead = max(excess.shape[-1] for name, _, excess in rows if name == "path_constraint")
    found = []
    for name, first, excess in rows:
        # written so that a NaN is found too
        for i, *place, entry in (~(excess <= tolerance)).nonzero().tolist():
            step = None if first is None else first + i
            time = math.nan if step is None else float(times[(*place, step)])
            component = called(problem, name, entry, ahead)
            found.append(Violation(name, component, step, time, float(excess[(i, *place, entry)]), tuple(place)))
    return sorted(found, key=lambda violation: (not math.isnan(violation.value), -violation.value))


def called(problem: StagedOCP, kind: str, entry: int, ahead: int) -> str:
    """The user's name of an entry, else its number; names of the terminal constraint follow the path constraint's."""
    names = {
        "control_bounds": problem.control_names,
        "path_constraint": problem.constraint_names,
        "terminal_constraint": problem.constraint_names,
        "parameter_bounds": None,
    }.get(kind, problem.state_names)
    place = entry + (ahead if kind == "terminal_constraint" else 0)
    return names[place] if names is not None and place < len(names) else f"[{entry}]"


def placed(kind: str, name: str, step: int | None) -> str:
    """An entry of a kind and where it stands, in the user's words; the end where ``step`` is None."""
    return f"{kind}{'' if name.startswith('[') else ' '}{name} {'at the end' if step is None else f'at step {step}'}"


def rollout_status(states: Series, cost: Tensor, times: Tensor) -> str | list[str]:
    """What became of each closed loop, in one sentence.

    Args:
        states: x_0..x_N, each ``(*batch, n)``.
        cost: ``(*batch)``.
        times: of the nodes, ``(N + 1, *batch)``.

    Raises:
        NonFiniteError: a single one left the numbers.
    """
    sentence = "closed-loop rollout of a policy; nothing was optimised"
    lost = torch.stack([~torch.isfinite(x).all(-1) for x in states])
    broken = lost.any(0) | ~torch.isfinite(cost)
    if not bool(broken.any()):
        return sentence

    def told(step: Tensor, off_path: Tensor, time: Tensor) -> str:
        place = f"at t = {float(time):.6g} (node {int(step)} of {len(times) - 1})" if bool(off_path) else "in its cost"
        return f"closed-loop rollout of a policy that left the finite numbers {place}"

    steps = lost.to(torch.int8).argmax(0)
    when = torch.gather(times, 0, steps[None])[0]
    if cost.ndim == 0:
        raise NonFiniteError(
            f"{told(steps, lost.any(), when)}; expected finite states: take more steps (a stiff plan from collocation "
            "needs them), or start nearer to the plan"
        )
    rows = zip(broken.reshape(-1), steps.reshape(-1), lost.any(0).reshape(-1), when.reshape(-1), strict=True)
    return [told(*row) if bool(bad) else sentence for bad, *row in rows]


def _excesses(wide: Widened, Z: Tensor, U: Tensor, p: Tensor) -> Iterator[tuple[str, int | None, Tensor]]:
    """How far bounds and constraints are broken, ``(steps, *batch, size)``: the kind and the first of the steps."""
    yield "control_bounds", 0, _outside(U, wide.control_bounds)
    yield "state_bounds", 0, _outside(Z[..., : wide.n - wide.q], wide.state_bounds)
    box = wide.parameter_bounds
    yield "parameter_bounds", None, _outside(p[None], box and (box[0][None], box[1][None]))
    for first, excess in wide.path_excesses(Z, U):
        yield "path_constraint", first, excess
    yield "terminal_constraint", wide.steps, wide.end_error(Z[-1]).abs()[None]


def _outside(value: Tensor, bounds: Bounds | None) -> Tensor:
    """How far values, with time in front, are beyond their bounds."""
    if bounds is None:
        return value[..., :0]
    lower, upper = fitted(bounds, value)
    return torch.maximum(lower - value, value - upper)
