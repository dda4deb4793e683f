"""One step of model predictive control: a planar quadrotor on a moving reference, N = 30.

Along one closed loop every plan is made by each solver from the same state and the same shifted guess, in turn. CPU
time of ``prepared.solve``, everything from the measured state to the Solution included.
"""

import runpy
from pathlib import Path
from statistics import median
from time import process_time
from typing import NamedTuple

import torch

import ocnopt as oc

EXAMPLE = Path(__file__).parents[2] / "examples" / "mpc_quadrotor.py"
WAYS = {
    "ddp compiled": ("ddp", {}),
    "ddp": ("ddp", {"compile": False}),
    "ipopt": ("casadi", {}),
    "ipopt 1e-6": ("casadi", {"tolerance": 1e-6}),
}
WANTED = {"ddp compiled": 5.0, "ddp": 20.0}


class Step(NamedTuple):
    """A way to make a plan: median and longest CPU time in milliseconds, mean iterations, largest cost difference."""

    way: str
    milliseconds: float
    longest: float
    iterations: float
    difference: float


def measure(steps: int = 100) -> list[Step]:
    """Make every plan of a closed loop by each way."""
    example = runpy.run_path(str(EXAMPLE))
    problem, clock, gust = (example[name] for name in ("problem", "clock", "gust"))
    prepared = {way: oc.prepare(problem, solver, steps=30, **options) for way, (solver, options) in WAYS.items()}
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    iterations: dict[str, list[int]] = {way: [] for way in WAYS}
    worst = dict.fromkeys(WAYS, 0.0)
    x, guess = problem.initial_state, None
    for i in range(steps):
        clock.fill_(i * 0.04)
        plans = {}
        for way, one in prepared.items():
            began = process_time()
            plans[way] = one.solve(x, initial_guess=guess)
            times[way].append(1e3 * (process_time() - began))
            iterations[way].append(int(plans[way].iterations))
        plan = plans["ddp"]
        for way, other in plans.items():
            worst[way] = max(worst[way], float((other.cost - plan.cost).abs() / (1 + plan.cost.abs())))
        x = plan.states[1] + gust((i + 1) * 0.04, x)
        guess = {
            "states": torch.cat([x[None], plan.states[2:], plan.states[-1:]]),
            "controls": torch.cat([plan.controls[1:], plan.controls[-1:]]),
        }
    return [Step(way, median(times[way]), max(times[way]), sum(iterations[way]) / steps, worst[way]) for way in WAYS]
