"""Tables of the parts on networks."""

from itertools import chain
from statistics import mean

from ocnopt.errors import DataError
from tests.benchmarks import engines, horizon, memory, race, wide
from tests.benchmarks.table import ABSENT, Options, most, show


def show_memory(options: Options) -> None:
    """Peaks of both."""
    peaks = memory.measure()
    show(
        "img: peak memory of a training iteration",
        ["optimiser", "MiB", "ratio", "wanted"],
        [
            [name, f"{peak / 2**20:.2f}", f"{peak / peaks['Adam']:.2f}", "<= 1.15" if "refresh" in name else ""]
            for name, peak in peaks.items()
        ],
        "live bytes of torch's CPU allocator (torch.profiler), model and state included",
    )


def show_wide(options: Options) -> None:
    """Wide nets: time to Adam's final loss."""
    rows = []
    for name, net in wide.NETS.items():
        try:
            found = [wide.measure(net, seed) for seed in range(1 if options.quick else 3)]
        except DataError:
            rows.append([name, "its data are not there", *[""] * 5])
            continue
        ratios = [one.ratio for one in found]
        ends = [
            " / ".join(f"{mean(of):.3g}" for of in zip(*part, strict=True))
            for part in zip(*(one[3:] for one in found), strict=True)
        ]
        rows.append(
            [
                *(name, str(net.iterations), " ".join(str(one.iterations or "-") for one in found)),
                " ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                *(f"{race.geometric_mean(ratios):.2f}", *ends),
            ]
        )
    show(
        "wide nets: SNOpt as it comes until the loss that Adam ends with",
        ["net", "iterations of Adam", "iterations", "time", "mean", "loss, Adam / SNOpt", "test"],
        rows,
        f"means of {race.WINDOW} batches, a number a seed; time: of the processor, over Adam's, stepped in turn, which "
        f"has the best rate of {', '.join(map(str, wide.RATES))}; loss and accuracy after Adam's iterations",
    )


def show_race(options: Options) -> None:
    """Time to Adam's final loss: SNOpt as it comes against tuned opponents."""
    kept = race.Kept(options.kept)
    for name, workload in race.WORKLOADS.items():
        if options.quick and name not in race.QUICK:
            continue
        found = race.race_all(workload, 1 if options.quick else 5 if options.full else 2, kept=kept)
        rows = []
        for method, courses in found.items():
            ratios = [course.ratio for course in courses]
            rows.append(
                [
                    *(method, f"{courses[0].lr:g}", " ".join(str(course.iterations or "-") for course in courses)),
                    " ".join("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
                    f"{race.geometric_mean(ratios):.2f}",
                    most(workload.wanted if method == "snopt" else None),
                    *(f"{mean(part):.4g}" for part in zip(*(course[4:] for course in courses), strict=True)),
                ]
            )
        rows += [[method, ABSENT, *[""] * 7] for method in race.RATES if method not in found]
        show(
            f"{name}: {workload.problem}, {workload.iterations} iterations of Adam",
            ["method", "lr", "iterations", "time", "mean", "wanted", "loss", "test", "evaluations"],
            rows,
            f"until the loss that Adam ends with (means of {race.WINDOW} batches), a number a seed; time: of the "
            "processor, over Adam's whole run; loss, first metric of the test part and evaluations in all at the end; "
            "lr: of Adam and the opponents the best of three on seed 0, of L-BFGS 1",
        )
        if options.full:
            _show_further(name, workload, found, kept)


def _show_further(name: str, workload: race.Workload, found: dict[str, list[race.Finish]], kept: race.Kept) -> None:
    show(
        f"{name}: with three times the iterations, seed 0",
        ["method", "lr", "time", "loss", "test", "evaluations"],
        [
            [
                *(end.optimizer, f"{end.lr:g}", "-" if end.ratio is None else f"{end.ratio:.2f}"),
                *(f"{end.loss:.3g}", f"{end.metric:.4g}", str(end.evaluations)),
            ]
            for end in race.go_on(workload, found, kept)
        ],
        "time: until the loss that Adam ends with, over Adam's",
    )
    ends = race.repeat(workload, 10, kept)
    show(
        f"{name}: SNOpt on ten seeds",
        ["", "lowest", "highest"],
        [
            ["loss", *(f"{limit(end.loss for end in ends):.3g}" for limit in (min, max))],
            ["test", *(f"{limit(end.metric for end in ends):.4g}" for limit in (min, max))],
        ],
        "infinite where a run diverged",
    )


def show_horizon(options: Options) -> None:
    """The feedback rule for T against a fixed T."""
    ends = [end for seed in range(1 if options.quick else 3 if options.full else 2) for end in horizon.measure(seed)]
    rows = [
        [
            *(end.optimizer, str(end.seed), f"{end.start:g}", f"{end.T:.3f}", str(end.settled), f"{end.swing:.1%}"),
            *("never" if end.time_ratio is None else f"{end.time_ratio:.2f}", f"{end.whole_ratio:.2f}"),
            *(f"{end.evaluations:.1f}", f"{end.fixed_evaluations:.1f}", f"{end.accuracy:.3f}"),
            f"{end.fixed_accuracy:.3f}",
        ]
        for end in ends
    ]
    for name in horizon.OPTIMISERS:
        for start in horizon.STARTS:
            same = [end for end in ends if (end.optimizer, end.start) == (name, start)]
            numbers = (
                f"{race.geometric_mean([end.time_ratio for end in same]):.2f}",
                f"{race.geometric_mean([end.whole_ratio for end in same]):.2f}",
                *(
                    f"{mean(part):.1f}"
                    for part in zip(*((e.evaluations, e.fixed_evaluations) for e in same), strict=True)
                ),
                *(f"{mean(part):.3f}" for part in zip(*((e.accuracy, e.fixed_accuracy) for e in same), strict=True)),
            )
            rows.append([name, "mean", f"{start:g}", "", "", "", *numbers])
    show(
        "img: T by the feedback rule, moved every 10 iterations, against T = 1",
        ["optimiser", "seed", "start", "T", "settled", "swing", "time", "whole", "eval", "at 1", "acc", "at 1"],
        rows,
        f"T after {horizon.ITERATIONS} iterations; settled: the iteration when it first is within 5 % of that; swing: "
        "how far it is off at most from then on (wanted <= 10 %); time until the loss that Adam ends with at T = 1, "
        "a mean over an epoch's batches, and of the whole run, over those at T = 1 (wanted <= 0.85); means of ratios "
        "are geometric",
    )


def show_engines(options: Options) -> None:
    """Our Neural-ODE engine against torchdiffeq."""
    for name, (field, start) in engines.workloads().items():
        for method in ("dopri5", "rk4"):
            ways, rows = engines.measure(field, start, method, 3 if options.quick else 9), []
            limits = engines.limits(ways, engines.WANTED[name, method])
            for way in ways:
                wants = limits if way.name == engines.DEFAULT else [""] * len(limits)
                figures = (f"{way.over_backprop:.2f}", f"{way.over_adjoint:.2f}", f"{way.error:.1e}")
                rows.append([way.name, *chain(*zip(figures, wants, strict=True)), f"{way.milliseconds:.1f}"])
            show(
                f"{name}: forward and backward, {method} {'1e-3' if method == 'dopri5' else f'{engines.STEPS} steps'}",
                ["engine", "/ odeint", "wanted", "/ odeint_adjoint", "wanted", "gradient error", "wanted", "ms"],
                rows,
            )
