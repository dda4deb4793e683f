"""Peak memory of a training iteration: every allocation of torch's CPU allocator since before the model exists.

The figure is the largest sum of live tensor bytes, temporaries inside operations included, as torch.profiler records
them. Weights stand still (lr = 0), so that both optimisers see the same path.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ocnopt.optim.snopt import SNOpt
from tests.benchmarks.workload import Run, batches, digits


def peak_bytes(make_optimizer: Callable[[nn.Module], torch.optim.Optimizer], iterations: int = 3) -> int:
    """The peak over some iterations, model and optimiser included, data excluded."""
    problem = digits()
    batch = next(batches(problem, seed=0))

    def train() -> None:
        run = Run(problem, make_optimizer)
        for _ in range(iterations):
            run.step(*batch)

    return live_peak(train)


def live_peak(work: Callable[[], object]) -> int:
    """The peak of what torch's CPU allocator holds since the work began."""
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure(iterations: int = 3) -> dict[str, int]:
    """Bytes of Adam, and of SNOpt with and without a refresh of its factors in every iteration."""

    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=0.0)

    peak_bytes(adam, iterations=1)  # what torch allocates once
    return {
        "Adam": peak_bytes(adam, iterations),
        "SNOpt, refresh": peak_bytes(lambda model: SNOpt(model, lr=0.0, refresh_every=1), iterations),
        "SNOpt, first refresh, then ordinary": peak_bytes(lambda model: SNOpt(model, lr=0.0), iterations),
    }


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler announces itself on the standard error stream."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
