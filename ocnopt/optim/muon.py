"""torch's Muon for whole models: it takes matrices alone, so convolutions are flattened and the rest goes to Adam."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ocnopt.errors import ProblemError


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` for matrices and flattened kernels, steps as long as Adam's; Adam for all other parameters.

    Args:
        params: of a model, in one group.
        lr: of both.

    Raises:
        ProblemError: several groups.

    Source: Jordan et al., "Muon", 2024; the length of steps: Liu et al., arXiv 2502.16982.

    >>> layer = nn.Conv2d(2, 3, 3)
    >>> optimizer = Muon(layer.parameters(), lr=0.1)
    >>> before = layer.weight.detach().clone()
    >>> layer(torch.ones(1, 2, 3, 3)).sum().backward()
    >>> optimizer.step()
    >>> bool((layer.weight != before).any())
    True
    """

    def __init__(self, params: Iterable[nn.Parameter] | Iterable[dict[str, Any]], lr: float = 0.02) -> None:
        super().__init__([*params], {"lr": lr})
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        self._kernels = [p for p in own if p.ndim > 1 and min(p.flatten(1).shape) > 1]
        self._matrices: list[Tensor] = [nn.Parameter(p.detach().flatten(1)) for p in self._kernels]
        matrices = {id(parameter) for parameter in self._kernels}
        rest = [parameter for parameter in own if id(parameter) not in matrices]
        self._parts: list[torch.optim.Optimizer] = []
        if self._matrices:
            options: dict[str, Any] = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
            self._parts.append(torch.optim.Muon(self._matrices, lr=lr, **options))
        if rest:
            self._parts.append(torch.optim.Adam(rest, lr=lr))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take the one group of the constructor.

        Args:
            param_group: as in every torch optimiser.

        Raises:
            ProblemError: a second one.
        """
        if self.param_groups:
            raise ProblemError(
                "Muon met a second group of parameters; expected one, as all of them move by one lr: give all "
                "parameters to the constructor, or make a Muon for each group"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters.

        Args:
            closure: computes the loss again and calls backward; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            matrix.copy_(kernel.flatten(1))
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for part in self._parts:
            part.param_groups[0]["lr"] = self.param_groups[0]["lr"]
            part.step()
        for kernel, matrix in zip(self._kernels, self._matrices, strict=True):
            kernel.copy_(matrix.view_as(kernel))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of the two parts, beside torch's own."""
        return {**super().state_dict(), "parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
