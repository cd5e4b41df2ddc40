"""Ray, and the only file that imports it: a crew of actors for `worklist`, one a device.

Each actor holds a worker (which loads the model once) and does one job at a time. An actor that dies is started again by Ray,
here or on another node, and gets jobs once it says that it is ready; so a node that is gone for good, or comes back, needs
nothing from us. Knows nothing of documents: what is done is in the worker that `make_worker` makes.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from liftlm.cluster_config import ClusterConfig
from liftlm.errors import ClusterError, EntryNotFoundError, LiftError, TerminatedWorkError
from liftlm.worklist import Event, Outcome, Tell, Worker

_STARTS = 3  # of an actor that never got ready; then it is given up
_WAIT_SECONDS = 1.0  # for an event
_SHOW_SECONDS = 0.5  # between two looks at progress: each is a call

Reference = Any  # to what a remote call will return


class _Actor:
    """In a process of its own. The worker is made by a call, so that its failures are answers, and anew after a death."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def prepare(
        self, make_worker: Callable[[Any], Worker], order: Any, number: int, board: Any
    ) -> tuple[Any, LiftError | None]:
        """What the worker says of itself, or why there is none."""
        self._number, self._board = number, board
        try:
            self._worker = self._worker or make_worker(order)
            return self._worker.describe(), None
        except LiftError as error:
            return None, error

    def work(self, payload: Any, name: str) -> Outcome:
        assert self._worker is not None

        def tell(row: dict[str, Any]) -> None:
            self._board.put.remote({"worker": self._number, "name": name} | row)

        return self._worker.work(payload, tell)


