"""The tokenizer against golden pairs recorded from llama.cpp, and against what must hold for any text."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_data import TINY, MetadataDict, load_made, load_tiny, small

from engine.errors import TokenizerError
from engine.gguf import open_gguf
from engine.tokenizer import Tokenizer
from engine.tokenizer.merging import build, byte_of_character
from engine.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from engine.tokenizer.vocabulary import read_vocabulary

BYTE_LEVEL = [name for name in TINY if name != "tiny-spm"]
FULL = ["deepseek-llm", "gpt-2", "llama-bpe", "llama-spm", "qwen2", "qwen35"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@functools.cache
def tiny(name: str) -> Tokenizer:
    return Tokenizer.from_metadata(load_tiny(name)["metadata"])


@functools.cache
def full(path: Path) -> Tokenizer:
    return Tokenizer.from_metadata(open_gguf(path).metadata)


def check_cases(tokenizer: Tokenizer, golden: dict) -> None:
    assert tokenizer.n_vocab == golden["n_vocab"]
    assert tokenizer.eos_id == golden["eos"]
    assert golden["cases"]
    for case in golden["cases"]:
        # Where llama.cpp departs from the family's own regular expression, the file has that one's ids as well.
        accepted = [case["ids"], case.get("ids_original_regex", case["ids"])]
        assert tokenizer.encode(case["text"]) in accepted, case["text"]
        assert tokenizer.encode(case["text"], add_special=True, parse_special=True) == case["ids_special"], case["text"]


@pytest.mark.parametrize("name", TINY)
def test_golden_pairs_of_tiny_vocabularies(name):
    check_cases(tiny(name), load_tiny(name))


@pytest.mark.parametrize("name", FULL)
def test_golden_pairs_of_full_vocabularies(shared, name):
    golden = json.loads((shared / "golden" / "tokenizers" / f"vocab-{name}.json").read_text(encoding="utf-8"))
    check_cases(full(shared / "golden" / golden["gguf"]), golden)


@pytest.mark.parametrize("name", TINY)
def test_tiny_metadata_is_that_of_the_golden_model(shared, name):
    golden = json.loads((shared / "golden" / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))
    assert full(shared / "golden" / golden["gguf"]).vocabulary == tiny(name).vocabulary


@functools.cache
def gemma() -> Tokenizer:
    return Tokenizer.from_metadata(load_made("gemma4")["metadata"])


def test_golden_pairs_of_gemma() -> None:
    golden = load_made("gemma4")
    check_cases(gemma(), golden)
    assert gemma().eog_ids == set(golden["eog"])


def test_golden_pairs_of_phi() -> None:
    """Behind most special tokens white space is lost."""
    golden = load_made("phi-3")
    tokenizer = Tokenizer.from_metadata(golden["metadata"])
    check_cases(tokenizer, golden)
    assert tokenizer.eog_ids == set(golden["eog"])


@pytest.mark.parametrize(
    ("about", "strips"),
    [
        ({"general.name": "Phi3 mini"}, True),
        ({"general.architecture": "phimoe"}, True),
        ({"general.name": "Phi-4", "general.architecture": "phi3"}, False),
    ],
)
def test_who_strips_is_known_by_name(about: dict, strips: bool) -> None:
    """The user's line end and the blanks after it are part of the markup, or not."""
    metadata = MetadataDict({key: value for key, value in load_made("phi-3")["metadata"].items() if "name" not in key})
    tokenizer = Tokenizer.from_metadata(MetadataDict(metadata | about))
    user, bare = (tokenizer.encode(f"<|user|>{space}of") for space in ("\n ", ""))
    assert (user == bare) == strips


def test_gemma_merges_whole_lines_and_falls_back_to_bytes() -> None:
    """By hand: tokens go across words, a run of line ends is its own piece, a tag is text and no end."""
    texts = [gemma().token_text(i) for i in gemma().encode("of the\n\n</s>\U0001f680  a")]
    assert texts[:2] == ["of\u2581", "the"]
    assert texts[2:3] == ["\n\n"]
    assert texts[-6:] == ["<0xF0>", "<0x9F>", "<0x9A>", "<0x80>", "\u2581\u2581", "a"]
    assert gemma().decode(gemma().encode("a </s>\u2581b")) == "a </s> b"
    closing = gemma().vocabulary.ids["</s>"]
    assert closing not in gemma().eog_ids
    assert not gemma().is_control(closing)


