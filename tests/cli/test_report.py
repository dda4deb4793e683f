"""Tables and pages: what is shown, and that nothing in it is taken for HTML."""

import io
from html.parser import HTMLParser

import pytest
from rich.console import Console

from ocnopt.cli.report import Image, Section, write_report
from ocnopt.cli.tables import Table, show, to_html

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
    sections = [Section("One", "x < y", [TABLE], [Image("plots/a.png", "a picture")]), Section("Two")]
    path = write_report(tmp_path, "title & more", "lead", sections)
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    assert reader.images == ["plots/a.png"]
    text = " ".join(reader.text)
    for part in ("title & more", "lead", "One", "Two", "x < y", "a < b & c", "lower is better", "a picture"):
        assert part in text
    assert "http" not in path.read_text(encoding="utf-8")
