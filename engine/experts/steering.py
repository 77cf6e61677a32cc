"""Plays routing back to a model of random weights, whose routers have no favourites.

A router that has a bias for the choice of experts, and only for that, can be told whom to choose: biases far above all
scores, the best rank's the highest. Weights of the chosen ones still come from the scores, and everything else runs as
it always does, so that what is measured is the real thing, on any device. Where the device guesses whom the next
router will choose, the guess is told, too: of each chosen expert as likely as that is guessed with a trained model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from engine.devices.program import Program, TunableProgram
from engine.errors import ConfigError
from engine.experts.routing_process import RoutingProcess
from engine.experts.trace import NOT_RECORDED, Trace, load_trace
from engine.model_spec import ModelSpec

OWN, MADE_UP = "own", "made-up"
BIAS_NAME, _EXPERTS_NAME = "exp_probs_b.bias", "ffn_down_exps.weight"
PLAYED_OF_PROMPT = 32  # tokens: made-up routing takes half a millisecond for each
_MADE_UP_AT_ONCE = 1024  # tokens
_ABOVE_SCORES = 16.0  # which are probabilities
GUESSED = 0.63  # share of the experts without a slot that is guessed with the bundled model, which was trained

_Routing: TypeAlias = npt.NDArray[np.integer]
RoutingSource: TypeAlias = Iterator[npt.NDArray[np.integer]]
"""Gives the experts of one token after the other, [n_moe_layers, n_experts_used], best first, without an end."""


class Steering:
    """Sets the biases of routers before each step: one token gets the next routing, several their own.

    Routers have biases but where experts are chosen by token id; `layers` are those with one among the layers that have
    experts, `bias_names` theirs. Nobody may call it from two threads at a time. What is played does not depend on when
    routing is found, or set.
    """

    def __init__(
        self,
        program: TunableProgram,
        bias_names: Sequence[str],
        layers: Sequence[int],
        n_experts: int,
        tokens: RoutingSource,
    ) -> None:
        self._program, self._layers, self._tokens = program, list(layers), tokens
        guesses = program.guess_biases
        self._guessed = [layer for layer, name in enumerate(bias_names) if name in guesses]  # layers
        self._names = [*bias_names, *(guesses[bias_names[layer]] for layer in self._guessed)]
        self._values = np.zeros((len(self._names), n_experts), np.float32)
        self._first = n_experts * np.arange(len(self._names))[:, None]  # of each layer's values
        self._set = np.zeros(0, np.intp)  # which values are not 0
        self._nothing = np.zeros_like(self._values)
        self._next: _Routing | None = None  # of the next token, once it is known; the values are its then
        self._is_silent = False  # whether the routers were told to choose for themselves
        self._random = np.random.default_rng(0)

    def end_of_prompt(self, routing: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Return what is played for the last tokens of a prompt, [n_moe_layers, PLAYED_OF_PROMPT, n_experts_used].

        A prompt runs with what its random routers choose, `routing`, which says nothing about the answer that is played
        after it. Whoever learns from prompts is to be told this instead. Where no router is told, it is as it was.
        """
        told = routing[:, np.arange(-PLAYED_OF_PROMPT, 0) % routing.shape[1]]
        told[self._layers] = np.stack([self._take() for _ in range(PLAYED_OF_PROMPT)], axis=1)
        n_experts = self._values.shape[1]
        return np.where(routing[:, :1] < n_experts, told, n_experts).astype(np.int32)  # nobody stays nobody

    def begin_step(self, n_tokens: int) -> None:
        """Set the biases for a step of so many tokens."""
        if n_tokens == 1:
            self._take()
            self._program.write_vectors(self._names, self._values)
        elif not self._is_silent:
            self._program.write_vectors(self._names, self._nothing)
        self._is_silent = n_tokens > 1

    def find_next(self) -> None:
        """Find the next token's routing already, when there is time for it."""
        if self._next is None:
            self._next = next(self._tokens)
            self._note(self._next)

    def _take(self) -> _Routing:
        self.find_next()
        ids, self._next = self._next, None
        assert ids is not None
        return ids

    def _note(self, ids: _Routing) -> None:
        """Put what the routers are to be told for a token among the values."""
        values, n_used = self._values.reshape(-1), ids.shape[1]
        values[self._set] = 0.0
        places = self._first + np.concatenate([ids, ids[self._guessed]])
        is_told = np.ones(places.shape, np.bool_)  # in place of the others a guess has whom its router likes
        is_told[len(ids) :] = self._random.random((len(self._guessed), n_used)) < GUESSED
        ranks = np.broadcast_to(np.arange(n_used, dtype=np.float32) / n_used, places.shape)
        self._set = places[is_told]
        values[self._set] = _ABOVE_SCORES - ranks[is_told]


def make_steering(setting: str, program: Program, tensor_names: Sequence[str], spec: ModelSpec) -> Steering | None:
    """Return what `moe.routing` asks for: None for "own".

    Raises `ConfigError` if this model's routers cannot be told, or the trace is that of another kind of model.
    """
    if setting == OWN:
        return None
    names = [name for name in tensor_names if name.endswith(BIAS_NAME)]
    if not names or not isinstance(program, TunableProgram):
        raise ConfigError(
            f"moe.routing is {setting!r}, but the routers of {spec.name} cannot be told whom to choose; it is for "
            'models of random weights ("synthetic:NAME"); set routing = "own"'
        )
    n_experts, n_used = spec.moe.n_experts, spec.moe.n_experts_used
    if setting == MADE_UP:
        source = _made_up(RoutingProcess(len(names), n_experts, n_used))
    else:
        source = _played(load_trace(setting), setting, len(names), n_experts, n_used)
    blocks = [name.removesuffix(_EXPERTS_NAME) for name in tensor_names if name.endswith(_EXPERTS_NAME)]
    layers = [blocks.index(name.removesuffix(BIAS_NAME)) for name in names]
    return Steering(program, names, layers, n_experts, source)


def _made_up(process: RoutingProcess) -> RoutingSource:
    """Return made-up routing, most of what a measurement needs of it worked out now.

    A token of it takes milliseconds beside a CPU that reads experts from RAM as fast as it can, and whoever is to begin
    the next step waits for the interpreter: 3 % of a token's time, which no real model's routing would take.
    """
    later = (process.next_tokens(1)[0] for _ in itertools.count())
    return itertools.chain(process.next_tokens(_MADE_UP_AT_ONCE), later)


def _played(trace: Trace, path: str, n_layers: int, n_experts: int, n_used: int) -> RoutingSource:
    """Return the answer of a trace token by token, again and again; the layers are those that are as far up."""
    if trace.n_experts != n_experts or trace.n_experts_used < n_used:
        raise ConfigError(
            f"{path}: a trace of {trace.n_experts} experts, {trace.n_experts_used} of them used; "
            f"the model has {n_experts} and uses {n_used}"
        )
    tokens = trace.ids[trace.n_prompt :, :, :n_used]
    tokens = tokens[(tokens != NOT_RECORDED).all(axis=(1, 2))][:, np.arange(n_layers) * trace.n_layers // n_layers]
    if not len(tokens):
        raise ConfigError(f"{path}: no token of this trace has the routing of all layers")
    return itertools.cycle(tokens)
