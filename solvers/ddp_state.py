"""What DDP carries from iteration to iteration: the path, and for each problem its regularisation, stop and history."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ocnopt.checks import first_non_finite
from ocnopt.errors import NonFiniteError
from ocnopt.solvers.guess import Guess
from ocnopt.staged import StagedOCP, rollout

_MU_MIN, _MU_MAX = 1e-6, 1e12
# mu grows by _UP when nothing was accepted, falls by _DOWN after a step >= _LONG, rises by _DOWN after one < _SHORT; measured
# on pendulum and cartpole swing-ups against the schedule of Tassa et al. 2012 (a fifth to a quarter fewer sweeps).
_UP, _DOWN, _LONG, _SHORT = 10.0, 3.0, 0.5, 0.1
_IDLE = 5


def rounding(cost: Tensor) -> Tensor:
    """Costs closer than this cannot be told apart in floating point."""
    return 64 * torch.finfo(cost.dtype).eps * (1 + cost.abs())


def picker(mask: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Choose for each problem of the batch: the first tensor where the mask holds, else the second; further axes follow the batch's."""

    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.reshape((*mask.shape, *(1,) * (a.ndim - mask.ndim))), a, b)

    return pick


class Direction(NamedTuple):
    """Feedforward and feedback gains, costates, the step dp of the static controls, the predicted change of cost."""

    k: list[Tensor]
    K: list[Tensor]
    costates: list[Tensor]
    dp: Tensor
    linear: Tensor
    quadratic: Tensor
    solvable: Tensor

    def where(self, mask: Tensor, other: "Direction") -> "Direction":
        """This direction where the mask holds, the other elsewhere."""
        pick = picker(mask)
        lists = [[pick(a, b) for a, b in zip(x, y, strict=True)] for x, y in zip(self[:3], other[:3], strict=True)]
        return Direction(*lists, *(pick(a, b) for a, b in zip(self[3:], other[3:], strict=True)))


class Iterate(NamedTuple):
    """A path (states hold the static controls too), its cost, its gaps (None once closed) and the merit's weight on them."""

    states: list[Tensor]
    controls: list[Tensor]
    cost: Tensor
    gaps: list[Tensor] | None
    weight: Tensor

    def gap_sum(self) -> Tensor:
        """Sum of |g_k| over the path, for each problem."""
        zero = torch.zeros_like(self.cost)
        return zero if self.gaps is None else torch.stack([gap.abs().sum(-1) for gap in self.gaps]).sum(0)

    def gap_size(self) -> Tensor:
        """The largest |g_k|, for each problem."""
        zero = torch.zeros_like(self.cost)
        return zero if self.gaps is None else torch.stack([gap.abs().amax(-1) for gap in self.gaps]).amax(0)

    def finite(self) -> Tensor:
        """Whether path and cost hold finite numbers."""
        return torch.stack([torch.isfinite(x).all(-1) for x in self.states]).all(0) & torch.isfinite(self.cost)

    def select(self, chosen: Tensor) -> "Iterate":
        """Pick a row of the leading axis for each problem."""

        def pick(value: Tensor) -> Tensor:
            index = chosen.reshape((1, *chosen.shape, *(1,) * (value.ndim - 1 - chosen.ndim)))
            return torch.gather(value, 0, index.expand(1, *value.shape[1:]))[0]

        gaps = None if self.gaps is None else [pick(gap) for gap in self.gaps]
        return Iterate([pick(x) for x in self.states], [pick(u) for u in self.controls], pick(self.cost), gaps, pick(self.weight))

    def replace_where(self, mask: Tensor, other: "Iterate") -> "Iterate":
        """The other iterate where the mask holds."""
        if not bool(mask.any()):
            return self
        pick = picker(mask)
        gaps = None
        if self.gaps is not None and other.gaps is not None:
            gaps = [pick(b, a) for a, b in zip(self.gaps, other.gaps, strict=True)]
            gaps = gaps if any(bool((gap != 0).any()) for gap in gaps) else None
        return Iterate(
            [pick(b, a) for a, b in zip(self.states, other.states, strict=True)],
            [pick(b, a) for a, b in zip(self.controls, other.controls, strict=True)],
            pick(other.cost, self.cost),
            gaps,
            pick(other.weight, self.weight),
        )


def start(problem: StagedOCP, wide: StagedOCP, guess: Guess) -> Iterate:
    """The first path: controls rolled out, or the guessed states with their gaps.

    Raises:
        NonFiniteError: the path of a single problem is not finite; in a batch such a problem alone is given up.
    """
    first = torch.cat([problem.initial_state, guess.parameters], dim=-1) if problem.parameter_dim else problem.initial_state
    targets = None if guess.states is None else [torch.cat([x, guess.parameters], dim=-1) for x in guess.states]
    gaps: list[Tensor] = []

    def meet_guess(k: int, x_next: Tensor) -> Tensor:
        gaps.append(x_next - targets[k + 1])  # type: ignore[index]
        return targets[k + 1]  # type: ignore[index]

    path = rollout(wide, lambda k, _: guess.controls[k], first, after=None if targets is None else meet_guess)
    iterate = Iterate(*path, gaps or None, torch.zeros_like(path.cost))
    if not problem.batch_shape and not bool(iterate.finite()):
        _raise_non_finite(problem, iterate)
    return iterate


