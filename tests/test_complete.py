"""`dcmdp generate`."""

import dataclasses

import pytest

from dcmdp_jax import cli, tokenizer
from dcmdp_jax.models import weights
from support.serving import MODEL, TOKENIZER, make_params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    weights.save(folder, dataclasses.replace(MODEL, max_position=512), make_params())
    tokenizer.save(TOKENIZER, folder)
    return folder


@pytest.mark.parametrize("prompt", ["\udcff", "a\ud800b"])
def test_a_prompt_that_is_not_unicode_is_refused_by_number(folder, capsys, prompt):
    assert cli.main(["generate", str(folder), "abc", prompt]) == 2
    assert "dcmdp: prompt 2 of 2 is not valid Unicode text" in capsys.readouterr().err
