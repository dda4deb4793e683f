"""What SNOpt keeps of each parameter from one iteration to the next, and the step of those that are in no matrix.

In the state of a parameter: step, the number of its gradients, and momentum; change, the last one, and changed_at, the
number of the optimiser's step that made it; factor, of lr; of a weight that is a matrix input_factor and output_factor,
where they are of gradients; of one with an eigenbasis its vectors, values, second moments, since which step there is
one, the turned parts of the momentum, and of a wide one how often it was renewed; of a parameter without, squares as
Adam has them, and their number.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ocnopt.differential.kronecker import working_dtype
from ocnopt.optim.bases import Basis, Eigen, is_wide
from ocnopt.optim.blocks import Block, is_live
from ocnopt.optim.checks import check_same_shape

FIRST = (0, 1, 3, 5)  # refreshes at the start, where the curvature changes fastest
DECAY = 0.95  # beta, of second moments and of factors made of gradients
EPSILON = 1e-8  # keeps the first-order update of a parameter without gradients at zero

BASIS = ("input_vectors", "input_values", "output_vectors", "output_values", "moments")
FACTORS = ("input_factor", "output_factor")
TURNED = ("momentum_left", "momentum_core", "momentum_right")  # U_B^T M, U_B^T M U_A and M U_A of the momentum M
COUNTS = ("step", "squares_step", "basis_step", "basis_since")
NUMBERS = ("factor", "changed_at")  # of a state, what is no tensor
_OF_NO_DTYPE = (*COUNTS, *NUMBERS)  # what stays as it is when its parameter goes elsewhere

State = MutableMapping[str, Any]


def newest(count: Any, decay: float) -> float:
    """The weight of the newest of ``count`` values in a running mean that weighs all of them alike at first.

    >>> [round(newest(count, decay=0.9), 3) for count in (1, 2, 1000)]
    [1.0, 0.526, 0.1]
    """
    return (1.0 - decay) / (1.0 - decay ** int(count))


def average(means: list[Tensor], values: list[Tensor], weights: Sequence[float]) -> None:
    """Take new values, each of its weight, into running means."""
    if len({*weights}) == 1:
        torch._foreach_lerp_(means, values, weights[0])
    else:
        for mean, value, weight in zip(means, values, weights, strict=True):
            mean.lerp_(value, weight)


def received(groups: Iterable[Mapping[str, Any]]) -> dict[Tensor, Tensor]:
    """The gradients of this iteration, with weight decay, in working precision."""
    gradients: dict[Tensor, Tensor] = {}
    for group in groups:
        parameters = [p for p in group["params"] if p.grad is not None and is_live(p)]
        found = [p.grad if p.dtype is torch.float32 else p.grad.to(working_dtype(p)) for p in parameters]
        if group["weight_decay"] and parameters:
            decayed = [parameter.to(gradient) for parameter, gradient in zip(parameters, found, strict=True)]
            found = [*torch._foreach_add(found, decayed, alpha=group["weight_decay"])]
        gradients.update(zip(parameters, found, strict=True))
    return gradients


def take_in(
    gradients: Mapping[Tensor, Tensor],
    states: Mapping[Tensor, State],
    names: Mapping[Tensor, str],
    groups: Mapping[Tensor, Mapping[str, Any]],
) -> None:
    """Take gradients into the momenta of their parameters, each in memory of its own."""
    if not gradients:
        return
    for parameter, gradient in gradients.items():
        state = states[parameter]
        go_along(state, names[parameter], gradient)
        state.setdefault("step", torch.zeros((), dtype=torch.float32))
        for key in TURNED:  # of a stack that it has left, if for this iteration alone
            state.pop(key, None)
        if "momentum" not in state:
            state["momentum"] = gradient.clone()
    counts = counted([states[parameter]["step"] for parameter in gradients])
    weights = [newest(count, groups[p]["momentum"]) for p, count in zip(gradients, counts, strict=True)]
    average([states[parameter]["momentum"] for parameter in gradients], [*gradients.values()], weights)


def go_along(state: State, name: str, gradient: Tensor) -> None:
    """Let a state go where its parameter went (``model.to``); refuse that of another shape."""
    for key, value in state.items():
        if key not in _OF_NO_DTYPE and (value.dtype != gradient.dtype or value.device != gradient.device):
            state[key] = value.to(gradient)
    if "momentum" in state:
        check_same_shape(name, "momentum", state["momentum"].shape, gradient.shape)


def restore(groups: Iterable[Mapping[str, Any]], states: Mapping[Tensor, State], saved: Mapping[str, Any]) -> None:
    """States as they were saved: torch has cast them to the parameter's precision, theirs may be finer."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for index, parameter in zip(indices, parameters, strict=True):
        if "factor" in saved:  # of an earlier version, one for all
            states[parameter].setdefault("factor", saved["factor"])
        own = saved["state"].get(index, {})
        if "change" in own:  # of an earlier version, always of the last step
            states[parameter].setdefault("changed_at", saved["step_count"] - 1)
        for key, value in own.items():
            if key not in NUMBERS:
                place = "cpu" if key in _OF_NO_DTYPE else parameter.device
                states[parameter][key] = value.to(place, copy=True)


