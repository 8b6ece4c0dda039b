"""Split models: NAME-00001-of-0000N.gguf and its siblings, as `llama-gguf-split` writes them.

The first part holds the metadata; every part holds `split.no` (from 0), `split.count` and
`split.tensors.count` (of all parts together), and its own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from numoe.engine.errors import ModelFileError
from numoe.engine.gguf.header import Header
from numoe.engine.gguf.scanner import DAMAGED, quoted

_PART: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def part_paths(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """All parts of the model that `path` with `metadata` is a part of; [path] if it is not split."""
    count = _split_key(path, metadata, "split.count", 1)
    if count <= 1:
        return [path]
    match = _PART.fullmatch(path.name)
    if match is None:
        raise ModelFileError(
            f"{path}: one of {count} parts, but not named NAME-00001-of-{count:05d}.gguf; "
            "give every part its original name back"
        )
    if int(match["count"]) != count:
        raise ModelFileError(
            f"{path}: named one of {int(match['count'])} parts, but made as one of {count}; "
            "give every part its original name back"
        )
    paths = [
        path.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)
    ]
    missing = [part.name for part in paths if not part.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelFileError(
            f"{path}: {len(missing)} of {count} parts missing beside it: {', '.join(missing[:3])}{more}; "
            "download them into the same folder"
        )
    return paths


def check_parts(paths: Sequence[Path], headers: Sequence[Header]) -> None:
    """Raise ModelFileError unless the parts number themselves and add up as they claim."""
    if len(paths) == 1:
        return
    names: set[str] = set()
    for index, (path, header) in enumerate(zip(paths, headers, strict=True)):
        number = _split_key(path, header.metadata, "split.no", -1)
        count = _split_key(path, header.metadata, "split.count", 1)
        if (number, count) != (index, len(paths)):
            raise ModelFileError(
                f"{path}: is part {number + 1} of {count}, by its name {index + 1} of {len(paths)}; "
                "give every part its original name back"
            )
        twice = names & header.tensors.keys()
        if twice:
            raise ModelFileError(f"{path}: tensor {quoted(min(twice))} is in another part too; {DAMAGED}")
        names |= header.tensors.keys()
    total = _split_key(paths[0], headers[0].metadata, "split.tensors.count", len(names))
    if total != len(names):
        raise ModelFileError(
            f"{paths[0]}: its {len(paths)} parts hold {len(names)} tensors, not {total}; "
            "download every part again, from the same place"
        )


def _split_key(path: Path, metadata: Mapping[str, Any], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelFileError(f"{path}: metadata key {key} is not an integer; {DAMAGED}")
    return value
