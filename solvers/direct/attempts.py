"""One problem of a batch, from its first start to the answer that is kept.

IPOPT may end in a point that is no solution ("infeasible", a failed restoration phase, a NaN). Then it is started again
from seeded perturbations of the start, small ones first; the first success is kept, else the most nearly feasible end.
"""

import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import casadi
import numpy as np
import torch
from torch import Tensor

from ocnopt.errors import NonFiniteError
from ocnopt.solvers.alone import Attempt
from ocnopt.solvers.direct.nlp import Answer, Vector, Watch, evaluate, make_solver, make_values, run_solver
from ocnopt.solvers.direct.path_program import PathProgram, assemble, make_walks, roll_out
from ocnopt.solvers.direct.transcription import Lowered
from ocnopt.solvers.endings import Stopwatch, stopped
from ocnopt.solvers.guess import perturbed
from ocnopt.solvers.solution import Guess
from ocnopt.staged import StagedOCP

_ADVICE = {
    "Solve_Succeeded": "converged to IPOPT's tolerance",
    "Solved_To_Acceptable_Level": "converged to IPOPT's acceptable level only; loosen tolerance= or rescale",
    "Infeasible_Problem_Detected": "not converged: IPOPT found no feasible path near the start; check that constraints "
    "and bounds can be met together, lengthen the horizon, or pass initial_guess=",
    "Maximum_Iterations_Exceeded": "not converged: max_iterations= reached; raise it or start closer",
    "Restoration_Failed": "not converged: IPOPT could not get back to feasible paths; pass initial_guess= with states, "
    "or relax a constraint",
    "Diverging_Iterates": "not converged: the unknowns grow without bound; add bounds or a cost on them",
    "Invalid_Number_Detected": "not converged: a function or its derivative is NaN or infinite on the way; bound "
    "controls and parameters, or start inside the functions' domain",
    "Search_Direction_Becomes_Too_Small": "not converged: the steps became too small; rescale the problem or loosen "
    "tolerance=",
    "Error_In_Step_Computation": "not converged: no step could be computed; some constraints may repeat others",
    "Not_Enough_Degrees_Of_Freedom": "not converged: more equality constraints than unknowns; drop some or add steps",
    "Maximum_CpuTime_Exceeded": "not converged: out of the time that ipopt= allows",
    "Maximum_WallTime_Exceeded": "not converged: out of the time that ipopt= allows",
}
_NOT_FINITE = "Invalid_Number_Detected"
_FINAL = (
    "Maximum_Iterations_Exceeded",
    "Maximum_CpuTime_Exceeded",
    "Maximum_WallTime_Exceeded",
    "Not_Enough_Degrees_Of_Freedom",
    "Invalid_Option",
)
_NOISE = (0.1, 0.3, 1.0)


class Instance:
    """One problem of the batch, ready for IPOPT from any x_0 and with any data, or any problem if all are alike."""

    def __init__(
        self, problem: StagedOCP, lowered: Lowered, row: int | None, ipopt: Mapping[str, Any], *, progress: bool
    ) -> None:
        began = time.perf_counter()
        self.problem = problem
        self.runs, end = lowered.rows(row)
        self.path = assemble(self.runs, end, problem if row is None else problem.for_rows(row))
        self.watch = Watch(self.path.program)
        self.solver = make_solver(self.path.program, ipopt, self.watch, progress=progress)
        self.build_time = time.perf_counter() - began

    @functools.cached_property
    def values(self) -> casadi.Function:
        """The cost and the constraints."""
        return make_values(self.path.program)

    @functools.cached_property
    def walks(self) -> list[casadi.Function]:
        """The steps, one after the other."""
        return make_walks(self.runs)

    def attempt(
        self,
        problem: StagedOCP,
        guess: Guess,
        states: Sequence[Tensor],
        given: Tensor,
        row: int | None,
        restarts: int,
        stopwatch: Stopwatch,
    ) -> Attempt:
        """Solve one row of the batch from a guess, with restarts; ``row`` is None without a batch.

        ``given`` is what the steps of all problems are given besides, of :func:`ocnopt.captured.given_rows`.

        Raises:
            NonFiniteError: a problem without a batch has no finite path; in a batch its cost is NaN.
        """
        began = time.perf_counter()
        self.watch.stopwatch = stopwatch
        data = given[:, (row or 0) if given.shape[1] > 1 else 0].double().cpu().numpy().T
        path = self.path.started_at(row_of(problem.initial_state, row))
        if row is not None and problem.bounds_differ:
            path = path.within(problem.for_rows(row))
        start = self._start(path, guess, states, row, data)
        answers = [self._run(path, start, data)]
        for i in range(restarts):
            final = answers[-1].succeeded or answers[-1].statistics["return_status"] in _FINAL
            if final or stopwatch.reason is not None:
                break
            answers.append(self._run(path, _perturbed(path, start, i), data))
        best = min(answers, key=lambda answer: _rank(path, answer))
        reason = None if best.succeeded else stopwatch.reason
        broken = "" if best.succeeded else self._broken(path, start, data)
        violation, worst = path.violation(best.constraints)
        where = path.place(problem, worst) if violation > 0 else ""
        status = _status(best, answers, broken, reason, where and f" (largest violation {violation:.2g}: {where})")
        if broken and row is None:
            raise NonFiniteError(status)
        return Attempt(
            states=[best.unknowns[place] for place in path.states],
            controls=[best.unknowns[place] for place in path.controls],
            costates=path.costates(best.multipliers),
            multipliers=path.multipliers(best, bounded=problem.state_bounds is not None),
            parameters=best.unknowns[path.parameters],
            cost=math.nan if broken else best.cost,
            converged=best.succeeded,
            iterations=sum(int(answer.statistics["iter_count"]) for answer in answers),
            status=status,
            violation=violation,
            wall_time=time.perf_counter() - began,
            history=_history(best),
        )

    def _run(self, path: PathProgram, start: Vector, data: Vector) -> Answer:
        """Solve from one start; where IPOPT failed, cost and constraints are those of the point it left."""
        answer = run_solver(self.solver, path.program, start, data)
        if answer.succeeded:
            return answer
        # what IPOPT reports after a failed evaluation are zeros
        cost, g = evaluate(self.values, answer.unknowns, data)
        return answer._replace(cost=cost, constraints=g)

    def _start(self, path: PathProgram, guess: Guess, nodes: Sequence[Tensor], row: int | None, data: Vector) -> Vector:
        """The guess as a point: its states, or its controls rolled out where that is possible."""
        controls, p = [row_of(u, row) for u in guess.controls], row_of(guess.parameters, row)
        if guess.states is not None:
            return _point(path, [row_of(x, row) for x in guess.states], controls, p)
        plain = not any(place.size for place in path.inner) and len({x.size for x in path.states}) == 1
        states = [row_of(x, row) for x in nodes]
        rolled = roll_out(self.runs, self.walks, states[0], controls, p, data) if plain else states
        start = _point(path, rolled, controls, p)
        if self._broken(path, start, data):
            # The controls lead out of the functions' domain, but nothing asks for a start on a path: stay at x_0.
            still = [
                states[0] if x.shape == states[0].shape else np.nan_to_num(x, posinf=0.0, neginf=0.0) for x in rolled
            ]
            start = _point(path, still, controls, p)
        return start

    def _broken(self, path: PathProgram, point: Vector, data: Vector) -> str:
        """The first function without a finite value at the point; empty if there is none."""
        cost, constraints = evaluate(self.values, point, data)
        rows = np.flatnonzero(~np.isfinite(constraints))
        if rows.size:
            return path.place(self.problem, int(rows[0]))
        return "" if np.isfinite(cost) else "the cost"


