"""Iterations and time until the training loss that tuned Adam ends with."""

from functools import partial
from typing import NamedTuple

from tests.benchmarks.workload import ADAM_LRS, EVALUATE_EVERY, ITERATIONS, Run, adam, batches, digits, snopt


class Finish(NamedTuple):
    """One seed: where Adam ends, and when each first comes as low (None: never)."""

    seed: int
    target: float
    adam_first: int
    iterations: int | None
    time_ratio: float | None
    adam_seconds: float
    adam_evaluations: float
    evaluations: float
    adam_accuracy: float
    accuracy: float


def race(seed: int, adam_lr: float = ADAM_LRS[0], iterations: int = ITERATIONS, every: int = EVALUATE_EVERY) -> Finish:
    """Train both in turn from the same weights on the same batches; losses are looked up outside the clock."""
    problem = digits()
    first, second = Run(problem, partial(adam, lr=adam_lr), seed), Run(problem, snopt, seed)
    seen: list[tuple[int, float, float, int, float]] = []
    adam_losses: dict[int, float] = {}
    for k, batch in zip(range(1, iterations + 1), batches(problem, seed), strict=False):
        first.step(*batch)
        second.step(*batch)
        if k % every == 0 or k == iterations:
            adam_losses[k] = first.training_loss()
            seen.append((k, second.training_loss(), second.seconds, second.evaluations, second.accuracy()))
    target = adam_losses[iterations]
    k, _, seconds, evaluations, accuracy = next(
        (at for at in seen if at[1] <= target), (None, 0.0, None, *seen[-1][3:])
    )
    return Finish(
        seed,
        target,
        next(at for at, loss in adam_losses.items() if loss <= target),
        k,
        None if seconds is None else seconds / first.seconds,
        first.seconds,
        first.evaluations / iterations,
        evaluations / (k or iterations),
        first.accuracy(),
        accuracy,
    )
