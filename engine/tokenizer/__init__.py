"""Text to token ids and back, from the metadata of a GGUF file alone."""

from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.tokenizer import StreamDecoder, Tokenizer

__all__ = ["ChatTemplate", "StreamDecoder", "Tokenizer"]
