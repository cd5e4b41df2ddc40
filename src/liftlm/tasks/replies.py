"""What a language model is asked for when it writes tasks about a sentence or a run of them, and how its reply is read.

The request: the words of the prompt and a JSON schema. The reply: JSON if the model did as told; otherwise whatever questions and
answers can be found in it. Knows nothing of servers or models.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from liftlm.config import AnswerForm
from liftlm.tasks.filters import words
from liftlm.tasks.sentences import Sentence, split_into_sentences

PROMPT_VERSION = 1  # raise it with every change of the words below: what was written with others is asked for anew
FORMS = ("fact", "who", "when", "where", "how many", "reason", "relation", "paraphrase", "order")
_FEWEST_WORDS = 4  # of a sentence that is asked about
_CONTEXT = 2048  # characters of the text before a sentence, at most
_ENOUGH = 512  # characters of it, at least, where short paragraphs (dialogue) precede
_LONGEST_REPLY = 32_768  # characters that are looked at

_SYSTEM = """You write questions and answers about {what} of a document, for a reader who must later answer without it.

Rules:
- Every question can be answered from {source} alone; the text before {it} only tells who "she" or what "there" is.
- Write names instead of pronouns, so that each question can be understood by itself.
- Never mention {source}, the text, the passage or the author.
- {answers}
- Use the document's own words and numbers in answers. A question never contains its answer.
- Make the questions as different as you can, in what they ask for and in their wording. Forms: fact (what, which), who,
  when, where, how many, reason (why, how), relation (between two things), paraphrase ({whose} content, asked for in
  other words), order (what came before or after what).
- Write in the document's language."""
# the words about a single sentence are part of what recorded conversations are found by
_ONE = {
    "what": "one sentence",
    "source": "the sentence",
    "it": "it",
    "whose": "the sentence's",
    "these": "this sentence",
}
_SEVERAL = {
    "what": "neighbouring sentences",
    "source": "the sentences",
    "it": "them",
    "whose": "a sentence's",
    "these": "these sentences",
}
_ANSWERS = {
    "auto": "An answer is short and complete: a few words, or one sentence where a reason is asked for.",
    "short": "An answer is a few words, never a whole sentence.",
    "sentence": "An answer is one whole sentence that says again what was asked about, so that it can be understood alone.",
    "mixed": "By turns, an answer is a few words, and one whole sentence that says again what was asked about, so that it "
    "can be understood alone.",
}
_FORMAT = 'Reply with JSON only: {"tasks": [{"kind": "who", "question": "…", "answer": "…"}, …]}.'


@dataclass(frozen=True)
class Request:
    """One sentence, or a run of them as one, to be asked about, with the text that precedes it."""

    sentence: Sentence
    context: str  # heading and text before, perhaps ""
    sentences: int = 1  # so many in it


@dataclass(frozen=True)
class Pair:
    """A question and its answer, as they stand in a reply."""

    question: str
    answer: str
    kind: str  # the form that the model named, or ""


