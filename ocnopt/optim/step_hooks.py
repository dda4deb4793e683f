"""An optimiser's step with its hooks and its label in a profile, at no cost where there are none."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer as torch_optimizer

Step = Callable[..., Any]


def with_hooks(step: Step) -> Step:
    """A ``step`` of a ``torch.optim.Optimizer`` that torch's wrapper surrounds where a hook or a profiler waits for it.

    torch puts that wrapper around the step of every optimiser. Its label, which is for profilers, takes as long as a
    tenth of the step of a small net.
    """
    wrapped = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def with_hooks(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        # the step of a subclass that calls this one has the wrapper itself
        is_outermost = type(self).step is with_hooks
        return (wrapped if is_outermost and _is_watched(self) else step)(self, *args, **kwargs)

    with_hooks.hooked = True  # type: ignore[attr-defined] # or torch wraps it
    return with_hooks


def _is_watched(optimizer: torch.optim.Optimizer) -> bool:
    """Whether there are hooks of its steps, or of those of all optimisers, or a profiler is at work."""
    return bool(
        torch.autograd._profiler_enabled()
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    )
