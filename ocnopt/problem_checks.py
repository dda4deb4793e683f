"""Checks of a problem's functions, which are *called* for it.

At the batch shape of the initial state and on two stacked rows, which must come out as the two rows alone do, since the
library evaluates functions on extra leading axes.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ocnopt import checks
from ocnopt.checks import first_non_finite, shape
from ocnopt.errors import ProblemError
from ocnopt.leading_axes import accepts_leading_axes
from ocnopt.names import read_names

FUNCTIONS = ("dynamics", "running_cost", "terminal_cost", "path_constraint", "terminal_constraint")

_FLOAT32_CURE = (
    "a float32 tensor captured in a float64 problem is the usual cause: create it with dtype=torch.float64, or pass "
    "dtype=torch.float32"
)
_BRANCH = "it branches or loops on the value of a tensor (if, while, max): use torch.where (torch.maximum)"
_NUMBER = (
    "it turns a tensor into Python numbers (float(x), x.item(), math.sin(x), torch.tensor([x[..., 0], ..])): use "
    "torch.sin(x), torch.stack([x[..., 0], ..], dim=-1)"
)
_NUMPY = "it leaves torch for numpy: write it in torch (torch.sin(x) for np.sin(x))"
_INFERENCE = "a tensor that it captures was made under torch.inference_mode(): make it outside, or capture its clone()"
_HINTS = (
    ("dtype", _FLOAT32_CURE),
    ("Double", _FLOAT32_CURE),
    ("Boolean value of Tensor", _BRANCH),
    ("cannot be converted to Scalar", _NUMBER),
    ("can be converted to Python scalars", _NUMBER),
    ("can be converted to an index", _NUMBER),
    ("numpy", _NUMPY),
    ("Inference tensors", _INFERENCE),
)
_DETACHED = "detach(), .data and torch.no_grad() cut it off on purpose, so DDP descends as if it were fixed"
_LEAVING = {"__bool__": _BRANCH, "numpy": _NUMPY, "__array__": _NUMPY} | dict.fromkeys(
    ("__float__", "__int__", "__index__", "item", "tolist", "tensor"), _NUMBER
)
_LEAVING |= dict.fromkeys(("detach", "detach_"), _DETACHED)


def call(name: str, signature: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's function, and refuse one that fails or writes into its arguments."""
    before = [_version(argument) for argument in arguments]
    try:
        value = function(*arguments)
    except ProblemError:
        raise
    except Exception as error:
        shapes = ", ".join(shape(torch.as_tensor(argument)) for argument in arguments)
        cure = next((f" ({hint})" for sign, hint in _HINTS if sign in str(error)), "")
        raise ProblemError(
            f"{name}{signature} failed when called with arguments of shapes {shapes}: {type(error).__name__}: {error}"
            f"{cure}; expected plain torch code over the last axis that takes {signature}"
        ) from error
    written = [i for i, argument in enumerate(arguments) if _version(argument) != before[i]]
    if written:
        letter = signature.strip("()").split(", ")[written[0]]
        raise ProblemError(
            f"{name} writes into its argument {letter}; expected a function that leaves its arguments as they are: "
            f"write {letter} = {letter} + .. for {letter} += .., or start from {letter}.clone()"
        )
    return value


def _version(argument: Any) -> int:
    """How often a tensor was written to in place."""
    return argument._version if isinstance(argument, Tensor) and not argument.is_inference() else 0


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
            "results with torch.stack([...], dim=-1), or keep it (x[..., :1], t[..., None])"
        )
    if expected is None and output.shape[-1] == 0:
        raise ProblemError(f"{name} returned shape {shape(output)}; expected at least one entry, or None for none")
    return output


