"""Files of recorded completions: each layout, and what is refused with its line and field."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from dcmdp_jax.tools import rollout_records
from dcmdp_jax.tools.rollout_records import Record

OWN = {"prompt_ids": [1, 2], "token_ids": [3, 4], "logprobs": [-0.5, -1.5]}


def read(tmp_path, *rows, name="rollouts.jsonl", limit=100):
    path = tmp_path / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return rollout_records.read(path, limit, vocab_size=10, max_position=8)


def test_own_layout(tmp_path):
    found = read(tmp_path, OWN | {"trainer_logprobs": [-0.4, -1.4], "temperature": 0.7, "top_p": 1})
    assert found.records == [Record([1, 2], [3, 4], [-0.5, -1.5], [-0.4, -1.4])]
    assert found.sampling == {"temperature": 0.7, "top_p": 1.0}
    assert not found.more


def test_a_top_k_of_minus_1_is_all_tokens(tmp_path):
    assert read(tmp_path, OWN | {"top_k": -1}).sampling == {"top_k": 0.0}


def test_own_layout_as_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rollouts.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([OWN, OWN]), path)
    found = rollout_records.read(path, 10, 10, 8)
    assert found.records == [Record([1, 2], [3, 4], [-0.5, -1.5], None)] * 2


def test_a_token_export_of_prime_rl(tmp_path):
    """Token i has entry i of every list; the engine did not sample token 3."""
    row = {
        "schema_version": 1,
        "token_ids": [1, 2, 3, 4, 5],
        "position_ids": [0, 1, 2, 3, 4],
        "loss_mask": [False, False, True, False, True],
        "inference_logprobs": [0.0, 0.0, -0.5, 0.0, -1.5],
        "trainer_logprobs": [-3.0, -2.0, -0.4, -9.0, -1.4],
    }
    (record,) = read(tmp_path, row).records
    assert record.prompt == [1, 2]
    assert record.tokens == [3, 4, 5]
    assert record.logp[::2] == [-0.5, -1.5]
    assert math.isnan(record.logp[1])
    assert record.trainer_logp == [-0.4, -9.0, -1.4]


def test_samples_of_slime(tmp_path):
    row = {
        "tokens": [1, 2, 3, 4],
        "response_length": 2,
        "rollout_log_probs": [-0.5, -1.5],
        "loss_mask": [1, 0],
    }
    (record,) = read(tmp_path, row).records
    assert record.prompt == [1, 2]
    assert record.tokens == [3, 4]
    assert record.logp[0] == -0.5
    assert math.isnan(record.logp[1])


def test_the_command_that_converts_samples_of_slime_keeps_all_that_is_read(tmp_path):
    """That of the docs, with a stand-in for torch that returns two turns around a tool's answer."""
    sample = {
        "prompt": "a text",
        "tokens": [1, 2, 3, 4, 5],
        "response_length": 3,
        "rollout_log_probs": [-0.5, 0.0, -1.5],
        "loss_mask": [1, 0, 1],
    }
    (tmp_path / "torch.py").write_text(
        f"def load(path, weights_only):\n    return {{'samples': [{sample}]}}\n"
    )
    page = (pathlib.Path(__file__).parents[1] / "docs" / "doctor.md").read_text()
    (command,) = re.findall(r"^    (python -c .*? > rollouts\.jsonl)$", page, re.M | re.S)
    command = command.replace("\n    ", "\n").replace("python", sys.executable, 1)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path, env=environment)
    path = tmp_path / "rollouts.jsonl"
    (record,) = rollout_records.read(path, 10, vocab_size=10, max_position=8).records
    assert record.tokens == [3, 4, 5]
    np.testing.assert_array_equal(record.logp, [-0.5, math.nan, -1.5])
    fields = re.search(r"for k in (\(.*?\))", command)[1]
    assert fields in rollout_records.CONVERT


