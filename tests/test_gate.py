"""The gate against loops in plain Python and against transformers' router, where the released weights would hide a mistake: see the traps of chapter 04."""

import dataclasses
import math

import pytest
import torch
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from deepseek_lit.config import ModelConfig
from deepseek_lit.gate import Gate, choose_experts, choose_groups

SHAPES = [  # experts, groups, groups kept, experts per token
    (16, 4, 2, 4),
    (16, 1, 1, 3),
    (12, 2, 1, 4),
    (64, 8, 4, 8),
    (24, 8, 3, 5),
    (256, 8, 4, 8),
]
BIASES = {"zero": (0, 0), "negative": (-3, 0.3), "around zero": (0, 0.5), "as released": (3, 0.3)}  # mean, spread


def make_gate(shape: tuple[int, ...], bias: str = "zero", **changes) -> Gate:
    experts, groups, kept, chosen = shape
    config = ModelConfig(hidden_size=40, n_routed_experts=experts, n_group=groups, topk_group=kept, num_experts_per_tok=chosen, **changes)
    generator = torch.Generator().manual_seed(sum(shape))
    gate = Gate(config).requires_grad_(False)
    gate.weight.normal_(0, 0.2, generator=generator)
    mean, spread = BIASES[bias]
    gate.e_score_correction_bias.copy_(mean + spread * torch.randn(experts, generator=generator))
    return gate


def tokens(count: int = 100) -> torch.Tensor:
    return torch.randn(count, 40, generator=torch.Generator().manual_seed(7))


def route_one(x: list[float], gate: Gate) -> dict[int, float]:
    """One token by the report's text, with lists and loops."""
    c, bias = gate.config, gate.e_score_correction_bias.tolist()
    scores = [1 / (1 + math.exp(-sum(a * b for a, b in zip(x, row)))) for row in gate.weight.tolist()]
    biased = [s + b for s, b in zip(scores, bias)]
    size = len(scores) // c.n_group
    worth = {g: sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(c.n_group)}
    kept = sorted(worth, key=worth.get)[-c.topk_group :]
    chosen = sorted((e for e in range(len(scores)) if e // size in kept), key=biased.__getitem__)[-c.num_experts_per_tok :]
    total = sum(scores[e] for e in chosen) if c.norm_topk_prob else 1
    return {e: c.routed_scaling_factor * scores[e] / total for e in chosen}


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("shape", SHAPES[:5])
def test_equal_to_loops(shape, bias, normalise):
    gate = make_gate(shape, bias, norm_topk_prob=normalise)
    weights, experts = gate(tokens(20))
    for x, row, ids in zip(tokens(20).tolist(), weights.tolist(), experts.tolist()):
        slow = route_one(x, gate)
        assert set(ids) == set(slow)
        assert [slow[e] for e in ids] == pytest.approx(row, abs=1e-5)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equal_to_transformers(shape, bias):
    gate = make_gate(shape, bias)
    c = gate.config
    fields = ("hidden_size", "n_routed_experts", "n_group", "topk_group", "num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob")
    peer = DeepseekV3TopkRouter(DeepseekV3Config(**{name: getattr(c, name) for name in fields}))
    peer.load_state_dict(gate.state_dict())
    with torch.no_grad():
        _, peer_weights, peer_experts = peer(tokens())
    weights, experts = gate(tokens())
    assert torch.equal(experts.sort(-1).values, peer_experts.sort(-1).values)
    dense, peer_dense = (torch.zeros(100, c.n_routed_experts).scatter(1, e, w) for e, w in ((experts, weights), (peer_experts, peer_weights)))
    torch.testing.assert_close(dense, peer_dense, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shift_of_all_biases_changes_nothing(shape):
    gate = make_gate(shape, "around zero")
    weights, experts = gate(tokens())
    for shift in (-8.0, 8.0):  # powers of two: the sums keep their order
        shifted = make_gate(shape, "around zero")
        shifted.e_score_correction_bias += shift
        shifted_weights, shifted_experts = shifted(tokens())
        same = (shifted_experts.sort(-1).values == experts.sort(-1).values).all(-1)
        assert same.float().mean() > 0.97  # float32 at 8 rounds scores to 1e-6, so that a rare tie may break the other way
        torch.testing.assert_close(shifted_weights.sort(-1).values[same], weights.sort(-1).values[same], atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_chosen_experts_are_distinct_and_eligible(shape):
    gate = make_gate(shape, "negative")
    biased = gate.scores(tokens()) + gate.e_score_correction_bias
    chosen = choose_experts(gate.scores(tokens()), gate.e_score_correction_bias, gate.config)
    eligible = choose_groups(biased, gate.config.n_group, gate.config.topk_group)
    assert eligible.gather(1, chosen).all()
    assert all(len(set(row)) == shape[3] for row in chosen.tolist())
    assert (eligible.sum(-1) == shape[0] // shape[1] * shape[2]).all()


def test_a_group_is_worth_its_best_two():
    biased = torch.tensor([[0.9, 0.1, 0.7, 0.6, 0.5, 0.5, 0.0, 0.0]])
    assert choose_groups(biased, 4, 1).tolist() == [[False, False, True, True, False, False, False, False]]


def test_product_is_float32_under_autocast_and_for_bfloat16_inputs():
    gate = make_gate((64, 8, 4, 8), "as released").to(torch.bfloat16)
    x = tokens().bfloat16()
    exact = (x.double() @ gate.weight.double().mT).sigmoid()
    with torch.autocast("cpu", torch.bfloat16):
        scores = gate.scores(x)
    assert scores.dtype == torch.float32
    assert (scores - exact).abs().max() < 1e-6  # a bfloat16 product is off by 1e-3
    weights, _ = gate(x)
    assert weights.dtype == torch.float32


def test_scores_that_underflow_give_zeros():
    gate = make_gate((16, 4, 2, 4))
    gate.weight.fill_(-10.0)
    weights, experts = gate(torch.full((3, 40), 10.0))
    assert (weights == 0).all() and experts.shape == (3, 4)


def test_no_tokens():
    weights, experts = make_gate((16, 4, 2, 4))(tokens(0))
    assert weights.shape == experts.shape == (0, 4)


def test_only_the_router_learns():
    gate = Gate(dataclasses.replace(make_gate((16, 4, 2, 4)).config))
    torch.nn.init.normal_(gate.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    weights, experts = gate(tokens(1))
    weights[0, 0].backward()
    learned = gate.weight.grad.abs().sum(-1).nonzero().flatten().tolist()
    assert learned == sorted(experts[0].tolist())
    assert gate.e_score_correction_bias.grad is None and "e_score_correction_bias" in dict(gate.named_parameters())
