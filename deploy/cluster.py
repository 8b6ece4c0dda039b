"""Starting Ray, or joining a cluster that runs, and launching the actors on it."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import psutil
import ray
from ray.exceptions import RayError

from numoe.actors.attention import AttentionActor
from numoe.actors.expert import ExpertActor
from numoe.actors.gateway.actor import GatewayActor
from numoe.cluster.plan import Plan
from numoe.cluster.status import LoadProgress
from numoe.cluster.supervisor import NAMESPACE, ActorClasses, Supervisor
from numoe.engine.errors import NumoeError, UnavailableError

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_OWN_TEMP_DIR = f"{tempfile.gettempdir()}/numoe-ray-{os.getuid()}"
_OBJECT_STORE_BYTES = 128 << 20  # Ray's default is 30 % of memory, and lies where the weights lie
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_worker_niceness": "0",  # 15 by default: below everything else on the host
}


def start_ray() -> bool:
    """Join the running cluster, or start one on this host; whether it was started here."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    with _kept_signal_handlers():
        return _init_ray()


def _init_ray() -> bool:
    quiet = {"namespace": NAMESPACE, "logging_level": logging.ERROR, "log_to_driver": False}
    wanted = os.environ.get("RAY_ADDRESS", "")
    address = wanted or _running_cluster()
    if address and address != "local":
        try:
            ray.init(address=address, **quiet)
        except ConnectionError:
            if wanted:
                raise UnavailableError(
                    f"no Ray cluster answers at RAY_ADDRESS={wanted}; unset it to start one here"
                ) from None
        else:
            return False
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        _temp_dir=_OWN_TEMP_DIR,
        **quiet,
    )
    return True


def _running_cluster() -> str:
    """The address of a Ray cluster with a node on this host, empty if there is none.

    One that another numoe started for itself does not count: it goes when that one does.
    """
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet":
            command = " ".join(process.info["cmdline"] or ())
            found = re.search(r"--gcs-address=(\S+)", command)
            if found and f"--temp_dir={_OWN_TEMP_DIR}" not in command:
                return found.group(1)
    return ""


class Server:
    """The actors of one server, seen from the process that launched them."""

    def __init__(self, plan: Plan, listen: str | None) -> None:
        self.plan = plan
        self._instance = f"{int(time.time()):x}-{secrets.token_hex(3)}"
        classes = ActorClasses(gateway=GatewayActor, attention=AttentionActor, expert=ExpertActor)
        options = {"name": f"supervisor-{self._instance}", "lifetime": "detached", "num_cpus": 0, "max_concurrency": 16}
        self.supervisor: Any = ray.remote(Supervisor).options(**options).remote(self._instance, plan, classes, listen)
        self._launched = self.supervisor.launch.remote()

    def loading(self) -> Iterator[list[LoadProgress]]:
        """The progress of each actor, a few times a second, until the server is up; then returns.

        Raises the error that kept it from coming up.
        """
        while not ray.wait([self._launched], timeout=0.2)[0]:
            yield _unwrap(self.supervisor.progress.remote())
        self.address: str = _unwrap(self._launched)
        yield _unwrap(self.supervisor.progress.remote())

    def wait(self, stop: threading.Event) -> str:
        """Block until the server is down or `stop` is set; why it is down, empty if it was told to stop."""
        ended = self.supervisor.wait.remote()
        while not stop.is_set():
            if ray.wait([ended], timeout=0.25)[0]:
                return str(_unwrap(ended))
        return ""

    def worker(self) -> Any:
        """The attention worker's handle."""
        return _unwrap(self.supervisor.worker.remote())

    def close(self, drain_s: float = 0.0) -> None:
        """Take everything down, after running requests had `drain_s` seconds."""
        try:
            ended = self.supervisor.wait.remote()
            ray.get(self.supervisor.shutdown.remote(drain_s))
            ray.wait([ended], timeout=drain_s + 30.0)
            ray.kill(self.supervisor)
        except RayError:
            return


def _unwrap(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, NumoeError):
            raise cause from None
        raise UnavailableError(f"the supervisor failed: {cause or error}") from error


class StopSignals:
    """Ctrl-C and SIGTERM inside a `with` block.

    While the server starts they raise KeyboardInterrupt, so that whatever has begun is undone;
    after `started` they set the event `stop`. A second signal ends the process at once.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._raising, self._seen = True, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in _STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def started(self) -> None:
        """Set the event from now on."""
        self._raising = False

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self._seen:
            os._exit(128 + number)
        self._seen = True
        self.stop.set()
        if self._raising:
            raise KeyboardInterrupt


@contextmanager
def _kept_signal_handlers() -> Iterator[None]:
    """Put the handlers back that Ray replaces when it starts, also below Python."""
    handlers = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)
