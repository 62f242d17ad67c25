"""Chat templates that hang, swell or fail: one sentence, and the next conversation is rendered."""

import os
import signal

import pytest

from dcmdp_jax.tokens.chat_template import ChatTemplate

pytest.importorskip("jinja2")
USER = {"role": "user", "content": "What is 2+2?"}


@pytest.mark.parametrize(
    "template, message",
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 1 s",
        ),
        (
            "{% set m = 'x' * 9999 %}{% for a in m %}{% for b in m %}{% for c in m %}"
            "{% endfor %}{% endfor %}{% endfor %}",
            "takes more than 1 s",
        ),
        ("{{ 'a' * 10 ** 10 }}", "takes more than 512 MiB"),
        ("{{ ['a'] * 10 ** 9 }}", "takes more than 512 MiB"),
        ("{{ '%9999999999d' % 1 }}", "takes more than 512 MiB"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(60) %}"
            "{% set n.x = n.x * 1000 %}{% endfor %}{{ n.x }}",
            "takes more than 512 MiB",
        ),
        ("{{ 'a' * 40000000 }}", "writes more than 4 Mi characters"),
        (
            "{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}",
            "writes more than 4 Mi characters",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails with RecursionError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "fails with RecursionError"),
        ("{{ 1 / 0 }}", "fails with ZeroDivisionError"),
        ("{% if %}", "is not valid jinja2"),
        ("{{ raise_exception('roles alternate') }}", "refuses the conversation: roles alternate"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "fails with SecurityError"),
        ("{{ messages.append(1) }}", "fails with SecurityError"),
        ("{{ ''.__class__.__base__ }}", "fails with SecurityError"),
        ("{{ messages[0].nothing.at_all }}", "fails with UndefinedError"),
        ("{{ raise_exception('\\x1b[2J\\nno') }}", r"refuses the conversation:  \[2J no$"),
    ],
)
def test_templates_that_hang_swell_or_fail_are_one_sentence(template, message):
    with pytest.raises(ValueError, match=f"^the chat template of some/folder {message}") as caught:
        ChatTemplate(template, "some/folder").render([USER])
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


def test_a_template_that_hung_once_renders_again():
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    template = ChatTemplate(
        "{% if messages[0].content == 'hang' %}" + loop + "{% endif %}ok", "folder"
    )
    with pytest.raises(ValueError, match="takes more than 1 s"):
        template.render([{"role": "user", "content": "hang"}])
    assert template.render([USER]) == "ok"


def test_a_template_that_hangs_is_ended_though_its_parent_ignores_the_signal():
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    try:
        with pytest.raises(ValueError, match="takes more than 1 s"):
            ChatTemplate(loop, "folder").render([USER])
    finally:
        signal.signal(signal.SIGPROF, before)


def test_what_an_assistant_said_may_stand_in_a_generation_block():
    said = "{% generation %}{{ m.content }}{% endgeneration %}"
    template = "{% for m in messages %}" + said + "{% endfor %}"
    assert ChatTemplate(template, "folder").render([USER, USER]) == 2 * USER["content"]


def test_the_process_ends_with_its_template():
    template = ChatTemplate("{{ messages[0].content }}", "folder")
    assert template.render([USER]) == USER["content"]
    process = template._worker._process
    assert process.poll() is None
    del template
    assert process.poll() is not None


def test_a_process_that_is_killed_while_it_is_idle_is_started_again():
    template = ChatTemplate("{{ messages[0].content }}", "folder")
    assert template.render([USER]) == USER["content"]
    os.kill(template._worker._process.pid, signal.SIGKILL)
    template._worker._process.wait()
    assert template.render([USER]) == USER["content"]


def test_an_interrupted_conversation_is_not_the_text_of_the_next(monkeypatch):
    template = ChatTemplate("{{ messages[0].content }}", "folder")
    with monkeypatch.context() as patched:
        patched.setattr(template._worker, "_line", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            template.render([USER])
    assert template.render([USER | {"content": "another"}]) == "another"