def row_of(values: Tensor, row: int | None) -> Vector:
    """One problem's numbers ``(size,)`` out of ``(*batch, size)``."""
    values = values if row is None else values.reshape(values.shape[:-1].numel(), values.shape[-1])[row]
    return values.detach().to("cpu", torch.float64).numpy().copy()


def _point(path: PathProgram, nodes: Sequence[Vector], controls: Sequence[Vector], p: Vector) -> Vector:
    """Values at their places; inner points of a step lie on the line between its nodes."""
    point = np.zeros(path.program.shape[1])
    for places, values in ((path.states, nodes), (path.controls, controls), ([path.parameters], [p])):
        for place, value in zip(places, values, strict=True):
            point[place] = value
    for k, place in enumerate(path.inner):
        if place.size:
            tau = np.array(casadi.collocation_points(place.size // nodes[k].size, "legendre"))[:, None]
            point[place] = ((1 - tau) * nodes[k] + tau * nodes[k + 1]).reshape(-1)
    return point


def _perturbed(path: PathProgram, start: Vector, attempt: int) -> Vector:
    """Noise on everything but x_0, relative to the size of each unknown, or to half the width of its bounds."""
    lower, upper = path.program.box
    width = np.where(np.isfinite(upper - lower), 0.5 * (upper - lower), 1 + np.abs(start))
    amount = torch.from_numpy(_NOISE[min(attempt, len(_NOISE) - 1)] * width)
    box, generator = (torch.from_numpy(lower), torch.from_numpy(upper)), torch.Generator().manual_seed(attempt)
    moved: Vector = perturbed(torch.from_numpy(start), amount, box, generator).numpy()
    moved[path.states[0]] = start[path.states[0]]
    return moved


def _history(best: Answer) -> dict[str, list[float]]:
    own = {"cost": "obj", "infeasibility": "inf_pr", "step": "alpha_pr", "regularisation": "regularization_size"}
    iterations: Mapping[str, Any] = best.statistics.get("iterations") or {}
    return {name: list(iterations.get(key) or [float("nan")]) for name, key in own.items()}


def _rank(path: PathProgram, answer: Answer) -> tuple[bool, bool, float]:
    """Smaller is better: success, then finite numbers, then the smallest violation."""
    violation, _ = path.violation(answer.constraints)
    return not answer.succeeded, answer.statistics["return_status"] == _NOT_FINITE, violation


def _status(best: Answer, answers: Sequence[Answer], broken: str, outcome: int | None, worst: str) -> str:
    """One sentence: how it ended, what to do, where it is worst, and the restarts; ``outcome`` where it was stopped."""
    reason = str(best.statistics["return_status"])
    sentence = _ADVICE.get(reason, f"not converged: IPOPT ended with {reason}")
    if outcome is not None:
        count = sum(int(answer.statistics["iter_count"]) for answer in answers)
        why, advice = stopped(outcome)
        sentence = f"stopped after {count} iteration{'' if count == 1 else 's'}: {why}; {advice}"
    if broken:
        sentence += f" (at the start: {broken})"
    elif not best.succeeded:
        sentence += worst
    if len(answers) > 1:
        first = str(answers[0].statistics["return_status"]).replace("_", " ").lower()
        sentence += f"; after {len(answers) - 1} restart(s) from seeded perturbations, the given start ended '{first}'"
    return sentence
