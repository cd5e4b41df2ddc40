"""Every format, title rule, encoding and failure of liftlm.documents; all files are made here, nothing is fetched."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import random
import socket
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from liftlm import documents, errors
from liftlm.documents import Document, load_document

W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
FRENCH = "L'été dernier, Noël et François ont mangé des crêpes à la crème brûlée près de la forêt. Où êtes-vous ?\n"
RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n"
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。ニャーニャー泣いていた。\n"
POLISH = "Zażółć gęślą jaźń. Litwo! Ojczyzno moja! ty jesteś jak zdrowie, ile cię trzeba cenić, ten tylko się dowie.\n"


def from_stdin(data: bytes, title: str | None = None) -> Document:
    return load_document("-", title, stdin=io.BytesIO(data))


def make_zip(members: dict[str, str | bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content, zipfile.ZIP_STORED if name == "mimetype" else None)
    return buffer.getvalue()


def make_docx(body: str = "<w:p><w:r><w:t>Hello from Word</w:t></w:r></w:p>", title: str = "", **more: str) -> bytes:
    package = "http://schemas.openxmlformats.org/package/2006"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    drawing = "http://schemas.openxmlformats.org/drawingml/2006"
    main = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    namespaces = f'{W} xmlns:r="{office}" xmlns:a="{drawing}/main" xmlns:pic="{drawing}/picture" '
    namespaces += f'xmlns:wp="{drawing}/wordprocessingDrawing"'
    members = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
        f'<Override PartName="/word/document.xml" ContentType="{main}"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="r1" '
        f'Type="{office}/officeDocument" Target="word/document.xml"/></Relationships>',
        "word/document.xml": f"{more.pop('prolog', '')}<w:document {namespaces}><w:body>{body}</w:body></w:document>",
        "word/styles.xml": f'<w:styles {W}><w:style w:type="paragraph" w:styleId="Heading1">'
        '<w:name w:val="heading 1"/></w:style></w:styles>',
    }
    if title:
        core = f'<p:coreProperties xmlns:p="{package}/metadata/core-properties"'
        core += f' xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>{title}</dc:title></p:coreProperties>'
        members["docProps/core.xml"] = core
    return make_zip({**members, **more})


def make_epub(chapters: list[str | bytes], title: str = "The Book", **more: str) -> bytes:
    items = "".join(f'<item id="c{i}" href="c{i}.xhtml"/>' for i in range(len(chapters)))
    spine = "".join(f'<itemref idref="c{i}"/>' for i in range(len(chapters)))
    members: dict[str, str | bytes] = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container><rootfiles><rootfile full-path="OPS/b.opf"/></rootfiles></container>',
        "OPS/b.opf": f'<package xmlns:dc="x"><metadata><dc:title>{title}</dc:title></metadata>'
        f"<manifest>{items}</manifest><spine>{spine}</spine></package>",
    }
    members |= {f"OPS/c{i}.xhtml": chapter for i, chapter in enumerate(chapters)}
    return make_zip({**members, **more})


def rc4(key: bytes, data: bytes) -> bytes:
    state, j, out = list(range(256)), 0, bytearray()
    for i in range(256):
        j = (j + state[i] + key[i % len(key)]) % 256
        state[i], state[j] = state[j], state[i]
    i = j = 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + state[i]) % 256
        state[i], state[j] = state[j], state[i]
        out.append(byte ^ state[(state[i] + state[j]) % 256])
    return bytes(out)


def make_pdf(pages: list[str], title: str = "", password: str | None = None) -> bytes:
    """One line of Helvetica a page; `password`: the user password of PDF's standard security handler, revision 2."""
    pad = bytes.fromhex("28BF4E5E4E758A4164004E56FFFA01082E2E00B6D0683E802F0CA9FE6453697A")
    file_id, permissions = b"i" * 16, -4
    user = ((password or "").encode() + pad)[:32]
    owner_entry = rc4(hashlib.md5((b"owner" + pad)[:32]).digest()[:5], user)
    key = hashlib.md5(user + owner_entry + permissions.to_bytes(4, "little", signed=True) + file_id).digest()[:5]

    def encrypted(data: bytes, number: int) -> bytes:
        if password is None:
            return data
        return rc4(hashlib.md5(key + number.to_bytes(3, "little") + b"\0\0").digest()[:10], data)

    kids = " ".join(f"{5 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        f"<</Type/Pages/Count {len(pages)}/Kids[{kids}]>>".encode(),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        b"<</Title<" + encrypted(title.encode("latin-1"), 4).hex().encode() + b">>>",
    ]
    for i, line in enumerate(pages):
        stream = encrypted(f"BT /F1 12 Tf 72 700 Td ({line}) Tj ET".encode("latin-1") if line else b"", 6 + 2 * i)
        page = f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents {6 + 2 * i} 0 R"
        page += "/Resources<</Font<</F1 3 0 R>>>>>>"
        objects += [page.encode(), b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream)]
    trailer = b"/Root 1 0 R/Info 4 0 R"
    if password is not None:
        entries = (owner_entry.hex().encode(), rc4(key, pad).hex().encode(), permissions)
        objects.append(b"<</Filter/Standard/V 1/R 2/O<%s>/U<%s>/P %d>>" % entries)
        trailer += b"/Encrypt %d 0 R/ID[<%s><%s>]" % (len(objects), file_id.hex().encode(), file_id.hex().encode())
    pdf, offsets = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(pdf))
        pdf += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    end = b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<</Size %d%s>>\nstartxref\n%d\n%%%%EOF\n"
    return pdf + end % (size, table, size, trailer, len(pdf))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "a.csv", "a.json", "a.log", "a.tex", "a.rst", "README"])
