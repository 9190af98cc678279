"""Expert kernels against plain references, into memory full of NaN, under Triton's interpreter or on a GPU; and that they compile for GPUs that are not here."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from deepseek_lit.config import ModelConfig
from deepseek_lit.fp8 import dequantize, quantize
from deepseek_lit.gate import Gate
from deepseek_lit.kernels import moe
from deepseek_lit.kernels.moe import experts, gate_topk, gated_product, grouped_product, permute, rows_per_tile, unpermute
from deepseek_lit.kernels.quant import quantize_activations
from tolerances import FP8_PRODUCT, KERNEL_FP32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody has written holds NaN, or the largest integer, here and inside the package."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.empty(3, dtype=torch.float8_e4m3fn).float().isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(shape) * scale).to(DEVICE, dtype)


def routed(tokens: int, top_k: int, n_experts: int) -> torch.Tensor:
    """Distinct experts for each token."""
    return torch.rand(tokens, n_experts).argsort(-1)[:, :top_k].contiguous().to(DEVICE)


def stacked(experts_: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random expert matrices [E, N, K] in e4m3, their scales, and the float64 matrices that they stand for."""
    weights, scales = zip(*[quantize(torch.randn(n, k) * k**-0.5) for _ in range(experts_)])
    plain = torch.stack([dequantize(w, s) for w, s in zip(weights, scales)]).double()
    return torch.stack([w.view(torch.uint8) for w in weights]).view(torch.float8_e4m3fn).to(DEVICE), torch.stack(scales).to(DEVICE), plain


