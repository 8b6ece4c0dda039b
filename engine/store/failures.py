"""What goes wrong with a store, as numoe's errors: each says where, and what to do about it."""

from __future__ import annotations

import errno
import re
from typing import Final

from obstore import exceptions

from numoe.engine.errors import (
    AccessError,
    InputError,
    NotFoundError,
    NumoeError,
    PreconditionError,
    ResourceError,
    UnavailableError,
    UnsupportedError,
)

STORE_FAILURES: Final = (exceptions.BaseError, OSError, ValueError, NotImplementedError)
"""What obstore and the operating system raise; anything else is a defect."""


class MissingStoreError(UnavailableError):
    """The bucket of a store is not there, so that nothing can be told about what was in it."""


_ERRNO: Final[dict[type[NumoeError], tuple[int, ...]]] = {
    NotFoundError: (errno.ENOENT,),
    AccessError: (errno.EACCES, errno.EPERM, errno.EROFS),
    ResourceError: (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    InputError: (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG),
}
_STATUS: Final[dict[int, type[NumoeError]]] = {
    401: AccessError, 403: AccessError, 404: NotFoundError, 409: PreconditionError, 412: PreconditionError,
    501: UnsupportedError, 507: ResourceError,
}  # fmt: skip
_CURES: Final[dict[type[NumoeError], str]] = {
    NotFoundError: "check the name, and that the bucket or folder exists",
    MissingStoreError: "make the bucket, or check its name",
    AccessError: "check the permissions",
    PreconditionError: "somebody else wrote it meanwhile: read it again",
    ResourceError: "make room, raise the limit, or use another store",
    InputError: "check the store's URL and options",
    UnsupportedError: "use a store that supports conditional puts",
    UnavailableError: "check that the store runs and can be reached; what it would have held is computed again",
}
_CREDENTIALS: Final = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, the file of a service account's key",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_FULL: Final = re.compile(r"StorageFull|QuotaExceeded|InsufficientStorage|no space left", re.IGNORECASE)
_NEWLINE: Final = re.compile(r"\n|\\n")
_NO_BUCKET: Final = re.compile(r"NoSuchBucket|ContainerNotFound|specified bucket does not exist")
_NO_CREDENTIALS: Final = re.compile(
    r"169\.254\.169\.254|metadata\.google\.internal|credential|account must be specified|invalid access key",
    re.IGNORECASE,
)


def store_error(error: Exception, doing: str, url: str) -> NumoeError:
    """The error of numoe that says what `error`, of obstore or the operating system, means.

    doing: such as "reading chunks/00/ab".
    """
    kind = _kind(error)
    cure, names = _CURES[kind], _credentials_of(url)
    if kind is AccessError and names:
        cure = f"check the credentials ({names}) and their permissions"
    return kind(f"store {url}: {doing} failed: {_reason(error)}; {cure}")


def timeout_error(doing: str, url: str, seconds: float) -> UnavailableError:
    """No answer within the deadline; without credentials, a cloud's host is searched for them that may not be there."""
    names = _credentials_of(url)
    return UnavailableError(
        f"store {url}: {doing} did not end within {seconds:g} s; {_CURES[UnavailableError]}, or give it more time"
        + (f"; if no credentials are set, set them ({names})" if names else "")
    )


def _credentials_of(url: str) -> str:
    """The environment variables that hold the credentials for a store, "" for a folder."""
    return _CREDENTIALS.get(url.partition("://")[0].lower(), "") if "://" in url else ""


def _kind(error: Exception) -> type[NumoeError]:
    if _NO_BUCKET.search(str(error)):
        return MissingStoreError
    match error:
        case exceptions.AlreadyExistsError() | exceptions.PreconditionError():
            return PreconditionError
        case exceptions.PermissionDeniedError() | exceptions.UnauthenticatedError():
            return AccessError
        case exceptions.UnknownConfigurationKeyError() | exceptions.InvalidPathError() | ValueError():
            return InputError
        case exceptions.NotSupportedError() | NotImplementedError():
            return UnsupportedError
        case FileNotFoundError():
            return NotFoundError
        case OSError():
            return next((kind for kind, codes in _ERRNO.items() if error.errno in codes), UnavailableError)
        case _:
            return _kind_of_text(str(error))


def _kind_of_text(text: str) -> type[NumoeError]:
    """Of obstore's GenericError, which has nothing but its text."""
    status = re.search(r"status code: (\d+)", text)
    if _FULL.search(text):
        return ResourceError
    if status and int(status[1]) in _STATUS:
        return _STATUS[int(status[1])]
    if _NO_CREDENTIALS.search(text):
        return AccessError
    return InputError if text.startswith("Generic URL error") else UnavailableError


def _reason(error: Exception) -> str:
    """The first line, and of an answer in XML only its code and message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    code, message = (re.search(f"<{tag}>(.*?)</{tag}>", text) for tag in ("Code", "Message"))
    if code:
        # Azure's message goes on with the request's id and the time; newlines are escaped in the text of an error.
        return f"{code[1]} ({re.split(_NEWLINE, message[1])[0]})" if message else code[1]
    return text.split("\n", 1)[0].strip()[:300] or type(error).__name__
