"""`lift serve` and `lift keys`: the server's process, and who may use it."""

from __future__ import annotations

import datetime
import ipaddress
import logging
import os
import socket
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from liftlm.arguments import (
    ConfigOption,
    LibraryOption,
    ModelOption,
    RayOption,
    SetOption,
    WindowOption,
    read_config,
)
from liftlm.cluster_commands import check_ray
from liftlm.display import note
from liftlm.errors import AddressError, ConfigError, EntryNotFoundError

if TYPE_CHECKING:
    from liftlm.config import LiftConfig

keys_app = typer.Typer(
    help="Make, list and remove the keys of `lift serve`.", no_args_is_help=True, rich_markup_mode=None
)
KeyArgument = Annotated[str, typer.Argument(metavar="ID", help="As `lift keys list` shows it.")]
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "multipart")


def serve(
    host: Annotated[
        str, typer.Option("--host", help="Where to listen; beyond this machine only with keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")] = 8321,
    name: Annotated[list[str] | None, typer.Option("--name", help="A host name clients use; repeatable.")] = None,
    log_content: Annotated[bool, typer.Option("--log-content", help="Also log questions and answers.")] = False,
    ray: RayOption = None,
    library: LibraryOption = None,
    model: ModelOption = None,
    window: WindowOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
) -> None:
    """Absorb documents and answer about them over HTTP (OpenAI's protocol), with a page for the browser."""
    _check_installed()
    resolved = read_config(config, settings, model=model, window=window)
    if ray is None:
        if library is not None:
            raise ConfigError("--library goes with --ray.", "Leave it out, or set LIFT_HOME.")
        _run(resolved, host, port, name or [], log_content)
        return
    if name or log_content or not _is_loopback(host) or port == 0:
        raise ConfigError(
            "Over Ray the server listens on this machine and one port, and takes neither --name nor --log-content.",
            "Put a proxy that asks for keys in front of it.",
        )
    from liftlm.shelf import library_home

    _run_replicas(resolved, ray, library or str(library_home()), host, port)


def _check_installed() -> None:
    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"`lift serve` needs packages that are not installed: {', '.join(missing)}.", "pip install 'liftlm[server]'"
        )