def test_text_is_kept_verbatim_but_for_newlines_and_the_byte_order_mark(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf  # one\t \r\ntwo  \rthree\n\n\n\n<b>four</b>\x0c  ")
    document = load_document(tmp_path / name)
    assert document.text == "  # one\t \ntwo  \nthree\n\n\n\n<b>four</b>\x0c  "
    assert document.source == name


CONVERTIBLE = {
    "html": (b"<!DOCTYPE html><html><body><h2>Two</h2>Hello <b>bold</b><script>x()</script></body>", "Hello **bold**"),
    "pdf": (make_pdf(["First page", "Second page"]), "First page\n\n\x0cSecond page"),
    "docx": (make_docx(), "Hello from Word"),
    "epub": (make_epub(["<html><body><h1>One</h1><p>It began</p>", "<p>The end</p>"]), "# One\n\nIt began\n\nThe end"),
}


@pytest.mark.parametrize("suffix", CONVERTIBLE)
@pytest.mark.parametrize("name", ["right", "wrong.txt", "wrong.pdf", "wrong.docx", "missing", "-"])
def test_formats_are_recognised_by_content(tmp_path: Path, suffix: str, name: str) -> None:
    data, expected = CONVERTIBLE[suffix]
    path = tmp_path / (f"{name}.{suffix}" if name == "right" else name)
    path.write_bytes(data)
    document = from_stdin(data) if name == "-" else load_document(str(path))
    assert expected in document.text
    assert "x()" not in document.text
    assert document.source == ("standard input" if name == "-" else path.name)


def test_html_variants_and_fragments(tmp_path: Path) -> None:
    xhtml = b'\n<?xml version="1.0"?>\n<!-- a <b> comment -->\n<HTML xmlns="x"><body><p>one &amp; two</p></body></HTML>'
    assert from_stdin(xhtml).text == "one & two"
    assert from_stdin("<!doctype HTML><p>wide".encode("utf-16")).text == "wide"
    declared = '<html><meta charset="windows-1251"><p>' + RUSSIAN
    assert from_stdin(declared.encode("cp1251")).text == RUSSIAN.strip()
    (tmp_path / "part.htm").write_text("<p>only a <i>part</i></p>")
    assert load_document(tmp_path / "part.htm").text == "only a *part*"
    assert from_stdin(b"<htmlish> is no page").text == "<htmlish> is no page"
    deep = b"<html><body>" + b"<div>" * 5000 + b"deep" + b"</div>" * 5000
    assert from_stdin(deep).text == "deep"


def test_a_pdf_table_does_not_cost_the_other_pages_their_spaces() -> None:
    """markitdown 0.1 makes "Permissionisgranted" of it: one form-like page, and all are read through pdfplumber."""
    form = "a) Tj 100 0 Td (b) Tj 100 0 Td (c) Tj 100 0 Td (d"
    justified = "Permission) Tj 61.5 0 Td (is) Tj 11.6 0 Td (granted"  # words placed, as TeX does, without spaces
    text = from_stdin(make_pdf([form, justified])).text
    assert "|" not in text
    assert "Permission is granted" in text


def test_pdf_header_may_come_late_and_an_empty_password_opens() -> None:
    assert from_stdin(b"\n\n" + make_pdf(["late"])).text == "late"
    assert from_stdin(make_pdf(["open to all"], "Opened", password="")).text == "open to all"


def test_office_extras(tmp_path: Path) -> None:
    openpyxl, pptx = pytest.importorskip("openpyxl"), pytest.importorskip("pptx")
    book = openpyxl.Workbook()
    book.active.append(["city", "height"])
    book.active.append(["Bern", 540])
    book.save(tmp_path / "table.xlsx")
    assert "| Bern | 540 |" in load_document(tmp_path / "table.xlsx").text
    slides = pptx.Presentation()
    slides.slides.add_slide(slides.slide_layouts[0]).shapes.title.text = "My talk"
    slides.save(tmp_path / "talk.pptx")
    assert load_document(tmp_path / "talk.pptx").title == "My talk"


@pytest.mark.parametrize("data", [CONVERTIBLE["html"][0], CONVERTIBLE["docx"][0]], ids=["html", "docx"])
def test_a_missing_converter_says_what_to_install(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setitem(sys.modules, "markitdown", None)
    with pytest.raises(errors.UnknownFormatError, match="not installed") as caught:
        from_stdin(data)
    assert "pip install" in caught.value.next_step


def test_standard_input_is_looked_up_when_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"piped")))
    assert load_document("-") == Document("Untitled document", "piped", "standard input")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(errors.UnreadableDocumentError, match="Standard input could not be read"):
        load_document(Path("-"))


