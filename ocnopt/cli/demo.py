"""The main job end to end: control by DDP and CasADi, then digit images by Adam, SNOpt and SNOpt with feedback T.

The training runs of one seed are stepped in turn, so that a busy machine slows all of them alike and their times can be
compared. Each has a run folder inside the demo's, so that a killed demo goes on where it was.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from ocnopt.cli import boat
from ocnopt.cli.control import comparison_table, draw
from ocnopt.cli.learning import draw_training, fields, label, last_loss, progress_bar, reaches
from ocnopt.training.curves import Metrics
from ocnopt.cli.report import Section, write_report
from ocnopt.runs import CONFIG, RunFolder
from ocnopt.cli.tables import Table, show
from ocnopt.training.trainer import TrainConfig, Trainer, advance, open_trainer
from ocnopt.problems import control, learning_task
from ocnopt.solvers.compare import compare

METHODS = (("adam", "fixed"), ("snopt", "fixed"), ("snopt", "feedback"))
LEARNING_PROBLEM = "digits"
Runs = Mapping[str, Sequence[Metrics]]


def run_demo(folder: RunFolder, console: Console) -> Path:
    """Run everything, print the tables, and write plots and the report page.

    Args:
        folder: its configuration says how many ``seeds``.
        console: shows tables and progress.

    Returns:
        The page.

    Raises:
        DataError: the folder was made by another version.
    """
    seeds = folder.entry("seeds", range)
    console.rule("Control: DDP against CasADi/IPOPT, from the same start")
    sections = [_pendulum(folder, console), _own_problem(folder, console)]
    console.rule("Learning: Adam, SNOpt, SNOpt with feedback T on digit images")
    sections.append(_digits(folder, console, seeds))
    lead = "Trajectories by DDP and by CasADi/IPOPT; a Neural ODE by Adam, SNOpt and SNOpt with feedback T."
    return write_report(folder.path, "ocnopt demo", lead, sections)


def _pendulum(folder: RunFolder, console: Console) -> Section:
    record = control("pendulum_swing_up")
    comparison = compare(record.build(), steps=record.steps)
    table = comparison_table(record.name, comparison, record.discrete_values[record.steps])
    show(console, table)
    image = draw(folder, comparison.solutions, record.state_labels, record.control_labels, "time (s)", "pendulum")
    text = f"A problem of the library, {record.summary}, on {record.steps} steps. Start: {record.start}."
    return Section("Pendulum swing-up", text, [table], [image])


def _own_problem(folder: RunFolder, console: Console) -> Section:
    comparison = compare(boat.problem(), steps=boat.STEPS)
    table = comparison_table("own problem: a boat crosses a river", comparison)
    show(console, table)
    image = draw(folder, comparison.solutions, boat.STATES, boat.CONTROLS, "time (s)", "boat")
    text = (
        f"Defined in this demo as a user would define it, in three torch functions, on {boat.STEPS} steps: cross a "
        "river with a current and dock right opposite, at rest."
    )
    return Section("A problem of one's own: crossing a river", text, [table], [image])


def _digits(folder: RunFolder, console: Console, seeds: Sequence[int]) -> Section:
    record = learning_task(LEARNING_PROBLEM)
    window = len(record.build().train_targets) // record.batch_size
    configs = {
        seed: [_config(optimizer, horizon, seed, window * record.epochs) for optimizer, horizon in METHODS]
        for seed in seeds
    }
    runs: dict[str, list[Metrics]] = {label(config): [] for config in next(iter(configs.values()))}
    for seed, same_seed in configs.items():
        metrics = _train_in_turn(folder, console, seed, same_seed)
        for name, lines in metrics.items():
            runs[name].append(lines)
    table = _training_table(runs, window)
    show(console, table)
    images = draw_training(runs, folder, window)
    split = record.build().split
    what = f"{record.summary[0].upper()}{record.summary[1:]}"
    budget = f"{window * record.epochs} iterations for every method, the methods of a seed stepped in turn"
    text = f"{what}. {record.source}; {split}. {budget}."
    return Section("Digit images", text, [table], images)


def _config(optimizer: str, horizon: str, seed: int, iterations: int) -> TrainConfig:
    record = learning_task(LEARNING_PROBLEM)
    return TrainConfig(
        problem=LEARNING_PROBLEM,
        optimizer=optimizer,
        horizon=horizon,
        lr=record.learning_rates[optimizer],
        iterations=iterations,
        batch_size=record.batch_size,
        seed=seed,
    )


def _train_in_turn(
    folder: RunFolder, console: Console, seed: int, configs: Sequence[TrainConfig]
) -> dict[str, list[dict[str, Any]]]:
    """One iteration of each method after the other, until all are done."""
    runs: dict[str, tuple[Trainer, RunFolder]] = {}
    metrics: dict[str, list[dict[str, Any]]] = {}
    with progress_bar(console) as bar, ExitStack() as locks:
        tasks = {}
        for config in configs:
            name = label(config)
            inner = _inner_folder(folder, config)
            locks.enter_context(inner.locked())
            trainer, metrics[name] = open_trainer(inner)
            runs[name] = (trainer, inner)
            last = metrics[name][-1] if metrics[name] else None
            done = trainer.iteration
            tasks[name] = bar.add_task(f"{name} {seed}", total=config.iterations, completed=done, **fields(last))
        while not all(trainer.finished for trainer, _ in runs.values()):
            for name, (trainer, inner) in runs.items():
                if not trainer.finished:
                    record = advance(trainer, inner)
                    metrics[name].append(record)
                    bar.update(tasks[name], completed=trainer.iteration, **fields(record))
    return metrics


def _inner_folder(folder: RunFolder, config: TrainConfig) -> RunFolder:
    """The folder of one training run, made or found again."""
    path = folder.path / f"{config.optimizer}-{config.horizon}-seed{config.seed}"
    if (path / CONFIG).exists():
        return RunFolder.open(path)
    return RunFolder.create(path, {"command": "train", "train": asdict(config)})


def _training_table(runs: Runs, window: int) -> Table:
    """What each method reached over the same budget, and how soon it met the loss that the first method ended with."""
    first = next(iter(runs))
    targets = [last_loss(metrics, window) for metrics in runs[first]]
    goal = f"to {first}'s\nloss"
    head = ("method", "loss", "test %", f"iterations\n{goal}", f"seconds\n{goal}", "ms", "T", "evals")
    rows = []
    for name, seeds in runs.items():
        reached = [reaches(metrics, target, window) for metrics, target in zip(seeds, targets, strict=True)]
        ends = [metrics[-1] for metrics in seeds]
        rows.append(
            (
                name,
                f"{mean(last_loss(metrics, window) for metrics in seeds):.4f}",
                f"{100 * mean(end['test_accuracy'] for end in ends):.1f}",
                " ".join("-" if point is None else str(point[0]) for point in reached),
                " ".join("-" if point is None else f"{point[1]:.0f}" for point in reached),
                f"{mean(1000 * end['seconds'] / end['iteration'] for end in ends):.0f}",
                f"{mean(end['T'] for end in ends):.3f}",
                f"{mean(mean(r['forward'] + r['backward'] for r in metrics) for metrics in seeds):.1f}",
            )
        )
    note = (
        f"Loss: mean of the last {window} iterations, one epoch. Iterations and time: until that mean first meets "
        f"{first}'s final one, seed by seed; -: not within the budget. "
        f"ms, evals: time and field evaluations of one iteration. Other columns: mean over {len(targets)} seeds."
    )
    return Table(f"{LEARNING_PROBLEM}, {runs[first][0][-1]['iteration']} iterations", head, rows, note=note)
