"""The composition root: opens a model on a device and answers prompts. The only package that knows every part.

`placing` chooses and opens the device, `engine` runs what is asked, `session` keeps a sequence between answers.
"""

from engine.runtime.answering import Messages, Prompt
from engine.runtime.engine import Engine
from engine.runtime.files import check_files, read_chat_template
from engine.runtime.placing import (
    limits_of,
    memory_wish,
    most_drafts,
    open_device,
    resolve,
    stream_n_tokens,
    survey_machine,
)
from engine.runtime.prompts import Prompts
from engine.runtime.session import Session
from engine.runtime.statistics import EngineStatistics

__all__ = [
    "Engine",
    "EngineStatistics",
    "Messages",
    "Prompt",
    "Prompts",
    "Session",
    "check_files",
    "limits_of",
    "memory_wish",
    "most_drafts",
    "open_device",
    "read_chat_template",
    "resolve",
    "stream_n_tokens",
    "survey_machine",
]
