"""The engine as a whole: opens a model file on a device and answers prompts. It knows every part."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from types import TracebackType

import numpy as np
import numpy.typing as npt

from engine.config import EngineConfig, SamplingParams
from engine.data import tiny_model_path
from engine.devices.cuda import CUDADevice
from engine.devices.footprint import Footprint, measure
from engine.devices.graph import Graph, Rope
from engine.devices.program import (
    DrawingProgram,
    ProfiledProgram,
    Program,
    RecurrentProgram,
    RewindingProgram,
    SavingProgram,
    cuts_back,
)
from engine.devices.slots import ClockedProgram, MeteredProgram, SlotProgram, TimedProgram
from engine.devices.traffic import count_weights
from engine.errors import DeviceError, EngineError, RequestError
from engine.experts.caching import ExpertCaching
from engine.experts.steering import OWN
from engine.generate.answer import Answer, Chunk, Completion
from engine.generate.drafting import DraftPolicy
from engine.generate.forward import ForwardPass, Outputs
from engine.generate.leases import Lease, SlotTable
from engine.generate.scheduler import Scheduler
from engine.generate.sequence import Sequence as TextSequence
from engine.generate.session_file import SavedSession, load_session, save_session
from engine.generate.snapshots import Snapshots
from engine.gguf import ModelFile, WeightMemory
from engine.model_spec import ModelSpec
from engine.models import load_model
from engine.resources import Resources
from engine.runtime.answering import Answering, Prompt, StepProgress
from engine.runtime.files import check_files
from engine.runtime.placing import (
    OpenProgress,
    check_memory,
    limits_of,
    load_mode,
    most_drafts,
    open_device,
    resolve,
)
from engine.runtime.prompts import Prompts
from engine.runtime.session import Session
from engine.runtime.statistics import EngineStatistics
from engine.runtime.turn import Turn
from engine.synthetic import open_model_file
from engine.tokenizer import Tokenizer

_log = logging.getLogger("engine")

Borrow = Callable[[Sequence[int]], Lease]


class Engine(Answering):
    """A model on a device, ready to answer. A context manager; close it to free its memory.

    Any thread may call any method, but an iterator that one returned belongs to one thread at a time. Answers that are
    under way at the same time share their steps, as many as there are sequences ([engine] n_sequences); further ones
    wait for a sequence to become free. None of this changes a bit of any answer.

    Attributes:
        config: the settings in use, with every "auto" and 0 replaced by what was chosen.
        spec: the model's hyper-parameters.
        tokenizer: text to token ids and back.
        footprint: what the model needs of memory with these settings.
        drafts: when tokens are drafted; None for never.
    """

    def __init__(self, model_file: ModelFile, config: EngineConfig, progress: OpenProgress | None = None) -> None:
        """Open a model file that is open already; the engine closes it, also where this fails. See `Engine.open`."""
        with Resources() as held:
            self._file = held.own(model_file)
            check_files(config)
            model = load_model(model_file, drafts=most_drafts(config) > 0)
            self.spec: ModelSpec = model.spec
            self._tensor_names = model.tensor_names
            self.config = resolve(config, model.spec)
            self._prompts = Prompts(model_file.metadata, config.model, model.spec.n_vocab)
            self.tokenizer: Tokenizer = self._prompts.tokenizer
            device, reason = open_device(self.config, progress)
            self._device = held.own(device)
            settings = self.config.engine
            limits = limits_of(settings)
            gpu = device if isinstance(device, CUDADevice) else None
            self.footprint: Footprint = measure(model.graph, limits, stores_once=gpu is not None)
            if gpu is None:  # which has them in its own memory, and checks that itself
                check_memory(self.footprint, settings)
            n_bytes = sum(model_file.tensors[name].n_bytes for name in model.tensor_names)
            vram_bytes = gpu.usable_bytes - self.footprint.state_bytes if gpu else None
            self._weights = held.own(
                WeightMemory.load(
                    model_file,
                    model.tensor_names,
                    load_mode(self.config, n_bytes, vram_bytes),
                    progress=(lambda done, total: progress("loading weights", done, total)) if progress else None,
                )
            )
            self.config = replace(self.config, model=replace(self.config.model, load=self._weights.mode))
            self._program: Program = held.own(device.compile(model.graph, self._weights, limits))
            self._caching = held.own(ExpertCaching(self._program, self.config, self.spec, model.tensor_names))
            self._prepare_answers(model.graph)
            self._statistics = self._first_statistics(model.graph, n_bytes)
            self._held = held.pop_all()
        _log.info("%s", self._first_line(reason))

    def _prepare_answers(self, graph: Graph) -> None:
        """Set up what answers are made with, above the program."""
        settings, self._turn = self.config.engine, Turn()
        is_long = any(isinstance(op, Rope) and op.is_long(settings.context_length) for op in graph.operations)
        self._rotation = ", rotated for long contexts" if is_long else ""  # of keys that a session holds
        self._limits = self._program.limits
        program, draws = self._caching.program, isinstance(self._program, DrawingProgram)
        if draws:
            program.allow(self.tokenizer.sampled_among(self.spec.n_vocab))
        self._forward = ForwardPass(
            program,
            self._limits,
            self.spec.n_vocab,
            draws=draws,
            runs_ahead=program.runs_ahead,
            most_guesses=self.spec.most_guesses,
        )
        self._snapshots: Snapshots | None = None
        most = cuts_back(graph, self._limits)
        overwrites = most is not None and most < self._limits.context_length
        if overwrites and settings.n_snapshots and isinstance(self._program, RecurrentProgram):
            self._snapshots = Snapshots(self._program, self._turn, settings.n_snapshots)
        has_states = bool(graph.states)
        rewinder = self._program if isinstance(self._program, RewindingProgram) else None
        may_draft = settings.max_drafts > 0 and (rewinder is not None or not has_states)
        self._slots = SlotTable(
            settings.n_sequences,
            cuts_back=most,
            snapshots=self._snapshots,
            rewinder=rewinder if may_draft and has_states else None,
        )
        self.drafts = DraftPolicy(settings.max_drafts, loses_all=has_states) if may_draft else None
        self._scheduler = Scheduler(self._forward, self._turn)

    def _first_statistics(self, graph: Graph, n_bytes: int) -> EngineStatistics:
        """Return what the engine is, before it has done anything; n_bytes: of all weights."""
        return EngineStatistics(
            f"{self.spec.name} ({self.spec.architecture})",
            self._device.description,
            count_weights(graph),
            n_bytes,
            self._program.state_bytes,
            self._program.scratch_bytes,
            device_bytes=self._program.device_bytes if isinstance(self._program, SlotProgram) else 0,
            bandwidths=self._program.bandwidths if isinstance(self._program, SlotProgram) else None,
            has_virtual_clock=isinstance(self._program, ClockedProgram),
        )

    @property
    def has_draft_head(self) -> bool:
        """Return whether the model guesses tokens itself."""
        return self._forward.has_head

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str] | None = None,
        config: EngineConfig | None = None,
        *,
        progress: OpenProgress | None = None,
    ) -> Engine:
        """Open a model.

        Args:
            path: a GGUF file or "synthetic:NAME"; None for the one in `config`, which by default is the small trained
                model that comes with the package.
            config: settings; None for the defaults and the environment.
            progress: called with (what, done, total) while weights are loaded.

        Raises:
            GGUFError: for a file that is damaged.
            UnsupportedModelError: for a model we do not run.
            DeviceError: for a device that is not there or has too little memory.
        """
        config = config if config is not None else EngineConfig.load()
        if path is not None and not os.fspath(path):
            raise RequestError("the name of the model is empty; give a file, or None for the one in the settings")
        path = path or config.model.path or tiny_model_path()
        return cls(open_model_file(path, has_router_biases=config.moe.routing != OWN), config, progress)

    def close(self) -> None:
        """Free all memory. An answer that is still being streamed ends with an error at its next token."""
        self._scheduler.check_outside()
        with self._turn.lock:
            if self._turn.is_open:
                self._turn.is_open = False
                self._scheduler.close()
                self._held.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # -- text --------------------------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool = False, parse_special: bool = False) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: any text.
            add_special: add the tokens that the model wants around a text, such as BOS.
            parse_special: read control tokens that are spelled out in the text (`<|im_start|>`) as such.
        """
        return self.tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, token_ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of token ids, without control tokens unless they are asked for."""
        return self.tokenizer.decode(token_ids, skip_special=skip_special)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt: a text, chat messages (put through the model's template), or ids.

        Raises `TokenizerError` for messages if the model has no chat template or it refuses them.
        """
        return self._prompts.ids(prompt)

    # -- running -----------------------------------------------------------------------------------------------------

    def _complete(self, prompt: Prompt, params: SamplingParams | None, progress: StepProgress | None) -> Completion:
        return self._complete_in(self._slots.borrow, prompt, params, progress)

    def _stream(
        self, prompt: Prompt, params: SamplingParams | None, progress: StepProgress | None
    ) -> Generator[Chunk, None, None]:
        return self._stream_in(self._slots.borrow, prompt, params, progress)

    def _complete_in(
        self, borrow: Borrow, prompt: Prompt, params: SamplingParams | None, progress: StepProgress | None
    ) -> Completion:
        """Return the answer, made in the place that `borrow` gives for its prompt."""
        sequence = self._new_text(prompt, params)
        self._scheduler.check_outside()
        lease = borrow(sequence.prompt_ids)
        return self._scheduler.complete(self._begin(sequence, lease, is_streamed=False, progress=progress))

    def _stream_in(
        self, borrow: Borrow, prompt: Prompt, params: SamplingParams | None, progress: StepProgress | None
    ) -> Generator[Chunk, None, None]:
        """Check the request now; borrow at the first `next`, so that an iterator which nobody reads holds no place."""
        sequence = self._new_text(prompt, params)

        def chunks() -> Generator[Chunk, None, None]:
            self._scheduler.check_outside()
            lease = borrow(sequence.prompt_ids)
            yield from self._scheduler.stream(self._begin(sequence, lease, is_streamed=True, progress=progress))

        return chunks()

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | None = None,
        *,
        on_step: Callable[[], object] = lambda: None,
    ) -> Generator[tuple[int, Completion | EngineError], None, None]:
        """Answer prompts together, as many at a time as there are sequences to spare ([engine] n_sequences).

        Args:
            prompts: as for `generate`; read only as far ahead as sequences become free.
            params: how tokens are chosen; None for the [sampling] settings.
            on_step: called after every step; it may look at `statistics`.

        Yields:
            (index of the prompt, its answer) as each is finished, or the error that the prompt met, which stops no
            other. Close the iterator to stop all.

        >>> from engine import Engine, EngineConfig, SamplingParams
        >>> with Engine.open(config=EngineConfig.load(overrides={"engine.n_sequences": 2})) as engine:
        ...     params = SamplingParams(max_tokens=4, ignore_eos=True)
        ...     answers = dict(engine.generate_many(["import os", "", "class A:"], params))
        >>> [type(answers[i]).__name__ for i in range(3)]
        ['Completion', 'RequestError', 'Completion']
        """
        self._scheduler.check_outside()
        numbered, active = enumerate(prompts), dict[Answer, int]()
        waiting: tuple[int, TextSequence] | None = None
        try:
            while True:
                while True:
                    if waiting is None:
                        index, prompt = next(numbered, (-1, ""))
                        if index < 0:
                            break
                        try:
                            waiting = index, self._new_text(prompt, params)
                        except EngineError as error:
                            yield index, error
                            continue
                    index, sequence = waiting
                    borrow = self._slots.try_borrow if active else self._slots.borrow
                    lease = borrow(sequence.prompt_ids)
                    if lease is None:
                        break
                    answer = self._begin(sequence, lease, is_streamed=False)
                    active[answer], waiting = index, None
                    self._scheduler.add(answer)
                if not active:
                    return
                answer = self._scheduler.wait_for_any(list(active), on_step)
                index = active.pop(answer)
                self._scheduler.remove(answer)
                if answer.completion is not None:
                    yield index, answer.completion
                elif isinstance(answer.error, EngineError):
                    yield index, answer.error
                elif answer.error is not None:
                    raise answer.error
        finally:
            for answer in active:
                self._scheduler.remove(answer)

    def _new_text(self, prompt: Prompt, params: SamplingParams | None) -> TextSequence:
        """Make the sequence of a request, checked."""
        params, context_length = params or self.config.sampling, self._limits.context_length
        token_ids = self._prompts.checked_ids(prompt, context_length)
        room = context_length - len(token_ids) + 1  # the last token that is chosen is never run and needs no place
        params = replace(params, max_tokens=min(params.max_tokens or room, room))
        return TextSequence(self.tokenizer, params, token_ids)

    def _begin(
        self, sequence: TextSequence, lease: Lease, *, is_streamed: bool, progress: StepProgress | None = None
    ) -> Answer:
        """Begin an answer in a borrowed slot, and count it."""
        try:
            most = self._limits.max_tokens
            answer = Answer(
                lease,
                self.tokenizer,
                sequence,
                at_once=most,
                is_streamed=is_streamed,
                progress=progress,
                drafts=self.drafts,
            )
            with self._turn:
                s = self._statistics
                self._statistics = replace(
                    s, n_requests=s.n_requests + 1, n_reused_tokens=s.n_reused_tokens + answer.n_reused
                )
        except BaseException:
            lease.close()
            raise
        return answer

    # -- sessions ----------------------------------------------------------------------------------------------------

    def new_session(self) -> Session:
        """Return an empty session; it takes one of [engine] n_sequences until it is closed."""
        return Session(self, self._empty_slot())

    def _empty_slot(self) -> Lease:
        self._scheduler.check_outside()  # those who have slots may need this thread to get on
        return self._slots.borrow((), reuse=False)

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """Return a session as it was saved; whatever follows has the same bits as if it had never been away.

        Raises `RequestError` for a file that is no session, damaged, of another version, model or `kv_type`, or longer
        than the context; `DeviceError` if the device cannot put states back.
        """
        program = self._saving_program()
        settings = self.config.engine
        layout = program.state_layout + self._rotation
        saved = load_session(path, self._fingerprint, settings.kv_type, layout, settings.context_length)
        lease = self._empty_slot()
        try:
            with self._alone():
                lease.begin(len(saved.token_ids))
                self._caching.program.load_sequence(lease.slot, len(saved.token_ids), saved.state)
                lease.commit(saved.token_ids, is_whole=False)
        except BaseException:
            lease.close()
            raise
        return Session(self, lease)

    def _save(self, lease: Lease, path: str | os.PathLike[str]) -> None:
        program, fingerprint = self._saving_program(), self._fingerprint
        with self._alone():  # or a stream that is open may go on in between
            token_ids, state = lease.token_ids, program.save_sequence(lease.slot, lease.n_held)
        kv_type, layout = self.config.engine.kv_type, program.state_layout + self._rotation
        save_session(path, SavedSession(fingerprint, kv_type, layout, token_ids, state))

    def _saving_program(self) -> SavingProgram:
        if not isinstance(self._program, SavingProgram):
            raise DeviceError(
                f'{self._device.description}: this device cannot save or load sessions; set [engine] device = "cpu"'
            )
        return self._program

    @cached_property
    def _fingerprint(self) -> str:
        """Tell models apart by the names, forms and first bytes of all tensors."""
        digest = hashlib.sha256(self.spec.architecture.encode())
        head = f"blk.{self.spec.draft_layer}."  # a session says nothing about it
        for name in (name for name in self._tensor_names if not name.startswith(head)):
            info = self._file.tensors[name]
            digest.update(f"{name} {info.format.name} {info.shape}".encode())
            digest.update(self._weights.array(name)[:4096].data)
        return digest.hexdigest()

    def _append(self, lease: Lease, token_ids: Sequence[int], outputs: Outputs) -> npt.NDArray[np.float32]:
        self._prompts.check_ids(token_ids)
        with self._alone():
            logits = lease.extend(self._forward, token_ids, outputs)
            return logits if outputs == "all" else logits.copy()  # the others are a view into the program

    def logits(self, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits of every token of a sequence that begins afresh, float32 [n_tokens, n_vocab].

        Raises `RequestError` if there are no tokens, one is not in the vocabulary, or the context is too short.
        """
        self._prompts.check_ids(token_ids)
        with self.new_session() as session:
            return session.run(token_ids, "all")

    def profile(self, token_ids: Sequence[int]) -> list[tuple[str, float]]:
        """Run tokens as one step of a fresh sequence; return (operation, seconds) in the order they were run.

        Raises `RequestError` for more tokens than [engine] max_batch_tokens, `DeviceError` if the device cannot tell.
        """
        self._prompts.check_ids(token_ids)
        if not isinstance(self._program, ProfiledProgram):
            raise DeviceError(f"{self._device.description}: this device cannot tell how long each operation takes")
        ids = np.asarray(token_ids, np.int32)
        with self._empty_slot() as lease, self._alone():
            slots, last = np.full(len(ids), lease.slot, np.int32), np.array([len(ids) - 1], np.int32)
            return self._program.profile(ids, np.arange(len(ids), dtype=np.int32), slots, last)

    @property
    def statistics(self) -> EngineStatistics:
        """Return what the engine is and what it has done so far."""
        with self._turn.lock:
            is_open, steps = self._turn.is_open, self._scheduler.steps
            metered = self._program if is_open and isinstance(self._program, MeteredProgram) else None
            timed = self._program if is_open and isinstance(self._program, TimedProgram) else None
            return replace(
                self._statistics,
                snapshot_bytes=0 if self._snapshots is None else self._snapshots.n_bytes,
                cache_line=self._caching.describe(),
                cache=self._caching.statistics,
                time_spent=None if metered is None else metered.time_spent,
                layer_times=None if timed is None else timed.layer_times,
                traffic=None if metered is None else metered.traffic,
                n_prompt_tokens=steps.n_prompt_tokens,
                n_decode_tokens=steps.n_decode_tokens,
                prompt_s=steps.prompt_s,
                decode_s=steps.decode_s,
                n_drafts=steps.n_drafts,
                n_drafts_right=steps.n_drafts_right,
            )

    def now(self) -> float:
        """Return seconds on the clock that speeds are measured with: the device's own if it has one."""
        return self._forward.now()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for this thread's turn to use the program for something else than the scheduler's steps."""
        self._scheduler.check_outside()
        with self._turn:
            self._scheduler.settle()
            yield

    def _first_line(self, device_reason: str) -> str:
        """Say what is used and why, in one line."""
        s, settings, moe = self._statistics, self.config.engine, self.spec.moe
        fewest = min(filter(None, moe.layer_experts_used), default=moe.n_experts_used)
        used = f"{fewest} to {moe.n_experts_used}" if fewest < moe.n_experts_used else f"{fewest}"
        experts = f"{used} of {moe.n_experts} experts a token" if moe.n_experts else "dense, no experts"
        return (
            f"{s.model}: {self.spec.n_layers} layers, {experts}, "
            f"{s.file_bytes / 2**20:,.1f} MiB of weights ({self.config.model.load}); {s.device} ({device_reason}); "
            f"context {settings.context_length} x {settings.n_sequences}, {settings.kv_type} keys and values, "
            f"{s.state_bytes / 2**20:,.1f} MiB; {self._caching.describe()}; {self._describe_drafts()}"
        )

    def _describe_drafts(self) -> str:
        """Say how many tokens may be drafted, or why none are, for people."""
        if self.drafts is not None:
            by_head = ", by the model's own head, too" if self.has_draft_head else ""
            return f"up to {self.drafts.max_drafts} tokens drafted a step{by_head}"
        moe = self.config.moe
        why = "is recorded" if moe.record_trace else "is played" if moe.routing != OWN else ""
        return f"no tokens drafted, as {'routing ' + why if why else 'max_drafts is 0'}"
