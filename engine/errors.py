"""The errors numoe raises, all children of `NumoeError`.

    NumoeError
    ├── InputError            the caller's fault: a bad request, flag or file
    │   ├── ModelFileError    the GGUF file is damaged, incomplete or contradicts itself
    │   └── UnsupportedError  a well-formed file or request asks for something numoe does not have
    ├── NotFoundError         no such file, request, slot or snapshot
    ├── PreconditionError     what is there is not what the operation needs: changed by somebody else, of another model
    │   └── BusyError         somebody else uses it; waiting helps
    ├── DataLossError         stored data is damaged or truncated
    ├── AccessError           credentials or permissions are missing or refused
    ├── ResourceError         not enough of something: memory, disk, queue, ports
    └── UnavailableError      a part of the system is down, hung or draining; retrying may help

A message says what was wrong, where, and what to do about it, on one line.
"""

from __future__ import annotations


class NumoeError(Exception):
    """Root of every error that numoe raises on purpose."""


class InputError(NumoeError):
    """A request, flag or file that cannot be served as given."""


class ModelFileError(InputError):
    """A model file that is damaged, incomplete or contradicts itself."""


class UnsupportedError(InputError):
    """A well-formed file or request asks for something that numoe does not have."""


class NotFoundError(NumoeError):
    """No such file, request, slot or snapshot."""


class PreconditionError(NumoeError):
    """What is there is not what the operation needs: it was changed meanwhile, or belongs to another model."""


class BusyError(PreconditionError):
    """Somebody else uses what the operation needs; the same call may succeed later."""


class DataLossError(NumoeError):
    """Stored data that is damaged, truncated or not what its name says."""


class AccessError(NumoeError):
    """A store or file that refuses us: credentials or permissions are missing or wrong."""


class ResourceError(NumoeError):
    """Not enough of something: memory, disk, queue places, ports."""


class UnavailableError(NumoeError):
    """A part of the system is down, hung or draining; the same call may succeed later."""
