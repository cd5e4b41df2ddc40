"""From a file or standard input to a Document: plain text, Markdown, HTML, PDF, EPUB, DOCX (PPTX, XLSX with extras).

Knows formats, encodings and titles; the content decides, and the file name only where the content leaves it open. Knows
nothing of tokens, segments or models; reads local bytes only, fetches nothing and writes nothing.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import html
import io
import logging
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from liftlm import errors

MAX_DECOMPRESSED_BYTES = 512 * 2**20  # of all members of an EPUB or DOCX together; more is taken for a zip bomb
MAX_TITLE_CHARACTERS = 200
UNTITLED = "Untitled document"
SUPPORTED_FORMATS = "plain text (source code, CSV and JSON included), Markdown, HTML, PDF, EPUB or DOCX"

_MARKDOWN_SUFFIXES = frozenset({".md", ".markdown", ".mdown", ".mkd", ".mdx", ".qmd", ".rmd"})
_CONTAINER_SUFFIXES = {".pdf": "PDF", ".epub": "EPUB", ".docx": "DOCX", ".pptx": "PPTX", ".xlsx": "XLSX"}


@dataclass(frozen=True)
class Document:
    """One long input. title: shown in prompts; text: plain text or Markdown; source: file name or "standard input"."""

    title: str
    text: str
    source: str = ""

    @cached_property
    def id(self) -> str:
        """SHA-256 of the text as UTF-8, 64 hex characters: the same text is the same document under any title."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()


def load_document(path: str | Path, title: str | None = None, stdin: BinaryIO | None = None) -> Document:
    """Read the file at `path` ("-": standard input) into a Document; every failure is a LiftError."""
    if title is not None and not (title := _one_line(title)):
        raise errors.ConfigError("The title is blank.", "Give a title with a visible character, or leave it out.")

    if str(path) == "-":
        source, suffix, data = "standard input", "", _read_stdin(stdin)
    else:
        path = Path(path)
        data = _read_file(path)
        source, suffix = path.name.encode("utf-8", "replace").decode(), path.suffix.lower()

    kind, text, embedded_title = _container_kind(data, suffix, source), "", ""
    if kind == "text":
        text = _decode(data, suffix, source)
        if text.strip() and (_HTML_START.match(text, 0, 4096) or suffix in (".html", ".htm", ".xhtml")):
            kind, data = "HTML", text.encode("utf-8", "replace")
        elif text.strip() and suffix in _CONTAINER_SUFFIXES:
            raise _damaged(source, _CONTAINER_SUFFIXES[suffix])
    if kind != "text":
        text, embedded_title = _convert(data, kind, source)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    _refuse_empty(text, kind, source)
    return Document(title or _find_title(text, kind, suffix, embedded_title, source), text, source)


def _read_stdin(stdin: BinaryIO | None) -> bytes:
    try:
        return (stdin or sys.stdin.buffer).read()  # looked up now: tests and servers replace sys.stdin
    except (OSError, ValueError, AttributeError) as error:  # closed; or None, in a process without standard input
        message = f"Standard input could not be read ({error})."
        raise errors.UnreadableDocumentError(message, "Pipe a document in, or give a file instead of -.") from error


def _read_file(path: Path) -> bytes:
    not_found, unreadable = errors.DocumentNotFoundError, errors.UnreadableDocumentError
    if re.match(r"(?i)(https?|ftp|file):/", str(path)):  # Path() has made one slash of two
        raise not_found(f'"{path}" is an address, not a file.', "Download it first: only local files are read.")
    try:
        if path.is_dir():  # asked first: reading a folder is a PermissionError on Windows
            raise not_found(f'"{path}" is a folder, not a document.', "Give one file inside it.")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL in the path
        raise not_found(f'There is no file "{path}".', _near_miss(path)) from error
    except PermissionError as error:
        raise unreadable(f'Permission to read "{path}" was denied.', "Change its permissions or copy it.") from error
    except OSError as error:
        reason = error.strerror or error
        raise unreadable(f'"{path}" could not be read ({reason}).', "Check the path and the disk it is on.") from error


