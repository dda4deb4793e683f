"""Where a solver starts: what the caller gave, read and checked, else the problem's own start, else zero controls."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ocnopt.checks import Bounds, clipped, float_tensor, nearest, shape
from ocnopt.errors import ProblemError
from ocnopt.paths import rollout
from ocnopt.solvers.solution import Guess, Solution
from ocnopt.staged import Series, StagedOCP

_KEYS = ("controls", "states", "parameters", "horizon")


def read_guess(problem: StagedOCP, given: Any) -> Guess:
    """The start of every solver: what the caller gave, else the problem's own, else zero controls clipped to bounds.

    Controls that nobody gave are zero; where the gradient is zero there, they are perturbed (seeded) with a warning,
    since every solver would stop. A start with controls or states is taken as it is, so that an optimum stays one.

    Raises:
        ProblemError: unknown keys, wrong shapes, or non-finite numbers.
    """
    guess, chosen = _read(problem, given)
    return guess if chosen else _leave_stationary_point(problem, guess)


def own_guess(problem: StagedOCP) -> Guess:
    """The problem's own start, else zero controls, be they stationary or not."""
    return _read(problem, None)[0]


def _read(problem: StagedOCP, given: Any) -> tuple[Guess, bool]:
    """The start, and whether anybody chose its controls or states."""
    own = problem.initial_guess if given is None else given
    if callable(own):
        own = own(problem.steps)
    if own is None:
        return default_guess(problem), False
    mapping = _as_mapping(problem, own)
    return _from_mapping(problem, mapping), any(mapping.get(name) is not None for name in ("controls", "states"))


def default_guess(problem: StagedOCP) -> Guess:
    """Zero controls clipped to the bounds, and the problem's parameters."""
    sizes, x0 = _control_sizes(problem), problem.initial_state
    if len(set(sizes)) == 1:
        controls: Series = x0.new_zeros(len(sizes), *problem.batch_shape, sizes[0])
    else:
        controls = [x0.new_zeros(*problem.batch_shape, size) for size in sizes]
    return Guess(_within(controls, problem.step_bounds), problem.start_parameters())


def _control_sizes(problem: StagedOCP) -> list[int]:
    """The size of each step's control."""
    return [size for group in problem.groups for size in [group.stage.control_dim] * (group.stop - group.start)]


def _within(rows: Series, bounds: list[Bounds | None]) -> Series:
    """Each control within its bounds; all at once where those are the same."""
    first = bounds[0]
    if isinstance(rows, Tensor) and all(each is first for each in bounds):
        return clipped(rows, first)
    kept = [clipped(row, each) for row, each in zip(rows, bounds, strict=True)]
    return torch.stack(kept) if isinstance(rows, Tensor) else kept


def _as_mapping(problem: StagedOCP, given: Any) -> Mapping[str, Any]:
    if isinstance(given, Solution):
        # every Solution has an end time; it is a guess only where the end time is free
        keys = _KEYS if _has_free_end(problem) else _KEYS[:-1]
        return {key: getattr(given, key) for key in keys}
    if isinstance(given, Mapping):
        for key in given:
            if key not in _KEYS:
                offer = nearest(str(key), _KEYS)
                raise ProblemError(f"initial_guess has the key {key!r}; expected any of {', '.join(_KEYS)}{offer}")
        return given
    return {"controls": given}


def _from_mapping(problem: StagedOCP, given: Mapping[str, Any]) -> Guess:
    states = None
    if given.get("controls") is None:
        controls = default_guess(problem).controls
    else:
        controls = _series("controls", given["controls"], _control_sizes(problem), problem)
        controls = _within(controls, problem.step_bounds)
    if given.get("states") is not None:
        states = _series("states", given["states"], problem.state_sizes, problem)
        states[0] = problem.initial_state
    return Guess(controls, _parameters(problem, given), states)


def _series(name: str, value: Any, sizes: Sequence[int], problem: StagedOCP) -> Tensor | list[Tensor]:
    """Read ``(..., length, size)``, or one tensor a step, time in front; a leading batch may be left out."""
    name, unit = f"initial_guess {name}", "step" if name == "controls" else "node"
    batch, alike = problem.batch_shape, len(set(sizes)) == 1
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        rows = [float_tensor(name, row, problem.dtype, problem.device) for row in value]
        came = f"{len(rows)} rows of sizes {sorted({row.shape[-1:].numel() for row in rows})}"
        wanted = f"{len(sizes)} rows of sizes {sorted(set(sizes))}"
    else:
        tensor = float_tensor(name, value, problem.dtype, problem.device)
        if alike and tensor.shape == (*batch, len(sizes), sizes[0]):
            return tensor.movedim(-2, 0).contiguous()
        rows = list(tensor.unbind(-2)) if tensor.ndim > 1 else []
        came, wanted = f"shape {shape(tensor)}", f"(..., {len(sizes)}, {sizes[0]})"
    if len(rows) != len(sizes) or any(row.shape[-1:] != (size,) for row, size in zip(rows, sizes, strict=True)):
        raise ProblemError(f"{name} has {came}; expected {wanted}: one row per {unit}")
    fitted = [_expanded(name, row, (*batch, size)) for row, size in zip(rows, sizes, strict=True)]
    return torch.stack(fitted) if alike else [row.clone() for row in fitted]


