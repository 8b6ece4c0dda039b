"""Starting Ray, or joining a cluster that runs, and launching the actors on it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import ray
from ray.exceptions import ActorUnavailableError, RayError

from numoe.actors.attention import AttentionActor
from numoe.actors.expert import ExpertActor
from numoe.actors.gateway.actor import GatewayActor
from numoe.cluster.calls import first_line, get
from numoe.cluster.endpoint import Endpoint
from numoe.cluster.heartbeats import Pulse
from numoe.cluster.member import Replaced, ServerRecord, end_processes, is_local, is_stopped
from numoe.cluster.placing import NAMESPACE, ActorClasses, kill_actors
from numoe.cluster.plan import Plan
from numoe.cluster.status import TAKE_DOWN_S, LoadProgress
from numoe.cluster.supervisor import Supervisor, supervisor_name
from numoe.deploy import messages
from numoe.deploy.head import Head
from numoe.deploy.raylets import PRIVATE_TEMP, find_raylets, head_answers
from numoe.deploy.signals import StopSignals, uninterrupted
from numoe.engine import shm
from numoe.engine.errors import UnavailableError
from numoe.engine.private import make_private_folder
from numoe.engine.weights import free_weights, sweep_incomplete

_OWN_TEMP_DIR = f"{PRIVATE_TEMP}/{os.getpid()}"
_OWNER_VARIABLE = "NUMOE_RAY_OWNER"
_OBJECT_STORE_BYTES = 128 << 20  # Ray's default is 30 % of memory, and lies where the weights lie
_CLOSING_HEAD_S = 3.0  # of silence: a head that was started here is not started again
_LOOK_S = 0.5
_ANSWER_S = 5.0
_RESTART_S = 30.0  # in which Ray has restarted a supervisor
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # else Ray kills actors where weights fill the memory, as they should
    "RAY_worker_niceness": "0",  # 15 by default: below everything else on the host
}


def start_ray() -> bool:
    """Join the running cluster, or start one on this host; whether it was started here."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    messages.redirect()
    with uninterrupted():
        started_here = _init_ray()
    messages.wait_patiently()
    return started_here


def stop_ray() -> None:
    """End the Ray that was started here, every process of it, and remove its session folder."""
    ray.shutdown()
    kill_ray()
    shutil.rmtree(_OWN_TEMP_DIR, ignore_errors=True)


def leave_ray(why: str) -> NoReturn:
    """End this process, and the Ray that it started, where Ray's head is dead: any call of Ray's would hang."""
    kill_ray()
    shutil.rmtree(_OWN_TEMP_DIR, ignore_errors=True)
    print(f"numoe: {why}", file=sys.stderr, flush=True)
    os._exit(1)


def kill_ray() -> None:
    """Kill what is left of the Ray that this process started: its agents outlive it by many seconds."""
    left = {process for process in psutil.process_iter() if _is_ours(process)}
    for process in list(left):
        with contextlib.suppress(psutil.Error):
            left.update(process.children(recursive=True))  # agents, which overwrite their environment
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(list(left), timeout=5.0)


def _is_ours(process: psutil.Process) -> bool:
    """Whether the Ray that was started here has started a process, as its environment says."""
    try:
        return process.environ().get(_OWNER_VARIABLE) == _OWN_TEMP_DIR
    except psutil.Error:  # gone, or another user's
        return False


def _init_ray() -> bool:
    quiet = {"namespace": NAMESPACE, "logging_level": logging.ERROR, "log_to_driver": False}
    wanted = os.environ.get("RAY_ADDRESS", "")
    address = wanted or _running_cluster()
    if address and address != "local":
        with contextlib.suppress(ConnectionError):
            if head_answers(address):  # else Ray would try for a minute
                ray.init(address=address, **quiet)
                return False
        if wanted:
            raise UnavailableError(f"no Ray cluster answers at RAY_ADDRESS={wanted}; unset it to start one here")
    os.environ[_OWNER_VARIABLE] = _OWN_TEMP_DIR
    make_private_folder(Path(PRIVATE_TEMP))  # Ray's own folders and sockets are open to all users
    remove_stale_sessions()
    if not address:  # else Ray has read the user's token already
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # its ports are open to the network
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        _temp_dir=_OWN_TEMP_DIR,
        **quiet,
    )
    return True


def remove_stale_sessions() -> None:
    """Remove the session folders of Rays whose numoe was killed, and could not do it."""
    in_use = {Path(raylet.folder) for raylet in find_raylets()}  # a Ray needs a while to end behind its numoe
    for folder in Path(PRIVATE_TEMP).iterdir():
        if folder.name.isdecimal() and folder not in in_use and not psutil.pid_exists(int(folder.name)):
            shutil.rmtree(folder, ignore_errors=True)


def _running_cluster() -> str:
    """How to reach a Ray cluster with a node on this host, empty if there is none.

    One that another numoe started for itself does not count: it goes when that one does. Nor does one whose head is
    dead, as Ray ends it, too. Beside several, "auto" is
    the one that was started last in Ray's own folder, where numoe's are not; given by its address, Ray would not look
    for the cluster's token.
    """
    return "auto" if any(raylet.may_be_joined for raylet in find_raylets()) else ""


