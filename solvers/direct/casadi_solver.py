"""The "casadi" solver: direct transcription, CasADi's exact derivatives, IPOPT.

It takes path and terminal constraints, bounds on controls, states and parameters, and returns no feedback gains. The
problems of a batch are solved one after another, so one that fails harms no other.

Source: Andersson et al., CasADi, Math. Prog. Comp. 11 (2019); Waechter and Biegler, IPOPT, Math. Prog. 106 (2006).
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ocnopt.captured import given_rows
from ocnopt.checks import check_choice, solver_options
from ocnopt.errors import ProblemError
from ocnopt.integrate.tableaus import IMPLICIT
from ocnopt.paths import Widened, data_of_each, rollout, rows_stand_alone
from ocnopt.solvers.alone import Attempt, gathered, in_turn
from ocnopt.solvers.endings import Stopwatch
from ocnopt.solvers.solution import Guess, Result
from ocnopt.staged import StagedOCP

if TYPE_CHECKING:
    from ocnopt.solvers.direct.attempts import Instance
    from ocnopt.solvers.direct.transcription import Lowered

# Neither IPOPT's linear algebra nor a program that threads share is made for two at once.
_ONE_AT_A_TIME = threading.RLock()
_CHOICES = {"method": ("multiple_shooting", "collocation"), "hessian": ("exact", "limited-memory")}


@dataclass(frozen=True)
class CasADi:
    """CasADi and IPOPT on a discrete problem, or by collocation on the continuous one behind it.

    Attributes:
        method: "multiple_shooting" solves the discrete problem itself; "collocation" the continuous one, with Legendre
            points and one constant control on each step.
        max_iterations: of IPOPT, for each attempt.
        tolerance: of IPOPT.
        time_limit: seconds after which a solve stops with what it has, a batch as a whole; None for no limit.
        restarts: how often to try again from a seeded perturbation of the start when IPOPT fails.
        degree: Legendre points on each step of the collocation; the state at the nodes is of order twice that.
        hessian: "exact", or IPOPT's "limited-memory" approximation for wide networks.
        ipopt: further options of IPOPT by their own names, such as ``{"mu_strategy": "monotone"}``.

    Raises:
        ProblemError: an option out of its range.
    """

    method: str = "multiple_shooting"
    max_iterations: int = 1000
    tolerance: float = 1e-10
    time_limit: float | None = None
    restarts: int = 3
    degree: int = 3
    hessian: str = "exact"
    ipopt: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            check_choice(name, getattr(self, name), known)
        positive = ["tolerance", *([] if self.time_limit is None else ["time_limit"])]
        solver_options(self, at_least={"max_iterations": 1, "restarts": 0, "degree": 1}, positive=positive)
        if self.degree > 9:
            raise ProblemError(f"degree of CasADi is {self.degree}; expected degree <= 9, as CasADi has points for")

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve a discrete problem from a guess; IPOPT prints its table with ``progress``.

        Raises:
            ProblemError: a function cannot be translated to CasADi, or collocation of a discrete problem.
            NonFiniteError: a single problem has no finite path to start from.
        """
        prepared = self._prepare(problem, guess, progress=progress)
        result = prepared.run(problem, guess)
        return result._replace(build_time=prepared.lowering_time + result.build_time)

    def prepare(self, problem: StagedOCP, guess: Guess) -> "PreparedCasADi":
        """Lower the problem and build its programs; the guess says near which controls functions are compared.

        Raises:
            ProblemError: as for :meth:`solve`.
        """
        prepared = self._prepare(problem, guess, progress=False)
        for row in _rows(problem):
            prepared.instance(row)
        return prepared

    def _prepare(self, problem: StagedOCP, guess: Guess, *, progress: bool) -> "PreparedCasADi":
        from ocnopt.solvers.direct.transcription import lower_collocation, lower_shooting

        began = time.perf_counter()
        problem = problem.altered(data_of_each=data_of_each(problem))
        states = self.start_states(problem, guess)
        if self.method == "collocation" or _is_implicit(problem):
            degree = self.degree if self.method == "collocation" else None
            lowered = lower_collocation(problem, guess, states, degree)
        else:
            lowered = lower_shooting(problem, guess, states)
        alike = rows_stand_alone(Widened(problem))
        return PreparedCasADi(self, problem, lowered, alike, progress, time.perf_counter() - began)

    def start_states(self, problem: StagedOCP, guess: Guess) -> list[Tensor]:
        """Nodes of the right sizes, and where the lowered steps cannot roll the controls out, of the right values."""
        # Where all sizes agree, the lowered steps roll out, much faster than torch.
        whole = self.method != "collocation" and not _is_implicit(problem)
        alike = whole and not any(group.single for group in problem.groups)
        return [problem.initial_state] * (problem.steps + 1) if alike else start_states(problem, guess)

    def options(self) -> dict[str, Any]:
        """What IPOPT is told."""
        own = {
            "max_iter": int(self.max_iterations),
            "tol": float(self.tolerance),
            "hessian_approximation": self.hessian,
            # Without this the bounds are widened by 1e-8, and a cost would undercut the optimum.
            "bound_relax_factor": 0.0,
            # Fewer iterations than IPOPT's own default wherever bounds are active (88 against 213 on Tassa's car).
            "mu_strategy": "adaptive",
        }
        return {**own, **self.ipopt}


