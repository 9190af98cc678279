"""The C kernels against float64, and what happens around the compiler: none at all, two builds at a time."""

import copy
import os
import platform
import shlex
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from deepseek_lit import cpu, fp8
from deepseek_lit.config import ModelConfig, Yarn
from deepseek_lit.gate import Gate
from deepseek_lit.generate import decode, prefill
from deepseek_lit.mla import LatentCache, RMSNorm, attend_absorbed
from deepseek_lit.model import DeepSeekV3, init_weights
from deepseek_lit.moe import MLP, MoE
from deepseek_lit.rope import apply_rope

ROWS = [1, 2, 5, 6, 8, 9, 17]
COLUMNS = [1, 7, 16, 31, 33, 63, 127, 128, 129, 257]
needs_kernels = pytest.mark.skipif(cpu.kernels() is None, reason="no C compiler")


def poisoned(self, *shape, dtype=None):
    return torch.full(shape, -(2**40) if dtype == torch.int64 else float("nan"), dtype=dtype or self.dtype)


@pytest.fixture(autouse=True)
def poisoned_without_gradients(monkeypatch):
    """Results start as NaN, so that a number nobody wrote is seen."""
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    with torch.no_grad():
        yield


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and kernels that nobody has loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.kernels.cache_clear()
    yield tmp_path
    cpu.kernels.cache_clear()


@pytest.fixture
def hasty(fresh, monkeypatch):
    """A `cc` that does not optimise: it needs a tenth of the time, and these tests ask who builds, not how well."""
    script = fresh / "bin" / "cc"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec {shlex.quote(shutil.which("cc"))} "$@" -O0\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")


def assert_rounded(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor):
    """`y` is x @ Wᵀ in float64 up to one rounding to bfloat16 and the float32 sums, which lose digits of the summands."""
    exact, magnitude = x.double() @ weight.double().mT, x.double().abs() @ weight.double().abs().mT
    assert y.shape == exact.shape and y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-18 * magnitude).all()


def quantized(dense: torch.Tensor) -> tuple[tuple, torch.Tensor]:
    """An FP8 copy whose scales differ from block to block, and the plain weights it stands for."""
    weight, scale = fp8.quantize(dense.float() * (10.0 ** (torch.arange(len(dense)) // 128 * 2))[:, None])
    return (weight, scale), fp8.dequantize(weight, scale).bfloat16()


@needs_kernels
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_products_are_float64_rounded(rows, columns, kind):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    for out in (1, 5, 33, 129, 260):
        x, dense = torch.randn(rows, columns, generator=generator).bfloat16(), torch.randn(out, columns, generator=generator).bfloat16()
        matrix, plain = ((dense, None), dense) if kind == "bf16" else quantized(dense)
        assert_rounded(cpu.small_linear(x, *matrix), x, plain)


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (128, 128), (300, 64), (260, 1000)])
def test_decoding_is_dequantising(shape):
    (weight, scale), plain = quantized(torch.randn(shape))
    assert torch.equal(cpu.decode(weight, scale), plain)


@needs_kernels
def test_every_byte_and_scales_of_any_size():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None].contiguous()
    for factor in (1.0, 2.0**-100, 2.0**100, 3e-7):
        scale = torch.full((2, 1), factor)
        torch.testing.assert_close(cpu.decode(codes, scale), fp8.dequantize(codes, scale).bfloat16(), rtol=0, atol=0, equal_nan=True)


def routed_by_hand(x, weights, chosen, plain):
    """Every token through its experts in float64."""
    y = torch.zeros(x.shape, dtype=torch.double)
    for token in range(len(x)):
        for weight, e in zip(weights[token], chosen[token]):
            gate, up, down = (m.double() for m in plain[e])
            y[token] += weight * (down @ (torch.nn.functional.silu(gate @ x[token].double()) * (up @ x[token].double())))
    return y


