"""Checks at the door: what a user hands in is read here, once, or refused with what came, what was expected, a cure.

Functions are checked in :mod:`ocnopt.problem_checks`.
"""

import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from ocnopt.errors import NonFiniteError, ProblemError

Bounds = tuple[Tensor, Tensor]

_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")

OPTIMISER_RANGES = {
    "lr": "a number >= 0",
    "momentum": "a number in [0, 1)",
    "weight_decay": "a number >= 0",
    "damping": "a number >= 0",
    "decay": "a number in [0, 1)",
    "eps": "a number >= 0",
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
    # a copy: what the user does to the numbers later does not reach the problem
    tensor = numbers(name, value, dtype, device).detach().clone()
    check_finite(name, tensor)
    return tensor


def traced(value: Any, dtype: torch.dtype) -> Tensor | None:
    """The numbers with their graph, where they have one."""
    return value.to(dtype) if isinstance(value, Tensor) and value.requires_grad else None


def numbers(name: str, value: Any, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Read numbers, NaN and infinity among them, as a float tensor; a tensor keeps its graph.

    Raises:
        ProblemError: not real numbers.
    """
    try:
        return torch.as_tensor(_real(value), dtype=dtype, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ProblemError(f"{name} is {type(value).__name__}; expected numbers or a tensor ({error})") from error


def _real(value: Any) -> Any:
    """The value; torch would drop an imaginary part with no more than a warning."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and "complex" in str(value.dtype):
        raise TypeError("complex: write the real and the imaginary part as two real entries")
    return value


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        ProblemError: an entry is one of them.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise ProblemError(f"{name} holds NaN or infinity at {first_non_finite(tensor)}; expected finite numbers")


def first_non_finite(tensor: Tensor) -> tuple[int, ...]:
    """Index of the first entry that is NaN or infinite."""
    return tuple(int(i) for i in (~torch.isfinite(tensor)).nonzero()[0])


def is_number(value: object) -> bool:
    """Whether it is a real number of any library; bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is an integer of any library; bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(what: str, value: object, least: int) -> int:
    """Read an integer of any library.

    Raises:
        ProblemError: it is none, or smaller than ``least``.
    """
    if not is_whole(value) or value < least:
        raise ProblemError(f"{what} is {value!r}; expected an integer >= {least}")
    return int(value)


def as_floats(record: Any) -> None:
    """Make every field of a frozen record a Python float.

    Raises:
        ProblemError: one is no number.
    """
    for name in record.__dataclass_fields__:
        value = getattr(record, name)
        if not is_number(value):
            raise ProblemError(
                f"{name} of {type(record).__name__} is {value!r}; expected a number: use float(..) for a tensor"
            )
        object.__setattr__(record, name, float(value))


def callable_or_none(name: str, function: Any, *, required: bool = False) -> None:
    """Refuse what cannot be called."""
    if function is None and not required:
        return
    if not callable(function):
        raise ProblemError(f"{name} is {type(function).__name__}; expected a function of plain torch code")


def clipped(value: Tensor, bounds: Bounds | None) -> Tensor:
    """The value within its bounds, where there are any."""
    return value if bounds is None else value.clamp(*bounds)


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


def can_differentiate() -> None:
    """Refuse to work where torch gives no derivatives.

    Raises:
        ProblemError: torch.inference_mode(), a transform of torch.func or torch.compile is at work.
    """
    if torch.is_inference_mode_enabled():
        raise ProblemError(
            "torch.inference_mode() is on, where nothing has a derivative; expected none: leave it, or use "
            "torch.no_grad(), under which problems are made and solved as everywhere"
        )
    # torch tells in no other way that one of its transforms is at work
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ProblemError(
            "a transform of torch.func (grad, jvp, vmap, ..) is at work, whose tensors hold no numbers to solve with; "
            "expected plain tensors: for gradients give initial_state or data that require them, pass "
            "differentiable=True and call .backward(); for many problems give initial_state a leading batch axis"
        )
    if torch.compiler.is_compiling() or callable(torch._C._dynamo.eval_frame.get_eval_frame_callback()):
        raise ProblemError(
            "torch.compile was to trace through a solver, whose loops depend on numbers; expected a call outside of "
            "it: use torch.compiler.disable(oc.solve) inside, or compile your own functions alone"
        )


def dense_memory(p: Tensor, samples: int, n: int, m: int) -> None:
    """Refuse dense second derivatives in p ``(q,)`` and (x, u) of so many samples where they cannot fit in memory.

    Raises:
        ProblemError: they would not.
    """
    q, columns = len(p), samples * (1 + n + m)
    size, gib = p.element_size(), 2.0**30
    # Q_pp and its sum with its transpose; the integrator keeps about twenty tensors of the size of V_p.
    needed, present = size * (3 * q * q + 20 * q * columns), total_memory(p.device)
    if needed > present:
        raise ProblemError(
            f"dense pp ({q}, {q}) and px ({samples} samples, {q}, {n}) need about {needed / gib:.3g} GiB of "
            f"{present / gib:.3g} GiB; expected less: use representation='low_rank' (Gauss-Newton, about "
            f"{20 * size * q * columns / gib:.3g} GiB, less with rank=) or oc.hvp (the Hessian times a vector, some "
            f"vectors of {size * q / gib:.3g} GiB)"
        )


def total_memory(device: torch.device) -> float:
    """Bytes that a device has, or on the CPU this process may have; infinity where the system does not tell."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if sys.platform == "win32":
        return float("inf")
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = _CONTAINER_LIMIT.read_text().strip() if _CONTAINER_LIMIT.exists() else "max"
    return min(total, float(limit)) if limit.isdigit() else total


def start(initial_state: Any, parameters: Any, dtype: Any) -> tuple[Tensor, Tensor | None]:
    """Read x(t0) ``(*batch, n)`` and p ``(q,)``."""
    can_differentiate()
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ProblemError(f"dtype is {dtype!r}; expected a floating-point dtype such as torch.float64")
    x0 = float_tensor("initial_state", initial_state, dtype)
    if x0.ndim == 0 or x0.shape[-1] == 0:
        raise ProblemError(f"initial_state has shape {shape(x0)}; expected (*batch, n) with n >= 1")
    if x0.numel() == 0:
        raise ProblemError(
            f"initial_state has shape {shape(x0)}, a batch of no problems; expected one or more: skip the call "
            "where there is nothing to solve"
        )
    if parameters is None:
        return x0, None
    p = float_tensor("parameters", parameters, dtype, x0.device)
    if p.ndim != 1 or p.shape[0] == 0:
        raise ProblemError(
            f"parameters has shape {shape(p)}; expected a flat vector (q,) with q >= 1: use torch.cat of "
            "flattened tensors"
        )
    return x0, p


def data_tensors(data: Any, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Read ``data=``: the tensors themselves, not copies.

    Raises:
        ProblemError: no sequence of tensors, another dtype or device, not finite, or one tensor twice.
    """
    if isinstance(data, Tensor) or not isinstance(data, Sequence):
        raise ProblemError(
            f"data is {type(data).__name__}; expected a tuple of the tensors that the functions capture: write "
            "data=(tensor,)"
        )
    for i, tensor in enumerate(data):
        if not isinstance(tensor, Tensor):
            raise ProblemError(
                f"data[{i}] is {type(tensor).__name__}; expected a tensor that the functions capture: make it one, "
                "torch.tensor(.., dtype=torch.float64), so that it can change in place"
            )
        if tensor.dtype != dtype or tensor.device != device:
            raise ProblemError(
                f"data[{i}] is {tensor.dtype} on {tensor.device}; expected {dtype} on {device}, as the problem is"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ProblemError(f"data[{i}] of shape {shape(tensor)} is not finite; expected numbers to start with")
        if any(tensor is other for other in data[:i]):
            raise ProblemError(f"data[{i}] came twice; expected each tensor once")
    return tuple(data)


def start_guess(value: Any) -> Any:
    """Refuse a problem's own guess that no solver could read."""
    if isinstance(value, str | Real):
        raise ProblemError(
            f"initial_guess is {value!r}; expected a mapping with any of controls, states, parameters, horizon, or a "
            "function of the number of steps that returns one"
        )
    return value


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


def no_constraints(problem: Any, solver: str, why: str) -> None:
    """Refuse path constraints and bounds on the states for a solver that cannot meet them."""
    for name in ("path_constraint", "state_bounds"):
        if getattr(problem, name) is not None:
            raise ProblemError(
                f"the problem has {name}; solver {solver!r} {why}: use solver='ddp' or 'casadi', or a penalty in the "
                "cost"
            )


def check_model(model: object, call: str = "SNOpt(model, lr=0.01)") -> None:
    """Refuse what is not a module with something to train."""
    if not isinstance(model, nn.Module):
        raise ProblemError(
            f"model is {type(model).__name__}; expected the nn.Module that is trained, not its parameters: {call}"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ProblemError("the model has no trainable parameter; expected one or more with requires_grad=True")


def check_choice(what: str, value: object, options: Sequence[object]) -> None:
    """Refuse what is not one of the options."""
    if value not in options:
        offered = " or ".join(map(repr, options))
        raise ProblemError(f"{what} is {value!r}; expected {offered}{nearest(str(value), map(str, options))}")


def check_count(what: str, value: object, default: int) -> None:
    """Refuse what is not a positive whole number."""
    if not is_whole(value) or value < 1:
        raise ProblemError(f"{what} is {value!r}; expected a whole number of at least 1, {default} by default")


def check_number(what: str, value: object, expected: str, below: float = math.inf, above: float = 0.0) -> None:
    """Refuse what is not a number in ``[above, below)``."""
    if not (is_number(value) and above <= value < below):  # type: ignore[operator]
        raise ProblemError(f"{what} is {value!r}; expected {expected}")


def solver_options(
    record: Any, *, at_least: Mapping[str, int], positive: Sequence[str] = (), not_negative: Sequence[str] = ()
) -> None:
    """Refuse options of a solver out of range: whole numbers, finite numbers > 0, finite numbers >= 0.

    Raises:
        ProblemError: names the option.
    """
    for name, least in at_least.items():
        value = getattr(record, name)
        if not is_whole(value) or value < least:
            raise ProblemError(
                f"{name} of {type(record).__name__} is {value!r}; expected {name} >= {least}, a whole number"
            )
    for name in (*positive, *not_negative):
        value, sign = getattr(record, name), ">" if name in positive else ">="
        if not is_number(value) or not math.isfinite(value) or value < 0 or (value == 0 and sign == ">"):
            raise ProblemError(f"{name} of {type(record).__name__} is {value!r}; expected {name} {sign} 0 and finite")


def check_options(group: Mapping[str, Any]) -> None:
    """Refuse options of a parameter group that are out of range."""
    for name, expected in OPTIMISER_RANGES.items():
        if name in group:
            check_number(name, group[name], expected, below=1.0 if expected.endswith("1)") else math.inf)


def listed(names: Sequence[str]) -> str:
    """At most eight names, and the number of the others."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more
