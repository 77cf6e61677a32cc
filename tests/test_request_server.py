"""Layers that are run at another processor's request, which a Python thread plays here."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from engine import _kernels
from engine.quants.formats import BY_NAME, Activation

Q4_K = BY_NAME["Q4_K"].ggml_type
WIDTH, MAX_TOKENS = 48, 3


class Layers:
    """Programs that each multiply their own rows, and the three words they are asked through."""

    def __init__(self, n_layers: int, n_threads: int) -> None:
        self.flags = np.zeros((3, 16), np.uint32)
        self.x = np.arange(1, n_layers * MAX_TOKENS * WIDTH + 1, dtype=np.float32).reshape(n_layers, MAX_TOKENS, WIDTH)
        self.out = np.zeros_like(self.x)
        self.programs = [_kernels.Program(MAX_TOKENS, 1, n_threads) for _ in range(n_layers)]
        for i, program in enumerate(self.programs):
            x, out = int(self.x[i].ctypes.data), int(self.out[i].ctypes.data)
            program.scale(x, WIDTH, 0, 0, out, WIDTH, WIDTH, 2.0 + i, _kernels.ROWS_TOKENS)
        self.server = _kernels.RequestServer(self.programs, *(int(flag.ctypes.data) for flag in self.flags))
        self.step = _kernels.Step(MAX_TOKENS)
        self.step.n_tokens = MAX_TOKENS
        self.step.positions[:] = np.arange(MAX_TOKENS)

    def ask(self, numbers: list[int], *, must_answer: int) -> None:
        """Make requests one after another, each when the one before was answered; the last `must_answer` are not."""
        for i, number in enumerate(numbers):
            self.flags[0, 0] = number
            end = time.monotonic() + 20
            while i < must_answer and self.flags[1, 0] != number:
                assert time.monotonic() < end
                time.sleep(0)


@pytest.mark.parametrize("n_threads", [1, 2, 3])
@pytest.mark.parametrize("first", [1, 2**32 - 2], ids=["small numbers", "numbers that wrap"])
def test_layers_are_run_when_asked_for(n_threads: int, first: int) -> None:
    layers = Layers(4, n_threads)
    asked = [0, 1, 3]  # layer 2 has no request
    numbers = [(first + layer) % 2**32 for layer in (*asked, 4)]
    thread = threading.Thread(target=layers.ask, args=(numbers,), kwargs={"must_answer": len(asked)})
    thread.start()
    assert layers.server.run(layers.step, first, 0, 20.0)
    thread.join()
    for layer in range(4):
        expected = layers.x[layer] * (2.0 + layer) if layer in asked else 0.0
        np.testing.assert_array_equal(layers.out[layer], expected)


def test_the_time_of_each_layer_is_known() -> None:
    layers = Layers(3, 2)
    thread = threading.Thread(target=lambda: (time.sleep(0.05), layers.ask([1, 3, 4], must_answer=2)))
    thread.start()
    start = time.monotonic()
    assert layers.server.run(layers.step, 1, 0, 20.0)
    taken = time.monotonic() - start
    thread.join()
    waited, spent = layers.server.seconds
    assert waited[0] > 0.03  # it was asked after 0.05 s
    assert (spent[[0, 2]] > 0).all()
    assert waited[1] == spent[1] == 0
    assert waited.sum() + spent.sum() <= taken


def test_a_request_from_before_the_step_is_not_served_again() -> None:
    layers = Layers(2, 2)
    layers.flags[0, 0] = 7
    thread = threading.Thread(target=lambda: (time.sleep(0.05), layers.ask([13], must_answer=0)))
    thread.start()
    assert layers.server.run(layers.step, 11, 7, 20.0)
    thread.join()
    assert not layers.out.any()


def test_no_request_in_time_is_an_error() -> None:
    layers = Layers(1, 2)
    layers.flags[:2, 0] = 5, 4
    with pytest.raises(TimeoutError, match=r"no request for 0.01 s; the last was 5, answered 4"):
        layers.server.run(layers.step, 6, 5, 0.01)


def test_an_abandoned_step_ends() -> None:
    layers = Layers(1, 2)
    layers.flags[2, 0] = 1
    assert not layers.server.run(layers.step, 1, 0, 20.0)


def test_programs_and_steps_that_do_not_fit_are_refused() -> None:
    layers = Layers(1, 2)
    address = int(layers.flags.ctypes.data)
    with pytest.raises(ValueError, match="number of programs"):
        _kernels.RequestServer([], address, address, address)
    with pytest.raises(ValueError, match="address of answered is 0"):
        _kernels.RequestServer(layers.programs, address, 0, address)
    with pytest.raises(ValueError, match="same number of threads"):
        _kernels.RequestServer([*layers.programs, _kernels.Program(1, 1, 1)], address, address, address)
    layers.step.n_tokens = MAX_TOKENS + 1
    with pytest.raises(ValueError, match="tokens"):
        layers.server.run(layers.step, 1, 0, 1.0)


class ExpertLayers:
    """Layers of experts in Q4_K of which one token asks for some, with guesses of what it will ask for.

    The other side is a thread that guesses a layer, gives the team time to fetch, and then asks for it.
    """

    N_EXPERTS, N_USED, HIDDEN_SIZE, FFN_SIZE = 6, 3, 256, 512

    def __init__(self, n_layers: int, n_threads: int) -> None:
        rng = np.random.default_rng(0)
        self.flags = np.zeros((4, 16), np.uint32)
        self.ids, self.guess = np.zeros(self.N_USED, np.int32), np.zeros(self.N_USED, np.int32)
        x = rng.standard_normal((1, self.HIDDEN_SIZE), np.float32)
        self.x = _kernels.quantize_activations(x, Activation.Q8_256)
        self.answer = np.zeros(self.N_USED * self.HIDDEN_SIZE, np.float32)
        self.answers: list[np.ndarray] = []
        self.keep: list[np.ndarray] = []
        self.programs = [self._program(i, n_threads) for i in range(n_layers)]
        addresses = [int(flag.ctypes.data) for flag in self.flags]
        self.server = _kernels.RequestServer(self.programs, *addresses, int(self.guess.ctypes.data))
        self.step = _kernels.Step(1)
        self.step.n_tokens = 1

    def _program(self, layer: int, n_threads: int) -> _kernels.Program:
        shapes = [(self.FFN_SIZE, self.HIDDEN_SIZE)] * 2 + [(self.HIDDEN_SIZE, self.FFN_SIZE)]
        matrices = []
        for i, (n_rows, n_cols) in enumerate(shapes):
            raw = np.empty((self.N_EXPERTS, n_rows * BY_NAME["Q4_K"].row_bytes(n_cols)), np.uint8)
            _kernels.fill_random_blocks(Q4_K, raw.reshape(self.N_EXPERTS * n_rows, -1), n_cols, 3 * layer + i, 1)
            table = raw.ctypes.data + raw.strides[0] * np.arange(self.N_EXPERTS, dtype=np.int64)
            self.keep += [raw, table]
            matrices.append((int(table.ctypes.data), Q4_K, 0, 0))
        program = _kernels.Program(1, 1, n_threads)
        at = int(self.x.ctypes.data), self.x.strides[0]
        program.experts(
            *at,
            *at,
            int(self.ids.ctypes.data),
            self.N_EXPERTS,
            self.N_USED,
            *matrices,
            _kernels.ACTIVATE_SILU,
            self.HIDDEN_SIZE,
            self.FFN_SIZE,
            int(self.answer.ctypes.data),
            len(self.answer),
        )
        return program

    def ask(self, rounds: list[tuple[int, list[int], list[int] | None]]) -> None:
        """Ask for (layer, ids) one after another, each after a guess if there is one; then end the step."""
        for layer, ids, guess in rounds:
            if guess is not None:
                self.guess[:] = guess
                self.flags[3, 0] = 1 + layer
                time.sleep(0.01)
            self.ids[:] = ids
            self.flags[0, 0] = 1 + layer
            end = time.monotonic() + 20
            while self.flags[1, 0] != 1 + layer:
                assert time.monotonic() < end
                time.sleep(0)
            self.answers.append(self.answer.copy())
        self.flags[0, 0] = 1 + len(self.programs)

    def run(self, rounds: list[tuple[int, list[int], list[int] | None]]) -> list[np.ndarray]:
        """Return the answers of one step."""
        thread = threading.Thread(target=self.ask, args=(rounds,))
        thread.start()
        assert self.server.run(self.step, 1, 0, 20.0)
        thread.join()
        return self.answers


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_a_guess_changes_no_answer_and_is_counted(n_threads: int) -> None:
    asked = [(0, [4, -1, 2]), (1, [5, 0, 3]), (3, [-1, 1, -1])]
    plain = ExpertLayers(4, n_threads).run([(*one, None) for one in asked])
    layers = ExpertLayers(4, n_threads)
    guesses = [
        None,
        [0, -1, 5],
        [2**30, -7, 1],
    ]  # of the second two ids are right and one is missing; then what is no id
    answers = layers.run([(*one, guess) for one, guess in zip(asked, guesses, strict=True)])
    for answer, expected in zip(answers, plain, strict=True):
        np.testing.assert_array_equal(answer.view(np.uint32), expected.view(np.uint32))
    assert all(np.abs(answer).max() > 0 for answer in answers)
    assert layers.server.guesses.tolist() == [3 + 1, 2 + 1]


def test_guesses_need_a_place_for_their_ids() -> None:
    layers = Layers(1, 1)
    address = int(layers.flags.ctypes.data)
    with pytest.raises(ValueError, match="address of guessed_ids is 0"):
        _kernels.RequestServer(layers.programs, address, address, address, address)
