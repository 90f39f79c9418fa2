"""Templates from checkpoints nobody vouches for: what is not linear by its syntax tree runs where it can be stopped."""

# ruff: noqa: E501 (templates read better whole)
import resource
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batch.template import LocalRenderer, TemplateFailure, TemplateRefusal, make_environment, make_renderer
from batch.template_bounds import is_bounded
from batch.template_process import MEMORY_BYTES, ChildRenderer
from l4tool.core.prompt import CHAT_TEMPLATE, TURNS

NOW = datetime(2026, 1, 2)
VARIABLES = {
    "messages": [{"role": "user", "content": "ab" * 500}, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}],
    "tools": None, "documents": None, "add_generation_prompt": True, "bos_token": "<|begin_of_text|>",
}  # fmt: skip
LOOP = "{% for a in range(99999) %}"
BOMBS = [
    # strings
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x|length }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x]|join %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x='\"') %}{% for i in range(99) %}{% set ns.x = ns.x|tojson %}{% endfor %}{{ ns.x|length }}",
    "{{ messages|tojson(indent=999999999) }}", "{{ 'a\nb'|indent(999999999) }}", 
    "{{ [1]|batch(999999999, 'x')|list|length }}", "{{ [1]|slice(999999999)|list|length }}",
    "{{ (1).to_bytes(9999999999, 'big') }}", "{{ ''.join(range(99999)|map('string')|list * 9999) }}",
    # numbers, lists
    "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{{ range(99999)|map('string')|map('list')|sum(start=[]) }}",
    # loops without output or calls, recursion
    "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}",
    "{% set r = 'x' * 9999 %}{% for a in r %}{% for b in r %}{% for c in r %}{% if c in r %}{% endif %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "{% for a in [[1]] recursive %}{{ loop([a, a]) }}{% endfor %}",
    "{{ range(99999)|map('upper')|list|sort|join('x' * 9999)|length }}" + LOOP + "{{ 'x' * 9999 }}{% endfor %}",
    LOOP + "{{ 'x' * 9999 }}{% endfor %}",
]  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_cost_one_line(bomb, monkeypatch):
    monkeypatch.setattr("batch.template_process.START_TIMEOUT_S", 1.0)  # compiling computes constants
    try:
        renderer = make_renderer(bomb, NOW)
    except TemplateFailure:
        return
    assert isinstance(renderer, ChildRenderer), "called linear"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started_s = time.monotonic()
    try:
        with pytest.raises(TemplateFailure):
            renderer.render(VARIABLES, 1 << 20, 0.3)
    finally:
        renderer.close()
    assert time.monotonic() - started_s < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_published_and_default_templates_are_linear(llama4_template):
    environment = make_environment(NOW)
    assert (
        is_bounded(environment, llama4_template)
        and is_bounded(environment, CHAT_TEMPLATE)
        and is_bounded(environment, TURNS)
    )


@pytest.mark.parametrize(
    "template",
    [
        *BOMBS,
        "{% for a in messages %}{% for b in messages %}{% endfor %}{% endfor %}",
        "{% for a in messages %}{% set a = messages %}{% for b in a %}{% endfor %}{% endfor %}",
        "{% for a in messages %}{% if 'x' in messages[0].content %}{% endif %}{% endfor %}",
        "{% for a in messages %}{{ messages|tojson }}{% endfor %}",
        "{% for a in messages %}{% for b in a.content %}{{ a.content }}{% endfor %}{% endfor %}",
        "{% set x = messages|tojson %}", "{{ messages|tojson|tojson }}", "{{ {'a': messages|tojson}|tojson }}",
        "{% set x = (messages, messages) %}", "{% set x = [messages, messages] %}", "{% set x = bos_token ~ bos_token %}",
        "{% set x = bos_token + bos_token %}", "{% set x %}{{ bos_token }}{% endset %}", "{{ messages|tojson(indent=99) }}",
        "{{ messages|tojson(indent=add_generation_prompt) }}", "{{ bos_token.upper() }}", "{{ bos_token * 3 }}", "{{ 'a' % 3 }}",
        "{% for a in range(3) %}{% endfor %}", "{% for a in messages[range(3):] %}{% endfor %}", "{% for a, b in x %}{% endfor %}",
        "{% include 'x' %}", "{% import 'x' as y %}", "{% macro f() %}{% endmacro %}", "{% filter upper %}x{% endfilter %}",
        "{% with a = 1 %}{% endwith %}", "{{ x|map('upper') }}", "{{ x is divisibleby 3 }}", "{% set ns.x = 1 %}",
        "{% for a in messages %}{% else %}x{% endfor %}", "{% for m in messages recursive %}{% endfor %}", "{{ loop.cycle('a') }}",
        "{{ raise_exception(messages|tojson) }}", "{% for m in messages if messages %}{% endfor %}", "{{ cycler }}{{ joiner() }}",
        "{% if", "{% autoescape true %}{{ x }}{% endautoescape %}", "{% call f() %}{% endcall %}", "{{ x[f()] }}",
    ],
)  # fmt: skip
def test_what_is_not_linear_is_not_called_so(template):
    assert not is_bounded(make_environment(NOW), template)


