"""Where a solver starts.

A guess holds controls u_k ``(*batch, m)`` for each step, the static controls p ``(*batch, q)`` with T where the horizon is free, and, for
solvers that can start infeasible, states x_0..x_N ``(*batch, n)`` that need not satisfy the dynamics.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ocnopt.checks import nearest, shape
from ocnopt.errors import ProblemError
from ocnopt.solvers.solution import Solution
from ocnopt.staged import StagedOCP, rollout

_KEYS = ("controls", "states", "parameters", "horizon")


@dataclass(frozen=True, eq=False)
class Guess:
    """Controls, static controls (with T) and, or None, states."""

    controls: list[Tensor]
    parameters: Tensor
    states: list[Tensor] | None = None


def read_guess(problem: StagedOCP, given: Any) -> Guess:
    """The start for every solver: what the caller gave, else the problem's own, else zero controls clipped to the bounds.

    A default start with a zero gradient is perturbed (seeded) with a warning, since every solver would stop there at once.

    Raises:
        ProblemError: unknown keys, wrong shapes, or non-finite numbers.
    """
    own = problem.initial_guess if given is None else given
    if callable(own):
        own = own(problem.steps)
    if own is not None:
        return _from_mapping(problem, _as_mapping(own))
    return _leave_stationary_point(problem, default_guess(problem))


def default_guess(problem: StagedOCP) -> Guess:
    """Zero controls clipped to the bounds, and the problem's parameters."""
    controls = []
    for group, bounds in zip(problem.groups, problem.control_bounds, strict=True):
        u = problem.initial_state.new_zeros((*problem.batch_shape, group.stage.control_dim))
        controls += [u if bounds is None else u.clamp(*bounds)] * (group.stop - group.start)
    return Guess(controls, problem.start_parameters())


def _as_mapping(given: Any) -> Mapping[str, Any]:
    if isinstance(given, Solution):
        return {key: getattr(given, key) for key in _KEYS}
    if isinstance(given, Mapping):
        for key in given:
            if key not in _KEYS:
                raise ProblemError(f"initial_guess has the key {key!r}; expected any of {', '.join(_KEYS)}{nearest(str(key), _KEYS)}")
        return given
    return {"controls": given}


def _from_mapping(problem: StagedOCP, given: Mapping[str, Any]) -> Guess:
    start = default_guess(problem)
    controls, states = start.controls, None
    if given.get("controls") is not None:
        controls = _series("controls", given["controls"], [tuple(u.shape) for u in start.controls], problem)
        controls = [u if b is None else u.clamp(*b) for u, b in zip(controls, problem.step_bounds, strict=True)]
    if given.get("states") is not None:
        with torch.no_grad():
            sizes = [tuple(x.shape) for x in rollout(problem, lambda k, _: controls[k], problem.initial_state).states]
        states = _series("states", given["states"], sizes, problem)
        states[0] = problem.initial_state
    return Guess(controls, _parameters(problem, given), states)


def _series(name: str, value: Any, sizes: list[tuple[int, ...]], problem: StagedOCP) -> list[Tensor]:
    """Read ``(..., length, size)`` as a list over time; a leading batch may be left out."""
    if isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
        rows = [torch.as_tensor(v, dtype=problem.dtype, device=problem.device) for v in value]
    else:
        tensor = torch.as_tensor(value, dtype=problem.dtype, device=problem.device)
        expected = f"(..., {len(sizes)}, {sizes[0][-1]})"
        if tensor.ndim < 2 or tensor.shape[-2] != len(sizes) or tensor.shape[-1] != sizes[0][-1]:
            raise ProblemError(f"initial_guess {name} has shape {shape(tensor)}; expected {expected}: one row per {'step' if name == 'controls' else 'node'}")
        rows = list(tensor.unbind(-2))
    if len(rows) != len(sizes) or any(row.shape[-1] != size[-1] for row, size in zip(rows, sizes, strict=False)):
        raise ProblemError(f"initial_guess {name} has {len(rows)} rows; expected {len(sizes)} of sizes {sorted({s[-1] for s in sizes})}")
    if not all(bool(torch.isfinite(row).all()) for row in rows):
        raise ProblemError(f"initial_guess {name} holds NaN or infinity; expected finite numbers")
    return [row.detach().expand(size).clone() for row, size in zip(rows, sizes, strict=True)]


def _parameters(problem: StagedOCP, given: Mapping[str, Any]) -> Tensor:
    free = problem.origin is not None and problem.origin.free
    p = problem.start_parameters().clone()
    q = p.shape[-1] - int(free)
    if given.get("parameters") is not None and q > 0:
        value = torch.as_tensor(given["parameters"], dtype=p.dtype, device=p.device)
        if value.shape[-1:] != (q,):
            raise ProblemError(f"initial_guess parameters has shape {shape(value)}; expected (..., {q})")
        p[..., :q] = value
    if given.get("horizon") is not None and free:
        p[..., -1] = torch.as_tensor(given["horizon"], dtype=p.dtype, device=p.device)
    return p if problem.parameter_bounds is None else p.clamp(*problem.parameter_bounds)


def _leave_stationary_point(problem: StagedOCP, guess: Guess) -> Guess:
    """Perturb problems whose cost has a zero gradient at the default start; constrained problems are left to their solver."""
    if problem.terminal_constraint is not None or problem.path_constraint is not None or sum(u.shape[-1] for u in guess.controls) == 0:
        return guess
    controls = [u.clone().requires_grad_() for u in guess.controls]
    p = guess.parameters.clone().requires_grad_()
    with torch.enable_grad():
        cost = rollout(problem, lambda k, _: controls[k], problem.initial_state, p).cost
    gradients = torch.autograd.grad(cost.sum(), [*controls, p], allow_unused=True, materialize_grads=True) if cost.requires_grad else ()
    size = sum((g.abs().sum(-1) for g in gradients), cost.new_zeros(cost.shape))
    still = size <= 1e-12 * (1 + cost.detach().abs())
    if not bool(still.any()):
        return guess
    which = "" if not problem.batch_shape else f" in {int(still.sum())} of {still.numel()} problems"
    warnings.warn(
        f"the default start (zero controls) is a stationary point{which}: its gradient is zero and no solver would move; a seeded perturbation is "
        "used instead. Pass initial_guess= to choose the start",
        stacklevel=4,
    )
    return replace(guess, controls=_perturbed(problem, guess.controls, still))


def _perturbed(problem: StagedOCP, controls: list[Tensor], where: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    moved = []
    for u, b in zip(controls, problem.step_bounds, strict=True):
        noise = 0.1 * torch.randn(u.shape[-1:], generator=generator, dtype=torch.float64).to(u)
        v = torch.where(where[..., None], u + noise, u)
        moved.append(v if b is None else v.clamp(*b))
    return moved
