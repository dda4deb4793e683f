"""The walk sees calls, looks through other code, and leaves out what is no call."""

import importlib
import sys

import pytest

from tests.layout.walk import walk

UPPER = """
import functools
import lower

def down(x):
    return lower.work(x)

def through_other_code(x):
    return functools.reduce(lower.add, [x, x])

def hand_down(x):
    return lower.call(observer, x)

def observer(x):
    return inner(x)

def inner(x):
    return x

def pass_generator(x):
    return lower.consume(inner(i) for i in range(x))

def back_and_forth(x):
    return lower.call_back(x)

def late_import(x):
    import late
    return late.value
"""
LOWER = """
def work(x):
    return x + 1

def add(x, y):
    return x + y

def call(function, x):
    return function(x)

def consume(numbers):
    return sum(numbers)

def call_back(x):
    import upper
    return upper.inner(x)
"""
LATE = "import upper\nvalue = upper.down(1)\n"


@pytest.fixture
def upper(tmp_path, monkeypatch):
    (tmp_path / "pack").mkdir()
    for name, source in (("upper", UPPER), ("lower", LOWER), ("late", LATE)):
        (tmp_path / "pack" / f"{name}.py").write_text(source)
    (tmp_path / "linked").symlink_to("pack")
    monkeypatch.syspath_prepend(str(tmp_path / "linked"))
    yield importlib.import_module("upper")
    for name in ("upper", "lower", "late"):
        sys.modules.pop(name, None)


def follow(upper, function, tmp_path, **options):
    return walk(lambda: getattr(upper, function)(3), root=tmp_path, folders=["pack"], **options)


def test_a_call_is_an_edge_and_links_are_resolved(upper, tmp_path):
    result = follow(upper, "down", tmp_path)
    assert result.files == ("pack/upper.py", "pack/lower.py")
    assert result.edges == {("pack/upper.py", "pack/lower.py")}
    assert result.both_ways() == ()
    assert result.result == 4
    assert result.visited(aside=["pack/lower.py"]) == ("pack/upper.py",)


def test_code_in_between_is_looked_through(upper, tmp_path):
    assert follow(upper, "through_other_code", tmp_path).edges == {("pack/upper.py", "pack/lower.py")}


def test_calling_back_is_seen(upper, tmp_path):
    assert follow(upper, "back_and_forth", tmp_path).both_ways() == (("pack/lower.py", "pack/upper.py"),)
    assert follow(upper, "hand_down", tmp_path).both_ways() == (("pack/lower.py", "pack/upper.py"),)


@pytest.mark.parametrize("exclude", ["pack/upper.py::observer", "pack/upper.py"])
def test_observers_can_be_set_aside(upper, tmp_path, exclude):
    assert follow(upper, "hand_down", tmp_path, exclude=[exclude]).both_ways() == ()


def test_excluding_one_name_spares_the_others(upper, tmp_path):
    assert follow(upper, "hand_down", tmp_path, exclude=["pack/upper.py::obs"]).both_ways() != ()


def test_a_generator_handed_down_is_no_call_back(upper, tmp_path):
    assert follow(upper, "pass_generator", tmp_path).both_ways() == ()


def test_what_an_import_runs_is_no_call(upper, tmp_path):
    result = follow(upper, "late_import", tmp_path)
    assert result.files == ("pack/upper.py",)
    assert result.edges == frozenset()


def test_the_profile_function_is_restored_after_an_error():
    before = sys.getprofile()
    with pytest.raises(ZeroDivisionError):
        walk(lambda: 1 / 0)
    assert sys.getprofile() is before
