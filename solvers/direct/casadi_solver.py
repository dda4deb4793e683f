"""The "casadi" solver: direct transcription, CasADi's exact derivatives, IPOPT.

It is the solver for constraints: path and terminal constraints, bounds, minimum time. It returns no feedback gains. The
problems of a batch are solved one after another, so one that fails harms no other.

Source: Andersson et al., CasADi, Math. Prog. Comp. 11 (2019); Waechter and Biegler, IPOPT, Math. Prog. 106 (2006).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ocnopt.checks import nearest, solver_options
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.paths import rollout
from ocnopt.solvers.solution import Guess, Result
from ocnopt.staged import StagedOCP

if TYPE_CHECKING:
    from ocnopt.solvers.direct.attempts import Attempt

_CHOICES = {"method": ("multiple_shooting", "collocation"), "hessian": ("exact", "limited-memory")}


@dataclass(frozen=True)
class CasADi:
    """CasADi and IPOPT on a discrete problem, or by collocation on the continuous one behind it.

    Attributes:
        method: "multiple_shooting" solves the discrete problem itself; "collocation" the continuous one, with Legendre
            points and one constant control on each step.
        max_iterations: of IPOPT, for each attempt.
        tolerance: of IPOPT.
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
    restarts: int = 3
    degree: int = 3
    hessian: str = "exact"
    ipopt: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                hint = nearest(str(value), known)
                raise ProblemError(f"{name} is {value!r}; expected one of {', '.join(known)}{hint}")
        solver_options(self, at_least={"max_iterations": 1, "restarts": 0, "degree": 1}, positive=["tolerance"])
        if self.degree > 9:
            raise ProblemError(f"degree of CasADi is {self.degree}; expected degree <= 9, as CasADi has points for")

    def solve(self, problem: StagedOCP, guess: Guess, *, progress: bool = False) -> Result:
        """Solve a discrete problem from a guess; IPOPT prints its table with ``progress``.

        Raises:
            ProblemError: a function cannot be translated to CasADi, or collocation of a discrete problem.
            NonFiniteError: a single problem has no finite path to start from.
        """
        from ocnopt.solvers.direct.attempts import solve_one
        from ocnopt.solvers.direct.transcription import lower_collocation, lower_shooting

        began = time.perf_counter()
        if self.method == "collocation":
            states = start_states(problem, guess)
            lowered = lower_collocation(problem, guess, states, self.degree)
        else:
            # Where all sizes agree, the lowered steps roll the controls out, much faster than torch.
            alike = not any(group.single for group in problem.groups)
            states = [problem.initial_state] * (problem.steps + 1) if alike else start_states(problem, guess)
            lowered = lower_shooting(problem, guess, states)
        lowering_time = time.perf_counter() - began
        count = torch.Size(problem.batch_shape).numel()
        rows = range(count) if problem.batch_shape else [None]
        attempts = [
            solve_one(
                problem, lowered, guess, states, row, ipopt=self.options(), restarts=self.restarts, progress=progress
            )
            for row in rows
        ]
        if not problem.batch_shape and attempts[0].not_finite:
            raise NonFiniteError(attempts[0].status)
        return _result(problem, attempts, lowering_time)

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


def _result(problem: StagedOCP, attempts: "list[Attempt]", lowering_time: float) -> Result:
    batch, dtype, device = problem.batch_shape, problem.dtype, problem.device

    def gather(values: list[Any], kind: torch.dtype = dtype) -> Tensor:
        stacked = torch.stack([torch.as_tensor(value, dtype=kind, device=device) for value in values])
        return stacked.reshape((*batch, *stacked.shape[1:]))

    def path(name: str) -> list[Tensor]:
        return [gather(list(nodes)) for nodes in zip(*(getattr(a, name) for a in attempts), strict=True)]

    longest = max(len(a.history["cost"]) for a in attempts)
    history = {
        key: gather([[*a.history[key], *[a.history[key][-1]] * (longest - len(a.history[key]))] for a in attempts])
        for key in attempts[0].history
    }
    return Result(
        states=path("states"),
        controls=path("controls"),
        parameters=gather([a.parameters for a in attempts]),
        cost=gather([a.cost for a in attempts]),
        converged=gather([a.converged for a in attempts], torch.bool),
        iterations=gather([a.iterations for a in attempts], torch.int64),
        status=[a.status for a in attempts] if batch else attempts[0].status,
        constraint_violation=gather([a.violation for a in attempts]),
        wall_time=sum(a.wall_time for a in attempts),
        build_time=lowering_time + sum(a.build_time for a in attempts),
        history={key: value.movedim(-1, 0) for key, value in history.items()},
        costates=path("costates"),
    )
