"""What a Neural ODE is given, checked at the door, and what the graph of its field leads to and holds."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ocnopt.checks import check_choice, is_whole
from ocnopt.differential.discrete import EndObserver, Observer
from ocnopt.errors import OcnoptError, ProblemError
from ocnopt.integrate import torchdiffeq_bridge
from ocnopt.integrate.tableaus import STIFF, TABLEAUS, WALKING

ERROR_NORMS = ("batch", "sample")
ADJOINTS = ("discrete", "continuous", "backprop")
# Bytes of a node of a graph besides what it saves, measured on small networks: there the nodes weigh more than tensors.
NODE = 1024


def check_field(field: Callable[..., Any]) -> None:
    """Refuse what is not called as field(t, x)."""
    try:
        signature = inspect.signature(field.forward if isinstance(field, nn.Module) else field)
    except (TypeError, ValueError):
        return  # not written in Python
    try:
        signature.bind(None, None)
    except TypeError:
        what = "field's forward" if isinstance(field, nn.Module) else "field"
        raise ProblemError(
            f"the {what} takes {signature}; expected field(t, x), with the time first: wrap a network of x "
            "alone in a module whose forward(self, t, x) returns self.net(x)"
        ) from None


def check_options(method: str, adjoint: str, steps: Any, checkpoint_bytes: Any) -> None:
    """Refuse options that are wrong, or do not go together."""
    check_choice("adjoint", adjoint, ADJOINTS)
    if method in STIFF and adjoint == "continuous":
        raise ProblemError(
            f"method={method!r} met adjoint='continuous': going back, a stiff path runs away from itself; expected "
            'adjoint="discrete", which takes the same steps back'
        )
    if method not in WALKING:
        check_choice("method", method, [*dict.fromkeys((*WALKING, *torchdiffeq_bridge.method_names()))])
        if steps is not None and method not in torchdiffeq_bridge.GRID:
            raise ProblemError(
                f"steps={steps!r} met method={method!r} of torchdiffeq, which chooses its own steps; expected "
                f"steps=None with rtol and atol, or a method on a grid: {', '.join(torchdiffeq_bridge.GRID)}"
            )
        if method == "scipy_solver" and adjoint != "continuous":
            raise ProblemError(
                f"method='scipy_solver' met adjoint={adjoint!r}: its steps leave torch, and gradients would be cut "
                'off; expected adjoint="continuous"'
            )
    if steps is not None and (not is_whole(steps) or steps < 1):
        raise ProblemError(f"steps is {steps!r}; expected a positive whole number, or None for error control")
    if not is_whole(checkpoint_bytes) or checkpoint_bytes < 0:
        raise ProblemError(
            f"checkpoint_bytes is {checkpoint_bytes!r}; expected a whole number of bytes, 0 to keep little"
        )


def check_error_norm(error_norm: str, method: str, adjoint: str, *, steps: object, dense: bool) -> None:
    """Refuse options that do not go with a step size for each sample."""
    check_choice("error_norm", error_norm, ERROR_NORMS)
    if error_norm == "batch":
        return
    controlled = [name for name, tableau in TABLEAUS.items() if tableau.b_error is not None]
    if method not in controlled or steps is not None:
        raise ProblemError(
            f'error_norm="sample" met method={method!r}, steps={steps!r}; expected error control, which gives each '
            f"sample steps of its own: one of {', '.join(controlled)} with steps=None"
        )
    if adjoint == "continuous":
        raise ProblemError(
            'error_norm="sample" met adjoint="continuous", whose gradient of the parameters is one integral over one '
            'time of all samples; expected adjoint="discrete" or "backprop"'
        )
    if dense:
        raise ProblemError(
            'error_norm="sample" met dense=True; expected dense=False: each sample ends a step at each of its times'
        )


def check_one_step_for_all(error_norm: str, what: str, why: str) -> None:
    """Refuse what does not go with a step size for each sample."""
    if error_norm == "sample":
        raise ProblemError(f'{what} met error_norm="sample": {why}; expected error_norm="batch"')


def check_observer(observer: object, method: str, adjoint: str, error_norm: str) -> None:
    """Refuse who cannot watch, and solves that cannot be watched."""
    if not isinstance(observer, EndObserver):
        raise ProblemError(
            f"observer is {type(observer).__name__}; expected an object with the method terminal(x, slope, costate), "
            "and stage(input_weight, gradient_weight) to watch the steps: see ocnopt.differential.discrete.Observer"
        )
    if isinstance(observer, Observer):  # of the steps
        check_one_step_for_all(error_norm, "an observer of the steps", "it weighs the evaluations of all samples alike")
    if method not in WALKING or adjoint == "backprop":
        raise ProblemError(
            f"a solve with method={method!r}, adjoint={adjoint!r} cannot be observed; expected one of "
            f'{", ".join(WALKING)} with adjoint="discrete" or "continuous"'
        )


def check_state(state: object) -> None:
    """Refuse what is not a floating-point tensor or a tuple of such, and parts of different dtype or device."""
    parts = state if isinstance(state, tuple) else (state,)
    for part in parts:
        if not (isinstance(part, Tensor) and part.is_floating_point()):
            came = f"a tensor of {part.dtype}" if isinstance(part, Tensor) else type(part).__name__
            raise ProblemError(
                f"the state holds {came}; expected a floating-point tensor or a tuple of them: convert it with "
                ".float(), or complex numbers with torch.view_as_real(x).flatten(-2)"
            )
    kinds = {(part.dtype, part.device) for part in parts}
    if len(kinds) != 1:
        raise ProblemError(
            f"the parts of the state differ: {sorted(f'{dtype} on {device}' for dtype, device in kinds)}; expected one "
            "dtype and one device (a non-empty tuple): convert them with .to(...)"
        )


def check_slope(slope: object, shapes: Sequence[Sequence[int]], *, is_tuple: bool) -> Any:
    """Refuse what does not fit the state; what fits, as a state."""
    parts = tuple(slope) if isinstance(slope, tuple | list) and is_tuple else (slope,)
    came = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    expected = [tuple(shape) for shape in shapes]
    if came != expected:
        raise ProblemError(
            f"the field returned {came}; expected its derivative for every part of the state, of shapes {expected}: "
            "field(t, x) returns dx/dt, shaped like x"
        )
    return parts if is_tuple else slope


def check_dtypes(error: RuntimeError, dtype: torch.dtype, own: Iterable[Tensor]) -> None:
    """Say where the field failed on the dtype of the state, which is none of its own."""
    others = sorted({str(tensor.dtype) for tensor in own if tensor.is_floating_point()} - {str(dtype)})
    if others and "type" in str(error):
        raise ProblemError(
            f"the field with tensors of {', '.join(others)} failed on a state of {dtype} ({error}); expected one "
            f"dtype: convert the state, x.to({others[0]}), or the field, ode.to({dtype})"
        ) from error


def as_real(slope: Tensor, dtype: torch.dtype) -> Tensor:
    """A slope in the dtype of the state; refuse to drop an imaginary part."""
    if slope.is_complex():
        raise ProblemError(
            f"the field returned a tensor of {slope.dtype} for a state of {dtype}; expected a real one: "
            "torch.view_as_real keeps both parts"
        )
    return slope.to(dtype)


def as_tensors(extra: Any) -> list[Tensor]:
    """What adjoint_params gives, as a list."""
    found = [*extra] if isinstance(extra, Iterable) and not isinstance(extra, Tensor) else [extra]
    foreign = [type(tensor).__name__ for tensor in found if not isinstance(tensor, Tensor)]
    if foreign:
        raise ProblemError(
            f"adjoint_params holds {foreign[0]}; expected tensors, or a function that returns a list of them: "
            "adjoint_params=[scale], or module.parameters()"
        )
    return found


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is at work, whatever the gradient mode: one of its levels is open."""
    return forward_ad._current_level >= 0


