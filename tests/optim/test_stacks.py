"""Matrices in one stack move as each does alone, whatever happens to them and their states."""

import copy
import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ocnopt
from ocnopt.optim import SNOpt, matrices
from ocnopt.optim.arrangement import PADDING, arranged
from ocnopt.optim.blocks import find_blocks

pytestmark = pytest.mark.usefixtures("float64")


class Net(nn.Module):
    """Matrices of several sizes, tall, long, in groups, with and without a bias."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv1d(4, 6, 3, groups=2)
        self.wide, self.tall = nn.Linear(12, 3), nn.Linear(3, 9, bias=False)
        self.cell = nn.GRUCell(9, 5)
        self.last = nn.Linear(5, 2)

    def forward(self, x, *, skips=False):
        h = self.conv(x).flatten(1)
        h = torch.tanh(self.tall(torch.tanh(self.wide(h))))
        return self.last(h[:, :5] if skips else self.cell(h))


def step(model, optimizer, i, **options):
    generator = torch.Generator().manual_seed(i)
    x, y = torch.randn(7, 4, 4, generator=generator), torch.randn(7, 2, generator=generator)
    optimizer.zero_grad()
    (model(x, **options) - y).square().mean().backward()
    optimizer.step()


def train(change=None, steps=24):
    """Parameters after some steps, with something done before each of them."""
    model = Net()
    optimizer = SNOpt(model)
    for i in range(steps):
        model, optimizer = (change and change(i, model, optimizer)) or (model, optimizer)
        step(model, optimizer, i)
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), optimizer


def count(optimizer):
    return len(optimizer._stacks._stacks)


def bases(optimizer):
    return {p: state["input_vectors"].clone() for p, state in optimizer.state.items() if "input_vectors" in state}


def check_beside_alone(seed, make, before, forward, monkeypatch):
    """Each step, from one and the same state, beside that of matrices each in a stack of its own.

    Where an eigenbasis is made, rounding decides about its vectors in the null space: those steps are not compared.
    """
    compared = 0
    one, two = Net(seed), Net(seed)
    first, second = make(one), make(two)
    for i in range(26):
        two.load_state_dict(one.state_dict())
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        for model, optimizer in ((one, first), (two, second)):
            before(i, model, optimizer)
        last = bases(first)
        monkeypatch.setattr("ocnopt.optim.arrangement.PADDING", PADDING)
        step(one, first, i, **forward(i))
        monkeypatch.setattr("ocnopt.optim.arrangement.PADDING", -1)
        step(two, second, i, **forward(i))
        assert count(first) < count(second)
        is_same = last.keys() == bases(first).keys() and all(map(torch.equal, last.values(), bases(first).values()))
        is_same = is_same or i in (10, 20)  # bases follow those of before
        compared += is_same
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            if is_same:
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
            state, other = first.state[p], second.state[q]
            for key in ("momentum", "input_factor", "output_factor", "step"):
                assert (key in state) == (key in other)
                if key in state:
                    torch.testing.assert_close(state[key], other[key], rtol=1e-9, atol=1e-12)
    assert compared > 12


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"power": 1.0, "length": "division", "adaptation": 0.0},
        {"weight_decay": 0.1, "momentum": 0.0},
        {"curvature": "mixed"},
    ],
)
def test_as_each_alone(options, seed, monkeypatch):
    check_beside_alone(seed, lambda model: SNOpt(model, **options), lambda *_: None, lambda i: {}, monkeypatch)


def groups_of(model):
    """Groups with other momenta and rates, so that parts of a matrix differ."""
    biases = [model.wide.bias, model.last.bias]
    rest = [p for p in model.parameters() if not any(p is bias for bias in biases)]
    return [{"params": rest}, {"params": biases, "lr": 0.003, "momentum": 0.5, "damping": 0.1}]


def thaw(i, model, optimizer):
    model.wide.bias.requires_grad_(i > 7)
    model.tall.weight.requires_grad_(i < 4 or i > 9)


def count_apart(i, model, optimizer):
    if i == 5:
        optimizer.state[model.tall.weight]["step"].zero_()


@pytest.mark.parametrize("before", [thaw, count_apart])
@pytest.mark.parametrize("is_grouped", [True, False])
@pytest.mark.parametrize("turns", [True, False])
def test_as_each_alone_when_they_differ(before, is_grouped, turns, monkeypatch):
    def make(model):
        return SNOpt(model, param_groups=groups_of(model) if is_grouped else None)

    # the cell has gradients now and then
    check_beside_alone(0, make, before, lambda i: {"skips": turns and i % 3 == 1}, monkeypatch)


def replaces(i, model, optimizer):
    """All that the states hold, by copies."""
    for state in optimizer.state.values():
        state.update({key: value.clone() for key, value in state.items() if isinstance(value, torch.Tensor)})


def goes_on(i, model, optimizer):
    """In another optimiser, from its state in a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer = SNOpt(model)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    return model, optimizer


