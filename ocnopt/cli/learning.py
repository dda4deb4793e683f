"""Training by name on the terminal: a progress bar, a table, plots and a page in the run folder."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ocnopt.cli.report import Image, Section, write_report
from ocnopt.cli.tables import Table, show
from ocnopt.errors import ProblemError
from ocnopt.optim.registry import optimizer as optimizer_record
from ocnopt.problems import learning_task
from ocnopt.runs import PLOTS, RunFolder
from ocnopt.training import Method, TrainConfig, Trainer, curves, open_trainer, train
from ocnopt.training.curves import Runs
from ocnopt.training.metrics import Metrics, last_loss, metric_scale, metric_title, tested
from ocnopt.training.parallel import check_processes, together
from ocnopt.training.trainer import HORIZON


def progress_bar(console: Console) -> Progress:
    """A bar with a text and the time left.

    Args:
        console: where to draw.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
    )


def _text(record: Mapping[str, Any]) -> str:
    """What the bar shows of a line of metrics."""
    solver = f" T {record['T']:.3f} {record['forward'] + record['backward']} evals" if "T" in record else ""
    return f"loss {record['loss']:.4f}{solver}"


def train_request(
    name: str,
    *,
    optimizer: str | None,
    lr: float | None,
    epochs: int | None,
    iterations: int | None,
    batch_size: int | None,
    nproc: int | None = None,
    **others: Any,
) -> dict[str, Any]:
    """What ``ocnopt train`` was asked, with the problem's recommendations filled in.

    Args:
        name: of a learning problem.
        optimizer: its name; "snopt" if None.
        lr: the tuned one if None.
        epochs: the recommended number if this and ``iterations`` are None.
        iterations: instead of ``epochs``.
        batch_size: the recommended one if None.
        nproc: processes; 1 if None.
        others: fields of :class:`TrainConfig`; None means its default.

    Raises:
        ProblemError: unknown names, numbers out of range, both epochs and iterations, a rule's numbers for a fixed T,
            or a rule or optimiser that does not fit the model.
    """
    if epochs is not None and iterations is not None:
        raise ProblemError(
            f"--epochs {epochs} came with --iterations {iterations}; expected one of them: leave one out"
        )
    if others.get("horizon") in (None, "fixed"):
        for key, value in others.items():
            if key.startswith("horizon_") and value is not None:
                option = f"--{key.replace('_', '-')}"
                raise ProblemError(
                    f"{option} {value} came for a fixed T, which no rule moves; expected --horizon feedback or "
                    f"--horizon adjoint beside it: add one, or leave {option} out"
                )
    record = learning_task(name)
    chosen = optimizer_record(optimizer or "snopt")
    task = record.build()
    batch = batch_size or (len(task.train_targets) if chosen.wants_all else record.batch_size)
    epochs = None if iterations else epochs or record.epochs
    config = TrainConfig(
        problem=name,
        optimizer=chosen.name,
        lr=lr if lr is not None else record.learning_rates.get(chosen.name, chosen.lr),
        iterations=iterations or (epochs or 0) * max(1, len(task.train_targets) // batch),
        batch_size=batch,
        **{key: value for key, value in others.items() if value is not None},
    )
    Trainer(task, config)  # refuses what does not fit while there is no folder yet
    check_processes(config, nproc or 1)
    return {"problem": name, "epochs": epochs, "nproc": nproc or 1, "train": asdict(config)}


def run_train(folder: RunFolder, console: Console, nproc: int | None = None) -> None:
    """Train what a folder's configuration asks for, from its last checkpoint; write plots and a page.

    Args:
        folder: its configuration holds the fields of a :class:`TrainConfig` under "train".
        console: shows the bar and the table.
        nproc: processes; as many as the run began with if None.
    """
    trainer, metrics = open_trainer(folder)
    config, record = trainer.config, learning_task(trainer.config.problem)
    label = Method(config.optimizer, config.horizon).label
    if metrics:
        console.print(f"resumed after iteration {trainer.iteration} of {config.iterations}")
    with progress_bar(console) as bar:
        text = _text(metrics[-1]) if metrics else ""
        task = bar.add_task(label, total=config.iterations, completed=trainer.iteration, text=text)

        def on_step(run: int, record: dict[str, Any]) -> None:
            metrics.append(record)
            bar.update(task, completed=record["iteration"], text=_text(record))
            if record["iteration"] in _moments(config.iterations):
                draw_model(trainer, folder, f"{record['iteration']}-", on_the_way=True)

        with together(folder, 1 if trainer.finished else nproc or folder.config.get("nproc", 1)):
            train([(trainer, folder)], on_step)
    window = trainer.batches_per_epoch
    table = _train_table(config, label, metrics, window)
    show(console, table)
    images = draw_training({label: [metrics]}, folder, window, moving=() if config.horizon == "fixed" else [label])
    images += _drawn_on_the_way(trainer, folder) + draw_model(trainer, folder)
    about = Section("The data", f"{record.source}. {trainer.task.split}.")
    title = f"{config.problem} with {label}"
    write_report(folder.path, title, record.summary, [Section("Result", tables=[table], images=images), about])


def _train_table(config: TrainConfig, label: str, metrics: Metrics, window: int) -> Table:
    end = metrics[-1]
    rows = [
        ("optimiser", f"{label}, learning rate {config.lr:g}, seed {config.seed}"),
        ("iterations", f"{len(metrics)} of batches of {config.batch_size}"),
        (f"loss, mean of the last {min(window, len(metrics))}", f"{last_loss(metrics, window):.4f}"),
        *((metric_title(key), f"{metric_scale(key) * end[key]:.4g}") for key in tested(metrics)),
        ("training time", f"{end['seconds']:.1f} s, {1000 * end['seconds'] / len(metrics):.1f} ms an iteration"),
    ]
    if "T" in end:
        rows[-1:-1] = [
            ("integration time T", f"{end['T']:.4f}"),
            ("field evaluations an iteration", f"{mean(r['forward'] + r['backward'] for r in metrics):.1f}"),
        ]
    return Table(config.problem, ("", ""), rows, text=True)


def draw_model(
    trainer: Trainer, folder: RunFolder, prefix: str = "", label: str = "", *, on_the_way: bool = False
) -> list[Image]:
    """The pictures that a task makes of its model.

    Args:
        trainer: of the model, whose random numbers stay as they are.
        folder: takes the PNGs.
        prefix: of the names of the files.
        label: in front of the captions.
        on_the_way: only those worth seeing before the end.
    """
    pictures = [picture for picture in trainer.task.pictures if picture.as_it_trains or not on_the_way]
    trainer.model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trainer.config.seed)
        drawn = [(picture, picture.draw(trainer.model, trainer.task)) for picture in pictures]
    trainer.model.train()
    return [
        Image(folder.draw(prefix + picture.name, figure), label + picture.caption)
        for picture, figure in drawn
        if figure is not None
    ]


