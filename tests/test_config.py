"""Configs as they are found in the world, and RoPE against transformers' own functions."""

import copy
import dataclasses
import json

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave, yarn_apply_mscale

from deepseek_lit.config import (
    InputError, ModelConfig, Yarn, active_parameter_count, checkpoint_tensors, kv_bytes_per_token, parameter_count, parse_config, tensor_bytes, tiny_config, to_json,
)  # fmt: skip
from deepseek_lit.model import DeepSeekV3
from deepseek_lit.rope import apply_rope, rope_amplitude, rope_frequencies, rope_table, softmax_scale

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
RELEASE = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1,
    "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": FP8, "rms_norm_eps": 1e-06, "rope_scaling": YARN, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip

VARIANTS = {
    "release": ModelConfig(),
    "tiny": tiny_config(),
    "lite": dataclasses.replace(tiny_config(), q_lora_rank=None, rope_scaling=None, fp8=False, torch_dtype="float32", eos_token_id=(1, 7), num_nextn_predict_layers=1),
    "yarn without mscale": dataclasses.replace(tiny_config(), rope_scaling=Yarn(factor=4.0, mscale=0.0, mscale_all_dim=0.0), fp8=False, norm_topk_prob=False),
    "dense": dataclasses.replace(tiny_config(), first_k_dense_replace=4, tie_word_embeddings=True, fp8=False, rope_theta=50000.0, rope_scaling=None),
}


def test_the_release_is_the_default():
    assert parse_config(RELEASE) == ModelConfig()


def test_published_totals():
    config = ModelConfig()
    tensors = checkpoint_tensors(config)
    assert parameter_count(config) == 671_026_419_200
    assert active_parameter_count(config) == 37_552_297_472
    assert (len(tensors), tensor_bytes(tensors)) == (91_991, 688_574_839_360)
    assert kv_bytes_per_token(config) == 70_272
    assert tensors["model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == ("F32", (5, 56))
    assert tensors["model.layers.3.mlp.gate.e_score_correction_bias"] == ("F32", (256,))
    assert tensors["model.layers.61.eh_proj.weight"] == ("BF16", (7168, 14336))


@pytest.mark.parametrize("name", VARIANTS)
def test_counts_are_those_of_the_model(name):
    config = dataclasses.replace(VARIANTS[name], fp8=False)
    with torch.device("meta"):
        model = DeepSeekV3(dataclasses.replace(config, num_hidden_layers=min(config.num_hidden_layers, 5), num_nextn_predict_layers=0))
    shapes = {key: tuple(value.shape) for key, value in model.named_parameters()}
    expected = {key: shape for key, (_, shape) in checkpoint_tensors(model.config).items()}
    assert shapes == expected


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name):
    config = VARIANTS[name]
    fields = json.loads(json.dumps(to_json(config)))
    assert parse_config(fields) == config
    for field in ("scoring_func", "topk_method", "rope_interleave", "num_key_value_heads", "max_position_embeddings", "torch_dtype"):
        assert fields[field] is not None


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_reads_what_we_write_and_back(name, tmp_path):
    config = VARIANTS[name]
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text(json.dumps(to_json(config)))
    theirs = DeepseekV3Config.from_pretrained(tmp_path / "ours")
    for field in dataclasses.fields(ModelConfig):
        if field.name not in ("rope_theta", "rope_scaling", "torch_dtype", "fp8", "eos_token_id"):
            assert getattr(theirs, field.name) == getattr(config, field.name), field.name
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["rope_type"] == ("yarn" if config.rope_scaling else "default")
    theirs.save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert ModelConfig.from_pretrained(tmp_path / "theirs") == config


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_scaling": None, "rope_theta": None, "rope_parameters": {**YARN, "type": None, "rope_type": "yarn", "rope_theta": 10000.0}}, {}),
        ({"scoring_func": None, "topk_method": None, "moe_layer_freq": None}, {}),
        ({"torch_dtype": None, "dtype": "float32"}, {"torch_dtype": "float32"}),
        ({"num_key_value_heads": None, "head_dim": 64, "qk_head_dim": 192, "num_local_experts": 256, "auto_map": {}}, {}),
        ({"q_lora_rank": None}, {"q_lora_rank": None}),
        ({"n_shared_experts": None}, {"n_shared_experts": 0}),
        ({"max_position_embeddings": None, "num_nextn_predict_layers": None}, {}),
        ({"rope_scaling": None}, {"rope_scaling": None}),
        ({"rope_scaling": {"rope_type": "default"}}, {"rope_scaling": None}),
        ({"rope_scaling": {k: v for k, v in YARN.items() if "mscale" not in k}}, {"rope_scaling": Yarn(mscale=0.0, mscale_all_dim=0.0)}),
        ({"quantization_config": None}, {"fp8": False}),
        ({"quantization_config": {**FP8, "scale_fmt": "ue8m0"}}, {}),
        ({"eos_token_id": [1, 2]}, {"eos_token_id": (1, 2)}),
        ({"eos_token_id": None, "bos_token_id": None}, {"eos_token_id": None, "bos_token_id": None}),
    ],
)
def test_spellings_and_absences(change, expected):
    fields = {**RELEASE, **change}
    before = copy.deepcopy(fields)
    assert parse_config(fields) == dataclasses.replace(ModelConfig(), **expected)
    assert fields == before


