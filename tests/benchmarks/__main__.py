"""Run the measurements and print them.

python -m tests.benchmarks [PART ...] [--quick] [--full] [--against PATH] [--keep FILE], where PART is one of

    iterations memory wide race horizon engines layerwise
    control starts batch scaling mpc_pytorch gradients mpc versions

Peers that are not installed are named as such: see ``mpc_pytorch`` for how to install them.
"""

import argparse
import itertools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

import ocnopt as oc
from tests.benchmarks import (
    batch,
    cases,
    control,
    gradients,
    iterations,
    layerwise,
    mpc,
    mpc_pytorch,
    starts,
    versions,
)
from tests.benchmarks.neural import show_engines, show_horizon, show_memory, show_race, show_wide
from tests.benchmarks.table import ABSENT, Options, most, show


def show_iterations(options: Options) -> None:
    """SNOpt's iteration against Adam's, and the number of DDP's against IPOPT's."""
    swings = [iterations.count(*case) for case in iterations.SWINGS if case[1] <= 100 or not options.quick]
    show(
        "sweeps of DDP with exact curvature over iterations of IPOPT, from the library's start",
        ["problem", "N", "DDP", "IPOPT", "ratio", "wanted", "same minimum", *iterations.REMEDIES],
        [
            [
                *(one.name, str(one.steps), str(one.sweeps), str(one.ipopt), f"{one.ratio:.2f}"),
                *(most(iterations.WANTED), "yes" if one.same else "no", *map(str, one.remedies.values())),
            ]
            for one in swings
        ],
        "mu: the first regularisation; auto: Gauss-Newton where the exact model is not convex",
    )
    starts_each = 3 if options.quick else 10
    means = [(case, iterations.average(*case, starts_each)) for case in iterations.SPREAD]
    show(
        f"the same on average over {starts_each} starts",
        ["problem", "N", "start", "exact", "auto", "IPOPT", "exact / IPOPT", "same cost"],
        [
            [
                *(name, str(steps), f"{'own' if around else 'zero'} + {noise:g} noise", f"{mean.exact:.1f}"),
                *(f"{mean.auto:.1f}", f"{mean.ipopt:.1f}", f"{mean.exact / mean.ipopt:.2f}"),
                f"{mean.same} of {starts_each}",
            ]
            for (name, steps, noise, around), mean in means
        ],
    )
    rows = []
    for name, net in iterations.NETS.items():
        found = iterations.measure(net, 60 if options.quick else 200)
        ratios = [f"{found.ordinary:.3f}", most(net.ordinary), f"{found.refresh:.2f}", most(net.refresh)]
        rows.append([name, *ratios, f"{found.adam_milliseconds:.1f}"])
    show(
        "time of an iteration, SNOpt / Adam, equal evaluations",
        ["net", "ordinary", "wanted", "refresh", "wanted", "Adam, ms"],
        rows,
        f"medians of {found.pairs} pairs stepped in turn, CPU time",
    )


def show_layerwise(options: Options) -> None:
    """A step of OCNOpt against one of Adam."""
    rows = []
    for name, net in layerwise.nets().items():
        for cost in layerwise.measure(name, net, 3 if options.quick else 11):
            wanted = (layerwise.WANTED_TIME, layerwise.WANTED_MEMORY) if cost.way == "OCNOpt" else (None, None)
            ratios = [f"{cost.time:.2f}", most(wanted[0]), f"{cost.memory:.2f}", most(wanted[1])]
            rows.append([cost.net, cost.way, *ratios, f"{cost.milliseconds:.2f}"])
    show(
        "a training step over one of Adam",
        ["net", "optimiser", "time", "wanted", "peak memory", "wanted", "ms"],
        rows,
        "medians of CPU time, stepped in turn; memory: live bytes of torch's CPU allocator",
    )


