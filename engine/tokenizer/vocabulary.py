"""The vocabulary in a GGUF file: texts, kinds and special ids of its tokens, checked against each other."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, cast, get_args

from engine.errors import TokenizerError
from engine.tokenizer.pre_tokenizers import PreTokenizer, pre_tokenizer

_PREFIX = "tokenizer.ggml."
_NO_ID = 0xFFFFFFFF  # -1 as an unsigned number: some converters write it for "none"

# fmt: off
# Tokens that end a generation whatever ids the file names, because files often name only one of several.
_EOG_TEXTS = frozenset((
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
    "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~[",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
))
# The end of a turn, if the file has no id for it: the first of these that is a token.
_EOT_TEXTS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|endoftext|>", "<|end_of_text|>", "<EOT>",
    "[EOT]", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<end_of_utterance>",
)
# fmt: on
# Special tokens of Phi-3 vocabularies that leave the white space behind them as it is.
_KEEPING_SPACES = frozenset(("<unk>", "<s>", "<|endoftext|>"))
_EOG_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# The channel markup of gpt-oss: part of the text its readers want to see, and <|end|> ends a message, not the turn.
_HARMONY_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>", "<|end|>")

Model: TypeAlias = Literal["gpt2", "llama", "gemma4"]


class TokenizerMetadata(Protocol):
    """What is asked of a file's metadata; `engine.gguf.metadata.Metadata` has it."""

    def __contains__(self, key: str, /) -> bool: ...

    def text(self, key: str, default: str | None = None, /) -> str:
        """Return a string."""

    def integer(self, key: str, default: int | None = None, /) -> int:
        """Return an integer."""

    def flag(self, key: str, default: bool | None = None, /) -> bool:
        """Return a boolean."""

    def texts(self, key: str, /) -> Sequence[str]:
        """Return an array of strings."""

    def integers(self, key: str, /) -> Sequence[int]:
        """Return an array of integers."""

    def numbers(self, key: str, /) -> Sequence[float]:
        """Return an array of numbers."""