def _near_miss(path: Path) -> str:
    """The next step for a missing file: a file beside it with almost that name, where there is one."""
    try:
        with os.scandir(path.parent) as entries:
            names = {entry.name.lower(): entry.name for entry in islice(entries, 5000)}
    except (OSError, ValueError):
        return "Check the path: its folder does not exist or cannot be read."
    close = difflib.get_close_matches(path.name.lower(), list(names), n=1)
    return f'Did you mean "{path.parent / names[close[0]]}"?' if close else "Check the path and the spelling."


_HTML_START = re.compile(r"(?is)\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html[\s>])")
# (offset, bytes, name); looked at only when the bytes are not valid UTF-8, so that prose may start with any of them.
_MAGIC = (
    (0, b"\x89PNG", "a PNG image"), (0, b"\xff\xd8\xff", "a JPEG image"), (0, b"GIF8", "a GIF image"),
    (0, b"II*\0", "a TIFF image"), (0, b"MM\0*", "a TIFF image"), (8, b"WEBP", "a WebP image"),
    (8, b"WAVE", "WAV audio"), (0, b"ID3", "MP3 audio"), (0, b"\xff\xfb", "MP3 audio"), (0, b"fLaC", "FLAC audio"),
    (0, b"OggS", "Ogg audio"), (4, b"ftyp", "MP4 audio or video"), (8, b"AVI ", "AVI video"),
    (0, b"\x1aE\xdf\xa3", "Matroska or WebM video"), (0, b"\x1f\x8b", "a gzip archive"), (0, b"BZh", "a bzip2 archive"),
    (0, b"\xfd7zXZ\0", "an xz archive"), (0, b"7z\xbc\xaf'\x1c", "a 7-Zip archive"), (0, b"Rar!", "a RAR archive"),
    (0, b"(\xb5/\xfd", "a Zstandard archive"), (257, b"ustar", "a tar archive"), (0, b"\x7fELF", "an ELF program"),
    (78, b"This program", "a Windows program"), (0, b"\xcf\xfa\xed\xfe", "a macOS program"),
    (6, b"\0\0\0\0\x36\0\0\0", "a BMP image"), (0, b"SQLite format 3\0", "an SQLite database"),
)  # fmt: skip
_UNSUPPORTED_SUFFIXES = {
    "image": "png jpg jpeg gif bmp tif tiff webp heic ico psd",
    "sound or video file": "mp3 wav flac ogg m4a aac wma mp4 avi mov mkv webm wmv",
    "archive": "zip gz tgz bz2 xz 7z rar tar zst iso dmg jar",
    "program": "exe dll so dylib bin o class pyc wasm msi apk",
    "document": "doc xls ppt odt ods odp mobi azw azw3 djvu pages",
    "data file": "db sqlite parquet npy npz pkl pt safetensors gguf h5 ttf otf woff woff2",
}