def _run(config: LiftConfig, host: str, port: int, names: list[str], log_content: bool) -> None:
    open_to_others = not _is_loopback(host)
    listening = _listen(host, port)
    import uvicorn

    from liftlm.server.app import make_app
    from liftlm.server.service import Service

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("liftlm.server").setLevel(logging.INFO)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a client's broken form is its own 400
    service = Service(config, keys_required=open_to_others)
    if open_to_others and not service.store.all_keys():
        raise AddressError(
            f"Listening on {host} would let others in without a key.",
            "`lift keys add NAME` makes one; without --host only this machine is served.",
        )
    app = make_app(service, hosts=names, log_content=log_content)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,  # uvicorn's own would close the log handlers of everyone in the process
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=5,
            server_header=False,
        )
    )
    failures: list[BaseException] = []

    def give_up(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    app.state.on_failure = give_up
    app.state.stopping = lambda: server.should_exit
    address = listening.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    note(f"Listening on http://{shown}:{address[1]} (the page, /v1, /metrics); loading the model. Ctrl-C stops.")
    server.run(sockets=[listening])
    if failures:
        raise failures[0]


def _run_replicas(config: LiftConfig, address: str, home: str, host: str, port: int) -> None:
    """Until Ctrl-C or SIGTERM."""
    check_ray()
    _listen(host, port).close()  # a taken port is known before models are loaded
    from starlette.responses import StreamingResponse

    from liftlm.cluster import Served, serving
    from liftlm.many_documents import Order
    from liftlm.server.replica import Call, Front, Replica

    def make_call(request: Any, body: bytes) -> Call:
        return Call(request.method, request.url.path, tuple(request.headers.items()), body)

    def make_reply(head: Any, pieces: Any) -> Any:
        return StreamingResponse(pieces, status_code=head.status, headers=dict(head.headers))

    order = Order(config, home, threads=config.cluster.cpus_per_worker)
    served = Served(Replica, Front, make_call, make_reply, order)
    note("Loading the model on every replica.")
    with serving(address, config.cluster, served, host, port):
        note(f"Listening on http://{host}:{port} (/v1/chat/completions, /v1/completions, /v1/models). Ctrl-C stops.")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            note("Stopping.")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is known before the model is loaded. Raises AddressError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # who connects as soon as the address is shown waits instead of being refused
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise AddressError(
            f"Cannot listen on {host} port {port}: {reason}.", "Choose another --port or --host."
        ) from error
    return listening


# --- keys -------------------------------------------------------------------------------------------------------------


@keys_app.command("add")
def add_key(name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is.")]) -> None:
    """Make a key and print it, once: only a hash of it is kept. A running server knows it at once."""
    from liftlm.server.keys import make_key
    from liftlm.server.store import Store
    from liftlm.shelf import library_home

    key_id, key = make_key(Store(library_home() / "server.sqlite"), name)
    note(f"{key_id} for {name}. It cannot be shown again:")
    print(key)


@keys_app.command("list")
def list_keys() -> None:
    """One line a key: id, date, documents, name; and what belongs to keys that were removed, or to no key at all."""
    from liftlm.server.store import LOCAL, Store
    from liftlm.shelf import library_home

    store = Store(library_home() / "server.sqlite")
    owners = store.owners()
    for key_id, name, _, created in store.all_keys():
        made = f"{datetime.datetime.fromtimestamp(created):%Y-%m-%d %H:%M}"
        print(f"{key_id}  {made}  {owners.pop(key_id, 0):>5,} documents  {name}")
    for owner, count in owners.items():
        what = "uploaded without a key" if owner == LOCAL else "the key was removed"
        print(f"{owner:12}  {'-':16}  {count:>5,} documents  ({what}; `lift keys give {owner} ID` gives them to a key)")


@keys_app.command("remove")
def remove_key(
    key_id: KeyArgument,
    give_to: Annotated[str | None, typer.Option("--give-to", metavar="ID", help="Who gets its documents.")] = None,
    delete_documents: Annotated[bool, typer.Option("--delete-documents", help="Delete them.")] = False,
) -> None:
    """Make a key invalid, at once. Its documents stay, seen by nobody, until they are given to another key or deleted."""
    from liftlm.server import keys
    from liftlm.server.store import Store
    from liftlm.shelf import Shelf, library_home

    if give_to is not None and delete_documents:
        raise ConfigError("--give-to and --delete-documents contradict each other.", "Leave one of them out.")
    store = Store(library_home() / "server.sqlite")
    removed, left = store.remove_key(key_id), store.owners().get(key_id, 0)
    if not removed and not left:
        raise EntryNotFoundError(f"There is no key '{key_id}'.", "`lift keys list` shows all.")
    note(f"Removed {key_id}." if removed else f"{key_id} was removed before.")
    if left and give_to is not None:
        note(f"{keys.give_documents(store, key_id, give_to):,} documents now belong to {give_to}.")
    elif left and delete_documents:
        note(f"{keys.delete_documents(store, Shelf(), key_id):,} documents deleted.")
    elif left:
        note(f"Nobody sees its {left:,} documents now; `lift keys give {key_id} ID` gives them to another key,")
        note(f"`lift keys remove {key_id} --delete-documents` deletes them.")


@keys_app.command("give")
def give(
    owner: Annotated[str, typer.Argument(metavar="FROM", help="A key's id, also of one that was removed, or local.")],
    other: Annotated[str, typer.Argument(metavar="TO", help="A key's id, or local: whoever asks without a key.")],
) -> None:
    """Give all documents of one key to another one."""
    from liftlm.server.keys import give_documents
    from liftlm.server.store import Store
    from liftlm.shelf import library_home

    count = give_documents(Store(library_home() / "server.sqlite"), owner, other)
    note(f"{count:,} documents of {owner} now belong to {other}.")
