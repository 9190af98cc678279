"""Attention kernels against plain references, on caches full of NaN, interpreted or on a GPU; and that they compile for GPUs that are not here."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from deepseek_lit.kernels.mla import PAGE, decode_attention, num_splits, pages, prefill_attention, rope_and_write, trivial_block_table
from deepseek_lit.mla import RMSNorm
from deepseek_lit.rope import apply_rope
from tolerances import KERNEL_BF16, KERNEL_FP32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


@pytest.fixture(autouse=True)
def poison():
    """Memory that nobody has written holds NaN, here and inside the package."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def paged_cache(lengths, C, R, dtype=torch.float32):
    """Shuffled pages with NaN wherever no token stands, and a table whose unused entries lead nowhere."""
    counts = [math.ceil(length / PAGE) for length in lengths]
    order = torch.randperm(sum(counts) + 2).int()
    c_kv, k_rope = torch.full((len(order), PAGE, C), NAN, dtype=dtype), torch.full((len(order), PAGE, R), NAN, dtype=dtype)
    table = torch.full((len(lengths), max(counts, default=0) + 1), -(10**6), dtype=torch.int32)
    for row, (length, count, own) in enumerate(zip(lengths, counts, order.split([*counts, 2]))):
        table[row, :count] = own
        for t in range(length):
            page, slot = int(own[t // PAGE]), t % PAGE
            c_kv[page, slot], k_rope[page, slot] = torch.randn(C), torch.randn(R)
    return [x.to(DEVICE) for x in (c_kv, k_rope, table, torch.tensor(lengths, dtype=torch.int32))]


def queries(B, S, H, C, R, dtype=torch.float32):
    return torch.randn(B, S, H, C).to(DEVICE, dtype), torch.randn(B, S, H, R).to(DEVICE, dtype)


def reference(q_latent_BSHC, q_rope_BSHR, c_kv, k_rope, table, lengths, scale):
    """One query of one head at a time, in float64."""
    B, S, H, _ = q_latent_BSHC.shape
    out = torch.zeros(q_latent_BSHC.shape, dtype=torch.float64)
    for b in range(B):
        where = [(int(table[b, t // PAGE]), t % PAGE) for t in range(int(lengths[b]))]
        for s in range(S):
            seen = where[: len(where) - S + s + 1] if len(where) > S - s - 1 else []
            if seen:
                keys = torch.stack([torch.cat([c_kv[at], k_rope[at]]) for at in seen]).double().cpu()
                query = torch.cat([q_latent_BSHC[b, s], q_rope_BSHR[b, s]], -1).double().cpu()
                out[b, s] = (query @ keys.T * scale).softmax(-1) @ keys[:, : c_kv.shape[-1]]
    return out


def close(actual, expected, tolerance=KERNEL_FP32):
    assert not actual.isnan().any()
    torch.testing.assert_close(actual.double().cpu(), expected.double().cpu(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 129])
@pytest.mark.parametrize("heads", [1, 3, 16])
def test_decode_lengths_and_heads(length, heads):
    cache = paged_cache([length], 33, 8)
    q = queries(1, 1, heads, 33, 8)
    close(decode_attention(*q, *cache, 0.3), reference(*q, *cache, 0.3))


@pytest.mark.parametrize("splits", [None, 1, 2, 3, 11])
@pytest.mark.parametrize("S, lengths", [(1, [1, 130, 64]), (2, [2, 65, 200]), (4, [4, 129, 66])])
def test_decode_ragged_batches_and_splits(splits, S, lengths):
    cache = paged_cache(lengths, 40, 2)
    q = queries(3, S, 3, 40, 2)
    close(decode_attention(*q, *cache, 0.3, splits=splits), reference(*q, *cache, 0.3))


def test_decode_more_rows_than_a_tile():
    cache = paged_cache([70], 24, 4)
    q = queries(1, 3, 45, 24, 4)
    close(decode_attention(*q, *cache, 0.3, splits=2), reference(*q, *cache, 0.3))


def test_decode_with_the_width_of_the_release():
    cache = paged_cache([66], 512, 64)
    q = queries(1, 1, 2, 512, 64)
    close(decode_attention(*q, *cache, 192**-0.5), reference(*q, *cache, 192**-0.5))


def test_decode_large_scores():
    cache = paged_cache([130], 16, 2)
    q = [200 * x for x in queries(1, 1, 2, 16, 2)]
    close(decode_attention(*q, *cache, 1.0, splits=2), reference(*q, *cache, 1.0))


@pytest.mark.parametrize("splits", [1, 4])
def test_decode_rows_without_tokens_are_zero_and_harm_nobody(splits):
    cache = paged_cache([0, 130, 1], 16, 2)
    q = queries(3, 2, 3, 16, 2)
    q[0][0], q[1][0] = NAN, NAN  # padding: its queries mean nothing either
    out = decode_attention(*q, *cache, 0.3, splits=splits)
    close(out, reference(*(x.nan_to_num() for x in q), *cache, 0.3))
    assert not out[0].any() and not out[2, 0].any() and out[2, 1].any()


def test_decode_is_causal_among_the_new_tokens():
    c_kv, k_rope, table, lengths = paged_cache([66], 16, 2)
    q = queries(1, 4, 3, 16, 2)
    before = decode_attention(*q, c_kv, k_rope, table, lengths, 0.3)
    c_kv[table[0, 1], 1] += 5.0  # position 65, the newest
    after = decode_attention(*q, c_kv, k_rope, table, lengths, 0.3)
    assert torch.equal(after[:, :3], before[:, :3]) and not torch.allclose(after[:, 3], before[:, 3])


def test_decode_takes_columns_of_a_wider_block_table():
    c_kv, k_rope, table, lengths = paged_cache([65, 100], 16, 2)
    q = queries(2, 1, 3, 16, 2)
    wide = torch.cat([table, torch.full((2, 30), -7, dtype=torch.int32, device=DEVICE)], 1)
    assert not wide[:, :2].is_contiguous()
    one, two = (decode_attention(*q, c_kv, k_rope, table, lengths, 0.3, splits=2) for table in (wide[:, :2], table))
    assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decode_in_16_bits(dtype):
    cache, q = paged_cache([1, 130], 140, 16, dtype), queries(2, 2, 3, 140, 16, dtype)
    for splits in (1, 3):
        out = decode_attention(*q, *cache, 0.1, splits=splits)
        assert out.dtype == dtype
        close(out, reference(*q, *cache, 0.1), KERNEL_BF16)


def test_a_contiguous_cache_is_a_paged_one():
    c_kv, k_rope = torch.randn(2, 128, 16, device=DEVICE), torch.randn(2, 128, 4, device=DEVICE)
    lengths = torch.tensor([64, 127], dtype=torch.int32, device=DEVICE)
    q = queries(2, 1, 3, 16, 4)
    out = decode_attention(*q, pages(c_kv), pages(k_rope), trivial_block_table(2, 128, DEVICE), lengths, 0.3)
    for b, length in enumerate(lengths.tolist()):
        probabilities = ((q[0][b, 0] @ c_kv[b, :length].T + q[1][b, 0] @ k_rope[b, :length].T) * 0.3).softmax(-1)
        close(out[b, 0], probabilities @ c_kv[b, :length])
    with pytest.raises(RuntimeError):
        pages(c_kv[:, :100])


def test_number_of_splits():
    for programs in (1, 2, 7, 131, 132, 133, 1000):
        for blocks in (0, 1, 2, 63, 64, 2048):
            splits = num_splits(programs, blocks, 132)
            assert 1 <= splits <= max(1, min(blocks, 128))
    assert num_splits(2, 512, 132) >= 60  # one long sequence of 128 heads gets the chip
    assert num_splits(2, 512, 60) < num_splits(2, 512, 132)  # and a smaller chip fewer parts
    assert num_splits(256, 512, 132) == 1  # a large batch fills it without
    assert num_splits(2, 2, 132) == 1  # two pages are not worth a merge


@pytest.mark.parametrize(
    "B, S, T, H, K, V",
    [(1, 1, 1, 1, 192, 128), (1, 1, 65, 3, 192, 128), (2, 33, 33, 1, 192, 128), (1, 31, 64, 2, 24, 16),
     (2, 5, 129, 2, 40, 7), (1, 70, 70, 1, 10, 40), (1, 2, 3, 16, 64, 64)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prefill(B, S, T, H, K, V, dtype):
    q, k, v = (torch.randn(B, length, H, width).to(DEVICE, dtype) for length, width in ((S, K), (T, K), (T, V)))
    seen_ST = torch.arange(T, device=DEVICE) <= torch.arange(T - S, T, device=DEVICE)[:, None]
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v)), attn_mask=seen_ST, scale=0.1).transpose(1, 2)
    out = prefill_attention(q, k, v, 0.1)
    assert out.dtype == dtype and out.is_contiguous()
    close(out, expected, KERNEL_FP32 if dtype == torch.float32 else KERNEL_BF16)


def test_prefill_reads_slices_and_nothing_beside_them():
    q, k, v = torch.full((2, 7, 3, 30), NAN), torch.full((2, 40, 3, 30), NAN), torch.full((2, 40, 3, 30), NAN)
    q[:, 2:, :, 3:27], k[:, :33, :, 6:], v[:, :33, :, 10:26] = torch.randn(2, 5, 3, 24), torch.randn(2, 33, 3, 24), torch.randn(2, 33, 3, 16)
    q, k, v = (x.to(DEVICE) for x in (q[:, 2:, :, 3:27], k[:, :33, :, 6:], v[:, :33, :, 10:26]))
    seen_ST = torch.arange(33, device=DEVICE) <= torch.arange(28, 33, device=DEVICE)[:, None]
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen_ST, scale=0.2).transpose(1, 2)
    close(prefill_attention(q, k, v, 0.2), expected)


def new_tokens(C, R, dtype):
    """Tokens of two sequences, one crossing a page and one with a padded token, and where they go in six pages."""
    kv_BSK, q_BSHK = torch.randn(2, 3, C + R).to(DEVICE, dtype), torch.randn(2, 3, 5, 20 + R).to(DEVICE, dtype)
    norm = RMSNorm(C).to(DEVICE, dtype)
    norm.weight.data.uniform_(0.5, 1.5)
    angles = 3 * torch.randn(2, 3, R // 2)
    positions, table = torch.tensor([[63, 64, 65], [-1, 0, 1]], device=DEVICE), torch.tensor([[4, 1], [2, -9]], dtype=torch.int32, device=DEVICE)
    return kv_BSK, q_BSHK[..., 20:], norm, torch.polar(torch.ones_like(angles), angles).to(DEVICE), positions, table


WRITTEN = {(4, 63): (0, 0), (1, 0): (0, 1), (1, 1): (0, 2), (2, 0): (1, 1), (2, 1): (1, 2)}  # (page, slot) of each token


@pytest.mark.parametrize("C, R", [(33, 2), (140, 12), (512, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_rope_and_write(C, R, dtype):
    kv, q, norm, rope, positions, table = new_tokens(C, R, dtype)
    c_kv, k_rope = torch.full((6, PAGE, C), NAN, device=DEVICE, dtype=dtype), torch.full((6, PAGE, R), NAN, device=DEVICE, dtype=dtype)
    turned = rope_and_write(kv, q, norm.weight, rope, positions, c_kv, k_rope, table)

    tolerance = 1e-5 if dtype == torch.float32 else 2**-7  # one step of bfloat16: a last bit may fall either way
    torch.testing.assert_close(turned, apply_rope(q, rope), atol=tolerance, rtol=tolerance)
    expected_c, expected_k = norm(kv[..., :C]), apply_rope(kv[..., C:], rope)
    for slot, token in WRITTEN.items():
        torch.testing.assert_close(c_kv[slot], expected_c[token], atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(k_rope[slot], expected_k[token], atol=tolerance, rtol=tolerance)
    assert int((~c_kv.isnan()).sum()) == 5 * C and int((~k_rope.isnan()).sum()) == 5 * R  # and nothing else was touched


@pytest.mark.parametrize("C", [33, 140, 256])
@torch.no_grad()
def test_fp8_cache_is_written_as_torch_rounds(C):
    kv, q, norm, rope, positions, table = new_tokens(C, 4, torch.float32)
    kv[0, 1, : C // 2] *= 1e-4  # small numbers beside large ones: subnormal codes
    groups = math.ceil(C / 128)
    c_kv, k_rope = torch.zeros(6, PAGE, C, device=DEVICE).to(torch.float8_e4m3fn), torch.full((6, PAGE, 4), NAN, device=DEVICE, dtype=torch.bfloat16)
    scales = torch.full((6, PAGE, groups), NAN, device=DEVICE)
    rope_and_write(kv, q, norm.weight, rope, positions, c_kv, k_rope, table, scales)

    exact = F.pad(norm(kv[..., :C]), (0, -C % 128)).unflatten(-1, (groups, 128))
    expected_scales = exact.abs().amax(-1).clamp(min=1e-4) / 448
    for slot, token in WRITTEN.items():
        torch.testing.assert_close(scales[slot], expected_scales[token], atol=0, rtol=1e-6)
        expected = (exact[token] / scales[slot][:, None]).flatten()[:C].to(torch.float8_e4m3fn)
        step = (expected.view(torch.uint8).int() - c_kv[slot].view(torch.uint8).int()).abs()
        assert step.max() <= 1 and (step > 0).float().mean() < 0.01  # the norm's own last bit may cross a rounding edge
    assert int((~scales.isnan()).sum()) == 5 * groups


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@torch.no_grad()
def test_fp8_cache_keeps_a_nan_visible():
    kv, q, norm, rope, positions, table = new_tokens(33, 4, torch.float32)
    kv[1, 2, 5] = NAN
    c_kv, k_rope, scales = (torch.zeros(6, PAGE, width, device=DEVICE) for width in (33, 4, 1))
    c_kv = c_kv.to(torch.float8_e4m3fn)
    rope_and_write(kv, q, norm.weight, rope, positions, c_kv, k_rope, table, scales)
    out = decode_attention(*queries(2, 1, 3, 33, 4), c_kv, k_rope, table, torch.tensor([66, 2], dtype=torch.int32, device=DEVICE), 0.3, c_scale_pages=scales)
    assert out[1].isnan().any() and not out[0].isnan().any()


@pytest.mark.parametrize("C, lengths, splits", [(33, [1, 65], None), (140, [130, 64], 3), (512, [66], 1)])
def test_decode_from_an_fp8_cache(C, lengths, splits):
    c_kv, k_rope, table, lengths = paged_cache(lengths, C, 8)
    groups = math.ceil(C / 128)
    blocks = F.pad(c_kv, (0, -C % 128)).unflatten(-1, (groups, 128))
    scales = blocks.abs().amax(-1) / 448
    code = (blocks / scales[..., None]).flatten(-2)[..., :C].to(torch.float8_e4m3fn).contiguous()
    rounded = code.float() * scales.repeat_interleave(128, -1)[..., :C]
    q = queries(len(lengths), 1, 3, C, 8)

    out = decode_attention(*q, code, k_rope, table, lengths, 0.1, c_scale_pages=scales, splits=splits)
    close(out, reference(*q, rounded, k_rope, table, lengths, 0.1))  # the kernel itself is exact …
    exact = reference(*q, c_kv, k_rope, table, lengths, 0.1)
    assert 1e-4 < (out.double().cpu() - exact).norm() / exact.norm() < 0.05  # … and FP8 costs some per cent


COMPILE = """
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from deepseek_lit.kernels import mla

def shared_memory(capability, launch, kernel, types, constants):
    types = types + ["i32"] * (len(kernel.arg_names) - len(types) - len(constants)) + ["constexpr"] * len(constants)
    source = triton.compiler.ASTSource(kernel, dict(zip(kernel.arg_names, types)), dict(zip(kernel.arg_names[-len(constants):], constants)))
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared

h, f, i, u, dot = "*bf16", "*fp32", "*i32", "*u8", tl.bfloat16
tile = mla.decode_launch(128, torch.bfloat16, mla.H100)
print(shared_memory(90, tile, mla.decode_kernel, [h, h, h, h, f, i, i, f, f, "fp32"], [512, 64, 512, 64, *tile[:2], 64, 0, dot]))
tile = mla.prefill_launch(4096, torch.bfloat16, mla.H100)
print(shared_memory(90, tile, mla.prefill_kernel, [h] * 4 + ["i32"] * 9 + ["fp32"], [192, 128, 128, 64, 128, *tile[:2], dot]))
tile = mla.decode_launch(128, torch.bfloat16, mla.Chip(82, 101376))
print(shared_memory(80, tile, mla.decode_kernel, [h, h, u, h, f, i, i, f, f, "fp32"], [512, 64, 512, 64, *tile[:2], 64, 128, dot]))
tile = mla.Launch(0, 0, 4, 3)
print(shared_memory(80, tile, mla.rope_and_write_kernel, [h, h, h, f, "*i64", i, u, h, f, h, "fp32"], [512, 64, 512, 64, 128, 64, 128]))
"""


def test_kernels_compile_for_gpus_and_fit_their_shared_memory(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    result = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    decode, prefill, decode_fp8, write = map(int, result.stdout.split())
    assert max(decode, prefill) <= 232448  # an H100
    assert max(decode_fp8, write) <= 101376  # desktop cards of capability 8.6 and 8.9
