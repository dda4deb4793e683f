"""Bounds of controls, states and parameters: read from what a user gives, cut into steps, picked for some problems.

A user writes a bound in the shape of what it bounds, or in any that broadcasts to it: ``(*batch, L, size)``, L being
the steps of the controls or the nodes of the states. ``(size,)`` holds always and for all, ``(L, size)`` has a row for
each step, ``(*batch, 1, size)`` one for each problem, ``(*batch, L, size)`` one for each step of each problem. Two axes
are always (L, size); where they may also be meant as a row for each problem they are refused. Parameters, and controls
at one time, have no axis L: ``(size,)`` or ``(*batch, size)``.

Inside, time is in front: ``(size,)``, ``(L, size)`` or ``(L, *batch, size)``.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocnopt.checks import Bounds, numbers, shape
from ocnopt.errors import ProblemError

FAR = 1e20


def read(name: str, value: Any, size: int, like: Tensor, *, batch: Sequence[int] = (), rows: str = "") -> Bounds | None:
    """Read ``(lower, upper)``; None stays None.

    Args:
        name: of the bounds.
        value: the pair.
        size: of what is bounded.
        like: has the problem's dtype and device.
        batch: the batch shape.
        rows: how many there may be, in words: one for each step or node; empty for none.

    Returns:
        Two tensors ``(size,)``, or ``(*batch, size)`` where they differ between problems; with an axis of steps
        ``(*lead, L, size)``, lead being the batch shape or as many ones.

    Raises:
        ProblemError: not a pair, another shape, NaN, or a lower bound above its upper bound.
    """
    if value is None:
        return None
    value = torch.as_tensor(value) if isinstance(value, np.ndarray) and value.ndim > 0 else value
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence | Tensor)
        or (isinstance(value, Tensor) and value.ndim == 0)
        or len(value) != 2
    ):
        raise ProblemError(
            f"{name} is {value!r}; expected a pair (lower, upper) of scalars or of vectors of {size} numbers"
        )
    lower, upper = (_side(f"{name}[{i}]", side, size, like, tuple(batch), rows) for i, side in enumerate(value))
    if rows and lower.ndim > 1 < upper.ndim and len({lower.shape[-2], upper.shape[-2]} - {1}) > 1:
        raise ProblemError(
            f"{name} have {lower.shape[-2]} and {upper.shape[-2]} rows; expected one for each step on both sides"
        )
    lower, upper = torch.broadcast_tensors(lower, upper)
    if bool((lower > upper).any()):
        at = tuple((lower > upper).nonzero()[0].tolist())
        i = at[0] if len(at) == 1 else at
        raise ProblemError(
            f"{name}: lower {lower[at].item()} exceeds upper {upper[at].item()} at entry {i}; expected lower <= upper"
        )
    return lower, upper


def _side(name: str, value: Any, size: int, like: Tensor, batch: tuple[int, ...], rows: str) -> Tensor:
    if value is None or (isinstance(value, list | tuple) and None in value):
        raise ProblemError(
            f"{name} is {value!r}; expected numbers: float('inf') or -float('inf') stands for a side without a bound"
        )
    if isinstance(value, Tensor) and value.requires_grad:
        raise ProblemError(f"{name} requires grad, but no gradient reaches bounds; expected .detach() or a constraint")
    forms = f"a number or a vector of {size} numbers"
    if rows or batch:
        whole = [*map(str, batch), *([rows] if rows else []), str(size)]
        forms += f", or what broadcasts to ({', '.join(whole)})"
    try:
        side = numbers(name, value, like.dtype, like.device)
    except ProblemError as error:
        raise ProblemError(f"{name} is {value!r}; expected {forms}") from error
    lead = tuple(side.shape[:-1])
    if rows and math.prod(lead) > 1 and lead == batch[-len(lead) :]:
        steps, own = (*(1,) * len(batch), *side.shape[-2:]), (*lead, 1, side.shape[-1])
        raise ProblemError(
            f"{name} has shape {shape(side)}, which may mean rows for steps or for the problems of a batch {batch}; "
            f"expected {steps} for steps, {own} for problems: say which by an axis of size one"
        )
    try:
        side = _fitted(side, size, batch, bool(rows)).clone()
    except RuntimeError as error:
        came = f"is {value!r}" if side.ndim < 2 else f"has shape {shape(side)}"
        raise ProblemError(f"{name} {came}; expected {forms}") from error
    if bool(torch.isnan(side).any()):
        raise ProblemError(f"{name} holds NaN; expected numbers (use float('inf') for a side without a bound)")
    return side


def _fitted(side: Tensor, size: int, batch: tuple[int, ...], timed: bool) -> Tensor:
    """One side as :func:`read` returns it.

    Raises:
        RuntimeError: another shape.
    """
    rows = side.shape[-2:-1] if timed else torch.Size()
    lead = side.shape[: max(0, side.ndim - 1 - len(rows))]
    if math.prod(lead) > 1:
        return side.expand(*batch, *rows, size)
    side = side.reshape((*rows, *side.shape[-1:])).expand(*rows, size)
    if math.prod(rows) == 1:
        return side.reshape(size)
    return side.reshape((*(1,) * len(batch), *rows, size))


def by_step(name: str, bounds: Bounds | None, count: int, what: str, batch: Sequence[int]) -> Bounds | None:
    """Bounds as read, with time in front: ``(size,)``, ``(count, size)`` or ``(count, *batch, size)``.

    Raises:
        ProblemError: they have rows, but not one for each.
    """
    if bounds is None or bounds[0].ndim == 1:
        return bounds
    rows, size = bounds[0].shape[-2:]
    if rows not in (1, count):
        raise ProblemError(
            f"{name} have {rows} rows for {count} {what}; expected one row for each, a vector for all"
            f"{', or a function of time' if name == 'control_bounds' else ''}"
        )
    if math.prod(bounds[0].shape[:-2]) == 1:
        lower, upper = (side.reshape(count, size) for side in bounds)
    else:
        lower, upper = (side.movedim(-2, 0).expand(count, *batch, size) for side in bounds)
    return lower, upper


def finite(bounds: Bounds) -> Bounds:
    """Both with :data:`FAR` for infinity, which makes NaN of a product with zero or of a difference."""
    return bounds[0].clamp(-FAR, FAR), bounds[1].clamp(-FAR, FAR)


def of_controls(value: Any, groups: Sequence[Any], initial_state: Tensor) -> tuple[Bounds | None, ...]:
    """Read the bounds of the controls of a discrete problem, those of each of its groups of steps."""
    batch, steps = initial_state.shape[:-1], groups[-1].stop
    known: dict[int, Bounds | None] = {}
    for m in {group.stage.control_dim for group in groups}:
        pair = read("control_bounds", value, m, initial_state, batch=batch, rows="N")
        known[m] = by_step("control_bounds", pair, steps, "steps", batch)
    found = []
    for group in groups:
        pair = known[group.stage.control_dim]
        if pair is not None and pair[0].ndim > 1:
            pair = (pair[0][group.start : group.stop], pair[1][group.start : group.stop])
        found.append(pair)
    return tuple(found)


def each(bounds: Bounds | None, count: int) -> list[Bounds | None]:
    """Those of every step or node, ``(size,)`` or ``(*batch, size)``, out of what :func:`by_step` returns."""
    if bounds is None or bounds[0].ndim == 1:
        return [bounds] * count
    return list(zip(*(side.unbind(0) for side in bounds), strict=True))


def picked(bounds: Bounds | None, rows: Tensor | int, axis: int) -> Bounds | None:
    """Those of some rows of the flattened batch, whose axes begin at ``axis``; a single row loses them.

    What is then the same at all steps loses the axis of steps too.
    """
    if bounds is None or bounds[0].ndim <= axis + 1:
        return bounds
    lower, upper = (side.flatten(axis, -2)[(slice(None),) * axis + (rows,)] for side in bounds)
    if axis and isinstance(rows, int) and all(bool((side == side[0]).all()) for side in (lower, upper)):
        return lower[0], upper[0]
    return lower, upper
