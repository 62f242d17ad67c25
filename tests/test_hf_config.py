"""What a config.json may say: read as transformers reads it, refused by name, or left alone."""

import dataclasses
import json

import numpy as np
import pytest

from dcmdp_jax.models import hf_config, rope, sizes, weights
from dcmdp_jax.models.model_config import Yarn
from support.folders import edit
from support.random_params import random_params
from support.tiny_models import TINY, TINY_MOE

DENSE = dataclasses.replace(TINY, qkv_bias=True, o_bias=True, num_layers=3)
SPARSE = dataclasses.replace(TINY_MOE, num_layers=5, mlp_only_layers=(1,))


@pytest.fixture
def folder(tmp_path):
    weights.save(tmp_path / "model", DENSE, random_params(DENSE))
    return tmp_path / "model"


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["GemmaForCausalLM"]},
            "GemmaForCausalLM.*supported are Qwen3ForCausalLM",
        ),
        ({"architectures": "drop"}, "architectures"),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures is 'Qwen3ForCausalLM'"),
        ({"architectures": ["Qwen3ForCausalLM", "Qwen3MoeForCausalLM"]}, "architectures"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2', which is not that of architectures"),
        ({"hidden_size": "drop"}, "hidden_size is missing"),
        ({"rope_theta": "drop"}, "rope_theta is missing"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "original_max_position_embeddings is missing",
        ),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
            "low_freq_factor=4.0 must be less than high_freq_factor=4.0",
        ),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        (
            {"rope_scaling": {"type": "linear", "factor": 8.0, "beta_fast": 3.0}},
            "beta_fast=3.0 of rope_scaling is not supported with rope_type 'linear'",
        ),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}, "rope_parameters": PLAIN},
            "'dynamic' is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "longrope", "long_factor": [1.0]}},
            "'longrope' is not supported",
        ),
        ({"rope_scaling": ["yarn"]}, "rope_scaling is a list, not an object"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "original_max_position_embeddings is missing",
        ),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 10**400}},
            "original_max_position=10{400} must be at most",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale=0.7"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "factor='4' is not a positive number"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, "factor=0.5 of rope_scaling is less than 1"),
        (
            {"rope_scaling": YARN | {"type": "linear"}},
            "kind of rope is given twice and differs: 'yarn'.*'linear'",
        ),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": YARN | {"attn_factor": 0.9}}, "rope setting attn_factor=0.9"),
        ({"rope_scaling": YARN | {"short_factor": [1.0]}}, "rope setting short_factor"),
        (
            {"rope_scaling": {"factor": 4.0}},
            "factor=4.0 of rope_scaling is not supported with rope_type 'default'",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": PLAIN | YARN | {"factor": 2.0}},
            "disagree; keep one of the two",
        ),
        (
            {"rope_scaling": {"rope_type": "default"}, "rope_parameters": PLAIN | YARN},
            "disagree; keep one of the two",
        ),
        (
            {"rope_scaling": YARN, "original_max_position_embeddings": 9},
            "given twice and differs: 32768.* 9",
        ),
        (
            {"rope_scaling": YARN, "rope_parameters": PLAIN, "rope_theta": "drop"},
            "transformers takes 10000.0",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        (
            {"rope_parameters": PLAIN | {"rope_theta": 5e5}},
            "rope_theta is given twice and differs: 1000000.0 .* 500000.0",
        ),
        ({"rope_parameters": {"full_attention": PLAIN}}, "rope setting full_attention"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 is not a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        (
            {"layer_types": ["sliding_attention", "full_attention", "full_attention"]},
            "layer_types has 'sliding_attention'",
        ),
        (
            {"layer_types": ["full_attention"] * 2 + ["linear_attention"]},
            "layer_types has 'linear_attention'",
        ),
        ({"layer_types": ["full_attention"] * 2}, "not a list of num_hidden_layers=3 kinds"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"use_qk_norm": False}, "use_qk_norm=False"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 is not supported"),
        ({"attention_chunk_size": 64}, "attention_chunk_size=64 is not supported"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config=.* is not supported"),
        (
            {"dual_chunk_attention_config": {"chunk_size": 64}},
            "dual_chunk_attention_config=.* is not supported",
        ),
        ({"num_experts": 8}, "num_experts=8 is not supported by Qwen3ForCausalLM"),
        (
            {"quantization_config": {"quant_method": "fp8", "kept": ["lm_head"] * 500}},
            "^.{1,250}; only None is$",
        ),
        ({"num_attention_heads": 3}, "num_heads=3 is not a multiple"),
        ({"num_attention_heads": True}, "num_attention_heads=True is not a whole number"),
        ({"vocab_size": "256"}, "vocab_size='256' is not a whole number"),
        ({"hidden_size": -64}, "hidden_size=-64 is not a whole number"),
        ({"head_dim": 0}, "head_dim=0 is not a whole number"),
        ({"head_dim": 15}, "head_dim=15 must be even"),
        ({"num_key_value_heads": 2.0}, "num_key_value_heads=2.0 is not a whole number"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0 is not a positive number"),
        (
            {"rope_theta": 10**400},
            "rope_theta=10{0,59} is not a positive number that float32 holds",
        ),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' is not true or false"),
        ({"num_hidden_layers": 10**9}, "num_layers=1000000000 must be at most 1000"),
        ({"num_hidden_layers": 10**400}, "num_layers=10{400} must be at most 1000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not a whole number"),
        ({"num_hidden_layers": 999}, "too few for num_hidden_layers=999"),
        ({"num_hidden_layers": 4}, r"no tensor model\.layers\.3\."),
        ({"num_hidden_layers": 2}, r"model\.layers\.2\..*no place for"),
        ({"attention_bias": False}, r"self_attn\.\w_proj\.bias.*no place for"),
        ({"intermediate_size": 96}, r"_proj\.weight has shape \((64, 128|128, 64)\).*96"),
        ({"tie_word_embeddings": False}, r"no tensor lm_head\.weight"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, message, folder):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        weights.load(folder)


@pytest.mark.full
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 10**9}, "num_experts=1000000000 must be at most 65536"),
        ({"num_experts": 60000}, "too few for .* with num_experts=60000"),
        ({"num_local_experts": 4}, "num_experts is given twice and differs: 8 .* 4"),
        ({"num_experts": "drop"}, "num_experts is missing"),
        ({"mlp_only_layers": [5]}, r"mlp_only_layers is \[5\], not a list of layers from 0 to 4"),
        ({"mlp_only_layers": 1}, "mlp_only_layers is 1"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0 is not a whole number"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob='yes' is not true or false"),
        ({"num_experts_per_tok": 9}, "experts_per_token=9 must lie in 1..8"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5 is not supported"),
        ({"mlp_layer_types": ["dense"] * 5}, "mlp_layer_types=.* is not supported"),
    ],
)
def test_sparse_configs_that_do_not_fit_are_refused(changes, message, tmp_path):
    weights.save(tmp_path / "model", SPARSE, random_params(SPARSE))
    edit(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=message):
        weights.check(tmp_path / "model")


@pytest.mark.parametrize(
    "changes",
    [
        {"layer_types": ["full_attention"] * 3},
        {"sliding_window": 8, "max_window_layers": 28, "use_sliding_window": False},
        {
            "torch_dtype": "bfloat16",
            "dtype": "float32",
            "transformers_version": "5.0.0",
            "use_cache": False,
        },
        {
            "my_note": "kept for the record",
            "unsloth_version": "2025.6",
            "temperature": 0.6,
            "_name_or_path": "x",
        },
        {
            "output_router_logits": True,
            "router_aux_loss_coef": 0.5,
            "use_qk_norm": True,
            "qkv_bias": False,
        },
        {
            "final_logit_softcapping": None,
            "attention_chunk_size": 0,
            "mlp_bias": False,
            "num_experts": 0,
        },
        {
            "rope_scaling": {"rope_type": "default"},
            "partial_rotary_factor": 1.0,
            "quantization_config": None,
        },
    ],
)
def test_settings_that_change_nothing_are_left_alone(changes, folder):
    edit(folder, **changes)
    assert weights.read_config(folder) == DENSE


DENSE_FILE = """
{"architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
"hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 12288,
"max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
"num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps":
1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings":
false, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true,
"use_sliding_window": false, "vocab_size": 151936}
"""
SPARSE_FILE = """
{"architectures": ["Qwen3MoeForCausalLM"], "attention_dropout": 0.0, "decoder_sparse_step": 1,
"eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
"initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 262144,
"max_window_layers": 28, "mlp_only_layers": [], "model_type": "qwen3_moe",
"moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32, "num_experts":
128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
"output_router_logits": false, "qkv_bias": false, "rms_norm_eps": 1e-06, "rope_scaling": null,
"rope_theta": 10000000, "router_aux_loss_coef": 0.0, "shared_expert_intermediate_size": 0,
"sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
"transformers_version": "4.52.3", "use_cache": true, "use_qk_norm": true, "use_sliding_window":
false, "vocab_size": 151936}
"""


@pytest.mark.parametrize(
    "text, want",
    [
        (DENSE_FILE, sizes.QWEN3_8B),
        (
            SPARSE_FILE,
            dataclasses.replace(sizes.QWEN3_30B_A3B, rope_theta=1e7, max_position=262_144),
        ),
    ],
)
def test_files_written_as_the_published_ones_are_read(text, want, tmp_path):
    (tmp_path / "config.json").write_text(text)
    assert weights.read_config(tmp_path) == want


ROPES = [
    {"rope_theta": 1e6, "rope_scaling": None},
    {
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        "rope_scaling": YARN,
    },  # added by hand to a new file
    {"rope_parameters": PLAIN, "rope_scaling": YARN | {"rope_theta": 1e6}},
    {"rope_parameters": PLAIN, "rope_theta": 1e6, "rope_scaling": YARN | {"rope_theta": 1e6}},
    {
        "rope_theta": 1e6,
        "rope_scaling": {"type": "yarn"} | {k: v for k, v in YARN.items() if k != "rope_type"},
    },
    {"rope_parameters": PLAIN | YARN, "rope_scaling": YARN | {"rope_theta": 1e6}},
    {"rope_parameters": PLAIN | YARN | {"truncate": False}},
    {"rope_parameters": PLAIN | YARN | {"beta_fast": 16, "beta_slow": 2, "truncate": False}},
    {"rope_parameters": PLAIN | YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    {
        "rope_parameters": PLAIN
        | YARN
        | {"mscale": 0.7, "mscale_all_dim": 1.3, "attention_factor": 1.5}
    },
    {"rope_parameters": PLAIN | YARN | {"factor": 1.0}},
    {"rope_parameters": PLAIN | YARN, "original_max_position_embeddings": 32768},
    {"rope_parameters": PLAIN | LINEAR},
    {"rope_theta": 1e6, "rope_scaling": LINEAR},
    {"rope_parameters": PLAIN | LLAMA3},
    {"rope_theta": 1e6, "rope_scaling": LLAMA3},
]


def transformers_rope(folder):
    """Returns transformers' reading of config.json: frequencies, and the factor of cos and sin."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    theirs = Qwen3RotaryEmbedding(transformers.Qwen3Config.from_pretrained(folder))
    return theirs.inv_freq.numpy(), theirs.attention_scaling


def write_with(settings, folder):
    raw = {k: v for k, v in json.loads(DENSE_FILE).items() if "rope" not in k} | settings
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("settings", ROPES)
def test_rotary_positions_are_those_of_transformers(settings, tmp_path):
    write_with(settings, tmp_path)
    want, want_factor = transformers_rope(tmp_path)
    frequencies, factor = rope.frequencies(weights.read_config(tmp_path))
    np.testing.assert_allclose(frequencies, want, rtol=2e-6)
    assert factor == pytest.approx(want_factor)


@pytest.mark.parametrize("settings", ROPES)
def test_transformers_reads_the_rotary_positions_that_are_written(settings, tmp_path):
    write_with(settings, tmp_path)
    config = weights.read_config(tmp_path)
    hf_config.write(tmp_path / "config.json", config, "bfloat16", {})
    assert weights.read_config(tmp_path) == config
    frequencies, factor = transformers_rope(tmp_path)
    np.testing.assert_allclose(frequencies, rope.frequencies(config)[0], rtol=2e-6)
    assert factor == pytest.approx(rope.frequencies(config)[1])


@pytest.mark.parametrize("switches", [{"qkv_bias": False}, {"o_bias": False}])
def test_models_of_no_family_are_not_written(switches, tmp_path):
    config = dataclasses.replace(DENSE, **switches)
    (name, value), *_ = switches.items()
    with pytest.raises(ValueError, match=f"neither Qwen3ForCausalLM nor .* has .*{name}={value}"):
        hf_config.write(tmp_path / "config.json", config, "bfloat16", {})


def test_a_family_of_one_row_is_written_and_read_back(monkeypatch, tmp_path):
    bias = {"qk_norm": False, "qkv_bias": False, "o_bias": True}
    family = hf_config.Family("odd", sparse=False, head_dim=None, switches=lambda raw: bias)
    monkeypatch.setitem(hf_config.FAMILIES, "OddForCausalLM", family)
    config = dataclasses.replace(DENSE, **bias)
    hf_config.write(tmp_path / "config.json", config, "bfloat16", {})
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "odd"
    assert weights.read_config(tmp_path) == config


@pytest.mark.parametrize(
    "text, message",
    [
        (b"[1]", "holds a list, not a JSON object"),
        (b'"Qwen3"', "holds a string"),
        (b"null", "holds null"),
        (b"", "not valid JSON"),
        (b'{"architectures": ', "not valid JSON"),
        (b'{"a": "\xe9"}', "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"vocab_size": ' + b"1" * 5000 + b"}", "not valid JSON"),
        (b"{}", "architectures is None"),
    ],
)
def test_a_config_that_is_none_is_one_sentence_with_its_name(text, message, tmp_path):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        weights.check(tmp_path)


SPELLINGS = [
    {"rope_theta": 5e5, "rope_scaling": YARN},
    {"rope_theta": "drop", "rope_scaling": "drop", "rope_parameters": YARN | {"rope_theta": 5e5}},
]


@pytest.mark.parametrize("settings", SPELLINGS)
def test_both_spellings_of_rope_are_read(settings, folder):
    edit(folder, **settings)
    expected = dataclasses.replace(DENSE, rope_scaling=Yarn(4.0, 32768), rope_theta=5e5)
    assert weights.read_config(folder) == expected


def test_default_rope_parameters_are_no_scaling(folder):
    plain = {"rope_type": "default", "rope_theta": 5e5}
    edit(folder, rope_theta="drop", rope_scaling="drop", rope_parameters=plain)
    assert weights.read_config(folder) == dataclasses.replace(DENSE, rope_theta=5e5)
