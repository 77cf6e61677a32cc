"""Every error that a user, a file or a machine can cause.

One base class, so that the command line can turn any of them into one clear line and exit code,
and a library user can catch them all with one name. Messages say what was found, what was
expected and what to do; our own broken invariants are `assert`s, never one of these.
"""


class EngineError(Exception):
    """Base of all errors the engine raises on purpose."""


class ConfigError(EngineError):
    """A setting is unknown, has the wrong type, or cannot be combined with another one."""


class GGUFError(EngineError):
    """A model file is not a GGUF file, is damaged, or contradicts itself."""


class UnsupportedModelError(EngineError):
    """The file is sound, but its architecture, variant or weight format is not one we run."""


class TokenizerError(EngineError):
    """The tokenizer or chat template in the file cannot be used, or cannot render the messages."""


class RequestError(EngineError):
    """A request cannot be served as asked: prompt longer than the context, bad sampling value ..."""


class DeviceError(EngineError):
    """A device is missing, too old, out of memory, or failed."""
