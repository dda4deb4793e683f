"""Pictures of solutions: states, controls, feedback gains and convergence, of one solver or of several.

Shapes: states ``(..., N + 1, n)``, controls ``(..., N, m)``, gains K ``(..., N, m, n)``; the problems of a batch lie on
top of each other.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ocnopt.solvers.files import write_file

# Okabe and Ito's colours, then three of Tol's, which colour-blind readers can tell apart; line styles differ too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1b1f24", "#882255", "#999933")
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (5, 1.5, 1.2, 1.5)))
_GREY, _MOST_PANELS, _LONGEST_LEGEND = "#6b7480", 6, 8
Item = TypeVar("Item")


def plot_solutions(
    solutions: Mapping[str, Any], *, states: Sequence[str] = (), controls: Sequence[str] = (), time: str = "time"
) -> Figure:
    """Draw solutions of one problem: a panel for each state, each control and its gains, and one for the cost.

    Args:
        solutions: by solver name; each a ``Solution`` whose sizes do not vary from stage to stage.
        states: name and unit of each state; the problem's own if empty, else x0, x1, ...
        controls: name and unit of each control, likewise.
        time: label of the time axis.
    """
    first = next(iter(solutions.values()))
    states = states or _names(first, "state_names", "x", first.states)
    controls = controls or _names(first, "control_names", "u", first.controls)
    feedback = [(name, s) for name, s in solutions.items() if s.gains is not None and len(controls) > 0][:1]
    costs = {name: s for name, s in solutions.items() if "cost" in s.history}
    of_states, of_controls = _parts(len(states)), _parts(len(controls))
    figure, axes = _grid(len(of_states) + (1 + len(feedback)) * len(of_controls) + bool(costs))
    free = iter(axes)
    for part in of_states:
        _draw(next(free), {name: (s.times, s.states) for name, s in solutions.items()}, states, part, time)
    for part in of_controls:
        axis = next(free)
        _draw(axis, {name: (s.times, s.controls) for name, s in solutions.items()}, controls, part, time)
        if first.control_bounds is not None and len(part) == 1:
            for side in first.control_bounds:
                begins = first.times.reshape(-1, first.times.shape[-1])[0, :-1]
                own = side[..., part[0]].expand(*side.shape[:-2], len(begins)).reshape(-1, len(begins))
                if bool(own.isfinite().any()):
                    axis.step(begins.cpu(), own.mT.cpu(), color=_GREY, lw=0.9, ls=":", where="post")
    for name, solution in feedback:
        for part in of_controls:
            _draw_gains(next(free), name if len(solutions) > 1 else "", solution, states, controls, part, time)
    if costs:
        _draw_convergence(next(free), costs)
    if len(solutions) > 1:
        legend(figure, axes[0] if len(of_states[0]) == 1 else axes[-1])
    return figure


def panels(count: int, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure with as many axes, row by row.

    Args:
        count: of axes.
        columns: at most.
    """
    columns = min(count, columns)
    rows = -(-count // columns)
    size = (7.2, max(3.9, 3.0 * rows)) if columns == 1 else (4.6 * columns, 0.6 + 2.8 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for spare in grid[count:]:
        spare.remove()
    return figure, grid[:count]


def saved(figure: Figure, path: str | Path | None) -> Figure:
    """The figure, written to a path if there is one.

    Args:
        figure: drawn already.
        path: whose ending names the format.

    Raises:
        DataError: the picture cannot be written there.
    """
    if path is not None:
        wanted = "a picture whose ending names its format, such as .png"
        write_file(path, wanted, lambda: figure.savefig(path, dpi=150))
    return figure


def finish(axis: Axes, x: str, y: str) -> None:
    """Labels, grid and margins.

    Args:
        axis: drawn already.
        x: label.
        y: label.
    """
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(visible=True, color="#e3e7ec", lw=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.02)


def whole_numbers(axis: Axis) -> None:
    """No ticks between whole numbers, even if only one of those is in view.

    Args:
        axis: the x or the y of a panel.
    """
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def legend(figure: Figure, axis: Axes) -> None:
    """One legend for the figure, of the lines of one axis, where there are several.

    Args:
        figure: with a constrained layout.
        axis: whose lines are named.
    """
    handles, names = axis.get_legend_handles_labels()
    if len(names) > 1:
        columns = max(1, min(len(names), 4, 100 // (max(map(len, names)) + 8)))
        figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False)


def styled(items: Mapping[str, Item]) -> Iterator[tuple[str, Item, dict[str, Any]]]:
    """Each item with a colour and a line style of its own.

    Args:
        items: by name.
    """
    for i, (name, item) in enumerate(items.items()):
        yield name, item, {"color": COLOURS[i % len(COLOURS)], "ls": STYLES[i % len(STYLES)]}


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    return panels(count, columns=2 if count <= 4 else 3)


def _names(source: Any, key: str, letter: str, values: Tensor) -> Sequence[str]:
    """The user's names, else numbered letters."""
    return getattr(source, key, None) or [f"{letter}{j}" for j in range(values.shape[-1])]


def _parts(count: int) -> list[range]:
    """The components of each panel: one each, or all in one where they are many."""
    return [range(j, j + 1) for j in range(count)] if count <= _MOST_PANELS else [range(count)]


def _draw(
    axis: Axes, curves: Mapping[str, tuple[Tensor, Tensor]], labels: Sequence[str], part: range, time: str
) -> None:
    """Colours tell solvers apart, or components where a panel holds several."""
    for name, (times, values), look in styled(curves):
        for j in part:
            if len(part) == 1:
                _lines(axis, times, values[..., j], name, **look)
            else:
                _lines(axis, times, values[..., j], labels[j], color=COLOURS[j % len(COLOURS)], ls=look["ls"])
    finish(axis, time, labels[part[0]] if len(part) == 1 else f"{labels[0]} to {labels[part[-1]]}")


def _draw_gains(
    axis: Axes, name: str, solution: Any, states: Sequence[str], controls: Sequence[str], part: range, time: str
) -> None:
    """K of some controls, one line a state."""
    for i in part:
        for j, state in enumerate(states):
            label = state if i == part[0] else None
            style = {"color": COLOURS[j % len(COLOURS)], "ls": STYLES[j % len(STYLES)]}
            _lines(axis, solution.times, solution.gains.K[..., i, j], label, **style)
    what = controls[part[0]] if len(part) == 1 else "all controls"
    finish(axis, time, f"gains on {what}" + (f", {name}" if name else ""))
    if 1 < len(states) <= _LONGEST_LEGEND:
        axis.legend(fontsize="x-small")


def plot_closed_loop(loop: Any) -> Figure:
    """Draw a closed loop: a panel for each state, each control, and one for the time of each solve.

    Args:
        loop: a ``ClosedLoop``.
    """
    states, controls = _names(loop, "state_names", "x", loop.states), _names(loop, "control_names", "u", loop.controls)
    of_states, of_controls = _parts(len(states)), _parts(len(controls))
    figure, axes = _grid(len(of_states) + len(of_controls) + 1)
    free = iter(axes)
    for part in of_states:
        _draw(next(free), {"": (loop.times, loop.states)}, states, part, "time")
    for part in of_controls:
        _draw(next(free), {"": (loop.times, loop.controls)}, controls, part, "time")
    axis = next(free)
    axis.plot(loop.times[:-1].numpy(), 1e3 * loop.solve_times.numpy(), ".", color=COLOURS[0], ms=4)
    finish(axis, "time", "solve [ms]")
    axis.set_ylim(bottom=0.0)
    return figure


def _draw_convergence(axis: Axes, solutions: Mapping[str, Any]) -> None:
    """Distance of each iteration's cost from the solver's last one."""
    for name, solution, look in styled(solutions):
        gaps = (solution.history["cost"] - solution.cost).abs() / solution.cost.abs().clamp(min=1.0)
        gaps = torch.where(gaps > 0, gaps, torch.nan).movedim(0, -1)
        axis.set_yscale("log")
        axis.set_xlim(-0.3, max(axis.get_xlim()[1], gaps.shape[-1] - 0.7))
        _lines(axis, torch.arange(float(gaps.shape[-1])), gaps, name, **look, marker="o", ms=3)
    whole_numbers(axis.xaxis)
    finish(axis, "iteration", "distance from final cost")


def _lines(axis: Axes, times: Tensor, values: Tensor, label: str | None, **look: Any) -> None:
    """One line for each problem of the batch; a value of a step holds until the step's end."""
    if values.shape[-1] < times.shape[-1]:
        values, look = torch.cat([values, values[..., -1:]], dim=-1), {**look, "drawstyle": "steps-post"}
    rows = values.detach().cpu().reshape(-1, values.shape[-1])
    for t, row in zip(times.detach().cpu().expand(values.shape).reshape(rows.shape), rows, strict=True):
        axis.plot(t.numpy(), row.numpy(), **look, alpha=1.0 if len(rows) == 1 else 0.4, label=label)
        label = None
