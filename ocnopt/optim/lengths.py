"""How long steps are, judged by the gradients that come after them: factors of lr, and a guard.

Each matrix has a factor f of lr, and all parameters that are in none have one in common:

    f <- max(f, min(1, f^0.97 exp(0.02 kappa d))) exp(-kappa cos(G, last change)) / jump,
    0.01 <= f,    f <= d^0.25 min(50, 0.05 / lr) where f > 1,    d = late / largest

It rises where the last change went against the present gradient G, and falls where it went along. With small tensors
the cosines would leap, so that the parts of a matrix count together. The jump is what all gradients together are longer
by than three times what is usual, if anything: the momentum is that one gradient then, and would let a step be as long
as where gradients agree. The decline d is what all gradients together are of late over the most that they were in this
run. Where a model fits its data, and they vanish, nothing but single samples that it misses ends steps that are long,
and no noise is left that would make angles look worse. The guard takes back steps that were far too long.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ocnopt.optim.blocks import Block
from ocnopt.optim.gradient_checks import gathered
from ocnopt.optim.stack import Stack
from ocnopt.optim.states import State

BOUNDS = (0.01, 50.0)  # between which the factors of lr stay
SHORTENED = 0.25  # a factor by a step that was taken back
RETURN = 0.03  # share of its logarithm by which a factor below 1 goes back towards 1 in each iteration
PERPENDICULAR = 0.02  # cosine that counts as a right angle for factors below 1, while gradients are large
LONGEST = 0.05  # of lr times a factor above 1: where gradients agree, the root mean square change of an entry
RECENT = 50  # iterations that count as usual
TURNS = 64  # sets of parameters that have gradients together, of which what is usual is known
EVALUATIONS = 3  # times the most evaluations that are usual
JUMP = 3  # times the root mean square of the last gradients, above which one shortens steps
LATELY = 20  # iterations that are the last of them
DECLINE = 0.25  # power of the decline of gradients with which the bound of factors above 1 falls
GRADIENT = 10  # times the largest gradient that is usual
SETTLED = 5  # first iterations: evaluations rise as a field leaves its first weights, and one gradient may stand out


def adapt(
    blocks: Iterable[Block],
    stacks: Iterable[Stack],
    gradients: Mapping[Tensor, Tensor],
    states: Mapping[Tensor, State],
    groups: Mapping[Tensor, Mapping[str, Any]],
    adaptation: float,
    guard: "Guard",
) -> None:
    """The factors of this iteration, in the states.

    Args:
        blocks: the matrices.
        stacks: with those of them all of whose parameters have gradients.
        gradients: of this iteration.
        states: the last changes are there.
        groups: the options of each parameter.
        adaptation: kappa; without it factors return to 1.
        guard: which knows how long gradients have been.
    """
    if not adaptation:
        recover(states[parameter] for parameter in gradients)
        return
    jump, decline = guard.jump(), guard.decline()
    options = {id(group): group for group in groups.values()}
    bounds = {key: _most(group, decline) for key, group in options.items()}
    lift = math.exp(adaptation * PERPENDICULAR * decline)
    whole = _of_matrices(stacks)
    loose = {**gradients}
    own: list[list[Tensor]] = [[p for p in block.parameters if loose.pop(p, None) is not None] for block in blocks]
    members = [parameters for parameters in (*own, [*loose]) if parameters]
    partly = [parameters for parameters in members if parameters[0] not in whole]
    angles = iter(cosines([_apart(parameters, gradients, states) for parameters in partly]))
    for parameters in members:
        cosine = whole[parameters[0]] if parameters[0] in whole else next(angles)
        known = [states[p] for p in parameters]
        factor = _last(known)
        # batches that share no sample disagree, so that cosines are above zero however short steps are
        factor = max(factor, min(1.0, factor ** (1.0 - RETURN) * lift))
        factor *= math.exp(-adaptation * cosine) / jump
        if factor > 1.0:
            factor = min(factor, *(bounds[id(groups[p])] for p in parameters))
        factor = max(BOUNDS[0], factor)
        for state in known:
            state["factor"] = factor


def _last(states: Sequence[State]) -> float:
    """The last factor of parameters that have one together."""
    known = [state for state in states if "factor" in state]
    # of one that comes back after iterations without a gradient, the factor is that of then
    return max(known, key=lambda state: state.get("changed_at", -1))["factor"] if known else 1.0


def _of_matrices(stacks: Iterable[Stack]) -> dict[Tensor, float]:
    """The cosines of the matrices that moved as a whole and are to move again, by their weights."""
    return {
        block.weight: _cosine(*angle)
        for stack in stacks
        for block, is_changed, angle in zip(stack.blocks, stack.is_changed, stack.angles, strict=True)
        if is_changed
    }


def _cosine(product: float, *norms: float) -> float:
    size = math.prod(norms)
    return product / size if size > 0.0 else 0.0


def _apart(
    parameters: Iterable[Tensor], gradients: Mapping[Tensor, Tensor], states: Mapping[Tensor, State]
) -> list[tuple[Tensor, Tensor]]:
    """The present gradients of parameters that moved in their last step together, beside these changes."""
    changed = [(p, states[p]) for p in parameters if "change" in states[p]]
    last = max((state.get("changed_at", 0) for _, state in changed), default=0)
    # contiguous as those of a state that was loaded
    return [(gradients[p], state["change"].contiguous()) for p, state in changed if state.get("changed_at", 0) == last]


def _most(options: Mapping[str, Any], decline: float) -> float:
    """The largest factor: by the lr that a schedule began with, if that is more, so that it may lower lr."""
    lr = max(float(options["lr"]), float(options.get("initial_lr", 0.0)))
    return max(1.0, decline**DECLINE * (BOUNDS[1] if lr * BOUNDS[1] <= LONGEST else LONGEST / lr))


def take_back(parameters: Iterable[Tensor], states: Mapping[Tensor, State]) -> None:
    """Undo the last changes of parameters, and shorten their steps."""
    for parameter in parameters:
        state = states[parameter]
        if "change" in state:
            parameter.sub_(state.pop("change"))
        state["factor"] = max(BOUNDS[0], state.get("factor", 1.0) * SHORTENED)


def recover(states: Iterable[State]) -> None:
    """Let factors that steps taken back have made small return, where nothing else moves them."""
    for state in states:
        if state.get("factor", 1.0) < 1.0:
            state["factor"] **= 1.0 - RETURN


def cosines(groups: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> list[float]:
    """Of the angle between gradients and changes, for each group of such pairs; 0 where one of them is zero.

    >>> along, across = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    >>> cosines([[(along, along), (across, -across)], [(along, across)]])
    [-0.28, 0.0]
    """
    pairs = [*itertools.chain(*groups)]
    if not pairs:
        return [0.0] * len(groups)
    gradients, changes = ([*one] for one in zip(*pairs, strict=True))
    products = [gradient.reshape(-1).dot(change.reshape(-1)) for gradient, change in pairs]
    numbers = gathered([*products, *torch._foreach_norm([*gradients, *changes])]).tolist()
    found, count, start = [], len(pairs), 0
    for group in groups:
        along, *sizes = (numbers[i : i + len(group)] for i in (start, start + count, start + 2 * count))
        found.append(_cosine(math.fsum(along), *(math.hypot(*norms) for norms in sizes)))
        start += len(group)
    return found


class Guards:
    """A guard for the iterations in which all parameters have gradients, and one for each set of them that has alone.

    Parts that train in turn differ in what is usual; of such sets the latest are known.

    Attributes:
        whole: that of all parameters.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        self.whole = Guard(saved)
        turns = (saved or {}).get("turns", {})
        self._turns = {turn: Guard(of) for turn, of in turns.items()}

    def state(self) -> dict[str, Any]:
        """Plain numbers to go on from."""
        return {**self.whole.state(), "turns": {turn: guard.state() for turn, guard in self._turns.items()}}

    def of(self, present: Collection[bool]) -> "Guard":
        """The guard of the parameters that are present, of those that are trained.

        >>> guards = Guards()
        >>> guards.of([True, True]) is guards.whole, guards.of([True, False]) is guards.of([True, False])
        (True, True)
        """
        if all(present):
            return self.whole
        turn = "".join("1" if here else "0" for here in present)
        guard = self._turns[turn] = self._turns.pop(turn, Guard())
        if len(self._turns) > TURNS:
            del self._turns[next(iter(self._turns))]
        return guard

    def forget_gradients(self) -> None:
        """Begin anew with what is usual of gradients."""
        self.whole.forget_gradients()
        self._turns.clear()