def test_gemma_has_a_bos_whatever_the_file_says() -> None:
    metadata = load_made("gemma4")["metadata"] | {"tokenizer.ggml.add_bos_token": False}
    assert Tokenizer.from_metadata(MetadataDict(metadata)).encode("", add_special=True) == [2]


@given(text=TEXTS)
def test_gemma_round_trip(text):
    assert gemma().decode(gemma().encode(text), skip_special=False) == text.replace("\u2581", " ")


# -- properties ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BYTE_LEVEL)
@given(text=TEXTS)
@example(text="e\u0301 \u00e9 \r\n\t\u3000\u200b\x00 \U0001f469\u200d\U0001f680")
def test_byte_level_round_trip(name, text):
    assert tiny(name).decode(tiny(name).encode(text), skip_special=False) == text


@given(text=TEXTS)
def test_sentence_piece_round_trip(text):
    tokenizer = tiny("tiny-spm")
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


@pytest.mark.parametrize("name", TINY)
@given(data=st.data())
def test_stream_is_the_whole_text_in_whole_characters(name, data):
    tokenizer = tiny(name)
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_vocab - 1), max_size=30))
    skip, continues = data.draw(st.booleans()), data.draw(st.booleans())
    decoder = tokenizer.decoder(skip_special=skip, continues=continues)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join([*pieces, decoder.flush()]) == tokenizer.decode(ids, skip_special=skip, continues=continues)
    shown = b"".join(tokenizer.token_bytes(i) for i in ids if not (skip and tokenizer.is_control(i)))
    whole = shown.decode(errors="replace")
    if tokenizer.vocabulary.add_space_prefix and not continues:
        whole = whole.removeprefix(" ")
    assert tokenizer.decode(ids, skip_special=skip, continues=continues) == whole


def merge(symbols: list[str], rank) -> list[str]:
    """Merge the best pair, the leftmost of equals, until no pair has a rank: what both models do, said plainly."""
    while True:
        ranks = [rank(left, right) for left, right in pairwise(symbols)]
        known = [r for r in ranks if r is not None]
        if not known:
            return symbols
        at = ranks.index(min(known))
        symbols = [*symbols[:at], symbols[at] + symbols[at + 1], *symbols[at + 2 :]]


@given(text=st.text(alphabet="the inmo \n.\u00e9", max_size=30))
def test_byte_level_merging_is_that_of_the_plain_algorithm(text):
    tokenizer = tiny("tiny-olmo")
    ranks = {tuple(pair.split(" ")): rank for rank, pair in enumerate(tokenizer.vocabulary.merges)}
    character = {byte: c for c, byte in byte_of_character().items()}
    expected = []
    for piece in regex_pieces_gpt_2(text):
        symbols = merge([character[byte] for byte in piece.encode()], lambda *pair: ranks.get(pair))
        expected += [tokenizer.vocabulary.ids[symbol] for symbol in symbols]
    assert tokenizer.encode(text) == expected


def regex_pieces_gpt_2(text: str) -> list[str]:
    """Cut a text without digits, apostrophes and underscores the way GPT-2 does, in Python's own dialect."""
    return re.findall(r" ?[^\W\d_]+| ?[^\s\w]+|\s+(?!\S)|\s+", text)


