"""What the processes of the distributed tests do; the same functions run in one process, with whole batches."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from ocnopt.errors import NonFiniteError, ProblemError
from ocnopt.neural.neural_ode import NeuralODE
from ocnopt.ocp import FreeHorizon
from ocnopt.optim import bases, matrices
from ocnopt.optim.horizon_policy import HorizonPolicy
from ocnopt.optim.snopt import SNOpt

STEPS, BATCH = 14, 12  # with refreshes at which eigenbases follow


class Square(nn.Module):
    """A field whose matrix, bias included, is square: without null spaces rounding turns no basis."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4, bias=False)

    def forward(self, t, x):
        return torch.tanh(self.inner(x)) * (1.0 + t)


def make_model():
    torch.manual_seed(5)
    ode = NeuralODE(Square(), FreeHorizon(1.0, 0.2, 3.0), method="rk4", steps=3)
    return nn.Sequential(nn.Linear(3, 4), ode, nn.LayerNorm(4), nn.Linear(4, 5)).double()


def batch(i, begin=0, end=BATCH):
    generator = torch.Generator().manual_seed(i)
    x, y = torch.randn(BATCH, 3, generator=generator).double(), torch.randint(5, (BATCH,), generator=generator)
    return x[begin:end], y[begin:end]


def cut(rank, count):
    return rank * BATCH // count, (rank + 1) * BATCH // count


def result(model, optimizer, policy=None):
    found = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return found if policy is None else found | {"policy": policy.state_dict()}


def train(
    rank, count, *, curvature="gradient", by_hand=False, start=None, steps=range(STEPS), rule="gauss_newton", every=1
):
    """Steps with DistributedDataParallel, or with gradients that are averaged by hand."""
    model = make_model()
    wrapped = DistributedDataParallel(model) if count > 1 and not by_hand else model
    optimizer = SNOpt(wrapped if curvature == "gradient" else model, 0.05, refresh_every=4, curvature=curvature)
    kind = {"rule": "adjoint"} if rule == "adjoint" else {"curvature": rule}
    policy = HorizonPolicy(model[1], **kind, lr=0.2, penalty=0.1, every=every)
    if start is not None:
        for part, state in zip((model, optimizer, policy), start.values(), strict=True):
            part.load_state_dict(state)
    for i in steps:
        x, y = batch(i, *cut(rank, count))
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x), y).backward()
        if count > 1 and by_hand:
            average(model, count)
        optimizer.step()
        policy.step(lambda: nn.functional.cross_entropy(model(x), y))  # noqa: B023
    return result(model, optimizer, policy)


def wide(rank, count, *, curvature):
    """Bases of leading parts on both sides."""
    before = bases.WIDEST, bases.LEADING, bases.BESIDE_SHORT
    bases.WIDEST, bases.LEADING, bases.BESIDE_SHORT = 3, 2, 3
    found = train(rank, count, curvature=curvature)
    bases.WIDEST, bases.LEADING, bases.BESIDE_SHORT = before
    return found


def average(model, count):
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
        parameter.grad /= count


def sums(rank, count, *, sizes=(BATCH,), rank_limit=matrices.RANK):
    """Batches of unequal size, of none too: sums over the size of the whole batch; also with bases cut short."""
    model, before = make_model(), matrices.RANK
    wrapped = DistributedDataParallel(model) if count > 1 else model
    optimizer = SNOpt(model, 0.05, refresh_every=4, curvature="costate", reduction="sum")
    policy = HorizonPolicy(model[1], lr=0.2, reduction="sum")
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    matrices.RANK = rank_limit
    for i in range(STEPS):
        x, y = batch(i, ends[rank], ends[rank + 1])
        optimizer.zero_grad()
        (nn.functional.cross_entropy(wrapped(x), y, reduction="sum") * count / BATCH).backward()
        optimizer.step()
        policy.step()
    matrices.RANK = before
    return result(model, optimizer, policy)


def accumulate(rank, count):
    """Two backward passes a step, of which the last one alone averages."""
    model = make_model()
    wrapped = DistributedDataParallel(model) if count > 1 else model
    optimizer = SNOpt(wrapped, 0.05, refresh_every=4, curvature="costate")
    policy = HorizonPolicy(model[1], rule="adjoint", lr=0.2)
    for i in range(STEPS):
        optimizer.zero_grad()
        begin, end = cut(rank, count)
        middle = (begin + end) // 2
        for part in ((begin, middle), (middle, end)):
            x, y = batch(i, *part)
            with wrapped.no_sync() if count > 1 and part[0] == begin else nullcontext():
                (nn.functional.cross_entropy(wrapped(x), y) / 2).backward()
        optimizer.step()
        policy.step()
    return result(model, optimizer, policy)


