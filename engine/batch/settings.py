"""The [batch] table of a job file, and the templates in it."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import ClassVar, Literal

from engine.errors import ConfigError
from engine.tables import Table, setting


@dataclass(frozen=True)
class BatchSettings(Table):
    """What a batch run reads and writes. File names are relative to the job file.

    Attributes:
        input: files or patterns such as "texts/*.txt", in the order of their items; a file that is found twice is read
            once.
        format: "jsonl" (an object a line), "csv" (a header line, then a row each), "lines" (a text a line), "text" (the
            whole file is one item), or "auto" = jsonl and csv by the file's ending, text for all others.
        prompt: the prompt, in which {name} stands for an item's field; lines and texts have the one field "text".
            Braces themselves are written {{ and }}.
        chat: put the prompt through the model's chat template, as the user's message.
        system: system message before it, with fields like the prompt; only with `chat`.
        messages_field: field that holds a whole conversation, a list of {"role", "content"}; replaces `prompt`.
        output: JSON lines, one for each item as it is finished; a file that is there is continued.
        n_parallel: answers that are made together; it takes the place of [engine] n_sequences.
    """

    table: ClassVar[str] = "batch"

    input: tuple[str, ...] = ()
    format: Literal["auto", "jsonl", "csv", "lines", "text"] = "auto"
    prompt: str = "{text}"
    chat: bool = False
    system: str = ""
    messages_field: str = ""
    output: str = "results.jsonl"
    n_parallel: int = setting(8, low=1, high=1024)

    def check(self) -> None:
        """Raise `ConfigError` for templates that cannot be filled in, or settings that contradict each other."""
        if not self.input or "" in self.input:
            raise ConfigError('batch.input names no file; expected, for example, input = ["questions.jsonl"]')
        if self.system and not self.chat:
            raise ConfigError("batch.system is set and batch.chat is false; set chat = true")
        if self.messages_field and (self.system or self.prompt != "{text}"):
            raise ConfigError("batch.messages_field replaces batch.prompt and batch.system; leave those out")
        for key in ("prompt", "system"):
            template_fields(getattr(self, key), f"batch.{key}")


def template_fields(template: str, key: str) -> list[str]:
    """Return the names of the fields in a template; raise `ConfigError` naming `key` if it is not one."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"{key}: {error}; write {{{{ and }}}} for braces that are no field") from None
    names = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name or form or conversion:
            raise ConfigError(f"{key}: expected {{name}} for a field, and {{{{ and }}}} for braces that are none")
        names.append(name)
    return names
