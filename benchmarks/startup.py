"""How long commands take to begin: `lift --help`, and an absorbed document's adapter on its model, each in fresh processes.

    python benchmarks/startup.py [--entry ID] [--repeats 5] [--json]

Without --entry a small document is absorbed first, into a folder that is removed again. "usual collector" is the same without
`liftlm.collecting`. Medians, in seconds since the process began; the two kinds take turns, as the machine is not always alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from liftlm import LiftConfig
from liftlm.devices import describe_machine, pick_device, pick_dtype

_TEXT = "The mill at Orrin was built in 1704 by Tamsin Vale. It burnt in 1719, and nobody has ground corn there since then. "
_OPEN = """
import os, sys, time, psutil
from liftlm import collecting
if sys.argv[2] == "rare":
    collecting.collect_rarely()
from liftlm import Library, load_model
model = load_model()
Library().open(Library().find_id(sys.argv[1]), model)
print(time.time() - psutil.Process().create_time())
"""
_ABSORB = """
import sys
from liftlm import Document, Library, LiftConfig, load_config, load_model
model = load_model()
print(Library().absorb_once(Document("Orrin", sys.argv[1]), model, load_config(None, ["tasks.per_sentence=1"]))[0].id)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entry", help="id of a library entry")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        found = measure(arguments.entry, arguments.repeats, home)
    if arguments.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:<28} {value}" for name, value in found.items()))


def measure(entry: str | None, repeats: int, home: str) -> dict[str, Any]:
    environment = dict(os.environ)
    if entry is None:
        environment["LIFT_HOME"] = home
        entry = _said([sys.executable, "-c", _ABSORB, _TEXT], environment).split()[-1]
    times: dict[str, list[float]] = {"rare": [], "usual": []}
    helps = []
    for _ in range(repeats):
        for kind, found in times.items():
            found.append(float(_said([sys.executable, "-c", _OPEN, entry, kind], environment).split()[-1]))
        helps.append(float(_said([sys.executable, "-c", _HELP], environment).split()[-1]))
    device = pick_device(_plain())
    return {
        "lift --help": round(statistics.median(helps), 2),
        "adapter on the model": round(statistics.median(times["rare"]), 2),
        "with the usual collector": round(statistics.median(times["usual"]), 2),
        "ratio, paired": round(statistics.median(a / b for a, b in zip(times["rare"], times["usual"], strict=True)), 2),
        "repeats": repeats,
        "machine": describe_machine(device, pick_dtype(_plain(), device)),
    }


_HELP = """
import subprocess, sys, time
began = time.time()
subprocess.run([sys.executable, "-m", "liftlm", "--help"], check=True, stdout=subprocess.DEVNULL)
print(time.time() - began)
"""


def _plain() -> Any:
    return LiftConfig().model


def _said(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main()
