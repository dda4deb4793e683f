"""Errors that ocnopt raises.

Each message has three parts: what came, what was expected, what to do about it.
"""

from typing import Any


class OcnoptError(Exception):
    """Base class of every error that ocnopt raises on purpose."""


class ProblemError(OcnoptError, ValueError):
    """A problem, an argument or an option is wrong: nothing was computed."""


class DataError(OcnoptError):
    """A data file is missing, truncated or not of its format."""


class NonFiniteError(OcnoptError, ArithmeticError):
    """A NaN or an infinity appeared where the computation cannot go on."""


class ConvergenceError(OcnoptError, RuntimeError):
    """A solver stopped before its tolerance under ``strict=True``, or an ODE solve ran out of steps or evaluations.

    ``solution`` is what the solver reached, where there is one.
    """

    def __init__(self, message: str, solution: Any = None) -> None:
        super().__init__(message)
        self.solution = solution
