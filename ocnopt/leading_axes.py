"""Whether a problem's function accepts the static control p with leading axes, as a copy of p per sample needs.

The answer is one of structure, not of values: the function is evaluated on two rows of states, each with a p of its
own, and accepts leading axes where each row of what it returns reaches its own p alone, however small p's effect is.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def accepts_leading_axes(function: Callable[..., Any], arguments: Mapping[str, Tensor], p: Tensor) -> bool:
    """Look at what p reaches.

    Args:
        function: takes the arguments in their order, then p.
        arguments: t as a 0-d tensor, x ``(*batch, n)`` and whatever else has the batch's axes. A function that says
            ``reads_samples_alike`` is called with the first sample alone.
        p: ``(q,)``.
    """
    batch = arguments["x"].shape[:-1]
    given = [torch.stack([v, v]) if v.ndim else v.expand(2, *(1,) * len(batch)) for v in arguments.values()]
    if getattr(function, "reads_samples_alike", False):
        given = [v[(slice(None), *(slice(1),) * len(batch))] for v in given]
        batch = torch.Size(1 for _ in batch)
    # Two points nearby: where p itself stands, an effect may vanish by symmetry.
    noise = torch.randn(2, len(p), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(p)
    rows = (p + 0.01 * (1 + p.abs()) * noise).requires_grad_()
    own = rows.reshape(2, *(1,) * len(batch), -1)
    with torch.enable_grad():
        try:
            plain = torch.as_tensor(function(*arguments.values(), p))
            trailing = plain.shape[len(arguments["x"].shape) - 1 :]
        except Exception:
            return False
        # One p for the samples of a row is enough for most; some (torch.cat with x) want every axis.
        for wide in (own, own.expand(2, *batch, -1)):
            try:
                output = torch.as_tensor(function(*given, wide)).expand(2, *batch, *trailing)
            except Exception:
                continue
            return not any(_reaches(output[i], rows, 1 - i) for i in range(2))
    return False


def _reaches(output: Tensor, rows: Tensor, other: int) -> bool:
    """Whether a row of the output depends on the other row of p."""
    if not output.requires_grad:
        return False
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(output)
    (reached,) = torch.autograd.grad(
        (output * weights).sum(), rows, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    # NaN is a point outside the function's domain: no weight on a row times what it would have passed on.
    return bool(reached[other].nan_to_num(nan=0.0).ne(0).any())
