"""What happens to those who differentiate a gradient of a solve once more."""

from typing import Any

import torch
from torch import Tensor

from ocnopt.errors import OcnoptError


class Last(torch.autograd.Function):
    """Passes gradients on and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> Any:
        """Copy the tensors before the inputs they depend on."""
        return tuple(None if tensor is None else tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        """Refuse."""
        raise OcnoptError(
            "the gradient of a NeuralODE was differentiated once more; its adjoint solve, and the time of an event "
            'with any adjoint, gives first derivatives only: use adjoint="backprop", or oc.hvp and oc.differentiate '
            "for second derivatives"
        )
