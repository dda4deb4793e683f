"""One page that shows what a run found: tables and plots, no script, images by relative path."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from ocnopt.cli.tables import Table, to_html
from ocnopt.runs import REPORT, write_atomically

_STYLE = """
:root { --ink: #1b1f24; --soft: #5a6470; --line: #d9dee4; --wash: #f5f7f9; --link: #0072b2; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: var(--ink); background: #fff;
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 62rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .5rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
p.lead, p.note { color: var(--soft); }
p.note { font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; margin: .4rem 0; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; background: var(--wash); vertical-align: bottom; }
th:first-child, td:first-child, table.text th, table.text td { text-align: left; }
table.text td:last-child { white-space: normal; min-width: 16rem; }
figure { margin: 1rem 0 1.4rem; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .3rem; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 4px; }
""".strip()


@dataclass(frozen=True)
class Image:
    """A picture in the run's folder.

    Args:
        path: relative to the page.
        caption: what to see in it.
    """

    path: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Args:
        title: its heading.
        text: one paragraph.
        tables: shown in order.
        images: shown below the tables.
    """

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    images: Sequence[Image] = field(default_factory=tuple)


def write_report(folder: Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write the page and return its path.

    Args:
        folder: the run's folder, which holds the images too.
        title: of the page.
        lead: one paragraph below the title.
        sections: in order.
    """
    body = "\n".join(_section(section) for section in sections)
    page = (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{_STYLE}\n</style>\n</head>\n'
        f'<body>\n<h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n{body}\n</body>\n</html>\n'
    )
    path = folder / REPORT
    write_atomically(path, page.encode())
    return path


def _section(section: Section) -> str:
    text = f"<p>{escape(section.text)}</p>" if section.text else ""
    tables = "\n".join(f"<h3>{escape(table.title)}</h3>\n{to_html(table)}" for table in section.tables)
    images = "\n".join(
        f'<figure><img src="{escape(image.path)}" alt="{escape(image.caption)}">'
        f"<figcaption>{escape(image.caption)}</figcaption></figure>"
        for image in section.images
    )
    return f"<section>\n<h2>{escape(section.title)}</h2>\n{text}\n{tables}\n{images}\n</section>"
