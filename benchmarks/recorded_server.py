"""Replays what a language model wrote: `python benchmarks/recorded_server.py docs/results/tasks-llm.jsonl`, then

    lift study tasks … --writers llm --set tasks.llm.base_url=http://127.0.0.1:8077/v1 --set tasks.llm.model=recorded

So that a study of the `llm` writer can be run again without the model. A line of the file: {"key", "reply"}; the key is that of
the conversation (`conversation_key`), and changes with every word of document or prompt. What was not recorded gets status 404.
`--requests DOCUMENT --per-sentence N --answers FORM` prints the conversations of a document instead, one a line, to be answered
by whatever writes the replies.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from liftlm.config import AnswerForm


def conversation_key(messages: list[dict[str, str]]) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]


def read_replies(paths: list[Path]) -> dict[str, str]:
    """Key → content of the reply."""
    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row["key"]: json.dumps(row["reply"], ensure_ascii=False) for row in map(json.loads, lines)}


def make_server(replies: dict[str, str], port: int) -> ThreadingHTTPServer:
    """Speaks as much of the OpenAI protocol as the writer needs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = replies.get(conversation_key(body["messages"]))
            if content is None:
                return self.send(404, {"error": {"message": "this conversation was not recorded"}})
            choice = {"index": 0, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
            head = {"id": "chatcmpl-recorded", "object": "chat.completion", "created": 0, "model": body["model"]}
            self.send(200, {**head, "choices": [choice]})

        def send(self, status: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def print_requests(document: str, characters: int | None, per_sentence: int, answers: AnswerForm) -> None:
    """The conversations that the writer would hold about a document (PATH[:N], as for `lift study --data`)."""
    from liftlm.evaluation.corpora import cut_item, parse_source, read_items
    from liftlm.tasks.replies import make_messages, make_requests

    for item in read_items(parse_source(document)):
        for request in make_requests(cut_item(item, characters).document.text):
            messages = make_messages(request, per_sentence, answers)
            print(json.dumps({"key": conversation_key(messages), "messages": messages}, ensure_ascii=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("replies", type=Path, nargs="*")
    parser.add_argument("--port", type=int, default=8077)
    parser.add_argument("--requests", metavar="DOCUMENT")
    parser.add_argument("--characters", type=int)
    parser.add_argument("--per-sentence", type=int, default=3)
    parser.add_argument("--answers", default="auto", choices=["auto", "short", "sentence", "mixed"])
    args = parser.parse_args()
    if args.requests:
        return print_requests(args.requests, args.characters, args.per_sentence, args.answers)
    if not args.replies:
        parser.error("Give the file of replies, or --requests.")
    replies = read_replies(args.replies)
    with make_server(replies, args.port) as server, contextlib.suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{args.port}/v1 replays {len(replies)} replies; Ctrl-C ends it.", file=sys.stderr)
        server.serve_forever()


if __name__ == "__main__":
    main()