@given(text=st.text(alphabet="the inmo \n.\u00e9", max_size=30))
def test_sentence_piece_merging_is_that_of_the_plain_algorithm(text):
    tokenizer = tiny("tiny-spm")
    vocabulary = tokenizer.vocabulary

    def rank(left: str, right: str) -> float | None:
        token_id = vocabulary.ids.get(left + right)
        return None if token_id is None or tokenizer.is_control(token_id) else -vocabulary.scores[token_id]

    expected = []
    for symbol in merge(list("\u2581" + text.replace(" ", "\u2581")), rank) if text else []:
        names = [symbol] if symbol in vocabulary.ids else [f"<0x{byte:02X}>" for byte in symbol.encode()]
        expected += [vocabulary.ids[name] for name in names]
    assert tokenizer.encode(text) == expected


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "It's 12345 ok!!", "It|'s| 12345| ok|!!"),
        ("qwen2", "IT'S 123 a\n\n b", "IT|'S| |1|2|3| a|\n\n| b"),
        ("grok-2", "IT'S 123 a\n\n b", "IT|'S| |1|2|3| a|\n\n| b"),
        ("laguna", "a \n\n b1", "a| |\n\n| b|1"),
        ("qwen2", "e\u0301a", "e|\u0301a"),
        ("qwen35", "e\u0301a", "e\u0301a"),
        ("llama-bpe", "12345", "123|45"),
        ("gpt-4o", "HelloWorld's 12345/\n", "Hello|World's| |123|45|/\n"),
        ("cohere2moe", "HelloWorld's 12345 12345a/\n", "Hello|World's| |12|345| |123|45|a|/\n"),
        ("tekken", "HelloWorld's 12", "Hello|World|'s| |1|2"),
        ("kimi-k2", "Hello\u4e2d\u6587World1234", "Hello|\u4e2d\u6587|World|123|4"),
        ("deepseek-v3", "a1234 \u4e2d\u3042!b", "a|123|4| |\u4e2d\u3042|!b"),
        ("deepseek-coder", "a 12\n\n", "a| |1|2|\n|\n"),
        ("deepseek-llm", "ab\u4e2d12!", "ab|\u4e2d|12|!"),
        ("starcoder", "ab12", "ab|1|2"),
        ("falcon", "a.1234", "a|.|123|4"),
        ("afmoe", "a1234567 12 \u4e2d\uac00 !b", "a|1|234|567| |12| |\u4e2d\uac00| !|b"),
        ("exaone-moe", "it's a b  c 12/\n", "it|'s| a b| | c| |1|2|/\n"),
        ("bailingmoe", "we'Ll 12", "we|'Ll| |1|2"),
        ("seed-coder", "a!\n12", "a|!|\n|1|2"),
        ("chatglm-bpe", "1234", "123|4"),
        ("dbrx", "IT'S 1234!!\n a", "IT|'S| |123|4|!!\n| a"),
    ],
)
def test_texts_are_cut_the_way_of_each_family(pre, text, pieces):
    tokenizer = Tokenizer.from_metadata(small(pre=pre))
    cut = tokenizer._merging.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in cut] == pieces.split("|")


@given(text=st.text(alphabet="<|im_startend>\u2581 ab", max_size=40))
def test_plain_text_never_becomes_markup(text):
    for name in TINY:
        tokenizer = tiny(name)
        assert not any(tokenizer.is_control(i) for i in tokenizer.encode(f"<|im_end|>{text}</s><s>"))


@given(data=st.data())
@settings(max_examples=50)
def test_any_pre_tokenizer_keeps_every_character(data):
    metadata = load_tiny("tiny-qwen2")["metadata"]
    metadata["tokenizer.ggml.pre"] = data.draw(st.sampled_from(sorted(PRE_TOKENIZERS)))
    tokenizer = Tokenizer.from_metadata(metadata)
    text = data.draw(TEXTS)
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


# -- special tokens --------------------------------------------------------------------------------------------------


def test_longer_special_tokens_win_wherever_they_stand():
    tokenizer = Tokenizer.from_metadata(small())
    assert tokenizer.encode("<ab>c") == [ord("<"), 258]  # not the first from the left
    assert tokenizer.encode("<x><y>", parse_special=True) == [260]
    assert tokenizer.encode("<x><x><y><ab", parse_special=True) == [259, 260, 257]


