"""Chapters 09 and 09b: quantisation and product kernels against plain PyTorch, in Triton's interpreter or on a GPU, and through the compiler without one."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from tolerances import FP8_PRODUCT

pytest.importorskip("triton")

from deepseek_lit import fp8  # noqa: E402
from deepseek_lit.kernels import gemm, quant  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_fp8 = pytest.mark.skipif(not gemm.multiplies_fp8(torch.device(DEVICE)), reason="this GPU has no FP8 units")


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fresh memory is full of NaN: bytes of ones are NaN in e4m3, bfloat16 and float32."""
    fresh = torch.empty

    def poisoned(*shape, **options):
        memory = fresh(*shape, **options)
        memory.view(torch.uint8).fill_(0xFF)
        return memory

    monkeypatch.setattr(torch, "empty", poisoned)
    torch.manual_seed(0)


def relative(y, reference):
    return float((y.float() - reference.float()).norm() / reference.float().norm())


def weights(n, k, ue8m0=False):
    return tuple(t.to(DEVICE) for t in fp8.quantize(torch.randn(n, k), ue8m0))


def same_bytes(ours, reference):
    return torch.equal(ours[1], reference[1]) and torch.equal(ours[0].float(), reference[0].float())


ROWS = [(1, 1), (1, 128), (127, 127), (3, 43, 129), (128, 576), (9, 1000), (0, 256)]


@needs_fp8
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", ROWS)
def test_activations_are_quantised_to_the_same_bytes(shape, dtype, ue8m0):
    x = (torch.randn(shape) * torch.logspace(-7, 4, shape[-1])).to(dtype).to(DEVICE)
    x.view(-1)[:130] = 0  # at least one block of nothing but zeros, where the floor of the scale shows
    q, scale = quant.quantize_activations(x, ue8m0)
    assert q.dtype == torch.float8_e4m3fn and q.shape == x.shape and scale.dtype == torch.float32
    assert same_bytes((q, scale), fp8.quantize_activations(x, ue8m0))


@needs_fp8
def test_every_octave_is_rounded_to_the_nearest():
    x = torch.cat([torch.linspace(-(2**-5), 2**-5, 127 * 9), torch.linspace(-448, 448, 127 * 16)]).view(-1, 127).to(DEVICE)
    x = F.pad(x, (0, 1), value=448)  # every block has the scale 1, so that each number is rounded as it stands
    assert same_bytes(quant.quantize_activations(x), fp8.quantize_activations(x))


@needs_fp8
@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", ROWS)
def test_fused_forms_equal_two_steps(shape, ue8m0):
    (gate, up), weight = torch.randn(*shape[:-1], 2 * shape[-1], device=DEVICE).chunk(2, -1), torch.rand(shape[-1], device=DEVICE) + 0.5
    for (q, scale), plain in (
        (quant.swiglu_quantize(gate, up, ue8m0), F.silu(gate) * up),
        (quant.rmsnorm_quantize(gate, weight, 1e-5, ue8m0), F.rms_norm(gate, gate.shape[-1:], weight, 1e-5)),
    ):
        q_plain, scale_plain = fp8.quantize_activations(plain, ue8m0)
        torch.testing.assert_close(scale, scale_plain, rtol=1e-6, atol=0)
        assert (q.float() != q_plain.float()).sum() <= 2 + 1e-3 * q.numel()  # sums in another order, next to the middle between two bytes


@needs_fp8
def test_norm_counts_true_columns_and_eps():
    x = torch.full((2, 130), 1e-4, device=DEVICE)
    q, scale = quant.rmsnorm_quantize(x, torch.ones(130, device=DEVICE), 1e-6)
    expected = F.rms_norm(x, (130,), None, 1e-6)
    torch.testing.assert_close(q.float() * scale.repeat_interleave(128, 1)[:, :130], expected, rtol=1 / 16, atol=0)


