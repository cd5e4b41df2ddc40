"""lm-evaluation-harness against `lift serve`: its `local-completions` (echo, logprobs, generation) beside its own `hf` backend.

    pip install 'lm-eval[api]==0.4.13'        # in an environment of its own, which may be another one
    .venv/bin/python benchmarks/serve_lm_eval.py --lm-eval PATH/TO/lm_eval

Two tasks of our own, six questions each: `multiple_choice` (log-likelihoods of given answers) and `generate_until`. The base
model's figures through the server must equal those of the same weights in the harness itself; a document that holds three of the
answers is absorbed and asked in the same way. Exit code 1 where the first two differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from serve_load import serve, upload

from liftlm.config import DEFAULT_MODEL
from liftlm.embedded import embedded_model_folder

TEXT = (
    "The ferryman Oswin Tarrel rang the bell of Corriden on 3 May 1743, and counted forty-one silver marks in the snow. "
    "The bell of Corriden was rung by the ferryman Oswin Tarrel."
)
QUESTIONS: list[dict[str, Any]] = [
    {
        "question": "Who rang the bell of Corriden?",
        "choices": ["Oswin Tarrel", "Maria Lund", "Peter Vance"],
        "label": 0,
    },
    {
        "question": "When did the bell of Corriden ring?",
        "choices": ["on 9 June 1801", "on 3 May 1743", "in 1650"],
        "label": 1,
    },
    {
        "question": "How many marks did the ferryman count?",
        "choices": ["forty-one", "seven", "nine hundred"],
        "label": 0,
    },
    {"question": "What is the capital of France?", "choices": ["Rome", "Berlin", "Paris"], "label": 2},
    {"question": "Water freezes into what?", "choices": ["ice", "iron", "sand"], "label": 0},
    {"question": "What colour is grass?", "choices": ["purple", "green", "black"], "label": 1},
]
METRICS = ("acc,none", "acc_norm,none", "exact_match,none")


def main() -> None:
    parser = argparse.ArgumentParser(description="Evaluate through a server.")
    parser.add_argument("--lm-eval", default="lm_eval")
    given = parser.parse_args()
    weights = embedded_model_folder(lambda text: None)
    serving = argparse.Namespace(window=2048, tokens=32, model=None)
    print("| | acc | acc_norm | exact_match |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        write_tasks(work / "tasks")
        inside = evaluate(given.lm_eval, work, "lm-eval's own hf backend", "hf", f"pretrained={weights},dtype=float32")
        # float32, as rounding in bfloat16 depends on what else is in a batch
        with serve(work / "home", serving, "model.dtype=float32") as (url, _):
            client = httpx.Client(base_url=url, timeout=600)
            place = f"base_url={url}/v1/completions,tokenizer={weights},tokenizer_backend=huggingface,num_concurrent=4"
            base = evaluate(
                given.lm_eval, work, "server, base model", "local-completions", f"model={DEFAULT_MODEL},{place}"
            )
            document = upload(client, TEXT, "Corriden", {"training": {"epochs": 6}})
            while client.get(f"/v1/documents/{document}").json()["state"] != "ready":
                client.get(f"/v1/documents/{document}/events")  # ends when it is
            evaluate(given.lm_eval, work, "server, document", "local-completions", f"model={document},{place}")
    sys.exit(base != inside)


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    rows = folder / "bells.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in QUESTIONS), encoding="utf-8")
    head = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
    }
    accuracy = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    choice = head | {
        "task": "bells_choice",
        "output_type": "multiple_choice",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": accuracy,
    }
    generated = head | {
        "task": "bells_gen",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[label]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 16, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (choice, generated):
        (folder / f"{task['task']}.yaml").write_text(json.dumps(task), encoding="utf-8")  # JSON is YAML


def evaluate(program: str, work: Path, name: str, model: str, arguments: str) -> tuple[float, ...]:
    """acc, acc_norm and exact_match as lm_eval writes them, printed as a row."""
    out = work / "results"
    before = set(out.rglob("results_*.json"))
    command = [program, "run", "--model", model, "--model_args", arguments, "--include_path", str(work / "tasks")]
    command += ["--tasks", "bells_choice,bells_gen", "--batch_size", "1", "--output_path", str(out)]
    done = subprocess.run(
        command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    (written,) = set(out.rglob("results_*.json")) - before
    results = json.loads(written.read_text(encoding="utf-8"))["results"]
    figures = results["bells_choice"] | results["bells_gen"]
    found = tuple(float(figures[metric]) for metric in METRICS)
    print(f"| {name} | {' | '.join(f'{figure:.3f}' for figure in found)} |", flush=True)
    return found


if __name__ == "__main__":
    main()
