"""The report of a small folder: its numbers, its escaping, what it says of what is missing, and that it is the same each time."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import rich.console

from liftlm.errors import BenchmarkDataError
from liftlm.evaluation import report
from liftlm.evaluation.blocks import Fold, Heading, Paragraph, Table, Verbatim, clean, to_html, to_markdown
from liftlm.evaluation.encoder_score import EncoderScores
from liftlm.evaluation.figures import format_number, format_score, format_value, label
from liftlm.evaluation.live import LiveScores, live_table
from liftlm.evaluation.loogle import ShortQA
from liftlm.evaluation.own_questions import OwnQuestions
from liftlm.evaluation.plots import _cells, needle_metric
from liftlm.evaluation.report import write_report
from liftlm.evaluation.scoring import score_folder
from test_scoring import Toy, row, write

NASTY = '<script>alert(1)</script> & "quoted" | *bold* `code` $x$ </pre> ```` \x00\n# no heading\n'


class Page(html.parser.HTMLParser):
    """Tags, attributes and text of a page; fails where tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells[-1][-1] += data

    def row(self, *starts: str) -> list[str]:
        """The first row of a table that begins with these cells."""
        return next(cells for cells in self.cells if cells[: len(starts)] == list(starts))


def full_folder(folder: Path) -> Path:
    """Eight methods, twelve questions on three documents of different lengths, and every file."""
    nlls = {
        "closed-book": 3.0,
        "icl": 2.5,
        "rag": 1.5,
        "lift-other": 3.25,
        "lift": 1.5,
        "lift+rag": 1.25,
        "oracle": 1.0,
    }
    rows = []
    for n in range(12):
        for method, nll in (nlls | {"lift+oracle": 1.1}).items():
            shown = {"context_id": f"text {n % 4}", "context_tokens": 1500} if "rag" in method else {"context_id": None}
            more = {
                "document_id": f"d{n % 3}",
                "title": f"Title <{n % 3}>",
                "document_tokens": 1000 * 4 ** (n % 3),
                "kind": "fact" if n % 2 else "reason $x$",
                "question": f"Who rang {n}? {NASTY}",
                "answer": "Oswin" if method.startswith(("lift+", "oracle")) or n % 2 else NASTY,
                "answer_nll": nll + n / 100,
                "data": {"length": 1000 * 4 ** (n % 3), "depth": 0.5 * (n % 2)},
            }
            rows.append(row(method, n, **more | shown))
    rows[1] |= {"error": f"out of memory {NASTY}", "answer": ""}  # the first question's icl
    write(folder, rows)
    write(folder, [{"id": f"text {n}", "text": f"Text {n} of the book. {NASTY}"} for n in range(4)], "contexts.jsonl")
    interference = {"unrelated_nll_before": 3.0, "unrelated_nll_after": 3.125, "general_right_before": 9}
    interference |= {"general_right_after": 7, "general_questions": 20}
    absorbs = [
        {
            "document_id": f"d{n}",
            "title": f"Title <{n}>",
            "adapter_id": f"a{n}",
            "absorbed_title": f"Title <{n}>",
            "control": False,
            "tokens": 1234,
            "tasks": 56,
            "seconds": 78.4,
            "tokens_per_second": 90.1,
            "peak_memory_bytes": 2_500_000_000,
            "epoch_losses": [2.5, 1.25],
            "interference": interference,
        }
        for n in range(3)
    ]
    # the adapter of the second is the control of the first
    absorbs.append(absorbs[1] | {"document_id": "d0", "title": "Title <0>", "control": True, "interference": None})
    write(folder, absorbs, "absorbs.jsonl")
    run = {"config": {"model": {"name": "tiny", "window": 2048}}, "seed": 3, "limit": 12, "dataset": "made <up>"}
    run |= {
        "versions": {"torch": "2.6"},
        "machine": {"device": "cpu"},
        "command": "lift evaluate toy",
        "source": "none",
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = full_folder(tmp_path_factory.mktemp("evaluation"))
    score_folder(made, Toy())
    write_report(made)
    return made


def test_the_main_table(folder: Path) -> None:
    page = page_of(folder)
    header = page.row("method", "token F1")
    assert header[2:] == [
        *("order", "METEOR", "answer NLL ↓", "evidence gap closed", "reading kept", "judge", "n", "failed"),
        *("seconds a question", "peak memory, GB"),
    ]
    icl = dict(zip(header, page.row("icl", "54.5 [27.3, 81.8]"), strict=True))  # 6 of 11
    assert (icl["n"], icl["failed"], icl["judge"], icl["METEOR"]) == ("11", "1", "not judged", "no WordNet here")
    assert (icl["order"], icl["seconds a question"], icl["peak memory, GB"]) == ("–", "2.00", "0.00")
    lift = next(cells for cells in page.cells if cells[0] == "lift" and len(cells) == len(header))
    assert dict(zip(header, lift, strict=True))["evidence gap closed"] == "75.0 [75.0, 75.0]"  # (3 − 1.5) / (3 − 1)
    kept = {cells[0]: cells[header.index("reading kept")] for cells in page.cells if len(cells) == len(header)}
    assert {name for name, cell in kept.items() if cell == "100.0 [100.0, 100.0]"} == {
        "lift",
        "lift+rag",
        "lift+oracle",
    }
    assert (
        {cell for name, cell in kept.items() if not name.startswith(("lift", "method"))}
        == {"–"}
        == {kept["lift-other"]}
    )
    methods = [cells[0] for cells in page.cells if len(cells) == len(header)][1:]
    assert methods == ["closed-book", "icl", "rag", "lift-other", "lift", "lift+rag", "oracle", "lift+oracle"]


def test_the_other_tables(folder: Path) -> None:
    page = page_of(folder)
    assert page.row("lift − lift-other")[2] == "-1.75 [-1.75, -1.75] p < 0.001"
    assert page.row("", "lift − lift-other (n = 12)")
    assert page.row("answer NLL ↓", "-1.75 [-1.75, -1.75] p < 0.001")  # knowledge
    assert page.row("oracle − lift+rag")[1] == "0.0 [0.0, 0.0] p = 1.000"
    assert page.row("lift", "100.0 [100.0, 100.0]")  # reading kept
    assert page.row("absorbed: 3 documents") == ["absorbed: 3 documents", "3.000", "3.125", "27 of 60", "21 of 60"]
    assert page.row("fact", "6")[2] == "100.0 [100.0, 100.0]" and page.row("reason $x$", "6")[2] == "0.0 [0.0, 0.0]"
    assert page.row("up to 1,500 tokens", "4") and page.row("up to 24,000 tokens", "4")
    assert page.row("Title <1>") == ["Title <1>", "1,234", "56", "78", "90", "2.50", "2.500 → 1.250"]
    words = "".join(page.words)
    assert "3 documents absorbed in 235 seconds." in words and "name: tiny" in words and "lift evaluate toy" in words
    assert "torch: '2.6'" in words and "device: cpu" in words


def test_ten_questions_stand_there_in_full(folder: Path) -> None:
    page = page_of(folder)
    words = "".join(page.words)
    shown = set(re.findall(r"Who rang (\d+)\?", words))
    assert len(shown) == 10 and "10 questions in full" in words
    assert words.count("Text in the window of rag, lift+rag: 1,500 tokens") == 10  # once for both
    assert words.count(NASTY.replace("\x00", "\ufffd")) >= 10 + 10  # questions and texts
    assert len(re.findall(r"lift\+oracle \(token F1 100\.0, answer NLL ↓ 1\.\d\d\):", words)) == 10
    assert ("icl failed:" in words) == ("0" in shown)


def test_html_is_one_safe_file(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = page_of(folder)
    assert (
        not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "a"}
        and "<script" not in text
        and "\x00" not in text
    )
    assert not re.search(r"(?:src|href)=\"(?!data:image/png;base64,)|url\(|@import|https?://", text)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    pictures = {base64.b64decode(image.partition(",")[2]) for image in images}
    assert pictures == {path.read_bytes() for path in (folder / "plots").glob("*.png")}
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert sorted(path.name for path in (folder / "plots").iterdir()) == [
        "kinds.png",
        "lengths.png",
        "methods.png",
        "needles.png",
    ]


def test_markdown_links_the_plots_and_fences_every_text(folder: Path) -> None:
    text = (folder / "report.md").read_text(encoding="utf-8")
    for path in (folder / "plots").iterdir():
        assert f"](plots/{path.name})" in text
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside and "# no heading" not in outside and "alert" not in outside
    assert "| lift | 50.0 [" in text and "Title <0>" in outside


def test_the_same_folder_gives_the_same_bytes(folder: Path) -> None:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in paths}
    score_folder(folder, Toy())
    write_report(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_needles_are_averaged_by_length_and_depth() -> None:
    rows = [row("lift", n, data={"length": 1000, "depth": depth}) for n, depth in enumerate((0, 0, 1))]
    rows += [row("lift", 3, data={"length": 1000}), row("lift", 4, data={"length": "long", "depth": 1})]
    scores = {f"lift/{n}": {"keyword_recall": value} for n, value in enumerate((1.0, 0.5, 0.25, 0.0, 0.0))}
    assert _cells(rows, scores, "keyword_recall") == {"lift": {(1000, 0): [1.0, 0.5], (1000, 1): [0.25]}}
    assert needle_metric(["token_f1", "keyword_recall"]) == "keyword_recall" and needle_metric(["a", "b"]) == "a"


# --- missing pieces ---------------------------------------------------------------------------------------------------


def test_a_bare_folder_says_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, [row("lift")])
    with pytest.raises(BenchmarkDataError, match="not scored yet"):
        write_report(tmp_path)
    score_folder(tmp_path, Toy())
    write_report(tmp_path)
    page = page_of(tmp_path)
    words = "".join(page.words)
    assert "Without that control a gain may be format." in words and "Not measured." in words
    assert "needs the methods oracle and lift+oracle" in words and "1 question in full" in words
    cells = dict(zip(page.row("method", "token F1"), page.row("lift", "100.0 [100.0, 100.0]"), strict=True))
    assert cells["evidence gap closed"] == "–" and "reading kept" not in cells
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["methods.png"]


