"""Solving and comparing control problems by name, with a run folder for what came out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ocnopt.cli import plots
from ocnopt.cli.report import Image, Section, write_report
from ocnopt.cli.runs import CHECKPOINT, RunFolder, replace_file
from ocnopt.cli.tables import Table
from ocnopt.ocp import OCP
from ocnopt.problems import ControlRecord, control
from ocnopt.solvers.compare import Comparison, compare
from ocnopt.solvers.solution import Solution, load_solution
from ocnopt.solvers.solve import solve


def solve_request(
    name: str,
    solver: str = "ddp",
    steps: int | None = None,
    integrator: str | None = None,
    max_iterations: int | None = None,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """What ``ocnopt solve`` was asked, with the problem's recommendations filled in.

    Args:
        name: of a control problem.
        solver: name of a solver.
        steps: N; the recommended one if None.
        integrator: the recommended one if None.
        max_iterations: the solver's own if None.
        tolerance: the solver's own if None.

    Raises:
        ProblemError: no such control problem.
    """
    record = control(name)
    return {
        "command": "solve",
        "problem": name,
        "solver": solver,
        "steps": steps or record.steps,
        "integrator": integrator or record.integrator,
        "max_iterations": max_iterations,
        "tolerance": tolerance,
    }


def compare_request(
    name: str, solvers: Sequence[str] | None = None, steps: int | None = None, integrator: str | None = None
) -> dict[str, Any]:
    """What ``ocnopt compare`` was asked, with the problem's recommendations filled in.

    Args:
        name: of a control problem.
        solvers: names of solvers; DDP and CasADi if None or empty.
        steps: N; the recommended one if None.
        integrator: the recommended one if None.

    Raises:
        ProblemError: no such control problem.
    """
    record = control(name)
    return {
        "command": "compare",
        "problem": name,
        "solvers": list(solvers or ("ddp", "casadi")),
        "steps": steps or record.steps,
        "integrator": integrator or record.integrator,
    }


def run_solve(folder: RunFolder) -> Solution:
    """Solve what a folder's configuration asks for, unless its solution is there already; write plots and a page.

    Args:
        folder: made with a :func:`solve_request`.
    """
    asked = folder.config
    record = control(asked["problem"])
    saved = folder.path / CHECKPOINT
    if saved.exists():
        solution = load_solution(saved)
    else:
        folder.keep_metrics(-1)
        solution = solve(
            _build(record, asked["steps"]),
            asked["solver"],
            steps=asked["steps"],
            integrator=asked["integrator"],
            max_iterations=asked["max_iterations"],
            tolerance=asked["tolerance"],
        )
        _keep(folder, CHECKPOINT, solution, asked["solver"])
    tables = [solution_table(record, solution, asked["solver"], asked["steps"])]
    images = draw(folder.plots, {asked["solver"]: solution}, record.state_labels, record.control_labels, _time(record))
    _write_page(folder, record, f"{record.name} by {asked['solver']}", tables, images)
    return solution


def run_compare(folder: RunFolder) -> Comparison:
    """Solve with every solver of a folder's configuration from one start; write plots and a page.

    Args:
        folder: its configuration names problem, solvers, steps and integrator.
    """
    asked = folder.config
    record = control(asked["problem"])
    problem = _build(record, asked["steps"])
    folder.keep_metrics(-1)
    comparison = compare(problem, asked["solvers"], steps=asked["steps"], integrator=asked["integrator"])
    for name, solution in comparison.solutions.items():
        _keep(folder, f"{name}.pt", solution, name)
    title = f"{record.name}: {' against '.join(comparison.solutions)}"
    images = draw(folder.plots, comparison.solutions, record.state_labels, record.control_labels, _time(record))
    _write_page(
        folder, record, title, [comparison_table(record.name, comparison, known_cost(record, asked["steps"]))], images
    )
    return comparison


def known_cost(record: ControlRecord, steps: int) -> float | None:
    """The best known cost of the problem on N steps, where the library has it.

    Args:
        record: of the problem.
        steps: N.
    """
    return record.discrete_values.get(steps)


def draw(
    folder: Path,
    solutions: Mapping[str, Solution],
    states: Sequence[str],
    controls: Sequence[str],
    time: str,
    prefix: str = "",
) -> list[Image]:
    """The pictures of one problem, solved by one or more solvers.

    Args:
        folder: of the PNGs.
        solutions: by solver name.
        states: labels.
        controls: labels.
        time: label of the time axis.
        prefix: of the file names.
    """
    images = [
        (plots.plot_states(folder / f"{prefix}states.png", solutions, states, time), "States."),
        (
            plots.plot_controls(folder / f"{prefix}controls.png", solutions, controls, time),
            "Controls, constant on each step; dotted lines are bounds.",
        ),
    ]
    for name, solution in solutions.items():
        if solution.gains is not None:
            path = folder / f"{prefix}gains.png"
            plots.plot_gains(path, solution, states, controls, time)
            images.append((path, f"Feedback gains K of {name}: what the control does about a deviation of each state."))
            break
    path = plots.plot_convergence(folder / f"{prefix}convergence.png", solutions)
    images.append(
        (path, "Convergence: distance of each iteration's cost from the solver's final one, divided by it if above 1.")
    )
    return [Image(f"{path.parent.name}/{path.name}", caption) for path, caption in images]


def solution_table(record: ControlRecord, solution: Solution, solver: str, steps: int) -> Table:
    """What came out, one line a quantity.

    Args:
        record: of the problem.
        solution: of one problem, no batch.
        solver: its name.
        steps: N.
    """
    known = known_cost(record, steps)
    cost = float(solution.cost)
    rows = [("solver", f"{solver}, {steps} steps"), ("cost", f"{cost:.10g}")]
    if known is not None:
        rows.append((f"best known, {steps} steps", f"{known:.10g}  (difference {cost - known:+.1e})"))
    rows.append(("best known, exact", f"{record.optimal_cost:.10g}"))
    if record.T_star is not None:
        rows.append(("end time T", f"{float(solution.horizon):.8g}  (best known {record.T_star:.8g})"))
    rows += [
        ("iterations", str(int(solution.iterations))),
        ("time", f"{solution.wall_time:.2f} s, and {solution.build_time:.2f} s to build"),
        ("largest violation", f"{float(solution.constraint_violation):.1e}"),
        ("converged", "yes" if bool(solution.converged) else "no"),
        ("status", solution.status if isinstance(solution.status, str) else "; ".join(solution.status)),
    ]
    return Table(record.name, ("", ""), rows, text=True)


def comparison_table(name: str, comparison: Comparison, known: float | None = None) -> Table:
    """One line a solver.

    Args:
        name: of the problem.
        comparison: of its solvers.
        known: best known cost of the discrete problem.
    """
    first = next(iter(comparison.solutions))
    head = ("solver", "cost", "T", "iterations", "time s", "build s", "max |dx|", "converged")
    rows = [
        (
            row.solver,
            f"{row.cost:.10g}",
            f"{row.horizon:.6g}",
            str(row.iterations),
            f"{row.wall_time:.3f}",
            f"{row.build_time:.3f}",
            "" if row.solver == first else f"{row.state_difference:.1e}",
            "yes" if row.converged else "no",
        )
        for row in comparison.rows
    ]
    note = f"max |dx|: largest difference of a state to {first}'s path."
    if known is not None:
        note += f" Best known cost of this discrete problem: {known:.10g}."
    return Table(name, head, rows, note=note)


def _build(record: ControlRecord, steps: int) -> Any:
    """The problem; one that is discrete from the start takes N where it is made."""
    problem = record.build()
    return problem if isinstance(problem, OCP) else record.build(steps=steps)


def _keep(folder: RunFolder, file: str, solution: Solution, solver: str) -> None:
    """The solution's history as metrics, then the solution as a file."""
    history = {key: values.reshape(len(values), -1)[:, 0].tolist() for key, values in solution.history.items()}
    for i in range(max((len(values) for values in history.values()), default=0)):
        line = {key: values[i] for key, values in history.items() if i < len(values)}
        folder.log({"solver": solver, "iteration": i, **line})
    replace_file(folder.path / file, solution.save)


def _write_page(folder: RunFolder, record: ControlRecord, title: str, tables: list[Table], images: list[Image]) -> None:
    about = Section("The problem", f"{record.summary}. Start: {record.start}. Best known cost: {record.source}.")
    write_report(folder.path, title, record.summary, [Section("Result", tables=tables, images=images), about])


def _time(record: ControlRecord) -> str:
    return "time (s)" if isinstance(record.build(), OCP) else "step"
