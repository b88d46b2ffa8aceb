"""Templates are code from strangers: they reach nothing, and use bounded time and memory."""

from __future__ import annotations

import random
import resource
import time

import pytest

from gemma3_export.errors import InputError
from gemma3_export.tokenizer import ChatTemplate, TokenizerSettings
from tests.support.chat_templates import ADDED_TOKENS
from tests.support.tiny_tokenizers import tiny_gemma_tokenizer

TALK = [{"role": "user", "content": "hi"}]
DOUBLING = "{% set ns = namespace(s='12345678') %}{% for i in range(60) %}{% set ns.s = VALUE %}"
LONG = "'x' * 16000000"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ().__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ ''.format.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ dict.__class__ }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% set ns = namespace(_a=1) %}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ joiner.__mro__ }}",
        "{% include 'tokenizer.json' %}",
        "{% import 'os' as os %}{{ os.sep }}",
        "{{ lipsum() }}",
        "{{ messages | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list }}",
    ],
)
def test_a_template_reaches_nothing_beyond_its_inputs(template: str) -> None:
    try:
        text = ChatTemplate(template).render(TALK)
    except InputError:
        return
    assert text in ("", "[]", "[Undefined]"), text


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) | list %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
        "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        DOUBLING.replace("VALUE", "ns.s ~ ns.s") + "{% endfor %}",
        DOUBLING.replace("VALUE", "ns.s + ns.s") + "{% endfor %}",
        DOUBLING.replace("VALUE", "ns.s * 2") + "{% endfor %}",
        DOUBLING.replace("VALUE", "[ns.s, ns.s]") + "{% endfor %}{{ ns.s }}",
        DOUBLING.replace("VALUE", "[ns.s, ns.s]") + "{% endfor %}{{ ns.s | tojson }}",
        DOUBLING.replace("VALUE", "[ns.s, ns.s]") + "{% endfor %}{{ ns.s | upper }}",
        DOUBLING.replace("VALUE", "[ns.s, ns.s]") + "{% endfor %}{{ ns.s ~ 'x' }}",
        DOUBLING.replace("VALUE", "[ns.s, ns.s]") + "{% endfor %}{{ '%s' % ns.s }}",
        DOUBLING.replace("VALUE", "ns.s.replace('1', '11111111')") + "{% endfor %}",
        DOUBLING.replace("VALUE", "ns.s | replace('1', '11111111')") + "{% endfor %}",
        DOUBLING.replace("VALUE", "ns.s.join(ns.s)") + "{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x'.ljust(1000000000) }}",
        "{{ 'x'.zfill(1000000000) }}",
        "{{ '\\t'.expandtabs(1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=1000000000) }}",
        "{{ 'a\\n' | indent(1000000000) }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ [1] | batch(1000000000, 0) | list }}",
        "{{ [1] | slice(1000000000) | list }}",
        "{{ ([" + LONG + "] * 100000) | join }}",
        "{{ 'b'.join([" + LONG + "] * 100000) }}",
        "{% for i in range(99999) %}{{ " + LONG + " }}{% endfor %}",
        "{% set t %}{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}{% endset %}",
        "{{ [1, 2] | map('center', 1000000000) | list }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "x" * 1_000_000,
    ],
)
def test_a_template_is_stopped_before_it_takes_much_time_or_memory(template: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    used = time.process_time()
    with pytest.raises(InputError, match="chat template"):
        ChatTemplate(template).render(TALK)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1_500_000, f"{grown} KiB"
    assert time.process_time() - used < 60


def test_a_long_conversation_is_not_stopped() -> None:
    many = [{"role": "user", "content": "word " * 50}] * 10_000
    template = "{% for m in messages %}{{ m.role + m.content | trim ~ loop.index }}{% endfor %}"
    text = ChatTemplate(template).render(many)
    assert len(text) == sum(4 + 249 + len(str(index)) for index in range(1, 10_001))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ 'Call 0123456789 %s' % 'now' }}", "Call 0123456789 now"),
        ("{{ '{} costs 12345'.format('it') }}", "it costs 12345"),
        ("{{ [1, 'a', {'b': [none]}] }}", "[1, 'a', {'b': [None]}]"),
        ("{{ 'ab' * 3 }}{{ 2 ** 10 }}{{ 7 % 4 }}", "ababab10243"),
        ("{{ dict(a=1).a }}{{ [3, 4] | join('-') }}", "13-4"),
        ("{{ 'a b' | replace(' ', '_') | upper | center(7) }}", "  A_B  "),
        ("{% for x in [1, 2] %}{{ loop.last }}{{ loop.length }}{% else %}n{% endfor %}",
         "False2True2"),
        ("{% for x in {} %}{% else %}none{% endfor %}{{ '<' | tojson }}", 'none"<"'),
        ("{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}", "a2b1"),
    ],
)  # fmt: skip
def test_the_limits_do_not_change_what_ordinary_templates_render(template: str, text: str) -> None:
    assert ChatTemplate(template).render(TALK) == text


def test_damaged_templates_render_or_are_rejected_in_one_line() -> None:
    rng = random.Random(11)
    pieces = (
        *("{%", "%}", "{{", "}}", "{#", "|", "(", ")", "[", "]", "'", "-", "+", "~", "*", "%"),
        *("for", "endfor", "set", "if", "macro", "generation", "endgeneration", "recursive"),
        *("messages", "role", "namespace", "join", "tojson", "is", "not", "range", "99999"),
        *(".__class__", ".format", "| attr('x')", "raise_exception", "{% break %}", "\n", "**"),
    )
    plain = tiny_gemma_tokenizer(300)
    sources = [template for template, _ in ADDED_TOKENS.values()]
    outcomes = set()
    for _ in range(250):
        source = rng.choice(sources)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(source) + 1)
            source = source[:at] + rng.choice(pieces) + source[at + rng.choice([0, 1, 3, 20]) :]
        tokenizer = plain.with_settings(TokenizerSettings(templates={"default": source}))
        assert set(tokenizer.chat.end_token_ids) <= {0, *tokenizer.control_token_ids}
        for messages in (TALK, [{"role": "user", "content": "<eos>"}, *TALK]):
            try:
                tokenizer.encode_chat(messages)
                outcomes.add("rendered")
            except InputError as error:
                outcomes.add(f"rejected in {len(str(error).splitlines())} line")
    assert outcomes == {"rendered", "rejected in 1 line"}
