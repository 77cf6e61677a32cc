"""The files that settings name beside the model: what can be told of them is told before a model is loaded."""

from __future__ import annotations

from pathlib import Path

from engine.config import EngineConfig, ModelSettings
from engine.errors import ConfigError
from engine.experts.profile import load_profile
from engine.experts.steering import MADE_UP, OWN
from engine.experts.trace import load_trace
from engine.files import check_target


def check_files(config: EngineConfig) -> None:
    """Raise `ConfigError` if a file that the settings name cannot be used, as far as can be told now."""
    moe = config.moe
    try:
        for path in filter(None, (moe.profile, moe.record_trace)):
            check_target(Path(path))
    except OSError as error:
        key = "profile" if error.filename == moe.profile else "record_trace"
        raise ConfigError(f"moe.{key} is {error.filename!r}, which cannot be written: {error.strerror}") from None
    if moe.record_trace and Path(moe.record_trace).exists():
        try:
            load_trace(moe.record_trace)
        except ConfigError:
            raise ConfigError(
                f"moe.record_trace is {moe.record_trace!r}, which is there and is no routing trace; give another name"
            ) from None
    if moe.profile and Path(moe.profile).exists():
        load_profile(moe.profile)
    if moe.routing not in {OWN, MADE_UP}:
        load_trace(moe.routing)


def read_chat_template(settings: ModelSettings) -> str:
    """Return the chat template that is used instead of the model's, "" if there is none.

    Raises `ConfigError` if it cannot be read.
    """
    path = settings.chat_template
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"model.chat_template is {path!r}, which cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"model.chat_template is {path!r}, which is not UTF-8 text (byte {error.start})") from None
