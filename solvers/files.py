"""Files of solutions: writing them, and telling by a fingerprint whether a problem is the one that was solved."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ocnopt.errors import DataError, ProblemError
from ocnopt.solvers.audit import audit
from ocnopt.staged import Series, StagedOCP

Read = TypeVar("Read")


def write_file(path: str | Path, wanted: str, write: Callable[[], Any]) -> None:
    """Write a file, or say why not.

    Args:
        path: where to.
        wanted: what was expected of it, in words.
        write: does it.

    Raises:
        DataError: it cannot be written.
    """
    if not Path(path).absolute().parent.is_dir():
        raise DataError(f"{path} lies in no folder; expected one that exists: create {Path(path).parent} first")
    try:
        write()
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be written ({reason}); expected {wanted}: choose another path") from error


def read_file(path: str | Path, known: int, make: Callable[[dict[str, Any]], Read]) -> Read:
    """Read the record of a solution and make something of it, or say why not.

    Args:
        path: of the file.
        known: the format that it has to have.
        make: takes the record.

    Raises:
        DataError: it is not there, no such record, or of another format.
    """
    wanted = "expected a file written by Solution.save"
    try:
        record = torch.load(path, weights_only=True)
        if record.pop("format") != known:
            raise DataError(
                f"{path} has another format than {known}; expected a file written by this version's Solution.save: "
                "solve the problem again and save it"
            )
        return make(record)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; {wanted}") from error
    except Exception as error:
        raise DataError(f"{path} is no saved solution ({type(error).__name__}); {wanted}") from error


def stays_here(what: str, instead: str) -> ProblemError:
    """The refusal to pickle or to copy what was built for one process."""
    return ProblemError(
        f"{what} was to be pickled or copied; expected it to stay where it was made, as it holds built programs, a "
        f"lock and your functions: {instead}. What travels are solutions: pickle them, or solution.save(path)"
    )


def fingerprint(problem: StagedOCP, states: Series, controls: Series, p: Tensor) -> dict[str, Tensor]:
    """What the problem gives on a path: another problem gives other numbers."""
    with torch.no_grad():
        numbers = audit(problem, states, controls, p)
    pairs = (*problem.control_bounds, problem.state_bounds, problem.parameter_bounds)
    bounds = [side.reshape(-1) for pair in pairs for side in pair or ()]
    return {
        "initial state": problem.initial_state,
        "times": problem.times(p),
        "bounds": torch.cat(bounds) if bounds else p.new_zeros(0),
        "cost": numbers.cost,
        "dynamics": numbers.gaps,
        "constraints": numbers.violation,
    }


def check_fingerprint(
    path: str | Path, saved: Mapping[str, Tensor] | None, compute: Callable[[], Mapping[str, Tensor]]
) -> None:
    """Refuse a problem that is not the one that was solved.

    Args:
        path: of the file.
        saved: the fingerprint in it.
        compute: the given problem's own on the same path.

    Raises:
        DataError: they differ, or there is nothing to compare with.
    """
    if saved is None:
        raise DataError(
            f"{path} was saved by a solution without its problem, so nothing tells whether this problem fits; expected "
            "the first file, which solve(..).save(..) wrote"
        )
    cure = "expected the problem it was saved with: transcribe that one, with the same steps and integrator"
    try:
        own = compute()
    except Exception as error:
        raise DataError(
            f"{path} holds the solution of a problem of other sizes ({type(error).__name__}); {cure}"
        ) from error
    for name, value in own.items():
        before = saved[name].to(value)
        near = 0.01 * torch.finfo(value.dtype).eps ** 0.5
        if before.shape != value.shape or not torch.allclose(before, value, near, near, equal_nan=True):
            raise DataError(f"{path} holds the solution of another problem, by its {name}; {cure}")