def show_control(options: Options) -> None:
    """DDP against CasADi with IPOPT and crocoddyl, and its kernels against each other."""
    rows = []
    for name, steps, ways, wanted in control.CASES:
        if options.quick and steps > 100:
            continue
        found = control.measure(name, steps, ways, 2 if options.quick else 5)
        for way, entry, limit in zip(ways, found, (*wanted, None), strict=True):
            if entry is None:
                rows.append([name, str(steps), way.name, ABSENT])
                continue
            times = [f"{entry.ratio:.2f}", most(limit), f"{entry.first:.2f}", f"{entry.milliseconds:.1f}"]
            ends = [str(entry.iterations), f"{entry.difference:.0e}", "" if entry.converged else "not converged"]
            rows.append([name, str(steps), way.name, *times, *ends])
    show(
        "whole solves, kernels and NLP built beforehand, over the last one of each problem",
        ["problem", "N", "solver", "ratio", "wanted", "first", "ms", "iterations", "cost diff.", ""],
        rows,
        "best CPU times of solves in turn, and the ratio of the very first ones, which use what was just built; "
        "crocoddyl by FDDP or BoxFDDP from the same start, its model in Python on CasADi's derivatives, or in C++",
    )


def show_starts(options: Options) -> None:
    """DDP from the reference's starts, from random ones, and with a free end time."""
    rows = []
    for name, steps, start, cost in starts.NAMED:
        if steps <= 100 or not options.quick:
            found = starts.from_named_start(name, steps, start)
            off = abs(float(found.cost) / cost - 1)
            rows.append([name, str(steps), start, f"{off:.0e}", "<= 1e-07", str(int(found.iterations))])
    show(
        "DDP's cost over that of the reference solutions, from the start named there",
        ["problem", "N", "start", "relative error", "wanted", "iterations"],
        rows,
    )
    rows = []
    for name, steps, limit in starts.FREE[:3] if options.quick else starts.FREE:
        found, best = starts.free_end(name, steps, limit), oc.problems.control(name).T_star
        ends = [f"{float(found.horizon):.7f}", f"{best:.7f}", f"{float(found.constraint_violation):.0e}"]
        rows.append([name, str(steps), *ends, str(int(found.iterations)), "yes" if bool(found.converged) else "no"])
    show("free end time by DDP", ["problem", "N", "T", "T*", "violation", "iterations", "converged"], rows)
    cases_ = [case for case in starts.CASES if case[1] <= 100 or not options.quick]
    ends = [starts.measure(*case, starts=5 if options.quick else 10) for case in cases_]
    show(
        "where DDP ends from random controls",
        ["problem", "N", "starts", "converged", "best", "confirmed", "wanted", "iterations", "costs"],
        [
            [
                *(end.name, str(end.steps), str(end.starts), str(end.converged), str(end.best), str(end.confirmed)),
                *(f">= {0.9 * end.starts:.0f}", f"{end.iterations:.0f}", " ".join(f"{c:.6g}" for c in end.costs)),
            ]
            for end in ends
        ],
        "best: the reference's cost to 1e-7; confirmed: that, or IPOPT started there stays at the same cost to 1e-7",
    )


def show_batch(options: Options) -> None:
    """Batches against a loop of IPOPT."""
    rows = []
    for name, size in itertools.product(batch.PROBLEMS, batch.FULL_SIZES if options.full else batch.SIZES):
        if options.quick and size > 64:
            continue
        for found in batch.measure(name, size):
            times = [f"{found.milliseconds:.3f}", f"{found.ipopt_milliseconds:.1f}"]
            wanted = f">= {batch.WANTED[found.name]}" if size >= 1024 else ""
            ends = [f"{found.converged}", f"{found.same} of {found.rows}"]
            rows.append([name, str(size), found.name, *times, f"{found.gain:.1f}", wanted, *ends])
    show(
        "throughput of a batch over that of a loop of IPOPT, N = 100",
        ["problem", "batch", "kernel", "ms each", "IPOPT ms", "gain", "wanted", "converged", "same cost"],
        rows,
        "initial states the library's plus normal noise of 0.1; IPOPT: mean over the first six",
    )


def show_scaling(options: Options) -> None:
    """Whether a problem costs more in a large batch."""
    rows = [
        [name, *(f"{1e3 * value:.0f}" for value in found[:2]), f"{found.ratio:.2f}", "<= 1"]
        for name in batch.PROBLEMS
        for found in [batch.scaling(name, large=512 if options.quick else 8192)]
    ]
    show(
        "cost of a problem in batches of 256 and in one of 8192, compiled, N = 100",
        ["problem", "256, us each", "8192, us each", "ratio", "wanted"],
        rows,
        "medians of CPU times in turn, the batches of 256 cut from the large one",
    )