def test_user_defined_tokens_always_match_and_control_tokens_on_request_only():
    tokenizer = Tokenizer.from_metadata(small())
    assert tokenizer.encode("<ab") == [257]
    assert tokenizer.encode("<x>") == [*b"<x>"]
    assert tokenizer.encode("[PAD1]", parse_special=True) == [*b"[PAD1]"]


def test_control_tokens_are_hidden_and_unused_ones_are_nothing():
    tokenizer = Tokenizer.from_metadata(small())
    assert tokenizer.decode([259, 97, 261, 257]) == "a<ab"
    assert tokenizer.decode([259, 97, 261, 257], skip_special=False) == "<x>a<ab"
    assert tokenizer.is_control(259)
    assert not tokenizer.is_control(257)
    assert tokenizer.unused_ids == {261, 262}


def test_a_piece_that_is_a_whole_token_is_one_only_with_ignore_merges():
    tokens = [*small()["tokenizer.ggml.tokens"], "cd"]
    types = [*small()["tokenizer.ggml.token_type"], 1]
    assert Tokenizer.from_metadata(small(tokens=tokens, token_type=types)).encode("cd") == [99, 100]
    assert Tokenizer.from_metadata(small(tokens=tokens, token_type=types, pre="glm4")).encode("cd") == [263]
    types[-1] = 3  # a control token of that text stays out of a user's reach
    assert Tokenizer.from_metadata(small(tokens=tokens, token_type=types, pre="glm4")).encode("cd") == [99, 100]


