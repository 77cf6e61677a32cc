"""Chat templates: the Jinja program in a model file that writes a conversation the way the model was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError

from engine.errors import GGUFError, TokenizerError
from engine.tokenizer.bounded_jinja import MAX_SIZE, BoundedEnvironment, Generation, fresh_budget
from engine.tokenizer.tokenizer import Tokenizer
from engine.tokenizer.vocabulary import TokenizerMetadata

_KEY = "tokenizer.chat_template"
_MAX_INDENT = 64
_TOOL_USE = "tool_use"  # the name of the template that some files have for conversations with tools

Message = Mapping[str, Any]


class ChatTemplate:
    """The chat template of one model.

    Templates are rendered as Hugging Face's `apply_chat_template` does it, so that what was tested there works here,
    but within bounds: the file is a download, and its template is a program.
    """

    def __init__(self, source: str, tokenizer: Tokenizer, *, tool_source: str | None = None) -> None:
        """Compile a template.

        Args:
            source: the template.
            tokenizer: knows the texts of BOS and EOS.
            tool_source: another one, for conversations with tools.

        Raises:
            TokenizerError: if a template has a syntax error.
        """
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self._tokens = {name: "" if i is None else tokenizer.token_text(i) for name, i in ids.items()}
        self._plain = _compile(source)
        self._with_tools = self._plain if tool_source is None else _compile(tool_source)

    @classmethod
    def from_metadata(cls, metadata: TokenizerMetadata, tokenizer: Tokenizer) -> ChatTemplate:
        """Compile the template a GGUF file has; raise `TokenizerError` if it has none that works."""
        try:
            if _KEY not in metadata:
                raise TokenizerError(
                    f"the file has no {_KEY}, so it is not known how to write a conversation for this model: "
                    "give it plain text, or a template of your own with [model] chat_template"
                )
            tool_key = f"{_KEY}.{_TOOL_USE}"
            return cls(
                metadata.text(_KEY), tokenizer, tool_source=metadata.text(tool_key) if tool_key in metadata else None
            )
        except GGUFError as error:
            raise TokenizerError(f"the chat template in the file cannot be used: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the text of a conversation, to be tokenised with `Tokenizer.encode_chat`.

        Args:
            messages: each with "role" and "content", and what else the template knows.
            add_generation_prompt: end with the start of the model's answer.
            tools: JSON schemas of functions the model may call.
            **kwargs: further variables of the template, such as `enable_thinking`.

        Raises:
            TokenizerError: if the template refuses the messages, fails, or does too much.
        """
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise TokenizerError(f"message {i} is {message!r:.200}; expected a mapping with a text as its 'role'")
        variables = {
            **self._tokens,
            "documents": None,
            **kwargs,
            "messages": list(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._plain if tools is None else self._with_tools
        try:
            with fresh_budget():
                return template.render(variables)
        except TemplateError as error:
            raise TokenizerError(f"the model's chat template cannot render these messages: {error.message}") from error
        except Exception as error:  # a template is foreign code and can raise anything
            raise TokenizerError(
                f"the model's chat template failed on these messages: {type(error).__name__}: {error}"
            ) from error


def _compile(source: str) -> Template:
    environment = BoundedEnvironment(
        filters={"tojson": _to_json},
        variables={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
        extensions=[Generation, "jinja2.ext.loopcontrols"],
        trim_blocks=True,
        lstrip_blocks=True,
    )
    try:
        with fresh_budget():
            return environment.from_string(source)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        where = "" if line is None else f" in line {line}"
        raise TokenizerError(f"the model's chat template has an error{where}: {error.message}") from error
    except Exception as error:  # for example nested deeper than Python's own compiler can
        raise TokenizerError(f"the model's chat template cannot be compiled: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON for a model, not for a web page: without Jinja's escapes for HTML."""
    if max(len(part) if isinstance(part, str) else part or 0 for part in (indent, *(separators or ()))) > _MAX_INDENT:
        raise TemplateError(f"it wants JSON with more than {_MAX_INDENT} characters of indent or separator")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    parts, size = [], 0
    for part in encoder.iterencode(value):
        parts.append(part)
        size += len(part)
        if size > MAX_SIZE:
            raise TemplateError(f"it writes more than {MAX_SIZE} characters of JSON")
    return "".join(parts)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