class TokenType(enum.IntEnum):
    """The kinds of token a file knows."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_HIDDEN = frozenset({TokenType.CONTROL, TokenType.UNKNOWN})


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """All that a tokenizer needs from a file.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for SentencePiece BPE, "gemma4" for BPE of characters with merges like
            the former's, spaces and bytes like the latter's.
        tokens: text of each id.
        types: kind of each id.
        ids: id of each text; UNUSED tokens that repeat another one's text are left out.
        merges: all but SentencePiece: "left right", best first.
        scores: SentencePiece only: merge priority of each id, higher first.
        pre: byte-level BPE only: how a text is cut before merging.
        add_space_prefix: SentencePiece only: whether a stretch of text starts with a space of its own.
        bos_id, eos_id, eot_id, unknown_id: None where the model has none.
        add_bos, add_eos: whether `add_special` puts them around a text.
        eog_ids: tokens that end a generation.
        unused_ids: tokens that must never be sampled.
        strips: whether special tokens take the white space behind them with them, all but some.
    """

    model: Model
    tokens: Sequence[str]
    types: Sequence[int]
    ids: dict[str, int]
    merges: Sequence[str]
    scores: Sequence[float]
    pre: PreTokenizer | None
    add_space_prefix: bool
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    unknown_id: int | None
    add_bos: bool
    add_eos: bool
    eog_ids: frozenset[int]
    unused_ids: frozenset[int]
    strips: bool = False

    def is_hidden(self, token_id: int) -> bool:
        """Return whether a token is markup that readers do not see."""
        return self.types[token_id] in _HIDDEN

    def strips_behind(self, special: str) -> bool:
        """Return whether a special token takes the white space behind it with it."""
        return self.strips and special not in _KEEPING_SPACES

    def visible_ids(self) -> dict[str, int]:
        """Return a new dict of `ids` without the hidden tokens."""
        ids = dict(self.ids)
        for i, kind in enumerate(self.types):
            if kind in _HIDDEN and ids.get(self.tokens[i]) == i:
                del ids[self.tokens[i]]
        return ids

    def special_texts(self, *, parse_special: bool) -> list[str]:
        """Return the tokens that are looked for in a text before it is tokenised, longest first."""
        kinds = {TokenType.USER_DEFINED, *(_HIDDEN if parse_special else ())}
        special = [text for text, i in self.ids.items() if self.types[i] in kinds]
        return sorted(special, key=lambda text: len(text.encode()), reverse=True)


def read_vocabulary(metadata: TokenizerMetadata) -> Vocabulary:
    """Read and check the vocabulary; raise `TokenizerError` if it contradicts itself or is of a kind we do not know.

    What `metadata` itself raises (a missing key, a wrong type) is passed on.
    """
    model = metadata.text(_PREFIX + "model")
    if model not in get_args(Model):
        raise TokenizerError(
            f"{_PREFIX}model is {model!r}; expected 'gpt2' (byte-level BPE), 'llama' (SentencePiece BPE) or 'gemma4' "
            "(BPE of characters)"
        )
    is_sentence_piece, is_gemma = model == "llama", model == "gemma4"
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(metadata.texts(_PREFIX + "tokens"))]
    if not tokens:
        raise TokenizerError(f"{_PREFIX}tokens is empty; expected the text of every token")
    _check_characters(tokens)
    types = _read_types(metadata, len(tokens))
    ids = _index(tokens, types)

    special = {name: _read_id(metadata, name, len(tokens)) for name in (*_EOG_KEYS, "bos", "unknown")}
    if is_sentence_piece:  # the ids of the first SentencePiece models, which old files leave out
        for name, text in (("unknown", "<unk>"), ("bos", "<s>"), ("eos", "</s>")):
            if special[name] is None:
                special[name] = ids.get(text)
    is_harmony = "<|return|>" in ids and "<|call|>" in ids
    visible = {ids[text] for text in _HARMONY_TEXTS if text in ids} if is_harmony else set()
    if special["eot"] is None:
        special["eot"] = next((ids[text] for text in _EOT_TEXTS if text in ids and ids[text] not in visible), None)

    eog_by_text = {ids[text] for text in _EOG_TEXTS & ids.keys()}
    if is_gemma:
        eog_by_text.discard(ids.get("</s>", -1))  # text like other tags here
    eog = {i for i in (eog_by_text | {special[key] for key in _EOG_KEYS}) - visible if i is not None}
    for i in eog_by_text - visible:
        types[i] = TokenType.CONTROL
    for i in visible:
        types[i] = TokenType.USER_DEFINED

    pre = pre_tokenizer(_read_pre(metadata)) if model == "gpt2" else None
    add_bos = is_gemma or metadata.flag(_PREFIX + "add_bos_token", pre.add_bos if pre else True)  # some files say no
    return Vocabulary(
        model=cast(Model, model),
        tokens=tokens,
        types=types,
        ids=ids,
        merges=() if is_sentence_piece else metadata.texts(_PREFIX + "merges"),
        scores=_read_scores(metadata, len(tokens)) if is_sentence_piece else (),
        pre=pre,
        add_space_prefix=is_sentence_piece and metadata.flag(_PREFIX + "add_space_prefix", True),
        bos_id=special["bos"],
        eos_id=special["eos"],
        eot_id=special["eot"],
        unknown_id=special["unknown"],
        add_bos=add_bos and special["bos"] is not None,
        add_eos=metadata.flag(_PREFIX + "add_eos_token", False) and special["eos"] is not None,
        eog_ids=frozenset(eog),
        unused_ids=_unused(metadata, types, eog),
        strips=_is_phi_3(metadata),
    )


def _is_phi_3(metadata: TokenizerMetadata) -> bool:
    """Return whether a file is of the Phi-3 family: no key says what tokens strip, so it must be known by its name."""
    name = metadata.text("general.name", "").lower()
    return metadata.text("general.architecture", "") == "phimoe" or "phi-3" in name or "phi3" in name


def _read_types(metadata: TokenizerMetadata, n_tokens: int) -> list[int]:
    key = _PREFIX + "token_type"
    if key not in metadata:
        return [TokenType.NORMAL] * n_tokens
    types = list(metadata.integers(key))
    _check_length(key, len(types), n_tokens)
    unknown = set(types) - set(TokenType)
    if unknown:
        raise TokenizerError(f"{key} has the value {min(unknown)}; expected 0 to {max(TokenType)}")
    return types


def _read_scores(metadata: TokenizerMetadata, n_tokens: int) -> list[float]:
    scores = list(metadata.numbers(_PREFIX + "scores"))
    _check_length(_PREFIX + "scores", len(scores), n_tokens)
    if any(map(math.isnan, scores)):
        raise TokenizerError(f"{_PREFIX}scores has a value that is not a number; the file is damaged")
    return scores


def _check_length(key: str, found: int, expected: int) -> None:
    if found != expected:
        raise TokenizerError(f"{key} has {found} entries for {expected} tokens; expected one each: the file is damaged")


def _check_characters(tokens: list[str]) -> None:
    try:
        "".join(tokens).encode()
    except UnicodeEncodeError:
        broken = next(i for i, text in enumerate(tokens) if any("\ud800" <= c <= "\udfff" for c in text))
        raise TokenizerError(
            f"{_PREFIX}tokens entry {broken} is {tokens[broken]!a}; expected UTF-8: the file is damaged"
        ) from None


def _index(tokens: list[str], types: list[int]) -> dict[str, int]:
    ids = {text: i for i, text in enumerate(tokens)}
    if len(ids) == len(tokens):
        return ids
    ids = {}
    for i, text in enumerate(tokens):
        if types[i] == TokenType.UNUSED and text in ids:
            continue
        first = ids.setdefault(text, i)
        if first != i:
            if types[first] != TokenType.UNUSED:
                raise TokenizerError(
                    f"{_PREFIX}tokens {first} and {i} are both {text!r}; expected different texts: the file is damaged"
                )
            ids[text] = i
    return ids


def _read_id(metadata: TokenizerMetadata, name: str, n_tokens: int) -> int | None:
    key = f"{_PREFIX}{name}_token_id"
    if key not in metadata:
        return None
    token_id = metadata.integer(key)
    if token_id in (_NO_ID, -1):
        return None
    if not 0 <= token_id < n_tokens:
        raise TokenizerError(f"{key} is {token_id}; expected an id below {n_tokens}, the number of tokens")
    return token_id


def _read_pre(metadata: TokenizerMetadata) -> str:
    key = _PREFIX + "pre"
    if key not in metadata:
        raise TokenizerError(
            f"{key} is missing, so it is not known how a text is cut before merging; "
            "the file is from an old converter: convert the model again or download a newer file"
        )
    return metadata.text(key)


def _unused(metadata: TokenizerMetadata, types: list[int], eog: set[int]) -> frozenset[int]:
    key = _PREFIX + "suppress_tokens"
    suppressed = metadata.integers(key) if key in metadata else ()
    unused = int(TokenType.UNUSED)  # an enum member is slow to compare 250,000 times
    padding = {i for i, kind in enumerate(types) if kind == unused} - eog
    return frozenset(padding.union(i for i in suppressed if 0 <= i < len(types)))
