"""OpenAI's protocol as its official client speaks it: sync, async, streamed; what is not implemented is an error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import openai
import pytest
import torch

from liftlm import answer, load_config, load_model
from liftlm.adapters import use_adapter
from liftlm.config import ModelConfig
from liftlm.library import Library
from liftlm.server.protocol import ChatRequest, CompletionRequest
from serving import QUICK, Running, serving

TEXT = "The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743. " * 12
QUESTION = "Who rang the bell?"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def server(tiny_folder: Path, home: Path) -> Iterator[Running]:
    with serving(tiny_folder, home=home) as running:
        running.absorb(TEXT, title="Corriden", alias="corriden")
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(question: str = QUESTION) -> list[Any]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def alone(server: Running, tiny_folder: Path, home: Path) -> Any:
    """The same question put to the library, without a server."""
    config = load_config(None, [f"model.name={tiny_folder}", *QUICK])
    model = load_model(str(tiny_folder), config.model)
    entry = server.client.get("/v1/documents/corriden").json()["id"]
    adapter = Library(home).open(entry, model)
    return lambda *settings: answer(
        model, adapter, QUESTION, config=load_config(None, [f"model.name={tiny_folder}", *QUICK, *settings])
    )


def test_models_are_the_base_model_and_absorbed_documents(client: openai.OpenAI, server: Running) -> None:
    base, document = client.models.list().data
    assert base.id == "tiny-llama"  # no path of this machine
    assert (document.model_extra or {})["title"] == "Corriden"
    assert client.models.retrieve("corriden").id == document.id == client.models.retrieve(document.id).id
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


@pytest.mark.parametrize("context", ["truncate", "none", "retrieve", "recite"])
def test_an_answer_is_the_librarys(client: openai.OpenAI, alone: Any, context: str) -> None:
    reply = client.chat.completions.create(model="corriden", messages=ask(), extra_body={"context": context})
    expected = alone(f"answering.context={context}")
    assert reply.choices[0].message.content == expected.answer
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (
        expected.prompt_tokens,
        expected.answer_tokens,
    )
    assert reply.choices[0].finish_reason == ("length" if expected.answer_tokens == 12 else "stop")


def test_streaming_tells_the_same_with_usage(client: openai.OpenAI, alone: Any) -> None:
    whole = client.chat.completions.create(model="corriden", messages=ask())
    options: Any = {"include_usage": True}
    chunks = list(client.chat.completions.create(model="corriden", messages=ask(), stream=True, stream_options=options))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content == alone().answer
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_async_client(server: Running, alone: Any) -> None:
    async def talk() -> tuple[list[str | None], str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            replies = await asyncio.gather(
                *(client.chat.completions.create(model="corriden", messages=ask()) for _ in range(5))
            )
            stream = await client.chat.completions.create(model="corriden", messages=ask(), stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return [reply.choices[0].message.content for reply in replies], text

    replies, text = asyncio.run(talk())
    assert {*replies, text} == {alone().answer}


def test_a_conversation_and_an_instruction_change_the_prompt(client: openai.OpenAI) -> None:
    def tokens(messages: list[Any], model: str = "corriden") -> int:
        reply = client.chat.completions.create(
            model=model, messages=messages, max_tokens=2, extra_body={"context": "none"}
        )
        assert reply.usage is not None
        return reply.usage.prompt_tokens

    once = tokens(ask())
    assert tokens([{"role": "system", "content": "Be brief."}, *ask()]) > once
    assert tokens([*ask(), {"role": "assistant", "content": "Oswin."}, *ask("When?")]) > once
    parts: Any = [{"type": "text", "text": "Who rang "}, {"type": "text", "text": "the bell?"}]
    assert tokens([{"role": "user", "content": parts}]) == once
    assert tokens(ask(), "tiny-llama") < once  # no title in the words


def test_max_tokens_stop_and_seed(client: openai.OpenAI) -> None:
    def text(**options: Any) -> str:
        options = {"max_tokens": 24} | options
        reply = client.completions.create(model="corriden", prompt="The bell", **options)
        return str(reply.choices[0].text)

    whole = text()
    assert len(whole) > 4
    stop = whole[3:5]
    assert text(stop=stop) == whole[: whole.index(stop)]
    assert text(stop=["not there", stop]) == whole[: whole.index(stop)]
    assert text(max_tokens=2) != whole and whole.startswith(text(max_tokens=2))
    assert text(temperature=1.5, seed=7) == text(temperature=1.5, seed=7)
    assert len({text(temperature=1.5, seed=seed) for seed in range(4)}) > 1
    assert len({text(temperature=1.5) for _ in range(4)}) > 1
    assert text(temperature=1.5, top_p=0.0) == whole  # only the likeliest is left


def test_streamed_stops_are_never_told_in_part(client: openai.OpenAI) -> None:
    whole = str(client.completions.create(model="corriden", prompt="The bell", max_tokens=24).choices[0].text)
    stop = whole[4:9]
    stream = client.completions.create(model="corriden", prompt="The bell", max_tokens=24, stop=stop, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(stop)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs_are_those_of_one_forward_pass(
    client: openai.OpenAI, server: Running, tiny_folder: Path, home: Path
) -> None:
    model = load_model(str(tiny_folder), ModelConfig(dtype="float32"))
    entry = server.client.get("/v1/documents/corriden").json()["id"]
    Library(home).open(entry, model)
    tokens = [model.encode(TEXT)[:40], model.encode("Who counted the marks?")]
    reply = client.completions.create(
        model="corriden", prompt=tokens, echo=True, logprobs=3, max_tokens=1, temperature=0
    )
    for prompt, choice in zip(tokens, reply.choices, strict=True):
        with use_adapter(model, entry), torch.no_grad():
            logprobs = model.network(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        found = choice.logprobs
        assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
        assert found.token_logprobs[0] is None
        assert found.token_logprobs[1 : len(prompt)] == pytest.approx(expected, abs=1e-4)
        assert found.token_logprobs[-1] == pytest.approx(float(logprobs[-1].max()), abs=1e-4)
        assert len(found.token_logprobs) == len(prompt) + 1  # also where the one new token is the end token
        best = logprobs[:-1].max(-1).values.tolist()
        assert [max(top.values()) for top in found.top_logprobs[1 : len(prompt)]] == pytest.approx(best, abs=1e-4)
        assert choice.text.startswith(model.decode(prompt))


def test_lm_evaluation_harness(server: Running, tiny_folder: Path, home: Path) -> None:
    """Its `local-completions`: the request and the reading of the reply are those of lm_eval 0.4.13, openai_completions.py."""
    model = load_model(str(tiny_folder), ModelConfig(dtype="float32"))
    entry = server.client.get("/v1/documents/corriden").json()["id"]
    Library(home).open(entry, model)
    context = model.encode("Question: Who rang the bell?\nAnswer:")
    rows = [context + model.encode(text) for text in (" Oswin Tarrel", " nobody at all")]
    with use_adapter(model, entry), torch.no_grad():
        best = int(model.network(torch.tensor([context])).logits[0, -1].argmax())
        rows.append([*context, best])
        expected = []
        for row in rows:
            logprobs = model.network(torch.tensor([row])).logits[0].log_softmax(-1)
            expected.append(sum(float(logprobs[at - 1, row[at]]) for at in range(len(context), len(row))))
    asked = {
        "model": "corriden",
        "prompt": rows,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    found = []
    for choice in sorted(
        server.client.post("/v1/completions", json=asked).json()["choices"], key=lambda one: one["index"]
    ):
        logprobs = choice["logprobs"]["token_logprobs"][len(context) : -1]
        tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
        greedy = all(logprob == max(top.values()) for logprob, top in zip(logprobs, tops, strict=True))
        found.append((sum(logprobs), greedy))
    assert [score for score, _ in found] == pytest.approx(expected, abs=1e-3)
    assert [greedy for _, greedy in found] == [False, False, True]
    body = {
        "prompt": [context],
        "model": "corriden",
        "max_tokens": 8,
        "temperature": 0,
        "stop": ["\n", "<|im_end|>"],
        "seed": 1234,
    }
    text = server.client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert model.decode([best]) == text[: len(model.decode([best]))]


def test_prompts_of_all_four_kinds(client: openai.OpenAI, tiny_folder: Path) -> None:
    ids = load_model(str(tiny_folder)).encode("The bell")
    kinds: list[Any] = ["The bell", ["The bell"], ids, [ids]]
    texts = [client.completions.create(model="corriden", prompt=prompt).choices[0].text for prompt in kinds]
    assert len(set(texts)) == 1
    two = client.completions.create(model="corriden", prompt=["The bell", "Who?", "The bell"], stream=True)
    gathered: dict[int, str] = {}
    for chunk in two:
        gathered[chunk.choices[0].index] = gathered.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert gathered[0] == gathered[2] == texts[0] != gathered[1]


CHAT: dict[str, Any] = {"model": "corriden", "messages": ask()}
TEXT_REQUEST: dict[str, Any] = {"model": "corriden", "prompt": "The"}


@pytest.mark.parametrize(
    ("route", "change"),
    [
        *(("chat/completions", change) for change in (
            {"n": 2}, {"tools": []}, {"logprobs": True}, {"top_logprobs": 2}, {"presence_penalty": 0.5},
            {"logit_bias": {"1": 2}}, {"temperature": 3}, {"temperature": "1"}, {"max_tokens": 0},
            {"seed": 1.5}, {"user": "me"}, {"messages": []}, {"stream_options": {"include_usage": True}},
            {"stop": ["a"] * 17}, {"response_format": {"type": "json_object"}},
            {"messages": [{"role": "assistant", "content": "x"}]}, {"messages": [*ask(), *ask()]}, {"context": "all"},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            {"messages": ask(" ")}, {"max_tokens": 3, "max_completion_tokens": 4}, {"function_call": "auto"}, {"stop": ""},
        )),
        *(("completions", change) for change in (
            {"suffix": "x"}, {"best_of": 2}, {"logprobs": 6}, {"prompt": []}, {"prompt": [-1]}, {"prompt": [10**6]},
            {"prompt": [[]]}, {"prompt": ["a", 1]}, {"prompt": {"a": 1}}, {"n": 0}, {"logit_bias": {}},
        )),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused(server: Running, route: str, change: dict[str, Any]) -> None:
    body = (CHAT if route.startswith("chat") else TEXT_REQUEST) | change
    reply = server.client.post(f"/v1/{route}", json=body)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["message"].endswith(".")


def fields_of(*shapes: Any) -> set[str]:
    return {name for shape in shapes for name in get_type_hints(shape)}


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_every_field_of_openais_client_is_done_or_refused(server: Running, route: str) -> None:
    """None is accepted and ignored: what the official client can send is in our shape of a request, or status 400."""
    chat, text = openai.types.chat.completion_create_params, openai.types.completion_create_params
    if route.startswith("chat"):
        known = fields_of(chat.CompletionCreateParamsBase, chat.CompletionCreateParamsStreaming)
        ours, body = ChatRequest, CHAT
    else:
        known = fields_of(text.CompletionCreateParamsBase, text.CompletionCreateParamsStreaming)
        ours, body = CompletionRequest, TEXT_REQUEST
    refused = known - set(ours.model_fields)
    assert len(refused) > (15 if route.startswith("chat") else 2)
    for name in sorted(refused):
        reply = server.client.post(f"/v1/{route}", json=body | {name: "x"})
        error = reply.json()["error"]
        assert (reply.status_code, error["param"], error["code"]) == (400, name, "unsupported_parameter")


def test_values_that_mean_off_are_taken(server: Running) -> None:
    off = {
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "logprobs": False,
        "response_format": {"type": "text"},
        "stop": None,
    }
    assert server.client.post("/v1/chat/completions", json=CHAT | off).status_code == 200


def test_errors_are_openais(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as missing:
        client.chat.completions.create(model="nothing", messages=ask())
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as long:
        client.chat.completions.create(
            model="corriden", messages=ask("Who? " * 400), stream=True
        )  # an error, not a broken stream
    assert (long.value.status_code, long.value.code) == (413, "context_length_exceeded")
    broken = server.client.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400
    deep = server.client.post(
        "/v1/chat/completions", content=b"[" * 100_000, headers={"content-type": "application/json"}
    )
    assert deep.status_code == 400
    kind = {"content-type": "application/json"}
    lone = json.dumps(CHAT | {"messages": ask("\ud800")}).encode()
    assert server.client.post("/v1/chat/completions", content=lone, headers=kind).status_code == 400
    assert server.client.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert server.client.put("/v1/models").status_code == 405