def make_requests(text: str, together: int = 1, count: int | None = None, seed: int = 0) -> list[Request]:
    """One for every sentence of the document that says enough to be asked about, in order.

    together: so many neighbouring sentences are asked about as one; count: so many such runs drawn at random, wherever they
    begin (the first version of LIFT: 10 runs of 16), instead of all, one after the other. No beginning is drawn again before
    all have been.
    """
    sentences = split_into_sentences(text)
    starts = list(range(0, len(sentences), together))
    if count is not None and sentences:
        draw, begins = random.Random(seed), range(max(1, len(sentences) - together + 1))
        rounds = range(-(-count // len(begins)))
        starts = sorted([start for _ in rounds for start in draw.sample(begins, len(begins))][:count])
    requests = []
    for start in starts:
        run = sentences[start : start + together]
        whole = replace(run[0], end=run[-1].end, text=" ".join(sentence.text for sentence in run))
        if len(words(whole.text)) >= _FEWEST_WORDS:
            requests.append(Request(whole, _context(sentences, start), len(run)))
    return requests


def make_messages(request: Request, count: int, answers: AnswerForm = "auto") -> list[dict[str, str]]:
    """The conversation that asks for `count` pairs. What is the same each time comes first, for servers that keep prefixes.

    answers: how long they are to be (`tasks.answers`).
    """
    wording = _ONE if request.sentences == 1 else _SEVERAL
    before = f"Text before {wording['source']}:\n{request.context}\n\n" if request.context else ""
    shown = f"Sentence{'s' if request.sentences > 1 else ''}:\n{request.sentence.text}\n\n"
    ask = f"Write {count} different question-answer pairs about {wording['these']}. {_FORMAT}"
    return [
        {"role": "system", "content": _SYSTEM.format(**wording, answers=_ANSWERS[answers])},
        {"role": "user", "content": before + shown + ask},
    ]


def reply_schema() -> dict[str, Any]:
    """The JSON schema of a reply; only what every server's grammar knows."""
    fields: dict[str, Any] = {"kind": {"type": "string", "enum": list(FORMS)}}
    fields |= {"question": {"type": "string"}, "answer": {"type": "string"}}
    task = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    tasks = {"tasks": {"type": "array", "items": task}}
    return {"type": "object", "properties": tasks, "required": ["tasks"], "additionalProperties": False}


def read_reply(text: str, most: int) -> list[Pair] | None:
    """Up to `most` pairs of a reply; [] where the model says that there are none; None where nothing can be read.

    Reads through thoughts, code fences, words around the JSON, trailing commas, a single object for a list, one object a
    line, an end that is cut off, and lines such as "Question: … Answer: …".
    """
    text = re.sub(r"^.*</think(?:ing)?>", "", text, flags=re.DOTALL)[:_LONGEST_REPLY]
    plain, empty = _scan(text)
    mended, empty_mended = _scan(re.sub(r",(?=\s*[}\]])", "", text))
    pairs = mended if len(mended) > len(plain) else plain
    pairs = pairs or _read_lines(text)
    if pairs:
        return list(dict.fromkeys(pairs))[:most]
    return [] if empty or empty_mended or _is_empty_list(text) else None


# --- context ----------------------------------------------------------------------------------------------------------


def _context(sentences: Sequence[Sentence], index: int) -> str:
    """The paragraph so far and the one before it, or more where these are short; whole sentences, and the heading above."""
    here = sentences[index]
    picked: list[str] = []
    length = 0
    for before in reversed(sentences[:index]):
        near = before.paragraph >= here.paragraph - 1 or length < _ENOUGH
        if not near or length + len(before.text) + 1 > _CONTEXT:
            break
        picked.append(before.text)
        length += len(before.text) + 1
    heading = [f"[{here.heading}]"] if here.heading else []
    return "\n".join([*heading, " ".join(reversed(picked))]).strip()


# --- JSON -------------------------------------------------------------------------------------------------------------


def _scan(text: str) -> tuple[list[Pair], bool]:
    """The pairs of every JSON object in a text, and whether one holds an empty list."""
    decoder = json.JSONDecoder(strict=False)  # line breaks inside of strings are common
    pairs: list[Pair] = []
    empty = False
    position = text.find("{")
    while position >= 0:
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            position += 1  # what is inside of a broken object may be whole
        else:
            pairs += _pairs_of(value)
            empty = empty or (isinstance(value, dict) and any(part == [] for part in value.values()))
        position = text.find("{", position)
    return pairs, empty


def _pairs_of(value: Any) -> Iterator[Pair]:
    if isinstance(value, list):
        for part in value:
            yield from _pairs_of(part)
    elif isinstance(value, dict):
        fields = {str(key).strip().lower(): part for key, part in value.items()}
        question, answer = _field(fields, "question", "q"), _field(fields, "answer", "a")
        if question and answer:
            kind = _field(fields, "kind", "form", "type").lower().replace("_", " ")
            yield Pair(question, answer, kind if re.fullmatch(r"[^\W\d_][\w -]{0,23}", kind) else "")
        else:
            for part in value.values():
                yield from _pairs_of(part)


def _field(fields: dict[str, Any], *names: str) -> str:
    """The first of these fields that holds something, as text on one line."""
    for name in names:
        value = fields.get(name)
        if isinstance(value, bool):
            return "Yes." if value else "No."
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            value = ", ".join(value)  # of an answer that lists things
        if isinstance(value, str | int | float) and str(value).strip():
            return " ".join(str(value).encode(errors="replace").decode().split())  # half a surrogate pair is no text
    return ""


def _is_empty_list(text: str) -> bool:
    return "".join(text.split()).strip("`").removeprefix("json") == "[]"


# --- lines ------------------------------------------------------------------------------------------------------------

_LABEL = re.compile(
    r"\W{0,8}(?:\d+\s?[.):]\W{0,8})?(?:(?P<question>question|q)|(?P<answer>answer|a)|kind|form|type)\s?\d{0,3}\W{0,3}?[:.]\W{0,8}",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"\W{0,8}\d{1,3}\s?[.):]\s\W{0,8}")
_SAME_LINE = re.compile(r"(?<=[?|*.])[ |\t*]{1,8}(?=(?:answer|a)\s*\**:)", re.IGNORECASE)


def _read_lines(text: str) -> list[Pair]:
    """Pairs of "Question: …" and "Answer: …" lines, with numbers and Markdown around; a line with "?" may lack its label."""
    found: list[dict[str, str]] = []
    field: str | None = None  # which of the two the next words belong to
    for line in _SAME_LINE.sub("\n", text).splitlines():
        label, number = _LABEL.match(line), _NUMBER.match(line)
        words_of_line = " ".join(line[label.end() if label else number.end() if number else 0 :].split()).strip("*_ ")
        if label:
            field = "question" if label["question"] else "answer" if label["answer"] else None
        elif number or not words_of_line:
            field = None
        if field is None and label is None and words_of_line.endswith("?"):
            field = "question"
        if field == "question" and (not found or "answer" in found[-1] or label):
            found.append({})
        if field is not None and found:
            found[-1][field] = f"{found[-1].get(field, '')} {words_of_line}".strip()
    return [Pair(some["question"], some["answer"], "") for some in found if some.get("question") and some.get("answer")]
