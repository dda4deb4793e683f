"""States of SNOpt that are loaded: that of another optimiser or model is refused, and one that is damaged."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ocnopt.checks import check_options, is_number, is_whole, listed
from ocnopt.errors import ProblemError
from ocnopt.optim.checks import FACTORS


def check_state(state: Any, groups: Sequence[Mapping[str, Any]], names: Mapping[Tensor, str]) -> None:
    """Refuse the state of another optimiser than SNOpt, that of another model, and one that is damaged."""
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
        check_options(group)
    _check_course(state)
    _check_finite(state)
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


def _check_course(state: Mapping[str, Any]) -> None:
    """Refuse numbers in a state of SNOpt that none of its runs writes."""
    lists = {
        key: [*one] if isinstance(one := state.get(key, ()), list | tuple) else [one] for key in ("spent", "norms")
    }
    factors = [one["factor"] for one in (state, *state["state"].values()) if "factor" in one]
    for key, values, (least, most), is_right in (
        ("step_count", [state["step_count"]], (0, math.inf), is_whole),
        ("spent", lists["spent"], (0, math.inf), is_whole),
        ("norms", lists["norms"], (0, math.inf), is_number),
        ("factor", factors, FACTORS, is_number),
    ):
        wrong = [value for value in values if not (is_right(value) and least <= value <= most and value < math.inf)]
        if wrong:
            kind = "whole numbers" if is_right is is_whole else "finite numbers"
            bounds = f"from {least:g} on" if most == math.inf else f"from {least:g} to {most:g}"
            raise ProblemError(f"{key} in the state holds {wrong[0]!r}; expected {kind} {bounds}: the state is damaged")


def _check_finite(state: Mapping[str, Any]) -> None:
    """Refuse NaN and infinity in the tensors of a state."""
    for index, entry in state["state"].items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                raise ProblemError(
                    f"{key} of parameter {index} in the state holds NaN or infinity; expected finite numbers: the "
                    "state is damaged"
                )
