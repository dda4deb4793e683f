"""What a user hands to OCNOpt, and what it refuses."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.checks import listed
from ocnopt.errors import ProblemError
from ocnopt.optim.checks import check_same_shape


def check_game(model: nn.Module, feedback: object, form: str, game: str, tikhonov: float) -> None:
    """Refuse a compiled model, and options that would say nothing."""
    if form == "gauss_newton" and game != "cooperative":
        raise ProblemError(
            f'game={game!r} met form="gauss_newton", the joint step of all layers; expected game="cooperative", or '
            'form="batch"'
        )
    if tikhonov and form != "sample":
        raise ProblemError(
            f'tikhonov={tikhonov} met form={form!r}; expected form="sample", the published one that it belongs to, '
            "or tikhonov=0"
        )
    if not isinstance(feedback, bool):
        raise ProblemError(
            f"feedback is {feedback!r}; expected True or False: False leaves the first-order method alone"
        )
    for name, module in model.named_modules() if feedback else ():
        if isinstance(module, torch._dynamo.OptimizedModule) or module._compiled_call_impl is not None:
            raise ProblemError(
                f"the {f'part {name!r} of the ' if name else ''}model is compiled, so that its layers cannot be seen "
                "at work; expected the module itself: OCNOpt(model, lr), without torch.compile"
            )


def check_outputs(tapes: Sequence[Any]) -> None:
    """Refuse models that do not return samples."""
    for tape in tapes:
        shapes = [tuple(tape.shapes[slot]) for slot in tape.returned if slot in tape.gradients]
        if not tape.returned or any(shape[:1] != (tape.rows,) for shape in shapes):
            came = f"tensors of shapes {shapes}" if shapes else "no tensor that depends on what is trained"
            loss = " (one of which is a loss, it seems)" if () in shapes and len(shapes) > 1 else ""
            raise ProblemError(
                f"the model returned {came}{loss}; expected outputs, or tuples, lists and dicts of them, with one "
                "row a sample: compute the loss outside of the model, as in criterion(model(x).logits, y), or use "
                "feedback=False"
            )


def check_scale(tapes: Sequence[Any], scale: Tensor | None) -> None:
    """Refuse costates of a loss that was scaled by nobody knows what."""
    if tapes and scale is None:
        raise ProblemError(
            "GradScaler.unscale_ met OCNOpt before its step, which needs the scale for more than the gradients; "
            "expected scaler.step(optimizer) to unscale: leave unscale_ out, train in bfloat16, which needs no scaler, "
            "or use feedback=False"
        )


def check_tapes(tapes: Sequence[Any]) -> None:
    """Refuse forward passes before one step that took different ways through the model."""
    first = tapes[0]
    for tape in tapes[1:]:
        same = [(call.function, call.inputs) for call in tape.calls] == [(c.function, c.inputs) for c in first.calls]
        if not same or [shape[1:] for shape in tape.shapes] != [shape[1:] for shape in first.shapes]:
            raise ProblemError(
                f"{len(tapes)} forward passes before one step took different ways through the model "
                f"({len(first.calls)} operations in the first, {len(tape.calls)} in another, or states of other "
                "shapes); expected equal ones: call step() after each, or use feedback=False"
            )


def check_saved(
    state: Mapping[str, Any], options: Iterable[str], chosen: Mapping[str, str], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse the state of another optimiser than OCNOpt, of other rules than those chosen, of other parameters."""
    saved = state.get("param_groups", ())
    missing = sorted({name for name in options for group in saved if name not in group})
    if missing or not saved or "state" not in state:
        came = f"groups without {listed(missing)}" if missing else f"{sorted(state)}"
        raise ProblemError(
            f"the state holds {came}; expected the state of an OCNOpt: "
            "load the state of another optimiser into that one"
        )
    for name, value in chosen.items():
        if state.get(name, value) != value:
            raise ProblemError(
                f"the state is that of an OCNOpt with {name}={state[name]!r}; expected {name}={value!r}, as this one "
                "has: make the optimiser with the options of the one that was saved"
            )
    indices = [index for group in saved for index in group["params"]]
    parameters = [parameter for group in groups for parameter in group["params"]]
    if len(indices) != len(parameters):
        raise ProblemError(
            f"the state holds {len(indices)} parameters; expected the {len(parameters)} of this optimiser, in the same "
            "order: load it where the model has the layers of the one that was saved"
        )
    for place, (index, parameter) in enumerate(zip(indices, parameters, strict=True)):
        for name, value in state["state"].get(index, {}).items():
            if isinstance(value, Tensor) and not _fits(name, value.shape, parameter.shape):
                raise ProblemError(
                    f"the state holds {name!r} of shape {tuple(value.shape)} for parameter {place}, of shape "
                    f"{tuple(parameter.shape)}; expected the state of this model: load it where the layers are those "
                    "of the model that was saved"
                )


def check_shapes(name: str, parameter: Tensor, state: Mapping[str, Any]) -> None:
    """Refuse a state that was made before its parameter changed its shape."""
    for key, value in state.items():
        if isinstance(value, Tensor) and not _fits(key, value.shape, parameter.shape):
            check_same_shape(name, key, value.shape, parameter.shape)


def _fits(name: str, found: torch.Size, of: torch.Size) -> bool:
    """Whether a state is one of a parameter of this shape."""
    if name.startswith("inputs"):
        return found[-1] - of[1:].numel() in (0, 1)  # with the bias or without
    if name.startswith("outputs"):
        return found[:-1].numel() == of[0]
    return found == of