@needs_kernels
@pytest.mark.parametrize("kind", ["bf16", "fp8", "mixed"])
@pytest.mark.parametrize("hidden, width", [(8, 8), (130, 70), (64, 129), (257, 200)])
@pytest.mark.parametrize("tokens, top, count", [(1, 1, 1), (1, 3, 5), (7, 2, 4), (40, 2, 3), (3, 4, 16)])
def test_experts_are_their_tokens_one_by_one(tokens, top, count, hidden, width, kind):
    torch.manual_seed(tokens * 100 + hidden)
    matrices, plain = [], []
    for e in range(count):
        made = [(torch.randn(shape) * 0.1).bfloat16() for shape in ((width, hidden), (width, hidden), (hidden, width))]
        both = [quantized(m) if kind == "fp8" or kind == "mixed" and (e + i) % 2 else ((m, None), m) for i, m in enumerate(made)]
        matrices.append(tuple(m for m, _ in both))
        plain.append([m for _, m in both])
    x, weights = torch.randn(tokens, hidden).bfloat16(), torch.rand(tokens, top) + 0.1
    chosen = torch.stack([torch.randperm(count)[:top] for _ in range(tokens)])
    if count == 3:
        chosen = torch.zeros_like(chosen)  # one expert gets all, the others none
    ours, exact = cpu.experts(x, weights, chosen, matrices), routed_by_hand(x, weights, chosen, plain)
    assert (ours.double() - exact).norm() <= 2**-7 * exact.norm() and ours.dtype == torch.bfloat16


@needs_kernels
def test_a_dense_layer_is_one_expert():
    mlp = MLP(130, 70)
    for layer in mlp.children():
        torch.nn.init.normal_(layer.weight, std=0.1)
    mlp, x = mlp.bfloat16(), torch.randn(2, 3, 130).bfloat16()
    exact = copy.deepcopy(mlp).double()(x.double())
    ours = mlp(x)
    assert torch.equal(ours, cpu.mlp(x, mlp.matrices())) and ours.shape == x.shape
    assert (ours.double() - exact).norm() <= 2**-7 * exact.norm()


@needs_kernels
def test_experts_that_change_are_noticed():
    config = ModelConfig(hidden_size=32, moe_intermediate_size=16, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=4, n_shared_experts=0)
    moe, x = MoE(config), torch.randn(1, 2, 32).bfloat16()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    moe = moe.bfloat16()
    before, table = moe(x), moe.known
    assert table is not None and torch.equal(moe(x), before) and moe.known is table
    moe.experts[2].down_proj.weight.data *= 2  # in place: the same memory
    changed = moe(x)
    assert not torch.equal(changed, before)
    for expert in moe.experts:  # new tensors everywhere, as after loading a state
        for layer in expert.children():
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone() * 0, requires_grad=False)
    assert not moe(x).any()
    moe.experts[3].up_proj.weight.data = moe.experts[3].up_proj.weight.data.mT.contiguous().mT
    moe.known = None
    assert moe.matrices() is None and not moe(x).any()  # unreadable from C: the plain loop


@needs_kernels
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("heads, nope, rope, value, latent", [(1, 8, 2, 8, 16), (3, 24, 8, 16, 40), (16, 12, 4, 20, 129), (9, 128, 64, 128, 512)])
@pytest.mark.parametrize("lengths, tokens", [([1], 1), ([5], 5), ([63, 2, 130], 1), ([7, 4], 3)])
def test_attention_is_the_absorbed_form(lengths, tokens, heads, nope, rope, value, latent, kind):
    torch.manual_seed(heads)
    batch, slots = len(lengths), max(lengths) + 3
    q = torch.randn(batch, tokens, heads, nope).bfloat16(), torch.randn(batch, tokens, heads, rope).bfloat16()
    cache = torch.full((batch, slots, latent), float("nan")).bfloat16(), torch.full((batch, slots, rope), float("nan")).bfloat16()
    for row, length in enumerate(lengths):
        for part in cache:
            part[row, :length] = torch.randn(length, part.shape[-1]).bfloat16()
    dense = (torch.randn(heads * (nope + value), latent) * latent**-0.5).bfloat16()
    kv_b, plain = ((dense, None), dense) if kind == "bf16" else quantized(dense)
    positions = torch.tensor([[length - tokens + s for s in range(tokens)] for length in lengths])
    ours = cpu.attend(q, tuple(part[:, : max(lengths)] for part in cache), kv_b, positions, (nope + rope) ** -0.5)
    up = plain.double().unflatten(0, (heads, -1)).split([nope, value], 1)
    for row, length in enumerate(lengths):
        seen = torch.arange(length) <= positions[row, :, None]
        exact = attend_absorbed(
            tuple(part[row : row + 1].double() for part in q), tuple(part[row : row + 1, :length].double() for part in cache), up, (nope + rope) ** -0.5, seen[None]
        )
        assert (ours[row].double() - exact[0]).norm() <= 2**-7 * exact.norm()