def show_mpc_pytorch(options: Options) -> None:
    """Batches against mpc.pytorch."""
    rows = []
    for size in (64,) if options.quick else (64, 1024):
        if not mpc_pytorch.INSTALLED:
            rows.append([str(size), "mpc.pytorch", "not installed (how: tests/benchmarks/mpc_pytorch.py)"])
            continue
        for found in mpc_pytorch.measure(size):
            wanted = ">= 3" if found.name == "compiled" else ""
            times = [f"{found.milliseconds:.3f}", f"{found.gain:.0f}", wanted]
            rows.append([str(size), found.name, *times, f"{found.iterations:.1f}", f"{found.same} of {size}"])
    show(
        "batches of a pendulum with bounded torque: throughput over that of mpc.pytorch, N = 100",
        ["batch", "solver", "ms each", "gain", "wanted", "iterations", "same cost"],
        rows,
        "CPU time of whole calls; mpc.pytorch with its analytic Jacobians, a quadratic cost and the tolerances of its "
        "own pendulum; iterations of the slowest problem there, on average here; same cost: to 1e-6",
    )


def show_gradients(options: Options) -> None:
    """The gradient of a solution over an iteration of the solver."""
    rows = []
    for found in (gradients.measure(size, 3 if options.quick else 7) for size in (1, 64, 512)):
        times = [f"{found.milliseconds:.2f}", f"{found.over_iteration:.2f}", "<= 2", f"{found.over_solve:.2f}"]
        rows.append([str(found.batch), *times])
    show(
        "pendulum_swing_up, N = 100: gradient of a loss of states and controls in the initial state",
        ["batch", "ms", "/ iteration", "wanted", "/ compiled solve"],
        rows,
        "median CPU time of backward(), over an iteration of DDP with the torch kernel and over a whole compiled solve",
    )


def show_mpc(options: Options) -> None:
    """One step of model predictive control."""
    rows = []
    for step in mpc.measure(20 if options.quick else 100):
        times = [f"{step.milliseconds:.1f}", most(mpc.WANTED.get(step.way)), f"{step.longest:.1f}"]
        rows.append([step.way, *times, f"{step.iterations:.1f}", f"{step.difference:.0e}"])
    show(
        "one plan of a planar quadrotor, N = 30, warm-started",
        ["solver", "ms", "wanted", "longest", "it", "cost diff."],
        rows,
        "median and longest CPU time of prepared.solve, each plan made by all in turn; iterations on average",
    )


def show_versions(options: Options) -> None:
    """This version of the package alone, or over another one."""
    with ExitStack() as stack:
        here = stack.enter_context(versions.version(versions.HERE))
        there = stack.enter_context(versions.version(options.against.resolve())) if options.against else None
        found = [versions.measure(case, here, there, 1 if options.quick else 3) for case in cases.CASES]
    rows = [
        [
            *(cost.case, f"{cost.milliseconds / cost.work:.3f}", str(cost.work)),
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in (cost.ratio, cost.ratio_of_work)),
            most(cases.WANTED[cost.case]),
        ]
        for cost in found
    ]
    show(
        "CPU time here, and over that of the other version" if options.against else "CPU time of cases for --against",
        ["case", "ms each", "number", "time ratio", "number ratio", "wanted"],
        rows,
        "each: a problem's sweep, a pass forward and backward, a call; torch kernel; medians of calls in turn",
    )


PARTS: dict[str, Callable[[Options], None]] = {
    "iterations": show_iterations,
    "memory": show_memory,
    "wide": show_wide,
    "race": show_race,
    "horizon": show_horizon,
    "engines": show_engines,
    "layerwise": show_layerwise,
    "control": show_control,
    "starts": show_starts,
    "batch": show_batch,
    "mpc": show_mpc,
    "scaling": show_scaling,
    "mpc_pytorch": show_mpc_pytorch,
    "gradients": show_gradients,
    "versions": show_versions,
}


def main() -> None:
    """Read the arguments and run the parts."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, one seed, small N")
    parser.add_argument("--full", action="store_true", help="batches of 8192 too, more seeds")
    parser.add_argument("--against", type=Path, metavar="PATH", help="a checkout of another version, for `versions`")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="of ended races, with which `race` goes on")
    found = parser.parse_args()
    if unknown := [part for part in found.parts if part not in PARTS]:
        parser.error(f"no part is called {', '.join(unknown)}; expected any of {', '.join(PARTS)}")
    torch.set_num_threads(1)
    for name in found.parts or PARTS:
        PARTS[name](Options(found.quick, found.full, found.against, found.keep))


if __name__ == "__main__":
    main()