def check_not_transformed(cotangents: Iterable[Tensor | None] = ()) -> None:
    """Refuse a backward pass of ours where torch would have to look inside of it."""
    is_batched = any(c is not None and torch._C._functorch.is_legacy_batchedtensor(c) for c in cotangents)
    if is_batched or in_forward_mode() or torch._C._functorch.peek_interpreter_stack() is not None:
        raise ProblemError(
            "torch.func (grad, vjp, jacrev), is_grads_batched or forward mode met a NeuralODE whose backward pass is "
            'a solve of its own: adjoint="continuous", or "discrete" beyond checkpoint_bytes, watched, or with times '
            'that need gradients; expected the graph of all steps: raise checkpoint_bytes, or use adjoint="backprop"'
        )


def check_not_mapped(tensors: Iterable[Tensor]) -> None:
    """Refuse torch.func.vmap: a walk reads numbers (errors, finiteness), which differ from one mapped state to another.

    Args:
        tensors: the state and what the field depends on.
    """
    if torch._C._functorch.peek_interpreter_stack() is None:
        return
    for tensor in tensors:
        inner = tensor
        while torch._C._functorch.is_functorch_wrapped_tensor(inner):
            if torch._C._functorch.is_batchedtensor(inner):
                raise ProblemError(
                    "torch.func.vmap met a NeuralODE, whose steps depend on the numbers in the state; expected plain "
                    'tensors: leading axes of the state are samples already (ode(states), error_norm="sample" for '
                    "steps of their own), and models with parameters of their own go one by one, in a loop"
                )
            inner = torch._C._functorch.get_unwrapped(inner)


