"""Errors as clients see them: the one place that maps `NumoeError` to gRPC status codes.

Every status carries an ErrorInfo (domain "numoe"); a bad request also a BadRequest that names
the fields, and an error that may pass a RetryInfo.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from numoe.engine.errors import (
    AccessError,
    DataLossError,
    InputError,
    ModelFileError,
    NotFoundError,
    NumoeError,
    PreconditionError,
    ResourceError,
    UnavailableError,
    UnsupportedError,
)

DOMAIN = "numoe"
MAX_VIOLATIONS = 16  # statuses travel in a header, whose size HTTP/2 peers limit to 8 KiB
MAX_TEXT = 240

logger = logging.getLogger(__name__)


class Violation(NamedTuple):
    """A request field, by its protobuf path, and what is wrong with it."""

    field: str
    description: str


class BadRequestError(InputError):
    """A request with fields that cannot be served as given."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations[:MAX_VIOLATIONS]))


class UnauthenticatedError(NumoeError):
    """A caller without a token that this server accepts."""


class RequestIdInUseError(InputError):
    """Another running request has this request_id."""


class SlowReaderError(ResourceError):
    """The client reads its stream too slowly for what may wait in memory."""


class DeadlineError(NumoeError):
    """The call's deadline passed."""


class GenerationFailedError(NumoeError):
    """The worker gave a request up because of an error of its own."""


class _Rule(NamedTuple):
    error: type[NumoeError]
    code: int
    reason: str
    retry_s: float | None


# The first rule that fits counts: children stand before their parents.
_RULES = (
    _Rule(BadRequestError, code_pb2.INVALID_ARGUMENT, "BAD_REQUEST", None),
    _Rule(UnauthenticatedError, code_pb2.UNAUTHENTICATED, "UNAUTHENTICATED", None),
    _Rule(RequestIdInUseError, code_pb2.ALREADY_EXISTS, "REQUEST_ID_IN_USE", None),
    _Rule(SlowReaderError, code_pb2.RESOURCE_EXHAUSTED, "SLOW_READER", None),
    _Rule(DeadlineError, code_pb2.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", None),
    _Rule(GenerationFailedError, code_pb2.INTERNAL, "GENERATION_FAILED", None),
    _Rule(ModelFileError, code_pb2.FAILED_PRECONDITION, "MODEL_FILE", None),
    _Rule(UnsupportedError, code_pb2.FAILED_PRECONDITION, "UNSUPPORTED", None),
    _Rule(InputError, code_pb2.INVALID_ARGUMENT, "BAD_REQUEST", None),
    _Rule(NotFoundError, code_pb2.NOT_FOUND, "NOT_FOUND", None),
    _Rule(PreconditionError, code_pb2.FAILED_PRECONDITION, "PRECONDITION", None),
    _Rule(AccessError, code_pb2.FAILED_PRECONDITION, "ACCESS", None),
    _Rule(DataLossError, code_pb2.DATA_LOSS, "DATA_LOSS", None),
    _Rule(ResourceError, code_pb2.RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED", 1.0),
    _Rule(UnavailableError, code_pb2.UNAVAILABLE, "UNAVAILABLE", 2.0),
    _Rule(NumoeError, code_pb2.INTERNAL, "INTERNAL", None),
)


def status_of(error: NumoeError) -> status_pb2.Status:
    """Make the google.rpc.Status of an error, details included."""
    rule = next(rule for rule in _RULES if isinstance(error, rule.error))
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=rule.reason, domain=DOMAIN)]
    if isinstance(error, BadRequestError):
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=v.field, description=_short(v.description))
            for v in error.violations[:MAX_VIOLATIONS]
        ]
        details.append(error_details_pb2.BadRequest(field_violations=violations))
    if rule.retry_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(rule.retry_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(
        code=rule.code, message=_short(str(error)), details=[_packed(d) for d in details]
    )


class Malformed(NamedTuple):
    """Stands for a request that could not be decoded."""

    reason: str


Handler = TypeVar("Handler", bound=Callable[..., Awaitable[Any]])


def answers_errors(handler: Handler) -> Handler:
    """Make a servicer method end the call with the rich status of any NumoeError it raises.

    Anything else it raises is a defect: it is logged, and the client reads INTERNAL.
    """

    @functools.wraps(handler)
    async def answer(
        servicer: object, request: Message | Malformed, context: grpc.aio.ServicerContext[Any, Any]
    ) -> object:
        try:
            return await handler(servicer, decoded(request), context)
        except NumoeError as error:
            status = status_of(error)
        except grpc.aio.AbortError:
            raise  # the handler has said what is wrong
        except Exception:
            logger.exception("defect in %s", handler.__qualname__)
            status = status_of(NumoeError("internal error, see the server's log"))
        await context.abort_with_status(rpc_status.to_status(status))  # type: ignore[attr-defined]
        return None

    return answer  # type: ignore[return-value]


def decoded(request: Message | Malformed) -> Message:
    """The request, if it is one. Raises BadRequestError."""
    if isinstance(request, Malformed):
        raise BadRequestError([Violation("request", f"cannot be decoded: {request.reason}")])
    return request


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def _short(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
