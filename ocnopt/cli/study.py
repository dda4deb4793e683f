"""Studies on the terminal: bars while they run, then for each task tables, plots and a part of the page."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from math import inf, isfinite
from statistics import mean
from threading import Event, Thread
from typing import Any

from rich.console import Console

from ocnopt.cli.learning import draw_model, draw_training, progress_bar
from ocnopt.cli.measured import alone, measurement_request, run_measured
from ocnopt.cli.report import Image, Section, write_report
from ocnopt.cli.tables import BREAK, Table, show, to_markdown
from ocnopt.errors import DataError
from ocnopt.optim.registry import OPTIMIZERS
from ocnopt.problems import learning_task
from ocnopt.runs import RunFolder, write_atomically
from ocnopt.training import Outcome, Study, curves, open_trainer, run_study
from ocnopt.training.measurement import Measurement
from ocnopt.training.memory import peak_bytes
from ocnopt.training.metrics import metric_scale, metric_title, reaches, tested
from ocnopt.training.studies import MEASUREMENTS, STUDIES, study, with_methods
from ocnopt.training.study import Progress, best, run_folder, spread


def study_request(
    name: str,
    *,
    optimizers: Sequence[str] | None,
    quick: bool | None,
    seeds: int | None,
    epochs: int | None,
    jobs: int = 1,
) -> dict[str, Any]:
    """What ``ocnopt study`` was asked.

    Args:
        name: of a study.
        optimizers: instead of the study's own.
        quick: whether its small size is wanted.
        seeds: instead of its own number.
        epochs: likewise.
        jobs: processes.

    Raises:
        ProblemError: no such study or optimiser, or more processes than it bears.
    """
    given: dict[str, Any] = {"optimizers": optimizers, "quick": quick, "seeds": seeds, "epochs": epochs}
    if name in MEASUREMENTS:
        alone(MEASUREMENTS[name], jobs)
        return measurement_request(MEASUREMENTS[name], **given)
    asked = study(name) if optimizers is None else with_methods(study(name), optimizers)
    asked = asked.quick() if quick else asked
    asked = replace(asked, seeds=seeds or asked.seeds, epochs=epochs or asked.epochs)
    return {"problem": name, **given, "study": asdict(asked), "rates": asked.rates}


def study_tables() -> list[Table]:
    """The studies and the optimisers that there are."""
    studies = [
        (each.name, f"{each.summary}: {', '.join(each.problems)}. {each.left_out}".rstrip(". "))
        for each in STUDIES.values()
    ]
    studies += [(each.name, f"{each.summary}: {each.problem}") for each in MEASUREMENTS.values()]
    optimizers = [(each.name, each.summary) for each in OPTIMIZERS.values()]
    return [
        Table("", ("study", "what"), studies, text=True),
        Table("", ("optimiser", "what"), optimizers, text=True),
    ]


def run_by_folder(folder: RunFolder, console: Console, jobs: int) -> dict[str, Any]:
    """Run what a folder's configuration asks for, as far as it is not done; print tables, write plots and a page.

    Args:
        folder: made with a :func:`study_request`.
        console: shows bars and tables.
        jobs: processes.

    Returns:
        What ``--json`` prints.

    Raises:
        DataError: the folder was made by another version.
    """
    if folder.config.get("problem") in MEASUREMENTS:
        measured = MEASUREMENTS[folder.config["problem"]]
        sections, answer = run_measured(measured, folder, console, jobs)
        _write(folder, measured, sections)
        return answer
    asked = folder.entry("study", Study.read)
    if folder.config.get("rates") != asked.rates:
        raise DataError(
            f"{folder.path} was begun with the learning rates {folder.config.get('rates')}; expected {asked.rates}, "
            "those of this version: start a new study, or continue with the version of ocnopt that began this one"
        )
    sections, found = report(asked, folder, console, jobs)
    _write(folder, asked, sections)
    leaders = [leader for problem in asked.problems for leader in best(found, problem)]
    rates = [{"problem": each.problem, "method": each.method.name, "lr": each.config.lr} for each in leaders]
    runs = [line for outcome in found for line in outcome.lines()]
    return {"study": asked.name, "best": rates, "runs": runs, "folder": str(folder.path)}


def _write(folder: RunFolder, asked: Study | Measurement, sections: Sequence[Section]) -> None:
    """The page, and its tables as text that can be pasted."""
    left_out = asked.left_out if isinstance(asked, Study) else ""
    summary = f"{asked.summary}. {left_out}" if left_out else asked.summary
    write_report(folder.path, f"Study {asked.name}", summary, sections)
    tables = [to_markdown(table) for section in sections for table in section.tables]
    write_atomically(folder.path / "tables.md", "\n".join(tables).encode())


def report(asked: Study, folder: RunFolder, console: Console, jobs: int = 1) -> tuple[list[Section], list[Outcome]]:
    """Run a study, print a table or two for each task, and draw.

    Args:
        asked: the study.
        folder: takes its runs and plots.
        console: shows bars and tables.
        jobs: processes.
    """
    if asked.left_out:
        console.print(asked.left_out, markup=False, highlight=False)
    with _bars(asked, folder, console):
        found = run_study(asked, folder, jobs=jobs)
    sections = []
    for problem in asked.problems:
        mine = [outcome for outcome in found if outcome.problem == problem]
        leaders = best(mine, problem)
        tables = [_reached(asked, leaders), _costs(leaders)]
        if len(asked.factors) > 1:
            tables += [_rates(asked, mine), *_spreads(asked, mine)]
        for table in tables:
            show(console, table)
            console.print()
        record, config = learning_task(problem), leaders[0].config
        what = f"{record.summary[0].upper()}{record.summary[1:]}"
        budget = f"{asked.seeds} seeds, {config.iterations} iterations of batches of {config.batch_size}"
        text = f"{what}. {record.source}; {record.build().split}. {budget}; the methods of a seed are stepped in turn."
        sections.append(Section(problem, text, tables, _images(asked, folder, mine, leaders)))
    return sections, found


@contextmanager
def _bars(asked: Study, folder: RunFolder, console: Console) -> Iterator[None]:
    """A bar for each task and seed, moved by what the runs have written so far."""
    progress, ended = Progress(asked, folder), Event()
    with progress_bar(console) as bar:
        tasks = {
            (problem, seed): bar.add_task(f"{problem} seed {seed}", total=total, text="")
            for (problem, seed), total in progress.totals.items()
        }

        def follow() -> None:
            while not ended.wait(0.5):
                move()

        def move() -> None:
            progress.update()
            for group, task in tasks.items():
                bar.update(task, completed=progress.done[group])

        watcher = Thread(target=follow, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
            move()


def _reached(asked: Study, leaders: Sequence[Outcome]) -> Table:
    """What each method came to with its best learning rate."""
    metrics = tested(max((run for each in leaders for run in each.runs), key=len))
    rows = [
        (
            each.method.label,
            f"{each.config.lr:g}",
            _summary(each.losses),
            *(_summary([metric_scale(key) * value for value in each.ends(key)]) for key in metrics),
        )
        for each in leaders
    ]
    window = leaders[0].window
    note = f"Loss: of training, {f'mean of the last {window} iterations' if window > 1 else 'at the last iteration'}"
    note += "." if asked.iterations or window == 1 else ", one epoch."
    note += f" Mean ± standard deviation over {asked.seeds} seeds." if asked.seeds > 1 else ""
    note += f" lr: the best of {len(asked.factors)}, by the loss." if len(asked.factors) > 1 else ""
    return Table(leaders[0].problem, ("method", "lr", "loss", *map(metric_title, metrics)), rows, note=note)


def _summary(values: Sequence[float]) -> str:
    """Mean and spread, or how many seeds diverged."""
    lost = sum(not isfinite(value) for value in values)
    if lost or not values:
        return f"{lost} of {len(values)} diverged" if values else "-"
    return f"{mean(values):.4g}" + (f" ± {spread(values):.2g}" if len(values) > 1 else "")


def _costs(leaders: Sequence[Outcome]) -> Table:
    """Time and memory of an iteration, and how soon each method met the loss that the first method ended with."""
    first = leaders[0]
    task = learning_task(first.problem).build()
    has_horizon = any(each.ends("T") for each in leaders)
    rows = []
    for each in leaders:
        pairs = zip(each.runs, first.losses, strict=True)
        points = [reaches(run, target, each.window) if isfinite(target) else None for run, target in pairs]
        runs = [run for run in each.runs if run]
        row = [
            each.method.label,
            f"{mean(1000 * run[-1]['seconds'] / len(run) for run in runs):.2f}" if runs else "-",
            f"{peak_bytes(task, each.config) / 1e6:.3g}",
            *(_mean_of([None if point is None else point[i] for point in points]) for i in (0, 1)),
        ]
        if has_horizon:
            evaluations = [mean(r["forward"] + r["backward"] for r in run) for run in runs]
            row += [f"{mean(each.ends('T') or [inf]):.3f}", f"{mean(evaluations or [inf]):.1f}"]
        rows.append(row)
    head = [
        "method",
        "ms",
        "MB",
        f"iterations{BREAK}to goal",
        f"seconds{BREAK}to goal",
        *(["T", "evals"] * has_horizon),
    ]
    note = (
        "ms, MB: time, and the most bytes of tensors alive at once, of an iteration. Goal: the mean loss of an epoch "
        f'meets the final one of "{first.method.label}"; mean over the seeds, in brackets those that do within the '
        "budget."
    )
    note += " evals: field evaluations of an iteration." if has_horizon else ""
    return Table(f"{first.problem}, what it took", head, rows, note=note)


def _mean_of(values: Sequence[int | float | None]) -> str:
    met = [value for value in values if value is not None]
    if not met:
        return "-"
    return f"{mean(met):.3g}" + (f" ({len(met)}/{len(values)})" if len(met) < len(values) else "")


def _rates(asked: Study, found: Sequence[Outcome]) -> Table:
    """The final loss for every learning rate, one line a method."""
    rows: dict[str, list[str]] = {}
    for each in found:
        middle = f"{each.config.lr / asked.factors[0]:.3g}"
        cell = _summary(each.losses).replace(" ±", f"{BREAK}±").replace(" div", f"{BREAK}div")
        rows.setdefault(each.method.label, [middle]).append(cell)
    head = ("method", "lr", *(f"× {factor:g}" for factor in asked.factors))
    cells = [(label, *row) for label, row in rows.items()]
    return Table(f"{found[0].problem}, loss by learning rate", head, cells, note="Each column: that many times lr.")


def _spreads(asked: Study, found: Sequence[Outcome]) -> list[Table]:
    """The first metric of the test part for every learning rate, and how far it spreads; none without such a metric."""
    metrics = tested(max((run for each in found for run in each.runs), key=len))
    if not metrics:
        return []
    key, rows = metrics[0], dict[str, list[float]]()
    for each in found:
        ends = each.ends(key)
        whole = len(ends) == len(each.runs) and all(map(isfinite, ends))
        rows.setdefault(each.method.label, []).append(metric_scale(key) * mean(ends) if whole else inf)
    cells = [
        (label, *(f"{value:.4g}" if isfinite(value) else "diverged" for value in row), _width(row))
        for label, row in rows.items()
    ]
    head = ("method", *(f"× {factor:g}" for factor in asked.factors), "spread")
    note = "Each column: that many times lr, mean over the seeds. Spread: the largest less the smallest."
    return [Table(f"{found[0].problem}, {metric_title(key)} by learning rate", head, cells, note=note)]


def _width(values: Sequence[float]) -> str:
    return f"{max(values) - min(values):.2g}" if all(map(isfinite, values)) else "-"


def _images(asked: Study, folder: RunFolder, found: Sequence[Outcome], leaders: Sequence[Outcome]) -> list[Image]:
    """The curves of the best learning rates, the loss against the learning rate, and the pictures of the task."""
    problem = leaders[0].problem
    prefix = f"{problem}-" if len(asked.problems) > 1 else ""
    moving = [each.method.label for each in leaders if each.config.horizon != "fixed"]
    runs = {each.method.label: each.runs for each in leaders}
    images = draw_training(runs, folder, leaders[0].window, prefix, moving=moving)
    if len(asked.factors) > 1:
        losses: dict[str, dict[float, Sequence[float]]] = {}
        for each in found:
            losses.setdefault(each.method.label, {})[each.config.lr] = each.losses
        caption = "Final loss: mean over the seeds, bars from the least to the greatest; a cross: a seed diverged."
        images.append(Image(folder.draw(f"{prefix}rates", curves.draw_rates(losses)), caption))
    task = learning_task(problem).build()
    for each in leaders if task.pictures else ():
        trainer, _ = open_trainer(run_folder(folder, each.method, each.config), task)
        images += draw_model(trainer, folder, f"{prefix}{each.method.name}-", f"{each.method.label}: ")
    return images