def copies(i, model, optimizer):
    return copy.deepcopy((model, optimizer))


def rolls_back(i, model, optimizer):
    """To a state that was taken before steps which do not count."""
    before, saved = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    for j in range(3):
        step(model, optimizer, 100 + j)
    model.load_state_dict(before)
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("change", [replaces, goes_on, copies, rolls_back])
def test_what_is_put_in_the_place_of_views_is_taken_up_bit_for_bit(change):
    assert torch.equal(train()[0], train(change)[0])


@pytest.mark.parametrize("width", [5, 200])
def test_states_of_two_layers_may_be_exchanged(width):
    ends = []
    for way in ("views", "copies"):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(3)))
        optimizer = SNOpt(model, refresh_every=4)
        for i in range(12):
            if i == 9:
                first, second = model[0].weight, model[1].weight
                one, two = optimizer.state[first], optimizer.state[second]
                if way == "copies":
                    one, two = copy.deepcopy((one, two))
                optimizer.state[first], optimizer.state[second] = two, one
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*ends)


def test_to_another_precision_and_back():
    def goes(i, model, optimizer):
        if i == 6:
            model.float()
            step_in_single(model, optimizer)
            model.double()

    def step_in_single(model, optimizer):
        optimizer.zero_grad()
        model(torch.zeros(3, 4, 4, dtype=torch.float32)).square().mean().backward()
        optimizer.step()

    _, optimizer = train(goes)
    for state in optimizer.state.values():
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
        counts = {key for key in tensors if key.endswith("step") or key == "basis_since"}
        assert {value.dtype for key, value in tensors.items() if key not in counts} == {torch.float64}
        assert {tensors[key].dtype for key in counts} == {torch.float32}


def test_states_are_saved_without_the_memory_around_them():
    _, optimizer = train()
    views = [state["momentum"] for state in optimizer.state.values()]
    assert len({view.untyped_storage().data_ptr() for view in views}) < len(views)
    saved = optimizer.state_dict()["state"].values()
    for value in (value for state in saved for value in state.values() if isinstance(value, torch.Tensor)):
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    for state, own in zip(saved, optimizer.state.values(), strict=True):
        assert all(torch.equal(state[key], own[key]) for key in ("momentum", "change"))


SHAPES = st.lists(st.tuples(st.integers(1, 3), st.integers(2, 40), st.integers(2, 40)), min_size=1, max_size=8)


