"""The main job end to end: control by DDP and CasADi, then a study of Adam, SNOpt and SNOpt with feedback T on digits.

Every run of the study has a folder inside the demo's, so that a killed demo goes on where it was.
"""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ocnopt.cli import boat
from ocnopt.cli.control import comparison_table, draw
from ocnopt.cli.report import Section, write_report
from ocnopt.cli.study import report
from ocnopt.cli.tables import show
from ocnopt.problems import control
from ocnopt.runs import RunFolder
from ocnopt.solvers.compare import compare
from ocnopt.training.studies import study

STUDY = study("neural-ode")


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
    seeds = len(folder.entry("seeds", range))
    console.rule("Control: DDP against CasADi/IPOPT, from the same start")
    sections = [_pendulum(folder, console), _own_problem(folder, console)]
    console.rule("Learning: Adam, SNOpt, SNOpt with feedback T on digit images")
    sections += report(replace(STUDY, seeds=seeds), folder, console)[0]
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
