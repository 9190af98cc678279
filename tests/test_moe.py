"""Both ways to run experts against two nested loops, on routing that breaks dispatch code, and the whole layer against transformers'."""

import pytest
import torch
from tolerances import LOGITS
from torch import nn
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from deepseek_lit.config import ModelConfig
from deepseek_lit.fp8 import quantize
from deepseek_lit.moe import MLP, MoE, add_to_tokens, experts_grouped, experts_loop, sort_by_expert

ROUTINGS = {
    "one token": [[7, 0, 5]],
    "one token, twice the same neighbours": [[1, 2, 3], [1, 2, 3]],
    "one expert gets all": [[4, 1, 2], [5, 4, 6], [7, 0, 4]],
    "an expert nobody chose": [[0, 1, 2], [3, 4, 5], [6, 0, 1]],
    "only the ends": [[0, 7, 1], [7, 0, 6]],
    "no token": [],
    "many": torch.rand(50, 8, generator=torch.Generator().manual_seed(0)).topk(3).indices.tolist(),
}


def make_config(**changes) -> ModelConfig:
    sizes = dict(hidden_size=48, moe_intermediate_size=24, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)
    return ModelConfig(**{**sizes, **changes})


def make_moe(seed: int = 0, **changes) -> MoE:
    moe, generator = MoE(make_config(**changes)), torch.Generator().manual_seed(seed)
    for parameter in moe.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=generator)
    return moe


