"""Whether torch works as it does by itself, which everything here needs: with derivatives, numbers and no tracing."""

import torch

from ocnopt.errors import ProblemError


def can_differentiate() -> None:
    """Refuse to work where torch gives no derivatives.

    Raises:
        ProblemError: torch.inference_mode(), a transform of torch.func or torch.compile is at work.
    """
    if torch.is_inference_mode_enabled():
        raise ProblemError(
            "torch.inference_mode() is on, where nothing has a derivative; expected none: leave it, or use "
            "torch.no_grad(), under which problems are made and solved as everywhere"
        )
    # torch tells in no other way that one of its transforms is at work
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ProblemError(
            "a transform of torch.func (grad, jvp, vmap, ..) is at work, whose tensors hold no numbers to solve with; "
            "expected plain tensors: for gradients give initial_state or data that require them, pass "
            "differentiable=True and call .backward(); for many problems give initial_state a leading batch axis"
        )
    if torch.compiler.is_compiling() or callable(torch._C._dynamo.eval_frame.get_eval_frame_callback()):
        raise ProblemError(
            "torch.compile was to trace through a solver, whose loops depend on numbers; expected a call outside of "
            "it: use torch.compiler.disable(oc.solve) inside, or compile your own functions alone"
        )