@dataclass(frozen=True)
class PreparedCasADi:
    """A solver for one problem, whose initial state, data and ``step_data`` may change.

    Where the problems of a batch are ``alike``, one program serves them all.
    """

    solver: CasADi
    problem: StagedOCP
    lowered: "Lowered"
    alike: bool
    progress: bool
    lowering_time: float
    instances: "dict[int | None, Instance]" = field(default_factory=dict)

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve the problem as it is now; ``progress`` is for :meth:`CasADi.solve` alone.

        Raises:
            ProblemError: something else of it has changed.
            NonFiniteError: as for :meth:`CasADi.solve`.
        """
        self.lowered.require_same(problem.altered(data_of_each=self.problem.data_of_each))
        return self.run(problem, guess)._replace(build_time=0.0)

    def run(self, problem: StagedOCP, guess: Guess) -> Result:
        """Solve the problem that this was built for.

        Raises:
            NonFiniteError: as for :meth:`CasADi.solve`.
        """
        states = self.solver.start_states(problem, guess)
        given = given_rows(problem.altered(data_of_each=self.problem.data_of_each))
        times: list[float] = []

        def built(row: int | None) -> Any:
            kept = self._key(row) in self.instances
            one = self.instance(row)
            if not kept:
                times.append(one.build_time)
            if not kept and not self.alike:
                # thousands of programs would fill the memory
                del self.instances[row]
            return one

        def attempt(row: int | None) -> Attempt:
            with _ONE_AT_A_TIME:
                return built(row).attempt(problem, guess, states, given, row, self.solver.restarts, stopwatch)

        if self.alike:
            # before the clock runs; Ctrl-C still ends everything, as there is nothing to return
            built(_rows(problem)[0])
        with Stopwatch(self.solver.time_limit) as stopwatch:
            batch = bool(problem.batch_shape)
            result = in_turn(problem, guess, attempt, stopwatch) if batch else gathered(problem, [attempt(None)])
        return result._replace(build_time=sum(times))

    def instance(self, row: int | None) -> "Instance":
        """The program of one problem."""
        from ocnopt.solvers.direct.attempts import Instance

        key = self._key(row)
        if key not in self.instances:
            options = self.solver.options()
            self.instances[key] = Instance(self.problem, self.lowered, key, options, progress=self.progress)
        return self.instances[key]

    def _key(self, row: int | None) -> int | None:
        return 0 if self.alike and row is not None else row


def _is_implicit(problem: StagedOCP) -> bool:
    return problem.tableau is not None and problem.tableau.name in IMPLICIT


def _rows(problem: StagedOCP) -> Sequence[int | None]:
    """The problems of a batch by number; None without a batch."""
    return range(torch.Size(problem.batch_shape).numel()) if problem.batch_shape else [None]


def start_states(problem: StagedOCP, guess: Guess) -> list[Tensor]:
    """The guess's states, else its controls rolled out; a node that is not finite repeats the one before."""
    if guess.states is not None:
        return list(guess.states)
    with torch.no_grad():
        nodes = list(rollout(problem, guess.controls, problem.initial_state, guess.parameters).states)
    for k in range(1, len(nodes)):
        if nodes[k].shape == nodes[k - 1].shape:
            nodes[k] = torch.where(nodes[k].isfinite(), nodes[k], nodes[k - 1])
        nodes[k] = nodes[k].nan_to_num(0.0, 0.0, 0.0)
    return nodes