def test_id_is_the_hash_of_the_text_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("naïve\n", encoding="utf-8")
    one, two = load_document(tmp_path / "a.txt", title="One"), from_stdin("naïve\r\n".encode("utf-16"), title="Two")
    assert one.id == two.id == hashlib.sha256("naïve\n".encode()).hexdigest()
    assert Document("One", "other").id != one.id


def test_no_torch_ever_and_no_markitdown_for_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.html").write_text("<html><p>text")
    code = f"""if True:
        import sys
        from liftlm.documents import load_document
        load_document({str(tmp_path / "a.txt")!r})
        assert not {{"markitdown", "pdfminer", "charset_normalizer"}} & set(sys.modules)
        load_document({str(tmp_path / "a.html")!r})
        assert not {{"torch", "transformers"}} & set(sys.modules)"""
    environment = {**os.environ, "PYTHONPATH": str(Path(documents.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1), st.text("ab ", max_size=9)
)
def test_any_utf8_text_comes_back(tmp_path: Path, text: str, title: str) -> None:
    expected = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assume(expected.strip() and title.strip())
    (tmp_path / "any.txt").write_bytes(text.encode())
    document = load_document(tmp_path / "any.txt")
    assert document.text == expected
    assert document.id == load_document(tmp_path / "any.txt", title=title).id


@pytest.mark.parametrize(
    ("name", "content", "title"),
    [
        ("my_long-file.txt", "plain", "my long file"),
        ("a.txt", "# Not Markdown\n", "a"),
        ("a.py", "# Copyright\n", "a"),
        (
            "a.txt",
            "\n\nThe Project Gutenberg eBook\n\nTitle:  Moby Dick; Or, The Whale \nA: B",
            "Moby Dick; Or, The Whale",
        ),
        ("a.txt", "x\n" * 50 + "Title: too late", "a"),
        ("a.md", "intro\n\n#  The *Real* [Title](http://x/y) #\n# Second", "The Real Title"),
        ("a.md", "---\n# comment\nlang: en\n---\n```sh\n# shell\n```\n# After \\_all\\_\n", "After _all_"),
        ("a.md", "#hashtag\n## Section\n", "a"),
        ("a.md", "line\n" * 20 + "# Too late", "a"),
        ("a.md", "line\n" * 19 + "# In time", "In time"),
        ("___.txt", "x", "Untitled document"),
        ("bell\x07\udcff.txt", "x", "bell?"),
    ],
)
def test_titles_of_text(tmp_path: Path, name: str, content: str, title: str) -> None:
    (tmp_path / name).write_text(content)
    document = load_document(tmp_path / name)
    assert document.title == title
    document.source.encode()  # an undecodable file name must not break what is written later


@pytest.mark.parametrize(
    ("data", "title"),
    [
        (b"just text", "Untitled document"),
        (b"# A heading\ntext", "A heading"),
        (b"#!/bin/sh\n# a comment\n", "Untitled document"),
        (b"<html><title>\n My\n page </title><p>x", "My page"),
        (b"<html><title>Site</title><h1>Article</h1><p>x", "Article"),
        (b"<html><title>untitled</title><p>x", "Untitled document"),
        (make_pdf(["x"], "On Growth and Form"), "On Growth and Form"),
        (make_pdf(["x"], "Microsoft Word - thesis.doc"), "Untitled document"),
        (make_pdf(["x"], "paper.dvi"), "Untitled document"),
        (make_pdf(["# not a heading"], ""), "Untitled document"),
        (make_docx(title="Fish &amp; Chips"), "Fish & Chips"),
        (make_docx(title="Document1"), "Untitled document"),
        (make_docx('<w:p><w:pPr><w:pStyle w:val="Heading1"/></w:pPr><w:r><w:t>Top</w:t></w:r></w:p>', "Meta"), "Top"),
        (make_epub(["<h1>Contents</h1><p>x</p>"], "Emma"), "Emma"),
        (make_epub(["<h1>Emma I</h1><p>x</p>"], " - "), "Emma I"),
    ],
)
def test_titles_inside_documents(data: bytes, title: str) -> None:
    assert from_stdin(data).title == title


def test_given_titles_win_and_are_one_short_line() -> None:
    assert from_stdin(b"# Heading", title=" My\n\t own \x1b[31m title ").title == "My own [31m title"
    assert from_stdin(b"x", title="y" * 200).title == "y" * 200
    assert from_stdin(b"x", title="y " * 200).title == ("y " * 100)[:-1] + "…"
    for blank in ("", " \n", "\x00"):
        with pytest.raises(errors.ConfigError, match="title is blank"):
            from_stdin(b"x", title=blank)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("text", ["short é", FRENCH * 30, JAPANESE * 30, "plain ASCII\n"])
def test_unicode_encodings(encoding: str, text: str) -> None:
    assert from_stdin(text.encode(encoding)).text == text


@pytest.mark.parametrize("mark, encoding", [(b"\xfe\xff", "utf-16-be"), (b"\0\0\xfe\xff", "utf-32-be")])
def test_big_endian_marks(mark: bytes, encoding: str) -> None:
    assert from_stdin(mark + FRENCH.encode(encoding)).text == FRENCH


@pytest.mark.parametrize("repeats", [1, 200])
@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("latin-1", FRENCH),
        ("latin-1", "Der Fluß führt über schöne Brücken nach Süden; Größe und Übermut.\n"),
        ("latin-1", "El niño comió mañana en España, ¿qué más quieres? ¡Corazón!\n"),
        ("latin-1", "Kaikki ihmiset syntyvät vapaina; määrä, pää ja töölö, hengessä.\n"),
        ("latin-1", "An English sentence about a café that costs £5.\n"),
        ("cp1252", "“Curly quotes,” she said — ‘and dashes’ … it’s 20 € in all, naïve façade.\n"),
        ("cp1251", RUSSIAN),
        ("koi8-r", RUSSIAN),
        ("shift_jis", JAPANESE),
        ("euc_jp", JAPANESE * 10),
        ("cp1250", POLISH),
        ("gb18030", "红楼梦第一回甄士隐梦幻识通灵。此开卷第一回也,作者自云因曾历过一番梦幻之后。\n"),
    ],
)
def test_encodings_older_than_unicode(encoding: str, text: str, repeats: int) -> None:
    assert from_stdin((text * repeats).encode(encoding)).text == text * repeats


