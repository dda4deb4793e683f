"""Solving and comparing control problems by name, with a run folder for what came out."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from torch import Tensor

from ocnopt.cli.report import Image, Section, write_report
from ocnopt.cli.tables import BREAK, Table, as_options
from ocnopt.integrate.tableaus import get_tableau
from ocnopt.ocp import OCP
from ocnopt.problems import ControlRecord, control
from ocnopt.problems.drawing import animation, picture
from ocnopt.runs import CHECKPOINT, PLOTS, RunFolder, replace_file, write_atomically
from ocnopt.solvers.compare import HEAD, Comparison, compare
from ocnopt.solvers.plotting import plot_solutions
from ocnopt.solvers.solution import Solution, load_solution
from ocnopt.solvers.solve import make_solver, solve


def request(name: str, *, steps: int | None, integrator: str | None, **others: Any) -> dict[str, Any]:
    """What ``ocnopt solve`` or ``ocnopt compare`` was asked, with the problem's recommendations filled in.

    Args:
        name: of a control problem.
        steps: N; the recommended one if None.
        integrator: the recommended one if None.
        others: kept as they are.

    Raises:
        ProblemError: no such control problem, integrator, solver or option.
    """
    record = control(name)
    options = {key: others[key] for key in ("max_iterations", "tolerance") if others.get(key) is not None}
    for solver in others.get("solvers") or [others["solver"]]:
        make_solver(solver, options)
    integrator = integrator or record.integrator
    get_tableau(integrator)
    return {"problem": name, "steps": steps or record.steps, "integrator": integrator, **others}


class Answer(NamedTuple):
    """What came out of a run: the table and lines to print, the record for ``--json``, whether all converged."""

    table: Table
    lines: list[str]
    record: dict[str, Any]
    converged: bool


def run_solve(folder: RunFolder) -> Answer:
    """Solve what a folder's configuration asks for, unless its solution is there already; write plots and a page.

    Args:
        folder: made with a :func:`request`.
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
    table = solution_table(asked, solution)
    title = f"{record.name} by {asked['solver']}"
    _write_page(folder, record, title, table, {asked["solver"]: solution}, draw_system(folder, record, solution))
    return Answer(table, [], solve_result(folder, solution), bool(solution.converged))


def run_compare(folder: RunFolder) -> Answer:
    """Solve with every solver of a folder's configuration from one start; write plots and a page.

    Args:
        folder: made with a :func:`request`.
    """
    asked = folder.config
    record = control(asked["problem"])
    problem = _build(record, asked["steps"])
    folder.keep_metrics(-1)
    comparison = compare(problem, asked["solvers"], steps=asked["steps"], integrator=asked["integrator"])
    for name, solution in comparison.solutions.items():
        _keep(folder, f"{name}.pt", solution, name)
    title = f"{record.name}: {' against '.join(comparison.solutions)}"
    table = comparison_table(record.name, comparison, known_cost(asked))
    _write_page(folder, record, title, table, comparison.solutions)
    lines = [as_options(f"{row.solver}: {row.status}") for row in comparison.rows if row.solver in comparison.solutions]
    converged = all(row.converged for row in comparison.rows)
    return Answer(table, lines, compare_result(folder, comparison), converged)


def known_cost(asked: Mapping[str, Any]) -> float | None:
    """The best known cost of the discrete problem that is solved, where the library has it.

    Args:
        asked: a :func:`request`.
    """
    record = control(asked["problem"])
    is_another = asked["integrator"] != record.integrator or asked.get("solver") == "indirect"  # of the continuous one
    return None if is_another else record.discrete_values.get(asked["steps"])


def draw(
    folder: RunFolder,
    solutions: Mapping[str, Solution],
    states: Sequence[str],
    controls: Sequence[str],
    time: str,
    name: str = "solution",
) -> Image:
    """The picture of one problem, solved by one or more solvers.

    Args:
        folder: takes the PNG.
        solutions: by solver name.
        states: labels.
        controls: labels.
        time: label of the time axis.
        name: of the file.
    """
    path = folder.draw(name, plot_solutions(solutions, states=states, controls=controls, time=time))
    caption = (
        "States; controls, constant on each step, dotted lines are bounds; feedback gains K, what a control does about "
        "a deviation of each state; distance of each iteration's cost from the final one, divided by it if above 1."
    )
    return Image(path, caption)


