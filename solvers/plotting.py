"""``Solution.plot``: states, controls, feedback gains and convergence of one problem in one figure."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ocnopt.errors import ProblemError
from ocnopt.solvers.solution import Solution


def plot_solution(solution: Solution, path: str | Path | None = None) -> Figure:
    """Draw four panels and write them to ``path`` if one is given.

    Args:
        solution: of one problem or of a batch, drawn on top of each other; all stages of one size.
        path: a file whose ending names the format.

    Raises:
        ProblemError: sizes vary from stage to stage.
    """
    if not isinstance(solution.states, Tensor) or not isinstance(solution.controls, Tensor):
        raise ProblemError(
            "sizes vary from stage to stage here; expected one state and one control size for a plot over time"
        )
    time = "time" if solution.problem is None or solution.problem.origin is not None else "step"
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    panels = figure.subplots(2, 2)
    _lines(panels[0, 0], solution.times, solution.states, "x", step=False)
    _labels(panels[0, 0], "states", time)
    _lines(panels[0, 1], solution.times[..., :-1], solution.controls, "u", step=True)
    _labels(panels[0, 1], "controls", time)
    _gains(panels[1, 0], solution, time)
    _convergence(panels[1, 1], solution)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _lines(axis: Axes, times: Tensor, values: Tensor, letter: str, *, step: bool) -> None:
    """One colour for each component, one line for each problem of the batch."""
    size = values.shape[-1]
    t, v = times.reshape(-1, times.shape[-1]).cpu().numpy(), values.reshape(-1, *values.shape[-2:]).cpu().numpy()
    for j in range(size):
        for i in range(len(v)):
            style = "steps-post" if step else "default"
            axis.plot(
                t[i],
                v[i, :, j],
                color=f"C{j}",
                label=f"{letter}{j}" if i == 0 else None,
                alpha=1 if len(v) == 1 else 0.4,
                drawstyle=style,
            )
    if size > 1:
        axis.legend(fontsize="small")


def _gains(axis: Axes, solution: Solution, time: str) -> None:
    if solution.gains is None or not isinstance(solution.gains.K, Tensor):
        axis.text(0.5, 0.5, "this solver returns no feedback gains", ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    _lines(axis, solution.times[..., :-1], solution.gains.K.flatten(-2), "K", step=True)
    n = solution.gains.K.shape[-1]
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles, [f"K[{int(name[1:]) // n},{int(name[1:]) % n}]" for name in labels], fontsize="small")
    _labels(axis, "feedback gains", time)


def _convergence(axis: Axes, solution: Solution) -> None:
    if "cost" not in solution.history:
        axis.text(0.5, 0.5, "no history of the cost", ha="center", va="center", transform=axis.transAxes)
        axis.set_axis_off()
        return
    costs = solution.history["cost"].reshape(len(solution.history["cost"]), -1).cpu()
    final = solution.cost.reshape(-1).cpu()
    gap = (costs - final).abs() / (1 + final.abs())
    for column in gap.unbind(-1):
        shown = column[column > 0]
        axis.semilogy(
            (column > 0).nonzero()[:, 0].numpy(),
            shown.numpy(),
            marker="o",
            markersize=3,
            color="C0",
            alpha=1 if gap.shape[-1] == 1 else 0.4,
        )
    _labels(axis, "distance from the final cost, relative", "iteration")


def _labels(axis: Axes, name: str, horizontal: str) -> None:
    axis.set_xlabel(horizontal)
    axis.set_ylabel(name)
    axis.grid(alpha=0.3)
