"""Output times as a user gives them: numbers or tensors, one row for all samples or one for each."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ocnopt.checks import check_finite, float_tensor, numbers, times_in_order
from ocnopt.errors import ProblemError
from ocnopt.neural.checks import check_without_tangent
from ocnopt.neural.trees import tensors
from ocnopt.ocp import FreeHorizon

Times = Sequence[Any] | Tensor  # numbers or 0-d tensors, or rows of them


def as_times(given: Any) -> Tensor:
    """Times as a floating-point tensor, which has the graphs of tensors in a list too.

    Raises:
        ProblemError: no finite numbers, or tensors in a list that do not fit together.
    """
    if isinstance(given, list | tuple) and (held := tensors(given)):
        try:
            given = _stacked(given, held[0].device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ProblemError(
                f"times is a {type(given).__name__} of tensors that do not fit together ({error}); expected one number "
                "or 0-d tensor each: torch.stack([...])"
            ) from error
    if isinstance(given, Tensor):
        check_without_tangent(given)
        is_whole = not (given.is_floating_point() or given.is_complex() or given.dtype is torch.bool)
        check_finite("times", given)
        return given.double() if is_whole else given
    return float_tensor("times", given, torch.float64)


def _stacked(given: Any, device: torch.device) -> Tensor:
    if isinstance(given, list | tuple):
        return torch.stack([_stacked(entry, device) for entry in given])
    return numbers("times", given, torch.float64, device)


def read_end(T: Tensor, horizon: FreeHorizon) -> float:
    """The end of a free horizon as it stands.

    Raises:
        ProblemError: it is out of its bounds.
    """
    check_without_tangent(T)
    end = T.item()
    slack = 1e-6 * (horizon.upper - horizon.t0)  # single precision may round a bound outwards
    if not horizon.lower - slack <= end <= horizon.upper + slack:
        raise ProblemError(
            f"T is {end:g}, out of the bounds of {horizon}; expected T from {horizon.lower:g} to {horizon.upper:g}, "
            "which whatever fills or loads it has to keep: ode.horizon = oc.FreeHorizon(...) sets others"
        )
    return end


def check_times(times: Any) -> Tensor:
    """Read output times; equal ones may stand side by side, unless they need gradients."""
    given = as_times(times)
    if given.ndim != 1 or not given.numel() or not given.is_floating_point():
        raise ProblemError(
            f"times has shape {tuple(given.shape)} and dtype {given.dtype}; expected a vector of one or more "
            "floating-point times: torch.linspace(0.0, 1.0, 5); times for each sample, (K, B), need "
            'error_norm="sample"'
        )
    if given.requires_grad and bool((given.diff() == 0).any()):
        raise ProblemError(
            "times that need gradients are repeated; expected each of them once, as equal ones share a gradient: drop "
            "the repetitions and index the output"
        )
    return given


def read_times(times: Any, t0: float, end: float) -> tuple[list[float], Tensor | None, list[int]]:
    """Start and outputs as numbers, as a tensor if they need gradients, and which of them are wanted.

    Of equal outputs side by side there is one; a path against the horizon from ``t0`` to ``end`` starts from its end.
    """
    given, values, wanted = check_times(times), list[float](), list[int]()
    for time in given.tolist():
        if not values or time != values[-1]:
            values.append(time)
        wanted.append(len(values) - 1)
    against = len(values) > 1 and (values[1] - values[0]) * (end - t0) < 0
    start = end if against else t0
    from_start = math.isclose(values[0], start, rel_tol=1e-6, abs_tol=1e-9)
    if not from_start and (values[0] - start) * (end - t0) * (-1 if against else 1) <= 0:
        raise ProblemError(
            f"times begin at {values[0]}, behind the start {start} of the path; expected times that lead on from "
            "there: set horizon=oc.Horizon(start, end)"
        )
    if against and (values[0] - t0) * (end - t0) <= 1e-6 * (end - t0) ** 2:
        raise ProblemError(_outside("times", values, (t0, end)))
    if not from_start:
        values, wanted = [start, *values], [i + 1 for i in wanted]
    if len(values) > 1:
        times_in_order(values)
    moving = given if from_start else torch.cat([given.new_full((1,), start), given])
    return values, moving if given.requires_grad else None, wanted


def _outside(what: str, values: Sequence[float], span: tuple[float, float]) -> str:
    """Of a path against the horizon that has left it before its first output; ``odeint`` takes x for that output."""
    (t0, end), first, last = span, values[0], values[-1]
    return (
        f"{what} lead from {first} to {last}, away from the horizon, {t0} to {end}: against it x is that at {end}; "
        f"expected a first one between them, or horizon=oc.Horizon({first}, {last}) if x is the state at {first}"
    )


def read_sample_times(
    given: Times | None, span: tuple[float, float], T: Tensor | None, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Start and outputs of each sample ``(1 + K, B)``, float64, and the same with its graph if gradients are wanted.

    Args:
        given: what the user gave.
        span: start and end of the horizon.
        T: the end as a tensor that moves, if there is one.
        x: the state at the start.
    """
    start, end = span
    count = len(x)
    if given is None:
        end_times = (torch.tensor(end, dtype=torch.float64) if T is None else T).to(x.device, torch.float64)
        wanted = end_times.expand(1, count)
    else:
        wanted = _as_table(given, count).to(x.device, torch.float64).expand(-1, count)
    times, horizon = wanted.detach(), end - start
    turns = (times[-1] - times[0]) * horizon
    against = bool((turns <= 0).all() and (turns < 0).any())
    first = end if against else start
    # A first output that is the start but for rounding is the start.
    near = (times[0] - first).abs() <= 1e-6 * max(abs(first), 1e-3)
    origin = torch.where(near, wanted[0], first)
    moving = torch.cat([origin[None], wanted])
    times = moving.detach()
    ahead = (-horizon if against else horizon) * times.diff(dim=0)
    wrong = ~((ahead >= 0) & times[1:].isfinite()).all(0)
    if bool(wrong.any()):
        sample = int(wrong.nonzero()[0])
        raise ProblemError(
            f"the times of sample {sample}, {times[1:, sample].tolist()}, do not lead on from the start {first} of the "
            f"path towards {start if against else end}; expected times in that direction, equal ones side by side: "
            "sort them, or set horizon=oc.Horizon(start, end)"
        )
    outside = against & ((times[1] - start) * horizon <= 1e-6 * horizon**2) & (times[1] != times[-1])
    if bool(outside.any()):
        sample = int(outside.nonzero()[0])
        raise ProblemError(_outside(f"the times of sample {sample}", times[1:, sample].tolist(), span))
    return times, moving if moving.requires_grad else None


def _as_table(given: Times, count: int) -> Tensor:
    """Output times as ``(K, B)`` or ``(K, 1)``."""
    times = as_times(given)
    if isinstance(given, Tensor) and times.shape == (count,) and count > 1:
        raise ProblemError(
            f"times has shape ({count},) for {count} samples: an end for each of them, or {count} times for all; "
            "expected one of both to be said: times[None, :] for ends of their own, times[:, None] for common times"
        )
    table = times[:, None] if times.ndim == 1 else times
    if table.ndim != 2 or not table.numel() or not times.is_floating_point() or table.shape[1] not in (1, count):
        raise ProblemError(
            f"times has shape {tuple(times.shape)} and dtype {times.dtype}; expected floating-point times (K,) for all "
            f"samples, or (K, {count}) with a column for each of them: ends[None, :] for one end each"
        )
    return table