class Server:
    """The actors of one server, seen from the process that launched them."""

    def __init__(self, plan: Plan, endpoint: Endpoint | None, *, keep_weights: bool = False) -> None:
        self.plan, self._keep_weights = plan, keep_weights
        self.instance = f"{int(time.time()):x}-{secrets.token_hex(3)}"
        classes = ActorClasses(gateway=GatewayActor, attention=AttentionActor, expert=ExpertActor)
        options = {
            "name": supervisor_name(self.instance), "lifetime": "detached", "num_cpus": 0, "max_concurrency": 16,
            "max_restarts": -1, "max_task_retries": 0,
        }  # fmt: skip
        self.supervisor: Any = ray.remote(Supervisor).options(**options).remote(
            self.instance, plan, classes, endpoint, keep_weights=keep_weights
        )
        self._launched = self.supervisor.launch.remote()
        self._head = Head()
        StopSignals.last_words.append(self._remove_memory)

    def loading(self) -> Iterator[list[LoadProgress]]:
        """The progress of each actor, a few times a second, until the server is up; then returns.

        Raises the error that kept it from coming up.
        """
        while not ray.wait([self._launched], timeout=0.2)[0]:
            yield get(self.supervisor.progress.remote())
        self.address: str = get(self._launched)
        yield get(self.supervisor.progress.remote())

    def wait(self, stop: threading.Event) -> str:
        """Block until the server is down or `stop` is set; why it is down, empty if it was told to stop and saved all.

        The supervisor watches the others, and whom it replaces is told; here it is watched. Ray starts it again
        when it dies. Where Ray itself has died, everything is cleaned up and the process ends.
        """
        ended, looks, pulse = self.supervisor.wait.remote(), 0, Pulse(self.supervisor)
        replaced = Replaced()
        while not stop.is_set():
            if why := self._head.why_lost():
                self.end_processes()
                cure = "start the server again" if self._is_ray_ours else "start Ray, then the server again"
                leave_ray(f"{why}; without it the server cannot go on: {cure}")
            for line in self._head.news():
                print(f"numoe: {line}", file=sys.stderr, flush=True)
            if ray.wait([ended], timeout=_LOOK_S)[0]:
                try:
                    return str(get(ended, restarts=True))
                except ActorUnavailableError:
                    time.sleep(_LOOK_S)
                    ended = self.supervisor.wait.remote()
            record = ServerRecord.load(shm.ROOT / self.instance)
            for line in replaced.lines(record) if record else ():
                print(f"numoe: {line}", file=sys.stderr, flush=True)
            looks = looks + 1 if record and is_stopped(record.pid, record.host) else 0
            if record and (looks > 1 or pulse.why_hung()):
                if is_local(record.pid, record.host):
                    end_processes([record.pid])
                pulse = Pulse(self.supervisor)
        return ""

    def _ask(self, method: str, *args: Any, patience_s: float = _RESTART_S) -> Any:
        """What the supervisor answers, asked again and again while Ray restarts it."""
        until, why = time.monotonic() + patience_s, "it does not answer"
        while (left := until - time.monotonic()) > 0:
            answer = getattr(self.supervisor, method).remote(*args)
            if ray.wait([answer], timeout=min(left, _ANSWER_S))[0]:
                try:
                    return get(answer, restarts=True)
                except ActorUnavailableError as error:
                    why = first_line(error)
                    time.sleep(_LOOK_S)
        raise UnavailableError(f"the supervisor does not come back: {why}")

    def worker(self) -> Any:
        """The attention worker's handle."""
        return self._ask("worker")

    def problems(self) -> list[str]:
        """What is wrong with where weights lie."""
        placements = (actor.placement for actor in self._ask("actors", patience_s=_ANSWER_S))
        return [placement.problem for placement in placements if placement is not None and placement.problem]

    def close(self, drain_s: float = 0.0) -> str:
        """Take everything down, after running requests had `drain_s` seconds; what is lost, empty if nothing is.

        Ray may end meanwhile, as when a whole process group is told to: then nobody answers any more.
        """
        closed = threading.Event()
        threading.Thread(target=self._leave_with_ray, args=(closed,), name="numoe-leave", daemon=True).start()
        lost = ""
        try:
            self._ask("shutdown", drain_s)
            lost = get(self.supervisor.wait.remote(), drain_s + TAKE_DOWN_S)
        except (RayError, UnavailableError):
            pass
        finally:
            with contextlib.suppress(RayError):
                ray.kill(self.supervisor)
            kill_actors(self.instance)
            self.end_processes()
            closed.set()
        return lost

    @property
    def _is_ray_ours(self) -> bool:
        """Whether this process has started Ray."""
        return os.environ.get(_OWNER_VARIABLE) == _OWN_TEMP_DIR

    def _leave_with_ray(self, closed: threading.Event) -> None:
        """Clean up and end this process if Ray ends before the server is `closed`."""
        while not closed.wait(_LOOK_S):
            if why := self._head.why_lost(_CLOSING_HEAD_S if self._is_ray_ours else None):
                self.end_processes()
                leave_ray(f"{why}: the server was ended without its help")

    def end_processes(self) -> None:
        """End the server's processes on this host without Ray's help, and free their memory."""
        record = ServerRecord.load(shm.ROOT / self.instance)
        if record is not None:
            self._keep_weights |= record.keep_weights  # `numoe stop --keep-weights` has told the supervisor
            end_processes(pid for pid, host in record.processes if is_local(pid, host))
        self._remove_memory()

    def _remove_memory(self) -> None:
        """Remove the shared memory, also where the supervisor is not there any more to do it."""
        folder = shm.ROOT / self.instance
        if not self._keep_weights:
            free_weights(folder)
        sweep_incomplete()  # of a load that was interrupted
        shm.remove_folder(folder)