def explode(rank, count):
    """The field of the last rank alone spends more, and a step is taken back."""
    model = make_model()
    optimizer = SNOpt(model, 0.05, adaptation=0)
    for i in range(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch(i)[0]), batch(i)[1]).backward()
        if i == 7 and rank == count - 1:
            model[1].statistics.forward *= 100
        optimizer.step()
    return result(model, optimizer)


def fail(*_, **options):
    raise torch.linalg.LinAlgError("no convergence")


def disagree(rank, count):
    """What is said of processes that are not alike; none of them waits for another."""
    said = {}

    def attempt(name, change):
        model = make_model()
        optimizer = SNOpt(model, 0.05)
        model(batch(0)[0]).square().mean().backward()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            with torch.no_grad():
                change(model, optimizer)
            optimizer.step()
        except (ProblemError, NonFiniteError) as error:
            same = name == "parameters" or all(torch.equal(v, before[key]) for key, v in model.state_dict().items())
            said[name] = (type(error).__name__, str(error), same)

    last = rank == count - 1
    attempt("gradients", lambda model, _: model[0].weight.grad.mul_(1.0 + rank))
    attempt("infinite", lambda model, _: model[0].weight.grad.fill_(torch.inf) if last else None)
    attempt("parameters", lambda model, _: model[0].weight.mul_(1.0 + rank))
    attempt("options", lambda _, optimizer: optimizer.param_groups[0].update(lr=0.05 * (1 + rank)))
    attempt("schedule", lambda _, optimizer: optimizer.param_groups[0].update(initial_lr=0.05 * (1 + rank)))
    attempt("missing", lambda model, _: setattr(model[0].weight, "grad", None) if last else None)
    new_basis = matrices._new_basis
    if last:
        matrices._new_basis = fail
    attempt("basis", lambda *_: None)
    matrices._new_basis = new_basis
    attempt("sharded", lambda *_: SNOpt(fully_shard(make_model(), mesh=init_device_mesh("cpu", (count,))), 0.05))
    return said


def alone(rank, count):
    """A model of one's own beside others."""
    model = make_model()
    optimizer = SNOpt(model, 0.05 * (1 + rank), process_group=dist.new_subgroups(1)[0] if count > 1 else None)
    policy = HorizonPolicy(model[1], lr=0.2, process_group=optimizer._group)
    for i in range(2):
        optimizer.zero_grad()
        model(batch(i + rank)[0]).square().mean().backward()
        optimizer.step()
        policy.step()
    return result(model, optimizer, policy)


def share_out(rank, count):
    """How many eigenbases a rank has made."""
    made, new_basis = [], matrices._new_basis
    matrices._new_basis = lambda *arguments, **options: made.append(1) or new_basis(*arguments, **options)
    train(rank, count, steps=range(1))
    matrices._new_basis = new_basis
    return len(made)


CASES = {
    "gradient": (train, {}),
    "costate": (train, {"curvature": "costate", "rule": "adjoint"}),
    "by_hand": (train, {"curvature": "costate", "by_hand": True, "rule": "published", "every": 3}),
    "exact": (train, {"rule": "exact"}),
    "unequal": (sums, {"sizes": (9, 3)}),
    "empty": (sums, {"sizes": (12, 0)}),
    "cut_short": (sums, {"sizes": (4, 8), "rank_limit": 3}),
    "wide": (wide, {"curvature": "gradient"}),
    "wide_mixed": (wide, {"curvature": "mixed"}),
    "accumulate": (accumulate, {}),
    "explode": (explode, {}),
}
OTHERS = {
    "disagree": disagree,
    "alone": alone,
    "share_out": share_out,
    "first_half": lambda rank, count: train(rank, count, steps=range(4)),
}


def work(rank, count, folder):
    """The whole life of one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=count)
    found = {name: run(rank, count, **options) for name, (run, options) in CASES.items()}
    found |= {name: run(rank, count) for name, run in OTHERS.items()}
    start = torch.load(folder / "half.pt")
    found["second_half"] = train(rank, count, start=start, steps=range(4, STEPS))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
