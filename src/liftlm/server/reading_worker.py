"""A process of its own that turns one uploaded file into text, with little memory, little time and nothing else to reach.

    python -m liftlm.server.reading_worker FILE MEGABYTES SECONDS PAGES CHARACTERS

Prints one line of JSON: {"title", "text"} or {"error", "message", "next_step"}. Whatever a hostile file makes a parser do happens
here and ends with the process. Knows nothing of the server.
"""

from __future__ import annotations

import io
import json
import resource
import sys
from pathlib import Path

from liftlm import errors

_OUTPUT_BYTES = 0  # it writes no files


def main() -> None:
    """Limits first, then the file."""
    path, megabytes, seconds, pages, characters = Path(sys.argv[1]), *map(int, sys.argv[2:6])
    _limit(resource.RLIMIT_AS, megabytes * 2**20)
    _limit(resource.RLIMIT_CPU, seconds)
    _limit(resource.RLIMIT_FSIZE, _OUTPUT_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    try:
        result = _read(path, pages, characters)
    except (MemoryError, errors.NotEnoughMemoryError):
        result = {"error": "MemoryError", "message": "", "next_step": ""}
    except errors.LiftError as error:
        result = {"error": type(error).__name__, "message": error.message, "next_step": error.next_step}
    sys.stdout.buffer.write(json.dumps(result).encode())


def _limit(kind: int, most: int) -> None:
    hard = resource.getrlimit(kind)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def _read(path: Path, pages: int, characters: int) -> dict[str, str]:
    from liftlm.documents import load_document

    data = path.read_bytes()
    if b"%PDF-" in data[:1024]:
        _count_pages(data, pages)
    document = load_document(path)
    if len(document.text) > characters:
        raise errors.TooLargeError(f"The document has more than {characters:,} characters.", "Upload it in parts.")
    return {"title": document.title, "text": document.text}


def _count_pages(data: bytes, most: int) -> None:
    from pdfminer.pdfdocument import PDFDocument
    from pdfminer.pdfpage import PDFPage
    from pdfminer.pdfparser import PDFParser

    try:
        found = sum(
            1
            for _, _ in zip(
                range(most + 1), PDFPage.create_pages(PDFDocument(PDFParser(io.BytesIO(data)))), strict=False
            )
        )
    except MemoryError:
        raise
    except Exception:
        return  # `load_document` says what is wrong with it
    if found > most:
        raise errors.TooLargeError(f"The PDF has more than {most} pages.", "Upload it in parts.")


if __name__ == "__main__":
    main()