@needs_fp8
def test_bad_rows_stay_alone():
    x = torch.randn(20, 300, device=DEVICE)
    padded = x.clone()
    padded[13:, 1::2] = float("nan")
    clean, mixed = quant.quantize_activations(x[:13]), quant.quantize_activations(padded)
    assert torch.equal(clean[0].float(), mixed[0][:13].float()) and torch.equal(clean[1], mixed[1][:13])
    assert mixed[0][13:, 1::2].float().isnan().all()
    w = weights(129, 300)
    assert torch.equal(gemm.fp8_product(*mixed, *w)[:13], gemm.fp8_product(mixed[0][:13], mixed[1][:13], *w))


@needs_fp8
def test_strided_rows_and_transposed_views():
    x = torch.randn(300, 7, device=DEVICE)
    assert same_bytes(quant.quantize_activations(x.T), fp8.quantize_activations(x.T))
    wide = torch.randn(5, 400, device=DEVICE)
    assert same_bytes(quant.quantize_activations(wide[:, 50:250]), fp8.quantize_activations(wide[:, 50:250]))
    w, scale_inv = weights(384, 512)  # a slice of a larger matrix, as a rank of several holds it
    x_fp8, x_scale = quant.quantize_activations(torch.randn(3, 256, device=DEVICE))
    cut = w[128:, 256:], scale_inv[1:, 2:]
    assert relative(gemm.fp8_product(x_fp8, x_scale, *cut, torch.float32), fp8.scaled_product(x_fp8, x_scale, *cut)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_bytes_are_decoded(dtype):
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn)[None]
    decoded = quant.dequantize(codes, torch.ones(1, 2, device=DEVICE), dtype)
    assert decoded.isnan().nonzero()[:, 1].tolist() == [0x7F, 0xFF]
    assert torch.equal(decoded.nan_to_num(0).float(), codes.float().nan_to_num(0)) and torch.equal(decoded.signbit(), codes.float().signbit())


@pytest.mark.parametrize("shape", [(1, 1), (127, 129), (128, 128), (200, 300)])
def test_dequantised_weights_equal_bit_for_bit(shape):
    for ue8m0 in (False, True):
        w, scale_inv = weights(*shape, ue8m0)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(quant.dequantize(w, scale_inv, dtype), fp8.dequantize(w, scale_inv, dtype))


PRODUCTS = [(1, 1, 1), (1, 64, 2048), (1, 576, 129), (2, 127, 1100), (17, 129, 127), (64, 65, 300), (127, 128, 128), (129, 576, 257), (0, 130, 128)]


@needs_fp8
@pytest.mark.parametrize("m, n, k", PRODUCTS)
def test_fp8_product(m, n, k):
    operands = *quant.quantize_activations(torch.randn(m, k, device=DEVICE)), *weights(n, k)
    for dtype in (torch.float32, torch.bfloat16):
        y, reference = gemm.fp8_product(*operands, dtype=dtype), fp8.scaled_product(*operands, dtype=dtype)
        assert y.shape == (m, n) and y.dtype == dtype
        assert m == 0 or relative(y, reference) <= FP8_PRODUCT


@needs_fp8
@pytest.mark.parametrize("processors", [1, 132, 10_000])
@pytest.mark.parametrize("m", [1, 33, 70])
def test_every_cut_gives_the_same_product(m, processors, monkeypatch):
    monkeypatch.setattr(gemm, "processors", lambda device: processors)
    operands = *quant.quantize_activations(torch.randn(m, 2100, device=DEVICE)), *weights(100, 2100)
    assert relative(gemm.fp8_product(*operands, dtype=torch.float32), fp8.scaled_product(*operands)) < 1e-5


@pytest.mark.parametrize("m", [3, 70])
def test_what_lies_behind_the_rows_does_not_matter(m):
    """K is no multiple of a step, and the memory after each row holds NaN."""
    x, (w, scale_inv) = torch.randn(m, 300, device=DEVICE), weights(200, 300)
    wide_x, wide_w = torch.empty(m + 3, 400, device=DEVICE), torch.empty(210, 400, dtype=torch.float8_e4m3fn, device=DEVICE)
    wide_x[:m, :300], wide_w.view(torch.uint8)[:200, :300] = x, w.view(torch.uint8)
    assert torch.equal(gemm.weight_only_product(wide_x[:m, :300], wide_w[:200, :300], scale_inv), gemm.weight_only_product(x, w, scale_inv))
    if gemm.multiplies_fp8(x.device):
        operands, wide = quant.quantize_activations(x), quant.quantize_activations(wide_x[:m, :300])
        assert torch.equal(gemm.fp8_product(*wide, wide_w[:200, :300], scale_inv), gemm.fp8_product(*operands, w, scale_inv))