def test_where_everything_failed(tmp_path: Path) -> None:
    write(tmp_path, [row(method, error="broken", answer="") for method in ("lift", "rag")])
    score_folder(tmp_path, Toy())
    write_report(tmp_path)
    page = page_of(tmp_path)
    assert page.row("lift") == ["lift", *["–"] * 6, "0", "1", "–", "–"]
    assert "lift failed:" in "".join(page.words) and not (tmp_path / "plots").exists()


def test_without_matplotlib_there_are_no_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*arguments: Any) -> dict[str, str]:
        raise ImportError("No module named 'matplotlib'")

    monkeypatch.setattr(report, "draw_plots", absent)
    write(tmp_path, [row("lift")])
    score_folder(tmp_path, Toy())
    write_report(tmp_path)
    assert page_of(tmp_path).row("plots")[1] == "none: matplotlib is not installed"


def test_bert_score_of_loogle_says_that_it_was_not_computed(tmp_path: Path) -> None:
    def encoder(answers: Any, references: Any) -> EncoderScores:
        return EncoderScores(
            "tiny", tuple({"bert_precision": 0.5, "bert_recall": 0.5, "bert_f1": 0.5} for _ in answers)
        )

    write(tmp_path, [row("lift")])
    for given, shown_cell, columns in ((None, "not computed (--bert-score)", 1), (encoder, "50.0 [50.0, 50.0]", 3)):
        score_folder(tmp_path, ShortQA(), encoder=given)
        write_report(tmp_path)
        header = page_of(tmp_path).row("method", "token F1")
        cells = dict(zip(header, page_of(tmp_path).row("lift", "100.0 [100.0, 100.0]"), strict=True))
        assert cells["BERTScore F1"] == shown_cell and sum("BERTScore" in name for name in header) == columns
    score_folder(tmp_path, OwnQuestions())
    write_report(tmp_path)
    assert not any("BERTScore" in name for name in page_of(tmp_path).row("method", "token F1"))