def scalar_output(name: str, value: Any, lead: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Check a cost: it must broadcast to ``lead``, the state's shape without its last axis."""
    number = isinstance(value, Real)
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


def same_rows(name: str, together: Tensor, rows: Sequence[Tensor], terms: int) -> None:
    """Refuse a function whose output on stacked rows differs from its output on each row.

    A sum of ``terms`` products is rounded differently when the rows are stacked, relative to terms that may cancel.
    """
    rounding = 16 * torch.finfo(together.dtype).eps * (8 + terms**0.5)
    for i, row in enumerate(rows):
        largest = float(row.abs().nan_to_num(0.0, 0.0, 0.0).amax()) if row.numel() else 0.0
        slack = 1e-8 + rounding * (1 + largest)
        if not torch.allclose(together[i], row, rtol=1e-5, atol=slack, equal_nan=True):
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
        terms = max((a.shape[-1] for a in rows[0].values() if isinstance(a, Tensor) and a.ndim > 0), default=1)
        same_rows(name, read(together, (len(rows), *batch)), alone, terms)
    return alone[0]


def check_function(
    name: str, function: Callable[..., Any], rows: Sequence[Mapping[str, Any]], **expected: Any
) -> Tensor:
    """:func:`function_rows`, and what can be seen of the derivatives at the first row."""
    value = function_rows(name, function, rows, **expected)
    _check_derivatives(name, function, rows[0])
    return value


class _Watch(TorchFunctionMode):
    """Notes whether a function reads Python values off tensors that depend on its arguments."""

    def __init__(self, arguments: Sequence[Tensor]) -> None:
        super().__init__()
        self.hint, self._off = "", False
        # kept alive, so that an id stays its own
        self._dependent = {id(argument): argument for argument in arguments}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name == "_set_grad_enabled":
            # by the function itself: a torch.autograd.Function brings derivatives of its own
            self._off = not args[0]
        depends = any(id(leaf) in self._dependent for leaf in tree_leaves((args, kwargs)))
        if depends:
            is_cut = self._off or function == Tensor.data.__get__  # type: ignore[attr-defined]
            hint = _LEAVING.get(name, _DETACHED if is_cut else "")
            # numpy needs a detach() before it: the later one says more
            self.hint = hint if hint and self.hint in ("", _DETACHED) else self.hint
        value = function(*args, **(kwargs or {}))
        if depends and not name.startswith("new_") and not name.endswith("_like"):
            self._dependent |= {id(leaf): leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}
        return value


def _check_derivatives(name: str, function: Callable[..., Any], row: Mapping[str, Any]) -> None:
    """Warn where a function leaves torch, or where its first derivative at the initial state is not finite."""
    moving = {key: a for key, a in row.items() if isinstance(a, Tensor) and a.is_floating_point()}
    given = {**row, **{key: a.detach().clone().requires_grad_() for key, a in moving.items()}}
    leaves = {key: given[key] for key in moving}
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.enable_grad(),
        _Watch([*leaves.values()]) as watch,
    ):
        # torch warns about numbers read off tensors with a gradient; ours names the function
        warnings.simplefilter("ignore")
        output = call(name, f"({', '.join(row)})", function, *given.values())
    if watch.hint:
        warnings.warn(
            f"{name} hides part of itself from derivatives: {watch.hint}. What it reads off there counts as a constant",
            stacklevel=5,
        )
    if not isinstance(output, Tensor) or not output.requires_grad:
        return
    try:
        with torch.enable_grad():
            total = output.sum()
        slopes = torch.autograd.grad(total, [*leaves.values()], allow_unused=True, materialize_grads=True)
    except RuntimeError as error:
        raise ProblemError(
            f"{name} cannot be differentiated ({error}); expected torch code with a derivative"
        ) from error
    for key, slope in zip(leaves, slopes, strict=True):
        if not bool(torch.isfinite(slope).all()):
            index = first_non_finite(slope)
            warnings.warn(
                f"the derivative of {name} in {key} is {slope[index].item()} at entry {index} at the initial state, "
                "though its value is finite: sqrt or a norm at 0, or a torch.where whose other branch is not finite. "
                "Smooth it (torch.sqrt(x**2 + 1e-12)), clamp the argument inside torch.where, or start elsewhere",
                stacklevel=5,
            )
            return


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


def check_order(problem: Any, end: float) -> None:
    """Refuse a horizon that runs backwards, bounds of nothing, and parameters outside their bounds."""
    start = problem.horizon.t0
    if end <= start:
        raise ProblemError(f"horizon runs from {start} to {end}; expected an end after the start")
    for name, given in (("parameter_bounds", problem.parameter_bounds), ("control_bounds", problem.control_bounds)):
        absent = problem.parameters is None if name == "parameter_bounds" else problem.control_dim == 0
        if given is not None and absent:
            raise ProblemError(
                f"{name} is given for a problem without such controls; expected none, or parameters= / control_dim="
            )
    check_parameters(problem)