def check_event_not_transformed(tensors: Iterable[Tensor] = ()) -> None:
    """Refuse to look for an event within a transformation of torch.func, and to lose the tangents of tensors."""
    has_tangent = any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
    if has_tangent or torch._C._functorch.peek_interpreter_stack() is not None:
        raise ProblemError(
            "torch.func (jvp, jacfwd, grad, vmap) or forward mode met NeuralODE.until(), which looks for the time of "
            "its event by iterations and knows the derivatives of reverse mode alone; expected plain tensors: "
            "torch.autograd.grad or backward(), states one by one"
        )


def check_not_looked_into(method: str) -> None:
    """Refuse what torch.func, or forward mode without gradients, would make of the iterations within a step."""
    is_lost = in_forward_mode() and not torch.is_grad_enabled()
    if method in STIFF and (is_lost or torch._C._functorch.peek_interpreter_stack() is not None):
        raise ProblemError(
            f"torch.func (grad, vjp, jvp, jacrev), or forward mode within torch.no_grad(), met method={method!r}: its "
            "stages are solved for by iterations, which torch would have to look into; expected torch.autograd.grad, "
            "forward_ad with gradients enabled, or an explicit method"
        )


def noisy_stages(method: str) -> ProblemError:
    """What to say where an implicit method meets a field that draws random numbers."""
    return ProblemError(
        f"method={method!r} met a field that draws random numbers (dropout?): its stages are equations, which have no "
        "solution then; expected a field that gives the same slope each time: ode.field.eval(), or another method"
    )


def check_real(parameters: Iterable[Tensor]) -> None:
    """Refuse complex parameters, whose gradients the continuous adjoint does not integrate."""
    kinds = [str(parameter.dtype) for parameter in parameters if parameter.is_complex()]
    if kinds:
        raise ProblemError(
            f'adjoint="continuous" met a field with parameters of {kinds[0]}; expected real ones: '
            'torch.view_as_complex of a real parameter, or adjoint="discrete"'
        )


def check_not_observed(observers: object) -> None:
    """Refuse to let a pass go by unseen: in forward mode there is no backward pass of ours to watch."""
    if observers:
        raise ProblemError(
            "forward-mode differentiation (torch.func.jvp, jacfwd) met a NeuralODE that SNOpt, HorizonPolicy or "
            "another observer watches; expected a pass that nobody watches: take the tangent within torch.no_grad()"
        )


def check_without_tangent(times: Tensor) -> None:
    """Refuse to lose the tangent of times."""
    if forward_ad.unpack_dual(times).tangent is not None:
        raise ProblemError(
            "the times of the solve carry a tangent of forward-mode differentiation; expected plain numbers, as they "
            "become step sizes: differentiate by them in reverse mode, with times.requires_grad_()"
        )


