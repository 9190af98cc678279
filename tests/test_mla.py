"""Attention: the plain, absorbed, cached and chunked forms are one function, on configurations and lengths that a chapter has no room for."""

import dataclasses

import pytest
import torch
from tolerances import LOGITS
from torch import nn

from deepseek_lit.config import ModelConfig, Yarn, tiny_config
from deepseek_lit.fp8 import dequantize, quantize
from deepseek_lit.mla import MLA, LatentCache, absorption_pays_below, attend_absorbed, attend_naive, causal_mask, latent_probabilities
from deepseek_lit.rope import rope_amplitude, rope_frequencies, rope_table

STRETCHED = Yarn(factor=8.0, original_max_position_embeddings=64)
SHAPES = {
    "one head": dict(num_attention_heads=1, qk_nope_head_dim=8, qk_rope_head_dim=2, v_head_dim=8, kv_lora_rank=4, q_lora_rank=6),
    "odd": dict(num_attention_heads=3, qk_nope_head_dim=7, qk_rope_head_dim=6, v_head_dim=5, kv_lora_rank=11, q_lora_rank=13),
    "no query latent": dict(num_attention_heads=5, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=24, kv_lora_rank=32, q_lora_rank=None),
    "wide latent": dict(num_attention_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, kv_lora_rank=96, q_lora_rank=16),
    "the release's heads": dict(num_attention_heads=2, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, kv_lora_rank=512, q_lora_rank=48),
}


def make(shape: str, yarn: bool = True, **changes) -> ModelConfig:
    fields = dict(hidden_size=40, num_hidden_layers=2, rope_scaling=STRETCHED if yarn else None) | SHAPES[shape] | changes
    return dataclasses.replace(tiny_config(), **fields)


def random_mla(config: ModelConfig, layer: int = 1) -> MLA:
    mla, generator = MLA(config, layer), torch.Generator().manual_seed(7)
    for parameter in mla.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return mla.requires_grad_(False)


def rope_at(config: ModelConfig, positions_BS: torch.Tensor) -> torch.Tensor:
    return rope_table(positions_BS, rope_frequencies(config), rope_amplitude(config))


def positions(rows: int, start: int, stop: int) -> torch.Tensor:
    return torch.arange(start, stop).expand(rows, -1)


def draw(config: ModelConfig, rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, tokens, config.hidden_size, generator=torch.Generator().manual_seed(seed))


def read(mla: MLA, x_BSD: torch.Tensor, cuts: list[int], cache: LatentCache, start: int = 0) -> torch.Tensor:
    """Feed `x`, the tokens from position `start` on, through the cache in pieces that end at `cuts`."""
    outputs, begin = [], start
    for end in cuts:
        here = positions(len(x_BSD), begin, end)
        outputs.append(mla(x_BSD[:, begin - start : end - start], here, rope_at(mla.config, here), cache, end))
        begin = end
    return torch.cat(outputs, 1)


def up(mla: MLA, form) -> object:
    """The up-projection as this form of attention takes it."""
    return mla.kv_b_proj if form is attend_naive else mla.key_value_weights(torch.float32)


def whole(mla: MLA, x_BSD: torch.Tensor) -> torch.Tensor:
    """The reference: one pass, plain form, no cache."""
    here = positions(len(x_BSD), 0, x_BSD.shape[1])
    rope = rope_at(mla.config, here)
    out_BSHV = attend_naive(mla.queries(x_BSD, rope), mla.latents(x_BSD, rope), mla.kv_b_proj, mla.scale)
    return mla.o_proj(out_BSHV.flatten(2))


def poisoned(config: ModelConfig, rows: int, slots: int) -> LatentCache:
    cache = LatentCache(config, rows, slots)
    cache.c_kv.fill_(float("nan"))
    cache.k_rope.fill_(float("nan"))
    return cache


