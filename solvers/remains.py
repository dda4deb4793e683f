"""What a search that did not converge leaves behind: the gradient and where it is largest, or a derivative that is NaN.

Only asked for when a search has ended without an answer, so it may cost a pass over the problem in torch.
"""

import torch
from torch import Tensor

from ocnopt.linearise import expand_path, expand_terminal, flat
from ocnopt.paths import Path, Widened, rollout
from ocnopt.solvers.endings import sentence
from ocnopt.solvers.search import Outcome
from ocnopt.solvers.solution import Result
from ocnopt.staged import StagedOCP


def explained(problem: StagedOCP, result: Result, outcome: Tensor, kernel: str) -> Result:
    """The result with what is left to say of its failures in the status.

    Args:
        problem: the discrete problem.
        result: where the searches ended.
        outcome: how, each an :class:`Outcome`.
        kernel: its name.
    """
    ends = outcome.reshape(-1).tolist()
    counts, gaps = result.iterations.reshape(-1).tolist(), result.constraint_violation.reshape(-1).tolist()
    notes = _notes(problem, result, ends)
    status = [sentence(kernel, *row[:3], worst=row[3]) for row in zip(ends, counts, gaps, notes, strict=True)]
    return result._replace(status=status if problem.batch_shape else status[0])


def _notes(problem: StagedOCP, result: Result, ends: list[int]) -> list[str]:
    """What is left of each problem, "" where there is nothing to say."""
    notes = [""] * len(ends)
    unsmooth = [row for row, end in enumerate(ends) if end == Outcome.NOT_SMOOTH]
    left = [row for row, end in enumerate(ends) if end in (Outcome.LIMIT, Outcome.STUCK)]
    if unsmooth:
        worst = _unsmooth_steps(problem, result)
        for row in unsmooth:
            notes[row] = _broken(problem, worst[row])
    if left:
        sizes = _projected_gradient(problem, list(result.controls), result.parameters)
        for row in left:
            notes[row] = _largest(problem, [size[row] for size in sizes])
    return notes


def _unsmooth_steps(problem: StagedOCP, result: Result) -> list[int]:
    """For each problem the last step whose derivatives are not finite, N for the end, -1 for none."""
    wide, rows = Widened(problem), result.cost.numel()
    Z, U = wide.join(result.states, result.parameters), wide.join_controls(result.controls)
    steps, end = expand_path(wide, Path(Z, U, result.cost, None, None), exact=False), expand_terminal(wide, Z[-1])
    models = [v.reshape(wide.steps, rows, -1) for v in (steps.F, steps.L)]
    bad = ~torch.isfinite(torch.cat(models, dim=-1)).all(-1)
    bad = torch.cat([bad, ~torch.isfinite(end.reshape(1, rows, -1)).all(-1)])
    number = torch.arange(1, wide.steps + 2, device=bad.device)[:, None]
    last: list[int] = ((bad * number).amax(0) - 1).tolist()
    return last


def _broken(problem: StagedOCP, k: int) -> str:
    if k < 0:
        return ""
    return "it is one of the terminal cost" if k == problem.steps else f"the last such is at step {k}"


def _projected_gradient(problem: StagedOCP, controls: list[Tensor], p: Tensor) -> list[Tensor]:
    """v - clip(v - gradient) of each u_k ``(rows, m)``, then of p: how far the cost still asks each to move."""
    variables = [v.detach().clone().requires_grad_() for v in (*controls, p)]
    with torch.enable_grad():
        cost = rollout(problem, variables[:-1], problem.initial_state, variables[-1]).cost
        gradients = torch.autograd.grad(cost.sum(), variables, allow_unused=True, materialize_grads=True)
    bounds = [*problem.step_bounds, problem.parameter_bounds]
    moves = []
    for v, gradient, pair in zip(variables, gradients, bounds, strict=True):
        aim = v.detach() - gradient
        move = v.detach() - (aim if pair is None else aim.clamp(*pair))
        moves.append(flat(move))
    return moves


def _largest(problem: StagedOCP, moves: list[Tensor]) -> str:
    """The size of the gradient of one problem, and the control that it is largest in."""
    sizes = [float(move.abs().nan_to_num(torch.inf).max()) if move.numel() else 0.0 for move in moves]
    k = max(range(len(sizes)), key=sizes.__getitem__)
    said = f"the gradient is still {sizes[k]:.1e}"
    if k == len(moves) - 1:
        return f"{said}, in the parameters"
    i = int(moves[k].abs().nan_to_num(torch.inf).argmax())
    name = problem.control_names[i] if problem.control_names is not None else f"[{i}]"
    return f"{said}, largest in control {name} at step {k}"
