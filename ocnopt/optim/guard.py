"""A guard against steps that were too long, as the iteration after them shows."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ocnopt.optim.factors import cosines

RECENT = 50  # iterations that count as usual
EVALUATIONS = 3  # times the most evaluations that are usual
GRADIENT = 10  # times the largest gradient that is usual
SETTLED = 5  # iterations before evaluations are judged: they rise as a field leaves its first weights


class Guard:
    """What the last iterations took.

    Attributes:
        spent: evaluations of the fields in each.
        norms: of all gradients together in each.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        self.spent: list[int] = [*(saved or {}).get("spent", ())]
        self.norms: list[float] = [*(saved or {}).get("norms", ())]

    def state(self) -> dict[str, Any]:
        """Plain numbers to go on from."""
        return {"spent": [*self.spent], "norms": [*self.norms]}

    def forget_gradients(self) -> None:
        """Begin anew with what is usual of gradients."""
        self.norms.clear()

    def judge(self, spent: int, norm: float, changed: Sequence[tuple[Tensor, Tensor]]) -> str | None:
        """What the last step raised too much; None takes the iteration in as a usual one.

        A loss that jumps shows in its gradient, which is at hand without a closure. One that is large because its batch
        is hard points uphill along the last step as often as not.

        Args:
            spent: evaluations of the fields.
            norm: of all gradients together.
            changed: the parameters that the last step moved, and how; empty if there is none to take back.
        """
        most, largest = max(self.spent, default=0), max(self.norms, default=0.0)
        if changed and len(self.spent) >= SETTLED and spent > EVALUATIONS * most:
            return f"the evaluations of the field from at most {most} to {spent}"
        if changed and 0.0 < GRADIENT * largest < norm and _is_uphill(changed):
            return f"the norm of the gradient, uphill along that step, from at most {largest:.3g} to {norm:.3g}"
        self.spent, self.norms = [*self.spent[1 - RECENT :], spent], [*self.norms[1 - RECENT :], norm]
        return None


def _is_uphill(changed: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the present gradients point along the changes."""
    pairs = [(parameter.grad.to(change), change) for parameter, change in changed if parameter.grad is not None]
    return bool(pairs) and cosines([pairs])[0] > 0.0
