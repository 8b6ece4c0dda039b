"""Chat templates: what Hugging Face's give, and that hostile ones end in an error."""

from __future__ import annotations

from typing import Any

import pytest

from numoe.engine.errors import InputError, ModelFileError
from numoe.engine.text import ChatTemplate, Tokenizer
from tests.engine.text.support import read_metadata, smollm2, synthetic, synthetic_sentencepiece

USER = [{"role": "user", "content": "Hi <b> & 'you'"}]


def render(source: str, messages: Any = USER, **variables: Any) -> str:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>").render(messages, **variables)


def test_smollm2_template() -> None:
    metadata = read_metadata(smollm2())
    template = ChatTemplate.from_metadata(metadata)
    assert template is not None
    prompt = template.render([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = Tokenizer.from_metadata(metadata).encode_chat(prompt)
    assert ids[:2] == [1, 9690]
    assert ids.count(2) == 2


def test_a_file_without_a_template() -> None:
    assert ChatTemplate.from_metadata(synthetic("qwen2")) is None


def test_blocks_are_trimmed_and_tokens_are_known() -> None:
    source = "{{ bos_token }}\n{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}"
    assert render(source) == "<s>\nHi <b> & 'you'\n"


def test_generation_prompt_and_own_variables() -> None:
    source = "{{ add_generation_prompt }} {{ enable_thinking }} {{ tools is none }}"
    assert render(source, add_generation_prompt=False, enable_thinking=True) == "False True True"


def test_tojson_does_not_escape() -> None:
    assert render("{{ messages|tojson }}") == '[{"role": "user", "content": "Hi <b> & \'you\'"}]'
    assert render("{{ {'b': 'é', 'a': [1]}|tojson(indent=1) }}") == '{\n "b": "é",\n "a": [\n  1\n ]\n}'


def test_loop_controls_namespaces_macros_and_generation_blocks() -> None:
    source = (
        "{% set ns = namespace(n=0) %}{% macro m(x) %}[{{ x }}]{% endmacro %}"
        "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i > 3 %}{% break %}{% endif %}"
        "{% set ns.n = ns.n + i %}{{ m(i ~ '/' ~ loop.index) }}{% endfor %}"
        "{% generation %}={{ ns.n }}{% endgeneration %}{{ ['a', 'b']|join('-') }}{{ 'aXa'.replace('X', '+') }}"
        "{{ ','.join(['x', 'y']) }}{{ '%s!' % 'p' }}{{ '{}?'.format('q') }}{{ ' s '|trim }}{{ messages[::-1]|length }}"
    )
    assert render(source) == "[0/1][2/3][3/4]=5a-ba+ax,yp!q?s1"


def test_loops_see_their_length() -> None:
    assert render("{% for i in 'abc' %}{{ i }}{{ loop.length }}{{ loop.last }}{% endfor %}") == ("a3Falseb3Falsec3True")


def test_strftime_now() -> None:
    assert len(render("{{ strftime_now('%Y-%m-%d') }}")) == len("2024-01-01")


def test_tools_choose_the_tool_variant() -> None:
    metadata = synthetic("qwen2") | {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "tools"}
    template = ChatTemplate.from_metadata(metadata)
    assert template is not None
    assert template.render(USER) == "plain"
    assert template.render(USER, tools=[{"name": "f"}]) == "tools"


def test_bos_is_added_once() -> None:
    metadata = synthetic_sentencepiece(0)
    tokenizer = Tokenizer.from_metadata(metadata)
    assert tokenizer.encode_chat("<s>a")[:2].count(1) == 1
    assert tokenizer.encode_chat("a")[0] == 1
    assert tokenizer.encode_chat("<s>a") == tokenizer.encode("a")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_errors_of_a_template_are_the_callers(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
        "{% set x %}{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endset %}",
        "{{ 'x' * 9999999999 }}",
        "{{ 9999999999 * 'x' }}",
        "{{ [0] * 9999999999 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='x') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('x', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x|replace('x', ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x.join(ns.x) %}{% endfor %}",
        "{% set ns = namespace(x='xx') %}{% for i in range(99) %}{% set ns.x = ns.x|join(ns.x) %}{% endfor %}",
        "{{ 'x'.ljust(9999999999) }}",
        "{{ 'x'|center(9999999999) }}",
        "{{ ['x']|map('center', 9999999999)|list }}",
        "{{ [[1]]|tojson(indent=9999999999) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (9999999999, 1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 9999999999) }}",
        "{{ '%9999999999d'|format(1) }}",
        "{{ lipsum(n=99999) }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    ],
)
def test_hostile_templates_end_in_an_error(source: str) -> None:
    with pytest.raises(InputError):
        render(source)


@pytest.mark.parametrize("source", ["{% for %}", "{{", "{% endif %}", "{% include 'x' %}{% nonsense %}"])
def test_a_template_that_cannot_be_parsed(source: str) -> None:
    with pytest.raises(ModelFileError, match="line 1"):
        ChatTemplate(source)