def check_parameters(problem: Any) -> None:
    """Refuse parameters outside their bounds."""
    if problem.parameters is None or problem.parameter_bounds is None or problem.parameter_bounds[0].ndim > 1:
        return  # where each problem has bounds of its own, one start for all is clipped to them
    lower, upper = problem.parameter_bounds
    outside = (problem.parameters < lower) | (problem.parameters > upper)
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        raise ProblemError(
            f"parameters[{i}] is {problem.parameters[i].item()}, outside its bounds [{lower[i].item()}, "
            f"{upper[i].item()}]; expected a start within parameter_bounds: move it or widen them"
        )


def _rows(problem: Any, end: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arguments of two rows: the initial state, controls clipped to their bounds; a seeded point nearby, at the end."""
    x0 = problem.initial_state
    u0 = x0.new_zeros((*x0.shape[:-1], problem.control_dim))
    start = problem.horizon.t0
    u0, u1 = (
        checks.clipped(u, problem.control_bounds_at(t, step)) for u, t, step in ((u0, start, 0), (nearby(u0), end, -1))
    )
    near = {"t": x0.new_tensor(problem.horizon.t0), "x": x0, "u": u0}
    return near, {"t": x0.new_tensor(end), "x": nearby(x0), "u": u1}


def check_functions(problem: Any, end: float) -> dict[str, bool]:
    """Call every function and check what it returns; return whether p may carry leading axes, and whether it must."""
    p, broadcast, of_each, entries = problem.parameters, True, False, 0
    batch, n = tuple(problem.initial_state.shape[:-1]), problem.initial_state.shape[-1]
    for name in FUNCTIONS:
        function = getattr(problem, name)
        if function is None:
            continue
        near, far = _rows(problem, end)
        if name.startswith("terminal"):
            # Phi may not even exist at t0, and it has no control.
            near["t"] = far["t"]
            del near["u"], far["u"]
        static = {} if p is None else {"p": p}
        size = n if name == "dynamics" else None
        check = partial(function_rows, name, function, batch=batch, dtype=problem.dtype, size=size)
        try:
            value = check([{**near, **static}, {**far, **static}])
        except ProblemError as error:
            if p is None or not batch:
                raise
            # one that is written for a solve alone, where each problem of a batch has its own p
            of_each, static, moved = True, {"p": p.expand(*batch, -1)}, {"p": nearby(p.expand(*batch, -1))}
            try:
                value = check([{**near, **static}, {**far, **moved}])
            except ProblemError:
                raise error from error.__cause__
        entries += value.shape[-1] if name.endswith("constraint") else 0
        _check_derivatives(name, function, {**near, **static})
        if p is not None and static["p"] is p:
            broadcast = broadcast and accepts_leading_axes(function, near, p)
    read_names("constraint_names", problem.constraint_names, entries)
    return {"parameters_broadcast": broadcast, "parameters_of_each": of_each}


def check_ends(problem: Any, x: Tensor) -> None:
    """Check a discrete problem's parameters, its terminal functions at x_N and its path constraint at both ends."""
    check_parameters(problem)
    first, last = problem.groups[0], problem.groups[-1]
    batch, p = tuple(x.shape[:-1]), problem.parameters
    static = {} if p is None else {"p": p.expand(*batch, -1)}

    def row(group: Any, k: int, state: Tensor, bounds: checks.Bounds | None) -> dict[str, Any]:
        u = state.new_zeros((*batch, group.stage.control_dim))
        number = k if group.single else torch.tensor(k, device=state.device)
        return {"k": number, "x": state, "u": checks.clipped(u, bounds), **static}

    rows = {
        "terminal_cost": [{"x": x, **static}],
        "terminal_constraint": [{"x": x, **static}],
        "path_constraint": [
            row(first, 0, problem.initial_state, problem.step_bounds[0]),
            row(last, last.stop, x, problem.step_bounds[-1]),
        ],
    }
    entries = 0
    for name, arguments in rows.items():
        function = getattr(problem, name)
        checks.callable_or_none(name, function)
        if function is not None:
            for here in arguments:
                near = {key: nearby(argument) for key, argument in here.items()}
                value = check_function(name, function, [here, near], batch=batch, dtype=problem.dtype)
            entries += value.shape[-1] if name.endswith("constraint") else 0
    read_names("constraint_names", problem.constraint_names, entries)
