"""Training by name on the terminal: a progress bar, a table, plots and a page in the run folder.

The loss of a single batch is noisy, so every figure uses its mean over the last W iterations: one epoch, where the run
is that long.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ocnopt.training import curves
from ocnopt.training.curves import Metrics, smooth
from ocnopt.cli.report import Image, Section, write_report
from ocnopt.runs import RunFolder
from ocnopt.cli.tables import Table, show
from ocnopt.training.trainer import TrainConfig, open_trainer, train
from ocnopt.errors import ProblemError
from ocnopt.problems import learning_task


def progress_bar(console: Console) -> Progress:
    """A bar with loss, T, field evaluations and the time left.

    Args:
        console: where to draw.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=10),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("T {task.fields[T]}"),
        TextColumn("{task.fields[evaluations]} evals"),
        TimeRemainingColumn(compact=True),
        TextColumn("left"),
        console=console,
    )


def fields(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the bar shows of a line of metrics.

    Args:
        record: the last line, or None before the first.
    """
    if record is None:
        return {"loss": "-", "T": "-", "evaluations": "-"}
    evaluations = record["forward"] + record["backward"]
    return {"loss": f"{record['loss']:.4f}", "T": f"{record['T']:.3f}", "evaluations": str(evaluations)}


def train_request(
    name: str,
    *,
    optimizer: str | None,
    lr: float | None,
    epochs: int | None,
    iterations: int | None,
    batch_size: int | None,
    **others: Any,
) -> dict[str, Any]:
    """What ``ocnopt train`` was asked, with the problem's recommendations filled in.

    Args:
        name: of a learning problem.
        optimizer: "adam", "sgd" or "snopt"; "snopt" if None.
        lr: the tuned one if None.
        epochs: the recommended number if this and ``iterations`` are None.
        iterations: instead of ``epochs``.
        batch_size: the recommended one if None.
        others: fields of :class:`TrainConfig`; None means its default.

    Raises:
        ProblemError: unknown names, numbers out of range, both epochs and iterations, or a rule's numbers
            for a fixed T.
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
    optimizer = optimizer or "snopt"
    batch = batch_size or record.batch_size
    epochs = None if iterations else epochs or record.epochs
    samples = len(record.build().train_targets)
    config = TrainConfig(
        problem=name,
        optimizer=optimizer,
        lr=lr if lr is not None else record.learning_rates.get(optimizer, 0.01),
        iterations=iterations or (epochs or 0) * max(1, samples // batch),
        batch_size=batch,
        **{key: value for key, value in others.items() if value is not None},
    )
    return {"problem": name, "epochs": epochs, "train": asdict(config)}


def run_train(folder: RunFolder, console: Console) -> None:
    """Train what a folder's configuration asks for, from its last checkpoint; write plots and a page.

    Args:
        folder: its configuration holds the fields of a :class:`TrainConfig` under "train".
        console: shows the bar and the table.
    """
    trainer, metrics = open_trainer(folder)
    if metrics:
        console.print(f"resumed after iteration {trainer.iteration} of {trainer.config.iterations}")
    with progress_bar(console) as bar:
        last = metrics[-1] if metrics else None
        task = bar.add_task(
            label(trainer.config), total=trainer.config.iterations, completed=trainer.iteration, **fields(last)
        )

        def on_step(record: dict[str, Any]) -> None:
            metrics.append(record)
            bar.update(task, completed=record["iteration"], **fields(record))

        train(trainer, folder, on_step)
    window = trainer.batches_per_epoch
    table = _train_table(trainer.config, metrics, window)
    show(console, table)
    images = draw_training({label(trainer.config): [metrics]}, folder, window)
    record = learning_task(trainer.config.problem)
    about = Section("The data", f"{record.source}. {trainer.problem.split}.")
    title = f"{trainer.config.problem} with {label(trainer.config)}"
    write_report(folder.path, title, record.summary, [Section("Result", tables=[table], images=images), about])


def label(config: TrainConfig) -> str:
    """The name of a run in tables and legends.

    Args:
        config: of the run.

    Example:
        >>> label(TrainConfig("digits", "snopt", lr=0.01, horizon="feedback"))
        'SNOpt + feedback T'
    """
    name = {"adam": "Adam", "sgd": "SGD", "snopt": "SNOpt"}[config.optimizer]
    return name if config.horizon == "fixed" else f"{name} + {config.horizon} T"


def _train_table(config: TrainConfig, metrics: Metrics, window: int) -> Table:
    end = metrics[-1]
    evaluations = sum(record["forward"] + record["backward"] for record in metrics) / len(metrics)
    rows = [
        ("optimiser", f"{label(config)}, learning rate {config.lr:g}, seed {config.seed}"),
        ("iterations", f"{len(metrics)} of batches of {config.batch_size}"),
        (f"loss, mean of the last {min(window, len(metrics))}", f"{last_loss(metrics, window):.4f}"),
        ("test accuracy", f"{100 * end['test_accuracy']:.1f} %"),
        ("integration time T", f"{end['T']:.4f}"),
        ("field evaluations an iteration", f"{evaluations:.1f}"),
        ("training time", f"{end['seconds']:.1f} s, {1000 * end['seconds'] / len(metrics):.0f} ms an iteration"),
    ]
    return Table(config.problem, ("", ""), rows, text=True)


def last_loss(metrics: Metrics, window: int) -> float:
    """The mean loss over the last W iterations.

    Args:
        metrics: of one run.
        window: W; all lines where there are fewer.
    """
    losses = [record["loss"] for record in metrics]
    return float(smooth(losses, min(window, len(losses)))[-1])


def reaches(metrics: Metrics, target: float, window: int) -> tuple[int, float] | None:
    """Iteration and training time at which the mean over W iterations first meets a target; None if it never does.

    Args:
        metrics: of one run.
        target: a loss.
        window: W.

    Example:
        >>> lines = [{"loss": loss, "iteration": i + 1, "seconds": i + 1.0} for i, loss in enumerate([4.0, 2.0, 0.0])]
        >>> reaches(lines, 3.0, 2)
        (2, 2.0)
    """
    for record, loss in zip(metrics, smooth([record["loss"] for record in metrics], window), strict=True):
        if loss <= target:
            return record["iteration"], record["seconds"]
    return None


def draw_training(runs: Mapping[str, Sequence[Metrics]], folder: RunFolder, window: int) -> list[Image]:
    """The pictures of one or more training runs.

    Args:
        runs: label -> the metrics of each seed.
        folder: takes the PNGs.
        window: W.
    """
    shortest = min(len(metrics) for seeds in runs.values() for metrics in seeds)
    window = min(window, shortest)
    several = " One line a seed." if any(len(seeds) > 1 for seeds in runs.values()) else ""
    made = [
        (
            plots.plot_loss_against_time(folder.plots / "loss-time.png", runs, window),
            f"Training loss against time.{several}",
        ),
        (
            plots.plot_loss_against_iteration(folder.plots / "loss-iteration.png", runs, window),
            "Training loss and field evaluations of an iteration, means as above.",
        ),
        (plots.plot_accuracy(folder.plots / "accuracy.png", runs), "Test accuracy after each epoch."),
    ]
    if len({record["T"] for seeds in runs.values() for metrics in seeds for record in metrics}) > 1:
        path = plots.plot_horizon(folder.plots / "horizon.png", runs)
        made.append((path, "Integration time T against the iteration."))
    return [Image(f"{path.parent.name}/{path.name}", caption) for path, caption in made]
