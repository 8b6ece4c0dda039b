"""Text in and out of a model: tokenizer, streaming decoder, stop strings."""

from numoe.engine.text.stops import StopMatcher
from numoe.engine.text.stream import StreamDecoder
from numoe.engine.text.tokenizer import Tokenizer

__all__ = ["StopMatcher", "StreamDecoder", "Tokenizer"]