def test_a_declared_encoding_is_believed() -> None:
    text = "# -*- coding: iso-8859-2 -*-\n" + POLISH
    assert from_stdin(text.encode("iso-8859-2")).text == text
    western = '<html><meta charset="iso-8859-1"><p>' + FRENCH + "l’œuvre"
    assert "l’œuvre" in from_stdin(western.encode("cp1252")).text


def test_utf8_with_a_few_broken_bytes_stays_utf8() -> None:
    data = (FRENCH * 5).encode()
    assert from_stdin(data + b"\xe2\x80").text == FRENCH * 5 + "\ufffd"


def test_text_may_begin_like_a_known_format() -> None:
    for start in ("GIF89a", "BM", "MZ", "ID3", "BZh", "OggS", "RIFF1234WAVE", "PK", "Rar!"):
        assert from_stdin(f"{start} is how it begins: {FRENCH}".encode()).text.startswith(start)
    assert from_stdin(b"BM " + FRENCH.encode("latin-1")).text == "BM " + FRENCH


def fails_with(error: type[errors.LiftError], message: str, data: bytes, path: Path | None = None) -> errors.LiftError:
    """The error of loading `data`, from the file `path` or standard input; it has to say what to do next."""
    if path is not None:
        path.write_bytes(data)
    with pytest.raises(error, match=message) as caught:
        load_document("-" if path is None else path, stdin=io.BytesIO(data))
    assert type(caught.value) is error
    assert caught.value.next_step.endswith(".")
    assert path is None or f'"{path.name}"' in caught.value.message
    return caught.value


