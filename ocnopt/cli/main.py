"""The command line. Every command checks what it was asked, writes a run folder and prints where it is.

Torch and the solvers are imported inside the commands, so that ``--help`` answers at once.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ocnopt.cli.messages import MISTAKE as MISTAKE
from ocnopt.cli.messages import STOPPED, console, errors, explain_errors, tell
from ocnopt.cli.tables import show, to_json
from ocnopt.errors import OcnoptError, ProblemError

if TYPE_CHECKING:
    from ocnopt.cli.control import Answer
    from ocnopt.runs import RunFolder

app = typer.Typer(
    name="ocnopt",
    help="Optimal control and Neural ODEs: solve problems, compare solvers, train networks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
NOT_CONVERGED = 1
Name = Annotated[
    str | None, typer.Argument(help="Name of a problem, see [bold]ocnopt problems[/bold].", show_default=False)
]
Out = Annotated[Path | None, typer.Option(help="Run folder; a new one in runs/ if not given.", show_default=False)]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Continue the run in this folder, with the options that it began with.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps N; the problem's own if not given.", show_default=False)]
Integrator = Annotated[
    str | None, typer.Option(help="euler, midpoint, rk4, ...; the problem's own if not given.", show_default=False)
]


def _examples(*lines: str) -> str:
    """The end of a help page."""
    return "\n\n".join(("Examples:", *lines))


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"ocnopt {metadata.version('ocnopt')}")
        raise typer.Exit
    return wanted


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Optimal control and Neural ODEs: solve problems, compare solvers, train networks."""


