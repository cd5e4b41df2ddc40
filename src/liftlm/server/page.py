"""The page for the browser: files as they are, no build step, no framework; it uses the same API as every client."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse

_FOLDER = Path(__file__).parent / "page_files"
_FILES = {"/": "index.html", "/docs": "docs.html"} | {
    f"/page/{name}": name for name in ("app.js", "docs.js", "style.css", "icon.svg")
}


def add_page(app: FastAPI) -> None:
    """Adds its addresses; they are no part of the API."""

    def add(address: str, name: str) -> None:
        @app.get(address, include_in_schema=False)
        def get() -> FileResponse:
            return FileResponse(_FOLDER / name, headers={"Cache-Control": "no-cache"})

    for address, name in _FILES.items():
        add(address, name)