@needs_kernels
@pytest.mark.parametrize("rows, size", [(1, 1), (3, 7), (1, 1024), (20, 513)])
def test_the_norm_is_float64_rounded(rows, size):
    wide, weight = torch.randn(2, rows, size + 5).bfloat16() * 30, torch.rand(size).bfloat16()
    for x in (wide[..., :size], wide[..., :size].contiguous(), wide[0, :, 5:], wide[..., :size].mT.contiguous().mT):
        exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()[: x.shape[-1]]
        ours = cpu.rms_norm(x, weight, 1e-6)
        assert ours.shape == x.shape and ((ours.double() - exact).abs() <= 2**-8 * exact.abs()).all()


@needs_kernels
@pytest.mark.parametrize("batch, tokens, heads, size", [(1, 1, 1, 2), (2, 3, 5, 8), (1, 12, 16, 64)])
def test_rotation_is_complex_multiplication(batch, tokens, heads, size):
    wide, table = torch.randn(batch, tokens, heads, size + 6).bfloat16(), torch.polar(torch.ones(batch, tokens, size // 2), torch.randn(batch, tokens, size // 2) * 9)
    for x in (wide[..., 6:], wide[..., :size], wide[:, :, 0, 6:], wide[:, :, 0, :size].contiguous()):
        ours = apply_rope(x, table)
        exact = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous()) * table.view(batch, tokens, *[1] * (x.dim() - 3), -1)).flatten(-2)
        assert ours.shape == x.shape and ((ours.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()


@needs_kernels
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("experts, groups, keep, top", [(1, 1, 1, 1), (6, 1, 1, 3), (8, 8, 3, 3), (8, 4, 2, 4), (64, 8, 4, 8), (256, 8, 4, 8), (6, 2, 1, 2)])
def test_routes_are_the_gates(experts, groups, keep, top, normalise, monkeypatch):
    config = ModelConfig(
        hidden_size=72, n_routed_experts=experts, n_group=groups, topk_group=keep, num_experts_per_tok=top, norm_topk_prob=normalise, routed_scaling_factor=2.5
    )
    gate = Gate(config)
    torch.nn.init.normal_(gate.weight)
    gate.weight.data = gate.weight.bfloat16()
    for shift in (-3.0, 0.0, 2.0):  # biases that make every biased score negative, and the release's kind
        torch.nn.init.normal_(gate.e_score_correction_bias, shift, 0.1)
        for tokens in (1, 9, 33):
            x = torch.randn(tokens, 72).bfloat16() * 0.2
            weights, chosen = gate(x)
            with monkeypatch.context() as patched:
                patched.setattr(cpu, "serves", lambda x, *matrices: False)
                exact, expected = gate(x)
            assert torch.equal(chosen, expected) and chosen.dtype == torch.int64
            torch.testing.assert_close(weights, exact, rtol=1e-5, atol=1e-7)


@needs_kernels
def test_sizes_that_do_not_fit_never_reach_c():
    x, config = torch.randn(1, 2, 8).bfloat16(), ModelConfig(hidden_size=6, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2)
    with pytest.raises(RuntimeError):
        RMSNorm(6).bfloat16()(x)
    with pytest.raises(RuntimeError):
        Gate(config).bfloat16()(x[0])
    with pytest.raises(RuntimeError):
        apply_rope(x, torch.ones(1, 3, 4, dtype=torch.complex64))
    one = torch.polar(torch.ones(1, 1, 4), torch.ones(1, 1, 4))
    assert torch.equal(apply_rope(x, one), apply_rope(x, one.expand(1, 2, 4)))  # a table that is broadcast


@needs_kernels
def test_of_equal_scores_the_first_wins():
    weights, chosen = cpu.route(torch.zeros(2, 8).bfloat16(), torch.ones(8, 8).bfloat16(), torch.zeros(8), 4, 2, 3, True, 1.0)
    assert chosen.tolist() == [[0, 1, 2]] * 2 and torch.allclose(weights, torch.full((2, 3), 1 / 3))


def small_model(fp8_weights: bool = False, **changes) -> DeepSeekV3:
    """Random weights, bfloat16 or FP8, as `load_model` would leave them."""
    sizes = dict(
        vocab_size=64, hidden_size=96, num_hidden_layers=3, num_attention_heads=4, q_lora_rank=24, kv_lora_rank=40, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12,
        first_k_dense_replace=1, intermediate_size=200, moe_intermediate_size=40, n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, n_group=2, topk_group=1,
        num_nextn_predict_layers=0, fp8=False,
    )  # fmt: skip
    model = init_weights(DeepSeekV3(ModelConfig(**(sizes | changes))), 1)
    for layer in model.modules():
        if fp8_weights and isinstance(layer, fp8.Linear) and layer is not model.lm_head:
            weight, scale = fp8.quantize(layer.weight * 5)
            layer.weight, layer.weight_scale_inv = (torch.nn.Parameter(t, requires_grad=False) for t in (weight, scale))
    return model


def rounded(model: DeepSeekV3) -> DeepSeekV3:
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.float32 and "scale_inv" not in name and "bias" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


def speak(model: DeepSeekV3, dtype: torch.dtype) -> torch.Tensor:
    """The logits of two sequences: a prompt in chunks, then four steps."""
    cache = LatentCache(model.config, 2, 12, dtype=dtype)
    logits = [prefill(model, [[5, 7, 9, 11, 2], [3, 1]], cache, 3)] + [decode(model, [4 + i, 6], [5 + i, 2 + i], cache) for i in range(4)]
    return torch.stack(logits)


MODELS = {
    "the release's kind": {},
    "queries in one piece, one plain gate": dict(q_lora_rank=None, n_group=1, topk_group=1, n_shared_experts=0, norm_topk_prob=False),
    "dense": dict(first_k_dense_replace=3),
    "real head sizes, YaRN": dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, rope_scaling=Yarn()),
}


@needs_kernels
@pytest.mark.parametrize("fp8_weights", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_model_speaks_the_same_in_all_three_ways(kind, fp8_weights, monkeypatch):
    model, calls = small_model(fp8_weights, **MODELS[kind]), []
    reference, model = speak(model, torch.float32), rounded(model)
    original = cpu.WholeLayers.__call__
    with monkeypatch.context() as patched:
        patched.setattr(cpu.WholeLayers, "__call__", lambda self, *a: calls.append([known.index for known in self.known]) or original(self, *a))
        logits = {"whole": speak(model, torch.bfloat16)}
        assert calls == 6 * [[0, 1, 2]]  # two chunks of the prompt and four tokens, all layers in one call
        handle = model.model.layers[1].register_forward_hook(lambda *_: None)
        logits["layers"] = speak(model, torch.bfloat16)
        handle.remove()
        assert calls[6:] == 6 * [[0], [1], [2]] and torch.equal(logits["layers"], logits["whole"])
    monkeypatch.setattr(cpu, "whole_layers", lambda *_: None)
    logits["by modules"] = speak(model, torch.bfloat16)
    monkeypatch.setattr(cpu, "serves", lambda x, *matrices: False)
    logits["plain"] = speak(model, torch.bfloat16)
    away = {way: float((found - reference).norm() / reference.norm()) for way, found in logits.items()}
    assert max(away["whole"], away["by modules"]) < max(1.5 * away["plain"], 0.02), away


INSIDE = ["", "self_attn", "self_attn.q_b_proj", "self_attn.kv_a_layernorm", "input_layernorm", "mlp", "mlp.gate", "mlp.shared_experts", "mlp.shared_experts.up_proj"]


def new_step(model: DeepSeekV3, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Logits of the first token of an empty cache."""
    return decode(model, [3] * batch, [0] * batch, LatentCache(model.config, batch, 8, dtype=dtype))


@needs_kernels
@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("listen", ["hook", "pre-hook", "forward"])
def test_whoever_listens_to_a_module_hears_it(name, listen, monkeypatch):
    model, heard = rounded(small_model()), []
    before, module = new_step(model), model.get_submodule(f"model.layers.1.{name}".rstrip("."))
    with monkeypatch.context() as patched:
        if listen == "forward":
            forward = module.forward
            patched.setattr(module, "forward", lambda *a: heard.append(name) or forward(*a))
        else:
            register = module.register_forward_hook if listen == "hook" else module.register_forward_pre_hook
            handle = register(lambda *_: heard.append(name))
        assert (new_step(model) - before).norm() < 0.02 * before.norm()
    if listen != "forward":
        handle.remove()
    elif "forward" in module.__dict__:  # what monkeypatch leaves behind
        del module.forward
    assert heard == [name]
    assert torch.equal(new_step(model), before) and heard == [name]


@needs_kernels
def test_global_hooks_hear_every_module():
    model, heard = rounded(small_model()), set()
    new_step(model)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: heard.add(type(module).__name__))
    new_step(model)
    handle.remove()
    assert heard >= {"Layer", "MLA", "Gate", "MoE", "RMSNorm"}


@needs_kernels
def test_a_hook_that_comes_in_the_middle_of_a_reply_is_heard():
    model, heard = rounded(small_model()), []
    cache, other = (LatentCache(model.config, 1, 8, dtype=torch.bfloat16) for _ in range(2))
    for position in range(3):
        decode(model, [3], [position], cache)
        before = decode(model, [3], [position], other)
    with model.model.layers[2].mlp.gate.register_forward_hook(lambda *_: heard.append(1)):
        listened = decode(model, [3], [2], cache)
    assert heard == [1] and (listened - before).norm() < 0.02 * before.norm()
    assert torch.equal(decode(model, [3], [2], cache), decode(model, [3], [2], other)) and heard == [1]


@needs_kernels
def test_layers_that_change_are_noticed():
    model = rounded(small_model())
    layer, decoder = model.model.layers[1], model.model
    before, whole = new_step(model), decoder.whole
    assert torch.equal(new_step(model), before) and decoder.whole is whole  # found once
    layer.self_attn.o_proj.weight.data *= 2  # in place: the same memory
    changed = new_step(model)
    assert decoder.whole is whole and not torch.equal(changed, before)
    layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight.data / 2  # elsewhere
    assert torch.equal(new_step(model), before) and decoder.whole is not whole
    layer.mlp.shared_experts.down_proj.weight = torch.nn.Parameter(torch.zeros(96, 80).bfloat16(), requires_grad=False)
    assert not torch.equal(new_step(model), before)
    layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight.data.mT.contiguous().mT  # C cannot read it
    assert new_step(model).isfinite().all() and not decoder.whole.readable and not layer.whole.readable and decoder.layers[2].whole.readable


class Louder(torch.nn.Module):
    """Somebody else's module in the place of a projection."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.weight, self.weight_scale_inv = inner, inner.weight, None

    def forward(self, x):
        return 3 * self.inner(x)


@needs_kernels
@pytest.mark.parametrize("name", ["self_attn.o_proj", "mlp.gate", "mlp.experts.7.up_proj"])
def test_modules_of_others_are_called(name):
    model = rounded(small_model(n_group=1, topk_group=1, num_experts_per_tok=8))
    layer = model.model.layers[1]
    parent, leaf = layer.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    setattr(parent, leaf, Louder(parent.get_submodule(leaf)) if leaf != "gate" else type("Other", (Gate,), {})(model.config).bfloat16())
    if leaf == "gate":
        torch.nn.init.zeros_(parent.gate.weight)
    assert new_step(model).isfinite().all() and not layer.whole.readable and model.model.layers[2].whole.readable


@needs_kernels
def test_copies_of_a_model_find_their_own_weights(tmp_path):
    model = rounded(small_model())
    before = new_step(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert other.model.whole is None
        for parameter in model.parameters():
            assert not any(parameter.data_ptr() == p.data_ptr() for p in other.parameters())
        assert torch.equal(new_step(other), before) and other.model.whole.readable


@needs_kernels
def test_caches_that_do_not_fit_are_not_handed_to_c():
    model = rounded(small_model())
    new_step(model)
    with pytest.raises(RuntimeError, match="dtype"):  # as the plain path says
        new_step(model, dtype=torch.float32)
    cache = LatentCache(model.config, 1, 8, dtype=torch.bfloat16)
    for position in (8, 1000):
        with pytest.raises(IndexError):
            decode(model, [3], [position], cache)
    whole, x = model.model.whole, torch.zeros(1, 1, 96).bfloat16()
    with pytest.raises(IndexError, match="from -1 to -1 .* 8 slots"):
        whole(x, torch.tensor([[-1]]), torch.ones(1, 1, 4, dtype=torch.complex64), cache)
    assert not cache.c_kv.any()


@needs_kernels
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of one kind")
@pytest.mark.parametrize("march, needed", [("x86-64", "sse2"), ("x86-64-v3", "avx2")])
def test_kernels_for_other_processors(march, needed, fresh, monkeypatch):
    """Built without the instructions that this processor may have, and without optimisation, which takes less time and changes no result."""
    other, run = {"-march=native": f"-march={march}", "-O3": "-O0"}, subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: run([other.get(part, part) for part in command], **options))
    if needed not in cpu.processor():
        pytest.skip(f"this processor lacks {needed}")
    for fp8_weights in (False, True):
        model = small_model(fp8_weights)
        reference, model = speak(model, torch.float32), rounded(model)
        whole = speak(model, torch.bfloat16)
        assert model.model.whole.readable
        with monkeypatch.context() as patched:
            patched.setattr(cpu, "serves", lambda x, *matrices: False)
            away = (speak(model, torch.bfloat16) - reference).norm()
        assert (whole - reference).norm() < max(1.5 * away, 0.02 * reference.norm())


@needs_kernels
def test_leading_dimensions_and_strides():
    x = torch.randn(3, 2, 300).bfloat16().transpose(0, 1)
    (weight, scale), plain = quantized(torch.randn(130, 300))
    assert_rounded(cpu.small_linear(x, weight, scale), x, plain)


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_is_passed_on(bad):
    x, weight = torch.ones(3, 40).bfloat16(), torch.ones(7, 40).bfloat16()
    x[1, 39] = bad
    wide, (quantized, scale) = torch.ones(3, 40).bfloat16(), fp8.quantize(torch.ones(7, 40))
    wide[1, 39] = bad
    for y in (cpu.small_linear(x, weight), cpu.small_linear(wide, quantized, scale)):
        assert torch.equal(y[[0, 2]], torch.full((2, 7), 40.0).bfloat16())
        assert torch.equal(y[1].isnan(), torch.full((7,), bad != bad)) and not y[1].isfinite().any()


@needs_kernels
def test_which_products_are_taken():
    most = cpu.MAX_ROWS[torch.bfloat16]
    x, weight = torch.ones(most, 8).bfloat16(), torch.ones(4, 8).bfloat16()
    eight_bit, scale = weight.to(torch.float8_e4m3fn), torch.ones(1, 1)
    assert cpu.takes(x, weight) and cpu.takes(x.view(2, -1, 8), weight) and cpu.takes(x, eight_bit, scale)
    assert not cpu.takes(torch.ones(most + 1, 8).bfloat16(), weight)
    assert not cpu.takes(x[:0], weight)
    assert not cpu.takes(x.float(), weight) and not cpu.takes(x, weight.float())
    assert not cpu.takes(x, weight.mT.contiguous().mT)
    assert not cpu.takes(x, torch.ones(4, 9).bfloat16())
    assert not cpu.takes(x, weight.to("meta"))
    assert not cpu.takes(x, eight_bit) and not cpu.takes(x, eight_bit, scale.double())
    with torch.enable_grad():
        assert not cpu.takes(x, weight)


@pytest.mark.parametrize("shape", [(2, 9), (0, 8)])
def test_shapes_that_the_kernels_refuse_take_the_plain_path(shape):
    x, weight = torch.ones(shape).bfloat16(), torch.ones(4, 8).bfloat16()
    if shape[0]:
        with pytest.raises(RuntimeError, match="shapes"):
            fp8.linear(x, weight)
    else:
        assert fp8.linear(x, weight).shape == (0, 4)


def test_without_a_compiler_the_plain_path_and_one_warning(fresh, monkeypatch):
    monkeypatch.setenv("PATH", "")
    x, dense = torch.randn(2, 200).bfloat16(), torch.randn(130, 200)
    weight, scale = fp8.quantize(dense)
    with pytest.warns(UserWarning, match="there is no C compiler cc.*PyTorch's path") as caught:
        plain, quantized = fp8.linear(x, dense.bfloat16()), fp8.linear(x, weight, scale)
    assert len(caught) == 1 and cpu.kernels() is None
    torch.testing.assert_close(plain.double(), x.double() @ dense.bfloat16().double().mT, rtol=2**-7, atol=0.05)
    torch.testing.assert_close(quantized.double(), x.double() @ fp8.dequantize(weight, scale, torch.float64).mT, rtol=2**-7, atol=0.3)


def test_a_compiler_that_fails_and_a_cache_that_cannot_be_written(fresh, monkeypatch):
    (fresh / "cc").write_text("#!/bin/sh\nexit 1\n")
    (fresh / "cc").chmod(0o755)
    with monkeypatch.context() as patched, pytest.warns(UserWarning, match="failed with CalledProcessError"):
        patched.setenv("PATH", str(fresh))
        assert cpu.kernels() is None
    assert not list((fresh / "deepseek_lit").iterdir())
    cpu.kernels.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(fresh / "cc"))  # a file where a folder should be
    with pytest.warns(UserWarning, match="no compiled kernels"):
        assert cpu.kernels() is None


@needs_kernels
def test_what_is_in_the_cache_needs_no_compiler(hasty, monkeypatch):
    cpu.kernels()
    cpu.kernels.cache_clear()
    monkeypatch.setenv("PATH", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.kernels() is not None


def test_a_broken_library_in_the_cache(fresh, monkeypatch):
    def build(source, library):
        library.parent.mkdir()
        library.write_bytes(b"not a library")

    monkeypatch.setattr(cpu, "build", build)
    with pytest.warns(UserWarning, match="no compiled kernels"):
        assert cpu.kernels() is None


@needs_kernels
def test_processes_that_build_at_the_same_time(fresh, hasty):
    code = """
import sys, torch
from deepseek_lit import cpu
sys.stdin.readline()  # until all are ready
torch.set_grad_enabled(False)
print(cpu.small_linear(torch.ones(1, 40).bfloat16(), torch.ones(3, 40).bfloat16()).tolist())
"""
    command, environment = [sys.executable, "-W", "error", "-c", code], os.environ | {"XDG_CACHE_HOME": str(fresh)}
    started = [
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate() for process in started] == [("[[40.0, 40.0, 40.0]]\n", "")] * 2
    assert [file.suffix for file in (fresh / "deepseek_lit").iterdir()] == [".so"]
