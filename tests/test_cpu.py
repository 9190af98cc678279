"""The C kernels against float64, and what happens around the compiler: none at all, two builds at a time."""

import os
import subprocess
import sys
import warnings

import pytest
import torch

from deepseek_lit import cpu, fp8

ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17]
COLUMNS = [1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 127, 128, 129, 160, 255, 256, 257, 300]
needs_kernels = pytest.mark.skipif(cpu.kernels() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def poisoned_without_gradients(monkeypatch):
    """Results start as NaN, so that a number nobody wrote is seen."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape: torch.full(shape, float("nan"), dtype=self.dtype))
    with torch.no_grad():
        yield


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache folder, and kernels that nobody has loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.kernels.cache_clear()
    yield tmp_path
    cpu.kernels.cache_clear()


def assert_rounded(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor):
    """`y` is x @ Wᵀ in float64 up to one rounding to bfloat16 and the float32 sums, which lose digits of the summands."""
    exact, magnitude = x.double() @ weight.double().mT, x.double().abs() @ weight.double().abs().mT
    assert y.shape == exact.shape and y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-18 * magnitude).all()


@needs_kernels
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_bf16_is_float64_rounded(rows, columns):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    for out in (1, 5, 33):
        x, weight = torch.randn(rows, columns, generator=generator).bfloat16(), torch.randn(out, columns, generator=generator).bfloat16()
        assert_rounded(cpu.small_linear(x, weight), x, weight)


@needs_kernels
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", ROWS)
def test_fp8_is_float64_rounded(rows, columns):
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    for out in (1, 129, 260):
        x, dense = torch.randn(rows, columns, generator=generator).bfloat16(), torch.randn(out, columns, generator=generator)
        weight, scale = fp8.quantize(dense * (10.0 ** (torch.arange(out) // 128 * 2))[:, None])  # scales that differ from block to block
        assert_rounded(cpu.small_linear(x, weight, scale), x, fp8.dequantize(weight, scale, torch.float64))


@needs_kernels
def test_leading_dimensions_strides_and_scale_dtype():
    x = torch.randn(3, 2, 300).bfloat16().transpose(0, 1)
    weight, scale = fp8.quantize(torch.randn(130, 300))
    y = cpu.small_linear(x, weight, scale)
    assert_rounded(y, x, fp8.dequantize(weight, scale, torch.float64))
    assert torch.equal(cpu.small_linear(x, weight, scale.repeat(1, 2)[:, : scale.shape[1]].double()), y)


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
    x, weight = torch.ones(cpu.MAX_ROWS, 8).bfloat16(), torch.ones(4, 8).bfloat16()
    assert cpu.takes(x, weight) and cpu.takes(x.view(2, -1, 8), weight) and cpu.takes(x, weight.to(torch.float8_e4m3fn))
    assert not cpu.takes(torch.ones(cpu.MAX_ROWS + 1, 8).bfloat16(), weight)
    assert not cpu.takes(x[:0], weight)
    assert not cpu.takes(x.float(), weight) and not cpu.takes(x, weight.float())
    assert not cpu.takes(x, weight.mT.contiguous().mT)
    assert not cpu.takes(x, torch.ones(4, 9).bfloat16())
    assert not cpu.takes(x, weight.to("meta"))
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
def test_what_is_in_the_cache_needs_no_compiler(fresh, monkeypatch):
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
def test_processes_that_build_at_the_same_time(fresh):
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
