"""Chat templates: golden renderings, what Hugging Face's renderer offers, and what a hostile template may not do."""

from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_data import TINY, load_tiny, small

from engine.errors import TokenizerError
from engine.tokenizer import ChatTemplate, Tokenizer
from engine.tokenizer import bounded_jinja as bounds

TOKENIZER = Tokenizer.from_metadata(small(bos_token_id=259, eos_token_id=260))  # <x> and <x><y>
HELLO = [{"role": "user", "content": "Hello"}]


def render(source: str, messages=HELLO, **variables) -> str:
    return ChatTemplate(source, TOKENIZER).render(messages, **variables)


@pytest.mark.parametrize("name", TINY)
def test_golden_conversations(name):
    golden = load_tiny(name)
    tokenizer = Tokenizer.from_metadata(golden["metadata"])
    template = ChatTemplate.from_metadata(golden["metadata"], tokenizer)
    assert golden["chat"]
    for chat in golden["chat"]:
        text = template.render(chat["messages"], add_generation_prompt=chat["add_generation_prompt"])
        assert text == chat["text"]
        assert tokenizer.encode_chat(text) == chat["ids"]


# -- what templates rely on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}|{{ tools is none }}|{{ documents is none }}", "<x>|<x><y>|True|True"),
        ("{% if add_generation_prompt %}go{% endif %}", "go"),
        ("  {% if true %}\n  a\n  {%- endif %}\nb", "  ab"),  # trim_blocks and lstrip_blocks
        ("{{ messages[0]['content'] ~ messages[0].role ~ 1 ~ none }}", "Hellouser1None"),
        ("{{ {'k': 'é<&>', 'a': [1]} | tojson }}", '{"k": "é<&>", "a": [1]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for i in range(9) if i != 1 %}{{ i }}{% if i == 3 %}{% break %}{% endif %}{% endfor %}", "023"),
        ("{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "02"),
        ("{% for m in messages %}{{ loop.first }}{{ loop.last }}{{ loop.length }}{% endfor %}", "TrueTrue1"),
        ("{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ loop.length }}{% endfor %}", "1"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}", "a1"),
        ("{% for m in [] %}x{% else %}none{% endfor %}", "none"),
        ("{% set a, b = 1, [2, 3] %}{{ a }}{{ b[1:] }}", "1[3]"),
        ("{% set ns = namespace(n=0) %}{% for m in 'abc' %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "3"),
        ("{% macro show(m, x=2) %}<{{ m.content | trim }}{{ x }}>{% endmacro %}{{ show(messages[0]) }}", "<Hello2>"),
        ("{% set kept %}a{{ 1 + 1 }}{% endset %}{{ kept | upper }}", "A2"),
        ("{{ 'a-b'.split('-') | join('+') }}{{ 'x'.startswith('x') }}{{ ' y '.strip() }}", "a+bTruey"),
        ("{{ '%s!%d' % ('z', 3) }}{{ '%s' % 'x' }}", "z!3x"),
        ("{{ '{}-{}'.format(1, 'b') }}{{ 2 ** 5 }}{{ 'ab' * 2 }}{{ (1, 2) }}", "1-b32abab(1, 2)"),
        ("{{ '{\"a\": {\"b\": %s}, 99999999999: **%d**}' % ('x', 3) }}", '{"a": {"b": x}, 99999999999: **3**}'),
        ("{{ '{{\"a\": {{\"{}\": {k:>3}}}}} 99999999999'.format('x', k=3) }}", '{"a": {"x":   3}} 99999999999'),
        ("{{ '%5.1f|%-3s' | format(2.25, 'x') }}{{ 'ab\ncd' | indent(2) }}", "  2.2|x  ab\n  cd"),
        ("{% generation %}mine{% endgeneration %}", "mine"),
        ("{{ missing is defined }}{{ missing }}", "False"),
        ("{{ messages[0]['content'] if messages[0]['content'] is string else 'parts' }}", "Hello"),
    ],
)
def test_what_templates_rely_on(source, expected):
    assert render(source) == expected


def test_further_variables_reach_the_template_and_cannot_replace_the_messages():
    assert render("{{ enable_thinking }}{{ bos_token }}", enable_thinking=False, bos_token="B") == "FalseB"
    assert render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"


def test_a_model_without_bos_has_an_empty_one():
    template = ChatTemplate("[{{ bos_token }}]", Tokenizer.from_metadata(small()))
    assert template.render(HELLO) == "[]"


def test_conversations_with_tools_have_their_own_template_if_the_file_has_one():
    tools = [{"type": "function", "function": {"name": "f"}}]
    metadata = small()
    metadata["tokenizer.chat_template"] = "plain {{ tools }}"
    template = ChatTemplate.from_metadata(metadata, TOKENIZER)
    assert template.render(HELLO, tools=tools) == f"plain {tools}"
    metadata["tokenizer.chat_template.tool_use"] = "tools {{ tools[0].function.name }}"
    template = ChatTemplate.from_metadata(metadata, TOKENIZER)
    assert template.render(HELLO, tools=tools) == "tools f"
    assert template.render(HELLO) == "plain None"


def test_now_is_formatted_as_asked():
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


def test_content_of_parts_is_passed_on():
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert render("{% for part in messages[0].content %}{{ part.text }}{% endfor %}", parts) == "Hi"


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_without_a_template_says_so():
    with pytest.raises(TokenizerError, match=r"the file has no tokenizer.chat_template.*plain text"):
        ChatTemplate.from_metadata(small(), TOKENIZER)
    metadata = small()
    metadata["tokenizer.chat_template"] = 5
    with pytest.raises(TokenizerError, match="the chat template in the file cannot be used"):
        ChatTemplate.from_metadata(metadata, TOKENIZER)


@pytest.mark.parametrize("message", ["Hello", {"content": "no role"}, {"role": 5, "content": ""}, None], ids=str)
def test_messages_must_have_a_role(message):
    with pytest.raises(TokenizerError, match=r"message 1 is .*; expected a mapping with a text as its 'role'"):
        render("", [*HELLO, message])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "cannot render these messages: roles must alternate"),
        ("{{ 1 / 0 }}", "failed on these messages: ZeroDivisionError"),
        ("{{ messages[0].content + 1 }}", "failed on these messages: TypeError"),
        ("{{ a.b.c }}", "cannot render these messages: 'a' is undefined"),
        ("{% include 'x' %}", "failed on these messages"),
        ("{% for m in messages %}", "has an error in line 1: Unexpected end of template"),
        ("a\n{% nonsense %}", "has an error in line 2: Encountered unknown tag"),
        ("{{ 1 | nonsense }}", "has an error in line 1: No filter named"),
    ],
)
def test_what_fails_is_named(source, message):
    with pytest.raises(TokenizerError, match=message):
        render(source)


