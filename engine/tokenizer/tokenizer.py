"""Text to token ids and back."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from engine.errors import GGUFError, TokenizerError
from engine.tokenizer.merging import SPACE_MARK, build, byte_of_character
from engine.tokenizer.vocabulary import TokenizerMetadata, TokenType, Vocabulary, read_vocabulary

_WHITE_SPACE = " \t\n\v\f\r"


class Tokenizer:
    """The tokenizer of one model. Stateless once built, so that threads may share it.

    Attributes:
        vocabulary: what the file says.
        n_vocab: number of tokens; a model may have logits for more.
        bos_id, eos_id, eot_id: None where the model has none.
        eog_ids: tokens that end a generation.
        unused_ids: tokens that must never be sampled.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.n_vocab = len(vocabulary.tokens)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eot_id = vocabulary.eot_id
        self.eog_ids = vocabulary.eog_ids
        self.unused_ids = vocabulary.unused_ids
        self._merging = build(vocabulary)
        self._byte_of_character = byte_of_character() if vocabulary.model == "gpt2" else {}
        self._bytes: dict[int, bytes] = {}  # of tokens that were decoded before

    @classmethod
    def from_metadata(cls, metadata: TokenizerMetadata) -> Tokenizer:
        """Build the tokenizer a GGUF file describes.

        Raises:
            TokenizerError: if the description is missing, damaged, or of a kind we do not know.
        """
        try:
            return cls(read_vocabulary(metadata))
        except GGUFError as error:
            raise TokenizerError(f"the file has no tokenizer that can be used: {error}") from error

    @cached_property
    def n_sampled(self) -> int:
        """Return the number of tokens up to the last one that may be sampled: most unused ones are behind it."""
        unused, n = self.unused_ids, self.n_vocab
        while n > 1 and n - 1 in unused:
            n -= 1
        return n

    @cached_property
    def unused_among_sampled(self) -> npt.NDArray[np.intp]:
        """Return the unused ids below `n_sampled`, rising; shared by all who ask."""
        return np.array(sorted(i for i in self.unused_ids if i < self.n_sampled), np.intp)

    def sampled_among(self, n_logits: int) -> npt.NDArray[np.bool_]:
        """Return for each logit of a model whether it is that of a token that may be sampled, [n_logits]."""
        is_sampled = np.arange(n_logits) < self.n_sampled
        is_sampled[self.unused_among_sampled] = False
        return is_sampled

    def encode(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: any Unicode text; no normalisation is applied.
            add_special: put BOS in front and EOS behind where the model wants them.
            parse_special: take the text of a control token, such as `<|im_end|>`, for that token. Only for text that
                a chat template wrote: in a user's text it would let the user forge the markup.

        Raises:
            TokenizerError: if the text has lone surrogates, which are no characters.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"the text has a lone surrogate, {text[error.start]!a}, at character {error.start}; "
                "expected Unicode text: decode bytes with errors='replace'"
            ) from None
        vocabulary = self.vocabulary
        ids: list[int] = []
        if add_special and vocabulary.add_bos and vocabulary.bos_id is not None:
            ids.append(vocabulary.bos_id)
        for part in self._cut(text, parse_special=parse_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                stretch = " " + part if vocabulary.add_space_prefix else part
                ids += self._merging.encode(stretch, add_special_tokens=False).ids
        if add_special and vocabulary.add_eos and vocabulary.eos_id is not None:
            ids.append(vocabulary.eos_id)
        return ids

    def encode_chat(self, text: str) -> list[int]:
        """Return the token ids of what a chat template wrote: markup counts, and BOS is there once."""
        has_bos = self.bos_id is not None and text.startswith(self.token_text(self.bos_id))
        return self.encode(text, add_special=not has_bos, parse_special=True)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continues: bool = False) -> str:
        """Return the text of tokens; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave out control tokens, the markup that readers do not see.
            continues: the tokens go on after others, so a SentencePiece model's first space is part of the text.

        Raises:
            TokenizerError: if an id is not in the vocabulary.
        """
        decoder = self.decoder(skip_special=skip_special, continues=continues)
        return "".join([decoder.push(token_id) for token_id in ids]) + decoder.flush()

    def decoder(self, *, skip_special: bool = True, continues: bool = False) -> StreamDecoder:
        """Return a decoder that takes tokens one at a time; the arguments are those of `decode`."""
        return StreamDecoder(
            self, skip_special=skip_special, strip_space=self.vocabulary.add_space_prefix and not continues
        )

    def token_text(self, token_id: int) -> str:
        """Return a token as the vocabulary writes it."""
        self._check(token_id)
        return self.vocabulary.tokens[token_id]

    def is_control(self, token_id: int) -> bool:
        """Return whether a token is markup that readers do not see."""
        self._check(token_id)
        return self.vocabulary.is_hidden(token_id)

    def token_bytes(self, token_id: int) -> bytes:
        """Return what a token adds to a text: UTF-8, but a character may be spread over several tokens."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._find_bytes(token_id)
        return found

    def _find_bytes(self, token_id: int) -> bytes:
        text = self.token_text(token_id)
        kind = self.vocabulary.types[token_id]
        if kind == TokenType.UNUSED:
            return b""
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED):
            return text.encode()
        if self.vocabulary.model != "gpt2":
            return self._byte_tokens.get(token_id) or text.replace(SPACE_MARK, " ").encode()
        try:
            return bytes(map(self._byte_of_character.__getitem__, text))
        except KeyError:  # not made of byte characters, so it stands for itself
            return text.encode()

    @cached_property
    def _byte_tokens(self) -> dict[int, bytes]:
        names = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}
        ids, types = self.vocabulary.ids, self.vocabulary.types
        return {ids[name]: byte for name, byte in names.items() if name in ids and types[ids[name]] == TokenType.BYTE}

    @cached_property
    def _all_special(self) -> list[str]:
        return self.vocabulary.special_texts(parse_special=True)

    @cached_property
    def _user_defined(self) -> list[str]:
        return self.vocabulary.special_texts(parse_special=False)

    def _cut(self, text: str, *, parse_special: bool) -> list[str | int]:
        """Cut a text at its special tokens, all places of a longer one before any of a shorter one."""
        parts: list[str | int] = [text] if text else []
        for special in self._all_special if parse_special else self._user_defined:
            if special not in text:
                continue
            token_id, strips = self.vocabulary.ids[special], self.vocabulary.strips_behind(special)
            cut: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    cut.append(part)
                    continue
                first, *others = part.split(special)
                if first:
                    cut.append(first)
                for other in others:
                    cut.append(token_id)
                    behind = other.lstrip(_WHITE_SPACE) if strips else other
                    if behind:
                        cut.append(behind)
            parts = cut
        return parts

    def _check(self, token_id: int) -> None:
        if not 0 <= token_id < self.n_vocab:
            raise TokenizerError(f"there is no token {token_id}; expected an id from 0 to {self.n_vocab - 1}")


class StreamDecoder:
    """Decodes tokens one at a time: no text is given out before its last character is whole."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, strip_space: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is now certain, which may be empty."""
        if self._skip_special and self._tokenizer.is_control(token_id):
            return ""
        data = self._tokenizer.token_bytes(token_id)
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """End the text: return U+FFFD for a character that was never finished. The decoder can be used again."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