@pytest.mark.parametrize("name", sorted(set(RELEASE) - {"model_type", "quantization_config", "rope_scaling"}))
def test_missing_fields_are_the_release(name):
    assert parse_config({key: value for key, value in RELEASE.items() if key != name}) == ModelConfig()


def yarn(**change):
    return {"rope_scaling": {**YARN, **change}}


BAD = [
    ({"model_type": None}, "model_type", "deepseek_v3"),
    ({"model_type": ["deepseek_v3"]}, "model_type", "deepseek_v3"),
    ({"model_type": "qwen2"}, "model_type", "R1-Distill"),
    ({"model_type": "llama"}, "model_type", "R1-Distill"),
    ({"model_type": "deepseek_v2"}, "model_type", "softmax"),
    ({"scoring_func": "softmax"}, "scoring_func", "'sigmoid'"),
    ({"topk_method": "group_limited_greedy"}, "topk_method", "'noaux_tc'"),
    ({"hidden_act": "gelu"}, "hidden_act", "'silu'"),
    ({"attention_bias": True}, "attention_bias", "False"),
    ({"rope_interleave": False}, "rope_interleave", "True"),
    ({"moe_layer_freq": 2}, "moe_layer_freq", "1"),
    ({"hidden_size": "7168"}, "hidden_size", "an integer"),
    ({"hidden_size": 7168.5}, "hidden_size", "an integer"),
    ({"hidden_size": 0}, "hidden_size", "a positive number"),
    ({"kv_lora_rank": -512}, "kv_lora_rank", "a positive number"),
    ({"num_hidden_layers": True}, "num_hidden_layers", "an integer"),
    ({"num_hidden_layers": [61]}, "num_hidden_layers", "an integer"),
    ({"q_lora_rank": "1536"}, "q_lora_rank", "an integer"),
    ({"n_shared_experts": -1}, "n_shared_experts", "a positive number"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps", "a number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps", "a positive number"),
    ({"norm_topk_prob": "true"}, "norm_topk_prob", "true or false"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings", "true or false"),
    ({"eos_token_id": "</s>"}, "eos_token_id", "a token id"),
    ({"eos_token_id": [1, None]}, "eos_token_id", "a token id"),
    ({"eos_token_id": ""}, "eos_token_id", "a token id"),
    ({"eos_token_id": False}, "eos_token_id", "a token id"),
    ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype", "bfloat16"),
    ({"torch_dtype": None, "dtype": "int8"}, "dtype", "bfloat16"),
    ({"torch_dtype": 16}, "torch_dtype", "a string"),
    ({"num_key_value_heads": 8}, "num_key_value_heads", "128"),
    ({"num_key_value_heads": "8"}, "num_key_value_heads", "an integer"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim", "even"),
    ({"n_group": 7}, "n_routed_experts", "n_group (7)"),
    ({"topk_group": 9}, "topk_group", "n_group (8)"),
    ({"n_group": 256}, "n_group", "at most 128"),
    ({"num_experts_per_tok": 129}, "num_experts_per_tok", "at most 128"),
    ({"rope_theta": "1e4"}, "rope_theta", "a number"),
    ({"rope_theta": 1}, "rope_theta", "more than 1"),
    ({"rope_scaling": "yarn"}, "rope_scaling", "an object"),
    ({"rope_parameters": [YARN]}, "rope_parameters", "an object"),
    ({"rope_scaling": {"type": "llama3", "factor": 8}}, "'llama3'", "'yarn' or 'default'"),
    ({"rope_scaling": {"type": "dynamic", "factor": 8}}, "'dynamic'", "'yarn' or 'default'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 8}}, "'linear'", "'yarn' or 'default'"),
    ({"rope_scaling": {"type": {}}}, "rope type", "'yarn' or 'default'"),
    (yarn(factor=None), "rope settings", "'factor'"),
    (yarn(original_max_position_embeddings=None), "rope settings", "'original_max_position_embeddings'"),
    (yarn(factor="40"), "factor", "a number"),
    (yarn(factor=0.5), "factor", "at least 1"),
    (yarn(original_max_position_embeddings=4096.5), "original_max_position_embeddings", "an integer"),
    (yarn(original_max_position_embeddings=0), "original_max_position_embeddings", "a positive"),
    (yarn(beta_fast=1, beta_slow=32), "beta_fast", "beta_slow"),
    (yarn(mscale_all_dim=[1]), "mscale_all_dim", "a number"),
    (yarn(attention_factor=1.2), "attention_factor", "none"),
    (yarn(truncate=False), "truncate", "True"),
    (yarn(partial_rotary_factor=0.5), "partial_rotary_factor", "1.0"),
    ({"quantization_config": "fp8"}, "quantization_config", "an object"),
    ({"quantization_config": {**FP8, "quant_method": "awq"}}, "quantization_config.quant_method", "'fp8'"),
    ({"quantization_config": {**FP8, "fmt": "e5m2"}}, "quantization_config.fmt", "'e4m3'"),
    ({"quantization_config": {**FP8, "weight_block_size": [64, 64]}}, "quantization_config.weight_block_size", "[128, 128]"),
    ({"quantization_config": {**FP8, "activation_scheme": "static"}}, "quantization_config.activation_scheme", "'dynamic'"),
    ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.weight_block_size", "[128, 128]"),
]


@pytest.mark.parametrize(("change", "field", "expected"), BAD, ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None)
def test_bad_fields_get_one_sentence(change, field, expected, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**RELEASE, **change}))
    with pytest.raises(InputError) as caught:
        ModelConfig.from_pretrained(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and "\n" not in message
    assert field in message and expected in message.replace(field, "", 1)


@pytest.mark.parametrize(("content", "expected"), [(None, "does not exist"), (b"{", "not valid JSON"), (b"", "not valid JSON"), (b"\xff\xfe{}", "not valid JSON"), (b"[1]", "expected an object")])
def test_bad_files_get_one_sentence(content, expected, tmp_path):
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        ModelConfig.from_pretrained(tmp_path)
    message = str(caught.value)
    assert message.startswith(str(file)) and expected in message and "\n" not in message


ROPE = [
    Yarn(),
    Yarn(factor=4.0, original_max_position_embeddings=1024, mscale_all_dim=0.0),
    Yarn(factor=8.0, original_max_position_embeddings=256, mscale=0.707, mscale_all_dim=0.707),
    Yarn(factor=32.0, beta_fast=16.0, beta_slow=2.0, mscale=1.0, mscale_all_dim=0.5),
    Yarn(factor=2.5, beta_fast=64.0, beta_slow=0.5, mscale=0.0, mscale_all_dim=1.0),
    Yarn(factor=40.0, original_max_position_embeddings=32, mscale=0.0, mscale_all_dim=0.0),
    Yarn(factor=4.0, original_max_position_embeddings=2),
    Yarn(factor=1.0),
    None,
]


@pytest.mark.parametrize("dim", [2, 8, 64])
@pytest.mark.parametrize("theta", [10000.0, 500.0])
@pytest.mark.parametrize("scaling", ROPE)
def test_rope_is_transformers(scaling, theta, dim):
    config = dataclasses.replace(ModelConfig(), rope_scaling=scaling, rope_theta=theta, qk_rope_head_dim=dim, fp8=False)
    theirs = DeepseekV3Config(**to_json(config))
    scale = (theirs.qk_nope_head_dim + theirs.qk_rope_head_dim) ** -0.5
    if scaling is None:
        frequencies, amplitude = 1.0 / theta ** (torch.arange(0, dim, 2).float() / dim), 1.0
    else:
        frequencies, amplitude = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    torch.testing.assert_close(rope_frequencies(config), frequencies, rtol=1e-6, atol=0)
    assert rope_amplitude(config) == pytest.approx(amplitude, rel=1e-12)
    assert softmax_scale(config) == pytest.approx(yarn_apply_mscale(theirs.rope_parameters, scale), rel=1e-12)


@pytest.mark.parametrize("shared_key", [False, True])
def test_scores_are_those_of_the_permuted_form(shared_key):
    config = ModelConfig()
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([[0, 1, 2, 7, 100, 4095, 4096, 20000]])
    q_BSHR = torch.randn(1, 8, 4, config.qk_rope_head_dim, generator=generator)
    k_BSHR = torch.randn(1, 8, 1 if shared_key else 4, config.qk_rope_head_dim, generator=generator)
    table = rope_table(positions, rope_frequencies(config))
    ours = torch.einsum("bshr,bthr->bhst", apply_rope(q_BSHR, table), apply_rope(k_BSHR, table).expand_as(q_BSHR))

    angles = positions[..., None].float() * rope_frequencies(config)
    angles = torch.cat([angles, angles], -1)
    q, k = apply_rotary_pos_emb_interleave(q_BSHR.transpose(1, 2), k_BSHR.transpose(1, 2), angles.cos(), angles.sin())
    theirs = q @ k.mT
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    unrotated = torch.einsum("bshr,bthr->bhst", q_BSHR, k_BSHR.expand_as(q_BSHR))
    assert (ours - unrotated).abs().max() > 1


def test_rope_keeps_the_dtype_and_shapes():
    config = tiny_config()
    table = rope_table(torch.arange(6).view(2, 3), rope_frequencies(config), amplitude=2.0)
    for x in (torch.ones(2, 3, 32, dtype=torch.bfloat16), torch.ones(2, 3, 4, 32)):
        turned = apply_rope(x, table)
        assert (turned.dtype, turned.shape) == (x.dtype, x.shape)
        torch.testing.assert_close(turned.float().norm(dim=-1), 2 * x.float().norm(dim=-1), rtol=1e-2, atol=0)
    assert torch.equal(apply_rope(torch.ones(2, 3, 32), table)[0, 0], torch.full((32,), 2.0))