HOSTILE = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over no list": "{% for a in range(99999) %}{% for b in range(99999) | map('abs') %}{% endfor %}{% endfor %}",
    "macros without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macros in a tree": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "large range": "{% for a in range(10**12) %}{% endfor %}",
    "doubled text": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled by ~": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubled list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "nested list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}",
    "nested mapping": "{% set n = namespace() %}{% for i in range(60) %}{% set n.x = {1: n.x, 2: n.x} %}{% endfor %}",
    "squared number": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 9) }}",
    "repeated text": "{{ 'x' * 10**10 }}",
    "repeated list": "{{ 10**10 * [1] }}",
    "wide text": "{{ 'x'.ljust(10**10) }}",
    "wide filter": "{{ 'x' | center(10**10) }}",
    "wide filter in a constant": "{{ 'x' | indent(10**10) }}{{ 'x' | center(10000000000) }}",
    "wide %": "{{ '%9999999999d' % 1 }}",
    "wide % by number": "{{ '%*d' % (10**10, 1) }}",
    "wide format": "{{ '{:9999999999d}'.format(1) }}",
    "wide json": "{{ messages | tojson(indent=10**10) }}",
    "indented json": "{{ (['x'] * 10**5) | tojson(indent=' ' * 10**6) }}",
    "indented lines": "{{ ('\\n' * 10**6) | indent(10**5) }}",
    "expanded tabs": "{{ ('\\t' * 10**6).expandtabs(10**5) }}",
    "many wide fields": "{{ ('{0:99999}' * 10**6).format(1) }}",
    "many wide %": "{{ ('%(a)99999d' * 10**6) % {'a': 1} }}",
    "long values in %": "{{ ('%(a)s' * 10**6) % {'a': 'x' * 10**6} }}",
    "long values in format": "{{ ('{a}' * 10**6).format(a=['x' * 10**6]) }}",
    "long values in filter": "{{ ('%(a)s' * 10**6) | format(a='x' * 10**6) }}",
    "width from an argument": "{{ ('{0:{1}}' * 10**6).format(1, 10**6) }}",
    "multiplied by replace": "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}",
    "multiplied by join": "{{ (['x'] * 10**6) | join('y' * 10**6) }}",
    "much output": "{% set x = 'x' * 10**7 %}{% for i in range(99) %}{{ x }}{% endfor %}",
    "much output kept": "{% set x = 'x' * 10**7 %}{% set y %}{% for i in range(99) %}{{ x }}{% endfor %}{% endset %}",
    "much literal output": "{% for i in range(99999) %}" + "x" * 10**5 + "{% endfor %}",
    "long template": "x" * (bounds.MAX_SOURCE + 1),
    "deep template": "{{" + "(" * 10**5,
    "deep blocks": "{% if 1 %}" * 5000 + "{% endif %}" * 5000,
    "long sum": "{{ " + "1 + " * 20000 + "1 }}",
    "internals": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "changed input": "{{ messages.append(1) }}",
    "filler": "{{ lipsum(n=10**6) }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_hostile_templates_are_stopped(source, monkeypatch):
    """Each of these would take years, terabytes or the interpreter; that the test ends is what it tests."""
    monkeypatch.setattr(bounds, "MAX_STEPS", bounds.MAX_STEPS >> 4)  # the same, sooner
    with pytest.raises(TokenizerError):
        render(source)