def plain_rows(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.double().cpu() * scale.double().cpu().repeat_interleave(128, -1)[:, : x.shape[-1]]


def by_row(x_PK: torch.Tensor, weights_ENK: torch.Tensor, expert_P: torch.Tensor) -> torch.Tensor:
    """Each row times its own expert's matrix, in float64 on the CPU."""
    rows = [weights_ENK[e].double().cpu() @ x for x, e in zip(x_PK.double().cpu(), expert_P.tolist())]
    return torch.stack(rows) if rows else torch.empty(0, weights_ENK.shape[1], dtype=torch.float64)


def error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative Frobenius error; not a number if the result holds one."""
    return ((result.double().cpu() - reference).norm() / reference.norm()).item() if len(reference) else 0.0


# experts, groups, groups kept, experts per token
GATES = [(16, 4, 2, 4), (16, 1, 1, 3), (12, 2, 1, 4), (24, 8, 3, 5), (8, 8, 4, 3), (64, 8, 4, 6), (256, 8, 4, 8), (5, 1, 1, 5)]


@pytest.mark.parametrize("mean", [-3.0, 0.0, 3.0])
@pytest.mark.parametrize("shape", GATES)
def test_gate_equals_the_model(shape, mean):
    E, G, kept, K = shape
    for normalise in (True, False):
        config = ModelConfig(hidden_size=8, n_routed_experts=E, n_group=G, topk_group=kept, num_experts_per_tok=K, norm_topk_prob=normalise)
        gate = Gate(config).requires_grad_(False).to(DEVICE)
        nn.init.normal_(gate.weight, std=0.4)
        gate.e_score_correction_bias.normal_(mean, 0.3)
        x = randn(4, 8)
        weights, chosen = gate_topk(gate.scores(x), gate.e_score_correction_bias, G, kept, K, normalise, config.routed_scaling_factor)
        expected_weights, expected = gate(x)
        assert chosen.dtype == torch.int64 and torch.equal(chosen, expected)
        torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("shape", GATES[:5])
def test_gate_gives_ties_to_the_lower_index(shape):
    E, G, kept, K = shape
    size = E // G
    scores, bias = torch.randint(1, 4, (8, E)) / 4, torch.randint(-4, 2, (E,)) / 4  # few values, exact sums: ties everywhere
    _, chosen = gate_topk(scores.to(DEVICE), bias.to(DEVICE), G, kept, K, True, 1.0)
    for row, ids in zip((scores + bias).tolist(), chosen.tolist()):
        groups = sorted(range(G), key=lambda g: (-sum(sorted(row[g * size : (g + 1) * size])[-2:]), g))[:kept]
        eligible = [e for e in range(E) if e // size in groups]
        assert ids == sorted(eligible, key=lambda e: (-row[e], e))[:K]


def test_gate_on_scores_that_are_zero_or_no_numbers():
    scores = torch.rand(5, 16, device=DEVICE)
    scores[1], scores[2], scores[3, 4] = 0.0, NAN, NAN
    scores[4] = torch.full((16,), -1, dtype=torch.int32).view(torch.float32)  # the other NaN, all bits set
    weights, chosen = gate_topk(scores, torch.zeros(16, device=DEVICE), 4, 2, 4, True, 2.5)
    assert all(len(set(row)) == 4 and 0 <= min(row) <= max(row) < 16 for row in chosen.tolist())
    assert (weights[1] == 0).all() and weights[2:].isnan().any(-1).all()
    alone, _ = gate_topk(scores[:1], torch.zeros(16, device=DEVICE), 4, 2, 4, True, 2.5)
    assert torch.equal(weights[:1], alone)
    assert gate_topk(scores[:0], torch.zeros(16, device=DEVICE), 4, 2, 4, True, 2.5)[0].shape == (0, 4)


# tokens, experts per token, experts
ROUTINGS = [(0, 4, 16), (1, 1, 1), (1, 8, 256), (127, 1, 5), (64, 2, 300), (43, 3, 7), (129, 1, 2), (600, 4, 16)]


def check_plan(plan: moe.Plan, experts_SK: torch.Tensor, n_experts: int) -> None:
    flat = experts_SK.flatten().cpu()
    order, count = flat.argsort(stable=True), flat.bincount(minlength=n_experts)
    assert torch.equal(plan.order_P.cpu().long(), order) and torch.equal(plan.ends_E.cpu().long(), count.cumsum(0))
    assert torch.equal(plan.place_SK.flatten().cpu().long(), order.argsort()) and plan.place_SK.shape == experts_SK.shape
    starts, ends, covered = (count.cumsum(0) - count).tolist(), count.cumsum(0).tolist(), []
    tiles = plan.tiles_T2.tolist()
    used = [tile for tile in tiles if tile[0] >= 0]
    assert tiles[: len(used)] == used and all(e == -1 for e, _ in tiles[len(used) :])  # idle ones at the end
    for e, first in used:
        assert first >= starts[e] and (first - starts[e]) % plan.rows_per_tile == 0
        covered += range(first, min(first + plan.rows_per_tile, ends[e]))
    assert covered == list(range(flat.numel()))  # every row once, in order


@pytest.mark.parametrize("routing", ROUTINGS, ids=str)
def test_permute_is_a_stable_sort_and_its_tiles_cover_every_row_once(routing):
    tokens, top_k, n_experts = routing
    experts_SK = routed(tokens, top_k, n_experts)
    check_plan(permute(experts_SK, n_experts), experts_SK, n_experts)
    check_plan(permute(experts_SK, n_experts, 64), experts_SK, n_experts)


@pytest.mark.parametrize("pairs", [1, 127, 128, 129])
def test_permute_when_one_expert_gets_all_and_when_the_bound_is_reached(pairs):
    experts_SK = torch.full((pairs, 1), 2, device=DEVICE)
    check_plan(permute(experts_SK, 5), experts_SK, 5)
    worst_SK = torch.tensor([0, 1, 2, 3] + [4] * (pairs - 1), device=DEVICE)[:, None]
    plan = permute(worst_SK, 5, 16)
    check_plan(plan, worst_SK, 5)
    assert len(plan.tiles_T2) == 5 + (pairs - 2) // 16 and (plan.tiles_T2[:, 0] >= 0).sum() == 4 + math.ceil((pairs - 1) / 16)


def test_tiles_suit_the_batch():
    assert [rows_per_tile(8 * batch, 256) for batch in (1, 512, 1024, 2048, 4096, 100_000)] == [16, 16, 32, 64, 128, 128]


# rows of each expert, N, K, rows of a tile
PRODUCTS = [
    ([1], 1, 128, 16),
    ([0, 127, 0], 72, 200, 16),
    ([128, 0, 1], 129, 128, 128),
    ([3, 129, 0, 5], 200, 136, 64),
    ([17, 16, 0, 15], 130, 300, 32),
    ([0, 0, 0], 64, 64, 16),
]


def planned(rows: list[int], tile: int) -> tuple[moe.Plan, torch.Tensor]:
    expert_P = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows)).to(DEVICE)
    return permute(expert_P[:, None], len(rows), tile), expert_P


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_grouped_product_of_plain_weights(case):
    rows, n, k, tile = case
    plan, expert_P = planned(rows, tile)
    for dtype in (torch.bfloat16, torch.float32):
        x, weights = randn(sum(rows), k, dtype=dtype), randn(len(rows), n, k, scale=k**-0.5, dtype=dtype)
        result = grouped_product(x, weights, plan, dtype=torch.float32)
        assert result.shape == (sum(rows), n) and error(result, by_row(x, weights, expert_P)) < KERNEL_FP32


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_grouped_product_of_fp8_weights(case):
    rows, n, k, tile = case
    plan, expert_P = planned(rows, tile)
    weights, scale, plain = stacked(len(rows), n, k)
    spread = torch.logspace(-3, 3, max(sum(rows), 1))[: sum(rows), None].to(DEVICE)  # every row its own size: scales must go to their rows
    x = randn(sum(rows), k) * spread
    q, q_scale = quantize_activations(x)
    results = {"FP8": (grouped_product(q, weights, plan, q_scale, scale, torch.float32), plain_rows(q, q_scale))}
    results["weight-only"] = (grouped_product(x.bfloat16(), weights, plan, None, scale, torch.float32), x.bfloat16())
    for name, (result, operand) in results.items():
        reference = by_row(operand, plain, expert_P)
        assert error(result / spread, reference / spread.cpu()) < FP8_PRODUCT, name


def test_grouped_product_rounds_to_the_nearest_bfloat16():
    plan, expert_P = planned([5, 20], 16)
    x, weights = randn(25, 64), randn(2, 40, 64)
    exact = grouped_product(x, weights, plan, dtype=torch.float32)
    assert torch.equal(grouped_product(x, weights, plan), exact.bfloat16())


def test_rows_that_are_no_numbers_stay_alone():
    plan, expert_P = planned([5, 20, 3], 16)
    weights, scale, _ = stacked(3, 40, 200)
    x = randn(28, 200)
    q, q_scale = quantize_activations(x)
    x[expert_P == 1] = NAN
    q_scale[expert_P == 1] = NAN  # Triton's interpreter reads the e4m3 NaN as 480
    for result in (grouped_product(x, randn(3, 40, 200), plan), grouped_product(q, weights, plan, q_scale, scale), grouped_product(x, weights, plan, None, scale)):
        assert torch.equal(result.isnan().all(1), expert_P == 1) and torch.equal(result.isnan().any(1), expert_P == 1)


def test_experts_may_lie_apart_in_memory():
    plan, expert_P = planned([4, 9], 16)
    x, both = randn(13, 128), randn(2, 2 * 64, 128)
    assert error(grouped_product(x, both[:, 64:], plan, dtype=torch.float32), by_row(x, both[:, 64:], expert_P)) < KERNEL_FP32


@pytest.mark.skipif(DEVICE == "cuda", reason="counts on memory that costs nothing until it is touched")
def test_addresses_beyond_32_bits():
    torch.use_deterministic_algorithms(False)  # do not fill 2 GiB
    n_experts, stride = 65, 2**25
    weights = torch.empty(n_experts * stride, dtype=torch.uint8).as_strided((n_experts, 8, 128), (stride, 128, 1))
    torch.use_deterministic_algorithms(True, warn_only=True)
    quantized, scale = quantize(torch.randn(8, 128))
    weights[64] = quantized.view(torch.uint8)
    plan = permute(torch.tensor([[64]]), n_experts)
    x = randn(1, 128)
    result = grouped_product(x, weights.view(torch.float8_e4m3fn), plan, None, torch.stack([scale] * n_experts), torch.float32)
    assert error(result, x.double() @ dequantize(quantized, scale).double().T) < FP8_PRODUCT


@pytest.mark.parametrize("tokens, top_k, D, width, tile", [(1, 4, 200, 72, 16), (43, 3, 128, 129, 64), (20, 4, 136, 128, 32)])
def test_gated_product(tokens, top_k, D, width, tile):
    experts_SK = routed(tokens, top_k, 6)
    plan = permute(experts_SK, 6, tile)
    expert_P = experts_SK.flatten()[plan.order_P.long()]
    (gate, gate_scale, gate_plain), (up, up_scale, up_plain) = stacked(6, width, D), stacked(6, width, D)
    x = randn(tokens, D)
    q, q_scale = quantize_activations(x)

    def reference(x_SD):
        x_PD = x_SD[plan.order_P.long().cpu() // top_k]
        return F.silu(by_row(x_PD, gate_plain, expert_P)) * by_row(x_PD, up_plain, expert_P)

    h, h_scale = gated_product(q, gate, up, plan, q_scale, gate_scale, up_scale)
    expected = reference(plain_rows(q, q_scale))
    assert h.dtype == torch.float8_e4m3fn and h_scale.shape == (len(expected), math.ceil(width / 128))
    amax = F.pad(expected, (0, -width % 128)).unflatten(1, (-1, 128)).abs().amax(-1)
    torch.testing.assert_close(h_scale.cpu().double(), amax.clamp(min=1e-4) / 448, rtol=1e-5, atol=0)
    by_reference = quantize_activations(expected.float().to(DEVICE))
    assert error(plain_rows(h, h_scale), plain_rows(*by_reference)) < FP8_PRODUCT

    h, none = gated_product(x, gate, up, plan, None, gate_scale, up_scale)
    assert none is None and error(h, reference(x.cpu())) < FP8_PRODUCT


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_unpermute(dtype, tolerance):
    experts_SK, weights_SK = routed(30, 4, 9), torch.rand(30, 4, device=DEVICE)
    plan, out_PD = permute(experts_SK, 9), randn(120, 1030, dtype=dtype)
    home = unpermute(out_PD, weights_SK, plan)
    answers_SKD = out_PD.double()[plan.place_SK.long()]
    assert home.dtype == dtype and error(home, torch.einsum("sk,skd->sd", weights_SK.double(), answers_SKD).cpu()) < tolerance
    assert unpermute(out_PD[:0], weights_SK[:0], permute(experts_SK[:0], 9)).shape == (0, 1030)


def layer_reference(x_SD, weights_SK, experts_SK, gate, up, down, quantized: bool = False) -> torch.Tensor:
    """Chapter 05's plain loop in float64; with `quantized`, rows are rounded to FP8 where the layer rounds them."""
    out_SD = torch.zeros(x_SD.shape, dtype=torch.float64)
    rounded = (lambda x: plain_rows(*quantize_activations(x.float()[None].to(DEVICE)))[0]) if quantized else (lambda x: x.double().cpu())
    for s, chosen in enumerate(experts_SK.tolist()):
        x = rounded(x_SD[s])
        for weight, e in zip(weights_SK[s].double().cpu(), chosen):
            out_SD[s] += weight * (down[e] @ rounded(F.silu(gate[e] @ x) * (up[e] @ x)))
    return out_SD


LAYERS = {"one token": (1, 3, 6), "uneven": (9, 3, 4), "many experts idle": (3, 1, 64), "nobody": (0, 3, 6)}


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, monkeypatch):
    tokens, top_k, n_experts = LAYERS[name]
    experts_SK, weights_SK, x = routed(tokens, top_k, n_experts), torch.rand(tokens, top_k, device=DEVICE), randn(tokens, 136)
    stacks = [stacked(n_experts, n, k) for n, k in ((72, 136), (72, 136), (136, 72))]
    weights, scales, plain = ([stack[i] for stack in stacks] for i in range(3))

    exact = layer_reference(x, weights_SK, experts_SK, *plain)
    assert error(experts(x, weights_SK, experts_SK, *[p.float().to(DEVICE) for p in plain]), exact) < KERNEL_FP32
    if moe.multiplies_fp8(x.device):
        rounded = layer_reference(x, weights_SK, experts_SK, *plain, quantized=True)
        assert error(experts(x, weights_SK, experts_SK, *weights, tuple(scales)), rounded) < FP8_PRODUCT
        assert tokens == 0 or error(rounded, exact) > 0.01  # it is another path, not the one above

    monkeypatch.setattr(moe, "multiplies_fp8", lambda device: False)
    monkeypatch.setattr(moe, "announce_weight_only", lambda device: None)
    assert error(experts(x, weights_SK, experts_SK, *weights, tuple(scales)), exact) < FP8_PRODUCT
    half = experts(x.bfloat16(), weights_SK, experts_SK, *weights, tuple(scales))
    assert half.dtype == torch.bfloat16 and half.shape == x.shape and error(half, exact) < 0.01