@pytest.mark.parametrize(
    ("pre", "key", "expected"),
    [("qwen2", None, False), ("qwen2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_bos_is_added_as_the_family_or_the_file_says(pre, key, expected):
    tokenizer = Tokenizer.from_metadata(small(pre=pre, add_bos_token=key, bos_token_id=259))
    assert tokenizer.encode("a", add_special=True) == [259, 97] if expected else [97]
    assert tokenizer.encode("a") == [97]


def test_no_bos_is_added_if_the_model_has_none():
    tokenizer = Tokenizer.from_metadata(small(pre="llama-bpe"))
    assert tokenizer.bos_id is None
    assert tokenizer.encode("a", add_special=True) == [97]


def test_eos_is_added_if_the_file_says_so():
    tokenizer = Tokenizer.from_metadata(small(add_eos_token=True))
    assert tokenizer.encode("a", add_special=True) == [97, 259]


def test_chat_text_gets_one_bos_whether_or_not_the_template_wrote_it():
    tokenizer = Tokenizer.from_metadata(small(pre="llama-bpe", bos_token_id=259))
    assert tokenizer.encode_chat("<x>a") == tokenizer.encode_chat("a") == [259, 97]


def test_sentence_piece_space_prefix_is_per_stretch_and_can_be_off():
    metadata = load_tiny("tiny-spm")["metadata"]
    with_prefix = Tokenizer.from_metadata(metadata)
    metadata["tokenizer.ggml.add_space_prefix"] = False
    without = Tokenizer.from_metadata(metadata)
    assert with_prefix.encode("a</s>a", parse_special=True) == without.encode(" a</s> a", parse_special=True)
    assert without.decode(without.encode(" a")) == " a"
    assert with_prefix.decode([1, *with_prefix.encode("a")]) == "a"
    assert with_prefix.decode(with_prefix.encode("a"), continues=True) == " a"
    assert with_prefix.encode("") == []


def test_sentence_piece_falls_back_to_bytes():
    tokenizer = tiny("tiny-spm")
    ids = tokenizer.encode("\U0001f680")
    assert [tokenizer.token_text(i) for i in ids[-4:]] == ["<0xF0>", "<0x9F>", "<0x9A>", "<0x80>"]
    assert tokenizer.decode(ids[:-1]) == "\ufffd"


def test_invalid_utf8_is_replaced_when_it_is_certain():
    tokenizer = Tokenizer.from_metadata(small())
    decoder = tokenizer.decoder()
    assert [decoder.push(byte) for byte in b"\xe2\x82\xac\xe2a\xf0\x9f"] == ["", "", "\u20ac", "", "\ufffda", "", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


# -- end of generation -----------------------------------------------------------------------------------------------


def with_tokens(*texts: str, kind: int = 3, **changes) -> Tokenizer:
    tokens = [*small()["tokenizer.ggml.tokens"], *texts]
    types = [*small()["tokenizer.ggml.token_type"], *[kind] * len(texts)]
    return Tokenizer.from_metadata(small(tokens=tokens, token_type=types, **changes))


def test_end_tokens_are_those_of_the_keys_and_those_known_by_text():
    tokenizer = with_tokens("<|im_end|>", "<|endoftext|>", "<|file_sep|>", "<other>", eom_token_id=266)
    assert tokenizer.eog_ids == {259, 263, 264, 265, 266}
    assert tokenizer.eot_id == 263


def test_end_tokens_known_by_text_are_markup_whatever_the_file_says():
    tokenizer = with_tokens("<|im_end|>", kind=4)
    assert tokenizer.is_control(263)
    assert 263 not in tokenizer.encode("<|im_end|>")


def test_gpt_oss_channels_are_visible_and_end_is_no_end():
    names = ["<|return|>", "<|call|>", "<|end|>", "<|channel|>", "<|message|>"]
    tokenizer = with_tokens(*names)
    assert tokenizer.eog_ids == {259, 263, 264}
    assert tokenizer.decode(range(263, 268)) == "<|end|><|channel|><|message|>"
    assert with_tokens("<|end|>").eog_ids == {259, 263}


def test_an_end_token_can_be_sampled_whatever_its_kind():
    tokenizer = Tokenizer.from_metadata(small(eos_token_id=261))  # which the file calls unused
    assert (tokenizer.eog_ids, tokenizer.unused_ids) == ({261}, {262})


def test_minus_one_means_no_token():
    tokenizer = Tokenizer.from_metadata(small(eos_token_id=0xFFFFFFFF, bos_token_id=-1))
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.eog_ids) == (None, None, frozenset())


def test_suppressed_tokens_are_never_sampled():
    tokenizer = Tokenizer.from_metadata(small(suppress_tokens=[3, 999]))
    assert tokenizer.unused_ids == {3, 261, 262}
    assert tokenizer.n_sampled == 261
    assert tokenizer.unused_among_sampled.tolist() == [3]


# -- what is wrong with a file ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; expected 'gpt2'"),
        ({"model": None}, "tokenizer.ggml.model is missing"),
        ({"pre": "never-heard-of"}, "'never-heard-of'.* known: .*qwen35"),
        ({"pre": None}, "tokenizer.ggml.pre is missing.*convert the model again"),
        ({"tokens": []}, "tokenizer.ggml.tokens is empty"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": 5}, "wrong type"),
        ({"token_type": [1, 2]}, "token_type has 2 entries for 263 tokens"),
        ({"token_type": [7] * 263}, "token_type has the value 7"),
        ({"merges": ["ab"]}, "merges entry 0 is 'ab'; expected two tokens"),
        ({"merges": ["a b", "a c"]}, "merges entry 1 is 'a c', but 'ac' is not a token"),
        ({"merges": ["nope b"]}, "'nope' is not a token"),
        ({"merges": None}, "merges is missing"),
        ({"bos_token_id": 263}, "bos_token_id is 263; expected an id below 263"),
        ({"eos_token_id": "x"}, "wrong type"),
        ({"add_bos_token": 1}, "wrong type"),
    ],
    ids=str,
)
def test_bad_metadata_is_named(changes, message):
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_metadata(small(**changes))


def test_repeated_tokens_are_refused_unless_they_are_padding():
    tokens, types = small()["tokenizer.ggml.tokens"], small()["tokenizer.ggml.token_type"]
    with pytest.raises(TokenizerError, match="tokens 97 and 263 are both 'a'"):
        Tokenizer.from_metadata(small(tokens=[*tokens, "a"], token_type=[*types, 1]))
    tokenizer = Tokenizer.from_metadata(small(tokens=[*tokens, "a", "[PAD1]"], token_type=[*types, 5, 1]))
    assert tokenizer.encode("a") == [97]
    assert tokenizer.vocabulary.ids["[PAD1]"] == 264


def test_empty_and_broken_token_texts():
    tokens = small()["tokenizer.ggml.tokens"]
    tokenizer = Tokenizer.from_metadata(small(tokens=[*tokens[:-2], "", ""]))
    assert tokenizer.token_text(261) == "[EMPTY_261]"
    with pytest.raises(TokenizerError, match=r"tokens entry 262 is '\\ud800'; expected UTF-8"):
        Tokenizer.from_metadata(small(tokens=[*tokens[:-1], "\ud800"]))


def test_scores_must_be_numbers_one_for_each_token():
    metadata = load_tiny("tiny-spm")["metadata"]
    metadata["tokenizer.ggml.scores"] = [0.0]
    with pytest.raises(TokenizerError, match="scores has 1 entries"):
        Tokenizer.from_metadata(metadata)
    metadata["tokenizer.ggml.scores"] = [float("nan")] * 512
    with pytest.raises(TokenizerError, match="not a number"):
        Tokenizer.from_metadata(metadata)


@given(data=st.data())
@settings(max_examples=150)
def test_mutated_metadata_works_or_is_a_tokenizer_error(data):
    metadata = load_tiny(data.draw(st.sampled_from(sorted(TINY))))["metadata"]
    junk = st.none() | st.booleans() | st.integers(-2, 600) | st.floats() | st.text(max_size=3)
    for key in data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=3)):
        value = metadata.get(key)
        if isinstance(value, list) and value and data.draw(st.booleans()):
            at = data.draw(st.integers(0, len(value) - 1))
            kind = data.draw(st.sampled_from(["set", "swap", "drop", "repeat"]))
            if kind == "set":
                value[at] = data.draw(st.sampled_from([value[at], -1, 0, 7, "", "a", " ", "\ud800", "a b", 1e39, None]))
            elif kind == "swap":
                value[at], value[0] = value[0], value[at]
            elif kind == "drop":
                del value[at:]
            else:
                value.append(value[at])
        elif data.draw(st.booleans()):
            metadata.pop(key, None)
        else:
            metadata[key] = data.draw(junk | st.lists(junk, max_size=3))
    try:
        tokenizer = Tokenizer.from_metadata(metadata)
    except TokenizerError:
        return
    ids = tokenizer.encode("Hello <|im_end|> \u00e9", add_special=True, parse_special=True)
    tokenizer.decode([*ids, *range(tokenizer.n_vocab)])


