"""Text in and out of a model: tokenizer, streaming decoder, stop strings, chat templates."""

from numoe.engine.text.chat import ChatTemplate
from numoe.engine.text.stops import StopMatcher
from numoe.engine.text.stream import StreamDecoder
from numoe.engine.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate", "StopMatcher", "StreamDecoder", "Tokenizer"]
