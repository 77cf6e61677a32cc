"""A sequence of one's own, kept between answers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.config import SamplingParams
from engine.errors import RequestError
from engine.generate.answer import Chunk, Completion
from engine.generate.forward import Outputs
from engine.generate.leases import Lease
from engine.runtime.answering import Answering, Prompt, StepProgress

if TYPE_CHECKING:
    from engine.runtime.engine import Engine


class Session(Answering):
    """A sequence of one's own: what it holds stays until it is closed, and can be saved. A context manager.

    Use it from one thread at a time. While a stream of it is open it can do nothing else, and once it is closed nothing
    at all: that raises `RequestError`. What was run is reused where that is exact: up to the first token that differs;
    with recurrent layers, or windows if that token is far back, up to the end of what the session holds or of a message
    before ([engine] n_snapshots).

    >>> from engine import Engine, SamplingParams
    >>> with Engine.open() as engine, engine.new_session() as session:
    ...     first = session.generate("def main():", SamplingParams(max_tokens=8, ignore_eos=True))
    ...     more = session.generate([*session.token_ids, *engine.tokenize(" # and")])
    ...     more.usage.n_reused_tokens
    11
    """

    def __init__(self, engine: Engine, lease: Lease) -> None:
        """Take over a lease; `Engine.new_session` and `Engine.load_session` make sessions."""
        self._engine = engine
        self._lease = lease

    @property
    def _open_lease(self) -> Lease:
        if not self._lease.is_open:
            raise RequestError("the session is closed")
        return self._lease

    @property
    def n_tokens(self) -> int:
        """Return the tokens run so far."""
        return self._open_lease.n_held

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Return the tokens run so far.

        The last one of an answer is among them only where steps are begun ahead, and not if `max_tokens` ended it.
        """
        return self._open_lease.token_ids

    def run(self, token_ids: Sequence[int], outputs: Outputs = "last") -> npt.NDArray[np.float32]:
        """Append tokens; return the logits of all of them, of the last one, or of none, float32 [n, n_vocab].

        Raises `RequestError` if there are no tokens, one is not in the vocabulary, or the context is full.
        """
        return self._engine._append(self._open_lease, token_ids, outputs)

    def _complete(self, prompt: Prompt, params: SamplingParams | None, progress: StepProgress | None) -> Completion:
        return self._engine._complete_in(self._open_lease.lend, prompt, params, progress)

    def _stream(
        self, prompt: Prompt, params: SamplingParams | None, progress: StepProgress | None
    ) -> Generator[Chunk, None, None]:
        return self._engine._stream_in(self._open_lease.lend, prompt, params, progress)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the session to a file, from which `Engine.load_session` goes on with the same bits.

        Raises `RequestError` if it cannot be written, `DeviceError` if the device cannot take states out.
        """
        self._engine._save(self._open_lease, path)

    def close(self) -> None:
        """Give the place back; a stream that is open can be read to its end."""
        self._lease.close()

    def __del__(self) -> None:
        if self._lease.is_open:
            warnings.warn("a session was not closed", ResourceWarning, stacklevel=2, source=self)
            self.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
