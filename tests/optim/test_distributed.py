"""Two processes train as one does with the whole batch; all checks share one start of the processes."""

import pytest
import torch
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from ocnopt.errors import ProblemError
from ocnopt.optim.horizon_policy import HorizonPolicy
from ocnopt.optim.ranks import owners
from ocnopt.optim.snopt import SNOpt
from tests.optim import ranks


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(ranks.train(0, 1, steps=range(4)), folder / "half.pt")
    multiprocessing.set_forkserver_preload(["tests.optim.ranks", "torch._dynamo"])
    multiprocessing.start_processes(ranks.work, (2, folder), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def leaves(value, name=""):
    """Every tensor and number of a nested state by its path."""
    if isinstance(value, dict):
        return {key: leaf for k, v in value.items() for key, leaf in leaves(v, f"{name}/{k}").items()}
    if isinstance(value, list | tuple):
        return leaves(dict(enumerate(value)), name)
    return {name: value}


def assert_equal(found, expected, atol=0.0):
    """Signs of eigenvectors are nobody's choice."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, torch.Tensor):
            signs = (lambda t: t.abs()) if atol and key.endswith("_vectors") else lambda t: t
            torch.testing.assert_close(signs(found[key]), signs(value), rtol=atol, atol=atol, msg=key)
        else:
            assert found[key] == (pytest.approx(value, abs=atol, rel=0.0) if isinstance(value, float) else value), key


@pytest.mark.parametrize("name", ranks.CASES)
def test_two_processes_equal_one_with_the_whole_batch(both, name):
    run, options = ranks.CASES[name]
    first, second = (leaves(found[name]) for found in both)
    assert_equal(second, first)
    if name == "explode":
        assert {value for key, value in first.items() if key.endswith("/factor")} == {0.25}
        return
    expected = leaves(run(0, 1, **{key: value for key, value in options.items() if key != "sizes"}))
    assert_equal(first, expected, atol=1e-10)


def test_a_run_goes_on_with_another_number_of_processes(both):
    unbroken = leaves(ranks.train(0, 1))
    assert_equal(leaves(both[0]["second_half"]), unbroken, atol=1e-10)
    resumed = leaves(ranks.train(0, 1, start=both[1]["first_half"], steps=range(4, ranks.STEPS)))
    assert_equal(resumed, unbroken, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("gradients", "ProblemError", "the gradients differ among 2 processes, with norms from"),
        ("infinite", "NonFiniteError", "NaN or infinity"),
        ("parameters", "ProblemError", "the parameters differ among 2 processes"),
        ("options", "ProblemError", "about to take a step of its own; expected the same options"),
        ("schedule", "ProblemError", "about to take a step of its own; expected the same options"),
        ("missing", "ProblemError", "gradients of the same parameters"),
        ("basis", "NonFiniteError", "a rank found no eigenbasis of its factors; expected finite gradients"),
        ("sharded", "ProblemError", "sharded (FSDP, DTensor); expected whole ones in every process"),
    ],
)
def test_processes_that_are_not_alike_are_told_so_together(both, name, kind, words):
    for found in both:
        came, message, is_untouched = found["disagree"][name]
        assert came == kind
        assert words in message
        assert is_untouched


def test_processes_that_train_models_of_their_own_say_so(both):
    for rank, found in enumerate(both):
        assert_equal(leaves(found["alone"]), leaves(ranks.alone(rank, 1)))


def test_the_work_is_shared(both):
    assert [found["share_out"] for found in both] == [1, 2]
    assert owners([1.0] * 5, 3) == [0, 1, 2, 0, 1]
    assert owners([], 2) == []


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_group_of_one_is_no_group(process_group):
    del process_group
    model = ranks.make_model()
    parallel = DistributedDataParallel(model)
    optimizer, policy = SNOpt(parallel, 0.05), HorizonPolicy(DistributedDataParallel(model[1]), lr=0.1)
    alone = ranks.make_model()
    other, another = SNOpt(alone, 0.05), HorizonPolicy(alone[1], lr=0.1)
    for i in range(3):
        for module, steps in ((parallel, (optimizer, policy)), (alone, (other, another))):
            module.zero_grad()
            module(ranks.batch(i)[0]).square().mean().backward()
            for part in steps:
                part.step()
    assert_equal(leaves(ranks.result(model, optimizer, policy)), leaves(ranks.result(alone, other, another)))
    two = nn.Sequential(
        parallel, DistributedDataParallel(nn.Linear(5, 2), process_group=torch.distributed.new_group([0]))
    )
    with pytest.raises(
        ProblemError, match="DistributedDataParallel of 2 process groups; expected one group that trains"
    ):
        SNOpt(two, 0.05)
    assert SNOpt(two, 0.05, process_group=parallel.process_group)._group is parallel.process_group
    with pytest.raises(ProblemError, match=r"this process is no member of process_group; expected a group that it"):
        SNOpt(model, 0.05, process_group=torch.distributed.GroupMember.NON_GROUP_MEMBER).step()
