"""Every guide's code runs, block after block in one namespace, as a reader would paste it."""

import re
from pathlib import Path

import pytest

GUIDES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))


def test_there_are_guides():
    assert {guide.stem for guide in GUIDES} >= {
        "layerwise-feedback",
        "mpc",
        "first-problem",
        "batches",
        "staged-problems",
        "density-estimation",
        "time-series",
        "from-torchdiffeq",
        "snopt",
        "adjoints",
        "evaluations",
    }


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_the_code_of_a_guide_runs(guide, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL)
    assert blocks
    exec(compile("\n".join(blocks), guide.name, "exec"), {"__name__": guide.stem})
