"""States of SNOpt that are loaded: that of another optimiser or model is refused, and one that is damaged."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ocnopt.checks import is_number, is_whole, listed
from ocnopt.errors import ProblemError
from ocnopt.optim.blocks import Block
from ocnopt.optim.group_checks import check_written
from ocnopt.optim.lengths import BOUNDS
from ocnopt.optim.states import BASIS, COUNTS, FACTORS, NUMBERS

_TOGETHER = (BASIS, ("squares", "squares_step"), ("momentum", "step"))  # of each the last alone does no harm
_SQUARES = ("moments", "squares", "input_values", "output_values")


def check_state(
    state: Any, groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str], blocks: Iterable[Block]
) -> None:
    """Refuse the state of another optimiser than SNOpt, that of another model, and one that is damaged.

    Args:
        state: to be loaded.
        groups: of the optimiser.
        names: of the model's parameters.
        blocks: its matrices at present.
    """
    if not isinstance(state, Mapping) or not {"state", "param_groups", "step_count"} <= state.keys():
        came = f"holds {sorted(map(str, state))}" if isinstance(state, Mapping) else f"is {type(state).__name__}"
        raise ProblemError(
            f"the state {came}; expected the state of an SNOpt, with its 'step_count': "
            "load the state of another optimiser into that one"
        )
    entries = state["state"].values() if isinstance(state["state"], Mapping) else [None]
    is_grouped = isinstance(state["param_groups"], list) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in state["param_groups"]
    )
    if not is_grouped or not all(isinstance(entry, Mapping) for entry in entries):
        raise ProblemError(
            "the state holds no dictionary for each parameter, or no groups with lists of 'params'; expected what "
            "state_dict() returned: the state is damaged"
        )
    for group in state["param_groups"]:
        check_written(group)
    _check_course(state)
    _check_tensors(state)
    cure = "load it into an optimiser of the model, and with the groups, that it was saved of"
    saved, own = ([len(group["params"]) for group in each] for each in (state["param_groups"], groups))
    if saved != own:
        raise ProblemError(
            f"the state holds groups of {saved} parameters; expected {own} as here, {listed([*names.values()])}: {cure}"
        )
    indices, parameters = ([p for group in each for p in group["params"]] for each in (state["param_groups"], groups))
    momenta = [state["state"].get(index, {}).get("momentum") for index in indices]
    differ = [
        f"{names.get(p)} {tuple(momentum.shape)} instead of {tuple(p.shape)}"
        for momentum, p in zip(momenta, parameters, strict=True)
        if momentum is not None and momentum.shape != p.shape
    ]
    if differ:
        raise ProblemError(
            f"the state is of another model: {', '.join(differ[:8])}; expected the shapes of this one: {cure}"
        )
    live = state.get("live", [True] * len(indices))
    if not (isinstance(live, list) and len(live) == len(indices) and all(isinstance(one, bool) for one in live)):
        raise ProblemError(
            f"live in the state is {live!r}; expected a list that says of each parameter whether it was trained, "
            f"{len(indices)} times True or False: the state is damaged"
        )
    columns = {block.weight: block.shape[-1] for block in blocks}
    for index, parameter in zip(indices, parameters, strict=True):
        entry, name = state["state"].get(index, {}), names.get(parameter, "no longer in the model")
        _check_together(name, entry)
        _check_shapes(name, entry, _shapes(entry, parameter.shape, columns.get(parameter)))
        _check_signs(name, entry)


def _check_course(state: Mapping[str, Any]) -> None:
    """Refuse numbers in a state of SNOpt that none of its runs writes."""
    turns = state.get("turns", {})
    if not isinstance(turns, Mapping) or not all(isinstance(turn, Mapping) for turn in turns.values()):
        raise ProblemError(
            f"turns in the state is {turns!r}; expected a dictionary of dictionaries: the state is damaged"
        )
    lists: dict[str, list[Any]] = {"spent": [], "norms": []}
    for key, one in ((key, each.get(key, ())) for each in (state, *turns.values()) for key in lists):
        if not isinstance(one, list | tuple):
            raise ProblemError(f"{key} in the state is {one!r}; expected a list of numbers: the state is damaged")
        lists[key] += one
    factors = [one["factor"] for one in (state, *state["state"].values()) if "factor" in one]
    steps = [one["changed_at"] for one in state["state"].values() if "changed_at" in one]
    last = state["step_count"] - 1 if is_whole(state["step_count"]) else math.inf
    for key, values, (least, most), is_right in (
        ("step_count", [state["step_count"]], (0, math.inf), is_whole),
        ("spent", lists["spent"], (0, math.inf), is_whole),
        ("norms", lists["norms"], (0, math.inf), is_number),
        ("largest", [each.get("largest", 0.0) for each in (state, *turns.values())], (0, math.inf), is_number),
        ("factor", factors, BOUNDS, is_number),
        ("changed_at", steps, (0, last), is_whole),
    ):
        wrong = [value for value in values if not (is_right(value) and least <= value <= most and value < math.inf)]
        if wrong:
            kind = "whole numbers" if is_right is is_whole else "finite numbers"
            bounds = f"from {least:g} on" if most == math.inf else f"from {least:g} to {most:g}"
            raise ProblemError(f"{key} in the state holds {wrong[0]!r}; expected {kind} {bounds}: the state is damaged")


def _check_tensors(state: Mapping[str, Any]) -> None:
    """Refuse what is no tensor of finite real numbers where the state of each parameter should hold one."""
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if key in NUMBERS:
                continue
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                came = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise ProblemError(
                    f"{key} of parameter {index} in the state is {came}; expected a tensor of real numbers: the state "
                    "is damaged"
                )
            if not bool(value.isfinite().all()):
                raise ProblemError(
                    f"{key} of parameter {index} in the state holds NaN or infinity; expected finite numbers: the "
                    "state is damaged"
                )


def _check_together(name: str, entry: Mapping[str, Any]) -> None:
    """Refuse a parameter's state that holds a part of what is made together."""
    for keys in _TOGETHER:
        present = [key for key in keys if key in entry]
        if {*present} - {keys[-1]} and len(present) < len(keys):
            raise ProblemError(
                f"the state of {name!r} holds {listed(present)} alone; expected all of {listed(keys)}: the state is "
                "damaged"
            )


