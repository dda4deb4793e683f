"""The fold that every backward pass goes through."""

from functools import reduce

from hypothesis import given
from hypothesis import strategies as st

from ocnopt.differential.sweep import sweep

words = st.text(max_size=3)


def test_stages_are_visited_from_the_end_and_readouts_come_in_the_order_of_the_path():
    visited = []

    def step(stage, value):
        visited.append(stage)
        return f"{stage}({value})", stage.upper()

    assert sweep(step, ["a", "b", "c"], "end") == ("a(b(c(end)))", ["A", "B", "C"])
    assert visited == ["c", "b", "a"]


def test_no_stage_leaves_the_terminal_value():
    assert sweep(lambda stage, value: (None, None), [], "end") == ("end", [])


def test_anything_reversible_will_do():
    assert sweep(lambda stage, value: (value + stage, stage), range(4), 0) == (6, [0, 1, 2, 3])
    assert sweep(lambda stage, value: (value, stage), {"a": 1, "b": 2}, 0)[1] == ["a", "b"]


@given(stages=st.lists(words), terminal=words)
def test_it_is_the_right_fold(stages, terminal):
    value, readouts = sweep(lambda stage, value: (stage + value, value), stages, terminal)
    assert value == reduce(lambda right, stage: stage + right, reversed(stages), terminal)
    assert readouts == ["".join(stages[i + 1 :]) + terminal for i in range(len(stages))]


@given(before=st.lists(words), after=st.lists(words), terminal=words)
def test_a_path_may_be_cut_anywhere(before, after, terminal):
    def step(stage, value):
        return stage + value, (stage, value)

    middle, later = sweep(step, after, terminal)
    value, earlier = sweep(step, before, middle)
    assert sweep(step, before + after, terminal) == (value, earlier + later)
