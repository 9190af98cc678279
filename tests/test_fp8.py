"""FP8 against arithmetic that knows nothing of PyTorch's formats: exact fractions, loops over blocks, float64."""

import functools
import math
from fractions import Fraction

import pytest
import torch

from deepseek_lit.config import BLOCK, scale_shape
from deepseek_lit.fp8 import (
    E4M3_MAX, Linear, block_scale, block_view, dequantize, linear, power_of_two_above, quantize, quantize_activations, scaled_product, to_e4m3, to_half,
)  # fmt: skip

SHAPES = [(1, 1), (1, 127), (1, 300), (127, 1), (64, 257), (128, 128), (129, 128), (128, 129), (300, 40), (576, 300)]
NAN_CODES = (0x7F, 0xFF)
CODES = torch.arange(256, dtype=torch.uint8)


@functools.cache
def value(code: int) -> Fraction:
    """What an e4m3 byte means, for bytes that are numbers."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    return sign * (Fraction(mantissa, 8 * 64) if exponent == 0 else Fraction(8 + mantissa, 8) * Fraction(2) ** (exponent - 7))


def nearest_code(x: float) -> int:
    """The byte of the number nearest to `x`, of two the even one, beyond the edge the edge."""
    candidates = range(0x80, 0xFF) if math.copysign(1, x) < 0 else range(0x7F)
    clipped = max(-448.0, min(448.0, x))  # float64 holds all differences exactly
    return min(candidates, key=lambda code: (abs(float(value(code)) - clipped), code & 1))


def rough(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of very different sizes, so that every block has another scale and a scale in the wrong place is seen."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[-2] // 64 if len(shape) > 1 else 0, shape[-1] // 64
    size = 10.0 ** torch.randint(-2, 3, (rows + 1, columns + 1), generator=generator)
    spread = size.repeat_interleave(64, 0)[: shape[-2] if len(shape) > 1 else 1].repeat_interleave(64, 1)[:, : shape[-1]]
    return (torch.randn(*shape, generator=generator) * spread).reshape(shape)


def spread(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """One scale per element, by index arithmetic."""
    return scale[torch.arange(rows)[:, None] // BLOCK, torch.arange(columns)[None] // BLOCK]


def is_power_of_two(x: torch.Tensor) -> bool:
    return bool((torch.frexp(x).mantissa == 0.5).all())


# The format


def test_every_byte_is_its_formula():
    numbers = [c for c in range(256) if c not in NAN_CODES]
    exact = torch.tensor([float(value(c)) for c in numbers], dtype=torch.float64)
    assert float(exact.max()) == E4M3_MAX == 448 and len(numbers) == 254
    for decoded in (CODES.view(torch.float8_e4m3fn).double(), to_half(CODES.view(torch.float8_e4m3fn)).double() * 256):
        assert torch.equal(decoded[numbers], exact)
        assert decoded[list(NAN_CODES)].isnan().all()
        assert torch.equal(decoded[numbers].signbit(), CODES[numbers] >= 128)


def test_float16_of_all_sizes_is_rounded_to_nearest_even():
    patterns = torch.arange(0, 2**15, 37, dtype=torch.int16)  # some of each magnitude, with either sign
    x = patterns.view(torch.float16).float()
    x = torch.cat([x, -x])
    x = x[x.isfinite()]
    assert to_e4m3(x).view(torch.uint8).tolist() == [nearest_code(v) for v in x.tolist()]


@pytest.mark.parametrize("sign", [1, -1])
def test_ties_and_their_neighbours(sign):
    numbers = torch.tensor([float(value(c)) for c in range(0x7F)])
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = sign * torch.cat([ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(1e9))])
    assert to_e4m3(x).view(torch.uint8).tolist() == [nearest_code(v) for v in x.tolist()]


@pytest.mark.parametrize("count", [1, 3, 16, 65])  # vectorised loops and what is left over
def test_no_number_becomes_nan(count):
    for x in (448.1, 463.9, 464.0, 464.1, 479.0, 480.0, 1e9, 3e38, math.inf):
        assert to_e4m3(torch.full((count,), x)).float().tolist() == [448] * count
        assert to_e4m3(torch.full((count,), -x)).float().tolist() == [-448] * count
    assert to_e4m3(torch.full((count,), math.nan)).float().isnan().all()


def test_rounding_up_carries_into_the_exponent():
    assert to_e4m3(torch.tensor([126.4, 1.99, 15.9, 255.0, 2**-6 - 2**-12])).float().tolist() == [128, 2, 16, 256, 2**-6]


# Scales


def test_power_of_two_above():
    exponents = torch.arange(-126, 127)
    powers = torch.ldexp(torch.ones(len(exponents)), exponents)
    assert torch.equal(power_of_two_above(powers), powers)
    assert torch.equal(power_of_two_above(powers.nextafter(torch.tensor(math.inf))), 2 * powers)
    assert torch.equal(power_of_two_above((2 * powers).nextafter(torch.tensor(0.0))), 2 * powers)
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 1e-9
    assert power_of_two_above(x).tolist() == [2.0 ** math.ceil(math.log2(v)) for v in x.tolist()]
    negative_nan = torch.tensor([-0x400000], dtype=torch.int32).view(torch.float32)  # what 0/0 gives on x86
    assert not block_scale(torch.cat([torch.tensor([math.inf, math.nan]), negative_nan.abs()]), ue8m0=True).isfinite().any()


def test_block_scale_has_its_floor_before_the_division():
    largest = torch.tensor([0.0, 1e-30, 1e-4, 1e-3, 1.0, 448.0, 3e38])
    expected = torch.tensor([1e-4, 1e-4, 1e-4, 1e-3, 1.0, 448.0, 3e38]) / 448
    assert torch.equal(block_scale(largest), expected)
    up = block_scale(largest, ue8m0=True)
    assert is_power_of_two(up) and (up >= expected).all() and (up < 2 * expected).all()


# Weights


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_is_a_loop_over_blocks(shape, ue8m0):
    weight = rough(*shape)
    before = weight.clone()
    quantized, scale = quantize(weight, ue8m0=ue8m0)
    assert quantized.shape == shape and quantized.dtype == torch.float8_e4m3fn and quantized.is_contiguous()
    assert scale.shape == scale_shape(shape) and scale.dtype == torch.float32
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            rows, columns = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            expected = max(weight[rows, columns].abs().max(), torch.tensor(1e-4)) / 448
            assert scale[i, j] == (2.0 ** math.ceil(math.log2(expected)) if ue8m0 else expected)
            assert torch.equal(quantized[rows, columns].view(torch.uint8), to_e4m3(weight[rows, columns] / scale[i, j]).view(torch.uint8))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_dequantize_multiplies_by_the_scale_of_the_block(shape, dtype):
    quantized, scale = quantize(rough(*shape))
    exact = quantized.double() * spread(scale, *shape).double()
    back = dequantize(quantized, scale, dtype)
    assert back.shape == shape and back.dtype == dtype
    rounding = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 2**-23}[dtype]
    torch.testing.assert_close(back.double(), exact, rtol=rounding, atol=2**-24 if dtype == torch.float16 else 0)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_error(shape, ue8m0):
    weight = rough(*shape, seed=1) * rough(*shape, seed=2)
    quantized, scale = quantize(weight, ue8m0)
    error, step = (dequantize(quantized, scale) - weight).abs(), spread(scale, *shape)
    limit = torch.maximum(weight.abs() / 16, step * 2**-10)  # half a step of the mantissa, or of the subnormals
    assert (error <= limit * (1 + 1e-6)).all()
    assert shape[1] < 100 or (error > weight.abs() / 40).any()  # and it is FP8


@pytest.mark.parametrize("size", [1e-38, 1e-6, 1e-4, 1e4, 1e30, 1e38])
def test_large_and_small_matrices(size):
    weight = torch.linspace(-1, 1, 200 * 150).view(200, 150) * size
    for ue8m0 in (False, True):
        quantized, scale = quantize(weight, ue8m0)
        back = dequantize(quantized, scale)
        assert back.isfinite().all() and scale.isfinite().all() and (scale > 0).all()
        if size >= 1e-6:
            assert (back.double() - weight.double()).norm() < 0.04 * weight.double().norm()


def test_zeros():
    for quantized, scale in (quantize(torch.zeros(130, 130)), quantize_activations(torch.zeros(130, 130))):
        assert not quantized.float().any() and torch.equal(scale, torch.full_like(scale, 1e-4 / 448))
    assert not dequantize(*quantize(torch.zeros(130, 130))).any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_what_is_not_a_number_stays_so_and_stays_in_its_block(bad, ue8m0):
    weight = torch.ones(300, 300)
    weight[130, 299] = bad
    back = dequantize(*quantize(weight, ue8m0))
    assert not back[130, 299].isfinite()
    elsewhere = torch.ones_like(weight, dtype=torch.bool)
    elsewhere[128:256, 256:] = False
    torch.testing.assert_close(back[elsewhere], weight[elsewhere], rtol=1 / 16, atol=0)

    activations, scale = quantize_activations(weight, ue8m0)
    back = activations.float() * scale.repeat_interleave(BLOCK, 1)[:, :300]
    assert not back[130, 299].isfinite() and back[130, :256].isfinite().all()
    assert back[:130].isfinite().all() and back[131:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype_and_layout(dtype):
    weight = (rough(200, 300) / 100).to(dtype)
    for function in (quantize, quantize_activations):
        for x in (weight, weight.T.contiguous().T):
            for ours, theirs in zip(function(x), function(weight.float())):
                assert torch.equal(ours.float(), theirs.float())


def test_fp8_is_not_quantised_again():
    with pytest.raises(ValueError, match="FP8 already"):
        quantize(torch.ones(2, 2).to(torch.float8_e4m3fn))


def test_block_view_pads_with_zeros():
    weight = rough(130, 260)
    blocks = block_view(weight)
    assert blocks.shape == (2, 128, 3, 128) and blocks.abs().sum() == weight.abs().sum()
    assert torch.equal(blocks[1, :2, 2, :4], weight[128:, 256:])


# Powers of two


@pytest.mark.parametrize("shape", SHAPES)
def test_ue8m0_fills_the_upper_half_and_is_exact_in_bfloat16(shape):
    weight = rough(*shape)
    quantized, scale = quantize(weight, ue8m0=True)
    assert is_power_of_two(scale)
    largest = block_view(quantized.float()).abs().amax((1, 3))
    assert (((largest >= 224) & (largest <= 448)) | (scale == block_scale(torch.tensor(0.0), True))).all()
    once = dequantize(quantized, scale, torch.bfloat16)
    assert torch.equal(once.float(), dequantize(quantized, scale))
    assert torch.equal(dequantize(*quantize(once, ue8m0=True), torch.bfloat16), once)


def test_truncated_scales_would_lose_the_largest():
    weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
    up = quantize(weight * 1.9 / weight.abs().max(), ue8m0=True)  # 1.9 / 448 lies high in its octave
    largest = weight.abs().argmax()
    assert float(dequantize(*up).flatten()[largest].abs()) == pytest.approx(1.9, rel=1 / 16)
    truncated = 448 * 2.0 ** math.floor(math.log2(1.9 / 448))
    assert truncated < 1.9 * 0.95


# Activations


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (300,), (2, 3, 300), (0, 300), (2, 0, 128)])
def test_activations_have_a_scale_per_token_and_128_columns(shape, ue8m0):
    x = rough(*shape)
    quantized, scale = quantize_activations(x, ue8m0=ue8m0)
    assert quantized.shape == shape and quantized.dtype == torch.float8_e4m3fn and quantized.is_contiguous()
    assert scale.shape == (*shape[:-1], -(-shape[-1] // BLOCK)) and scale.dtype == torch.float32
    for b in range(scale.shape[-1]):
        part = x[..., b * BLOCK : (b + 1) * BLOCK]
        expected = part.abs().amax(-1).clamp(min=1e-4) / 448
        if ue8m0:
            expected = torch.exp2(torch.ceil(torch.log2(expected.double()))).float()
        assert torch.equal(scale[..., b], expected)
        stored = quantized[..., b * BLOCK : (b + 1) * BLOCK]
        assert torch.equal(stored.view(torch.uint8), to_e4m3(part / expected[..., None]).view(torch.uint8))


def test_tokens_do_not_see_each_other():
    x = rough(5, 300)
    together = quantize_activations(x)
    x[[0, 1, 3, 4]] = torch.tensor([math.nan, 1e30, 0.0, -math.inf])[:, None]
    for alone, among_others, spoilt in zip(quantize_activations(x[2]), together, quantize_activations(x)):
        assert torch.equal(alone.float(), among_others[2].float()) and torch.equal(alone.float(), spoilt[2].float())


# The product


def operands(rows: int, out: int, columns: int, ue8m0: bool = False) -> tuple[torch.Tensor, ...]:
    return *quantize_activations(rough(rows, columns, seed=rows), ue8m0), *quantize(rough(out, columns, seed=out + 1), ue8m0)


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize("columns", [1, 127, 128, 129, 300, 576])
@pytest.mark.parametrize("rows, out", [(1, 1), (1, 129), (3, 127), (128, 128), (129, 300), (7, 576)])
def test_scaled_product_is_float64_of_the_same_bytes(rows, out, columns, ue8m0):
    x, x_scale, weight, scale_inv = operands(rows, out, columns, ue8m0)
    x_exact = x.double() * x_scale.double()[torch.arange(rows)[:, None], torch.arange(columns) // BLOCK]
    weight_exact = weight.double() * spread(scale_inv.double(), out, columns)
    exact, magnitude = x_exact @ weight_exact.T, x_exact.abs() @ weight_exact.abs().T
    y = scaled_product(x, x_scale, weight, scale_inv)
    assert y.shape == (rows, out) and y.dtype == torch.float32
    assert ((y.double() - exact).abs() <= 1e-6 * magnitude).all()
    assert torch.equal(scaled_product(x, x_scale, weight, scale_inv, torch.bfloat16), y.bfloat16())


@pytest.mark.parametrize("which", [1, 3])
def test_every_scale_counts(which):
    arguments = list(operands(130, 260, 300))
    y = scaled_product(*arguments)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in arguments[which].shape))[::7].tolist():
        changed = arguments[which].clone()
        changed[tuple(index)] *= 2
        moved = scaled_product(*arguments[:which], changed, *arguments[which + 1 :]) != y
        row = slice(index[0], index[0] + 1) if which == 1 else slice(None)
        column = slice(index[0] * BLOCK, (index[0] + 1) * BLOCK) if which == 3 else slice(None)
        inside = torch.zeros_like(moved)
        inside[row, column] = True
        assert moved[inside].float().mean() > 0.5 and not moved[~inside].any()


def test_scaled_product_of_batches_of_none_and_of_nan():
    x, x_scale, weight, scale_inv = operands(6, 40, 300)
    y = scaled_product(x, x_scale, weight, scale_inv)
    batched = scaled_product(x.view(2, 3, 300), x_scale.view(2, 3, 3), weight, scale_inv)
    torch.testing.assert_close(batched.flatten(0, 1), y, rtol=1e-6, atol=1e-6 * float(y.abs().max()))
    assert scaled_product(x[:0], x_scale[:0], weight, scale_inv, torch.float16).shape == (0, 40)
    x.view(torch.uint8)[4, 299] = 0xFF
    spoilt = scaled_product(x, x_scale, weight, scale_inv)
    assert spoilt[4].isnan().all() and spoilt[[0, 1, 2, 3, 5]].isfinite().all()


def test_a_product_as_wide_as_the_release():
    x, weight = torch.randn(4, 7168, generator=torch.Generator().manual_seed(0)), torch.randn(256, 7168, generator=torch.Generator().manual_seed(1)) * 0.02
    for ue8m0 in (False, True):
        y = scaled_product(*quantize_activations(x, ue8m0), *quantize(weight, ue8m0))
        assert 0.02 < (y - x @ weight.T).norm() / (x @ weight.T).norm() < 0.05  # two roundings of 2.6 % each


# The layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_of_fp8_is_linear_of_what_it_means(dtype):
    weight, scale = quantize(rough(300, 200))
    x = torch.randn(20, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = dequantize(weight, scale, dtype)
    layer = Linear(200, 300)
    assert list(layer.state_dict()) == ["weight"]
    layer.weight, layer.weight_scale_inv = (torch.nn.Parameter(t, requires_grad=False) for t in (weight, scale))
    assert list(layer.state_dict()) == ["weight", "weight_scale_inv"]
    for y in (linear(x, weight, scale), layer(x), linear(x, plain)):
        assert y.dtype == dtype and torch.equal(y, torch.nn.functional.linear(x, plain))
    assert torch.equal(layer.plain_weight(dtype), plain)
