"""`dcmdp doctor --server`: stand-ins of three servers, as they should be and with a mistake."""

import pytest

from dcmdp_jax import cli
from dcmdp_jax.models import weights
from dcmdp_jax.tokens import tokenizer
from dcmdp_jax.tools import server_records
from support.servers import MODEL, TOKENIZER, LlamaCpp, Sglang, StandIn, Vllm, make_params

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "hf"
    weights.save(path, MODEL, make_params())
    tokenizer.save(TOKENIZER, path)
    return str(path)


@pytest.fixture
def run(folder, tmp_path, capsys, monkeypatch):
    """Runs the command on a stand-in and returns its status and output."""
    monkeypatch.setattr(server_records, "PROMPTS", ("one day", "a cat", "the", "dog"))

    def command(kind, *options, **settings):
        with StandIn(kind) as server:
            for name, value in settings.items():
                setattr(server, name, value)
            words = ["doctor", "--server", server.url, "--model", folder, *options]
            status = cli.main([*words, "--output", str(tmp_path / "doctor.html")])
        return status, capsys.readouterr()

    return command


@pytest.mark.parametrize("kind", [Vllm, Sglang, LlamaCpp])
def test_a_server_that_is_exact_is_as_stated(run, kind):
    status, output = run(kind)
    assert status == 0
    assert "of the size of float32 round-off" in output.out


def test_a_server_that_reports_raw_log_probs_is_named(run):
    """It is asked at a temperature that shows this."""
    status, output = run(Vllm, raw=True)
    assert status == 1
    assert output.out.startswith("Verdict: raw log-probs\n")


def test_a_server_is_asked_for_no_more_than_the_limit_and_shows_progress(run):
    status, output = run(LlamaCpp, "--limit", "16")
    assert status == 0
    assert "for 16 completions of" in output.err and "\n16 of 16 completions\n" in output.err
    assert "interpretations (readings) of the log-probs tried\n" in output.err


def test_a_tokenizer_of_few_characters_has_random_prompts(run, monkeypatch):
    monkeypatch.setattr(server_records, "PROMPTS", ("The capital of France is",) * 4)
    status, output = run(Vllm)
    assert status == 0
    assert "cannot encode the built-in prompts: they are random token ids" in output.err


def test_a_server_with_other_weights_is_named(run):
    status, output = run(Sglang, params=make_params(1))
    assert status == 1
    assert output.out.startswith("Verdict: other weights\n")


def test_a_vllm_that_takes_no_weights_is_asked(run):
    class Ordinary(Vllm):
        """One that was started without VLLM_SERVER_DEV_MODE."""

        def control(server, method, path, body):
            known = path in ("/version", "/v1/models")
            return Vllm.control(server, method, path, body) if known else (404, {})

    assert run(Ordinary)[0] == 0


def test_an_sglang_that_names_no_weights_is_asked(run):
    class Old(Sglang):
        def complete(server, body):
            reply = Sglang.complete(server, body)
            del reply["meta_info"]["weight_version"]
            return reply

        def control(server, method, path, body):
            status, reply = Sglang.control(server, method, path, body)
            return status, {key: reply[key] for key in reply if key != "weight_version"}

    assert run(Old)[0] == 0


def test_a_server_that_is_not_there_is_refused(folder, capsys):
    assert cli.main(["doctor", "--server", "http://127.0.0.1:9", "--model", folder]) == 2
    assert "cannot be reached" in capsys.readouterr().err
