"""Several processes that train one model, each with its part of every batch: what they do is the same on all of them.

Ranks 0..k-1 hold the same parameters, and by the time of a step the same gradients: the means over the ranks of those
of their own losses, made by DistributedDataParallel or by the user. Whatever else a step depends on meets here:

    evaluations of the field    the most of any rank
    samples of a layer          those of all ranks, in the order of the ranks, on the rank that makes its eigenbasis
    eigenbases                  each made by one rank, and sent to all, so that they are equal bit for bit
    shares in dL/dT             their sums over all ranks; the loss is the mean over ranks, so each counts a k-th

Every rank joins every exchange, also without samples, in the same order.
"""

import math
import sys
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ocnopt.differential.kronecker import Samples
from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.optim.bases import kept
from ocnopt.optim.gradient_checks import sizes

ROUNDING = 1e-5  # how far, relative to them, norms of what should be equal may lie apart
_ALONE = (
    "Processes that train models of their own say process_group=torch.distributed.new_subgroups(1)[0], or the group of "
    "those that they train with"
)

Shape = tuple[int, int, int]


def unwrapped(model: nn.Module, group: Any) -> tuple[nn.Module, Any]:
    """The module that a DistributedDataParallel wraps, and the processes that train it: the group that was given first.

    Refuse sharded parameters, and several groups.
    """
    fsdp, tensor = (sys.modules.get(f"torch.distributed.{name}") for name in ("fsdp", "tensor"))
    is_sharded = any(fsdp and isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules())
    if is_sharded or any(tensor and isinstance(parameter, tensor.DTensor) for parameter in model.parameters()):
        raise ProblemError(
            "the model's parameters are sharded (FSDP, DTensor); expected whole ones in every process, as an "
            "eigenbasis belongs to a whole matrix: wrap the model in DistributedDataParallel, or train with an "
            "optimiser of torch.optim"
        )
    parallel = [module for module in model.modules() if isinstance(module, nn.parallel.DistributedDataParallel)]
    groups = {wrapper.process_group: None for wrapper in parallel}
    if group is None and len(groups) > 1:
        raise ProblemError(
            f"the model holds DistributedDataParallel of {len(groups)} process groups; expected one group that trains "
            "all parameters: wrap the whole model once, or say process_group="
        )
    if group is None and groups:
        (group,) = groups
    return (model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model), group


def beside(group: Any) -> "Ranks | None":
    """The processes that train together with this one, once torch.distributed is initialised; None where it is alone.

    Raises:
        ProblemError: this process is not of the group.
    """
    count = dist.get_world_size(group)
    if count < 1:
        raise ProblemError(
            "this process is no member of process_group; expected a group that it trains in: that of the "
            "DistributedDataParallel around the model is its process_group"
        )
    return Ranks(group, dist.get_rank(group), count) if count > 1 else None