def _moments(iterations: int) -> list[int]:
    """When a model is drawn before the end: after about 1/16 and 1/4 of all iterations."""
    return [iterations // 16, iterations // 4]


def _drawn_on_the_way(trainer: Trainer, folder: RunFolder) -> list[Image]:
    """What an earlier part of a resumed run drew is in the folder too."""
    names = [picture.name for picture in trainer.task.pictures if picture.as_it_trains]
    return [
        Image(f"{PLOTS}/{moment}-{name}.png", f"After iteration {moment}.")
        for moment in _moments(trainer.config.iterations)
        for name in names
        if (folder.plots / f"{moment}-{name}.png").exists()
    ]


def draw_training(
    runs: Runs, folder: RunFolder, window: int, prefix: str = "", *, moving: Sequence[str] = ()
) -> list[Image]:
    """The pictures of one or more training runs.

    Args:
        runs: label -> the metrics of each seed.
        folder: takes the PNGs.
        window: W, iterations that a point averages over.
        prefix: of the names of the files.
        moving: the labels of those in which a rule moves T.
    """
    every = [metrics for seeds in runs.values() for metrics in seeds if metrics]
    if not every:
        return []
    window = max(1, min(window, min(map(len, every)) // 4))  # a shorter mean shows the course of a short run
    several = " One line a seed." if len(every) > len(runs) else ""
    if curves.in_bands(runs):
        several = " Means over the seeds, in a band from the least to the greatest."
    evaluates = "T" in every[0][-1]
    drawn = [
        ("loss-time", curves.draw_loss_against_time(runs, window), f"Training loss against time.{several}"),
        (
            "loss-iteration",
            curves.draw_loss_against_iteration(runs, window),
            f"Training loss{' and field evaluations' if evaluates else ''} of an iteration, means as above.",
        ),
    ]
    for name in tested(max(every, key=len)):
        caption = f"{metric_title(name).capitalize()} after each epoch."
        drawn.append((name.removeprefix("test_"), curves.draw_metric(runs, name), caption))
    if moving:
        starts = dict.fromkeys(moving, HORIZON.initial)
        drawn.append(("horizon", curves.draw_horizon(runs, starts), "Integration time T against the iteration."))
    return [Image(folder.draw(prefix + name, figure), caption) for name, figure, caption in drawn]
