"""Turns a vocabulary into the `tokenizers` library's form, which does the merging.

The library gets no special tokens: `Tokenizer` cuts a text at them first, so that which of them count is decided for
each call, and longer ones win wherever they stand. Hidden tokens are kept from it as well, unless a merge makes them:
otherwise a user's plain text could become markup.

For 250,000 tokens that takes 0.5 s or more, so the last one built is kept: whoever opens a model again, as a bench does
for each of its rows, does not wait twice. It is not kept on disk: reading it back takes about as long.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from functools import partial

import tokenizers
from tokenizers import Regex
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as InOrder

from engine.errors import TokenizerError
from engine.tokenizer.vocabulary import TokenType, Vocabulary

SPACE_MARK = "\u2581"  # what SentencePiece writes for a space

_built: deque[tuple[Vocabulary, tokenizers.Tokenizer]] = deque(maxlen=1)  # the last: a large one takes a second


def build(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """Return a tokenizer for text without special tokens; raise `TokenizerError` if the merges make no sense."""
    for known, built in tuple(_built):
        if known == vocabulary:
            return built
    made = _BUILDERS[vocabulary.model](vocabulary)
    _built.append((vocabulary, made))
    return made


def byte_of_character() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for.

    Printable bytes of Latin-1 stand for themselves, the 68 others are U+0100 and up, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _byte_level(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    assert vocabulary.pre is not None
    tokenizer = tokenizers.Tokenizer(_by_merges(vocabulary, ignore_merges=vocabulary.pre.ignore_merges))
    cuts = [Split(Regex(pattern), behavior="isolated") for pattern in vocabulary.pre.patterns]
    tokenizer.pre_tokenizer = InOrder([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def _gemma(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    """Merge by a list, but characters: spaces and unknown ones as SentencePiece has them, lines one by one."""
    tokenizer = tokenizers.Tokenizer(_by_merges(vocabulary, byte_fallback=True))
    tokenizer.normalizer = Replace(" ", SPACE_MARK)
    tokenizer.pre_tokenizer = Split(Regex(r"\n+"), behavior="isolated")
    return tokenizer


def _by_merges(vocabulary: Vocabulary, *, ignore_merges: bool = False, byte_fallback: bool = False) -> BPE:
    """Return a model that merges by the file's list."""
    merges = _split_merges(vocabulary.merges)
    make = partial(BPE, merges=merges, ignore_merges=ignore_merges, byte_fallback=byte_fallback)
    try:
        try:
            return make(vocab=vocabulary.visible_ids())
        except Exception:  # perhaps a merge makes a hidden token, which is then needed
            return make(vocab=vocabulary.ids)
    except Exception as error:
        wrong = _what_is_wrong(merges, vocabulary.ids)
        raise TokenizerError(wrong or f"the vocabulary cannot be used: {error}") from error


def _split_merges(merges: Sequence[str]) -> list[tuple[str, str]]:
    """Return the two tokens of each merge, which the first space that is not in front keeps apart."""
    split = [(left, right) for left, _, right in map(str.partition, merges, itertools.repeat(" "))]
    for rank, (left, right) in enumerate(split):
        if not left or not right:
            merge = merges[rank]
            space = merge.find(" ", 1)
            if space < 0:
                raise TokenizerError(
                    f"tokenizer.ggml.merges entry {rank} is {merge!r}; expected two tokens with a space between them"
                )
            split[rank] = merge[:space], merge[space + 1 :]
    return split


def _what_is_wrong(merges: list[tuple[str, str]], ids: dict[str, int]) -> str | None:
    for rank, (left, right) in enumerate(merges):
        for text in (left, right, left + right):
            if text not in ids:
                return (
                    f"tokenizer.ggml.merges entry {rank} is {left + ' ' + right!r}, but {text!r} is not a token; "
                    "expected merges of tokens into tokens: the file is damaged"
                )
    return None


def _sentence_piece(vocabulary: Vocabulary) -> tokenizers.Tokenizer:
    ids = vocabulary.visible_ids()
    unknown = None if vocabulary.unknown_id is None else vocabulary.tokens[vocabulary.unknown_id]
    if unknown is not None:
        ids[unknown] = vocabulary.ids[unknown]
    try:
        model = BPE(
            vocab=ids, merges=_merges_by_score(vocabulary, ids), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
    except Exception as error:
        raise TokenizerError(f"the vocabulary cannot be used: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = Replace(" ", SPACE_MARK)
    return tokenizer


def _merges_by_score(vocabulary: Vocabulary, ids: dict[str, int]) -> list[tuple[str, str]]:
    """Return every way to make a token of two others, best score first: SentencePiece files have no list of merges."""
    mergeable = (TokenType.NORMAL, TokenType.UNUSED)
    ranked = []
    for text, i in ids.items():
        if vocabulary.types[i] not in mergeable:
            continue
        for cut in range(1, len(text)):
            left = text[:cut]
            if left in ids and (right := text[cut:]) in ids:
                ranked.append((-vocabulary.scores[i], -cut, cut - len(text), ids[left], ids[right], left, right))
    ranked.sort()
    return [entry[-2:] for entry in ranked]


_BUILDERS = {"gpt2": _byte_level, "llama": _sentence_piece, "gemma4": _gemma}
