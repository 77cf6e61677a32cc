"""A Jinja sandbox that a hostile template can neither leave, nor keep busy, nor fill the memory from.

Jinja's own sandbox keeps a template away from Python's internals. A model file is a download, though, and its template
may also loop for ever or double a string forty times. So whatever can repeat or enlarge something (loops, calls,
filters, operators, literals) spends from one budget a rendering, and no value may outgrow a fixed size.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from typing import Any

from jinja2 import Template, TemplateRuntimeError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 20  # characters of a template
MAX_SIZE = 1 << 24  # characters of one value, those of its items included
MAX_ITEMS = 1 << 18  # items of one value, those of its items included
MAX_WRITTEN = 1 << 26  # characters written in one rendering, also those that only go into a variable
MAX_STEPS = 1 << 20  # of one rendering: loop rounds, calls, operators; large values count as several
_MAX_INTEGER = 1 << 20  # as an argument: a width, a count
_MAX_BITS = 1 << 12  # of an integer that a template works out
_MAX_PRODUCT = 1 << 27  # of the sizes of two arguments that get multiplied

_CHARACTERS_PER_STEP = 1 << 12
_ITEMS_PER_STEP = 1 << 4

# Filters and methods of strings whose result can be as large as the product of two arguments' sizes ...
_MULTIPLYING = frozenset({"replace", "join", "format", "format_map", "indent", "wordwrap", "urlize"})
# ... or of a size and a number.
_WIDENING = frozenset({"indent", "expandtabs"})
_PERCENT_FIELD = re.compile(r"%(?:\([^()]*\))?[-+ #0]*(\*|\d*)\.?(\*|\d*)")
_BRACE_FIELD = re.compile(r"\{[^{}]*:[^{}\d]*(\d*)[^{}\d]*(\d*)[^{}]*(\{?)")


class _Budget:
    """What one rendering has spent."""

    def __init__(self) -> None:
        self.steps = 0
        self.written = 0

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise TemplateRuntimeError(f"it does not end (more than {MAX_STEPS} steps)")

    def write(self, n_characters: int) -> None:
        self.spend(1 + n_characters // _CHARACTERS_PER_STEP)
        self.written += n_characters
        if self.written > MAX_WRITTEN:
            raise TemplateRuntimeError(f"it writes more than {MAX_WRITTEN} characters")


_budget: ContextVar[_Budget] = ContextVar("budget")


class fresh_budget:  # noqa: N801 - used like a function
    """A `with` block that may spend one rendering's budget. Compile and render a template in one."""

    def __enter__(self) -> None:
        self._token = _budget.set(_Budget())

    def __exit__(self, *_: object) -> None:
        _budget.reset(self._token)


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The environment of a template, with further filters and globals."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(
        self,
        *,
        filters: Mapping[str, Callable[..., Any]],
        variables: Mapping[str, Any],
        **options: Any,
    ) -> None:
        super().__init__(finalize=_written, **options)
        self.filters = {name: _bounded(name, function) for name, function in {**self.filters, **filters}.items()}
        self.filters |= {"_rounds": _rounds, "_text": _text, "_made": _made}
        self.globals |= {"namespace": _Namespace, **variables}
        del self.globals["lipsum"]

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Call a function, macro or method for the template."""
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # `str.format` comes wrapped
        if isinstance(owner, str):
            if obj.__name__ in ("format", "format_map"):
                _check_fields(_BRACE_FIELD, owner.replace("{{", ""))
            _check_arguments(obj.__name__, (owner, *args, *kwargs.values()))
        return _made(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Work out a binary operator for the template."""
        if operator == "*":
            for values, count in ((left, right), (right, left)):
                if isinstance(values, Sized) and isinstance(count, int) and len(values) * count > MAX_SIZE:
                    raise _too_large()
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _MAX_BITS:
                raise _too_large()
        elif operator == "%" and isinstance(left, str):
            _check_fields(_PERCENT_FIELD, left)
            _check_arguments("format", (left, right))
        return _made(super().call_binop(context, operator, left, right))

    def from_string(self, source: str | nodes.Template, *args: Any, **kwargs: Any) -> Template:
        """Compile a template."""
        if isinstance(source, str) and len(source) > MAX_SOURCE:
            raise TemplateRuntimeError(f"it is {len(source)} characters long; expected at most {MAX_SOURCE}")
        return super().from_string(source, *args, **kwargs)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        _Counting(self).visit(source)
        return super()._generate(source, *args, **kwargs)