def test_not_found(tmp_path: Path) -> None:
    (tmp_path / "Moby-Dick.txt").write_text("x")
    cases: list[tuple[str | Path, str, str]] = [
        (tmp_path / "moby_dick.txt", "There is no file", f'Did you mean "{tmp_path / "Moby-Dick.txt"}"?'),
        (tmp_path / "zzz.pdf", "There is no file", "spelling"),
        (tmp_path / "no" / "a.txt", "There is no file", "folder does not exist"),
        (tmp_path / "Moby-Dick.txt" / "a.txt", "There is no file", "Check the path"),
        (tmp_path / "nul\0.txt", "There is no file", "spelling"),
        (tmp_path, "is a folder", "one file"),
        ("https://example.org/a.pdf", "is an address", "Download"),
    ]
    for path, message, next_step in cases:
        with pytest.raises(errors.DocumentNotFoundError, match=message) as caught:
            load_document(path)
        assert next_step in caught.value.next_step


@pytest.mark.parametrize("error", [PermissionError(13, "denied"), OSError(5, "Input/output error")])
def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError) -> None:
    def refuse(self: Path) -> bytes:
        raise error

    (tmp_path / "a.txt").write_text("x")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(errors.UnreadableDocumentError, match=r"denied|Input/output error") as caught:
        load_document(tmp_path / "a.txt")
    assert caught.value.__cause__ is error
    with pytest.raises(errors.UnreadableDocumentError, match="too long"):
        load_document(tmp_path / ("x" * 5000))


