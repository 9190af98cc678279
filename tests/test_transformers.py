"""The model against Hugging Face's `DeepseekV3ForCausalLM`, and its fast paths against its plain forward, all in float32."""

import json
import math

import pytest
import torch
from models import YARN, random_config, random_model, write_checkpoint, write_dequantized
from tolerances import LOGITS
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.utils import logging

from deepseek_lit import mla
from deepseek_lit.checkpoint import load_model
from deepseek_lit.config import Yarn
from deepseek_lit.gate import Gate
from deepseek_lit.generate import LLM, SamplingParams, decode, prefill
from deepseek_lit.mla import LatentCache
from deepseek_lit.moe import MoE

logging.disable_progress_bar()
logging.set_verbosity_error()

# (shards, batch, sequence, fields that differ from random_config's)
CONFIGS = {
    "one-group": (1, 2, 17, dict(n_group=1, topk_group=1, num_experts_per_tok=2)),
    "two-groups": (1, 1, 40, dict(n_group=2, topk_group=1)),
    "four-groups": (5, 3, 9, dict(n_group=4, topk_group=3, n_routed_experts=12, num_experts_per_tok=5)),
    "eight-groups": (9, 2, 24, dict(n_group=8, topk_group=4, n_routed_experts=32, num_experts_per_tok=8)),
    "all-groups": (1, 2, 12, dict(n_group=4, topk_group=4)),
    "one-expert-of-many": (1, 2, 12, dict(n_group=4, topk_group=1, n_routed_experts=16, num_experts_per_tok=1)),
    "not-normalised": (1, 2, 16, dict(norm_topk_prob=False)),
    "no-yarn": (3, 2, 30, dict(rope_scaling=None)),
    "other-theta": (1, 1, 200, dict(rope_scaling=None, rope_theta=500.0)),
    "long-yarn": (1, 1, 230, dict(rope_scaling=Yarn(factor=40.0, original_max_position_embeddings=16, beta_fast=8.0), qk_rope_head_dim=32)),
    "two-mscales": (1, 2, 70, dict(rope_scaling=Yarn(factor=8.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.3))),
    "no-mscale-all-dim": (1, 1, 33, dict(rope_scaling=Yarn(factor=8.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.0))),
    "no-query-latent": (1, 2, 21, dict(q_lora_rank=None)),
    "no-dense-layer": (2, 2, 15, dict(first_k_dense_replace=0)),
    "two-dense-layers": (1, 2, 15, dict(first_k_dense_replace=2)),
    "only-dense-layers": (1, 2, 15, dict(first_k_dense_replace=3)),
    "wider-eps": (1, 4, 5, dict(rms_norm_eps=1e-5)),
    "huge-eps": (1, 2, 11, dict(rms_norm_eps=1e-2)),
    "tied-embeddings": (1, 2, 13, dict(tie_word_embeddings=True)),
    "odd-everything": (20, 2, 19, dict(hidden_size=131, num_attention_heads=3, q_lora_rank=129, kv_lora_rank=127, qk_nope_head_dim=15, v_head_dim=7, intermediate_size=257, moe_intermediate_size=31)),
    "real-heads": (1, 1, 20, dict(num_attention_heads=2, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, num_hidden_layers=2)),
    "one-token": (1, 2, 1, dict()),
}  # fmt: skip


def config_of(name):
    return random_config(seed=list(CONFIGS).index(name), **CONFIGS[name][3])


def random_ids(config, batch, length, seed=0):
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def open_transformers(path):
    return DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()


def difference(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
    return float((a - b).abs().max())


def expert_choices(model, ids):
    """Chosen experts per gate, int64 [tokens, K], sorted."""
    chosen = []
    hooks = [m.register_forward_hook(lambda _, __, out: chosen.append(out[1].sort(-1).values)) for m in model.modules() if isinstance(m, Gate)]
    model(ids)
    for hook in hooks:
        hook.remove()
    return chosen


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_logits_and_greedy_text_equal_transformers(name, tmp_path):
    shards, batch, length, _ = CONFIGS[name]
    config = config_of(name)
    path = write_checkpoint(tmp_path, config, shards=shards)
    assert len(list(path.glob("*.safetensors"))) >= shards
    peer, llm, ids = open_transformers(path), LLM(path), random_ids(config, batch, length)
    want = peer(ids).logits
    assert 0.3 < want.std() < 5  # a model that says something
    assert difference(llm.model(ids), want) <= LOGITS
    want_tokens = peer.generate(ids[:, :8], attention_mask=torch.ones_like(ids[:, :8]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    outputs = llm.generate(ids[:, :8].tolist(), SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))
    assert [out.prompt_token_ids + out.token_ids for out in outputs] == want_tokens.tolist()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("only-dense-layers", "one-token")])
@torch.inference_mode()
def test_the_random_router_is_not_trivial(name):
    config = config_of(name)
    model = random_model(config)
    biases = torch.stack([m.e_score_correction_bias for m in model.modules() if isinstance(m, Gate)])
    assert biases.min() < -0.3 and biases.max() > 0
    for experts_SK in expert_choices(model, random_ids(config, 2, 24)):
        assert len(experts_SK.unique(dim=0)) > 2
        assert len(experts_SK.unique()) > config.num_experts_per_tok


