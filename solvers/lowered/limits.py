"""Which problems are for the lowered kernel, as far as their sizes tell: known before CasADi is imported."""

import torch

from ocnopt.errors import ProblemError
from ocnopt.integrate.tableaus import IMPLICIT
from ocnopt.staged import StagedOCP

# Beyond this size, building takes seconds (derivatives of single numbers).
_SIZE = 16
_BOXED = 6


def fits(problem: StagedOCP) -> str | None:
    """Why a problem is not for the lowered kernel, as far as its sizes tell; None if it may be."""
    if len(problem.groups) != 1 or problem.groups[0].single:
        return "its steps are a sequence of stages, not one stage applied again and again"
    if problem.tableau is not None and problem.tableau.name in IMPLICIT:
        return f"its integrator {problem.tableau.name!r} is implicit"
    size = problem.state_dim + problem.parameter_dim + problem.groups[0].stage.control_dim
    if size > _SIZE:
        return f"it has {size} states, controls and parameters, more than {_SIZE}"
    if problem.dtype != torch.float64 or problem.device.type != "cpu":
        return f"it is {problem.dtype} on {problem.device}, not torch.float64 on cpu"
    m, bounds = problem.groups[0].stage.control_dim, problem.control_bounds[0]
    if bounds is not None and m > _BOXED:
        return f"it has bounds on {m} controls, more than {_BOXED}"
    return None


def refused(reason: str) -> ProblemError:
    """The error for kernel='lowered' on a problem that it is not for."""
    return ProblemError(f"kernel='lowered' got a problem that it cannot take: {reason}; use kernel='auto' or 'torch'")
