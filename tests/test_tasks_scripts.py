"""Documents without blanks between words: sentences, tasks in their language, retrieval of single sentences."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liftlm.config import RetrievalConfig
from liftlm.retrieval import Retriever
from liftlm.tasks.extractive import write_extractive_tasks
from liftlm.tasks.scripts import language_of, telling_runs, word_count
from liftlm.tasks.sentences import split_into_sentences
from liftlm.tasks.wordings import wordings_for

CHINESE = (
    "光绪二十四年，京师大学堂成立，是中国近代第一所国立综合性大学。1912年5月，京师大学堂改称北京大学，严复出任首任校长。"
    "蔡元培于1917年出任校长，实行兼容并包的方针。\n\n"
    "1937年抗日战争爆发后，北京大学与清华大学、南开大学南迁长沙，组成国立长沙临时大学。"
    "1938年学校迁往昆明，改称国立西南联合大学。1946年10月，北京大学在北平复员。"
)
JAPANESE = (
    "夏目漱石は1867年に江戸で生まれた。帝国大学を卒業した後、松山で英語教師を務めた。1900年にイギリスへ留学した。\n\n"
    "帰国後、第一高等学校で教えながら小説を書き始めた。1905年に雑誌『ホトトギス』に最初の小説を発表した。1916年に胃潰瘍で死去した。"
)
THAI = (
    "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย ตั้งอยู่บนสามเหลี่ยมปากแม่น้ำเจ้าพระยา มีแม่น้ำเจ้าพระยาไหลผ่าน. "
    "เมืองนี้ก่อตั้งขึ้นในปี 1782 โดยพระบาทสมเด็จพระพุทธยอดฟ้าจุฬาโลกมหาราช."
)
CHINESE += "史蒂夫·乔布斯（Steve Jobs）在California的Stanford University做过演讲，听众有23000 people之多。"
TEXTS = {"zh": CHINESE, "ja": JAPANESE, "unspaced": THAI}


@pytest.mark.parametrize("text", [CHINESE, JAPANESE])
def test_sentences_end_with_their_full_stop(text: str) -> None:
    """Regression: without blanks each was "one word", and was joined to the one before; and none was ended before a digit."""
    found = [sentence.text for sentence in split_into_sentences(text)]
    assert found == [part for part in re.split(r"(?<=。)\s*", text) if part]


def test_a_long_sentence_is_parted_where_one_may_pause() -> None:
    text = "学校迁往昆明以后改称国立西南联合大学，" * 12 + "至此结束。"
    parts = [sentence.text for sentence in split_into_sentences(text)]
    assert len(parts) > 2 and "".join(parts) == text and all(part[-1] in "，。" for part in parts)
    assert max(map(word_count, parts)) <= 60


def test_words_are_counted_about_as_in_a_translation() -> None:
    assert word_count("北京大学") == 2 and word_count("北京大学 in 1912 年") == 2 + 1 + 2
    assert word_count("吾輩は猫である。") == 4 + 1
    assert 8 <= word_count(THAI.split(".")[1]) <= 16


@given(st.text(st.characters(max_codepoint=0x2FF)))
def test_words_between_blanks_are_counted_as_such(text: str) -> None:
    assert word_count(text) == len(text.split())


def test_the_language_is_known_by_its_script() -> None:
    for language, text in TEXTS.items():
        assert language_of(text) == language
    assert language_of("The Yuan dynasty (元朝) was founded by Kublai Khan (忽必烈).") == "en"
    assert language_of("한국어는 띄어쓰기가 있는 말이다.") == language_of("") == language_of("1912.") == "en"


def test_runs_that_stand_for_things() -> None:
    assert telling_runs("蔡元培于1917年出任校长，实行兼容并包的方针。", "zh") == [
        "蔡元培",
        "出任校长",
        "实行兼容",
        "方针",
    ]
    assert telling_runs("苹果公司的iPhone和Macintosh很好", "zh") == ["苹果公司", "iPhone", "Macintosh"]
    assert telling_runs("1905年に雑誌『ホトトギス』に小説を発表した。", "ja") == ["雑誌", "ホトトギス", "小説", "発表"]


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("per_sentence", [1, 3])
def test_every_sentence_is_asked_about_and_every_answer_is_the_text_s(language: str, per_sentence: int) -> None:
    text = TEXTS[language]
    tasks = write_extractive_tasks(text, per_sentence)
    says = wordings_for(language_of(text))
    own = [task for task in tasks if task.kind not in ("first", "order")]
    for sentence in split_into_sentences(text):
        asked = [task for task in own if (task.start, task.end) == (sentence.start, sentence.end)]
        assert len({task.question for task in asked}) == len(asked) >= min(per_sentence, 2), sentence.text
    for task in own:
        answer = task.answer.removeprefix(says.yes).removeprefix(says.no) if task.kind == "yes or no" else task.answer
        plain = answer.lstrip("。.").removesuffix(says.stop)
        assert plain in text, task
        assert not re.search(r"[{}]", task.question)
    if language != "unspaced":
        assert not any(re.search(r"\b(?:What|When|Which|text)\b", task.question) for task in tasks)
        found = "".join(task.question + task.answer for task in tasks)
        assert not re.search(r"[\u3040-\u9fff。] | [\u3040-\u9fff]", found.replace("23000 people", ""))


@pytest.mark.parametrize(("text", "kinds"), [(CHINESE, 6), (JAPANESE, 6)])
def test_many_kinds_of_questions_occur(text: str, kinds: int) -> None:
    tasks = [task for seed in range(8) for task in write_extractive_tasks(text, 3, seed)]
    assert {"about", "when", "yes or no", "complete", "next"} <= {task.kind for task in tasks}
    assert len({task.kind for task in tasks}) >= kinds
    dates = {task.answer for task in tasks if task.kind == "when" and len(task.answer) < 12}
    assert dates and all(re.fullmatch(r"\d{4}年(?:\d+月)?(?:\d+日)?。", date) for date in dates)
    for task in tasks:
        if task.kind == "when":  # the date is asked for, so that it is not said
            held = re.search(r"\d{4}年(?:\d+月)?", text[task.start : task.end])
            assert held is not None and held.group() not in task.question
        if task.kind == "order":
            parts = re.split("；", task.answer.rstrip("。"))
            places = [text.index(part[-5:]) for part in parts]
            assert places == sorted(places) and len(parts) >= 3


@pytest.mark.parametrize(
    ("text", "question", "found"),
    [
        (CHINESE, "谁在1917年出任校长？", "蔡元培于1917年出任校长，实行兼容并包的方针。"),
        (JAPANESE, "漱石はいつイギリスへ留学しましたか。", "1900年にイギリスへ留学した。"),
    ],
)
def test_retrieval_shows_a_sentence_and_not_the_paragraph(text: str, question: str, found: str) -> None:
    retriever = Retriever(text, lambda part: list(part.encode()), RetrievalConfig(count=1))
    selected = retriever.select(question, 10_000, [0])
    assert bytes(selected.tokens).decode() == found and selected.sources == (found,)