class _Board:
    """Where actors put how far they are, the last row of each."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, Any]] = {}

    def put(self, row: dict[str, Any]) -> None:
        self._rows[row["worker"]] = row

    def take(self) -> list[dict[str, Any]]:
        rows, self._rows = self._rows, {}
        return list(rows.values())


class RayCrew:
    """`with RayCrew(address, settings, make_worker, order) as crew:`; raises ClusterError where there is no Ray there.

    address: `local` (workers on this machine only), `auto`, HOST:PORT, or ray://HOST:PORT. tell hears of progress.
    """

    def __init__(
        self,
        address: str,
        settings: ClusterConfig,
        make_worker: Callable[[Any], Worker],
        order: Any,
        tell: Tell = lambda row: None,
    ) -> None:
        self._address, self._settings, self._tell = address, settings, tell
        self._make, self._order = make_worker, order
        self._actors: dict[int, Any] = {}
        self._waiting: dict[Reference, tuple[int, str]] = {}  # call → worker, "ready" or "done"
        self._starts: dict[int, int] = {}  # deaths of a worker that was not ready yet, in a row
        self._shown = 0.0  # when progress was last asked for
        self._later: list[tuple[float, int]] = []  # when to ask a worker again that cannot be reached

    def __enter__(self) -> RayCrew:
        with contextlib.ExitStack() as opened:
            opened.enter_context(joined(self._address, self._settings))
            self._start()
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors.values():
            with contextlib.suppress(Exception):
                ray.kill(actor)
        self._opened.__exit__(kind, value, trace)

    def _start(self) -> None:
        count, options = share_out(self._settings)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._board = ray.remote(_Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
        actor = ray.remote(_Actor).options(max_restarts=-1, max_task_retries=0, **options)
        for number in range(count):
            self._actors[number] = actor.remote()
            self._prepare(number)

    def _prepare(self, number: int) -> None:
        reference = self._actors[number].prepare.remote(self._make, self._order, number, self._board)
        self._waiting[reference] = (number, "ready")

    # --- a Crew -------------------------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        return len(self._actors)

    def describe(self) -> Any:
        """What the first worker that is ready says of itself. Raises what its making raised, and ClusterError."""
        references = list(self._waiting)
        ready, _ = ray.wait(references, num_returns=1, timeout=self._settings.start_seconds)
        if not ready:
            raise ClusterError(
                f"No worker was ready after {self._settings.start_seconds:.0f} seconds.",
                "Look at `ray status` for free CPUs and GPUs, or raise cluster.start_seconds.",
            )
        try:
            description, error = ray.get(ready[0])
        except RayError as death:
            raise ClusterError(
                f"A worker died while it loaded the model: {_first_line(death)}.",
                "Give it more memory, or see Ray's logs.",
            ) from death
        if error is not None:
            raise error
        return description

    def begin(self, worker: int, payload: Any, name: str) -> None:
        self._waiting[self._actors[worker].work.remote(payload, name)] = (worker, "done")

    def wait(self) -> list[Event]:
        events: list[Event] = []
        while not events:
            self._ask_again()
            if not self._actors:
                raise ClusterError("All workers were lost.", "What is done is kept; the same command continues.")
            ready, _ = (
                ray.wait(list(self._waiting), num_returns=1, timeout=_WAIT_SECONDS) if self._waiting else ([], [])
            )
            if not self._waiting:
                time.sleep(_WAIT_SECONDS)
            events = [event for reference in ready if (event := self._event(reference)) is not None]
            self._show()
        return events

    def _ask_again(self) -> None:
        now, later = time.monotonic(), self._later
        self._later = [(due, number) for due, number in later if due > now]
        for due, number in later:
            if due <= now:
                self._prepare(number)

    def _event(self, reference: Reference) -> Event | None:
        number, kind = self._waiting.pop(reference)
        try:
            found = ray.get(reference)
        except RayError as death:
            return self._death(number, kind, death)
        if kind == "done":
            return Event("done", number, found)
        _, error = found
        if error is not None:
            raise error
        self._starts[number] = 0
        return Event("ready", number)

    def _death(self, number: int, kind: str, death: RayError) -> Event | None:
        """Ray starts an actor that died again, here or elsewhere; until then it cannot be reached, and is asked now and then."""
        if kind == "ready" and isinstance(death, RayActorError) and not isinstance(death, ActorUnavailableError):
            self._starts[number] = self._starts.get(number, 0) + 1
        if self._starts.get(number, 0) >= _STARTS:
            with contextlib.suppress(Exception):
                ray.kill(self._actors.pop(number))
        else:
            self._later.append((time.monotonic() + _WAIT_SECONDS, number))
        return Event("died", number, reason=_first_line(death)) if kind == "done" else None

    def _show(self) -> None:
        if time.monotonic() < self._shown + _SHOW_SECONDS:
            return
        self._shown = time.monotonic()
        with contextlib.suppress(GetTimeoutError, RayError):
            for row in ray.get(self._board.take.remote(), timeout=_WAIT_SECONDS):
                self._tell(row)


# --- serving ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """make_replica makes what has `hold(entry)` and `answer(call)`; make_front what has `entry_of(call)` and `answer(call)`.

    make_call: from a request and its body; make_reply: from a head and an iterator of bytes.
    """

    make_replica: Callable[[Any], Any]
    make_front: Callable[[Any], Any]
    make_call: Callable[[Any, bytes], Any]
    make_reply: Callable[[Any, Any], Any]
    order: Any


@contextlib.contextmanager
def serving(address: str, settings: ClusterConfig, served: Served, host: str, port: int) -> Iterator[None]:
    """Replicas behind one address, while the block lasts. A request goes where the adapter of its entry already is.

    Raises ClusterError.
    """
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation

    with joined(address, settings):
        try:
            count, options = share_out(settings)
            serve.start(
                proxy_location=ProxyLocation.HeadOnly,
                http_options=HTTPOptions(host=host, port=port),
                logging_config=_QUIET,
            )
            application = _application(serve, served, settings, settings.replicas or count, options)
            serve.run(application, name="liftlm", route_prefix="/", logging_config=_QUIET)
            yield
        except (RayError, RuntimeError) as error:
            raise ClusterError(
                f"The replicas could not be started: {_first_line(error)}.", "`ray status` and Ray's logs say more."
            ) from error
        finally:
            with contextlib.suppress(Exception):
                serve.shutdown()


_QUIET = {"log_level": "ERROR"}


def _application(serve: Any, served: Served, settings: ClusterConfig, count: int, options: dict[str, Any]) -> Any:
    class Replica:
        """Holds the model, and the adapters that it was asked for last."""

        def __init__(self) -> None:
            self._replica = served.make_replica(served.order)

        @serve.multiplexed(max_num_models_per_replica=settings.adapters_per_replica)  # type: ignore[untyped-decorator]
        async def hold(self, entry: str) -> Any:
            return await self._replica.hold(entry)

        async def answer(self, call: Any) -> AsyncIterator[Any]:
            held = None
            with contextlib.suppress(EntryNotFoundError):  # which the answer will say
                held = await self.hold(entry) if (entry := serve.get_multiplexed_model_id()) else None
            async for piece in self._replica.answer(call):
                yield piece
            del held  # it was in use until here

    class Front:
        """Where the port is."""

        def __init__(self, replicas: Any) -> None:
            self._front, self._replicas = served.make_front(served.order), replicas

        async def __call__(self, request: Any) -> Any:
            call = served.make_call(request, await request.body())
            known = await self._front.answer(call)
            if known is not None:
                return served.make_reply(known[0], _once(known[1]))
            chosen = self._replicas.options(stream=True, multiplexed_model_id=self._front.entry_of(call))
            pieces = chosen.answer.remote(call)
            head = await anext(pieces)
            return served.make_reply(head, pieces)

    replicas = serve.deployment(num_replicas=count, ray_actor_options=options, max_ongoing_requests=64)(Replica).bind()
    front = serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)(Front)
    return front.bind(replicas)


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


# --- the cluster ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(address: str, settings: ClusterConfig) -> Iterator[None]:
    """Ray, while the block lasts. A SIGTERM ends the block as Ctrl-C would, and raises TerminatedWorkError.

    Raises ClusterError.
    """
    terminated = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt  # what Ray's waiting calls pass on; of SystemExit they make one with code 1

    handles_signals = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    # Ray prints what befalls its workers to standard output, which is for answers
    with contextlib.redirect_stdout(sys.stderr):
        try:
            if handles_signals:
                signal.signal(signal.SIGTERM, terminate)
            connect(address, settings)
            if handles_signals:
                signal.signal(signal.SIGTERM, terminate)  # Ray put its own there, which ends without a word
            yield
        except (KeyboardInterrupt, SystemExit) as ending:
            # while it joins, Ray's own handler is there for a moment: it exits with the signal's number
            if terminated or getattr(ending, "code", None) == signal.SIGTERM:
                raise TerminatedWorkError() from None
            raise
        finally:
            ray.shutdown()
            if handles_signals:
                signal.signal(signal.SIGTERM, before)


def connect(address: str, settings: ClusterConfig) -> None:
    """Joins a cluster, or makes one of this machine. Raises ClusterError."""
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    try:
        if address == "local":
            cpus = settings.cpus_per_worker * settings.workers if settings.workers else os.cpu_count()
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
        else:
            _knock(address)
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ClusterError(
            f"There is no Ray cluster at '{address}': {_first_line(error)}.",
            "`ray start --head` starts one; --ray local uses this machine alone. A cluster that was started with a token "
            "(Ray makes ~/.ray/auth_token) wants RAY_AUTH_MODE=token here.",
        ) from error


def _knock(address: str) -> None:
    """Raises OSError where nobody listens at HOST:PORT or ray://HOST:PORT; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def share_out(settings: ClusterConfig) -> tuple[int, dict[str, Any]]:
    """How many workers, and what Ray is to reserve for each. Raises ClusterError where not one fits."""
    there = ray.cluster_resources()
    gpus = settings.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if there.get("GPU", 0) else 0.0
    cpus = settings.cpus_per_worker
    room = math.floor(there.get("CPU", 0) / cpus)
    if gpus:
        room = min(room, math.floor(there.get("GPU", 0) / gpus))
    if room < 1:
        raise ClusterError(
            f"The cluster has {there.get('CPU', 0):g} CPUs and {there.get('GPU', 0):g} GPUs, which is not enough for one worker.",
            "Lower cluster.cpus_per_worker or cluster.gpus_per_worker, or start more nodes.",
        )
    variables = {"OMP_NUM_THREADS": str(cpus), "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")}
    for name in (
        "ATEN_CPU_CAPABILITY",
        "XDG_CACHE_HOME",
    ):  # what may make this machine's numbers differ from a worker's
        if name in os.environ:
            variables[name] = os.environ[name]
    options = {"num_cpus": cpus, "num_gpus": gpus, "runtime_env": {"env_vars": variables}}
    return settings.workers or room, options


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".")[:300]