def test_null_is_a_token_without_a_log_prob(tmp_path):
    (record,) = read(tmp_path, OWN | {"logprobs": [-0.5, None]}).records
    assert math.isnan(record.logp[1])


def test_no_more_than_the_limit_is_read(tmp_path):
    found = read(tmp_path, OWN, OWN, OWN | {"token_ids": [99, 99]}, limit=2)
    assert len(found.records) == 2
    assert found.more


def test_a_file_of_positive_numbers_is_read(tmp_path):
    """They may be probabilities, or lack their sign: that is a verdict, not an error."""
    assert read(tmp_path, OWN | {"logprobs": [0.5, 1.5]}).records[0].logp == [0.5, 1.5]


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [OWN, "{"],
            r"rollouts.jsonl line 2 is not valid JSON: .*; write a JSON object on each line",
        ),
        ([[1]], r" line 1 is a list, not an object; record {prompt_ids, token_ids, logprobs}"),
        ([{"step": 1}], r" line 1 has the fields step; record"),
        ([{"input": "1+1=", "output": "2", "score": 1.0}], "texts without token ids .* of verl"),
        ([{"prompt": "1+1=", "completion": "2", "step": 1}], "texts without token ids .* TRL"),
        ([OWN, OWN | {"logprobs": [-0.5]}], r" line 2 has 1 logprobs for 2 token_ids; write one"),
        ([OWN | {"logprobs": [-0.5, "x"]}], r" line 1: logprobs\[1\] is a string, not a number"),
        ([OWN | {"logprobs": "x"}], r" line 1: logprobs is a string, not a list"),
        ([{"prompt_ids": [1], "token_ids": [1]}], r" line 1: logprobs is missing"),
        ([json.dumps(OWN).replace("-1.5", "NaN")], r" line 1: logprobs\[1\] is nan; write null"),
        (
            [OWN, OWN | {"logprobs": [-0.5, 0.5]}],
            r" line 2 has a log-prob of 0.5, above 0.* logits \(vLLM: set --logprobs-mode",
        ),
        ([OWN | {"token_ids": [3, 10]}], r" line 1 has token id 10, outside .* of 10; name"),
        ([OWN | {"prompt_ids": [-1]}], r" line 1 has token id -1, outside"),
        ([OWN | {"prompt_ids": ["a"]}], r" line 1: prompt_ids\[0\] is 'a', not a token id"),
        ([OWN | {"prompt_ids": []}], r" line 1 has no prompt"),
        ([OWN | {"prompt_ids": [1] * 7}], r" line 1 has 9 tokens, more than the model.s 8"),
        ([OWN | {"temperature": "x"}], r" line 1: temperature is 'x', not a finite number"),
        (
            [OWN | {"temperature": 1.0}, OWN | {"temperature": 0.7}],
            r" line 2 was sampled with .*0.7.*, and .* line 1 with .*1.0.*; give a file for each",
        ),
        ([], "holds no completion; record"),
        ([OWN | {"token_ids": [], "logprobs": []}], "holds no completion"),
        (
            [{"tokens": [1, 2], "response_length": 3, "rollout_log_probs": []}],
            r" line 1 has response_length 3 for 2 tokens",
        ),
        (
            [{"tokens": [1, 2], "response_length": 1, "rollout_log_probs": []}],
            r" line 1 has 0 rollout_log_probs for 1 response tokens",
        ),
    ],
)
def test_what_is_no_such_record_is_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, *rows)


@pytest.mark.parametrize("name", ["0.pt", "rollouts.pkl"])
def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path, name):
    with pytest.raises(ValueError, match="it is a pickle.*json.dumps"):
        read(tmp_path, OWN, name=name)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist; name another"):
        rollout_records.read(tmp_path / "none.jsonl", 1, 10, 8)
    with pytest.raises(ValueError, match="is a folder"):
        rollout_records.read(tmp_path, 1, 10, 8)