def test_ids_outside_the_vocabulary_and_surrogates_are_refused():
    tokenizer = Tokenizer.from_metadata(small())
    for token_id in (-1, 263):
        with pytest.raises(TokenizerError, match=f"no token {token_id}; expected an id from 0 to 262"):
            tokenizer.decode([token_id])
        with pytest.raises(TokenizerError, match=f"no token {token_id}"):
            tokenizer.token_text(token_id)
    with pytest.raises(TokenizerError, match=r"lone surrogate, '.udc80', at character 2"):
        tokenizer.encode("ab\udc80")


@pytest.mark.slow
@pytest.mark.parametrize("text", ["word " * 200_000, "a" * 200_000, "<|im_end|>" * 50_000], ids=lambda text: text[:9])
def test_long_texts(shared, text):
    """Were anything here quadratic, this would not end in time."""
    tokenizer = full(shared / "golden" / "tokenizers" / "ggml-vocab-qwen35.gguf")
    assert tokenizer.decode(tokenizer.encode(text, parse_special=True), skip_special=False) == text


def test_the_last_tokenizer_built_serves_the_same_vocabulary_again_and_no_other():
    vocabulary, again = (read_vocabulary(load_tiny(BYTE_LEVEL[0])["metadata"]) for _ in range(2))
    built = build(vocabulary)
    assert build(again) is built
    other = build(replace(vocabulary, merges=vocabulary.merges[:-1]))
    assert other is not built
    assert build(vocabulary) is not other
