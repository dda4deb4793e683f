"""The command line. Every command checks what it was asked, writes a run folder and prints where it is.

Torch and the solvers are imported inside the commands, so that ``--help`` answers at once.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console

from ocnopt.errors import OcnoptError, ProblemError

app = typer.Typer(
    name="ocnopt",
    help="Optimal control and Neural ODEs: solve problems, compare solvers, train networks.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
console = Console()
errors = Console(stderr=True)

NOT_CONVERGED, MISTAKE = 1, 2
Arguments = ParamSpec("Arguments")
Name = Annotated[
    str | None, typer.Argument(help="Name of a problem, see [bold]ocnopt problems[/bold].", show_default=False)
]
Out = Annotated[
    Path | None, typer.Option(help="Run folder; runs/<command>-<name>-<time> if not given.", show_default=False)
]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Continue the run in this folder; takes no other option.", show_default=False),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps N; the problem's own if not given.", show_default=False)]
Integrator = Annotated[
    str | None, typer.Option(help="euler, midpoint, rk4, ...; the problem's own if not given.", show_default=False)
]


def _examples(*lines: str) -> str:
    """The end of a help page."""
    return "\n\n".join(("Examples:", *lines))


def explain_errors(command: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Turn the library's errors into one message and an exit code, and Ctrl-C into advice.

    Args:
        command: a command of the app.
    """

    @functools.wraps(command)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except OcnoptError as error:
            errors.print(f"[bold red]error:[/bold red] {type(error).__name__}: ", end="")
            errors.print(str(error), markup=False, highlight=False)
            raise typer.Exit(MISTAKE) from error
        except KeyboardInterrupt as interrupt:
            errors.print("stopped; continue the run with --resume and its folder")
            raise typer.Exit(130) from interrupt

    return wrapped


@app.command(epilog=_examples("ocnopt problems", "ocnopt problems --kind control"))
@explain_errors
def problems(
    kind: Annotated[
        str | None, typer.Option(help="Only 'control' or only 'learning' problems.", show_default=False)
    ] = None,
) -> None:
    """List the problems of the library with what is known about them."""
    from ocnopt.cli.listing import show_problems

    show_problems(console, kind)


@app.command(
    epilog=_examples(
        "ocnopt solve pendulum_swing_up", "ocnopt solve brachistochrone --solver casadi --steps 200 --out runs/fastest"
    )
)
@explain_errors
def solve(
    name: Name = None,
    solver: Annotated[str, typer.Option(help="ddp or casadi.")] = "ddp",
    steps: Steps = None,
    integrator: Integrator = None,
    max_iterations: Annotated[int | None, typer.Option(min=1, help="Of the solver.", show_default=False)] = None,
    tolerance: Annotated[float | None, typer.Option(help="Of the solver.", show_default=False)] = None,
    out: Out = None,
    resume: Resume = None,
) -> None:
    """Solve a control problem. Exit code 1: not converged."""
    from ocnopt.cli.control import run_solve, solution_table, solve_request
    from ocnopt.cli.tables import show
    from ocnopt.problems import control

    folder = _folder(
        "solve",
        name,
        out,
        resume,
        lambda problem: solve_request(problem, solver, steps, integrator, max_iterations, tolerance),
    )
    asked = folder.config
    with console.status(f"solving {asked['problem']} by {asked['solver']}"):
        solution = run_solve(folder)
    show(console, solution_table(control(asked["problem"]), solution, asked["solver"], asked["steps"]))
    _done(folder.path)
    if not bool(solution.converged):
        raise typer.Exit(NOT_CONVERGED)


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
        list[str] | None, typer.Option(help="Repeat for each solver; ddp and casadi if not given.")
    ] = None,
    steps: Steps = None,
    integrator: Integrator = None,
    out: Out = None,
    resume: Resume = None,
) -> None:
    """Solve a control problem with several solvers from one start. Exit code 1: one did not converge."""
    from ocnopt.cli.control import compare_request, comparison_table, known_cost, run_compare
    from ocnopt.cli.tables import show
    from ocnopt.problems import control

    folder = _folder("compare", name, out, resume, lambda problem: compare_request(problem, solver, steps, integrator))
    asked = folder.config
    with console.status(f"solving {asked['problem']} by {', '.join(asked['solvers'])}"):
        comparison = run_compare(folder)
    show(console, comparison_table(asked["problem"], comparison, known_cost(control(asked["problem"]), asked["steps"])))
    for row in comparison.rows:
        console.print(f"{row.solver}: {row.status}", markup=False, highlight=False)
    _done(folder.path)
    if not all(row.converged for row in comparison.rows):
        raise typer.Exit(NOT_CONVERGED)


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
    optimizer: Annotated[str, typer.Option(help="adam, sgd or snopt.")] = "snopt",
    horizon: Annotated[
        str, typer.Option(help="fixed; or move T by its second- or first-order rule: feedback, adjoint.")
    ] = "fixed",
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
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Iterations.")] = 20,
    seed: Annotated[int, typer.Option(help="Of weights and order of the samples.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Torch's own number if not given.", show_default=False)
    ] = None,
    out: Out = None,
    resume: Resume = None,
) -> None:
    """Train a network around a Neural ODE."""
    from ocnopt.cli.learning import run_train, train_request

    folder = _folder(
        "train",
        name,
        out,
        resume,
        lambda problem: train_request(
            problem,
            optimizer=optimizer,
            horizon=horizon,
            lr=lr,
            horizon_lr=horizon_lr,
            horizon_penalty=horizon_penalty,
            epochs=epochs,
            iterations=iterations,
            batch_size=batch_size,
            checkpoint_every=checkpoint_every,
            seed=seed,
        ),
        threads,
    )
    run_train(folder, console)
    _done(folder.path)


@app.command(epilog=_examples("ocnopt demo", "ocnopt demo --seeds 1 --out runs/demo"))
@explain_errors
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each training run.")] = 2,
    out: Out = None,
    resume: Resume = None,
) -> None:
    """Show the main job end to end in a few minutes: control, then training, then a report page."""
    from ocnopt.cli.demo import demo_request, run_demo

    folder = _folder("demo", "all", out, resume, lambda _: demo_request(seeds))
    run_demo(folder, console)
    _done(folder.path)


def _folder(
    command: str,
    name: str | None,
    out: Path | None,
    resume: Path | None,
    request: Callable[[str], dict[str, Any]],
    threads: int | None = 1,
) -> Any:
    """The folder of a new run, or of the one to continue.

    The number of threads is part of a run, since it decides the last digit. Small matrices are fastest with one.
    """
    import torch

    from ocnopt.cli.runs import RunFolder, default_folder

    if resume is not None:
        folder = RunFolder.open(resume)
        if folder.config.get("command") != command:
            began = folder.config.get("command")
            raise ProblemError(
                f"{resume} was made by 'ocnopt {began}'; expected a folder of '{command}': use 'ocnopt {began}'"
            )
        torch.set_num_threads(folder.config.get("threads", torch.get_num_threads()))
        return folder
    if name is None:
        raise ProblemError(
            f"no problem is named; expected 'ocnopt {command} NAME': list the names with 'ocnopt problems'"
        )
    torch.set_num_threads(threads or torch.get_num_threads())
    folder = RunFolder.create(out or default_folder(command, name), request(name))
    console.print(f"run folder: {folder.path}", markup=False, highlight=False, soft_wrap=True)
    return folder


def _done(folder: Path) -> None:
    """Say where the page is."""
    console.print(f"report: {(folder / 'report.html').resolve()}", markup=False, highlight=False, soft_wrap=True)
