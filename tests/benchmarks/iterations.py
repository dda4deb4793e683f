"""One iteration of SNOpt against one of Adam: same weights, same batches, so equal evaluations, stepped in turn."""

from statistics import median
from typing import NamedTuple

from tests.benchmarks.workload import Run, adam, batches, digits, snopt

REFRESH_EVERY = 5


class Ratios(NamedTuple):
    """Medians over iterations of the time of SNOpt over that of Adam, and the milliseconds of Adam."""

    ordinary: float
    refresh: float
    adam_milliseconds: float
    pairs: int


def measure(pairs: int = 60) -> Ratios:
    """Step both in turn; every fifth iteration is a refresh."""
    problem = digits()
    first = Run(problem, adam)
    second = Run(problem, lambda model: snopt(model, refresh_every=REFRESH_EVERY))
    ordinary, refresh, times = [], [], []
    for k, batch in zip(range(pairs), batches(problem, seed=0), strict=False):
        second.model.load_state_dict(first.model.state_dict())
        if k % 2:
            base, time = first.step(*batch), second.step(*batch)
        else:
            time, base = second.step(*batch), first.step(*batch)
        if first.evaluations != second.evaluations:
            raise RuntimeError("the two models took different numbers of evaluations from the same weights")
        (refresh if k % REFRESH_EVERY == 0 else ordinary).append(time / base)
        times.append(base)
    return Ratios(median(ordinary), median(refresh), 1e3 * median(times), pairs)
