"""The whole model through the Triton kernels, as on a GPU: here under Triton's interpreter, where there is one on the GPU itself."""

import pytest
import torch
from models import random_model

from deepseek_lit import cpu, fp8
from deepseek_lit.checkpoint import load_model
from deepseek_lit.config import ModelConfig
from deepseek_lit.generate import decode, prefill
from deepseek_lit.mla import LatentCache
from deepseek_lit.mapped import MappedMoE, stack_slots
from deepseek_lit.moe import MoE

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernels(monkeypatch):
    """Every dispatch chooses the Triton kernels; `calls` counts which of them ran."""
    from deepseek_lit.kernels import gemm, mla, moe

    calls = dict.fromkeys(["linear", "decode_attention", "prefill_attention", "experts", "gate_topk"], 0)

    def counted(module, name):
        original = getattr(module, name)

        def run(*arguments):
            calls[name] += 1
            return original(*arguments)

        monkeypatch.setattr(module, name, run)

    for module, names in {gemm: ["linear"], mla: ["decode_attention", "prefill_attention"], moe: ["experts", "gate_topk"]}.items():
        for name in names:
            counted(module, name)
    monkeypatch.setattr(fp8, "on_gpu", lambda x: x.dtype == torch.bfloat16 and not torch.is_grad_enabled())
    monkeypatch.setattr(cpu, "serves", lambda x, *matrices: False)
    return calls


def greedy(model, prompts: list[list[int]], steps: int) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits of every step and the tokens chosen, with prompts of different lengths in one batch."""
    cache = LatentCache(model.config, len(prompts), 64, DEVICE, torch.bfloat16)
    logits = [prefill(model, prompts, cache, 8)]
    for step in range(steps):
        logits.append(decode(model, logits[-1].argmax(-1).tolist(), [len(p) + step for p in prompts], cache))
    return torch.stack(logits), torch.stack(logits).argmax(-1).tolist()


def stacked(model):
    for module in model.modules():
        if isinstance(module, MoE):
            module.stack()
    return model


@pytest.mark.parametrize("eight_bit", [False, True], ids=["bf16", "fp8"])
def test_logits_agree_with_the_torch_paths(eight_bit, kernels, monkeypatch):
    config = ModelConfig(
        vocab_size=96, hidden_size=160, num_hidden_layers=2, num_attention_heads=3, q_lora_rank=24, kv_lora_rank=40, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16,
        first_k_dense_replace=1, intermediate_size=136, moe_intermediate_size=48, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, n_group=4, topk_group=2,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    model = random_model(config, 3).to(DEVICE).bfloat16().requires_grad_(False)
    for module in model.modules():
        if eight_bit and isinstance(module, fp8.Linear) and module is not model.lm_head:
            weight, scale = fp8.quantize(module.weight)
            module.weight, module.weight_scale_inv = (torch.nn.Parameter(t, requires_grad=False) for t in (weight, scale))
    prompts = [[5, 7, 9, 11, 2, 3], [3]]
    triton, _ = greedy(stacked(model), prompts, 1)
    ran = dict(kernels)
    assert all(ran[name] for name in ran if name != "linear" or eight_bit), ran
    monkeypatch.setattr(fp8, "on_gpu", lambda x: False)
    plain, _ = greedy(model, prompts, 1)
    assert kernels == ran and triton.isfinite().all()
    assert (triton - plain).norm() / plain.norm() < (0.1 if eight_bit else 0.03)  # FP8: activations are quantised too


def test_the_bundled_checkpoint_speaks_the_same(kernels, monkeypatch):
    model = load_model(dtype=torch.bfloat16, device=DEVICE)
    prompt = list(range(100, 106))
    _, triton = greedy(stacked(model), [prompt], 1)
    assert all(kernels.values())
    monkeypatch.setattr(fp8, "on_gpu", lambda x: False)
    _, plain = greedy(model, [prompt], 1)
    assert triton == plain


def test_slots_of_the_expert_cache_feed_the_kernels(kernels):
    """Chapter 22's slots stand where a layer's experts would, and are filled as they are asked for: the same bits."""
    model = load_model(placement="mapped", expert_memory=10**9)
    for source in [module.source for module in model.modules() if isinstance(module, MappedMoE)]:
        source.stacked, source.scales = stack_slots(source.experts)
    found, expected = (greedy(m, [[5, 6]], 1)[0] for m in (model, stacked(load_model())))
    assert kernels["experts"] and torch.equal(found, expected)