def _check_shapes(name: str, entry: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a parameter's state whose tensors do not belong to it, or not to one another.

    That a basis belongs to the matrix as it is now is not asked: a bias may have joined or left it since.
    """
    for key, expected in shapes.items():
        if key in entry and entry[key].shape != expected:
            raise ProblemError(
                f"{key} of {name!r} in the state has shape {tuple(entry[key].shape)}; expected {tuple(expected)}, as "
                "fits the parameter and the rest of its state: the state is damaged"
            )


def _check_signs(name: str, entry: Mapping[str, Tensor]) -> None:
    """Refuse counts, means of squares and eigenvalues below zero, in a state whose shapes are right."""
    for key in (*COUNTS, *_SQUARES, *FACTORS):
        if key in entry:
            values = entry[key].diagonal(dim1=-2, dim2=-1) if key in FACTORS else entry[key]
            if bool((values < 0.0).any()):
                came = f"{float(values.amin()):g}{' on a diagonal' if key in FACTORS else ''}"
                raise ProblemError(
                    f"{key} of {name!r} in the state holds {came}; expected no number below zero: the state is damaged"
                )


def _shapes(entry: Mapping[str, Tensor], of: torch.Size, present: int | None) -> dict[str, tuple[int, ...]]:
    """The shapes of what the state of a parameter ``of`` a shape may hold, read from what most of it says.

    In the letters of :mod:`ocnopt.optim.bases`. Whether a bias is one of the a columns it tells itself; where it does
    not, they are those at present.
    """
    rows = of[0] if of else 1
    columns = of.numel() // max(1, rows)

    def size(key: str, axis: int) -> int:
        return entry[key].shape[axis] if key in entry and axis < entry[key].ndim else 0

    found = Counter(size(key, 0) for key in (*BASIS, *FACTORS))
    groups = next((count for count, _ in found.most_common() if count and rows % count == 0), 1)
    widths = [size(key, 1) for key in ("input_factor", "input_vectors", "input_values")]
    own, *others = [width if width in (columns, columns + 1) else 0 for width in widths]
    a, b = next(filter(None, (*others, own)), present or columns), rows // groups
    r = _kept(a, size("input_values", 1), size("input_vectors", 2), size("moments", 2))
    q = _kept(b, size("output_values", 1), size("output_vectors", 2), size("moments", 1))
    return {
        **dict.fromkeys(("momentum", "squares", "change"), of),
        **dict.fromkeys(COUNTS, ()),
        "input_vectors": (groups, a, r),
        "input_values": (groups, r),
        "output_vectors": (groups, b, q),
        "output_values": (groups, q),
        "moments": (groups, q + (q < b), r + (r < a)),
        "momentum_left": (groups, q, a),
        "momentum_core": (groups, q, r),
        "momentum_right": (groups, b, r),
        "input_factor": (groups, own or a, own or a),  # of single samples beside it, it may be of other columns
        "output_factor": (groups, b, b),
    }


def _kept(width: int, values: int, vectors: int, moments: int) -> int:
    """How many eigenvectors a side has, by two that agree of those who tell; second moments have one for the rest."""
    possible = [count for count in (values, vectors) if 0 < count <= width]
    agreeing = [count for count in possible if count + (count < width) == moments]
    return max(agreeing or possible[:1] or [width])
