"""Weight formats: packed layouts and the packing of GGUF rows into them."""

from numoe.engine.formats.layouts import BLOCK_COLS, FORMATS, GROUP_ROWS, PackedFormat, packed_format
from numoe.engine.formats.pack import Shape, pack, shape_of

__all__ = ["BLOCK_COLS", "FORMATS", "GROUP_ROWS", "PackedFormat", "Shape", "pack", "packed_format", "shape_of"]
