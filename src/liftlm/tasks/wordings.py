"""How the extractive writer words its questions, by language. {0}, {1}, {2}: phrases of the document."""

from __future__ import annotations

from dataclasses import dataclass

from liftlm.tasks.scripts import Language


@dataclass(frozen=True)
class Wordings:
    about: tuple[str, ...]
    complete: tuple[str, ...]
    next: tuple[str, ...]
    when: tuple[str, ...]
    whether: tuple[str, ...]
    first: tuple[str, ...]
    order: tuple[str, ...]
    of_the_text: str  # behind a question of order that goes by place, not by time
    yes: str
    no: str
    stop: str
    semicolon: str


_ENGLISH = Wordings(
    about=(
        "What does the text say about {0}?",
        "What is said about {0} and {1}?",
        "What do we learn about {0}, {1} and {2}?",
        "What happened with {0}?",
        "How are {0} and {1} connected?",
        "Which sentence speaks of {0} and {1}?",
        "Tell me about {0} and {1}.",
        "What is known of {0}?",
        "What can you tell me about {0}, in connection with {1}?",
        "Where does {0} come up, together with {1} and {2}?",
    ),
    complete=(
        "Complete this sentence: {0} …",
        "How does this go on: {0} …",
        "Finish what the text says: {0} …",
    ),
    next=("What comes right after this: {0}", "After “{0}”, what does the text say next?"),
    when=("When was it that {0}?", "On what date or in what year: {0}?", "When did this happen: {0}?"),
    whether=("Is it true that {0}?", "Is it right that {0}?", "Does the text say that {0}?"),
    first=(
        "Which came first: {0}, or {1}?",
        "Which happened earlier: {0}, or {1}?",
        "Which is earlier in time: {0}, or {1}?",
    ),
    order=(
        "Put these {n} events in order, earliest first: {events}.",
        "In what order did these {n} things happen? {events}.",
        "Sort these events by time: {events}.",
    ),
    of_the_text=" (in the order of the text)",
    yes="Yes",
    no="No",
    stop=".",
    semicolon="; ",
)
_CHINESE = Wordings(
    about=(
        "文中关于{0}说了什么？",
        "关于{0}和{1}，文中是怎么说的？",
        "从文中可以了解到{0}、{1}和{2}的什么情况？",
        "{0}发生了什么？",
        "{0}和{1}有什么联系？",
        "哪一句话提到了{0}和{1}？",
        "请说说{0}和{1}。",
        "关于{0}，我们知道什么？",
        "结合{1}，关于{0}你能告诉我什么？",
        "{0}在哪里与{1}、{2}一起出现？",
    ),
    complete=("请补全这句话：{0}……", "这句话接下来怎么说：{0}……", "请把文中的话说完：{0}……"),
    next=("紧接在这句话后面的是什么：{0}", "在“{0}”之后，文中接着说了什么？"),
    when=("{0}，这是什么时候的事？", "哪一年或哪一天：{0}？", "这件事发生在什么时候：{0}？"),
    whether=("{0}，对吗？", "{0}，这是真的吗？", "文中是不是说{0}？"),
    first=("哪件事在先：{0}，还是{1}？", "哪件事发生得更早：{0}，还是{1}？", "按时间哪个更早：{0}，还是{1}？"),
    order=(
        "请把这{n}件事按先后排列：{events}。",
        "这{n}件事是按什么顺序发生的？{events}。",
        "请按时间顺序排列：{events}。",
    ),
    of_the_text="（按文中的顺序）",
    yes="是",
    no="不是",
    stop="。",
    semicolon="；",
)
_JAPANESE = Wordings(
    about=(
        "本文は{0}について何と述べていますか。",
        "{0}と{1}について何が述べられていますか。",
        "{0}、{1}、{2}について何が分かりますか。",
        "{0}に何が起こりましたか。",
        "{0}と{1}はどのように関係していますか。",
        "{0}と{1}に触れているのはどの文ですか。",
        "{0}と{1}について教えてください。",
        "{0}について何が知られていますか。",
        "{1}との関連で、{0}について何が言えますか。",
        "{0}は{1}や{2}とともにどこに出てきますか。",
    ),
    complete=(
        "次の文を完成させてください：{0}……",
        "この続きは何ですか：{0}……",
        "本文の言葉を最後まで述べてください：{0}……",
    ),
    next=("この直後に来るのは何ですか：{0}", "「{0}」の次に、本文は何と述べていますか。"),
    when=("次のことはいつでしたか：{0}。", "何年または何日ですか：{0}。", "これはいつ起こりましたか：{0}。"),
    whether=("次のことは本当ですか：{0}。", "次のことは正しいですか：{0}。", "本文は次のように述べていますか：{0}。"),
    first=(
        "先に来るのはどちらですか：{0}、それとも{1}。",
        "早く起こったのはどちらですか：{0}、それとも{1}。",
        "時間的に早いのはどちらですか：{0}、それとも{1}。",
    ),
    order=(
        "次の{n}つの出来事を早い順に並べてください：{events}。",
        "次の{n}つのことはどの順に起こりましたか：{events}。",
        "次の出来事を時間順に並べてください：{events}。",
    ),
    of_the_text="（本文の順で）",
    yes="はい",
    no="いいえ",
    stop="。",
    semicolon="；",
)


def wordings_for(language: Language) -> Wordings:
    """English where there are none of its own."""
    return {"zh": _CHINESE, "ja": _JAPANESE}.get(language, _ENGLISH)
