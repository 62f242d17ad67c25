"""What is kept of an evaluation."""

import types

import numpy as np

from dcmdp_jax.evaluation import held_out
from dcmdp_jax.records import Example, Prompts, Scored
from support.rollouts import make_rollout

TOKENIZER = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))


def test_the_text_kept_is_that_which_the_verifier_is_given():
    """The prompt as it was asked, and the completion without its stop token."""
    chat = [{"role": "user", "content": "1 + 2?"}]
    prompts = Prompts(
        np.ones((2, 1), np.int32), np.ones(2, np.int32), (Example("2 + 2?", "4"), Example(chat, ""))
    )
    tokens = [[5, 6, 0], [7, 8, 9]]
    rollout = make_rollout(prompts, tokens, [3, 3], np.zeros((2, 3)), [True, False])
    kept = held_out._shown(Scored(rollout, np.float32([1.0, -0.5])), TOKENIZER)
    assert kept == [
        {"prompt": "2 + 2?", "completion": "5 6", "reward": 1.0},
        {"prompt": "1 + 2?", "completion": "7 8 9", "reward": -0.5},
    ]


def test_the_first_problems_are_kept():
    count = held_out.SHOWN + 3
    examples = tuple(Example(str(i), "") for i in range(count))
    prompts = Prompts(np.ones((count, 1), np.int32), np.ones(count, np.int32), examples)
    rollout = make_rollout(
        prompts, np.ones((count, 1)), [1] * count, np.zeros((count, 1)), [False] * count
    )
    kept = held_out._shown(Scored(rollout, np.zeros(count, np.float32)), TOKENIZER)
    assert [sample["prompt"] for sample in kept] == [str(i) for i in range(held_out.SHOWN)]
