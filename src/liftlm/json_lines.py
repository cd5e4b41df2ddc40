"""Files of JSON lines that a user writes or edits: every fault is named by its line.

Knows nothing of what the rows mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from liftlm.errors import LiftError


def read_json_lines(
    path: Path, what: str, error: type[LiftError], where_from: str, like_this: str
) -> list[tuple[str, dict[str, Any]]]:
    """("Line 3 of …", row) for every line that is not blank; there is at least one.

    what: "questions", "tasks"; where_from: what to do where there is no such file; like_this: how a line should look.
    Raises `error`.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise error(f"The {what} file {path} does not exist.", where_from) from None
    except (OSError, UnicodeDecodeError) as failure:
        raise error(f"The {what} file {path} cannot be read: {failure}.", "It must be UTF-8 JSON lines.") from failure
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028 inside a text
        where = f"Line {number} of {path}"
        if not line.strip():
            continue
        rows.append((where, read_json_line(line, where, error, like_this)))
    if not rows:
        raise error(f"The {what} file {path} holds no {what}.", like_this)
    return rows


def read_json_line(line: str, where: str, error: type[LiftError], like_this: str) -> dict[str, Any]:
    """One line's object. Raises `error`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as failure:
        raise error(f"{where} is not JSON: {failure}.", like_this) from None
    if not isinstance(row, dict):
        raise error(f"{where} is not a JSON object.", like_this)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{where} holds half of a surrogate pair, which is no text.", "Mend it.") from None
    return row
