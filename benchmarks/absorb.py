"""Training beside the usual stack: `python benchmarks/absorb.py`; `--quick` ends within ten minutes, `--json` prints one object.

The peer is what the authors' code uses: transformers' Trainer and PEFT's LoRA, rank 128 on all linear layers, AdamW
(0.9, 0.98), clipping at 1, learning rate 5e-5, under bfloat16 autocast. With `pip install -c constraints.txt -e '.[peer]'` a
third one runs: TRL's SFTTrainer with packing. Every run is a process of its own, takes the same examples in the same steps
(TRL packs its own) and starts from the same weights. The examples:

    long    segments of 2048 tokens of the chronicle, one a step
    short   segments of 512 tokens, four a step
    tasks   the extractive writer's tasks, about four a step (the authors' batch); padded by the peer, packed by us

Printed for each: tokens of the examples a second over all steps but the first two, seconds a step, peak memory of the
process, and ours over the peer's. `roofline_share`: 4 FLOP a token and weight that it is multiplied with (forward, and
back to the inputs; the weights themselves are frozen), over the measured peak of a bfloat16 matrix product on this
machine; for `long`, where all tokens pass the head. `arithmetic_share`: the same with all products that are asked for, LoRA's
too (6 FLOP a token and weight) and those of attention (two forward, four back, over half of tokens x tokens), so 1 / it is
what any program could still gain without doing less. `loss_max_rel_diff`: the largest relative difference of the two loss
curves over 20 steps in float32; `loss_max_rel_diff_at_0.001` the same at twenty times the learning rate, where rounding grows.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

RANK, RATE, SEED = 128, 5e-5, 0
HIGH_RATE = 1e-3
WORKLOADS = {"long": (2048, 2048), "short": (512, 2048), "tasks": (0, 270)}  # segment, tokens a step
WARM = 2  # steps


def settings(workload: str, rate: float, dtype: str) -> list[str]:
    segment, batch = WORKLOADS[workload]
    return [
        f"model.dtype={dtype}",
        f"adapter.rank={RANK}",
        f"adapter.alpha={2 * RANK}",
        f"training.learning_rate={rate}",
        "training.schedule=constant",
        "training.warmup_fraction=0",
        "training.epochs=100",
        f"training.batch_tokens={batch}",
        f"training.micro_batch_tokens={batch}",
        f"segments.segment_tokens={segment or 512}",
        f"segments.overlap_tokens={3 * (segment or 512) // 8}",
    ]


def prepare(workload: str, steps: int, rate: float, dtype: str) -> tuple[Any, Any, list[Any], list[list[int]]]:
    """Model, config, examples, and which of them each step takes: the same in every process."""
    from liftlm import load_config, load_model
    from liftlm.demo import load_demo
    from liftlm.examples import make_examples, make_task_examples, plan_training
    from liftlm.segments import split_into_segments
    from liftlm.tasks.extractive import write_extractive_tasks

    config = load_config(None, settings(workload, rate, dtype))
    model = load_model(None, config.model)
    document = load_demo()[0]
    if workload == "tasks":
        tasks = write_extractive_tasks(document.text, config.tasks.per_sentence, config.seed)
        examples = make_task_examples(tasks, model.tokenizer, document.title, model.window)
    else:
        tokens = model.encode(document.text)
        pieces = split_into_segments(tokens, config.segments.segment_tokens, config.segments.overlap_tokens)
        examples = make_examples(pieces, model.tokenizer)
    plan = [step for _, step in plan_training(examples, config)]
    return model, config, examples, plan[:steps]


class Enough(Exception):
    """As many steps as were asked for."""


def run_ours(workload: str, steps: int, rate: float, dtype: str) -> dict[str, Any]:
    """`liftlm.training.train`, stopped from outside."""
    from liftlm.adapters import attach_adapter
    from liftlm.training import train

    model, config, examples, plan = prepare(workload, steps, rate, dtype)
    attach_adapter(model, "ours", config.adapter, SEED)
    losses: list[float] = []
    stamps = [time.monotonic()]

    def note(metrics: Any) -> None:
        stamps.append(time.monotonic())
        losses.append(metrics.loss)
        if len(losses) == steps:
            raise Enough

    with contextlib.suppress(Enough):
        train(model, "ours", examples, config, on_step=note)
    return result(lengths(examples, plan), stamps, losses)


def run_trainer(workload: str, steps: int, rate: float, dtype: str) -> dict[str, Any]:
    """transformers' Trainer with PEFT. A batch of its dataset is one whole step."""
    import transformers
    from peft import get_peft_model

    model, config, examples, plan = prepare(workload, steps, rate, dtype)
    losses: list[float] = []
    stamps: list[float] = []

    class Peer(transformers.Trainer):
        def _get_train_sampler(self, *arguments: Any, **options: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            loss = super().compute_loss(*arguments, **options)
            losses.append(float(loss.detach() if isinstance(loss, torch.Tensor) else loss[0].detach()))
            return loss

    def collate(batch: list[list[int]]) -> dict[str, torch.Tensor]:
        return padded([examples[index] for index in batch[0]], model.tokenizer.pad_token_id)

    torch.manual_seed(SEED)  # LoRA's A is random; ours is drawn in the same way
    network = get_peft_model(model.network, lora(config))
    with tempfile.TemporaryDirectory() as folder:
        Peer(
            model=network,
            args=transformers.TrainingArguments(**arguments(config, folder, dtype)),
            train_dataset=plan,
            data_collator=collate,
            callbacks=[clock(stamps)],
        ).train()
    return result(lengths(examples, plan), stamps, losses)


def run_trl(workload: str, steps: int, rate: float, dtype: str) -> dict[str, Any]:
    """TRL's SFTTrainer with packing, in rows of a step's tokens; it puts the examples together itself."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model, config, examples, plan = prepare(workload, steps, rate, dtype)
    stamps: list[float] = []
    tokens: list[int] = []

    class Counted(SFTTrainer):
        def training_step(self, network: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            tokens.append(int(inputs["input_ids"].numel()))
            return super().training_step(network, inputs, *arguments, **options)

    rows = [
        {
            "input_ids": list(examples[index].tokens),
            "completion_mask": [int(label != -100) for label in examples[index].labels],
        }
        for step in plan * 3
        for index in step
    ]
    with tempfile.TemporaryDirectory() as folder:
        options = arguments(config, folder, dtype) | {"max_steps": len(plan), "remove_unused_columns": True}
        Counted(
            model=model.network,
            args=SFTConfig(**options, packing=True, max_length=config.training.batch_tokens),
            train_dataset=Dataset.from_list(rows),
            processing_class=model.tokenizer,
            peft_config=lora(config),
            callbacks=[clock(stamps)],
        ).train()
    return result(tokens, stamps, [])


def padded(rows: list[Any], pad: int) -> dict[str, torch.Tensor]:
    """Examples as a batch of the peer's."""
    longest = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([[*row.tokens, *[pad] * (longest - len(row))] for row in rows]),
        "labels": torch.tensor([[*row.labels, *[-100] * (longest - len(row))] for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }


def clock(stamps: list[float]) -> Any:
    """A callback that notes when the first step begins and when each ends."""
    import transformers

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            if not stamps:
                stamps.append(time.monotonic())

        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            stamps.append(time.monotonic())

    return Clock()


def lora(config: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", r=config.adapter.rank, lora_alpha=int(config.adapter.alpha), target_modules="all-linear"
    )


def arguments(config: Any, folder: str, dtype: str) -> dict[str, Any]:
    """Of `TrainingArguments`: our settings in its words."""
    ours = config.training
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 1,
        "num_train_epochs": 1,
        "learning_rate": ours.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": ours.beta1,
        "adam_beta2": ours.beta2,
        "adam_epsilon": ours.eps,
        "weight_decay": ours.weight_decay,
        "max_grad_norm": ours.max_grad_norm,
        "bf16": dtype == "bfloat16",
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_strategy": "no",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "seed": SEED,
    }


def lengths(examples: list[Any], plan: list[list[int]]) -> list[int]:
    """Tokens of each step."""
    return [sum(len(examples[index]) for index in step) for step in plan]


def result(tokens: list[int], stamps: list[float], losses: list[float]) -> dict[str, Any]:
    """tokens: of each step; stamps: when the first one began, and when each ended."""
    seconds = stamps[-1] - stamps[WARM]
    return {
        "tokens_per_second": sum(tokens[WARM:]) / seconds,
        "seconds_per_step": seconds / (len(tokens) - WARM),
        "peak_bytes": peak(),
        "losses": losses,
        "tokens": sum(tokens),
    }


def peak() -> int:
    from liftlm.devices import peak_memory

    return peak_memory()


def gemm_peak(dtype: torch.dtype) -> float:
    """FLOP a second of the best of many products of a layer's shape."""
    left, right = torch.randn(2048, 576).to(dtype), torch.randn(576, 1536).to(dtype)
    best = math.inf
    for _ in range(60):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * 2048 * 576 * 1536 / best


RUNS = {"ours": run_ours, "Trainer + PEFT": run_trainer, "TRL SFTTrainer": run_trl}


def measure(run: str, workload: str, steps: int, rate: float = RATE, dtype: str = "bfloat16") -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--run", run, workload, str(steps), str(rate), dtype]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(f"{run} on {workload} failed:\n{process.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    print(f"{workload}, {run}: {row['tokens_per_second']:.0f} tokens/s", file=sys.stderr, flush=True)
    return row


def compare(names: list[str], steps: dict[str, int], repeat: int) -> list[dict[str, Any]]:
    """A row for each workload and stack: the median of the repetitions, which take turns."""
    rows = []
    for workload, count in steps.items():
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(repeat):
            for name in names:
                found[name].append(measure(name, workload, count))
        for name in names:
            pairs = zip(found["ours"], found[name], strict=True)
            ratios = [ours["tokens_per_second"] / other["tokens_per_second"] for ours, other in pairs]
            rows.append(
                {
                    "workload": workload,
                    "stack": name,
                    "tokens_per_second": statistics.median(row["tokens_per_second"] for row in found[name]),
                    "seconds_per_step": statistics.median(row["seconds_per_step"] for row in found[name]),
                    "peak_bytes": max(row["peak_bytes"] for row in found[name]),
                    "ours_over_it": statistics.median(ratios),
                    "losses": found[name][0]["losses"],
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, once")
    parser.add_argument("--repeat", type=int, help="runs of each; the median counts (3; with --quick 1)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--curves", action="store_true", help="the loss curves only, without timing")
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        name, workload, steps, rate, dtype = options.run
        print(json.dumps(RUNS[name](workload, int(steps), float(rate), dtype)))
        return
    names = [name for name in RUNS if name != "TRL SFTTrainer" or importlib.util.find_spec("trl")]
    steps = {"long": 5, "short": 5, "tasks": 14} if options.quick else {"long": 8, "short": 8, "tasks": 40}
    rows = [] if options.curves else compare(names, steps, options.repeat or (1 if options.quick else 3))
    curves = {
        rate: [measure(name, "tasks", 20, rate, "float32")["losses"] for name in ("ours", "Trainer + PEFT")]
        for rate in (RATE, HIGH_RATE)
    }
    if options.curves:
        print(told(curves))
        return
    show(rows, curves, options.json)


def apart(curves: list[list[float]]) -> float:
    """The largest relative difference of two curves."""
    return max(abs(a - b) / b for a, b in zip(*curves, strict=True))


def arithmetic(model: Any, weights: int) -> float:
    """FLOP a token of `long`: the products that its settings ask for, each once."""
    network = model.network
    linear = [part for part in network.base_model.layers.modules() if isinstance(part, torch.nn.Linear)]
    lora = sum(RANK * (part.in_features + part.out_features) for part in linear)
    config = network.config
    attention = 6 * WORKLOADS["long"][0] * config.hidden_size * config.num_hidden_layers
    return float(4 * weights + 6 * lora + attention)


def told(curves: dict[float, list[list[float]]]) -> str:
    differences = ", ".join(f"{apart(each):.1e} at learning rate {rate:g}" for rate, each in curves.items())
    return f"largest relative difference of the loss in float32, 20 steps of tasks: {differences}"


def show(rows: list[dict[str, Any]], curves: dict[float, list[list[float]]], as_json: bool) -> None:
    from liftlm import load_model
    from liftlm.devices import describe_machine

    model = load_model()
    weights = sum(parameter.numel() for name, parameter in model.network.named_parameters() if parameter.dim() == 2)
    best = max(gemm_peak(torch.bfloat16) for _ in range(5))
    by = {(row["workload"], row["stack"]): row for row in rows}
    found = {
        "ratio": min(row["ours_over_it"] for row in rows if row["stack"] == "Trainer + PEFT"),
        "ratios": {row["workload"]: row["ours_over_it"] for row in rows if row["stack"] == "Trainer + PEFT"},
        "roofline_share": by["long", "ours"]["tokens_per_second"] * 4 * weights / best,
        "arithmetic_share": by["long", "ours"]["tokens_per_second"] * arithmetic(model, weights) / best,
        "loss_max_rel_diff": apart(curves[RATE]),
        f"loss_max_rel_diff_at_{HIGH_RATE:g}": apart(curves[HIGH_RATE]),
        "gemm_peak_flops": best,
        "rows": rows,
        "float32_curves": curves,
        "rank": RANK,
        "machine": describe_machine(model.device, torch.bfloat16),
    }
    if as_json:
        print(json.dumps(found))
        return
    print("| examples | stack | tokens/s | s a step | peak GB | ours / it |\n|---|---|---|---|---|---|")
    for row in rows:
        speed, step, memory = row["tokens_per_second"], row["seconds_per_step"], row["peak_bytes"] / 1e9
        print(
            f"| {row['workload']} | {row['stack']} | {speed:.0f} | {step:.2f} | {memory:.1f} | {row['ours_over_it']:.2f} |"
        )
    print(f"\nratio (the smallest over Trainer + PEFT): {found['ratio']:.2f}")
    print(f"roofline share (long): {found['roofline_share']:.2f} of {best / 1e9:.0f} GFLOP/s")
    print(f"arithmetic share (long): {found['arithmetic_share']:.2f}")
    print(told(curves))


if __name__ == "__main__":
    main()