@pytest.mark.parametrize("yarn", [True, False], ids=["yarn", "plain rope"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 13])
def test_naive_absorbed_and_forward_agree(shape, yarn, tokens):
    config = make(shape, yarn)
    mla, x_BSD, here = random_mla(config), draw(config, 2, tokens), positions(2, 0, tokens)
    rope = rope_at(config, here)
    arguments = mla.queries(x_BSD, rope), mla.latents(x_BSD, rope)
    naive_BSHV = attend_naive(*arguments, mla.kv_b_proj, mla.scale)
    assert naive_BSHV.shape == (2, tokens, config.num_attention_heads, config.v_head_dim)
    torch.testing.assert_close(attend_absorbed(*arguments, mla.key_value_weights(x_BSD.dtype), mla.scale), naive_BSHV, atol=LOGITS, rtol=0)
    torch.testing.assert_close(mla(x_BSD, here, rope), mla.o_proj(naive_BSHV.flatten(2)), atol=LOGITS, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cuts", [[13], [12, 13], [1, 13], [5, 10, 13], [4, 5, 6, 13], list(range(1, 14))], ids=str)
def test_cached_and_chunked_equal_one_pass(shape, cuts):
    config = make(shape)
    mla, x_BSD = random_mla(config), draw(config, 2, 13)
    torch.testing.assert_close(read(mla, x_BSD, cuts, poisoned(config, 2, 20)), whole(mla, x_BSD), atol=LOGITS, rtol=0)


@pytest.mark.parametrize("form", [attend_naive, attend_absorbed])
@pytest.mark.parametrize("queries", [1, 4])
def test_both_forms_obey_a_mask(form, queries):
    config = make("odd")
    mla, x_BSD, here = random_mla(config), draw(config, 2, 9), positions(2, 0, 9)
    rope = rope_at(config, here)
    q = tuple(part[:, -queries:] for part in mla.queries(x_BSD, rope))
    mask_BST = causal_mask(here[:, -queries:], 9)
    assert mask_BST.shape == (2, queries, 9) and mask_BST.sum() == 2 * sum(range(10 - queries, 10))
    out_BSHV = form(q, mla.latents(x_BSD, rope), up(mla, form), mla.scale, mask_BST)
    torch.testing.assert_close(mla.o_proj(out_BSHV.flatten(2)), whole(mla, x_BSD)[:, -queries:], atol=LOGITS, rtol=0)


def test_rollback_is_overwriting():
    config = make("odd")
    mla, good_BSD, cache = random_mla(config), draw(config, 2, 12), poisoned(config, 2, 16)
    read(mla, good_BSD[:, :5], [5], cache)
    read(mla, draw(config, 2, 6, seed=1), [8, 11], cache, start=5)  # six tokens that are taken back
    again_BSD = read(mla, good_BSD[:, 5:8], [6, 8], cache, start=5)
    torch.testing.assert_close(again_BSD, whole(mla, good_BSD)[:, 5:8], atol=LOGITS, rtol=0)
    torch.testing.assert_close(read(mla, good_BSD[:, 8:], [12], cache, start=8), whole(mla, good_BSD)[:, 8:], atol=LOGITS, rtol=0)


def test_rows_at_different_positions_share_a_step():
    config = make("no query latent")
    mla, x_BSD, cache = random_mla(config), draw(config, 3, 10), LatentCache(config, 3, 14)
    read(mla, x_BSD[:, :9], [9], cache)
    cache.c_kv[:, 0, 3:10], cache.k_rope[:, 0, 3:10] = 50.0, -50.0  # row 0 has three tokens, row 1 six: what follows is litter
    cache.c_kv[:, 1, 6:10], cache.k_rope[:, 1, 6:10] = -50.0, 50.0
    cache.c_kv[:, :, 10:] = cache.k_rope[:, :, 10:] = float("nan")  # and beyond the extent nothing is looked at
    at_B = torch.tensor([3, 6, 9])
    out_BSD = mla(x_BSD[torch.arange(3), at_B][:, None], at_B[:, None], rope_at(config, at_B[:, None]), cache, 10)
    torch.testing.assert_close(out_BSD[:, 0], whole(mla, x_BSD)[torch.arange(3), at_B], atol=LOGITS, rtol=0)


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_poisoned_row_does_not_reach_its_neighbours(tokens):
    config = make("odd")
    mla, x_BSD, cache = random_mla(config), draw(config, 3, 8 + tokens), poisoned(config, 3, 16)
    read(mla, x_BSD[:, :8], [8], cache)
    cache.c_kv[:, 1], cache.k_rope[:, 1] = float("nan"), float("nan")
    out_BSD = read(mla, x_BSD[:, 8:], [8 + tokens], cache, start=8)
    torch.testing.assert_close(out_BSD[[0, 2]], whole(mla, x_BSD)[[0, 2], 8:], atol=LOGITS, rtol=0)
    assert out_BSD[1].isnan().all()


def test_keep_forgets_the_other_rows_and_no_more():
    config = make("odd")
    mla, x_BSD, cache = random_mla(config), draw(config, 4, 9), poisoned(config, 4, 12)
    read(mla, x_BSD[:, :7], [7], cache)
    cache.keep([1, 3])
    assert cache.c_kv.shape[:3] == cache.k_rope.shape[:3] == (2, 2, 12)
    torch.testing.assert_close(read(mla, x_BSD[[1, 3], 7:], [8, 9], cache, start=7), whole(mla, x_BSD)[[1, 3], 7:], atol=LOGITS, rtol=0)


def test_a_layer_writes_its_own_slots_only():
    config = make("odd")
    cache = poisoned(config, 2, 8)
    read(random_mla(config, layer=1), draw(config, 2, 5), [5], cache)
    assert cache.c_kv[0].isnan().all() and cache.k_rope[0].isnan().all()
    assert cache.c_kv[1, :, :5].isfinite().all() and cache.c_kv[1, :, 5:].isnan().all()
    c_kv_BTC, k_rope_BTR = cache.read(1, 5)
    assert c_kv_BTC.data_ptr() == cache.c_kv[1].data_ptr() and k_rope_BTR.data_ptr() == cache.k_rope[1].data_ptr()  # views


def test_cache_holds_the_normed_latent_and_the_rotated_key():
    config = make("odd")
    mla, x_BSD, cache = random_mla(config), draw(config, 1, 6), LatentCache(config, 1, 6)
    read(mla, x_BSD, [6], cache)
    raw_c_kv, raw_k_rope = (x_BSD @ mla.kv_a_proj_with_mqa.weight.T).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
    normed = raw_c_kv * (raw_c_kv.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * mla.kv_a_layernorm.weight
    turned = torch.view_as_complex(raw_k_rope.unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.exp(1j * torch.arange(6)[:, None] * rope_frequencies(config)) * rope_amplitude(config)
    torch.testing.assert_close(cache.c_kv[1], normed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.k_rope[1], torch.view_as_real(turned).flatten(-2).float(), atol=1e-5, rtol=1e-5)


def test_latent_norms_do_not_read_rms_norm_eps():
    config = make("odd")
    x_BSD, here = draw(config, 1, 5), positions(1, 0, 5)
    usual, odd = (random_mla(dataclasses.replace(config, rms_norm_eps=eps))(1e-2 * x_BSD, here, rope_at(config, here)) for eps in (1e-6, 0.3))
    assert torch.equal(usual, odd)


def test_probabilities_are_causal_and_sum_to_one():
    config = make("wide latent")
    mla, x_BSD, here = random_mla(config), draw(config, 2, 7), positions(2, 0, 7)
    rope = rope_at(config, here)
    p_BHST = latent_probabilities(mla.queries(x_BSD, rope), mla.latents(x_BSD, rope), mla.key_value_weights(torch.float32)[0], mla.scale)
    torch.testing.assert_close(p_BHST.sum(-1), torch.ones(2, config.num_attention_heads, 7))
    assert not p_BHST.triu(1).any()


@pytest.mark.parametrize("shape", ["odd", "the release's heads"])
def test_fp8_weights_are_dequantised_before_absorption(shape):
    config = make(shape)
    fp8, plain = random_mla(config), random_mla(config)
    weight, scale_inv = quantize(fp8.kv_b_proj.weight)
    fp8.kv_b_proj.weight = nn.Parameter(weight, requires_grad=False)
    fp8.kv_b_proj.weight_scale_inv = nn.Parameter(scale_inv, requires_grad=False)
    plain.kv_b_proj.weight = nn.Parameter(dequantize(weight, scale_inv), requires_grad=False)
    x_BSD = draw(config, 2, 6)
    one, two = (read(mla, x_BSD, [4, 5, 6], LatentCache(config, 2, 6)) for mla in (fp8, plain))
    torch.testing.assert_close(one, two, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("form", [attend_naive, attend_absorbed])
def test_gradients_reach_everything_in_both_forms(form):
    config = make("odd")
    mla, x_BSD, here = random_mla(config).requires_grad_(True), draw(config, 2, 6).requires_grad_(True), positions(2, 0, 6)
    rope = rope_at(config, here)
    mla.o_proj(form(mla.queries(x_BSD, rope), mla.latents(x_BSD, rope), up(mla, form), mla.scale).flatten(2)).square().sum().backward()
    for name, parameter in [*mla.named_parameters(), ("x", x_BSD)]:
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_gradients_of_both_forms_agree():
    config = make("odd")
    gradients = []
    for form in (attend_naive, attend_absorbed):
        mla, here = random_mla(config).requires_grad_(True), positions(2, 0, 6)
        x_BSD, rope = draw(config, 2, 6), rope_at(config, here)
        form(mla.queries(x_BSD, rope), mla.latents(x_BSD, rope), up(mla, form), mla.scale).square().sum().backward()
        gradients.append({name: p.grad for name, p in mla.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=LOGITS, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_absorption_pays_where_the_operations_are_equal():
    assert absorption_pays_below(ModelConfig()) == pytest.approx(512 * 256 / (1088 - 320))
    assert absorption_pays_below(ModelConfig(), 1) < 1.01  # nothing is cached yet, nothing to rebuild
    assert absorption_pays_below(make("one head")) == float("inf")  # a latent shorter than a key always pays
    few, many = (absorption_pays_below(ModelConfig(), cached) for cached in (200, 2000))
    assert few < many < absorption_pays_below(ModelConfig())


@pytest.mark.parametrize("shape", ["odd", "no query latent", "the release's heads"])
@pytest.mark.parametrize("yarn", [True, False], ids=["yarn", "plain rope"])
def test_equals_the_attention_of_transformers(shape, yarn):
    peer = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    from transformers import DeepseekV3Config

    from deepseek_lit.config import to_json

    # transformers applies YaRN's m² from mscale_all_dim; the latent norms keep their own eps there too
    config = make(shape, yarn, fp8=False, rms_norm_eps=1e-2)
    fields = {name: value for name, value in to_json(config).items() if name not in ("architectures", "model_type")}
    theirs = DeepseekV3Config(**fields, attn_implementation="eager")
    module, mla, x_BSD, here = peer.DeepseekV3Attention(theirs, 1).eval(), random_mla(config), draw(config, 2, 11), positions(2, 0, 11)
    module.load_state_dict(mla.state_dict())
    rotation = peer.DeepseekV3RotaryEmbedding(theirs)(x_BSD, here)
    mask = torch.full((11, 11), float("-inf")).triu(1)[None, None]
    with torch.inference_mode():
        expected_BSD = module(x_BSD, position_embeddings=rotation, attention_mask=mask)[0]
    torch.testing.assert_close(mla(x_BSD, here, rope_at(config, here)), expected_BSD, atol=LOGITS, rtol=0)