@app.command(epilog=_examples("ocnopt problems", "ocnopt problems --kind control"))
@explain_errors
def problems(
    kind: Annotated[
        str | None, typer.Option(help="Only 'control' or only 'learning' problems.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """List the problems of the library with what is known about them."""
    from ocnopt.cli.listing import problem_records, problem_tables

    if as_json:
        _print_json(problem_records(kind))
        return
    for table in problem_tables(kind):
        show(console, table)


@app.command(
    epilog=_examples(
        "ocnopt solve pendulum_swing_up", "ocnopt solve brachistochrone --solver casadi --steps 200 --out runs/fastest"
    )
)
@explain_errors
def solve(
    name: Name = None,
    solver: Annotated[
        str | None, typer.Option(help="ddp, casadi, indirect or shooting; ddp if not given.", show_default=False)
    ] = None,
    steps: Steps = None,
    integrator: Integrator = None,
    max_iterations: Annotated[int | None, typer.Option(min=1, help="Of the solver.", show_default=False)] = None,
    tolerance: Annotated[float | None, typer.Option(help="Of the solver.", show_default=False)] = None,
    out: Out = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Solve a control problem. Exit code 1: not converged."""
    from ocnopt.cli.control import request, run_solve

    given: dict[str, Any] = {"steps": steps, "integrator": integrator}
    given |= {"max_iterations": max_iterations, "tolerance": tolerance}
    begin = functools.partial(request, solver=solver or "ddp", **given)
    folder = _run("solve", name, out, resume, {"solver": solver, **given}, begin, quiet=as_json)
    _answer(folder, run_solve, as_json=as_json)


@app.command(
    epilog=_examples(
        "ocnopt compare pendulum_swing_up",
        "ocnopt compare cartpole_swing_up_soft --steps 500 --solver ddp --solver casadi",
    )
)
@explain_errors
def compare(
    name: Name = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(help="Repeat for each solver (ddp, casadi, indirect, shooting); ddp and casadi if not given."),
    ] = None,
    steps: Steps = None,
    integrator: Integrator = None,
    out: Out = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Solve a control problem with several solvers from one start. Exit code 1: one did not converge."""
    from ocnopt.cli.control import request, run_compare

    given: dict[str, Any] = {"steps": steps, "integrator": integrator}
    begin = functools.partial(request, solvers=list(solver or ("ddp", "casadi")), **given)
    folder = _run("compare", name, out, resume, {"solvers": solver or None, **given}, begin, quiet=as_json)
    _answer(folder, run_compare, as_json=as_json)


@app.command(
    epilog=_examples(
        "ocnopt train digits",
        "ocnopt train digits --optimizer adam --epochs 20 --seed 1",
        "ocnopt train digits --horizon feedback --out runs/feedback",
        "ocnopt train --resume runs/feedback",
    )
)
@explain_errors
def train(
    name: Name = None,
    optimizer: Annotated[
        str | None,
        typer.Option(help="Its name, see [bold]ocnopt study[/bold]; snopt if not given.", show_default=False),
    ] = None,
    horizon: Annotated[
        str | None,
        typer.Option(
            help="fixed, the default; or move T by its second- or first-order rule: feedback, adjoint.",
            show_default=False,
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate; the problem's tuned one if not given.", show_default=False)
    ] = None,
    horizon_lr: Annotated[float | None, typer.Option(help="Step of the rule for T.", show_default=False)] = None,
    horizon_penalty: Annotated[float | None, typer.Option(help="c of the cost (c/2) T^2.", show_default=False)] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="The problem's own if not given.", show_default=False)
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="Instead of --epochs.", show_default=False)] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="The problem's own if not given.", show_default=False)
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Iterations; 20 if not given.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**31, help="Of weights and order of the samples; 0 if not given.", show_default=False),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Of torch; 1 if not given: more pay on idle machines.", show_default=False),
    ] = None,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Processes, which share every batch; 1 if not given.", show_default=False)
    ] = None,
    out: Out = None,
    resume: Resume = None,
) -> None:
    """Train a network."""
    from ocnopt.cli.learning import run_train, train_request

    given: dict[str, Any] = {"optimizer": optimizer, "horizon": horizon, "lr": lr, "horizon_lr": horizon_lr}
    given |= {"horizon_penalty": horizon_penalty, "epochs": epochs, "iterations": iterations, "seed": seed}
    given |= {"batch_size": batch_size, "checkpoint_every": checkpoint_every}
    begin = functools.partial(train_request, **given, nproc=nproc)
    with _run("train", name, out, resume, {**given, "threads": threads}, begin) as folder:
        run_train(folder, console, nproc)


@app.command(
    epilog=_examples(
        "ocnopt study",
        "ocnopt study digits-feedback --quick",
        "ocnopt study adjoints --seeds 1",
        "ocnopt study tables-feedback --optimizer adam --optimizer snopt --jobs 2 --out runs/tables",
        "ocnopt study --resume runs/tables",
    )
)
@explain_errors
def study(
    name: Annotated[
        str | None, typer.Argument(help="Name of a study; all are listed if not given.", show_default=False)
    ] = None,
    optimizer: Annotated[
        list[str] | None, typer.Option(help="Repeat for each; those of the study if not given.", show_default=False)
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="The study's own if not given.", show_default=False)] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="The problems' own if not given.", show_default=False)
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two seeds, two learning rates, one epoch; a small measurement.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes; each takes a task and a seed at a time.")] = 1,
    out: Out = None,
    resume: Resume = None,
    as_json: Json = False,
) -> None:
    """Compare methods over seeds and learning rates; without a name, list studies and optimisers."""
    from ocnopt.cli.study import run_by_folder, study_request, study_tables

    if name is None and resume is None:
        for table in study_tables():
            show(console, table)
        return
    given: dict[str, Any] = {"optimizers": optimizer or None, "quick": quick or None, "seeds": seeds, "epochs": epochs}
    begin = functools.partial(study_request, **given, jobs=jobs)
    with _run("study", name, out, resume, given, begin, quiet=as_json) as folder:
        record = run_by_folder(folder, Console(stderr=True, quiet=True) if as_json else console, jobs)
    if as_json:
        _print_json(record)


@app.command(epilog=_examples("ocnopt data", "ocnopt data fetch mnist"))
@explain_errors
def data(
    action: Annotated[
        str | None, typer.Argument(metavar="[fetch]", help="fetch, or nothing to list the data sets.")
    ] = None,
    name: Annotated[str | None, typer.Argument(help="Name of a data set.", show_default=False)] = None,
) -> None:
    """List the data sets that are downloaded on request, or fetch one."""
    from ocnopt.cli.data import data_table, run_fetch

    if action is None:
        show(console, data_table())
    else:
        run_fetch(action, name, console)


@app.command(epilog=_examples("ocnopt demo", "ocnopt demo --seeds 1 --out runs/demo"))
@explain_errors
def demo(
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds of each training run; 2 if not given.", show_default=False)
    ] = None,
    out: Out = None,
    resume: Resume = None,
) -> None:
    """Show the main job end to end in a few minutes: control, then training, then a report page."""
    from ocnopt.cli.demo import run_demo

    with _run("demo", "all", out, resume, {"seeds": seeds}, lambda _: {"seeds": seeds or 2}) as folder:
        run_demo(folder, console)


def _answer(
    run: AbstractContextManager["RunFolder"], solve: Callable[["RunFolder"], "Answer"], *, as_json: bool
) -> None:
    """Solve in a run folder and print what came out."""
    with run as folder:
        asked = folder.config
        with errors.status(f"solving {asked['problem']} by {asked.get('solver') or ', '.join(asked['solvers'])}"):
            answer = solve(folder)
        if as_json:
            _print_json(answer.record)
        else:
            show(console, answer.table)
            for line in answer.lines:
                console.print(line, markup=False, highlight=False)
    if not answer.converged:
        raise typer.Exit(NOT_CONVERGED)


@contextmanager
def _run(
    command: str,
    name: str | None,
    out: Path | None,
    resume: Path | None,
    given: Mapping[str, Any],
    begin: Callable[[str], dict[str, Any]],
    *,
    quiet: bool = False,
) -> Iterator["RunFolder"]:
    """The locked folder of a new run, or of the one to continue; says where it is, and what to do after Ctrl-C.

    The number of threads is part of a run, since it decides the last digit. Small matrices are fastest with one.
    """
    import torch

    from ocnopt.runs import RunFolder, default_folder

    if resume is not None:
        folder = RunFolder.open(resume)
        _agree(folder, command, {**given, "out": out, "problem": None if command == "demo" else name})
    elif name is None:
        raise ProblemError(
            f"no problem is named; expected 'ocnopt {command} NAME': list the names with 'ocnopt problems'"
        )
    else:
        torch.set_num_threads(given.get("threads") or 1)
        folder = RunFolder.create(out or default_folder(command, name), {"command": command, **begin(name)})
    torch.set_num_threads(folder.config.get("threads", 1))
    with folder.locked():
        if not quiet:
            console.print(f"run folder: {folder.path}", markup=False, highlight=False, soft_wrap=True)
        try:
            yield folder
        except OcnoptError:
            if resume is None and not folder.holds_results:
                folder.discard()
            raise
        except KeyboardInterrupt as interrupt:
            tell("[bold red]stopped;[/bold red]", f"continue with: ocnopt {command} --resume {folder.path}")
            raise typer.Exit(STOPPED) from interrupt
    if not quiet:
        page = (folder.path / "report.html").resolve()
        console.print(f"report: {page}", markup=False, highlight=False, soft_wrap=True)


def _agree(folder: "RunFolder", command: str, given: Mapping[str, Any]) -> None:
    """Refuse to resume a run of another command, or with an option that the run did not begin with."""
    began = folder.config.get("command")
    if began != command:
        raise ProblemError(
            f"{folder.path} was made by 'ocnopt {began}'; expected a folder of '{command}': use 'ocnopt {began}'"
        )
    stored = {**folder.config.get("train", {}), **folder.config, "out": folder.path}
    spelled = {"problem": "NAME", "solvers": "--solver", "optimizers": "--optimizer"}
    differ = [
        f"{spelled.get(key, '--' + key.replace('_', '-'))} {value} "
        f"(began {'without' if stored.get(key) is None else f'with {stored[key]}'})"
        for key, value in given.items()
        if value is not None and value != stored.get(key)
    ]
    if differ:
        raise ProblemError(
            f"{', '.join(differ)} came with --resume {folder.path}; expected the options that the run began with: "
            "leave them out, or start a new run without --resume"
        )


def _print_json(value: Any) -> None:
    typer.echo(to_json(value))