class Guard:
    """What the last iterations took.

    Attributes:
        spent: evaluations of the fields in each.
        norms: of all gradients together in each.
        late: what norms are of late.
        largest: the most that was in any iteration.
    """

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        self.spent: list[int] = [*(saved or {}).get("spent", ())]
        self.norms: list[float] = [*(saved or {}).get("norms", ())]
        self.late = self._late()
        self.largest: float = (saved or {}).get("largest", self.late)

    def state(self) -> dict[str, Any]:
        """Plain numbers to go on from."""
        return {"spent": [*self.spent], "norms": [*self.norms], "largest": self.largest}

    def decline(self) -> float:
        """What gradients are of late, over the most that they were.

        >>> guard = Guard({"norms": [1.0, 1.0], "largest": 4.0})
        >>> guard.decline()
        0.25
        """
        return min(1.0, self.late / self.largest) if self.late > 0.0 < self.largest else 1.0

    def jump(self) -> float:
        """By what the gradients judged last exceed those before them: from 1 to what a step taken back costs.

        >>> guard = Guard({"norms": [1.0, 1.0, 6.0]})
        >>> guard.jump()
        2.0
        """
        *before, norm = self.norms[-1 - LATELY :] or [0.0]
        usual = JUMP * _size(before)
        return min(1.0 / SHORTENED, max(1.0, norm / usual)) if usual > 0.0 else 1.0

    def forget_gradients(self) -> None:
        """Begin anew with what is usual of gradients."""
        self.norms.clear()
        self.late = self.largest = 0.0

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
        self.late = self._late()
        self.largest = max(self.largest, self.late) if len(self.norms) > SETTLED else self._first_largest()
        return None

    def _late(self) -> float:
        """The root mean square of the last norms; one that stands out counts as far as it is no jump."""
        last = self.norms[-LATELY:]
        most = JUMP * _median(last) if last else 0.0
        return _size([min(norm, most) for norm in last])

    def _first_largest(self) -> float:
        """The most that norms were, of few: of a first one that stands out only the next ones tell."""
        most = JUMP * _median(self.norms)
        norms = [min(norm, most) for norm in self.norms]
        return max(_size(norms[: i + 1]) for i in range(len(norms)))


def _median(norms: Sequence[float]) -> float:
    """Their median; that of statistics takes as long as all else here."""
    rising = sorted(norms)
    return (rising[(len(rising) - 1) // 2] + rising[len(rising) // 2]) / 2


def _size(norms: Sequence[float]) -> float:
    """Their root mean square."""
    return math.hypot(*norms) / math.sqrt(len(norms) or 1)


def _is_uphill(changed: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether the present gradients point along the changes."""
    pairs = [(parameter.grad.to(change), change) for parameter, change in changed if parameter.grad is not None]
    return bool(pairs) and cosines([pairs])[0] > 0.0