@pytest.mark.parametrize("name", ["eight-groups", "no-query-latent", "odd-everything", "real-heads", "tied-embeddings"])
@torch.inference_mode()
def test_fp8_equals_transformers_on_dequantized_weights(name, tmp_path):
    shards, batch, length, _ = CONFIGS[name]
    config = config_of(name)
    path = write_checkpoint(tmp_path / "fp8", config, fp8=True, shards=shards)
    peer = open_transformers(write_dequantized(path, tmp_path / "plain"))
    ids = random_ids(config, batch, length)
    want = peer(ids).logits
    kept, dequantized = load_model(path), load_model(path, dequantize=True)
    assert kept.model.layers[0].self_attn.o_proj.weight.dtype == torch.float8_e4m3fn
    assert all(parameter.dtype == torch.float32 for parameter in dequantized.parameters())
    assert difference(kept(ids), want) <= LOGITS
    assert difference(dequantized(ids), want) <= LOGITS
    assert difference(random_model(config)(ids), want) > 100 * LOGITS  # the quantisation itself is no small thing


@pytest.mark.parametrize("yarn", [None, YARN])
@torch.inference_mode()
def test_a_directory_saved_by_transformers_opens(yarn, tmp_path):
    rope = {"rope_type": "default", "rope_theta": 3000.0}
    if yarn:
        rope = {"rope_type": "yarn", "rope_theta": 3000.0, "factor": 4.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=99, hidden_size=64, intermediate_size=90, moe_intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        n_routed_experts=16, kv_lora_rank=32, q_lora_rank=48, qk_rope_head_dim=16, qk_nope_head_dim=24, v_head_dim=20, n_group=4, topk_group=2,
        num_experts_per_tok=4, first_k_dense_replace=1, max_position_embeddings=256, initializer_range=0.15, rope_parameters=rope,
    )  # fmt: skip
    peer = DeepseekV3ForCausalLM._from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    for layer in peer.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.uniform_(-1, 0.5)
    peer.save_pretrained(tmp_path, max_shard_size="100KB")
    written = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in written and "rope_scaling" not in written and "scoring_func" not in written
    ids = torch.randint(99, (2, 100))
    assert difference(load_model(tmp_path)(ids), peer(ids).logits) <= LOGITS


# From here on: one model, many ways to run it.

PATHS = ["eight-groups", "no-query-latent", "odd-everything", "real-heads"]


@pytest.fixture(params=PATHS)
def model(request):
    return random_model(config_of(request.param))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 20])
@pytest.mark.parametrize("chunk", [1, 4, 8])
@torch.inference_mode()
def test_reading_in_chunks_equals_the_plain_forward(model, length, chunk):
    ids = random_ids(model.config, 2, length)
    cache = LatentCache(model.config, 2, length)
    positions = torch.arange(length).expand(2, -1)
    pieces = [model(ids[:, i : i + chunk], positions[:, i : i + chunk], cache) for i in range(0, length, chunk)]
    assert difference(torch.cat(pieces, 1), model(ids)) <= LOGITS


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 64])
@torch.inference_mode()
def test_a_batch_of_unequal_prompts_equals_each_alone(model, chunk):
    lengths, steps = [1, 4, 5, 11], 4
    texts = [random_ids(model.config, 1, length + steps, seed=length)[0].tolist() for length in lengths]
    plain = [model(torch.tensor([text]))[0] for text in texts]
    cache = LatentCache(model.config, len(texts), max(lengths) + steps)
    logits = prefill(model, [text[:length] for text, length in zip(texts, lengths)], cache, chunk)
    for step in range(steps + 1):
        want = torch.stack([logits_SW[length + step - 1] for logits_SW, length in zip(plain, lengths)])
        assert difference(logits, want) <= LOGITS
        if step < steps:
            positions = [length + step for length in lengths]
            logits = decode(model, [text[p] for text, p in zip(texts, positions)], positions, cache)


@torch.inference_mode()
def test_finished_rows_leave_the_others_alone(model):
    ids = random_ids(model.config, 3, 10)
    cache = LatentCache(model.config, 3, 10)
    prefill(model, ids[:, :9].tolist(), cache, 4)
    cache.keep([2, 0])
    assert difference(decode(model, ids[[2, 0], 9].tolist(), [9, 9], cache), model(ids)[[2, 0], -1]) <= LOGITS


@torch.inference_mode()
def test_rolling_back_is_overwriting(model):
    ids, other = random_ids(model.config, 1, 12), random_ids(model.config, 1, 12, seed=1)
    cache = LatentCache(model.config, 1, 12)
    model(torch.cat([ids[:, :6], other[:, 6:]], 1), torch.arange(12)[None], cache)
    again = model(ids[:, 6:9], torch.arange(6, 9)[None], cache)
    assert difference(again, model(ids)[:, 6:9]) <= LOGITS


@pytest.mark.parametrize("length", [1, 2, 33])
@torch.inference_mode()
def test_absorbed_equals_naive(model, length, monkeypatch):
    ids, logits = random_ids(model.config, 2, length), {}
    for form, below in {"naive": 0, "absorbed": math.inf}.items():
        monkeypatch.setattr(mla, "absorption_pays_below", lambda config, cached, below=below: below)
        cache = LatentCache(model.config, 2, length)
        cached = [model(ids[:, i : i + 5], torch.arange(length)[i : i + 5].expand(2, -1), cache) for i in range(0, length, 5)]
        logits[form] = torch.stack([model(ids), torch.cat(cached, 1)])
    assert difference(logits["absorbed"], logits["naive"]) <= LOGITS


@pytest.mark.parametrize("length", [1, 24])
@torch.inference_mode()
def test_grouped_experts_equal_the_loop(length):
    config = random_config(hidden_size=96, moe_intermediate_size=64, n_group=8, topk_group=4, n_routed_experts=32, num_experts_per_tok=8)
    model = random_model(config)
    ids = random_ids(config, 2, length)
    want = model(ids)
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.stack()
    assert difference(model(ids), want) <= LOGITS