def draw_system(folder: RunFolder, record: ControlRecord, solution: Solution) -> list[Image]:
    """A picture and an animation of the system itself, where the library knows how it looks and its path is finite.

    Args:
        folder: takes the PNG and the GIF.
        record: of the problem.
        solution: of one problem, no batch.
    """
    states = solution.states
    if record.drawing is None or not isinstance(states, Tensor) or not bool(states.isfinite().all()):
        return []
    film = folder.plots / "system.gif"
    write_atomically(film, animation(record.drawing, solution))
    still = folder.draw("system", picture(record.drawing, solution))
    return [Image(f"{PLOTS}/{film.name}", "The system from start to end."), Image(still, "The same at a few instants.")]


def solution_table(asked: Mapping[str, Any], solution: Solution) -> Table:
    """What came out, one line a quantity.

    Args:
        asked: a :func:`request`.
        solution: of one problem, no batch.
    """
    record, steps, known = control(asked["problem"]), asked["steps"], known_cost(asked)
    cost = float(solution.cost)
    rows = [("solver", f"{asked['solver']}, {steps} steps"), ("cost", f"{cost:.10g}")]
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
        ("status", as_options(str(solution.status))),
    ]
    return Table(record.name, ("", ""), rows, text=True)


def comparison_table(name: str, comparison: Comparison, known: float | None = None) -> Table:
    """One line a solver, and what the comparison notes about it.

    Args:
        name: of the problem.
        comparison: of its solvers.
        known: best known cost of the discrete problem.
    """
    note = "max |dx|: largest difference of a state to the first solver's path."
    if known is not None:
        note += f" Best known cost of this discrete problem: {known:.10g}."
    notes = BREAK.join([note, *map(as_options, comparison.notes)])
    return Table(name, HEAD, [row.cells() for row in comparison.rows], note=notes)


def solve_result(folder: RunFolder, solution: Solution) -> dict[str, Any]:
    """What ``ocnopt solve --json`` prints.

    Args:
        folder: of the run.
        solution: of one problem, no batch.
    """
    asked, record = folder.config, control(folder.config["problem"])
    numbers = ("cost", "horizon", "constraint_violation", "iterations", "converged")
    return {
        **{key: asked[key] for key in ("problem", "solver", "steps", "integrator")},
        **{key: getattr(solution, key).item() for key in numbers},
        "status": as_options(str(solution.status)),
        "wall_time": solution.wall_time,
        "build_time": solution.build_time,
        "best_known_cost": known_cost(asked),
        "best_known_cost_exact": record.optimal_cost,
        "folder": str(folder.path),
    }


def compare_result(folder: RunFolder, comparison: Comparison) -> dict[str, Any]:
    """What ``ocnopt compare --json`` prints.

    Args:
        folder: of the run.
        comparison: of its solvers.
    """
    asked = folder.config
    return {
        **{key: asked[key] for key in ("problem", "steps", "integrator")},
        "rows": [
            {**asdict(row), "status": as_options(row.status), "note": as_options(row.note)} for row in comparison.rows
        ],
        "best_known_cost": known_cost(asked),
        "folder": str(folder.path),
    }


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


def _write_page(
    folder: RunFolder,
    record: ControlRecord,
    title: str,
    table: Table,
    solutions: Mapping[str, Solution],
    system: Sequence[Image] = (),
) -> None:
    time = "time (s)" if isinstance(record.build(), OCP) else "step"
    image = draw(folder, solutions, record.state_labels, record.control_labels, time)
    about = Section("The problem", f"{record.summary}. Start: {record.start}. Best known cost: {record.source}.")
    seen = [Section("The system", images=system)] if system else []
    sections = [Section("Result", tables=[table], images=[image]), *seen, about]
    write_report(folder.path, title, record.summary, sections)
