"""The step over layers against the Bellman step of all samples stacked into one state."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ocnopt.differential import layers
from ocnopt.differential.layers import Answer, CostToGo, Diagonal, Factored, Gradients, Scaled, together
from ocnopt.differential.sweep import BellmanStep, bellman_step, sweep
from ocnopt.differential.sweep import CostToGo as Matrix
from ocnopt.linearise import StepCurvature  # noqa: F401 - the annotation of BellmanStep is checked at run time
from tests.oracles.compare import assert_close

B, N_STATES, M_CONTROLS = 4, 3, 5


class Layer:
    """x_i' = A_i x_i + sum_j C_ij u_j for samples i, players j; M_j diagonal; P' -> P by A^T, P_u by C^T."""

    def __init__(self, generator: torch.Generator, players: int = 1) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.A = torch.block_diag(*draw(B, N_STATES, N_STATES))
        self.C = [draw(B * N_STATES, M_CONTROLS) for _ in range(players)]
        self.M = [draw(M_CONTROLS).square() + 0.5 for _ in range(players)]

    def signals(self, P: Tensor) -> list[Tensor]:
        return [C.mT @ P for C in self.C]

    def grams(self, P: Tensor) -> list[Tensor]:
        return [Pu.mT @ (Pu / M[:, None]) for Pu, M in zip(self.signals(P), self.M, strict=True)]

    def step(self, *players: int) -> BellmanStep:
        """The Bellman step of some players together."""
        C, M = torch.cat([self.C[j] for j in players], 1), torch.cat([self.M[j] for j in players])
        size, m = len(self.A), len(M)
        F = torch.block_diag(torch.ones(1, 1, dtype=torch.float64), torch.cat([self.A, C], 1))
        L = torch.zeros(1 + size + m, 1 + size + m, dtype=torch.float64)
        L[1 + size :, 1 + size :] = torch.diag(M)
        return BellmanStep(F, L, None, None, torch.zeros(m, m, dtype=torch.float64))


def columns(generator: torch.Generator) -> tuple[Tensor, CostToGo]:
    """P ``(B n, B)`` with the costate of sample i in its rows, and the value at the end."""
    p = torch.randn(B, N_STATES, 1, generator=generator, dtype=torch.float64)
    factors = torch.rand(B, generator=generator, dtype=torch.float64) + 0.2
    return torch.block_diag(*p), CostToGo(torch.ones(B, dtype=torch.float64), torch.diag(factors))


def matrix(P: Tensor, value: CostToGo) -> Matrix:
    """The value spelt out."""
    size = len(P)
    V = torch.zeros(1 + size, 1 + size, dtype=torch.float64)
    V[0, 1:] = V[1:, 0] = P @ value.v
    V[1:, 1:] = P @ value.root @ value.root.mT @ P.mT
    return Matrix(V, V[0].clone(), torch.tensor(True))


def gain(layer: Layer, j: int, P: Tensor, answer: Answer) -> Tensor:
    """[k  K] of player j in the coordinates of its own states."""
    Px, Pu = layer.A.mT @ P, layer.signals(P)[j]
    return -(Pu / layer.M[j][:, None]) @ torch.cat([answer.v[:, None], answer.S @ Px.mT], 1)


def sweep_columns(chain: Sequence[Layer], step, seed_value, P: Tensor):
    """Values and gains of a chain, P carried beside."""
    Ps = [P]
    for layer in reversed(chain):
        Ps.append(layer.A.mT @ Ps[-1])
    ends = Ps[:-1][::-1]
    value, answers = sweep(
        lambda link, v: step(link, v), [la.grams(e) for la, e in zip(chain, ends, strict=True)], seed_value
    )
    return value, answers, ends, Ps[-1]


@pytest.mark.parametrize("seed", range(5))
def test_a_chain_of_layers_is_the_bellman_sweep_of_the_stacked_samples(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chain = [Layer(generator) for _ in range(4)]
    P, end = columns(generator)
    value, answers, ends, start = sweep_columns(chain, layers.cooperative, end, P)
    truth, gains = sweep(bellman_step, [layer.step(0) for layer in chain], matrix(P, end))
    for layer, answer, own, wanted in zip(chain, answers, ends, gains, strict=True):
        assert_close(gain(layer, 0, own, answer[0]), wanted.K, 1e-10)
    found = matrix(start, value)
    assert_close(found.V[1:], truth.V[1:], 1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_players_who_cooperate_are_one_player_with_all_controls(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = Layer(generator, players=3)
    P, end = columns(generator)
    value, answers = layers.cooperative(layer.grams(P), end)
    truth, wanted = bellman_step(layer.step(0, 1, 2), matrix(P, end))
    assert_close(matrix(layer.A.mT @ P, value).V[1:], truth.V[1:], 1e-10)
    # Each answers to the state and to those before it: rolled out from a change dx they move as the joint gain says.
    dx = torch.randn(len(layer.A), generator=generator, dtype=torch.float64)
    joint = wanted.K[:, 0] + wanted.K[:, 1:] @ dx
    s = (layer.A.mT @ P).mT @ dx
    for j, answer in enumerate(answers):
        du = -(layer.signals(P)[j] / layer.M[j][:, None]) @ answer.weights(s)
        assert_close(du, joint[j * M_CONTROLS : (j + 1) * M_CONTROLS], 1e-9)
        s = s + layer.signals(P)[j].mT @ du


@pytest.mark.parametrize("seed", range(5))
def test_players_with_feedback_answer_alone_and_their_value_is_that_of_the_joint_move(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer = Layer(generator, players=2)
    P, end = columns(generator)
    value, answers = layers.feedback(layer.grams(P), end)
    gains = []
    for j, answer in enumerate(answers):
        _, wanted = bellman_step(layer.step(j), matrix(P, end))
        assert_close(gain(layer, j, P, answer), wanted.K, 1e-10)
        gains.append(wanted.K)
    # The cost of the joint move, spelt out: 1/2 (1, dx', u) on V' and M.
    step, V = layer.step(0, 1), matrix(P, end).V
    s = 1 + len(layer.A)
    policy = torch.cat([torch.eye(s, dtype=torch.float64), torch.cat(gains)])
    closed = step.F @ policy
    truth = closed.mT @ V @ closed + policy.mT @ step.L @ policy
    assert_close(matrix(layer.A.mT @ P, value).V[1:, :], truth[1:, :], 1e-9)


def test_a_single_player_with_feedback_is_one_who_cooperates() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Layer(generator)
    P, end = columns(generator)
    one, other = layers.feedback(layer.grams(P), end)[0], layers.cooperative(layer.grams(P), end)[0]
    assert torch.equal(one.v, other.v)
    assert torch.equal(one.root, other.root)


@pytest.mark.parametrize("is_diagonal", [True, False])
def test_players_are_minimised_out_together_as_one_after_the_other(is_diagonal: bool, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Layer(generator, players=5)
    P, end = columns(generator)
    start = CostToGo(end.v, end.R.diagonal()) if is_diagonal else end
    for at_once in (1, 2, 5):
        monkeypatch.setattr(layers, "_SMALL", at_once * B**2)
        value, answers = layers.cooperative(layer.grams(P), start)
        wanted = end
        for N, answer in zip(reversed(layer.grams(P)), reversed(answers), strict=True):
            wanted, _ = layers.cooperative([N], wanted)
            assert_close(answer.v, wanted.v, 1e-12)
            assert_close(answer.S, wanted.root @ wanted.root.mT, 1e-12)
        assert value.v is answers[0].v
        assert_close(value.root @ value.root.mT, answers[0].S, 1e-12)


def test_open_loop_players_take_their_own_newton_step_and_leave_the_value() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Layer(generator, players=2)
    P, end = columns(generator)
    value, answers = layers.open_loop(layer.grams(P), end)
    assert value is end
    s = torch.randn(B, generator=generator, dtype=torch.float64)
    for j, answer in enumerate(answers):
        k = bellman_step(layer.step(j), matrix(P, end))[1].K[:, 0]
        assert_close(-(layer.signals(P)[j] / layer.M[j][:, None]) @ answer.weights(s), k, 1e-10)


def test_the_published_step_is_rank_one_sample_by_sample() -> None:
    """MATH of OCNOpt: z = sqrt(1 - q_u^T M^-1 q_u) q_x, V_x = Q_x - q_x (q_u^T M^-1 Q_u), with z_T = V_x = p."""
    generator = torch.Generator().manual_seed(1)
    chain = [Layer(generator) for _ in range(3)]
    for layer in chain:
        layer.M = [M * 400 for M in layer.M]  # within the bracket
    P, _ = columns(generator)
    end = CostToGo(torch.ones(B, dtype=torch.float64), torch.ones(B, dtype=torch.float64))
    dx = torch.randn(B * N_STATES, generator=generator, dtype=torch.float64)
    _value, answers, ends, _ = sweep_columns(
        chain, lambda link, v: layers.sample([N.diagonal() for N in link], v), end, P
    )
    for i in range(B):
        z = Vx = P[:, i]
        for layer, own, (answer,) in zip(chain[::-1], ends[::-1], answers[::-1], strict=True):
            M, A, C = layer.M[0], layer.A, layer.C[0]
            qx, qu, Qx, Qu = A.mT @ z, C.mT @ z, A.mT @ Vx, C.mT @ Vx
            w = answer.weights((A.mT @ own).mT @ dx)[i]
            assert_close(layer.signals(own)[0][:, i] * w / M, (Qu + qu * (qx @ dx)) / M, 1e-10)
            bracket = 1 - qu @ (qu / M)
            assert bracket > 0.1
            Vx, z = Qx - qx * (qu @ (Qu / M)), bracket.sqrt() * qx


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("weight", [True, False])
def test_products_of_factored_gradients_are_those_of_the_gradients_spelt_out(bias: bool, weight: bool) -> None:
    if not (bias or weight):
        return
    generator = torch.Generator().manual_seed(2)
    z, g = (torch.randn(B, k, generator=generator, dtype=torch.float64) for k in (6, 3))
    factored = Gradients(z, g, bias=bias, weight=weight)
    spelt = Gradients(of=factored.rows)
    w = torch.randn(B, generator=generator, dtype=torch.float64)
    scales = [torch.rand_like(rows[0]) for rows in factored.rows]
    inputs, outputs = (M @ M.mT for M in (torch.randn(k, k, generator=generator, dtype=torch.float64) for k in (7, 3)))
    metrics = [Scaled(0.3), Diagonal(scales)]
    if weight:
        metrics.append(Factored(0.3, inputs[None, : 6 + bias, : 6 + bias], outputs[None]))
    for metric in metrics:
        assert_close(metric.gram(factored), metric.gram(spelt), 1e-12)
        assert_close(metric.squares(factored), metric.gram(factored).diagonal(), 1e-12)
        assert_close(metric.squares(spelt), metric.gram(factored).diagonal(), 1e-12)
    totals = [torch.rand_like(rows[0]) for rows in factored.rows]
    for one, other, rows, total in zip(
        factored.add_weighted(w, totals), spelt.add_weighted(w, totals), factored.rows, totals, strict=True
    ):
        assert_close(one, total + torch.einsum("i,i...->...", w, rows), 1e-12)
        assert_close(other, one, 1e-12)


@pytest.mark.parametrize("kind", [{"bias": True}, {"bias": False}, {"bias": True, "weight": False}], ids=str)
def test_products_of_small_layers_are_those_of_each_layer_alone(kind: dict[str, bool], monkeypatch) -> None:
    owns = [Gradients(torch.randn(B, a), torch.randn(B, b), **kind) for a, b in ((6, 3), (3, 3), (3, 1))]
    players = [(Scaled(scale), own) for scale, own in zip((0.3, 0.2, 0.1), owns, strict=True)]
    wanted = [metric.gram(own) for metric, own in players]
    for limit in (3 * B**2, 3 * B**2 - 1):
        monkeypatch.setattr(layers, "_SMALL", limit)
        for one, other in zip(layers.grams(players), wanted, strict=True):
            assert_close(one, other, 1e-6)


def test_players_of_several_kinds_are_taken_one_by_one() -> None:
    z, g = torch.randn(B, 6), torch.randn(B, 3)
    owns = [Gradients(z, g, bias=True), Gradients(z, g), Gradients(of=[torch.randn(B, 2, 2)])]
    mixed = [(Scaled(0.3), own) for own in owns]
    mixed.append((Diagonal([torch.rand(3, 6), torch.rand(3)]), owns[0]))
    for players in (mixed, mixed[:2], mixed[1:3], mixed[::3]):
        for one, (metric, own) in zip(layers.grams(players), players, strict=True):
            assert torch.equal(one, metric.gram(own))


def test_the_samples_of_two_passes_are_one_batch() -> None:
    z, g, rows = torch.randn(B, 6), torch.randn(B, 3), torch.randn(B, 2, 2)
    whole = Gradients(z, g, bias=True)
    halves = together([Gradients(z[:1], g[:1], bias=True), Gradients(z[1:], g[1:], bias=True)])
    assert torch.equal(Scaled(1.0).gram(whole), Scaled(1.0).gram(halves))
    assert torch.equal(together([Gradients(of=[rows[:2]]), Gradients(of=[rows[2:]])]).rows[0], rows)


def test_the_scale_of_a_wide_matrix_counts_as_the_outer_product_of_its_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_MANY", 0)
    z, g = torch.randn(B, 6, dtype=torch.float64), torch.randn(B, 3, dtype=torch.float64)
    down, across = torch.rand(3, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    scales = [down[:, None] * across, torch.rand(3, dtype=torch.float64)]
    own = Gradients(z, g, bias=True)
    assert_close(Diagonal(scales).gram(own), Diagonal(scales).gram(Gradients(of=own.rows)), 1e-12)
