"""Llama, Qwen2 and Mistral: each module against transformers, round trips, the engine, meshes, and
what their config.json may say.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from dcmdp_jax import sharding
from dcmdp_jax.config import MeshConfig
from dcmdp_jax.models import decoder, sizes, weights
from dcmdp_jax.models.model_config import Llama3, ModelConfig
from dcmdp_jax.tools import plan, slices
from support import engines
from support.steps import make_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support import reference_hf  # noqa: E402
from support.modules import LOGITS, TOLERANCE, assert_modules_match  # noqa: E402

QUICK = ("llama", "qwen2")
CASES = [
    case if case in QUICK else pytest.param(case, marks=pytest.mark.full)
    for case in reference_hf.RELATIVES
]
# the model of the engine's tests with the two families' switches, and a vocabulary that divides
LLAMA = dataclasses.replace(
    engines.DENSE,
    vocab_size=40,
    qk_norm=False,
    tie_word_embeddings=True,
    rope_scaling=Llama3(8.0, 16),
)
QWEN2 = dataclasses.replace(engines.DENSE, vocab_size=40, qk_norm=False, qkv_bias=True)
FAMILIES = pytest.mark.parametrize("model", [LLAMA, QWEN2], ids=["llama", "qwen2"])


@functools.cache
def reference(case):
    return reference_hf.make(case)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """case -> (config, params), through the folder that transformers writes."""

    @functools.cache
    def load(case):
        folder = tmp_path_factory.mktemp(case)
        reference(case).save_pretrained(folder)
        return weights.load(folder)

    return load


@pytest.mark.parametrize("case", CASES)
def test_every_module_matches_transformers(case, loaded):
    config, params = loaded(case)
    assert_modules_match(params, config, reference(case), reference_hf.tokens(case, 2, 40))


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_what_is_saved(case, loaded, tmp_path):
    weights.save(tmp_path / "back", *loaded(case))
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager", dtype=torch.float32
    ).eval()
    assert type(back) is not transformers.MistralForCausalLM  # written as the equal Llama
    tokens = reference_hf.tokens(case, 1, 60)
    np.testing.assert_array_equal(
        reference_hf.logits(back, tokens), reference_hf.logits(reference(case), tokens)
    )


@pytest.mark.parametrize("case", CASES)
def test_a_config_is_read_back_as_it_was_written(case, loaded, tmp_path):
    weights.save(tmp_path / "back", *loaded(case))
    assert weights.read_config(tmp_path / "back") == loaded(case)[0]


@pytest.mark.full
@FAMILIES
def test_the_engine_reports_the_trainers_log_probs(model):
    for logp, tokens, rollout_logp in engines.scored(model, engines.sample(model), 0.8):
        expected = logp[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(rollout_logp, expected, atol=1e-5, rtol=0)


@pytest.mark.full
@FAMILIES
def test_sharded_logits_equal_unsharded(model):
    params = engines.make_params(model)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    places = sharding.param_shardings(decoder.logical_axes(model), mesh, sharding.TRAIN, params)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (8, 16), np.int32)
    got = LOGITS(
        jax.device_put(params, places),
        jax.device_put(tokens, sharding.batch_sharding(mesh, 0)),
        model,
    )
    np.testing.assert_allclose(got, LOGITS(params, tokens, model), atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@FAMILIES
def test_a_step_is_planned(model):
    config = make_config(model, microbatches=2)
    step = next(plan.programs(config, model, slices.slice_devices("v5e:2x2")))
    assert not plan.compile_program(step, slices.CHIPS["v5e"]).excess


# as the files of the published folders have it, without token ids
PUBLISHED = {
    "SmolLM2-135M-Instruct": """
        {"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "hidden_act": "silu", "hidden_size": 576, "initializer_range": 0.041666666666666664,
        "intermediate_size": 1536, "is_llama_config": true, "max_position_embeddings": 8192,
        "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9,
        "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_interleaved": false, "rope_scaling": null,
        "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
        "use_cache": true, "vocab_size": 49152}""",
    "Llama-3.2-1B-Instruct": """
        {"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0,
        "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": true,
        "vocab_size": 128256}""",
    "Qwen2.5-0.5B-Instruct": """
        {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": true, "use_cache": true, "use_sliding_window": false,
        "vocab_size": 151936}""",
    "TinyLlama-1.1B-Chat-v1.0": """
        {"architectures": ["LlamaForCausalLM"], "attention_bias": false, "hidden_act": "silu",
        "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
        "max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32,
        "num_hidden_layers": 22, "num_key_value_heads": 4, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": null, "tie_word_embeddings": false,
        "vocab_size": 32000}""",
    "Mistral-7B-Instruct-v0.3": """
        {"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": null, "tie_word_embeddings": false, "vocab_size": 32768}""",
}
LLAMA_7B = ModelConfig(32000, 4096, 11008, 32, 32, 32, 128, qk_norm=False, rms_norm_eps=1e-5)
READ = {
    "SmolLM2-135M-Instruct": sizes.SMOLLM2_135M,
    "Llama-3.2-1B-Instruct": sizes.LLAMA_3_2_1B,
    "Qwen2.5-0.5B-Instruct": sizes.QWEN2_5_0_5B,
    "TinyLlama-1.1B-Chat-v1.0": dataclasses.replace(
        LLAMA_7B,
        hidden_size=2048,
        intermediate_size=5632,
        num_layers=22,
        num_kv_heads=4,
        head_dim=64,
        rope_theta=1e4,
        max_position=2048,
    ),
    "Mistral-7B-Instruct-v0.3": dataclasses.replace(
        LLAMA_7B,
        vocab_size=32768,
        intermediate_size=14336,
        num_kv_heads=8,
        max_position=32768,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_files_written_as_the_published_ones_are_read(name, tmp_path):
    (tmp_path / "config.json").write_text(PUBLISHED[name])
    assert weights.read_config(tmp_path) == READ[name]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("Llama-3.2-1B-Instruct", {"mlp_bias": True}, "mlp_bias=True is not supported"),
        ("Llama-3.2-1B-Instruct", {"qk_norm": True}, "qk_norm=True is not supported"),
        ("Llama-3.2-1B-Instruct", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("Llama-3.2-1B-Instruct", {"attention_multiplier": 0.1}, "attention_multiplier=0.1 is not"),
        ("Llama-3.2-1B-Instruct", {"no_rope_layers": [1, 0]}, "no_rope_layers=.* is not supported"),
        ("Llama-3.2-1B-Instruct", {"attention_bias": "qkv"}, "attention_bias='qkv' is not true or"),
        (
            "Llama-3.2-1B-Instruct",
            {"layer_types": ["sliding_attention"] * 16},
            "layer_types has 'sliding_attention'",
        ),
        (
            "SmolLM2-135M-Instruct",
            {"hidden_size": 575},
            "head_dim is not given, and hidden_size=575 is not a multiple of num_attention_heads=9",
        ),
        ("SmolLM2-135M-Instruct", {"rope_interleaved": True}, "rope_interleaved=True is not"),
        ("SmolLM2-135M-Instruct", {"model_type": "smollm3"}, "model_type is 'smollm3', which is"),
        ("Qwen2.5-0.5B-Instruct", {"use_sliding_window": True}, "use_sliding_window=True"),
        ("Qwen2.5-0.5B-Instruct", {"attention_bias": False}, "attention_bias=False.*only True is"),
        ("Qwen2.5-0.5B-Instruct", {"rope_scaling": {"type": "dynamic"}}, "'dynamic' is not supp"),
        ("Qwen2.5-0.5B-Instruct", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30"),
        (
            "Mistral-7B-Instruct-v0.3",
            {"sliding_window": 4096},
            "sliding_window=4096 is not supported; set max_position_embeddings to 4096, up to",
        ),
        (
            "Mistral-7B-Instruct-v0.3",
            {"sliding_window": "drop"},
            "sliding_window=4096, which is what leaving it out means, is not supported",
        ),
        ("Mistral-7B-Instruct-v0.3", {"attention_bias": True}, "attention_bias=True.*only False"),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(name, changes, message, tmp_path):
    raw = json.loads(PUBLISHED[name]) | changes
    raw = {key: value for key, value in raw.items() if value != "drop"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        weights.read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("SmolLM2-135M-Instruct", {"head_dim": None, "num_key_value_heads": 3}),
        ("SmolLM2-135M-Instruct", {"sliding_window": 128}),  # which a Llama does not read
        ("Qwen2.5-0.5B-Instruct", {"use_mrope": False, "qkv_bias": True}),
        ("Mistral-7B-Instruct-v0.3", {"sliding_window": 32768}),
    ],
)
def test_what_changes_nothing_is_left_alone(name, changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(json.loads(PUBLISHED[name]) | changes))
    assert weights.read_config(tmp_path) == READ[name]