def in_own_memory(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state as it is now, without the memory around its parts: of all tensors, or it would be of two iterations."""
    return {
        key: value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def first_order(
    gradients: Mapping[Tensor, Tensor], states: Mapping[Tensor, State], rates: Mapping[Tensor, float]
) -> dict[Tensor, Tensor]:
    """The changes of parameters that are no such matrix: Adam's rule, times -rate.

    A parameter may come to it late, with a momentum of other gradients: its squares count as one of them.
    """
    if not gradients:
        return {}
    own, known = [*map(states.__getitem__, gradients)], []
    for state, gradient in zip(own, gradients.values(), strict=True):
        if "squares" in state and "squares_step" in state:
            known.append((state, gradient))
        else:
            state["squares_step"] = torch.ones((), dtype=torch.float32)
            state["squares"] = torch.maximum(gradient.square(), state["momentum"].square())
    if known:
        counts = counted([state["squares_step"] for state, _ in known])
        squares = torch._foreach_pow([gradient for _, gradient in known], 2)
        average([state["squares"] for state, _ in known], [*squares], [newest(count, DECAY) for count in counts])
    roots = torch._foreach_sqrt([state["squares"] for state in own])
    torch._foreach_add_(roots, EPSILON)
    found = torch._foreach_div([state["momentum"] for state in own], roots)
    torch._foreach_mul_(found, [-rates[parameter] for parameter in gradients])
    return dict(zip(gradients, found, strict=True))


def counted(steps: list[Tensor]) -> list[float]:
    """Count one more in each, and read them."""
    torch._foreach_add_(steps, [torch.ones((), device="cpu")] * len(steps))  # numbers would become tensors, slowly
    return torch.stack(steps).tolist()


def misfits(states: Mapping[Tensor, State], blocks: Iterable[Block]) -> Iterator[State]:
    """The states of weights with eigenbases for other columns, but those that move by Adam's rule, anew, since then."""
    for block in blocks:
        state = states.get(block.weight, {})
        if "input_vectors" in state and "squares" not in state and not fits(state, block.shape):
            yield state


def begin_anew(states: Iterable[State]) -> None:
    """Let go of the momentum of parameters that are set free, or whose matrix has other columns now.

    It may be of gradients that were far larger, as a long step in a direction that it alone would show.
    """
    for state in states:
        for key in ("momentum", *TURNED):
            state.pop(key, None)
        if "factor" in state:
            state["factor"] = min(1.0, state["factor"])


def is_changed_together(states: Sequence[State]) -> bool:
    """Whether the last changes of all are known, and of one step."""
    first, *others = states
    is_known = all("change" in state for state in states)
    return is_known and all(state.get("changed_at") == first.get("changed_at") for state in others)


def forget_changes(states: Iterable[State]) -> None:
    """Let go of the last changes, whose memory is about to be used again: a step may be interrupted."""
    for state in states:
        state.pop("change", None)


def forget_squares(states: Iterable[State]) -> None:
    """Let go of what :func:`first_order` knows of parameters that move as a matrix now."""
    for state in states:
        state.pop("squares", None)
        state.pop("squares_step", None)


def fits(state: Mapping[str, Any], shape: Sequence[int]) -> bool:
    """Whether there is an eigenbasis for matrices ``(groups, b, a)``, whose shape a bias changes that is set free."""
    if not all(key in state for key in BASIS):
        return False
    groups, rows, columns = shape
    return (*state["output_vectors"].shape[:2], *state["input_vectors"].shape[:2]) == (groups, rows, groups, columns)


def observe(state: State, gradient: Tensor) -> None:
    """Take a gradient into the running means of G^T G and G G^T, but for sides that are wide."""
    weight = newest(state["step"], DECAY)
    for side, turned in zip(FACTORS, (gradient.mT, gradient), strict=True):
        groups, width, _ = turned.shape
        if is_wide(width):
            state.pop(side, None)
            continue
        if side not in state or state[side].shape != (groups, width, width):
            state[side] = gradient.new_zeros(groups, width, width)
        state[side].baddbmm_(turned, turned.mT, beta=1.0 - weight, alpha=weight)


def is_due(count: int, every: int, shift: int = 0) -> bool:
    """Whether the gradient that follows so many refreshes an eigenbasis, perhaps later by a shift than those of others.

    >>> [count for count in range(25) if is_due(count, every=10)]
    [0, 1, 3, 5, 10, 20]
    >>> [count for count in range(25) if is_due(count, every=10, shift=512)]
    [0, 1, 2, 3, 5, 12, 22]
    """
    return (count - shift) % every == 0 or count in FIRST


def age(state: Mapping[str, Any]) -> int:
    """How many gradients a weight has had since its eigenbasis was made anew."""
    return int(state["step"]) - int(state.get("basis_since", 1))


def adopt(entries: Sequence[tuple[State, str, Tensor, Tensor]]) -> None:
    """Let states hold views of common memory in the place of values, which are copied there.

    Those may lie in views of one another, as where the states of two layers were exchanged.
    """
    places = {view.untyped_storage().data_ptr() for _, _, view, _ in entries}
    apart = [value.clone() if value.untyped_storage().data_ptr() in places else value for *_, value in entries]
    for (state, key, view, _), value in zip(entries, apart, strict=True):
        state[key] = view.copy_(value)


def is_turn_of_output(state: Mapping[str, Any], rows: int, columns: int) -> bool:
    """Which side of a matrix with a wide one gets new eigenvectors: both in turn, and the longer one first.

    At the first refresh after the two were made together that is the one of which less is known.
    """
    return (int(state.get("basis_step", 0)) % 2 == 0) == (rows <= columns)


def renewed(state: State) -> None:
    """Count the new eigenbasis of a matrix with a wide side."""
    state["basis_step"] = state.get("basis_step", torch.zeros((), dtype=torch.float32)) + 1


def basis_of(state: Mapping[str, Any]) -> Basis:
    """The eigenbasis that the state of a weight holds."""
    return Basis(
        Eigen(state["input_vectors"], state["input_values"]), Eigen(state["output_vectors"], state["output_values"])
    )
