"""A blocking client of a numoe server: thin over the generated stubs, quick to import."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # read at import; its log lines would mix with ours

import grpc

from numoe.deploy.credentials import Credentials
from numoe.deploy.diagnosis import why_unreachable
from numoe.engine.errors import (
    AccessError,
    DataLossError,
    InputError,
    NotFoundError,
    NumoeError,
    PreconditionError,
    ResourceError,
    UnavailableError,
)
from numoe.v1 import (
    admin_pb2,
    admin_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    slots_pb2,
    slots_pb2_grpc,
    tokenizer_pb2_grpc,
)

DEFAULT_ADDRESS = "127.0.0.1:50051"
CALL_TIMEOUT_S = 15.0
STORE_TIMEOUT_S = 60.0  # the server itself gives a store half of it
POLL_S = 0.1
NO_CREDENTIALS = Credentials()

Result = TypeVar("Result")

_ERRORS: dict[grpc.StatusCode, type[NumoeError]] = {
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.UNAUTHENTICATED: AccessError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
    grpc.StatusCode.DATA_LOSS: DataLossError,
    grpc.StatusCode.INVALID_ARGUMENT: InputError,
}

_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.min_reconnect_backoff_ms", 5000),  # also how long a first connection may take
    ("grpc.enable_http_proxy", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
]


def default_address() -> str:
    """NUMOE_ADDRESS, or the address that `numoe serve` listens on."""
    return os.environ.get("NUMOE_ADDRESS") or DEFAULT_ADDRESS


class Client:
    """A connection to the server at `address` (HOST:PORT or unix:PATH), with `credentials` for it.

    Methods raise NumoeError with a message for the user. The stubs of all services are attributes;
    they raise grpc.RpcError, which `explained` turns into a NumoeError.
    """

    def __init__(self, address: str | None = None, credentials: Credentials = NO_CREDENTIALS) -> None:
        self.address, self._credentials = address or default_address(), credentials
        check_address(self.address)
        self._channel = credentials.channel(self.address, _OPTIONS)
        self.generation = generation_pb2_grpc.GenerationServiceStub(self._channel)
        self.tokenizer = tokenizer_pb2_grpc.TokenizerServiceStub(self._channel)
        self.models = model_pb2_grpc.ModelServiceStub(self._channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        self.slots = slots_pb2_grpc.SlotServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; what still runs on it is cancelled."""
        self._channel.close()

    def generate(
        self, request: generation_pb2.GenerateRequest, timeout_s: float | None = None
    ) -> Iterator[generation_pb2.GenerateResponse]:
        """Stream one generation; leaving the iterator early cancels it on the server."""
        return self._stream(self.generation.Generate(request, timeout=timeout_s))

    def save_slot(self, request: slots_pb2.SaveSlotRequest) -> Iterator[slots_pb2.SaveSlotResponse]:
        """Stream the progress of a save and its report; leaving the iterator early cancels it."""
        return self._stream(self.slots.SaveSlot(request))

    def restore_slot(self, request: slots_pb2.RestoreSlotRequest) -> Iterator[slots_pb2.RestoreSlotResponse]:
        """Stream the progress of a restore and its report; leaving the iterator early cancels it."""
        return self._stream(self.slots.RestoreSlot(request))

    def erase_slot(self, request: slots_pb2.EraseSlotRequest) -> slots_pb2.SlotReport:
        """Empty a slot."""
        timeout_s = CALL_TIMEOUT_S + request.wait.seconds
        return self._call(lambda: self.slots.EraseSlot(request, timeout=timeout_s)).report

    def fork_slot(self, request: slots_pb2.ForkSlotRequest) -> slots_pb2.SlotReport:
        """Make a slot hold what another holds."""
        timeout_s = CALL_TIMEOUT_S + request.wait.seconds
        return self._call(lambda: self.slots.ForkSlot(request, timeout=timeout_s)).report

    def list_slots(self) -> Sequence[admin_pb2.SlotStatus]:
        """What every slot holds."""
        return self._call(lambda: self.slots.ListSlots(slots_pb2.ListSlotsRequest(), timeout=CALL_TIMEOUT_S)).slots

    def list_snapshots(self) -> Sequence[slots_pb2.Snapshot]:
        """The snapshots in the server's store."""
        request = slots_pb2.ListSnapshotsRequest()
        return self._call(lambda: self.slots.ListSnapshots(request, timeout=STORE_TIMEOUT_S)).snapshots

    def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot."""
        request = slots_pb2.RemoveSnapshotRequest(name=name)
        self._call(lambda: self.slots.RemoveSnapshot(request, timeout=STORE_TIMEOUT_S))

    def status(self) -> admin_pb2.GetStatusResponse:
        """Tell what runs where."""
        return self._call(lambda: self.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S))

    def model(self) -> model_pb2.Model:
        """Describe the model that is served."""
        response = self._call(lambda: self.models.GetModel(model_pb2.GetModelRequest(), timeout=CALL_TIMEOUT_S))
        return response.model

    def shutdown(self, drain_s: float, *, keep_weights: bool = False) -> int:
        """Begin to stop the server, whose requests get `drain_s` seconds; returns how many ran."""
        request = admin_pb2.ShutdownRequest(keep_weights=keep_weights)
        request.drain_deadline.FromNanoseconds(int(drain_s * 1e9))
        return self._call(lambda: self.admin.Shutdown(request, timeout=CALL_TIMEOUT_S)).streams

    def wait_closed(self, timeout_s: float) -> bool:
        """Wait until nobody answers at the address; returns whether that came true in time."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            try:
                self.admin.GetStatus(admin_pb2.GetStatusRequest(), timeout=1.0)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return True
            time.sleep(POLL_S)
        return False

    def _stream(self, call: Any) -> Iterator[Any]:
        begun = False
        try:
            for message in call:
                begun = True
                yield message
        except grpc.RpcError as error:
            if begun and error.code() is grpc.StatusCode.UNAVAILABLE and not _from_numoe(error):
                raise UnavailableError(f"the server at {self.address} went away in the middle: try again") from error
            raise explained(error, self.address, self._credentials) from error
        finally:
            call.cancel()

    def _call(self, call: Callable[[], Result]) -> Result:
        try:
            return call()
        except grpc.RpcError as error:
            raise explained(error, self.address, self._credentials) from error


def check_address(address: str) -> None:
    """Raise InputError unless `address` is HOST:PORT or unix:PATH."""
    if address.startswith("unix:"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65535:
        raise InputError(f"{address!r} is no server address: give HOST:PORT, such as {DEFAULT_ADDRESS}")


def explained(error: grpc.RpcError, address: str, credentials: Credentials = NO_CREDENTIALS) -> NumoeError:
    """Turn a failed call into the NumoeError that tells the user what to do."""
    code, details = error.code(), " ".join(str(error.details() or "").split())
    if code is grpc.StatusCode.UNAVAILABLE and not _from_numoe(error):
        return why_unreachable(address, credentials)
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return InputError(f"the server at {address} is no numoe server, or an older one: {details}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return UnavailableError(details if _from_numoe(error) else f"{address} did not answer in time")
    if code in _ERRORS:
        return _ERRORS[code](details)
    return NumoeError(f"{address} answered {code.name}: {details}")


def _from_numoe(error: grpc.RpcError) -> bool:
    """Tell a server's own status from one that gRPC made up here."""
    return any(key == "grpc-status-details-bin" for key, _ in error.trailing_metadata() or ())  # type: ignore[misc, has-type]
