"""Checks at the door: what a user hands in is read here, once, or refused with what came, what was expected, a cure.

A problem's function is *called* to be checked: at the batch shape of the initial state and on two stacked rows, which
must come out as the two rows alone do, since the library evaluates functions on extra leading axes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.errors import NonFiniteError, ProblemError

Bounds = tuple[Tensor, Tensor]

_FLOAT32_CURE = (
    "a float32 tensor captured in a float64 problem is the usual cause: create it with dtype=torch.float64, or pass "
    "dtype=torch.float32"
)


_OPTIMISER_RANGES = {
    "lr": "a number >= 0",
    "momentum": "a number in [0, 1)",
    "weight_decay": "a number >= 0",
    "damping": "a number >= 0",
}


def nearest(name: str, options: Iterable[str]) -> str:
    """Return "; did you mean ...?" where an option resembles the name, else nothing."""
    matches = get_close_matches(name, list(options), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def shape(tensor: Tensor) -> str:
    """A tensor's shape as a user writes it."""
    return str(tuple(tensor.shape))


def float_tensor(name: str, value: Any, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Read numbers as a finite float tensor without a graph.

    Raises:
        ProblemError: not numbers, or not finite.
    """
    try:
        tensor = torch.as_tensor(value, dtype=dtype, device=device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ProblemError(f"{name} is {type(value).__name__}; expected numbers or a tensor ({error})") from error
    if not bool(torch.isfinite(tensor).all()):
        raise ProblemError(f"{name} holds NaN or infinity at {first_non_finite(tensor)}; expected finite numbers")
    return tensor


def first_non_finite(tensor: Tensor) -> tuple[int, ...]:
    """Index of the first entry that is NaN or infinite."""
    return tuple(int(i) for i in (~torch.isfinite(tensor)).nonzero()[0])


def callable_or_none(name: str, function: Any, *, required: bool = False) -> None:
    """Refuse what cannot be called."""
    if function is None and not required:
        return
    if not callable(function):
        raise ProblemError(f"{name} is {type(function).__name__}; expected a function of plain torch code")


def bounds(name: str, value: Any, size: int, dtype: torch.dtype, device: torch.device) -> Bounds | None:
    """Read ``(lower, upper)``, scalars or vectors, as two tensors ``(size,)``; None stays None.

    Raises:
        ProblemError: not a pair, wrong size, NaN, or a lower bound above its upper bound.
    """
    if value is None:
        return None
    if not isinstance(value, Sequence | Tensor) or (isinstance(value, Tensor) and value.ndim == 0) or len(value) != 2:
        raise ProblemError(
            f"{name} is {value!r}; expected a pair (lower, upper) of scalars or of vectors of {size} numbers"
        )
    lower, upper = (_bound(f"{name}[{i}]", side, size, dtype, device) for i, side in enumerate(value))
    if bool((lower > upper).any()):
        i = int((lower > upper).nonzero()[0])
        raise ProblemError(
            f"{name}: lower {lower[i].item()} exceeds upper {upper[i].item()} at entry {i}; expected lower <= upper"
        )
    return lower, upper


def _bound(name: str, value: Any, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        side = torch.as_tensor(value, dtype=dtype, device=device).detach()
        side = side.expand(size).clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ProblemError(f"{name} is {value!r}; expected a number or a vector of {size} numbers") from error
    if bool(torch.isnan(side).any()):
        raise ProblemError(f"{name} holds NaN; expected numbers (use float('inf') for a side without a bound)")
    return side


def call(name: str, signature: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function and turn whatever it raises into a ProblemError that says how it was called."""
    try:
        return function(*arguments)
    except ProblemError:
        raise
    except Exception as error:
        shapes = ", ".join(shape(torch.as_tensor(argument)) for argument in arguments)
        cure = f" ({_FLOAT32_CURE})" if "dtype" in str(error) or "Double" in str(error) else ""
        raise ProblemError(
            f"{name}{signature} failed when called with arguments of shapes {shapes}: {type(error).__name__}: {error}"
            f"{cure}; expected plain torch code over the last axis that takes {signature}"
        ) from error


def vector_output(
    name: str, value: Any, expected: tuple[int, ...] | None, lead: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Check a vector-valued output: shape ``expected``, or ``(*lead, any)`` where that is None; dtype."""
    output = _tensor_output(name, value, dtype)
    if expected is not None:
        fits, wanted = tuple(output.shape) == expected, str(expected)
    else:
        fits, wanted = output.ndim > 0 and tuple(output.shape[:-1]) == lead, f"{lead} and one last axis"
    if not fits:
        raise ProblemError(
            f"{name} returned shape {shape(output)}; expected {wanted}: index the last axis (x[..., i]) and join the "
            "results with torch.stack([...], dim=-1)"
        )
    return output


def scalar_output(name: str, value: Any, lead: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Check a cost: it must broadcast to ``lead``, the state's shape without its last axis."""
    number = isinstance(value, int | float)
    output = _tensor_output(name, torch.as_tensor(value, dtype=dtype) if number else value, dtype)
    try:
        return output.expand(lead)
    except RuntimeError as error:
        raise ProblemError(
            f"{name} returned shape {shape(output)}; expected one number per state, shape {lead}: sum over the last "
            "axis (sum(-1)) and drop it"
        ) from error


def _tensor_output(name: str, value: Any, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        raise ProblemError(
            f"{name} returned {type(value).__name__}; expected a tensor: end with torch.stack([...], dim=-1) or a sum "
            "of tensors"
        )
    if value.dtype != dtype:
        raise ProblemError(f"{name} returned dtype {value.dtype}; expected {dtype}: {_FLOAT32_CURE}")
    return value


def finite_output(name: str, output: Tensor) -> None:
    """Refuse an output at the initial state that is not finite."""
    if not bool(torch.isfinite(output).all()):
        index = first_non_finite(output)
        raise ProblemError(
            f"{name} returned {output[index].item()} at entry {index} of its output at the initial state; expected "
            "finite numbers: start inside the function's domain"
        )


def same_rows(name: str, together: Tensor, rows: Sequence[Tensor]) -> None:
    """Refuse a function whose output on stacked rows differs from its output on each row."""
    for i, row in enumerate(rows):
        if not torch.allclose(together[i], row, rtol=1e-5, atol=1e-8, equal_nan=True):
            raise ProblemError(
                f"{name} gives other values on states stacked along a leading axis than on each alone (row {i}); "
                "expected the same: use the last axis only (x[..., 0], sum(-1)), no index from the front, no randomness"
            )


def function_rows(
    name: str,
    function: Callable[..., Any],
    rows: Sequence[Mapping[str, Any]],
    *,
    batch: tuple[int, ...],
    dtype: torch.dtype,
    size: int | None = None,
) -> Tensor:
    """Call one function on two rows of named arguments, alone and stacked; return what it gives on the first.

    Args:
        name: ends in "cost" for a function that returns one number a state.
        function: the user's.
        rows: arguments at the start and at a point nearby; an int stays as it is, a 0-d tensor (a time, a step) is
            stacked to broadcast against ``x[..., 0]``.
        batch: the initial state's batch shape.
        dtype: expected of what comes back.
        size: expected of the last axis; any if None.

    Raises:
        ProblemError: it fails, mixes leading axes, or returns a wrong shape, dtype or a non-finite value.
    """
    signature = f"({', '.join(rows[0])})"

    def read(given: Sequence[Any], lead: tuple[int, ...]) -> Tensor:
        value = call(name, signature, function, *given)
        if name.endswith("cost"):
            return scalar_output(name, value, lead, dtype)
        return vector_output(name, value, None if size is None else (*lead, size), lead, dtype)

    with torch.no_grad():
        alone = [read(tuple(row.values()), batch) for row in rows]
        finite_output(name, alone[0])
        together = [stack_rows(pair, len(batch)) for pair in zip(*(row.values() for row in rows), strict=True)]
        same_rows(name, read(together, (len(rows), *batch)), alone)
    return alone[0]


def stack_rows(values: Sequence[Any], axes: int) -> Any:
    """Rows on a leading axis; a 0-d tensor broadcasts against ``x[..., 0]``, an int or a shared vector stays."""
    first = values[0]
    if isinstance(first, int) or (first is values[1] and first.ndim > 0):
        return first
    rows = torch.stack(list(values))
    return rows.reshape(len(values), *(1,) * axes) if first.ndim == 0 else rows


def nearby(argument: Any) -> Any:
    """A seeded point close by; what is not floating-point stays."""
    if isinstance(argument, int) or not argument.is_floating_point():
        return argument
    generator = torch.Generator().manual_seed(0)
    return argument + 0.01 * torch.randn(argument.shape, generator=generator, dtype=torch.float64).to(argument)


def times_in_order(times: Sequence[float]) -> None:
    """Refuse times that do not run in one direction.

    Raises:
        ProblemError: fewer than two, not finite, or not strictly monotone.
    """
    gaps = [after - before for before, after in pairwise(times)]
    if not gaps or not all(math.isfinite(gap) and gap * gaps[0] > 0 for gap in gaps):
        raise ProblemError(
            f"times {[*times]} do not run in one direction; expected a start and one or more further times, strictly "
            "increasing or strictly decreasing: sort them and drop repeated ones"
        )


def start(initial_state: Any, parameters: Any, dtype: Any) -> tuple[Tensor, Tensor | None]:
    """Read x(t0) ``(*batch, n)`` and p ``(q,)``."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ProblemError(f"dtype is {dtype!r}; expected a floating-point dtype such as torch.float64")
    x0 = float_tensor("initial_state", initial_state, dtype)
    if x0.ndim == 0 or x0.shape[-1] == 0:
        raise ProblemError(f"initial_state has shape {shape(x0)}; expected (*batch, n) with n >= 1")
    if parameters is None:
        return x0, None
    p = float_tensor("parameters", parameters, dtype, x0.device)
    if p.ndim != 1 or p.shape[0] == 0:
        raise ProblemError(
            f"parameters has shape {shape(p)}; expected a flat vector (q,) with q >= 1: use torch.cat of "
            "flattened tensors"
        )
    return x0, p


def finite_path(steps: Sequence[Tensor], cost: Tensor, times: Tensor) -> None:
    """Refuse a first path that is not finite: ``steps`` are its states, or the gaps of an infeasible start.

    Raises:
        NonFiniteError: names the function, the time and the component.
    """
    for k, x in enumerate(steps):
        if not bool(torch.isfinite(x).all()):
            index = first_non_finite(x)
            raise NonFiniteError(
                f"dynamics led to {x[index].item()} in state component {index[-1]} at t = {float(times[k]):.6g} "
                f"(node {k} of {len(times) - 1}) of the first path; expected finite states: pass initial_guess= "
                "(controls, or states for an infeasible start), or take more steps"
            )
    if not bool(torch.isfinite(cost).all()):
        raise NonFiniteError(
            f"the cost of the first path is {cost.item()}; expected a finite number: pass initial_guess=, or look for "
            "a division by zero or the root of a negative number in running_cost and terminal_cost"
        )


def no_constraints(problem: Any, solver: str) -> None:
    """Refuse terminal and path constraints for a solver without multipliers."""
    for name in ("terminal_constraint", "path_constraint"):
        if getattr(problem, name) is not None:
            raise ProblemError(
                f"the problem has a {name}; solver {solver!r} has no multipliers for it: use solver='casadi', or a "
                "penalty in the cost"
            )


def check_model(model: object) -> None:
    """Refuse what is not a module with something to train."""
    if not isinstance(model, nn.Module):
        raise ProblemError(
            f"model is {type(model).__name__}; expected the nn.Module that is trained, not its parameters: "
            "SNOpt(model, lr=0.01)"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ProblemError("the model has no trainable parameter; expected one or more with requires_grad=True")


def check_choice(what: str, value: object, options: Sequence[str]) -> None:
    """Refuse a word that is not one of the options."""
    if value not in options:
        offered = " or ".join(map(repr, options))
        raise ProblemError(f"{what} is {value!r}; expected {offered}{nearest(str(value), options)}")


def check_count(what: str, value: object, default: int) -> None:
    """Refuse what is not a positive whole number."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ProblemError(f"{what} is {value!r}; expected a whole number of at least 1, {default} by default")


def check_number(what: str, value: object, expected: str, below: float = math.inf, above: float = 0.0) -> None:
    """Refuse what is not a number in ``[above, below)``."""
    if not (isinstance(value, int | float) and above <= value < below):
        raise ProblemError(f"{what} is {value!r}; expected {expected}")


def check_options(group: Mapping[str, Any]) -> None:
    """Refuse options of a parameter group that are out of range."""
    for name, expected in _OPTIMISER_RANGES.items():
        check_number(name, group[name], expected, below=1.0 if name == "momentum" else math.inf)


def listed(names: Sequence[str]) -> str:
    """At most eight names, and the number of the others."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more