def make_case(name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    experts, generator = torch.tensor(ROUTINGS[name], dtype=torch.int64).view(-1, 3), torch.Generator().manual_seed(1)
    return torch.randn(len(experts), 48, generator=generator), torch.rand(len(experts), 3, generator=generator), experts


def experts_plain(x, weights, experts_SK, experts):
    rows = [sum(w * experts[e](x[s]) for w, e in zip(weights[s], experts_SK[s].tolist())) for s in range(len(x))]
    return torch.stack(rows) if rows else x


@pytest.mark.parametrize("name", ROUTINGS)
def test_loop_and_grouped_equal_the_plain_loop(name):
    moe, case = make_moe().requires_grad_(False), make_case(name)
    plain = experts_plain(*case, moe.experts)
    torch.testing.assert_close(experts_loop(*case, moe.experts), plain, atol=LOGITS, rtol=0)
    moe.stack()
    torch.testing.assert_close(experts_grouped(*case, *moe.stacked), plain, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("name", ROUTINGS)
def test_sorting_loses_nobody(name):
    x, weights, experts = make_case(name)
    order, count = sort_by_expert(experts, 8)
    assert sorted(order.tolist()) == list(range(experts.numel()))
    assert experts.flatten()[order].tolist() == [e for e, n in enumerate(count.tolist()) for _ in range(n)]
    torch.testing.assert_close(add_to_tokens(x[order // 3], weights, order), x * weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", [name for name in ROUTINGS if name != "no token"])
def test_gradients_of_the_loop(name):
    moe, (x, weights, experts) = make_moe(), make_case(name)
    grads = []
    for run in (experts_loop, experts_plain):
        moe.zero_grad()
        inputs = x.clone().requires_grad_(), weights.clone().requires_grad_()
        run(*inputs, experts, moe.experts).square().sum().backward()
        used = {e: expert.down_proj.weight.grad for e, expert in enumerate(moe.experts) if expert.down_proj.weight.grad is not None}
        assert used.keys() == set(experts.flatten().tolist())
        grads.append([*(i.grad for i in inputs), *(used[e] for e in sorted(used))])
    for by_loop, by_plain in zip(*grads):
        torch.testing.assert_close(by_loop, by_plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("bias", [0.0, -2.0, 3.0])
def test_layer_equals_transformers(bias, tokens, stacked):
    moe = make_moe().requires_grad_(False)
    moe.gate.e_score_correction_bias.copy_(bias + 0.2 * torch.randn(8, generator=torch.Generator().manual_seed(2)))
    c = moe.gate.config
    fields = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "n_group", "topk_group", "num_experts_per_tok", "routed_scaling_factor")
    peer = DeepseekV3MoE(DeepseekV3Config(**{name: getattr(c, name) for name in fields})).requires_grad_(False)
    peer.gate.load_state_dict(moe.gate.state_dict())
    peer.shared_experts.load_state_dict(moe.shared_experts.state_dict())
    peer.experts.gate_up_proj.copy_(torch.stack([torch.cat([e.gate_proj.weight, e.up_proj.weight]) for e in moe.experts]))
    peer.experts.down_proj.copy_(torch.stack([e.down_proj.weight for e in moe.experts]))
    if stacked:
        moe.stack()
    x = torch.randn(1, tokens, 48, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(moe(x), peer(x), atol=LOGITS, rtol=0)


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_shared_experts_are_added_once_and_unscaled(shared):
    moe = make_moe(n_shared_experts=shared).requires_grad_(False)
    for expert in moe.experts:
        expert.down_proj.weight.zero_()
    x = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(4))
    expected = moe.shared_experts(x) if shared else torch.zeros_like(x)
    torch.testing.assert_close(moe(x), expected)


def test_a_token_does_not_depend_on_its_batch():
    moe, x = make_moe().requires_grad_(False), torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(5))
    alone = torch.stack([torch.cat([moe(token[None, None])[0] for token in row]) for row in x])
    torch.testing.assert_close(moe(x), alone, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_the_result_has_the_type_of_the_input(tokens, dtype):
    moe = make_moe().requires_grad_(False).to(dtype)
    x = torch.randn(1, tokens, 48).to(dtype)
    assert moe(x).dtype == dtype and moe(x).shape == x.shape
    moe.stack()
    assert moe(x).dtype == dtype and moe(x).shape == x.shape


def test_experts_are_views_of_the_stack():
    moe, x = make_moe(), torch.randn(1, 9, 48, generator=torch.Generator().manual_seed(6))
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    moe.stack()
    assert moe.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in moe.state_dict().items())
    assert not any(parameter.requires_grad for parameter in moe.experts.parameters())  # nothing learns in silence or not at all
    old = moe(x)
    for expert in moe.experts:
        expert.down_proj.weight.mul_(-1)
    torch.testing.assert_close(moe(x) + old, 2 * moe.shared_experts(x), atol=1e-4, rtol=0)


def test_fp8_experts_run_in_the_loop_stacked_or_not():
    moe, plain = make_moe().requires_grad_(False), make_moe().requires_grad_(False)
    for expert, copy in zip(moe.experts, plain.experts):
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(expert, name)
            values, scales = quantize(linear.weight)
            linear.weight, linear.weight_scale_inv = nn.Parameter(values, False), nn.Parameter(scales, False)
            getattr(copy, name).weight.copy_(linear.plain_weight(torch.float32))
    x = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(moe(x), plain(x), atol=LOGITS, rtol=0)
    expected = moe(x)
    moe.stack()
    assert torch.equal(moe(x), expected) and moe.stacked[0].dtype == torch.float8_e4m3fn
    for linear, scale in zip((moe.experts[1].gate_proj, moe.experts[1].up_proj, moe.experts[1].down_proj), moe.scales):
        assert torch.equal(linear.weight_scale_inv, scale[1])
    plain.experts[2].up_proj.weight.data = plain.experts[2].up_proj.weight.double()
    with pytest.raises(ValueError, match="one dtype"):
        plain.stack()


@pytest.mark.parametrize("sizes", [{"hidden_size": 50}, {"moe_intermediate_size": 23}])
def test_odd_widths_run_in_the_loop_and_refuse_to_be_stacked(sizes):
    moe = make_moe(**sizes).requires_grad_(False)
    x = torch.randn(1, 3, moe.gate.config.hidden_size)
    weights, experts = moe.gate(x[0])
    torch.testing.assert_close(moe(x)[0], experts_plain(x[0], weights, experts, moe.experts) + moe.shared_experts(x[0]), atol=LOGITS, rtol=0)
    with pytest.raises(ValueError, match="16 bytes"):
        moe.stack()


def test_swiglu():
    mlp = MLP(4, 3).requires_grad_(False)
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        nn.init.normal_(linear.weight, generator=torch.Generator().manual_seed(8))
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(9))
    gate, up = x @ mlp.gate_proj.weight.T, x @ mlp.up_proj.weight.T
    torch.testing.assert_close(mlp(x), (gate / (1 + (-gate).exp()) * up) @ mlp.down_proj.weight.T)
