"""Run the measurements and print them.

python -m tests.benchmarks [--quick] [--only iterations memory race engines control]
"""

import argparse
import itertools
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks import control, engines, iterations, memory, race

console = Console()


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """Print one table."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_iterations(quick: bool) -> None:
    """SNOpt's iteration against Adam's."""
    found = iterations.measure(20 if quick else 60)
    show(
        "img: time of an iteration, SNOpt / Adam, equal evaluations",
        ["iteration", "measured", "wanted"],
        [
            ["ordinary", f"{found.ordinary:.3f}", "<= 1.05"],
            ["refresh of the factors", f"{found.refresh:.2f}", "<= 2"],
        ],
        f"median of {found.pairs} pairs stepped in turn; Adam {found.adam_milliseconds:.0f} ms of CPU time",
    )


def show_memory(quick: bool) -> None:
    """Peaks of both."""
    peaks = memory.measure()
    show(
        "img: peak memory of a training iteration",
        ["optimiser", "MiB", "ratio", "wanted"],
        [
            [name, f"{peak / 2**20:.2f}", f"{peak / peaks['Adam']:.2f}", "<= 1.2" if "refresh" in name else ""]
            for name, peak in peaks.items()
        ],
        "live bytes of torch's CPU allocator (torch.profiler), model and state included",
    )


def show_race(quick: bool) -> None:
    """Iterations to Adam's final loss."""
    rows = []
    for lr, seed in itertools.product(race.ADAM_LRS, range(1 if quick else 3)):
        end = race.race(seed, lr)
        reached = ["never", "-"] if end.iterations is None else [str(end.iterations), f"{end.time_ratio:.2f}"]
        rows.append(
            [
                *(f"{lr:g}", str(seed), f"{end.target:.4f}", str(race.ITERATIONS), str(end.adam_first), *reached),
                *(f"{end.adam_evaluations:.1f}", f"{end.evaluations:.1f}"),
                *(f"{end.adam_accuracy:.3f}", f"{end.accuracy:.3f}"),
            ]
        )
    show(
        "img: iterations to the training loss that tuned Adam ends with",
        ["lr", "seed", "loss", "Adam", "first", "SNOpt", "time", "Adam eval", "SNOpt eval", "Adam acc", "SNOpt acc"],
        rows,
        "lr and iterations of Adam, when Adam first was as low, and SNOpt's; loss of the whole training part, looked "
        f"up every {race.EVALUATE_EVERY} iterations; time: SNOpt's over Adam's; eval: evaluations of the field per "
        "iteration; acc: on the test part, SNOpt's when it reaches the loss",
    )


def show_engines(quick: bool) -> None:
    """Our Neural-ODE engine against torchdiffeq."""
    for name, (field, start) in engines.workloads().items():
        found = engines.measure(field, start, 5 if quick else 15)
        rows = [[way.name, f"{way.ratio:.2f}", f"{way.error:.1e}", f"{way.milliseconds:.1f}"] for way in found]
        show(f"{name}: forward and backward, dopri5 1e-3", ["engine", "time ratio", "gradient error", "ms"], rows)


def show_control(quick: bool) -> None:
    """DDP against CasADi."""
    rows = [
        [
            *(row.solver, str(row.steps), f"{row.milliseconds_per_iteration:.1f}"),
            *(str(row.iterations), f"{row.seconds:.2f}", f"{row.cost:.6f}"),
        ]
        for steps in ((100,) if quick else (100, 500))
        for row in control.measure(steps=steps, repeats=1 if quick else 3)
    ]
    show("pendulum_swing_up", ["solver", "N", "ms/iteration", "iterations", "seconds", "cost"], rows)


PARTS: dict[str, Callable[[bool], None]] = {
    "iterations": show_iterations,
    "memory": show_memory,
    "race": show_race,
    "engines": show_engines,
    "control": show_control,
}


def main() -> None:
    """Read the arguments and run the parts."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, one seed, small N")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.only:
        PARTS[name](arguments.quick)


if __name__ == "__main__":
    main()
