r"""The manifest of a snapshot: what a slot held, and the names of the chunks that hold its keys and values.

    magic "numoeSS\n", blake3 of what follows [32], MessagePack of `Manifest`

It is written last, with a conditional put: before that the new snapshot does not exist.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, Self

import msgspec
import numpy as np
import numpy.typing as npt
from blake3 import blake3

from numoe.engine.errors import DataLossError, InputError, PreconditionError, UnsupportedError
from numoe.engine.kv.pages import PAGE_TOKENS
from numoe.engine.requests import SamplingParams
from numoe.engine.store.keys import FORMAT_VERSION, KEY_BYTES, chain_keys, chunk_key, root_key

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from numoe.engine.store.fingerprint import ModelFingerprint

MANIFEST_VERSION: Final = 2  # the first had no slot
_MAGIC: Final = b"numoeSS\n"
_CHECKSUM: Final = 32
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
SNAPSHOTS: Final = "snapshots"
RESUMABLE: Final = "resumable"
"""The folders of snapshots that users name, and of conversations that come back by themselves."""


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What keys and values depend on besides tokens: equal origins can use each other's snapshots.

    fingerprint: `ModelFingerprint.digest`; parts: `ModelFingerprint.parts`.
    kv_type:     `kv_type_name`. format_version: of chunks.
    """

    fingerprint: bytes
    parts: dict[str, str]
    kv_type: str
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(cls, model: ModelFingerprint, kv_type: str) -> Self:
        """What a server with this model and KV type writes."""
        return cls(fingerprint=model.digest, parts=dict(model.parts), kv_type=kv_type)


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A snapshot.

    tokens:      the token ids as little-endian int32, `token_ids` as an array; those of which keys
                 and values are stored, then any that were not computed yet.
    computed:    how many have keys and values.
    chunk_keys:  of every full chunk of computed tokens, in order, 32 bytes each; partial_key of the
                 rest, or None without one.
    salt:        of the chain's root.
    prompt_tokens: how many of the tokens the last request began with.
    sampling:    how that request chose tokens; with the tokens that is all its state.
    chunk_bytes: bytes of the chunks' objects together, the partial one's included.
    created:     seconds since 1970.
    slot:        that it is to come back in, or None. named: whether a user named that.
    snapshot:    that it was saved to or restored from last, or empty.
    replaces:    names of those that it went on from: they are not to come back beside it.
    """

    name: str
    origin: Origin
    tokens: bytes
    computed: int
    chunk_keys: tuple[bytes, ...]
    partial_key: bytes | None
    salt: bytes
    sampling: SamplingParams
    chunk_bytes: int
    created: float
    prompt_tokens: int = 0
    slot: int | None = None
    named: bool = False
    snapshot: str = ""
    replaces: tuple[str, ...] = ()
    version: int = MANIFEST_VERSION

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """int32 [tokens]."""
        return np.frombuffer(self.tokens, "<i4")

    @property
    def keys(self) -> tuple[bytes, ...]:
        """Of all chunks, the partial one last."""
        return self.chunk_keys if self.partial_key is None else (*self.chunk_keys, self.partial_key)

    @classmethod
    def of(
        cls, name: str, origin: Origin, token_ids: npt.ArrayLike, *, computed: int, salt: bytes = b"",
        sampling: SamplingParams, chunk_bytes: int, created: float, prompt_tokens: int = 0,
        slot: int | None = None, named: bool = False, snapshot: str = "", replaces: tuple[str, ...] = (),
    ) -> Self:  # fmt: skip
        """A manifest whose chunk keys follow from the rest."""
        ids = np.asarray(token_ids, "<i4")
        if not 0 <= computed <= ids.size:
            raise ValueError(f"{computed} of {ids.size} tokens cannot be computed")
        keys, partial = _keys(origin, salt, ids[:computed])
        return cls(
            name=check_name(name), origin=origin, tokens=ids.tobytes(), computed=computed, chunk_keys=keys,
            partial_key=partial, salt=salt, sampling=sampling, chunk_bytes=chunk_bytes, created=created,
            prompt_tokens=prompt_tokens, slot=slot, named=named, snapshot=snapshot, replaces=replaces,
        )  # fmt: skip


def encode_manifest(manifest: Manifest) -> bytes:
    """The object of a manifest."""
    payload = msgspec.msgpack.encode(manifest)
    return _MAGIC + blake3(payload).digest() + payload


def decode_manifest(data: Buffer, name: str) -> Manifest:
    """The manifest of snapshot `name`.

    Raises DataLossError for anything damaged, truncated, contradicting itself or of another name,
    and UnsupportedError for a newer version.
    """
    view = memoryview(data).cast("B")
    start = len(_MAGIC) + _CHECKSUM
    if view.nbytes < start or bytes(view[: len(_MAGIC)]) != _MAGIC:
        raise _damaged(name, f"its {view.nbytes} bytes do not begin as a manifest does")
    payload = view[start:]
    if blake3(payload).digest() != view[len(_MAGIC) : start]:
        raise _damaged(name, "it fails its checksum")
    try:
        version = msgspec.msgpack.decode(payload, type=_Version).version
        if not 1 <= version <= MANIFEST_VERSION:
            raise UnsupportedError(
                f"snapshot {name} has version {version}, where up to {MANIFEST_VERSION} is read; use a newer numoe"
            )
        manifest = msgspec.msgpack.decode(payload, type=Manifest)
    except msgspec.DecodeError as error:
        raise _damaged(name, f"it cannot be decoded ({error})") from None
    _check_consistent(manifest, name)
    return manifest


def check_compatible(manifest: Manifest, ours: Origin) -> None:
    """Raise PreconditionError, naming the first field that differs, unless `ours` can use the snapshot."""
    theirs = manifest.origin
    pairs = [("KV cache type", theirs.kv_type, ours.kv_type)]
    pairs += _part_pairs(theirs.parts, ours.parts)
    pairs += [
        ("KV format", str(theirs.format_version), str(ours.format_version)),
        ("model fingerprint", theirs.fingerprint.hex(), ours.fingerprint.hex()),
    ]
    for field, saved, running in pairs:
        if saved != running:
            raise PreconditionError(
                f"snapshot {manifest.name} does not fit: {field} is {saved} there and {running} here; "
                "serve the model that it was saved with, or compute the prompt again"
            )


def resumable_folder(origin: Origin) -> str:
    """The folder of the conversations that can come back with this model and KV type."""
    return f"{RESUMABLE}/{root_key(origin.fingerprint, origin.kv_type).hex()[:32]}"


def manifest_path(name: str, folder: str = SNAPSHOTS) -> str:
    """The object of snapshot `name`; InputError for an impossible name."""
    return f"{folder}/{check_name(name)}"


def check_name(name: str) -> str:
    """Return `name`; InputError unless it can name a snapshot."""
    if not _NAME.fullmatch(name):
        raise InputError(
            f"{name[:120]!r} cannot name a snapshot; use up to 100 letters, digits, '_', '-' and, not in front, '.'"
        )
    return name


class _Version(msgspec.Struct):
    """What every version of a manifest has."""

    version: int = MANIFEST_VERSION


def _keys(origin: Origin, salt: bytes, computed: npt.NDArray[np.int32]) -> tuple[tuple[bytes, ...], bytes | None]:
    """The keys of the full chunks, and of the partial one if there is one."""
    root = root_key(origin.fingerprint, origin.kv_type, salt)
    keys = chain_keys(root, computed)
    rest = computed[len(keys) * PAGE_TOKENS :]
    return tuple(keys), chunk_key(keys[-1] if keys else root, rest) if rest.size else None


def _check_consistent(manifest: Manifest, name: str) -> None:
    """Names, counts and the hash chain agree; of chunks in another format only we cannot compute the chain."""
    full, rest = divmod(manifest.computed, PAGE_TOKENS)
    if manifest.name != name:
        raise _damaged(name, f"it is that of snapshot {manifest.name[:120]!r}")
    if len(manifest.tokens) % 4 or not 0 <= manifest.computed <= len(manifest.tokens) // 4:
        raise _damaged(name, f"{len(manifest.tokens)} bytes of token ids cannot be {manifest.computed} tokens or more")
    if len(manifest.chunk_keys) != full or (manifest.partial_key is not None) != (rest > 0):
        raise _damaged(name, f"its chunks are not those of {manifest.computed} tokens")
    if any(len(key) != KEY_BYTES for key in manifest.keys):
        raise _damaged(name, "a chunk's key is not 32 bytes long")
    origin, computed = manifest.origin, manifest.token_ids[: manifest.computed]
    if origin.format_version == FORMAT_VERSION and _keys(origin, manifest.salt, computed) != (
        manifest.chunk_keys,
        manifest.partial_key,
    ):
        raise _damaged(name, "its chunks do not belong to its tokens")


def _part_pairs(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Parts in our order, which begins with what says most; then what only they have."""
    names = [*ours, *(name for name in theirs if name not in ours)]
    return [(name, theirs.get(name, "absent"), ours.get(name, "absent")) for name in names]


def _damaged(name: str, how: str) -> DataLossError:
    return DataLossError(f"the manifest of snapshot {name} is damaged: {how}; remove the snapshot and save it again")