@dataclass(frozen=True)
class Ranks:
    """The processes of a group, two at least, seen from one of them."""

    group: Any
    rank: int
    count: int

    def place(self, device: torch.device) -> torch.device:
        """Where tensors of a device are exchanged: there, or on the CPU, as gloo does not know every exchange."""
        backends = dict(pair.split(":") for pair in dist.get_backend_config(self.group).split(","))
        return torch.device("cpu") if backends.get(device.type, "gloo") == "gloo" else device

    def most(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The greatest of each number over the ranks."""
        found = torch.tensor(values, dtype=torch.float64, device=self.place(device))
        dist.all_reduce(found, dist.ReduceOp.MAX, self.group)
        return found.tolist()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks."""
        found = tensor.to(self.place(tensor.device), copy=True)
        dist.all_reduce(found, dist.ReduceOp.SUM, self.group)
        return found.to(tensor.device)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, of the same shapes on all ranks, by their means."""
        if tensors:
            whole = self.sum(torch.cat([tensor.reshape(-1) for tensor in tensors])) / self.count
            parts = whole.split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def part(self, batch: Tensor) -> Tensor:
        """This rank's samples of a batch; parts differ by one in length where they cannot be equal."""
        begin, end = (len(batch) * i // self.count for i in (self.rank, self.rank + 1))
        return batch[begin:end]

    def counts(self, own: Sequence[int], device: torch.device) -> list[list[int]]:
        """Numbers of every rank, each row those of one."""
        table = torch.zeros(self.count, len(own), dtype=torch.int64, device=device)
        table[self.rank] = torch.tensor(own, dtype=torch.int64)
        return self.sum(table).tolist()

    def agree(
        self, gradients: Sequence[Tensor], parameters: Sequence[Tensor], plan: object, spent: int, device: torch.device
    ) -> int:
        """Check that all ranks are about to take the same step; the most evaluations that one of them has spent.

        Args:
            gradients: dense, by now the means over the ranks.
            parameters: to be compared too.
            plan: plain numbers and words that must be equal.
            spent: evaluations of the field.
            device: of the model.

        Raises:
            ProblemError: they are not.
            NonFiniteError: a gradient of another rank is NaN or infinite, and none of this one.
        """
        norms = [float(sizes([t for t in tensors if t.numel()]).norm()) for tensors in (gradients, parameters)]
        is_fine = all(map(math.isfinite, norms))
        same = [float(zlib.crc32(repr(plan).encode())), *(norms if is_fine else (0.0, 0.0))]
        # the least is minus the most of the negative
        found = self.most([spent, not is_fine, *same, *(-value for value in same)], device)
        most, is_bad, (plans, *high), (least, *low) = int(found[0]), found[1], found[2:5], [-end for end in found[5:]]
        if plans != least:
            raise ProblemError(
                f"rank {self.rank} of {self.count} or another is about to take a step of its own; expected the same "
                "options and number of steps on all, and gradients of the same parameters: call the optimiser alike in "
                f"every process. {_ALONE}"
            )
        if is_bad and is_fine:
            raise NonFiniteError(
                f"a gradient of another rank than {self.rank} holds NaN or infinity; expected finite means over the "
                "ranks. Parameters and state are as before this step: catch this error on all ranks to skip it"
            )
        for name, greatest, smallest in zip(("gradients", "parameters"), high, low, strict=True):
            if not is_bad and greatest - smallest > ROUNDING * greatest:
                raise ProblemError(
                    f"the {name} differ among {self.count} processes, with norms from {smallest:.6g} to "
                    f"{greatest:.6g}; expected equal parameters, and the mean gradients of all: wrap the model in "
                    "DistributedDataParallel, or send the parameters of rank 0 to all and average .grad before step(). "
                    f"{_ALONE}"
                )
        return most


class Shared:
    """A refresh whose eigenbases are made by several ranks, each of some matrices.

    Args:
        ranks: that share the work.
        matrices: a tensor ``(groups, b, a)`` for each, of its precision and on its device.
    """

    def __init__(self, ranks: Ranks, matrices: Sequence[Tensor]) -> None:
        self._ranks, self._matrices = ranks, matrices
        self._shapes = [(groups, b, a) for groups, b, a in (matrix.shape for matrix in matrices)]
        self.owners = owners(
            [groups * (a * kept(a, b) ** 2 + b * kept(b, a) ** 2) for groups, b, a in self._shapes], ranks.count
        )
        self._order = sorted(range(len(matrices)), key=self.owners.__getitem__)
        self._place, dtypes = ranks.place(matrices[0].device), (matrix.dtype for matrix in matrices)
        self._like = torch.empty(0, dtype=reduce(torch.promote_types, dtypes), device=self._place)

    def is_mine(self, i: int) -> bool:
        """Whether this rank makes the eigenbasis of matrix i."""
        return self.owners[i] == self._ranks.rank

    def pool(self, samples: Sequence[Samples | None]) -> tuple[list[Samples | None], list[bool]]:
        """The samples of all ranks, for matrices of this one, and of which matrices any rank has some."""
        ranks = self._ranks
        counts = ranks.counts([0 if s is None else s.inputs.shape[1] for s in samples], self._place)
        seen = [any(column) for column in zip(*counts, strict=True)]
        mine = [i for i in self._order if self.is_mine(i)]
        shapes = [(i, shape) for row in counts for i in mine for shape in self._rows(i, row[i])]
        came = [sum(math.prod(shape) for i in mine for shape in self._rows(i, row[i])) for row in counts]
        sent = [0] * ranks.count
        for i in self._order:
            sent[self.owners[i]] += sum(map(math.prod, self._rows(i, counts[ranks.rank][i])))
        received = self._like.new_empty(sum(came))
        if any(seen):
            own = [part for i in self._order for part in samples[i] or ()]
            dist.all_to_all_single(received, self._pack(own), came, sent, ranks.group)
        parts = self._unpack(received, shapes)
        pieces = [Samples(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
        pooled = {
            i: Samples(*(torch.cat(part, 1) for part in zip(*pieces[j :: len(mine)], strict=True)))
            for j, i in enumerate(mine)
        }
        return [pooled[i] if i in pooled and seen[i] else None for i in range(len(samples))], seen

    def spread(self, made: Mapping[int, Sequence[Tensor]], wanted: Collection[int]) -> dict[int, list[Tensor]]:
        """The eigenbases of all wanted matrices: U_A ``(groups, a, r)``, E_A, U_B ``(groups, b, q)``, E_B.

        Args:
            made: those that this rank has found, of those that it was to make.
            wanted: the same on all ranks.

        Raises:
            NonFiniteError: a rank has not found one of its own.
        """
        ranks, order = self._ranks, [i for i in self._order if i in wanted]
        kept = torch.zeros(len(self._shapes), 2, dtype=torch.int64, device=self._place)
        for i, (_, EA, _, EB) in made.items():
            kept[i] = torch.tensor([EA.shape[-1], EB.shape[-1]])
        widths = ranks.sum(kept).tolist()
        if not all(all(widths[i]) for i in order):
            raise NonFiniteError(
                "a rank found no eigenbasis of its factors; expected finite gradients, whose squares are finite too: "
                "lower lr, or clip the gradients"
            )
        lengths, shapes = [0] * ranks.count, list[tuple[int, tuple[int, ...]]]()
        for i in order:
            (groups, b, a), (r, q) = self._shapes[i], widths[i]
            new = (groups, a, r), (groups, r), (groups, b, q), (groups, q)
            shapes += [(i, shape) for shape in new]
            lengths[self.owners[i]] += sum(map(math.prod, new))
        whole = self._like.new_empty(sum(lengths))
        parts = whole.split(lengths)
        parts[ranks.rank].copy_(self._pack([part for i in order if i in made for part in made[i]]))
        for rank, part in enumerate(parts):
            if len(part):
                dist.broadcast(part, group=ranks.group, group_src=rank)
        found = self._unpack(whole, shapes)
        return {i: found[4 * j : 4 * j + 4] for j, i in enumerate(order)}

    def _rows(self, i: int, count: int) -> tuple[Shape, Shape]:
        """The shapes of a number of samples."""
        groups, b, a = self._shapes[i]
        return (groups, count, a), (groups, count, b)

    def _pack(self, parts: Sequence[Tensor]) -> Tensor:
        flat = [part.reshape(-1).to(self._place, self._like.dtype) for part in parts]
        return torch.cat(flat) if flat else self._like

    def _unpack(self, vector: Tensor, shapes: Sequence[tuple[int, tuple[int, ...]]]) -> list[Tensor]:
        """Tensors of some matrices, in memory of their own."""
        parts = zip(shapes, vector.split([math.prod(shape) for _, shape in shapes]), strict=True)
        return [part.view(shape).to(self._matrices[i], copy=True) for (i, shape), part in parts]


def owners(costs: Sequence[float], count: int) -> list[int]:
    """Which rank does which piece of work, the dearest first, each to the rank that has least to do.

    >>> owners([1.0, 8.0, 5.0, 4.0], 2)
    [0, 0, 1, 1]
    """
    load, found = [0.0] * count, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        found[i] = min(range(count), key=load.__getitem__)
        load[found[i]] += costs[i]
    return found