def test_what_was_judged_and_what_not(tmp_path: Path) -> None:
    write(tmp_path, [row("lift", n) for n in range(4)] + [row("rag")])
    verdicts = [{"id": f"lift/{n}", "judge": "judge-1", "verdict": v} for n, v in enumerate((True, False, True, None))]
    write(tmp_path, [verdict | {"reply": "", "error": None} for verdict in verdicts], "judgements.jsonl")
    score_folder(tmp_path, Toy())
    write_report(tmp_path)
    page = page_of(tmp_path)
    place = page.row("method").index("judge")
    rows = {cells[0]: cells for cells in page.cells if len(cells) == len(page.row("method"))}
    assert rows["lift"][place].startswith("66.7 [") and rows["lift"][place].endswith("(3 of 4 judged)")
    assert rows["rag"][place] == "not judged" and page.row("judge")[1] == "judge-1"


# --- numbers and blocks -----------------------------------------------------------------------------------------------


def test_numbers() -> None:
    assert format_value("token_f1", 0.2614) == "26.1" and format_value("token_f1", 0.2614, sign=True) == "+26.1"
    assert format_value("answer_nll", 1.4666) == "1.47" and format_value("answer_nll", -1.4666, sign=True) == "-1.47"
    assert format_value("token_f1", -0.0001, sign=True) == "0.0" and format_value("token_f1", None) == "–"
    assert (
        format_score("swap_deviation", {"swap_deviation": 2.5, "swap_deviation_interval": [1.0, 4.0]})
        == "2.50 [1.00, 4.00]"
    )
    assert format_score("token_f1", {"token_f1": 0.5, "token_f1_interval": None}) == "50.0"
    assert (
        format_score("token_f1", {}) == "–"
        and format_number(1234.5678, 1) == "1,234.6"
        and format_number(None, 1) == "–"
    )
    assert label("answer_nll") == "answer NLL ↓" and label("exact_match") == "exact match"


