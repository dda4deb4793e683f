"""``python -m ocnopt`` as a user starts it."""

import subprocess
import sys
from importlib import metadata

import pytest

from tests.layout.tree import ROOT

COMMANDS = ("problems", "solve", "compare", "train", "study", "demo")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ("ocnopt", *COMMANDS)),
        (["solve", "--help"], ("ocnopt", "solve", "Examples:")),
        (["--version"], (f"ocnopt {metadata.version('ocnopt')}",)),
    ],
)
def test_it_is_the_command(arguments, words):
    call = [sys.executable, "-m", "ocnopt", *arguments]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8")
    assert all(word in done.stdout for word in words)
    assert "python -m" not in done.stdout
    assert done.stderr == ""


def test_an_exit_code_is_passed_on():
    call = [sys.executable, "-m", "ocnopt", "solve", "pendulum_swingup"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, check=False, encoding="utf-8")
    assert done.returncode == 2
    assert "did you mean 'pendulum_swing_up'" in done.stdout + done.stderr