def were_exchanged() -> OcnoptError:
    """What to say where the field has other parameters than in the forward pass."""
    return OcnoptError(
        "the field's parameters were exchanged between the forward and the backward pass "
        "(torch.func.functional_call does that); expected the same tensors, since the backward pass evaluates "
        'the field again: use adjoint="backprop"'
    )


def is_lost(name: str | None, shape: torch.Size) -> ProblemError:
    """What to say of a tensor that needs gradients and would get none."""
    return ProblemError(
        f"the field uses {name or 'a tensor'} of shape {tuple(shape)}, which requires gradients and is neither its "
        "input nor one of its parameters: its gradient would be lost; make it an nn.Parameter of the field, hand it "
        "over as adjoint_params=[...] (or a function that returns such a list; parameters=[...] for a function as "
        'field), detach it, or use adjoint="backprop"'
    )


def has_changed(names: Sequence[str | None]) -> OcnoptError:
    """What to say where the field is not what it was in the forward pass."""
    named = ", ".join(name for name in names if name) or "something it depends on"
    return OcnoptError(
        "the field has changed between the forward and the backward pass, which needs it as it was: "
        f"{named} is not what it was; expected the same field: call backward() before changing attributes, buffers "
        'or adjoint_params, or keep the forward pass in memory (raise checkpoint_bytes, or adjoint="backprop") and put '
        'new tensors in the place of old ones instead of filling these; with error_norm="sample" or "kvaerno5" a field '
        "in which samples meet looks so too, though nobody has changed it"
    )


@contextmanager
def weighed(shared: Sequence[Tensor]) -> Iterator[dict[int, int]]:
    """Measure what autograd saves besides what is ``shared``, in bytes by address, once the context closes."""
    saved: list[tuple[Tensor, bool]] = []
    # Hooks around us (torch.utils.checkpoint, save_on_cpu) must meet every tensor, whether it is weighed or not.
    around: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)

    def pack(tensor: Tensor) -> Any:
        # A saved output that kept itself would keep its graph for ever: output, node, hook's result, output.
        saved.append((tensor.detach(), tensor._is_view()))
        return around[0](tensor) if around else (saved[-1][0], tensor._version)

    def unpack(packed: tuple[Tensor, int]) -> Tensor:
        if packed[0]._version != packed[1]:
            raise RuntimeError("a tensor that the field's gradient needs has been modified by an inplace operation")
        return packed[0]

    sizes: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(pack, around[1] if around else unpack):
        yield sizes
    own = {tensor.untyped_storage().data_ptr() for tensor in shared}
    for tensor, is_view in saved:
        # A view keeps all of its storage.
        whole = tensor.untyped_storage()
        if whole.data_ptr() not in own:
            sizes[whole.data_ptr()] = whole.nbytes() if is_view else tensor.nbytes
    saved.clear()


def search(y: Tensor, known: Sequence[Tensor]) -> tuple[Tensor | None, int]:
    """A leaf that ``y`` depends on and that is not reached through ``known``, and the size of the graph.

    A leaf in the memory of something known is that again, cut off by a field that differentiates inside.
    """
    leaves = {id(tensor) for tensor in known}
    above = {tensor.grad_fn for tensor in known if tensor.grad_fn is not None}
    seen, pending = set(above), [y.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        edges = node.next_functions
        leaf = None if edges else getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and id(leaf) not in leaves and not any(_shares_memory(leaf, own) for own in known):
            return leaf, len(seen)
        pending += [following for following, _ in edges]
    return None, len(seen) - len(above)


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(one) or torch._C._functorch.is_functorch_wrapped_tensor(other):
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0


def modules(field: nn.Module) -> list[nn.Module]:
    """The field and all modules below, in any order; ``field.modules()`` takes several times as long."""
    found, pending = {field: None}, [field]
    while pending:
        below = [m for m in pending.pop()._modules.values() if m is not None and m not in found]
        found.update(dict.fromkeys(below))
        pending += below
    return [*found]


def attributes(field: nn.Module) -> Iterator[tuple[str, object]]:
    """Tensors stored on a module and its submodules as plain attributes."""
    for prefix, module in field.named_modules():
        for name, value in (vars(module) | module._buffers).items():
            yield f"{prefix}.{name}".lstrip("."), value
