"""A page as a list of blocks, and its two forms: Markdown, and HTML in one file. Every text is escaped in both.

Knows nothing of what the page says.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.2; margin: 2rem 0 .5rem; }
h1 { margin-top: 0; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid var(--line); padding: .25rem .5rem; text-align: right; white-space: nowrap; }
th { background: var(--soft); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; }
pre { background: var(--soft); padding: .5rem; margin: .25rem 0 1rem; font-size: .875rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; background: #fff; }
details { margin: .5rem 0; }
summary { cursor: pointer; }
""".strip()


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Verbatim:
    """Text in full, as it is."""

    text: str
    label: str = ""


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    path: Path  # PNG
    name: str  # as the Markdown file refers to it
    caption: str


@dataclass(frozen=True)
class Fold:
    """Blocks that a reader opens."""

    summary: str
    blocks: Sequence[Block]


Block = Heading | Paragraph | Verbatim | Table | Picture | Fold


def to_markdown(blocks: Iterable[Block]) -> str:
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """One file that needs no other and runs no script."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        + "\n".join(_html(block) for block in blocks)
        + "\n</body>\n</html>\n"
    )


def clean(text: str) -> str:
    """Without what no page may hold: control characters and halves of surrogate pairs."""
    return re.sub(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_inline(block.text)}"
    if isinstance(block, Paragraph):
        return _inline(block.text)
    if isinstance(block, Verbatim):
        text = clean(block.text)
        longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
        fence = "`" * max(3, longest + 1)
        label = f"{_inline(block.label)}:\n\n" if block.label else ""
        return f"{label}{fence}text\n{text}\n{fence}"
    if isinstance(block, Table):
        lines = [_row(block.header), "|" + "|".join(["---", *["---:"] * (len(block.header) - 1)]) + "|"]
        return "\n".join([*lines, *(_row(row) for row in block.rows)])
    if isinstance(block, Picture):
        return f"![{_inline(block.caption)}]({block.name})"
    inner = "\n\n".join(_markdown(part) for part in block.blocks)
    return f"<details>\n<summary>{_escape(_one_line(block.summary))}</summary>\n\n{inner}\n\n</details>"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_inline(cell) for cell in cells) + " |"


def _inline(text: str) -> str:
    """On one line, with everything escaped that Markdown or HTML would take for its own: 26.1 [20.3, 31.5] stays readable."""
    return re.sub(r"[\\`*_|~&$]|<(?=[A-Za-z/!?])|\](?=[(\[:])|\[(?=[\^!\[])", r"\\\g<0>", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(clean(text).split())


# --- HTML -------------------------------------------------------------------------------------------------------------


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{_escape(block.text)}</p>"
    if isinstance(block, Verbatim):
        label = f"<div>{_escape(block.label)}:</div>\n" if block.label else ""
        return f"{label}<pre>\n{_escape(block.text)}</pre>"
    if isinstance(block, Table):
        head = "".join(f"<th>{_escape(cell)}</th>" for cell in block.header)
        body = "\n".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows)
        return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
    if isinstance(block, Picture):
        data = base64.b64encode(block.path.read_bytes()).decode()
        return f'<img alt="{_escape(block.caption)}" src="data:image/png;base64,{data}">'
    inner = "\n".join(_html(part) for part in block.blocks)
    return f"<details>\n<summary>{_escape(block.summary)}</summary>\n{inner}\n</details>"


def _escape(text: str) -> str:
    return html.escape(clean(text))