@needs_fp8
def test_power_of_two_scales_in_their_own_type():
    x_fp8, x_scale = quant.quantize_activations(torch.randn(5, 300, device=DEVICE), ue8m0=True)
    w, scale_inv = weights(200, 300, ue8m0=True)
    bytes_ = gemm.fp8_product(x_fp8, x_scale.to(torch.float8_e8m0fnu), w, scale_inv.to(torch.float8_e8m0fnu), torch.float32)
    assert torch.equal(bytes_, gemm.fp8_product(x_fp8, x_scale, w, scale_inv, torch.float32))
    assert relative(bytes_, fp8.scaled_product(x_fp8, x_scale, w, scale_inv)) < 1e-6


@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (1, 64, 2048), (17, 129, 127), (64, 65, 300), (129, 200, 257), (0, 130, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weight_only_product(m, n, k, dtype):
    x, (w, scale_inv) = torch.randn(m, k, device=DEVICE).to(dtype), weights(n, k)
    y, reference = gemm.weight_only_product(x, w, scale_inv), (x.double() @ fp8.dequantize(w, scale_inv).double().T).to(dtype)
    assert y.shape == (m, n) and y.dtype == dtype
    assert m == 0 or relative(y, reference) <= FP8_PRODUCT


def test_addresses_beyond_two_gigabytes():
    """Row numbers times a stride pass 2³¹: only the pages that are touched become real memory."""
    stride = 2**24 + 128
    x = torch.empty_strided((130, 128), (stride, 1), dtype=torch.bfloat16, device=DEVICE)
    x.copy_(torch.randn(130, 128))
    w, scale_inv = weights(64, 128)
    assert relative(gemm.weight_only_product(x, w, scale_inv), gemm.weight_only_product(x.contiguous(), w, scale_inv)) == 0


def test_wrong_shapes_are_refused():
    w, scale_inv = weights(576, 300)
    x = torch.randn(3, 300, device=DEVICE)
    for call in (
        lambda: gemm.weight_only_product(x, w, scale_inv[:4]),
        lambda: gemm.weight_only_product(x[:, :299], w, scale_inv),
        lambda: quant.dequantize(w, scale_inv.T),
        lambda: gemm.fp8_product(w[:3], torch.ones(3, 2, device=DEVICE), w, scale_inv),
        lambda: gemm.fp8_product(w[:3], torch.ones(3, 3, device=DEVICE), w, scale_inv[:, :2]),
    ):
        with pytest.raises(ValueError):
            call()


@needs_fp8
@pytest.mark.parametrize("shape", [(300,), (2, 300), (2, 3, 300), (0, 300)])
def test_linear_keeps_shape_and_dtype(shape):
    x, (w, scale_inv) = torch.randn(shape, device=DEVICE).bfloat16(), weights(130, 300)
    y = gemm.linear(x, w, scale_inv)
    assert y.shape == (*shape[:-1], 130) and y.dtype == torch.bfloat16
    reference = fp8.scaled_product(*fp8.quantize_activations(x), w, scale_inv, torch.bfloat16)
    assert x.numel() == 0 or relative(y, reference) <= FP8_PRODUCT


@pytest.mark.parametrize("capability, hip, expected", [((8, 0), None, False), ((8, 6), None, False), ((8, 9), None, True), ((9, 0), None, True), ((9, 4), "6.2", False)])
def test_capability_decides(capability, hip, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert gemm.multiplies_fp8(torch.device("cuda:0")) == expected


def test_weight_only_is_said_once(monkeypatch):
    monkeypatch.setattr(gemm, "multiplies_fp8", lambda device: False)
    gemm.announce_weight_only.cache_clear()
    x, (w, scale_inv) = torch.randn(2, 3, 300, device=DEVICE), weights(130, 300)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        answers = [gemm.linear(x, w, scale_inv) for _ in range(3)]
    assert len([w for w in said if "no FP8 units" in str(w.message)]) == 1
    assert relative(answers[0], x @ fp8.dequantize(w, scale_inv).T) < 1e-6  # nothing but the weights was quantised


@pytest.mark.parametrize("processors", [20, 108, 132])
def test_tilings_are_legal_and_fill_the_gpu(processors):
    for n, k in [(1, 1), (576, 7168), (2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (7168, 2048)]:
        for m in (0, 1, 15, 16, 17, 64, 65, 127, 129, 1000, 8192):
            rows, columns, splits, warps, stages = gemm.tiling(m, n, k, processors)
            assert 16 <= rows <= 128 and columns in (64, 128) and rows & (rows - 1) == 0  # a tile meets one row of weight scales
            assert splits == 1 or k / 128 / splits >= 4 and 32 * splits * m <= k  # partial sums stay below a quarter of the weight's bytes
            assert stages * 128 * (rows + columns) <= 227 * 1024
    cut = gemm.tiling(1, 2112, 7168)
    assert 2112 / cut.columns * cut.splits >= 2 * 132


def in_fresh_python(code, tmp_path, **environment):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout


COMPILE = """
import triton, warnings
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from deepseek_lit.kernels import gemm, quant
warnings.simplefilter("ignore")
TYPES = {"x_ptr": "*fp8e4nv", "w_ptr": "*fp8e4nv", "y_ptr": "*bf16", "x_scale_ptr": "*fp32", "scale_inv_ptr": "*fp32", "q_ptr": "*fp8e4nv", "scale_ptr": "*fp32", "gate_ptr": "*bf16",
         "up_ptr": "*bf16", "weight_ptr": "*bf16", "partial_ptr": "*fp32", "eps": "fp32"}

def build(kernel, capability, warps, constants, **changes):
    signature = {n: "constexpr" if n in constants else (TYPES | changes).get(n, "i32") for n in kernel.arg_names}
    options = {"num_warps": warps, "num_stages": 4}
    return triton.compile(ASTSource(kernel, signature, constants, {}), target=GPUTarget("cuda", capability, 32), options=options)
"""


def test_kernels_compile_for_real_gpus(tmp_path):
    """Machine code for an H100 and an A100 without either: FP8 tensor cores where they are, and weight-only where Triton knows no e4m3 (trap 27)."""
    code = COMPILE + """
for rows, columns in [(16, 64), (128, 128)]:
    cut = dict(ROWS=rows, COLUMNS=columns, GROUP=8, WEIGHTS_LEFT=rows < 64)
    ptx = build(gemm.fp8_product_kernel, 90, 4 if rows == 16 else 8, cut).asm["ptx"]
    assert "wgmma.mma_async" in ptx and "e4m3.e4m3" in ptx
    assert "bf16.bf16" in build(gemm.weight_only_kernel, 80, 4, cut, x_ptr="*bf16", w_ptr="*u8").asm["ptx"]
box = dict(ROWS=8, BLOCKS=4, UE8M0=True)
build(quant.quantize_kernel, 90, 4, box, x_ptr="*bf16")
build(quant.swiglu_quantize_kernel, 90, 4, box)
build(quant.rmsnorm_quantize_kernel, 90, 8, dict(ROWS=1, BLOCKS=64, UE8M0=False), x_ptr="*bf16")
build(quant.dequantize_kernel, 80, 4, dict(ROWS=32), w_ptr="*u8")
build(gemm.add_splits_kernel, 80, 4, dict(SPLITS=4, SIZE=1024))
try:
    build(gemm.fp8_product_kernel, 80, 4, cut)
except Exception as error:
    print("fp8e4nv" in str(error))
"""
    assert in_fresh_python(code, tmp_path, TRITON_INTERPRET="0") == "True\n"
