"""The one backward pass: a right fold over the stages of a path.

A *stage* is a piece of the path (a control interval, an accepted Runge-Kutta step, a layer), a *value* a local model of
the cost-to-go Q from that place on (its gradient, and for the second-order passes its Hessian). ``step`` carries the
value from the end of a stage to its start and may read something out (gains, gradients, factors). The methods of this
library differ in ``step`` alone:

    Bellman sweep            value (V, V_x, V_xx)                    reads out gains k, K
    discrete adjoint         value (Q_x, Q_p)                        replays one Runge-Kutta step
    continuous adjoint       value (Q_x, Q_p)                        integrates one interval
    second-order adjoint     value (Q_x, Q_p, Q_xx, Q_px, Q_pp)      integrates one interval

What accumulates along the path (Q_p) is part of the value, so nothing of the size of the parameters is stored per
stage.
"""

from collections.abc import Callable, Reversible
from typing import TypeVar

Stage = TypeVar("Stage")
Value = TypeVar("Value")
Readout = TypeVar("Readout")


def sweep(
    step: Callable[[Stage, Value], tuple[Value, Readout]], stages: Reversible[Stage], terminal: Value
) -> tuple[Value, list[Readout]]:
    """Fold ``step`` over ``stages`` from the last to the first.

    Args:
        step: ``step(stage, value at its end) -> (value at its start, readout)``.
        stages: the stages in the order of the path; anything that ``reversed`` accepts.
        terminal: the value at the end of the path.

    Returns:
        The value at the start of the path, and the readouts in the order of the path.

    >>> sweep(lambda cost, value: (cost + value, value), [1, 2, 3], 10)
    (16, [15, 13, 10])
    """
    value = terminal
    readouts: list[Readout] = []
    for stage in reversed(stages):
        value, readout = step(stage, value)
        readouts.append(readout)
    return value, readouts[::-1]
