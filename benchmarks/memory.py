"""Predicted and real memory of training, one fresh process a row: `python benchmarks/memory.py`.

Prints a table: segment length, gradient checkpointing, bytes predicted beyond the loaded model, bytes taken at the peak.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys

LENGTHS = (512, 1024, 2048)


def measure(tokens: int, checkpointing: str) -> None:
    """Two steps of one segment each, in this process."""
    from liftlm import load_config, load_model
    from liftlm.adapters import attach_adapter
    from liftlm.devices import current_memory, peak_memory
    from liftlm.examples import Example
    from liftlm.memory import predict_memory
    from liftlm.training import train

    model = load_model()
    settings = [
        f"training.batch_tokens={tokens}",
        "training.epochs=1",
        f"training.gradient_checkpointing={checkpointing}",
    ]
    config = load_config(None, settings)
    draw = random.Random(0)
    rows = [tuple(draw.randrange(100, 40000) for _ in range(tokens)) for _ in range(2)]
    examples = [Example(row, row) for row in rows]
    for parameter in model.network.parameters():
        parameter.sum()  # weights are read from disk when they are first touched
    before = current_memory(model.device)
    adapter = attach_adapter(model, "measured", config.adapter, 0)
    predicted = predict_memory(model, adapter.parameters(), examples, config.training)
    train(model, "measured", examples, config)
    print(json.dumps({"predicted": predicted, "taken": peak_memory() - before}))


def main() -> None:
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]), sys.argv[2])
        return
    print("| segment | gradient checkpointing | predicted GB | taken GB | ratio |")
    print("|---|---|---|---|---|")
    for checkpointing in ("false", "true"):
        for tokens in LENGTHS:
            command = [sys.executable, "-W", "ignore", __file__, str(tokens), checkpointing]
            row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            ratio = row["predicted"] / row["taken"]
            print(
                f"| {tokens} | {checkpointing} | {row['predicted'] / 1e9:.2f} | {row['taken'] / 1e9:.2f} | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