def test_empty(tmp_path: Path) -> None:
    empty = errors.EmptyDocumentError
    for name in ("a.txt", "a.pdf", "a.docx", "a.html", "a.png"):
        fails_with(empty, "is empty", b"", tmp_path / name)
    fails_with(empty, "only white space", b" \r\n\t\x0c")
    fails_with(empty, "only white space", " \n".encode("utf-16"))
    fails_with(empty, "is empty", b"\xef\xbb\xbf")
    fails_with(empty, "has no text in it", b"<html><body><script>x</script></body></html>")
    fails_with(empty, "has no text in it", b'<html><img src="a.png" alt=""></html>')
    fails_with(empty, "has no text in it", make_docx(""))
    fails_with(empty, "has no text in it", make_epub(['<p><img src="scan.jpg"/></p>']))
    scan = fails_with(empty, "no text layer", make_pdf(["", ""]), tmp_path / "scan.pdf")
    assert "OCR" in scan.next_step


def test_damaged(tmp_path: Path) -> None:
    unreadable, pdf, docx = errors.UnreadableDocumentError, make_pdf(["x"] * 9), make_docx()
    epub = make_epub(["<p>x</p>"], **{"META-INF/container.xml": "<container/>"})
    caught = fails_with(unreadable, "damaged PDF", pdf[:300], tmp_path / "a.pdf")
    assert caught.__cause__ is not None
    fails_with(unreadable, "damaged PDF", b"%PDF-1.4\ngarbage")
    fails_with(unreadable, "damaged PDF", b"no PDF at all", tmp_path / "b.pdf")
    fails_with(unreadable, "damaged DOCX", docx[: len(docx) // 2], tmp_path / "a.docx")
    fails_with(unreadable, "damaged DOCX", docx.replace(b"word/document", b"word/dokument"))
    fails_with(unreadable, "damaged DOCX", make_zip({"a": "b"}), tmp_path / "b.docx")
    fails_with(unreadable, "damaged DOCX", random.Random(0).randbytes(2000), tmp_path / "c.docx")
    fails_with(unreadable, "damaged DOCX", make_docx(**{"word/document.xml": "no XML"}))
    fails_with(unreadable, "damaged EPUB", epub, tmp_path / "a.epub")
    fails_with(unreadable, "damaged EPUB", make_zip({"mimetype": "application/epub+zip"}))
    fails_with(unreadable, "damaged ZIP", docx[:200])


def test_zip_bombs_are_refused_before_they_unpack(monkeypatch: pytest.MonkeyPatch) -> None:
    assert documents.MAX_DECOMPRESSED_BYTES == 512 * 2**20
    monkeypatch.setattr(documents, "MAX_DECOMPRESSED_BYTES", 10 * 2**20)
    for bomb in (make_docx(**{"word/media/a": "0" * 11 * 2**20}), make_epub(["0" * 6 * 2**20] * 2)):
        assert len(bomb) < 2**17
        fails_with(errors.UnreadableDocumentError, "more than 10 MiB", bomb)


def test_encrypted(tmp_path: Path) -> None:
    encrypted = errors.EncryptedDocumentError
    fails_with(encrypted, "needs a password", make_pdf(["secret"], "Secret", password="user"), tmp_path / "a.pdf")
    ole = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600)
    fails_with(encrypted, "old .doc or password-protected Office file", ole, tmp_path / "a.docx")
    locked = '<e><EncryptionMethod Algorithm="http://www.w3.org/2001/04/xmlenc#aes128-cbc"/></e>'
    fonts = '<e><EncryptionMethod Algorithm="http://www.idpf.org/2008/embedding"/></e>'
    fails_with(encrypted, "needs a password", make_epub(["<p>x</p>"], **{"META-INF/encryption.xml": locked}))
    assert "free" in from_stdin(make_epub(["<p>free</p>"], **{"META-INF/encryption.xml": fonts})).text
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "x")
        archive.infolist()[0].flag_bits |= 1
    fails_with(encrypted, "needs a password", buffer.getvalue())