@given(SHAPES, st.sampled_from([0, 1000, PADDING]))
def test_matrices_are_arranged(shapes, padding):
    convolutions = nn.ModuleList(nn.Conv1d(groups * a, groups * b, 1, groups=groups) for groups, b, a in shapes)
    blocks = find_blocks(convolutions, dict.fromkeys(convolutions.parameters(), ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ocnopt.optim.arrangement.PADDING", padding)
        bins = arranged(blocks)
    assert sorted(id(block) for rows, columns, members in bins for block, _ in members) == sorted(map(id, blocks))
    for rows, columns, members in bins:
        lain = [block.shape[:0:-1] if is_transposed else block.shape[1:] for block, is_transposed in members]
        assert (rows, columns) == tuple(map(max, zip(*lain, strict=True)))
        for (block, is_transposed), (b, a) in zip(members, lain, strict=True):
            in_vain = rows * columns * (rows + columns) - b * a * (b + a)
            assert block.groups * in_vain <= padding
            assert block.groups == 1 or (b == rows and not is_transposed)


def test_gradients_whose_squares_are_infinite_change_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).float()
    optimizer = SNOpt(model)
    for i in range(3):
        optimizer.zero_grad()
        loss = model(torch.ones(5, 3, dtype=torch.float32)).square().mean()
        (loss * (1e21 if i == 2 else 1.0)).backward()
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        if i < 2:
            optimizer.step()
    with pytest.raises(ocnopt.NonFiniteError, match=r"the squares of the gradients of .*0.weight.* are infinite"):
        optimizer.step()
    weights, state = before
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    for index, entry in optimizer.state_dict()["state"].items():
        assert all(
            torch.equal(entry[key], state["state"][index][key])
            for key in ("momentum", "step", "moments")
            if key in entry
        )


@pytest.mark.parametrize("key", ["moments", "input_vectors", "output_values"])
@pytest.mark.parametrize("width", [6, 200])
def test_an_eigenbasis_of_which_a_part_was_deleted_is_made_anew(key, width):
    torch.manual_seed(0)
    model = nn.Linear(width, 5)
    optimizer = SNOpt(model)
    for i in range(12):
        if i == 11:
            del optimizer.state[model.weight][key]
        model.weight.grad, model.bias.grad = torch.randn(5, width), torch.randn(5)
        optimizer.step()
    state = optimizer.state[model.weight]
    vectors = state["input_vectors"]
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(vectors.shape[-1])[None])
    assert {key, "change"} <= state.keys()


def test_a_step_that_is_interrupted_leaves_no_change_to_take_back(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    model = Net()
    optimizer = SNOpt(model)
    for i in range(4):
        step(model, optimizer, i)
    before = copy.deepcopy(model.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(matrices, "move", interrupt)
        with pytest.raises(KeyboardInterrupt):
            step(model, optimizer, 4)
    for p in model.parameters():
        p.grad *= 1e6
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("change" in state for state in optimizer.state.values())
    optimizer.step()
    assert all("change" in state for state in optimizer.state.values())  # it was no step to take back


def test_a_state_dict_that_is_kept_stays_as_it_was():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(4, 5), nn.Linear(200, 5), nn.Linear(170, 180), nn.LayerNorm(5)])
    optimizer = SNOpt(model)

    def move(steps):
        for _ in range(steps):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()

    move(4)
    kept = optimizer.state_dict()
    before = copy.deepcopy(kept)
    move(10)
    for index, entry in kept["state"].items():
        for key, value in entry.items():
            torch.testing.assert_close(value, before["state"][index][key], rtol=0, atol=0)


@pytest.mark.parametrize("skips", [False, True])
def test_momenta_are_kept_in_their_eigenbases(skips):
    """Of matrices that are padded, transposed, in groups, with and without a bias."""
    model = Net()
    optimizer, compared = SNOpt(model, refresh_every=6), 0
    blocks = find_blocks(model, dict.fromkeys(model.parameters(), ""))
    for i in range(20):
        step(model, optimizer, i, skips=skips and i % 3 == 1)
        for block in blocks:
            state = optimizer.state[block.weight]
            if "momentum_core" in state:
                momentum = block.matrix({p: optimizer.state[p]["momentum"] for p in block.parameters})
                expected = state["output_vectors"].mT @ momentum @ state["input_vectors"]
                torch.testing.assert_close(state["momentum_core"], expected, rtol=1e-10, atol=1e-12)
                compared += 1
    assert compared > 90
