"""Guesses how an answer goes on, and tells when it pays to check that.

Guesses come from where the text said the same before, and from a head for multi-token prediction if the model has one,
whichever promises more. A step that runs some guessed tokens behind the one it has to run reads each weight once for
all of them. Those that are then chosen cost no step of their own; what follows the first wrong one is forgotten. Every
token is chosen from the logits that it would be chosen from anyway, so no bit of a text depends on any of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

Head: TypeAlias = Callable[[int], tuple[list[int], float]]
"""Guesses so many tokens that follow the pending one; returns them, and the seconds that took."""

_N_GRAM = 3  # tokens that must be the same
_LONGEST = 17  # tokens of a match that are counted
_MOST_PLACES = 8  # that are looked at, the latest ones
_LOOK_BACK = 1 << 16  # tokens of a prompt that are looked through, which takes less than a tenth of a second
_LENGTHS = (3, 4, 6, 9, 17)  # matches of lengths from one to the next come true about as often
_KINDS = [sum(length >= least for least in _LENGTHS[1:]) for length in range(_LONGEST + 1)]
_FIRST_GUESS = (0.4, 0.5, 0.65, 0.75, 0.85)  # how often, before anything is known; worth as much as:
_GUESS_WEIGHT = 6.0  # tokens
_HEAD_FIRST_GUESS = (0.8, 0.7, 0.65, 0.6)  # the same of the first token that a head guesses, of the next one ...
# Tokens that a head is asked for at first, so that it and steps of all sizes are known, and not assumed.
_HEAD_TRIALS = (3, 1, 15, 15, 3, 1, 3, 1)
_TRIED_AGAIN, _TRIALS_MORE = 1000, 2  # after so many tokens for which a head did not pay; the last ones of these
_MEMORY = 0.97  # of what is known, after one token more
_LEAST_GAIN = 1.08  # in tokens a second
_STEP_SHARE = 0.5  # what one more token adds to a step, of a step with one, before it was measured
_FORGOTTEN = 0.003  # of what is known, with each token for which drafts do not pay: they are tried again after hundreds


class Lookup:
    """A text as it grows, and where in it its last tokens stood before."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._latest: dict[tuple[int, ...], int] = {}  # where a few tokens ended last
        self._before: list[int] = []  # where those that end here did before

    def __len__(self) -> int:
        return len(self._ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Add tokens."""
        ids, latest, before = self._ids, self._latest, self._before
        for token_id in token_ids:
            ids.append(token_id)
            end = tuple(ids[-_N_GRAM:])
            before.append(latest.get(end, -1))
            latest[end] = len(ids) - 1

    def find(self) -> tuple[int, int]:
        """Return for how many tokens the end of the text stood before, 0 for too few, and where what followed begins.

        Of several places it is the one where most are the same, and of those the latest.
        """
        ids, at, length, found = self._ids, len(self._ids) - 1, 0, -1
        place = at
        for _ in range(_MOST_PLACES):
            place = self._before[place] if place >= 0 else -1
            if place < _N_GRAM - 1:
                break
            n = _N_GRAM
            while n < _LONGEST and n <= place and ids[place - n] == ids[at - n]:
                n += 1
            if n > length:
                length, found = n, place + 1
        return length, found

    def copied(self, start: int, n: int) -> list[int]:
        """Return `n` tokens that follow if the text goes on as it did from `start` on, itself included."""
        copy = self._ids[start : start + n]
        while len(copy) < n:
            copy.append(copy[len(copy) - (len(self._ids) - start)])
        return copy


class StepTimes:
    """What steps of one sequence take, by their tokens: measured, or guessed from those that were.

    What is known is forgotten by and by, so that a bad minute does not count for ever.
    """

    def __init__(self, most: int) -> None:
        """Know nothing yet of steps of up to `most` tokens."""
        self._seconds = [0.0] * (most + 1)  # 0: not known
        self._n_noted = [0] * (most + 1)

    def note(self, n_tokens: int, seconds: float) -> None:
        """Note what a step took.

        The first one of a size may find nothing in its caches: with one token it does not count, with more it counts
        only until there is a faster one.
        """
        if n_tokens >= len(self._seconds) or (n_tokens > 1 and not self.is_known):
            return
        known, old = self._seconds, self._seconds[n_tokens]
        self._n_noted[n_tokens] += 1
        n = self._n_noted[n_tokens] - (n_tokens == 1)
        if n == 0:
            return
        if not old:
            old = self.all()[n_tokens - 1] if self.is_known else seconds
        elif n == 2 and n_tokens > 1:
            old = min(old, seconds)
        share = 1.0 if n == 1 else max(0.1 if n_tokens == 1 else 0.2, 1 / n)
        known[n_tokens] = old + share * (min(seconds, 4 * old) - old)

    @property
    def is_known(self) -> bool:
        """Return whether a step with one token was timed."""
        return self._seconds[1] > 0

    def all(self) -> list[float]:
        """Return the seconds of a step with one token, two and so on; those between or beyond known ones on a line."""
        known = self._seconds
        seconds, at, slope = [known[1]], 1, _STEP_SHARE * known[1]
        for n in [n for n in range(2, len(known)) if known[n]]:
            slope = (known[n] - known[at]) / (n - at)
            seconds += [known[at] + slope * i for i in range(1, n - at)]
            seconds.append(known[n])
            at = n
        if at > 1:
            slope = (known[at] - known[1]) / (at - 1)
        return seconds + [known[at] + slope * i for i in range(1, len(known) - at)]

    def forget(self) -> None:
        """Come a little nearer to what is assumed of steps that were never seen."""
        one = self._seconds[1]
        for n, seconds in enumerate(self._seconds):
            if n > 1 and seconds:
                self._seconds[n] += _FORGOTTEN * (one * (1 + _STEP_SHARE * (n - 1)) - seconds)


class HitRates:
    """How often guesses of some kinds came true; what was seen lately counts most."""

    def __init__(self, first_guess: Sequence[float]) -> None:
        """Begin with shares that are usual, one for each kind."""
        self._first_guess = [_GUESS_WEIGHT * share for share in first_guess]
        self._right = list(self._first_guess)
        self._tried = [_GUESS_WEIGHT] * len(self._right)

    def share(self, kind: int) -> float:
        """Return how likely a guess of a kind is to come true; beyond the last kind, as one of that."""
        kind = min(kind, len(self._right) - 1)
        return self._right[kind] / self._tried[kind]

    def note(self, kind: int, *, is_right: bool) -> None:
        """Note what became of a guess."""
        kind = min(kind, len(self._right) - 1)
        self._right[kind] = _MEMORY * self._right[kind] + is_right
        self._tried[kind] = _MEMORY * self._tried[kind] + 1

    def forget(self) -> None:
        """Come a little nearer to what is usual."""
        for kind, usual in enumerate(self._first_guess):
            self._right[kind] += _FORGOTTEN * (usual - self._right[kind])
            self._tried[kind] += _FORGOTTEN * (_GUESS_WEIGHT - self._tried[kind])


class Prospect(NamedTuple):
    """How many tokens it pays to draft, 0 for none, and how many times as many tokens a second that gives."""

    n: int
    gain: float


_NO_PROSPECT = Prospect(0, 1.0)


class DraftPolicy:
    """Knows how often drafts come true and what steps take, of all answers; decides how many tokens are drafted.

    Attributes:
        max_drafts: tokens in one step at most.
        loses_all: of a step with a wrong draft no draft is left: those that were right are run again with the next one.
        guess_s: seconds that a head takes to guess one token, of late; 0: not known.
    """

    def __init__(self, max_drafts: int, *, loses_all: bool = False) -> None:
        """Know nothing yet but what is usual."""
        self.max_drafts, self.loses_all = max_drafts, loses_all
        self._matches, self._guesses = HitRates(_FIRST_GUESS), HitRates(_HEAD_FIRST_GUESS)
        self._times = StepTimes(max_drafts + 1)
        self.guess_s = 0.0
        self._n_trials = 0  # how often a head was asked
        self._n_idle = 0  # how often that did not seem to pay since

    def drafter(self, prompt_ids: Sequence[int]) -> Drafter:
        """Return what makes the drafts for an answer."""
        return Drafter(self, prompt_ids)

    def n_drafts(self, length: int, most: int) -> int:
        """Return how many tokens to draft, at most `most`, behind a match of so many."""
        return self.by_match(length, most).n

    def by_match(self, length: int, most: int) -> Prospect:
        """Return what it promises to draft at most `most` tokens behind a match of so many."""
        if not self._times.is_known or length < _N_GRAM:
            return _NO_PROSPECT
        found = self._best(lambda i: self.chance(length + i), most, 0.0)
        if not found.n:
            self._times.forget()
        return found

    def by_head(self, most: int) -> Prospect:
        """Return what it promises to have a head guess at most `most` tokens."""
        if not self._times.is_known or most < 1:
            return _NO_PROSPECT
        if self._n_trials < len(_HEAD_TRIALS):
            return Prospect(min(most, _HEAD_TRIALS[self._n_trials]), _LEAST_GAIN)
        found = self._best(self._guesses.share, most, self.guess_s)
        if not found.n:
            self._guesses.forget()
            self._n_idle += 1
            if self._n_idle == _TRIED_AGAIN:
                self._n_idle, self._n_trials = 0, len(_HEAD_TRIALS) - _TRIALS_MORE
        return found

    def _best(self, chance_of: Callable[[int], float], most: int, guess_s: float) -> Prospect:
        """Return the best number of drafts.

        Args:
            chance_of: how likely the i-th of them is if those before are right.
            most: of them.
            guess_s: seconds that each of them takes.
        """
        one, *times = self._times.all()
        best = Prospect(0, _LEAST_GAIN)
        chance, n_made, lost = 1.0, 1.0, 0.0
        for n, seconds in enumerate(times[:most], 1):
            share = chance_of(n - 1)
            lost += chance * (1 - share) * (n - 1)  # drafts that are right, and have to be run again
            chance *= share
            n_made += chance
            again = lost * (seconds - one) / n if self.loses_all else 0.0
            gain = n_made * one / (seconds + again + n * guess_s)
            if gain > best.gain:
                best = Prospect(n, gain)
        return best if best.n else _NO_PROSPECT

    def chance(self, length: int) -> float:
        """Return how likely the token is that followed so many ones before."""
        return self._matches.share(_KINDS[min(length, _LONGEST)])

    def note_drafts(self, length: int, n_tried: int, n_right: int) -> None:
        """Note that of the tokens behind a match of so many the first ones were right, and were compared as far."""
        for i in range(n_tried):
            self._matches.note(_KINDS[min(length + i, _LONGEST)], is_right=i < n_right)

    def note_guesses(self, n_tried: int, n_right: int) -> None:
        """Note the same of the tokens that a head guessed."""
        for i in range(n_tried):
            self._guesses.note(i, is_right=i < n_right)

    def note_guess_time(self, n: int, seconds: float) -> None:
        """Note what a head took to guess so many tokens."""
        self._n_trials += 1
        each = seconds / n
        self.guess_s += (0.2 if self.guess_s else 1.0) * (each - self.guess_s)

    def note_step(self, n_tokens: int, seconds: float) -> None:
        """Note what a step took that one answer had for itself."""
        self._times.note(n_tokens, seconds)


class Drafter:
    """Makes the drafts for one answer."""

    def __init__(self, policy: DraftPolicy, prompt_ids: Sequence[int]) -> None:
        """Begin with a prompt, which is not looked at before the first draft."""
        self.policy = policy
        self._prompt_ids = prompt_ids
        self._text = Lookup()
        self._n_made = 0  # tokens of the answer that were looked at
        self._expected: tuple[int, list[int]] | None = None  # length of the match, and what is to follow
        self._guessed: list[int] = []  # by the head, of what is to follow
        self._guess_s = 0.0  # what that took, for the step that is run next

    def propose(
        self, token_ids: Sequence[int], most: int, head: Head | None = None, most_by_head: int = 0
    ) -> list[int]:
        """Return tokens that may follow those made so far, as many as it pays to run with the last one of these.

        There are `most` of them at most, and of a head that can guess any no more than `most_by_head`.
        """
        length, start = self._look(token_ids)
        by_match = self.policy.by_match(length, most)
        by_head = self.policy.by_head(min(most, most_by_head))
        expected = self._expect(length, start, max(by_match.n, 1))
        if head and by_head.n and by_head.gain > by_match.gain:
            self._guessed, self._guess_s = self.guess(head, by_head.n)
            self.policy.note_guess_time(by_head.n, self._guess_s)
            return self._guessed
        return expected if by_match.n else []

    def is_promising(self, token_ids: Sequence[int], most: int, most_by_head: int = 0) -> bool:
        """Return whether it will probably pay to draft behind the next token, so that it is to be waited for."""
        length, start = self._look(token_ids)
        self._expect(length, start, 1)
        if self.policy.by_head(min(most, most_by_head)).n:
            return True
        return length > 0 and self.policy.chance(length) > 0.5 and self.policy.n_drafts(length + 1, most) > 0

    def guess(self, head: Head, n: int) -> tuple[list[int], float]:
        """Return `n` tokens that a head guesses, and the seconds that took."""
        return head(n)

    def note_step(self, n_tokens: int, seconds: float) -> None:
        """Note what a step took, with the guessing of its drafts."""
        self.policy.note_step(n_tokens, seconds - self._guess_s)
        self._guess_s = 0.0

    def find(self, new: Sequence[int]) -> tuple[int, int]:
        """Take in the tokens that were made meanwhile; return what `Lookup.find` does."""
        if not len(self._text):
            self._text.extend(self._prompt_ids[-_LOOK_BACK:])
        self._text.extend(new)
        return self._text.find()

    def draft(self, start: int, n: int) -> list[int]:
        """Return `n` tokens from where `find` said."""
        return self._text.copied(start, n)

    def _look(self, token_ids: Sequence[int]) -> tuple[int, int]:
        """Find the end of what was made so far, having seen what became of the last draft."""
        new = token_ids[self._n_made :]
        self._n_made = len(token_ids)
        if new and self._expected is not None:
            length, expected = self._expected
            self.policy.note_drafts(length, *_compared(new, expected))
            self._expected = None
        if new and self._guessed:
            self.policy.note_guesses(*_compared(new, self._guessed))
            self._guessed = []
        return self.find(new)

    def _expect(self, length: int, start: int, n: int) -> list[int]:
        """Return the draft, and remember it until the next tokens are there."""
        expected = self.draft(start, n) if length else []
        self._expected = (length, expected) if length else None
        return expected


def _compared(made: Sequence[int], drafted: Sequence[int]) -> tuple[int, int]:
    """Return how many drafts could be compared with what was made, up to the first wrong one, and how many agree."""
    same = [a == b for a, b in zip(made, drafted, strict=False)]
    n_right = same.index(False) if False in same else len(same)
    return min(n_right + 1, len(same)), n_right