@pytest.mark.parametrize(
    ("name", "data", "format_name"),
    [
        ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG image"),
        ("a", b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG image"),
        ("a", b"GIF89a\x01\0\x01\0\x80\xff", "a GIF image"),
        ("a", b"RIFF\x24\0\0\0WAVEfmt \x80", "WAV audio"),
        ("a", b"\0\0\0\x20ftypisom\0\0\x02\0", "MP4"),
        ("a.mp3", b"\xf3\x82\xc4\x99" * 99, ".mp3 sound"),
        ("a.bin", b"\x7fELF\x02\x01\x01" + bytes(99), "an ELF program"),
        ("setup", b"MZ\x90" + bytes(75) + b"This program cannot be run in DOS mode.", "a Windows program"),
        ("a.zip", make_zip({"a.txt": "hello"}), "a ZIP archive"),
        ("a.odt", make_zip({"META-INF/manifest.xml": "", "content.xml": ""}), "an OpenDocument file"),
        ("a.gz", b"\x1f\x8b\x08\0\0\0\0\0", "a gzip archive"),
        ("a", b"7z\xbc\xaf\x27\x1c\0\x04", "a 7-Zip archive"),
        ("a.tar", b"a.txt" + bytes(252) + b"ustar\x0000" + bytes(247), "a tar archive"),
        ("a.exe", bytes(range(256)), ".exe program"),
        ("a.rtf", b"{\\rtf1\\ansi hello}", "an RTF document"),
    ],
)
def test_known_formats_that_are_no_documents(tmp_path: Path, name: str, data: bytes, format_name: str) -> None:
    caught = fails_with(errors.UnknownFormatError, format_name, data, tmp_path / name)
    for supported in ("plain text", "Markdown", "HTML", "PDF", "EPUB", "DOCX"):
        assert supported in caught.next_step
    fails_with(errors.UnknownFormatError, format_name, data) if name == "a" else None


def test_other_bytes_are_binary(tmp_path: Path) -> None:
    binary, generator = errors.BinaryDocumentError, random.Random(0)
    for size in (64, 200, 1000, 100_000):
        caught = fails_with(binary, "neither text nor a document", generator.randbytes(size), tmp_path / "a.x")
        assert "UTF-8" in caught.next_step
    fails_with(binary, "neither text", b"text with a NUL \0 in it")
    fails_with(binary, "neither text", "a\0b".encode("utf-16"))
    fails_with(binary, "neither text", b"\xff\xfe" + b"\x00\xd8" * 50)


PICTURE = '<w:p><w:r><w:drawing><wp:inline><a:graphic><a:graphicData><pic:pic><pic:blipFill><a:blip r:link="r9"/>'
PICTURE += "</pic:blipFill></pic:pic></a:graphicData></a:graphic></wp:inline></w:drawing></w:r></w:p>"


@pytest.mark.parametrize("target", ["http://127.0.0.1:9/a.png", "file:///etc/passwd"])
def test_nothing_is_fetched_or_included(monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    page = f'<html><link rel=stylesheet href="{target}"><p>Hello<img src="{target}"><iframe src="{target}"></iframe>'
    assert from_stdin(page.encode()).text.startswith("Hello")
    links = '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship Id="r9" '
    links += 'Type="http://schemas.openxmlformats.org/officeDocument/2006/relationships/image" TargetMode="External" '
    docx = make_docx("<w:p><w:r><w:t>Hello</w:t></w:r></w:p>" + PICTURE, **{
        "word/_rels/document.xml.rels": f'{links}Target="{target}"/></Relationships>'
    })  # fmt: skip
    assert from_stdin(docx).text == "Hello"
    entity = f'<!DOCTYPE d [<!ENTITY x SYSTEM "{target}">]>'
    evil = make_docx("<w:p><w:r><w:t>a&x;b</w:t></w:r></w:p>", prolog=entity)
    fails_with(errors.UnreadableDocumentError, "damaged DOCX", evil)


def test_converters_are_silent_and_loggers_restored(capfd: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("pdfminer").level
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert "a" in from_stdin(make_epub([b"<p>a\xff\xfe\x81</p>", b"<?xml version='1.0'?><p>b</p>"])).text
        from_stdin(b"<html>" + b"<div>" * 5000 + b"deep")
        from_stdin(make_pdf(["x"]).replace(b"startxref\n", b"startxref\n9"))
    assert not caught
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("pdfminer").level == level