def _expanded(name: str, value: Tensor, size: tuple[int, ...]) -> Tensor:
    """The value for each problem of the batch."""
    try:
        return value if value.shape == size else value.expand(size)
    except RuntimeError as error:
        raise ProblemError(
            f"{name} has batch shape {tuple(value.shape[:-1])}; expected {size[:-1]}, or none: one start for all"
        ) from error


def _has_free_end(problem: StagedOCP) -> bool:
    return problem.origin is not None and problem.origin.free


def _parameters(problem: StagedOCP, given: Mapping[str, Any]) -> Tensor:
    free = _has_free_end(problem)
    if not free and given.get("horizon") is not None:
        fixed = "is fixed" if problem.origin is not None else "is its number of steps"
        raise ProblemError(
            f"initial_guess has a horizon, but the problem's end time {fixed}; expected none: leave it out, or free "
            "the end time with oc.FreeHorizon(initial, lower, upper)"
        )
    p = problem.start_parameters()
    parts = {"parameters": p[..., :-1], "horizon": p[..., -1:]} if free else {"parameters": p}
    for name, part in parts.items():
        if given.get(name) is None:
            continue
        if part.shape[-1] == 0 and torch.as_tensor(given[name]).numel() > 0:
            raise ProblemError(
                "initial_guess has parameters, but the problem has none; expected none: leave them out, or give the "
                "problem parameters="
            )
        value = float_tensor(f"initial_guess {name}", given[name], problem.dtype, problem.device)
        value = value[..., None] if name == "horizon" else value
        if value.shape[-1:] != part.shape[-1:]:
            raise ProblemError(f"initial_guess {name} has shape {shape(value)}; expected (..., {part.shape[-1]})")
        parts[name] = _expanded(f"initial_guess {name}", value, tuple(part.shape))
    return clipped(torch.cat(list(parts.values()), dim=-1), problem.parameter_bounds)


def perturbed(value: Tensor, amount: float | Tensor, bounds: Bounds | None, generator: torch.Generator) -> Tensor:
    """Add noise within the bounds, the same to every problem of a batch.

    Args:
        value: ``(..., size)``.
        amount: standard deviation, for all entries or for each.
        bounds: two tensors ``(size,)`` or ``(*batch, size)``.
        generator: seeded; a new one gives the same noise again.
    """
    noise = torch.randn(value.shape[-1:], generator=generator, dtype=torch.float64).to(value)
    return clipped(value + amount * noise, bounds)


def _leave_stationary_point(problem: StagedOCP, guess: Guess) -> Guess:
    """Perturb problems whose cost has a zero gradient at zero controls; constraints are left to their solver."""
    constrained = problem.terminal_constraint is not None or problem.path_constraint is not None
    if constrained or sum(u.shape[-1] for u in guess.controls) == 0:
        return guess
    controls = [u.clone().requires_grad_() for u in guess.controls]
    p = guess.parameters.clone().requires_grad_()
    with torch.enable_grad():
        cost = rollout(problem, controls, problem.initial_state, p).cost
        total = cost.sum()
    size = torch.zeros_like(cost)
    if cost.requires_grad:
        gradients = torch.autograd.grad(total, [*controls, p], allow_unused=True, materialize_grads=True)
        size = sum((gradient.abs().sum(-1) for gradient in gradients), size)
    still = torch.isfinite(cost) & (size <= 1e-12 * (1 + cost.detach().abs()))
    if not bool(still.any()):
        return guess
    which = "" if not problem.batch_shape else f" in {int(still.sum())} of {still.numel()} problems"
    warnings.warn(
        f"the start (zero controls) is a stationary point{which}: its gradient is zero and no solver would "
        "move; a seeded perturbation is used instead. Pass initial_guess= to choose the start",
        stacklevel=4,
    )
    generator = torch.Generator().manual_seed(0)
    pairs = zip(guess.controls, problem.step_bounds, strict=True)
    moved = [torch.where(still[..., None], perturbed(u, 0.1, b, generator), u) for u, b in pairs]
    return replace(guess, controls=torch.stack(moved) if isinstance(guess.controls, Tensor) else moved)