def _container_kind(data: bytes, suffix: str, source: str) -> str:
    """PDF, EPUB, DOCX, PPTX or XLSX when the bytes say so, else "text"; raises for what only looks like one."""
    if data[:1024].lstrip().startswith(b"%PDF-") or (suffix == ".pdf" and b"%PDF-" in data[:1024]):
        return "PDF"
    if data.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _zip_kind(data, suffix, source)
    if data.startswith(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"):  # OLE, the container of both
        message = f'"{source}" is an old .doc or password-protected Office file.'
        raise errors.EncryptedDocumentError(message, "Save it as .docx without a password and load that.")
    if data.startswith(b"{\\rtf"):  # valid UTF-8, but nothing to learn from
        raise _unknown(source, "an RTF document")
    return "text"


def _zip_kind(data: bytes, suffix: str, source: str) -> str:
    try:
        members = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except Exception as error:
        raise _damaged(source, _CONTAINER_SUFFIXES.get(suffix, "ZIP, EPUB or Office")) from error
    # zipfile never yields more than a member's declared size, so the sum of those is a true bound.
    if sum(member.file_size for member in members) > MAX_DECOMPRESSED_BYTES:
        message = f'"{source}" would unpack to more than {MAX_DECOMPRESSED_BYTES / 2**20:g} MiB.'
        raise errors.UnreadableDocumentError(message, "Convert it to plain text first.")
    if any(member.flag_bits & 1 for member in members):
        raise _encrypted(source)

    names = {member.filename for member in members}
    if "META-INF/container.xml" in names or b"mimetypeapplication/epub+zip" in data[:100]:
        return "EPUB"
    if "[Content_Types].xml" in names:
        for folder, kind in (("word/", "DOCX"), ("ppt/", "PPTX"), ("xl/", "XLSX")):
            if any(name.startswith(folder) for name in names):
                return kind
    if suffix in _CONTAINER_SUFFIXES:
        raise _damaged(source, _CONTAINER_SUFFIXES[suffix])
    raise _unknown(source, "an OpenDocument file" if "META-INF/manifest.xml" in names else "a ZIP archive")


def _known_format(data: bytes, suffix: str) -> str:
    """The name of a format that is no document, "" if it is none we know. `data` is not valid UTF-8 text."""
    found = next((name for offset, magic, name in _MAGIC if data.startswith(magic, offset)), "")
    names = (f"{suffix} {noun}" for noun, known in _UNSUPPORTED_SUFFIXES.items() if suffix[1:] in known.split())
    return found or next((f"a {name}" for name in names), "")


_CONTROL_BYTES = bytes(byte for byte in range(32) if byte not in b"\t\n\v\f\r\x1a\x1b") + b"\x7f"
# What HTML, XML, Python and Emacs files declare, when it is neither UTF-8 nor the Western Windows-1252 or its subsets.
_DECLARES_OTHER = re.compile(
    rb"(?i)(?:charset|coding)\s*[=:]\s*[\"']?(?!utf-?8|us-ascii|iso-8859-1\b|latin-?1\b|windows-1252|cp1252)[\w.:-]+"
)
# Encodings that fit other texts too well to be believed: UTF-16 without its mark, rare Latin code pages.
_IMPROBABLE = ["utf_7", "utf_16", "utf_16_be", "utf_16_le", "utf_32"]
_IMPROBABLE += ["mac_roman", "mac_iceland", "mac_latin2", "mac_turkish", "hp_roman8"]


def _decode(data: bytes, suffix: str, source: str) -> str:
    text = _decode_unicode(data)
    if text is not None and "\0" not in text:
        return text
    known = _known_format(data, suffix)
    if known:
        raise _unknown(source, known)
    if suffix in _CONTAINER_SUFFIXES:
        raise _damaged(source, _CONTAINER_SUFFIXES[suffix])
    legacy = _decode_legacy(data) if text is None and b"\0" not in data else None
    if legacy is None:
        message = f'"{source}" is neither text nor a document that can be converted.'
        raise errors.BinaryDocumentError(message, f"Give {SUPPORTED_FORMATS}; save text as UTF-8.")
    return legacy


def _decode_unicode(data: bytes) -> str | None:
    encoding = "utf-8-sig"
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # asked first: one begins with a mark of UTF-16
        encoding = "utf-32"
    elif data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _decode_legacy(data: bytes) -> str | None:
    """Text in an encoding older than Unicode, or None. `data` is not valid UTF-8 and has no NUL."""
    from charset_normalizer import from_bytes

    if (len(data) - len(data.translate(None, _CONTROL_BYTES))) * 100 > len(data):
        return None  # one random byte in ten is a control character, of text in these encodings none
    # UTF-8 with a few broken bytes, such as a download cut inside a character: many sequences are right, few wrong.
    repaired = data.decode("utf-8", "replace")
    if len(repaired) - len(repaired.encode("ascii", "ignore")) > 11 * repaired.count("\ufffd"):
        return repaired
    # charset-normalizer 3 takes much Western text for its first equal guess, cp1250 ("Café crčme"), and dense Finnish
    # for nothing at all. Where accents stand alone (other scripts come in runs) and the Western reading is about as
    # clean as the best, it is the likelier one; browsers agree.
    runs = re.findall(rb"[\x80-\xff]+", data)
    alone = sum(map(len, runs)) < 1.6 * len(runs) and not _DECLARES_OTHER.search(data, 0, 4096)
    best, western = from_bytes(data, cp_exclusion=_IMPROBABLE).best(), from_bytes(data, cp_isolation=["cp1252"]).best()
    if alone and (best is None or (western is not None and western.chaos <= best.chaos + 0.05)):
        return data.decode("cp1252", "replace")
    return None if best is None else data.decode(best.encoding, "replace")  # above 10 MB it has tried samples only


def _convert(data: bytes, kind: str, source: str) -> tuple[str, str]:
    """(text, title found inside the file or "") of a container or an HTML page."""
    try:
        with _silence():
            text, title = _convert_pdf(data, source) if kind == "PDF" else _convert_with_markitdown(data, kind, source)
    except errors.LiftError:
        raise
    except ImportError as error:  # of markitdown, or of one of its optional parts
        package = "markitdown" if kind in ("HTML", "EPUB") else f'"markitdown[{kind.lower()}]"'
        message = f'"{source}" is in {kind} format, and the package that reads it is not installed.'
        raise errors.UnknownFormatError(message, f"Run: pip install {package}") from error
    except MemoryError as error:
        raise errors.NotEnoughMemoryError(f'"{source}" does not fit in memory.', "Split it into parts.") from error
    except Exception as error:  # converters raise anything from KeyError to AssertionError on a damaged file
        raise _damaged(source, kind) from error
    # NUL and lone surrogates come from broken font tables; the rest is what MarkItDown().convert() does to each result.
    text = text.replace("\0", "").encode("utf-8", "replace").decode()
    text = "\n".join(line.rstrip() for line in re.split(r"\r?\n", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip(), title


def _convert_with_markitdown(data: bytes, kind: str, source: str) -> tuple[str, str]:
    # The single converters, not MarkItDown().convert(): that runs a neural format detector (magika) we have no need of,
    # and passes a damaged file on to its other converters. The import takes 0.7 s either way (0.4 s without pandas).
    from markitdown import MissingDependencyException, StreamInfo, converters

    # The two algorithms excepted hide embedded fonts only; any other is a shop's copy protection.
    protection = _member(data, kind, "META-INF/encryption.xml")
    algorithms = re.findall(r"EncryptionMethod[^>]*Algorithm\s*=\s*[\"']([^\"']+)", protection)
    if any(not name.endswith(("/embedding", "pdf/enc#RC")) for name in algorithms):
        raise _encrypted(source)
    converter = getattr(converters, f"{kind.capitalize()}Converter")()
    try:
        result = converter.convert(io.BytesIO(data), StreamInfo(extension=f".{kind.lower()}", charset="utf-8"))
    except MissingDependencyException as error:
        raise ImportError(str(error)) from error
    office_title = re.search("<dc:title[^>]*>([^<]*)", _member(data, kind, "docProps/core.xml"))
    return result.markdown, html.unescape(office_title[1]) if office_title else result.title or ""


def _member(data: bytes, kind: str, name: str) -> str:
    if kind == "HTML":
        return ""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(name).decode("utf-8", "replace") if name in archive.namelist() else ""


def _convert_pdf(data: bytes, source: str) -> tuple[str, str]:
    # pdfminer as markitdown itself runs it on prose, but always: if one page looks like a form, markitdown 0.1 reads
    # all others with pdfplumber, which loses the spaces of justified text and makes tables of paragraphs (on a 17-page
    # specification 64 % of the letters stood in runs longer than 20, here 0.3 %), and takes twice as long.
    from pdfminer import high_level, pdfdocument, pdfpage, pdfparser, pdftypes, utils

    try:
        document = pdfdocument.PDFDocument(pdfparser.PDFParser(io.BytesIO(data)))
    except (pdfdocument.PDFPasswordIncorrect, pdfdocument.PDFEncryptionError) as error:
        raise _encrypted(source) from error
    if next(pdfpage.PDFPage.create_pages(document), None) is None:
        raise ValueError("no pages")  # a cut file, not to be called a scan
    title = next((pdftypes.resolve1(info["Title"]) for info in document.info if "Title" in info), b"")
    return high_level.extract_text(io.BytesIO(data)), utils.decode_text(title) if isinstance(title, bytes) else ""


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the converters' warnings and log lines off the terminal, and leave all other loggers alone."""
    loggers = map(logging.getLogger, ("pdfminer", "bs4", "mammoth", "markitdown", "openpyxl", "pptx"))
    levels = {logger: logger.level for logger in loggers}
    for logger in levels:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


# What programs fill in when the author did not: "Microsoft Word - thesis.doc", "untitled", "Document1", "paper.dvi".
_PLACEHOLDER_TITLE = re.compile(
    r"(?i)untitled.*|unknown|none|(microsoft )?(word|powerpoint|excel) ?(-.*|document|presentation)"
    r"|(document|presentation) ?\d*|[^ ]+\.(docx?|pptx?|xlsx?|pdf|tex|dvi|ps|indd|qxd|rtf|odt|html?|txt|md)"
)


def _find_title(text: str, kind: str, suffix: str, embedded_title: str, source: str) -> str:
    embedded_title = _one_line(embedded_title)
    if _PLACEHOLDER_TITLE.fullmatch(embedded_title) or not any(map(str.isalnum, embedded_title)):
        embedded_title = ""
    from_stdin = source == "standard input"
    is_markdown = suffix in _MARKDOWN_SUFFIXES or (from_stdin and not text.startswith("#!"))
    headed = is_markdown if kind == "text" else kind != "PDF"  # elsewhere a line that begins with "# " is a comment
    candidates = [_heading_title(text) if headed else "", embedded_title]
    if kind == "EPUB":  # a book's first heading is often "Contents" or "Chapter 1"
        candidates.reverse()
    if kind == "text":
        candidates.append(_labelled_title(text))
    candidates.append(UNTITLED if from_stdin else _one_line(re.sub(r"[-_]", " ", Path(source).stem)))
    return next(filter(None, candidates), UNTITLED)


def _heading_title(text: str) -> str:
    """The first `# heading` in the first 20 non-empty lines, outside front matter and fenced code."""
    fenced, body = False, re.sub(r"(?s)\A---[ \t]*\n.*?\n(?:---|\.\.\.)[ \t]*(?:\n|\Z)", "", text)
    for line in islice((line for line in body.split("\n") if line.strip()), 20):
        if line.lstrip().startswith(("```", "~~~")):
            fenced = not fenced
        heading = re.match(r" {0,3}#[ \t]+(.+)", line[:1000])
        if heading and not fenced:
            plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)|[*`]+|<[^>]+>|\s#+\s*$", r"\1", heading[1])  # links, emphasis
            if title := _one_line(re.sub(r"\\([^A-Za-z0-9\s])", r"\1", plain)):
                return title
    return ""


def _labelled_title(text: str) -> str:
    """The `Title: …` line that Project Gutenberg's plain texts have near the top."""
    matches = (re.match(r"Title:\s+(.+)$", line) for line in islice(io.StringIO(text), 50))
    return next((_one_line(match[1]) for match in matches if match), "")


def _one_line(title: str) -> str:
    """White space collapsed, unprintable characters (terminal codes, surrogates) dropped, at most 200 characters."""
    line = " ".join("".join(c for c in " ".join(title.split()) if c.isprintable()).split())
    return line if len(line) <= MAX_TITLE_CHARACTERS else line[: MAX_TITLE_CHARACTERS - 1].rstrip() + "…"


def _refuse_empty(text: str, kind: str, source: str) -> None:
    if kind == "EPUB":  # markitdown begins every book with a block of **Title:** … lines
        text = re.sub(r"\A(?:\*\*\w+:\*\* .*(?:\n|\Z))+", "", text)
    if kind == "PDF":
        text = re.sub(r"\(cid:\d+\)", "", text)  # glyphs without a letter
    elif kind != "text":
        text = re.sub(r"!\[[^\]\n]{0,999}\]\([^)\n]{0,999}\)", "", text)  # pictures alone are nothing to read
    if text.strip():
        return
    if kind == "PDF":
        message = f'"{source}" has no text layer: its pages are pictures (a scan).'
        raise errors.EmptyDocumentError(message, "Run optical character recognition (OCR, for example ocrmypdf) on it.")
    state = "has no text in it" if kind != "text" else "has only white space in it" if text else "is empty"
    raise errors.EmptyDocumentError(f'"{source}" {state}.', "Give a document with some text.")


def _encrypted(source: str) -> errors.LiftError:
    return errors.EncryptedDocumentError(f'"{source}" needs a password.', "Save a copy without it and load that.")


def _damaged(source: str, kind: str) -> errors.LiftError:
    return errors.UnreadableDocumentError(f'"{source}" is a damaged {kind} file.', "Save it again, or get a new copy.")


def _unknown(source: str, name: str) -> errors.LiftError:
    message = f'"{source}" is {name}, which cannot be converted to text.'
    return errors.UnknownFormatError(message, f"Give {SUPPORTED_FORMATS}.")
