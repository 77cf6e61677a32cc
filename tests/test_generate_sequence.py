"""Sequences: what is shown, when, and why they end."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizer_data import load_tiny, small

from engine.config import SamplingParams
from engine.generate.sequence import Sequence
from engine.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_metadata(load_tiny("tiny-qwen2")["metadata"])
SPM = Tokenizer.from_metadata(load_tiny("tiny-spm")["metadata"])
END = TOKENIZER.eos_id


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 0, **changes})


def run(ids, tokenizer=TOKENIZER, **changes) -> tuple[list[str], Sequence]:
    """Append ids until the sequence ends; return what was shown, piece by piece, and the sequence."""
    sequence = Sequence(tokenizer, params(**changes), [1, 2, 3])
    pieces = []
    for token_id in ids:
        pieces.append(sequence.append(token_id))
        if sequence.finish_reason is not None:
            break
    pieces.append(sequence.flush())
    assert "".join(pieces) == sequence.text
    return pieces, sequence


def cut_at_stop(text: str, stops) -> tuple[str, bool]:
    """The rule, said as plainly as possible: read on until the text ends with a stop text."""
    for end in range(1, len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return text[: end - max(map(len, matching))], True
    return text, False


def test_end_token_stops_and_is_not_shown():
    _, sequence = run([*TOKENIZER.encode("Hello"), END, *TOKENIZER.encode("more")])
    assert (sequence.text, sequence.finish_reason) == ("Hello", "stop")
    assert sequence.token_ids == [*TOKENIZER.encode("Hello"), END]


def test_end_token_is_ignored_on_request():
    _, sequence = run([*TOKENIZER.encode("Hello"), END, *TOKENIZER.encode(" more")], ignore_eos=True)
    assert (sequence.text, sequence.finish_reason) == ("Hello more", None)


def test_length_ends_with_all_that_was_held_back():
    ids = TOKENIZER.encode("STO")
    pieces, sequence = run(ids * 2, max_tokens=len(ids), stop=("STOP",))
    assert (sequence.text, sequence.finish_reason) == ("STO", "length")
    assert "".join(pieces[:-2]) == ""  # it could have become STOP


def test_end_token_at_the_last_place_is_a_stop():
    _, sequence = run([END], max_tokens=1)
    assert sequence.finish_reason == "stop"


def test_stop_text_across_tokens_is_never_shown():
    pieces, sequence = run(TOKENIZER.encode("some text\n\nUser: and more"), stop=("\nUser:",))
    assert (sequence.text, sequence.finish_reason) == ("some text\n", "stop")
    assert "User" not in "".join(pieces)


def test_of_several_stop_texts_the_one_that_ends_first_counts_then_the_longest():
    assert run(TOKENIZER.encode("xabcdz"), stop=("abcd", "c"))[1].text == "xab"
    assert run(TOKENIZER.encode("xabcdz"), stop=("c", "abc"))[1].text == "x"


def test_unfinished_character_is_shown_at_the_end_only():
    first, second = TOKENIZER.encode("é")
    assert run([first, second])[0] == ["", "é", ""]
    assert run([first])[0] == ["", "\ufffd"]
    assert run([first], max_tokens=1)[0] == ["\ufffd", ""]


def test_unfinished_character_behind_a_stop_text_is_dropped():
    lead = "\u00c3"  # stands for 0xC3, the first byte of a character
    vocabulary = small(tokens=[*small()["tokenizer.ggml.tokens"], f"b{lead}"], token_type=None, merges=[f"b {lead}"])
    tokenizer = Tokenizer.from_metadata(vocabulary)
    pieces, sequence = run([ord("a"), tokenizer.n_vocab - 1], tokenizer=tokenizer, stop=("b",))
    assert (pieces, sequence.finish_reason) == (["a", "", ""], "stop")


def test_sentence_piece_answers_keep_the_space_in_front():
    ids = SPM.encode("the")  # starts with a space of its own
    assert run(ids, tokenizer=SPM)[1].text == " the"


def test_tokens_after_the_end_are_a_mistake_of_the_caller():
    _, sequence = run([END])
    with pytest.raises(AssertionError):
        sequence.append(END)


@pytest.mark.parametrize(
    ("window", "expected"), [(0, [1, 2, 3, 7, 8]), (1, [8]), (4, [2, 3, 7, 8]), (9, [1, 2, 3, 7, 8])]
)
def test_recent_tokens_are_those_of_prompt_and_answer(window, expected):
    _, sequence = run([7, 8])
    recent = sequence.recent(window)
    assert recent.tolist() == expected
    assert recent.dtype == "int32"


@given(
    text=st.text(alphabet="aab\n é", max_size=40),
    stops=st.lists(st.text(alphabet="aab\n é", min_size=1, max_size=4), max_size=3),
    cuts=st.sets(st.integers(0, 40)),
)
def test_shown_text_is_the_text_up_to_the_first_stop_wherever_tokens_end(text, stops, cuts):
    borders = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    ids = [i for start, end in pairwise(borders) for i in TOKENIZER.encode(text[start:end])]
    pieces, sequence = run(ids, stop=tuple(stops))
    assert (sequence.text, sequence.finish_reason == "stop") == cut_at_stop(text, stops)
    # Whatever could not become a stop text any more was shown at once.
    shown = ""
    for piece, n in zip(pieces[:-1], range(1, len(ids) + 1), strict=False):
        shown += piece
        known = TOKENIZER.decode(ids[:n]).rstrip("\ufffd")
        if sequence.finish_reason is None or n < len(sequence.token_ids):
            held = known[len(shown) :]
            assert known.startswith(shown)
            assert not held or any(stop.startswith(held) for stop in stops)
