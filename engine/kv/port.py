"""`PagePort`: the way of KV pages out of an attention backend's memory and into it, in canonical bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from numoe.engine.store.chunks import ChunkShape

if TYPE_CHECKING:
    from typing_extensions import Buffer


class PagePort(Protocol):
    """Reads and writes pages that no running step writes, in the bytes of `store/portable.py`.

    Every method may be called from any thread, several at a time, while steps run on other pages;
    it returns when everything is where it belongs.
    """

    def shape(self, tokens: int) -> ChunkShape:
        """What the chunk of a page with `tokens` tokens, 1 to 256, looks like."""

    def export_page(
        self, page: int, tokens: int, out: npt.NDArray[np.uint8] | None = None
    ) -> list[npt.NDArray[np.uint8]]:
        """The canonical bytes of the first `tokens` tokens of a page, uint8 [layer_bytes] for each layer.

        out: uint8 [layers * layer_bytes] that they are written to, one layer after the other, instead of new
        memory (see `build_chunk`). ValueError if it is of another size.
        """

    def import_page(self, page: int, layers: Sequence[Buffer], tokens: int) -> None:
        """Write the first `tokens` tokens of a page from the canonical bytes of each layer.

        Further tokens can be appended behind. ValueError if sizes do not fit.
        """

    def copy_page(self, source: int, target: int) -> None:
        """Make page `target` what page `source` is."""