def _raise_non_finite(problem: StagedOCP, iterate: Iterate) -> None:
    for k, x in enumerate(iterate.states):
        if not bool(torch.isfinite(x).all()):
            at = f"step {k}" if problem.origin is None else f"t = {float(problem.origin.times(problem.steps, problem.start_parameters())[k]):.6g}"
            raise NonFiniteError(
                f"dynamics led to {float(x[first_non_finite(x)])} in state component {first_non_finite(x)[-1]} at {at} of the first rollout; expected a "
                "finite path: pass initial_guess= (controls, or states for an infeasible start), or take more steps"
            )
    raise NonFiniteError(
        f"the cost of the first path is {float(iterate.cost)}; expected a finite number: pass initial_guess=, or look for a division by zero or "
        "the root of a negative number in running_cost and terminal_cost"
    )


class Monitor:
    """Regularisation, stop and history of each problem of the batch."""

    def __init__(self, iterate: Iterate, regularisation: float, tolerance: float, progress: bool) -> None:
        self.mu = torch.full_like(iterate.cost, regularisation)
        self.tolerance = tolerance
        self.iterations = torch.zeros_like(iterate.cost, dtype=torch.int64)
        self.converged = torch.zeros_like(iterate.cost, dtype=torch.bool)
        self.failed = ~iterate.finite()
        self._stuck = torch.zeros_like(self.failed)
        self._restart = torch.zeros_like(iterate.cost)
        self._quiet = torch.zeros_like(self.iterations)
        self._rows: list[tuple[Tensor, Tensor, Tensor]] = [(iterate.cost, torch.zeros_like(iterate.cost), self.mu)]
        self._report: Callable[[str], None] = print if progress else _silent

    @property
    def active(self) -> Tensor:
        """Problems that still move."""
        return ~(self.converged | self.failed | self._stuck)

    def finished(self, iterate: Iterate, direction: Direction) -> bool:
        """Mark what has converged; whether nothing is left to do."""
        decrease = -(direction.linear + direction.quadratic)
        flat = (decrease.abs() <= self.tolerance**2 * (1 + iterate.cost.abs())) & (iterate.gap_size() <= self.tolerance)
        # Gauss-Newton converges linearly and may creep on in the last digits: _IDLE steps below rounding are the end too.
        idle = (self._quiet >= _IDLE) & (iterate.gap_size() <= self.tolerance)
        self.converged = self.converged | (self.active & direction.solvable & ((flat & (self.mu <= _MU_MIN)) | idle))
        return not bool(self.active.any())

    def record(self, iterate: Iterate, direction: Direction, step: Tensor) -> None:
        """Count accepted steps and move mu: up on failure, down to zero on success."""
        moved, active = step > 0, self.active
        self.iterations = self.iterations + (moved & active)
        up = torch.maximum(_UP * self.mu, self._restart.clamp_min(_MU_MIN))
        down = torch.where(step >= _LONG, self.mu / _DOWN, torch.where(step >= _SHORT, self.mu, _DOWN * self.mu))
        down = torch.where(down < _MU_MIN, 0.0, down)
        small = (self._rows[-1][0] - iterate.cost).abs() <= rounding(iterate.cost)
        predicted = -(direction.linear + direction.quadratic) <= 1e3 * rounding(iterate.cost)
        self._quiet = torch.where(moved & small & predicted, self._quiet + 1, 0)
        self._restart = torch.where(moved & (self.mu > 0), self.mu / _DOWN, self._restart)
        self.mu = torch.where(active, torch.where(moved, down, up), self.mu)
        self._stuck = self._stuck | (active & (self.mu > _MU_MAX))
        self._rows.append((iterate.cost, step, self.mu))
        self._report(f"{len(self._rows) - 1:4d}  cost {float(iterate.cost.mean()):.10g}  step {float(step.mean()):.3g}  mu {float(self.mu.max()):.1e}")

    def history(self) -> dict[str, Tensor]:
        """cost, step and regularisation, ``(iterations + 1, ...)``, the start first."""
        return {name: torch.stack([row[i] for row in self._rows]) for i, name in enumerate(("cost", "step", "regularisation"))}

    def status(self, iterate: Iterate) -> str | list[str]:
        """One sentence for each problem."""
        flat = [v.reshape(-1).tolist() for v in (self.converged, self.failed, self._stuck, self.iterations, iterate.gap_size())]
        sentences = [_sentence(*row) for row in zip(*flat, strict=True)]
        return sentences if iterate.cost.ndim else sentences[0]


def _sentence(converged: bool, failed: bool, stuck: bool, iterations: int, gap: float) -> str:
    steps = f"{iterations} step{'' if iterations == 1 else 's'}"
    if converged:
        return f"converged after {steps}"
    if failed:
        return "given up: the first path is not finite; pass another initial_guess"
    gaps = f"; gaps up to {gap:.1e} are still open" if gap > 0 else ""
    if stuck:
        return f"stopped after {steps}: no step decreases the cost under the largest regularisation{gaps}; look at the functions' smoothness, or start elsewhere"
    return f"stopped after {steps}: the iteration limit was reached{gaps}; raise max_iterations, or start from this solution"


def _silent(_: str) -> None:
    """Print nothing."""
