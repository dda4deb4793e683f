"""What a solution breaks, in the user's words: which bound or constraint, at which step and time, by how much."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.paths import Widened, evaluate, step_number
from ocnopt.staged import StagedOCP


class Violation(NamedTuple):
    """One broken bound, constraint or step.

    Attributes:
        name: of the kind: "dynamics", "control_bounds", "state_bounds", "parameter_bounds", "path_constraint",
            "terminal_constraint", "initial_state".
        component: which entry, by the user's name where it has one.
        step: k; None for parameters and for the end.
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
        how = "is no number" if self.value != self.value else f"is broken by {self.value:.3g}"
        return f"{self.name} {self.component} {how}{place}{which}"


def find_violations(
    problem: StagedOCP, states: Sequence[Tensor], controls: Sequence[Tensor], p: Tensor, tolerance: float
) -> list[Violation]:
    """Everything that a path breaks by more than a tolerance, the worst first.

    Args:
        problem: the discrete problem.
        states: x_0..x_N, each ``(*batch, n)``.
        controls: u_0..u_{N-1}, each ``(*batch, m)``.
        p: ``(*batch, q)``, with T where it is free.
        tolerance: what counts as kept.
    """
    times = problem.times(p).expand(*problem.batch_shape, problem.steps + 1).movedim(-1, 0)
    found, ahead = [], 0
    for name, step, excess in _excesses(problem, states, controls, p):
        ahead = excess.shape[-1] if name == "path_constraint" else ahead
        broken = (~(excess <= tolerance)).nonzero().tolist()
        for *row, i in broken:
            place = tuple(row)
            time = float("nan") if step is None else float(times[(step, *place)])
            found.append(
                Violation(name, _called(problem, name, i, ahead), step, time, float(excess[(*place, i)]), place)
            )
    return sorted(found, key=lambda violation: (violation.value == violation.value, -violation.value))


def _called(problem: StagedOCP, kind: str, i: int, ahead: int) -> str:
    """The user's name of an entry, else its number; names of the terminal constraint follow the path constraint's."""
    names = {
        "control_bounds": problem.control_names,
        "path_constraint": problem.constraint_names,
        "terminal_constraint": problem.constraint_names,
        "parameter_bounds": None,
    }.get(kind, problem.state_names)
    place = i + (ahead if kind == "terminal_constraint" else 0)
    return names[place] if names is not None and place < len(names) else f"[{i}]"


def _excesses(
    problem: StagedOCP, states: Sequence[Tensor], controls: Sequence[Tensor], p: Tensor
) -> Iterator[tuple[str, int | None, Tensor]]:
    """How far each kind is broken at each step ``(*batch, size)``."""
    wide = Widened(problem)
    Z, U = wide.join(states, p), wide.join_controls(controls)
    yield "initial_state", 0, (states[0] - problem.initial_state).abs()
    gaps = evaluate(wide, Z, U).gaps
    for k, (u, bounds, size) in enumerate(zip(controls, problem.step_bounds, wide.state_sizes[1:], strict=True)):
        if gaps is not None:
            yield "dynamics", k, gaps[k][..., :size].abs()
        if bounds is not None:
            yield "control_bounds", k, torch.maximum(bounds[0] - u, u - bounds[1])
        if problem.state_bounds is not None:
            lower, upper = problem.state_bounds
            yield "state_bounds", k + 1, torch.maximum(lower - states[k + 1], states[k + 1] - upper)
    for group in problem.groups:
        for k in range(group.start, group.stop):
            number = step_number(group, k, Z)
            yield "path_constraint", k, wide.path_excess(group, number, Z[k], U[k])
    last = step_number(problem.groups[-1], problem.steps, Z)
    yield "path_constraint", problem.steps, wide.path_excess(problem.groups[-1], last, Z[-1], U[-1])
    yield "terminal_constraint", problem.steps, wide.end_error(Z[-1]).abs()
    if problem.parameter_bounds is not None:
        lower, upper = problem.parameter_bounds
        yield "parameter_bounds", None, torch.maximum(lower - p, p - upper)
