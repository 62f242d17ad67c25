"""Completions of prompt texts from a model folder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax

from dcmdp_jax import data, sharding, sync, tokenizer
from dcmdp_jax.models import weights
from dcmdp_jax.records import Example
from dcmdp_jax.rollout.generate import rollout
from dcmdp_jax.rollout.jetstream import Engine


def texts(folder: str, prompts: Sequence[str], *, tokenizer_path: str = "", weights_dtype: str = "float32",
          max_tokens: int = 64, samples: int = 1, temperature: float = 1.0, seed: int = 0,
          chat: bool = False) -> Iterator[tuple[str, str, bool]]:
    """(prompt, completion, ended by a stop token) for `samples` completions of each prompt; temperature 0 is greedy."""
    vocabulary = tokenizer.load(tokenizer_path or folder)
    tokenizer.check_vocabulary(vocabulary, weights.read_config(folder).vocab_size)
    texts = [vocabulary.chat([{"role": "user", "content": prompt}], enable_thinking=False) if chat else prompt
             for prompt in prompts]
    asked = data.tokenize([Example(text, "") for text in texts], vocabulary,
                          max_prompt_tokens=max(len(vocabulary.encode(text)) for text in texts))
    mesh = sharding.single_device_mesh()
    model, params = weights.load(folder)
    engine = Engine(model, slots=min(len(prompts) * samples, 32), max_length=asked.tokens.shape[1] + max_tokens,
                    stop_ids=vocabulary.eos_ids, mesh=mesh)
    out = rollout(engine, sync.make(model, weights_dtype, mesh)(params), asked, samples=samples, key=jax.random.key(seed),
                  max_tokens=max_tokens, temperature=temperature)
    for i, (length, stopped) in enumerate(zip(out.lengths, out.stopped)):
        yield prompts[i // samples], vocabulary.decode(out.tokens[i, :length - stopped]), bool(stopped)