def test_internals_cannot_be_formatted():
    assert render("[{{ '{0.__class__}'.format(1) }}]") == "[]"


def test_what_grew_inside_a_namespace_is_not_written():
    grow = "{% set n = namespace() %}{% set list = [n, n] %}{% set n.x = list %}"
    assert render(grow + "{{ list }}{{ list | length }}") == "[<namespace>, <namespace>]2"


def test_limits_leave_room_for_long_conversations():
    content = "word " * 20_000
    messages = [{"role": role, "content": content} for _ in range(20) for role in ("user", "assistant")]
    source = load_tiny("tiny-qwen2")["metadata"]["tokenizer.chat_template"]
    assert len(render(source, messages)) > 40 * len(content)


def test_one_rendering_does_not_pay_for_another():
    source = "{% for i in range(90000) %}{% for j in 'abcd' %}{% endfor %}{% endfor %}done"
    template = ChatTemplate(source, TOKENIZER)
    assert [template.render(HELLO) for _ in range(3)] == ["done"] * 3


# fmt: off
FRAGMENTS = [
    "{{", "}}", "{%", "%}", " for m in messages ", " endfor ", " if ", " endif ", " set x = ", "messages", "[0]",
    ".content", "|", " tojson ", " join ", "~", "+", "*", "'a'", "9", "(", ")", " macro f() ", " endmacro ", "f",
    "loop", "namespace", " generation ", " endgeneration ", "\n", "text", "{#", "#}", "-",
]
# fmt: on


@given(parts=st.lists(st.sampled_from(FRAGMENTS), max_size=25), content=st.text(max_size=5))
@settings(max_examples=300)
def test_any_template_renders_or_is_a_tokenizer_error(parts, content):
    try:
        text = render("".join(parts), [{"role": "user", "content": content}])
    except TokenizerError:
        return
    assert isinstance(text, str)