class _Namespace(Namespace):
    """Variables that can change; as text it hides them, since they may have grown after anybody measured it."""

    def __repr__(self) -> str:
        return "<namespace>"


class Generation(Extension):
    """Renders `{% generation %}` blocks, with which training code marks the model's own words, as their content."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the statements of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Counting(NodeTransformer):
    """Puts a filter that pays around what Jinja gives no other handle for: loops, literals, the `~` operator."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        self._environment = environment

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = self._filter(node.iter, "_rounds")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filter(nodes.List(node.nodes, lineno=node.lineno, environment=self._environment), "join")

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filter(node, "_made")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filter(node, "_made")

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._filter(node, "_made") if node.ctx == "load" else node

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        return self._filter(nodes.Const(node.data, lineno=node.lineno, environment=self._environment), "_text")

    def _filter(self, value: nodes.Node, name: str) -> nodes.Filter:
        return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno, environment=self._environment)


def _too_large() -> TemplateRuntimeError:
    return TemplateRuntimeError(f"it makes a value of more than {MAX_SIZE} characters or {MAX_ITEMS} items")


def _made(value: Any) -> Any:
    """Pay for a value the template made, and return it."""
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise _too_large()
    n_characters, n_items = _size(value)
    _budget.get().spend(1 + n_characters // _CHARACTERS_PER_STEP + n_items // _ITEMS_PER_STEP)
    return value


def _size(value: Any) -> tuple[int, int]:
    """Return the characters and items in a value, or refuse it as too large."""
    n_characters = n_items = 0
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, str):
            n_characters += len(part)
        elif isinstance(part, (list, tuple, dict)):
            n_items += len(part)
            if n_items > MAX_ITEMS:
                raise _too_large()
            todo.extend(part)
            if isinstance(part, dict):
                todo.extend(part.values())
    if n_characters > MAX_SIZE:
        raise _too_large()
    return n_characters, n_items


def _check_arguments(name: str, arguments: tuple[Any, ...]) -> None:
    """Refuse arguments of which something enormous would be made before `_made` could measure it."""
    numbers = [abs(argument) for argument in arguments[1:] if isinstance(argument, int)]
    if max(numbers, default=0) > _MAX_INTEGER:
        raise _too_large()
    factors = []
    if name in _MULTIPLYING or name in _WIDENING:
        factors += [sum(_size(argument)) for argument in arguments]
    if name in _WIDENING:
        factors += numbers
    factors.sort()
    if len(factors) > 1 and factors[-1] * factors[-2] > _MAX_PRODUCT:
        raise _too_large()


def _check_fields(field: re.Pattern[str], pattern: str) -> None:
    """Refuse a pattern whose fields are wide, all in all, or get their width from an argument."""
    width = 0
    for part in itertools.chain.from_iterable(field.findall(pattern)):
        if part in ("*", "{"):
            raise TemplateRuntimeError("it takes the width of a field from an argument")
        width += int(part[:8] or 0)
        if width > _MAX_INTEGER:
            raise _too_large()


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # which keeps Jinja's mark on filters that want the context in front
    def bounded(*args: Any, **kwargs: Any) -> Any:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0
        if name == "format":
            _check_fields(_PERCENT_FIELD, str(args[0]))
        _check_arguments(name, (*args[first:], *kwargs.values()))
        return _made(function(*args, **kwargs))

    return bounded


def _rounds(values: Iterable[Any]) -> Iterable[Any]:
    """Pay for every round of a loop, in advance where their number is known."""
    if isinstance(values, Sized):
        _budget.get().spend(1 + len(values))
        return values
    return _pay_each(values)


def _pay_each(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _budget.get().spend(1)
        yield value


def _written(value: Any) -> str:
    """Pay for what is written, and return it as text."""
    text = value if isinstance(value, str) else str(value)
    _budget.get().write(len(text))
    return text


@pass_context  # so that Jinja does not work it out while compiling
def _text(_: Context, text: str) -> str:
    return text
