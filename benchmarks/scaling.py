"""Ten thousand documents on 1 to 256 workers, by simulation: the real scheduler, Ray, and files, but workers that sleep.

Each worker sleeps instead of training (times differ as documents do); everything else is what `lift absorb FOLDER --ray` does:
jobs one by one from an iterator, a document's bytes through Ray, an outcome back, a file for it. 64 workers share a
process, since a machine that sleeps does not need 256. Ideal is the sum of all sleeping divided by the workers; best is what a
scheduler that costs nothing would need. Most rows sleep for
a fraction of a second, which is hard on the scheduler; the last one as long as a real document took, two for each worker.
With --minutes every row has all documents and sleeps as long in all: more workers, longer documents.

    python benchmarks/scaling.py --out docs/results
    python benchmarks/scaling.py --out docs/results --minutes 8 --workers 1 4 16 64 256
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import liftlm.cluster
from liftlm.cluster import RayCrew, connect
from liftlm.cluster_config import ClusterConfig
from liftlm.homes import Home
from liftlm.worklist import Job, Outcome, Tell, work_off

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DOCUMENTS = 10_000
ROUNDS = 40  # documents a worker at least, where 10,000 would take too long
BYTES = 40_000  # of a document, about 10,000 tokens
A_PROCESS = 64


class Sleeper:
    """A worker that needs as long as it is told."""

    def __init__(self, order: Any) -> None:
        pass

    def describe(self) -> str:
        return "sleeper"

    def work(self, payload: tuple[float, bytes], tell: Tell) -> Outcome:
        time.sleep(payload[0])
        return Outcome({"id": "0" * 16, "title": "a document"})


class SharedCrew(RayCrew):
    """Many workers in few processes; given out, watched and replaced as ever."""

    def __enter__(self) -> SharedCrew:
        self._count = self._settings.workers or 1
        processes = -(-self._count // A_PROCESS)
        connect("local", ClusterConfig(workers=processes))
        self._board = liftlm.cluster.ray.remote(liftlm.cluster._Board).options(num_cpus=0).remote()
        made = liftlm.cluster.ray.remote(liftlm.cluster._Actor).options(num_cpus=1, max_concurrency=A_PROCESS)
        hosts = [made.remote() for _ in range(processes)]
        for number in range(self._count):
            self._actors[number] = hosts[number // A_PROCESS]
            self._prepare(number)
        return self

    def __exit__(self, *ended: Any) -> None:
        liftlm.cluster.ray.shutdown()


def simulate(workers: int, documents: int, seconds: float, home: Home) -> dict[str, float]:
    """One row. seconds: of a document on average, between a third and three times that."""
    draw = random.Random(workers)
    times = [seconds * draw.lognormvariate(-0.125, 0.5) for _ in range(documents)]
    text = bytes(BYTES)

    def jobs() -> Iterator[Job]:
        for index, needed in enumerate(times):
            yield Job(f"{workers:08x}{index:024x}", f"document {index}", lambda needed=needed: (needed, text))  # type: ignore[misc]

    def ended(job: Job, outcome: Outcome) -> None:
        home.write_done(job.key, {"document": job.name, "tries": outcome.tries} | outcome.result)

    with SharedCrew("local", ClusterConfig(workers=workers), Sleeper, None) as crew:
        crew.describe()
        begun, cpu = time.monotonic(), time.process_time()
        tally = work_off(crew, jobs(), 3, ended)
        wall, cpu = time.monotonic() - begun, time.process_time() - cpu
    assert tally.done == documents, tally
    ideal = sum(times) / workers
    return {
        "best": shortest(times, workers),
        "workers": workers,
        "documents": documents,
        "seconds_each": seconds,
        "wall": wall,
        "ideal": ideal,
        "efficiency": ideal / wall,
        "documents_a_second": documents / wall,
        "driver_milliseconds": 1000 * cpu / documents,
    }


def shortest(times: list[float], workers: int) -> float:
    """Seconds if a scheduler cost nothing: the next document to whoever is free first."""
    free = [0.0] * workers
    for needed in times:
        heapq.heappush(free, heapq.heappop(free) + needed)
    return max(free)


def draw(rows: list[dict[str, float]], limit: dict[str, float], path: Path) -> None:
    """Efficiency against workers: as simulated, and on paper for documents that take longer."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4))
    workers = [row["workers"] for row in rows]
    each = [row["seconds_each"] for row in rows]
    label = f"{each[0]:g} s" if len(set(each)) == 1 else f"{each[0]:.2g} to {each[-1]:.2g} s"
    axes.plot(workers, [row["efficiency"] for row in rows], "o-", label=f"simulated, {label} a document")
    more = [2**power for power in range(18)]
    for seconds in (20, 200):
        paper = [min(1.0, seconds * limit["documents_a_second"] / count) for count in more]
        axes.plot(more, paper, "--", label=f"on paper, {seconds} s a document")
    axes.set(xscale="log", xlabel="workers", ylabel="efficiency", ylim=(0, 1.05))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def writable_folder(text: str) -> Path:
    """The folder, made if it is not there: what is wrong with it is said before an hour's simulation, not after."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"{path} cannot be written to: {error.strerror}. Name another folder."
        ) from error
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=writable_folder, required=True, help="a folder for scaling.json and scaling.png")
    parser.add_argument("--seconds", type=float, default=0.5, help="of a document")
    parser.add_argument("--minutes", type=float, help="instead of --seconds: that every row would take at best")
    parser.add_argument("--workers", type=int, nargs="*", default=WORKERS)
    parser.add_argument(
        "--real",
        type=float,
        default=198.0,
        help="seconds that a document took on a machine at about 480 tokens/s; 0: no such row",
    )
    parser.add_argument("--documents", type=int, default=DOCUMENTS)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home, rows = Home(folder), []
        for workers in chosen.workers:
            if chosen.minutes:
                documents, seconds = chosen.documents, 60 * chosen.minutes * workers / chosen.documents
            else:
                documents, seconds = min(chosen.documents, ROUNDS * workers), chosen.seconds
            rows.append(simulate(workers, documents, seconds, home))
            print(json.dumps(rows[-1]), flush=True)
        limit = simulate(256, min(chosen.documents, 3000), 0.0, home)  # nothing to wait for: what the scheduler can do
        print(json.dumps(limit), flush=True)
        real = simulate(256, 512, chosen.real, home) if chosen.real else None
        print(json.dumps(real), flush=True)
    result = {"rows": rows, "limit": limit, "real": real}
    stem = "scaling-all" if chosen.minutes else "scaling"
    (chosen.out / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, limit, chosen.out / f"{stem}.png")


if __name__ == "__main__":
    main()
