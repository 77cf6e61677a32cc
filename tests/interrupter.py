"""Ctrl-C at a line of one's choice."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Collection, Sequence
from types import ModuleType


class Interrupter:
    """Raises KeyboardInterrupt at the n-th line that is run in some modules, but for some functions, once.

    Never at `with`: the interpreter comes there once more before it leaves the block, and handles no signal between
    that and the end of `__exit__`; an exception of a trace function would leave a lock taken.
    """

    def __init__(self, at_line: int, modules: Sequence[ModuleType], but_for: Collection[str] = ()) -> None:
        self.at_line, self.n_lines, self.raised = at_line, 0, False
        self._files = {module.__file__ for module in modules}
        self._but_for = but_for

    def __call__(self, frame, event, _):
        if frame.f_code.co_filename not in self._files or frame.f_code.co_name in self._but_for:
            return None
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not line.lstrip().startswith("with "):
            self.n_lines += 1
            if self.n_lines == self.at_line:
                self.raised = True
                raise KeyboardInterrupt
        return self

    def __enter__(self):
        self.previous = sys.gettrace()
        sys.settrace(self)
        return self

    def __exit__(self, *_):
        sys.settrace(self.previous)