LINEAR = st.recursive(
    st.sampled_from(["{{ item }}", "{{ item.content|trim }}", "{{ item|tojson }}", "x", "{% set y = item %}", "{{ item + item }}",
                     "{% if item.role == 'user' %}u{% endif %}", "{{ loop.index }}"]),
    lambda inner: st.lists(inner, max_size=3).map("".join)
    | inner.map(lambda body: "{% for item in item.content %}" + body + "{% endfor %}")
    | inner.map(lambda body: "{% for item in messages %}" + body + "{% endfor %}"),
    max_leaves=8,
)  # fmt: skip


def deep(depth, width):
    return {"content": [deep(depth - 1, width) for _ in range(width)] if depth else "leaf", "role": "user"}


@settings(max_examples=150, deadline=None)
@given(template=LINEAR)
def test_output_of_a_linear_template_grows_with_its_input_alone(template):
    """Four times the data: about four times the text, never sixteen."""
    environment = make_environment(NOW)
    if not is_bounded(environment, template):
        return
    sizes = []
    for count in (50, 200):
        messages = [deep(2, 3) for _ in range(count)]
        variables = {**VARIABLES, "messages": messages, "item": {"content": messages}}
        try:
            sizes.append(len(LocalRenderer(template, NOW).render(variables, 10**9, 60)))
        except TemplateFailure:
            return
    assert sizes[1] <= 5 * sizes[0] + 1000


@pytest.fixture
def child():
    renderer = ChildRenderer("{{ messages[0].content }}{% if tools %}{{ raise_exception('no tools') }}{% endif %}", NOW)
    yield renderer
    renderer.close()


def test_the_child_says_what_the_sandbox_here_says(llama4_template):
    both = LocalRenderer(llama4_template, NOW), ChildRenderer(llama4_template, NOW)
    messages = [
        {"role": "system", "content": "é\ufdd0😀"},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "t"}]},
    ]
    texts = [renderer.render({**VARIABLES, "messages": messages}, 10**6, 5) for renderer in both]
    assert texts[0] == texts[1] and "😀" in texts[0]
    both[1].close()


def test_refusals_and_long_texts_pass_through(child):
    with pytest.raises(TemplateRefusal, match="no tools"):
        child.render({**VARIABLES, "tools": [1]}, 1000, 5)
    text = "😀\n" * 2_000_000
    assert child.render({**VARIABLES, "messages": [{"content": text}]}, 10**7, 30) == text
    with pytest.raises(TemplateFailure, match="too much"):
        child.render({**VARIABLES, "messages": [{"content": text}]}, 1000, 30)


def test_after_a_bomb_the_next_line_is_rendered():
    source = "{% for a in messages[0].content %}{% set r = range(99999) %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}ok"
    renderer = make_renderer(source, NOW)
    assert isinstance(renderer, ChildRenderer)
    for content in ("", "x", "", "x", ""):
        variables = {**VARIABLES, "messages": [{"content": content}]}
        if content:
            with pytest.raises(TemplateFailure, match="time or memory"):
                renderer.render(variables, 1000, 0.3)
        else:
            assert renderer.render(variables, 1000, 5) == "ok"
    renderer.close()


def test_a_killed_child_is_replaced(child):
    assert child.render(VARIABLES, 10**6, 5)
    child._child.send_signal(signal.SIGKILL)
    child._child.wait()
    with pytest.raises(TemplateFailure):
        child.render(VARIABLES, 10**6, 5)
    assert child.render(VARIABLES, 10**6, 5)


def test_the_child_has_little_memory_and_ends_with_its_parent():
    code = (
        "import os, sys, time; from datetime import datetime; from batch.template_process import ChildRenderer\n"
        "r = ChildRenderer('{{ x }}', datetime.now()); r.render({'x': 1}, 100, 5); print(r._child.pid, flush=True); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    end_s = time.monotonic() + 5
    while time.monotonic() < end_s:
        try:
            state = open(f"/proc/{pid}/stat").read().split()[2]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child lives on")


def test_the_limit_is_set(child):
    child.render(VARIABLES, 10**6, 5)
    text = open(f"/proc/{child._child.pid}/limits").read()
    assert next(line for line in text.splitlines() if "address space" in line).split()[3] == str(MEMORY_BYTES)


def test_threads_share_one_child(child):
    found = []

    def render(number):
        for _ in range(50):
            found.append((number, child.render({**VARIABLES, "messages": [{"content": str(number)}]}, 1000, 5)))

    threads = [threading.Thread(target=render, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 200 and all(text == str(number) for number, text in found)