def test_padding_tokens_do_not_leak():
    stacks = [stacked(6, n, k) for n, k in ((72, 136), (72, 136), (136, 72))]
    weights, scales = [w for w, _, _ in stacks], tuple(s for _, s, _ in stacks)
    experts_SK, weights_SK, x = routed(7, 2, 6), torch.rand(7, 2, device=DEVICE), randn(7, 136)
    padded = torch.cat([x, torch.full((5, 136), NAN, device=DEVICE)])
    padded_weights, padded_experts = torch.cat([weights_SK, torch.full((5, 2), NAN, device=DEVICE)]), torch.cat([experts_SK, experts_SK[:5]])
    for stacks, s in ((weights, scales), ([w.float() for w in weights], None)):
        alone, out = experts(x, weights_SK, experts_SK, *stacks, s), experts(padded, padded_weights, padded_experts, *stacks, s)
        assert out[7:].isnan().all()
        torch.testing.assert_close(out[:7], alone)


COMPILE = """
import sys, torch, deepseek_lit
assert "triton" not in sys.modules
import triton
from triton.backends.compiler import GPUTarget
from deepseek_lit.kernels import moe
assert not torch.cuda.is_initialized()
bf16, f32, i32, i64, u8, e4m3 = "*bf16", "*fp32", "*i32", "*i64", "*u8", "*fp8e4nv"
def built(capability, kernel, warps, stages, *arguments):
    types = {n: t if isinstance(t, str) else "constexpr" for n, t in zip(kernel.arg_names, arguments)}
    constants = {n: a for n, a in zip(kernel.arg_names, arguments) if not isinstance(a, str)}
    attributes = {(i,): [["tt.divisibility", 16]] for i, (n, t) in enumerate(types.items()) if t[0] == "*" or n in ("N", "K") or n.endswith("_stride")}
    source = triton.compiler.ASTSource(kernel, types, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps, num_stages=stages))
built(90, moe.gate_topk_kernel, 1, 3, f32, f32, f32, i64, "fp32", 256, 8, 4, 8, True, 8, 32, 8)
built(90, moe.count_kernel, 4, 3, i64, i32, "i32", "i32", 128, 256)
built(90, moe.plan_kernel, 8, 3, i32, i32, i32, i32, "i32", "i32", "i32", 16, 256, 16)
built(90, moe.place_kernel, 4, 3, i64, i32, i32, i32, "i32", "i32", 128, 256)
built(90, moe.unpermute_kernel, 4, 3, bf16, f32, i32, bf16, "i32", 8, 1024)
gated = built(90, moe.gated_product_kernel, 4, 5, e4m3, f32, e4m3, "i32", f32, "i32", e4m3, "i32", f32, "i32", e4m3, f32, i32, i32, i32, "i32", "i32", 8, 16, 128, 128)
half = built(90, moe.grouped_product_kernel, 4, 5, bf16, None, bf16, "i32", None, "i32", bf16, i32, i32, "i32", "i32", 16, 128, 64)
only = built(80, moe.grouped_product_kernel, 4, 4, bf16, None, u8, "i32", f32, "i32", bf16, i32, i32, "i32", "i32", 16, 128, 128)
assert all("wgmma" in kernel.asm["ptx"] for kernel in (gated, half)) and "mma.sync" in only.asm["ptx"]
assert max(kernel.metadata.shared for kernel in (gated, half, only)) <= 101376
try:
    built(80, moe.grouped_product_kernel, 8, 3, e4m3, f32, e4m3, "i32", f32, "i32", bf16, i32, i32, "i32", "i32", 128, 128, 128)
except triton.CompilationError:
    print("compiled")
"""


def test_kernels_compile_for_gpus_and_fit_their_shared_memory(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    result = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert result.stdout == "compiled\n", result.stderr