def test_blocks_in_both_forms() -> None:
    blocks = [
        Heading("A_b <i>", 3),
        Paragraph("[x](y) 1 < 2 [3, 4] **"),
        Table(["a", "b|c"], [["1\n2", "<b>"]]),
        Fold("more & more", [Verbatim("```\n<b>", "it")]),
    ]
    assert to_markdown(blocks) == (
        "### A\\_b \\<i>\n\n[x\\](y) 1 < 2 [3, 4] \\*\\*\n\n| a | b\\|c |\n|---|---:|\n| 1 2 | \\<b> |\n\n"
        "<details>\n<summary>more &amp; more</summary>\n\nit:\n\n````text\n```\n<b>\n````\n\n</details>\n"
    )
    page = to_html("<t>", blocks)
    assert "<title>&lt;t&gt;</title>" in page and "<h3>A_b &lt;i&gt;</h3>" in page and "<td>&lt;b&gt;</td>" in page
    assert "<summary>more &amp; more</summary>" in page and "<pre>\n```\n&lt;b&gt;</pre>" in page
    assert clean("a\x1b\ud800\u0085b\n\t😀") == "a\ufffd\ufffd\ufffdb\n\t😀"


# --- live -------------------------------------------------------------------------------------------------------------


def shown(table: Any) -> list[list[str]]:
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return [line.split() for line in console.file.getvalue().splitlines() if line.strip()]


def test_a_table_that_is_drawn_while_a_row_is_scored_lacks_nothing_afterwards() -> None:
    """Regression: a terminal's own thread drew it in between, and that table was kept."""
    live: LiveScores

    class Slow(Toy):
        def score(self, question: Any, answer: str) -> dict[str, float]:
            live.table()
            return super().score(question, answer)

    live = LiveScores(Slow())
    live.add(row("lift", 0))
    live.add(row("lift", 1))
    assert shown(live)[2][-3] == "2"


def test_the_live_table_shows_running_means() -> None:
    rows = [row("lift", 0), row("lift", 1, answer="x", answer_nll=2.0), row("lift", 2, error="broken"), row("[red]icl")]
    lines = shown(live_table(rows, Toy(), total=5))
    assert lines[0] == ["method", "token", "F1", "answer", "NLL", "↓", "n", "failed", "seconds", "a", "question"]
    assert lines[2] == ["lift", "50.0", "1.50", "2", "of", "5", "1", "2.00"]
    assert lines[3] == ["[red]icl", "100.0", "1.00", "1", "of", "5", "0", "2.00"]
    live = LiveScores(Toy())
    assert len(shown(live)) == 2  # nothing yet
    live.add(row("lift", choices=["Oswin", "x"], choice_nlls=[[1.0, 1], [2.0, 1]]))
    assert shown(live)[2] == ["lift", "100.0", "100.0", "1.00", "1", "0", "2.00"]
