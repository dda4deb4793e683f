"""Studies that measure on the terminal: a bar while they run, then tables, figures and a sentence."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from ocnopt.cli.learning import progress_bar
from ocnopt.cli.report import Image, Section
from ocnopt.cli.tables import Table, show
from ocnopt.errors import ProblemError
from ocnopt.problems import learning_task
from ocnopt.runs import RunFolder
from ocnopt.training.measurement import Line, Measurement, run_measurement


def measurement_request(
    asked: Measurement, *, optimizers: Sequence[str] | None, quick: bool | None, seeds: int | None, epochs: int | None
) -> dict[str, Any]:
    """What ``ocnopt study`` was asked.

    Args:
        asked: a study that measures.
        optimizers: for studies that race.
        quick: whether its small size is wanted.
        seeds: instead of its own number.
        epochs: for studies that race.

    Raises:
        ProblemError: an option of studies that race came.
    """
    for option, value in (("--optimizer", optimizers), ("--epochs", epochs)):
        if value is not None:
            raise ProblemError(
                f"{option} came with the study {asked.name}, which measures what it names; expected none of it: "
                f"leave {option} out, or choose a study that races"
            )
    counted = seeds or (1 if quick else asked.seeds)
    given = {"optimizers": None, "quick": quick, "seeds": seeds, "epochs": None}
    return {"problem": asked.name, **given, "measurement": counted}


def alone(asked: Measurement, jobs: int) -> None:
    """Refuse to measure in several processes.

    Args:
        asked: a study that measures.
        jobs: processes.

    Raises:
        ProblemError: more than one.
    """
    if jobs > 1:
        raise ProblemError(
            f"--jobs {jobs} came with the study {asked.name}, whose times would disturb one another; expected one "
            "process: leave --jobs out"
        )


def run_measured(
    asked: Measurement, folder: RunFolder, console: Console, jobs: int
) -> tuple[list[Section], dict[str, Any]]:
    """Measure what a folder's configuration asks for, as far as it is not done; print tables and draw.

    Args:
        asked: the study.
        folder: made with a :func:`measurement_request`.
        console: shows the bar and the tables.
        jobs: processes.

    Returns:
        The parts of the page, and what ``--json`` prints.

    Raises:
        ProblemError: more than one process.
    """
    alone(asked, jobs)
    seeds, quick = folder.entry("measurement", int), bool(folder.config.get("quick"))
    with progress_bar(console) as bar:
        task = bar.add_task(asked.name, total=None, text="")

        def follow(line: Line) -> None:
            words = (f"seed {line['seed']}", *(str(value) for value in line.values() if isinstance(value, str)))
            bar.update(task, advance=1, text=" ".join(words))

        lines = run_measurement(asked, folder, seeds=seeds, quick=quick, on_line=follow)
        bar.update(task, total=len(lines), completed=len(lines), text="")
    tables = [Table(*sheet) for sheet in asked.sheets(lines)]
    for table in tables:
        show(console, table)
        console.print()
    sentence = asked.says(lines)
    console.print(sentence, markup=False, highlight=False)
    images = [Image(folder.draw(each.name, each.figure), each.caption) for each in asked.draw(lines)]
    record = learning_task(asked.problem)
    text = f"{sentence} {seeds} seed{'s' if seeds > 1 else ''}. {record.source}; {record.build().split}."
    answer = {"study": asked.name, "says": sentence, "lines": lines, "folder": str(folder.path)}
    return [Section(asked.problem, text, tables, images)], answer
