"""Tables and pages: what is shown, and that nothing in it is taken for HTML."""

import io
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from ocnopt.cli import report
from ocnopt.cli.control import draw_system
from ocnopt.cli.report import Section, write_report
from ocnopt.cli.tables import Table, show, to_html
from ocnopt.problems import control
from ocnopt.runs import RunFolder
from ocnopt.solvers.solution import load_solution

TABLE = Table("result", ("solver", "cost"), [("ddp", "1.5"), ("a < b & c", "2")], note="lower is better")


class Reader(HTMLParser):
    """Collects tags and text, and checks that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in ("img", "meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_table_on_the_terminal():
    console = Console(width=60, file=io.StringIO())
    show(console, TABLE)
    text = console.file.getvalue()
    assert "solver" in text
    assert "a < b & c" in text
    assert "lower is better" in text


@pytest.mark.parametrize("text", [False, True])
def test_a_narrow_terminal_cuts_no_figure(text):
    """What is too wide runs over the edge; only the last column of a text is folded."""
    rows = [("ddp", "0.7617172453  (difference +1.1e-10)", "a sentence of words"), ("casadi", "0.7617172454", "short")]
    console = Console(width=20, file=io.StringIO())
    show(console, Table("result", ("solver", "cost so far", "what"), rows, text=text))
    output = console.file.getvalue()
    for part in ("casadi", "cost so far", "0.7617172453  (difference +1.1e-10)", "0.7617172454", "sentence", "words"):
        assert part in output


def test_a_table_without_heads_has_none():
    assert "<th>" not in to_html(Table("", ("", ""), [("cost", "1")], text=True))
    assert to_html(TABLE).count("<th>") == 2


def test_a_page_is_whole(tmp_path):
    (tmp_path / "plots").mkdir()
    sections = [Section("One", "x < y", [TABLE], [report.Image("plots/a.png", "a picture")]), Section("Two")]
    path = write_report(tmp_path, "title & more", "lead", sections)
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    assert reader.images == ["plots/a.png"]
    text = " ".join(reader.text)
    for part in ("title & more", "lead", "One", "Two", "x < y", "a < b & c", "lower is better", "a picture"):
        assert part in text
    assert "http" not in path.read_text(encoding="utf-8")


@pytest.mark.usefixtures("painted")
def test_the_page_of_a_solve_shows_the_system(run, tmp_path):
    assert run("solve", "mimo_lqr_two_masses", "--steps", "20", "--out", "here")[0] == 0
    folder = tmp_path / "here"
    reader = Reader()
    reader.feed((folder / "report.html").read_text(encoding="utf-8"))
    assert reader.images == ["plots/solution.png", "plots/system.gif", "plots/system.png"]
    assert "The system" in reader.text
    assert {path.name for path in (folder / "plots").iterdir()} == {Path(image).name for image in reader.images}
    with Image.open(folder / "plots" / "system.gif") as film:
        assert film.n_frames > 30


def test_a_system_without_a_drawing_or_without_a_finite_path_has_no_picture(run, tmp_path):
    assert run("solve", "catalyst_mixing_T1", "--steps", "20", "--out", "here")[0] == 0
    assert "The system" not in (tmp_path / "here" / "report.html").read_text(encoding="utf-8")
    found = load_solution(tmp_path / "here" / "checkpoint.pt")
    lost = replace(found, states=torch.full_like(found.states, torch.nan))
    assert draw_system(RunFolder(tmp_path, {}), control("pendulum_swing_up"), lost) == []


def test_the_list_of_problems_tells_their_sizes(run):
    _, output = run("problems", "--kind", "control")
    assert "(1 state, 1 control)" in output
    assert "(6 states, 2 controls, best T 1.265249)" in output
