"""The benchmark itself: bytes and operations counted by hand, every case's kernel against its expectation, wrong kernels caught, reports that survive a file."""

import json
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deepseek_lit import bench, cpu, fp8
from deepseek_lit.bench import Case, Ceilings, Choice, InputError, Report, Row, Work
from deepseek_lit.config import ModelConfig

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CEILINGS = Ceilings(copy=10e9, product=100e9)
SMALL = ModelConfig(
    hidden_size=256, moe_intermediate_size=128, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=2,
    num_attention_heads=3, kv_lora_rank=48, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=24,
)  # fmt: skip
needs_kernels = pytest.mark.skipif(cpu.kernels() is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def cpu_cases() -> list[Case]:
    """One or two of each kind that `bench.cpu_cases` lists, small."""
    return [
        *[bench.linear_case(m, 200, 300, eight_bit) for m in (1, 5) for eight_bit in (False, True)],
        bench.dequantize_case(200, 300, cpu.decode, "decode"),
        bench.norm_case(3, 300),
        bench.route_case(5, SMALL),
        *[bench.attend_case(70, eight_bit, SMALL) for eight_bit in (False, True)],
        *[bench.experts_case(4, 16, eight_bit, CPU, SMALL, bench.cpu_experts) for eight_bit in (False, True)],
    ]


def gpu_cases() -> list[Case]:
    """The same for `bench.gpu_cases`; they run under the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    from deepseek_lit.kernels.gemm import multiplies_fp8

    return [
        *bench.quantize_cases(3, 300),
        bench.dequantize_case(200, 300, bench.triton_dequantize, "dequantize"),
        bench.product_case(5, 200, 300, quantized=False),
        *[bench.product_case(m, 200, 384, quantized=True) for m in (1, 5) if multiplies_fp8(DEVICE)],
        *[bench.decode_case(2, 128, eight_bit, SMALL) for eight_bit in (False, True)],
        bench.prefill_case(40, SMALL),
        bench.gate_case(3, SMALL),
        bench.experts_case(4, 16, False, DEVICE, SMALL, bench.gpu_experts),
        bench.experts_case(4, 16, True, DEVICE, SMALL, bench.gpu_experts, multiplies_fp8(DEVICE)),
    ]


@pytest.mark.parametrize("dense", [True, False])
def test_a_recorded_layer_gives_what_is_expected(dense, monkeypatch):
    """Under the interpreter with the tape in place of a CUDA graph; and what it must read is what its tensors weigh."""
    pytest.importorskip("triton")
    monkeypatch.setattr(fp8, "runs_triton", lambda x: True)
    monkeypatch.setattr(cpu, "serves", lambda x, *matrices: False)
    monkeypatch.setattr(cpu, "readable", lambda matrix: False)
    monkeypatch.setattr(bench, "IN_A_ROW", 1)
    c = replace(SMALL, q_lora_rank=40, intermediate_size=136, n_shared_experts=1)
    case = bench.layer_case(2, 64, dense, DEVICE, c)
    assert off_by(case, DEVICE) < case.tolerance
    choice = bench.choose(2, 2, 16, DEVICE)
    layer = bench.random_layer(replace(c, first_k_dense_replace=int(dense)), choice, bench.generator(DEVICE, 0))
    weighs = sum(p.nbytes for name, p in layer.named_parameters() if p.dim() == 2 and ".experts." not in name)
    weighs += 0 if dense else len(choice.visits) * sum(p.nbytes for p in layer.mlp.experts[0].parameters())
    assert case.bytes == weighs + 2 * (64 * 64 * 2 + 4 * 256)


def test_all_layers_from_one_of_each_kind():
    rows = [Row(f"decode layer, {kind}", f"8 × M 4, 4096 cached{more}", 1, 1, floor, "memory", 1, (1.0, seconds, 9.0), 0.0, {"one by one": 3.0}) for kind, more, seconds, floor in
            (("dense", "", 0.008, 0.004), ("experts", ", 30 of 256", 0.016, 0.008))]  # fmt: skip
    report = Report("cuda", "x", "2", None, "2026-01-01", 1, 5, CEILINGS, rows)
    assert bench.whole_model(report) == ["a step of 61 layers at batch 4, extrapolated from one of each kind: 119 ms recorded, 357 ms one by one, the ceilings allow 59.5 ms"]
    assert bench.whole_model(replace(report, rows=rows[:1])) == []


def off_by(case: Case, device: torch.device) -> float:
    work = case.make(bench.generator(device, 1))
    with bench.poisoned():
        result = work.run()
    expected = work.expected()
    for name, rival in work.rivals.items():
        assert name == "scaled_mm" or bench.does_the_work(work, rival, expected), (case.name, name)
    return bench.distance(work.value(result), expected)


@needs_kernels
def test_kernels_of_the_cpu_give_what_is_expected():
    for case in cpu_cases():
        assert off_by(case, CPU) < case.tolerance, case


def test_kernels_in_triton_give_what_is_expected():
    for case in gpu_cases():
        assert off_by(case, DEVICE) < case.tolerance, case


def counts(case: Case) -> tuple[int, int]:
    return case.bytes, case.operations


def test_bytes_and_operations_of_products():
    blocks = 2 * 3 * 4  # scales of 200 × 300 weights
    assert counts(bench.linear_case(5, 200, 300, False)) == (2 * (200 * 300 + 5 * 300 + 5 * 200), 2 * 5 * 200 * 300)
    assert counts(bench.linear_case(5, 200, 300, True)) == (200 * 300 + blocks + 2 * (5 * 300 + 5 * 200), 2 * 5 * 200 * 300)
    assert counts(bench.product_case(5, 200, 300, True)) == (200 * 300 + blocks + 5 * (300 + 3 * 4) + 2 * 5 * 200, 2 * 5 * 200 * 300)
    assert counts(bench.product_case(5, 200, 300, False)) == counts(bench.linear_case(5, 200, 300, True))
    assert counts(bench.dequantize_case(200, 300, cpu.decode, "decode")) == (3 * 200 * 300 + blocks, 200 * 300)


def test_bytes_of_quantisers_and_norms():
    quantize, norm, swiglu = bench.quantize_cases(3, 300)
    written = 3 * 300 + 3 * 3 * 4
    assert [case.bytes for case in (quantize, norm, swiglu)] == [2 * 900 + written, 2 * 900 + 2 * 300 + written, 4 * 900 + written]
    assert bench.norm_case(3, 300).bytes == 2 * 900 + 2 * 900 + 2 * 300


def test_bytes_and_operations_of_gates():
    assert counts(bench.gate_case(3, SMALL)) == (3 * 16 * 4 + 16 * 4 + 3 * 2 * (4 + 8), 3 * 16)
    assert counts(bench.route_case(3, SMALL)) == (2 * 16 * 256 + 16 * 4 + 3 * 256 * 2 + 3 * 2 * (4 + 8), 2 * 3 * 16 * 256)


def test_bytes_and_operations_of_attention():
    pair = 2 * (48 + 16) + 2 * 48  # one head, one cached token: score and mixture
    queries, results, kv_b = 3 * (16 + 16), 3 * 24, 3 * (16 + 24) * 48
    assert counts(bench.attend_case(70, False, SMALL)) == (2 * (70 * 64 + kv_b + queries + results), 3 * 70 * pair + 2 * kv_b)
    absorbed, mixture = 3 * (48 + 16), 3 * 48
    assert counts(bench.decode_case(2, 128, False, SMALL)) == (2 * 2 * (128 * 64 + absorbed + mixture), 2 * 3 * 128 * pair)
    assert bench.decode_case(2, 128, True, SMALL).bytes == 2 * (128 * (48 + 4 + 2 * 16) + 2 * (absorbed + mixture))
    prefill = bench.prefill_case(40, SMALL)
    assert counts(prefill) == (2 * 40 * 3 * (32 + 32 + 24 + 24), 3 * sum(range(1, 41)) * 2 * (32 + 24))


def test_experts_read_only_what_somebody_chose():
    case, choice = bench.experts_case(4, 16, True, CPU, SMALL, bench.cpu_experts), bench.choose(4, 2, 16, CPU)
    chosen = len(set(choice.experts_SK.flatten().tolist()))
    assert 2 <= chosen < 16 and case.shape.startswith(f"{chosen} of 16")
    assert counts(case) == (chosen * 3 * (256 * 128 + 2 * 4) + 4 * (256 * 2 * 2 + 2 * (4 + 8)), 4 * 2 * 3 * 2 * 256 * 128)
    together = torch.zeros(4, 16)
    for e, tokens, weights in choice.visits:
        together[tokens, e] += weights[:, 0]
    assert torch.equal(together, bench.by_expert((choice.weights_SK, choice.experts_SK), 16)) and isinstance(choice, Choice)


@needs_kernels
def test_the_lists_are_those_of_v3():
    cases = bench.cpu_cases()
    assert len({(case.name, case.shape) for case in cases}) == len(cases)
    assert {case.name for case in cases} == {case.name for case in cpu_cases()}
    assert max(case.bytes for case in cases) < 7.1e8


def test_the_list_for_gpus(monkeypatch):
    names = {case.name for case in gpu_cases()}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=85e9))
    cases = bench.gpu_cases(CPU)  # the interpreter is taken for a GPU with FP8 units
    assert len({(case.name, case.shape) for case in cases}) == len(cases) and {case.name for case in cases} >= names
    assert {case.rate for case in cases if case.name in ("fp8_product", "experts FP8")} == {2}
    assert {case.rate for case in cases if case.name not in ("fp8_product", "experts FP8")} == {1}


def test_the_stopwatch_of_a_gpu(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            assert log[-1] == "synchronize"
            return 3.0  # milliseconds

    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: types.SimpleNamespace(zero_=lambda: log.append("erase")))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("synchronize"))
    seconds = bench.stopwatch(torch.device("cuda"))([lambda: log.append("first"), lambda: log.append("second")])
    assert seconds == 0.003 and log == ["erase", "event", "first", "event", "erase", "event", "second", "event", "synchronize"]


def wrong(result, how: str):
    """A result with one thing wrong."""
    result = result.clone()
    if how == "a row unwritten":
        result[-1] = torch.empty_like(result[-1])
    elif how == "a number off":
        result[0, 7] += 1
    elif how == "a shape off":
        result = result[:-1]
    return result


@needs_kernels
@pytest.mark.parametrize("how", ["a row unwritten", "a number off", "a shape off"])
def test_a_wrong_kernel_is_not_timed(how, monkeypatch):
    right, case = cpu.small_linear, bench.linear_case(3, 200, 300, False)
    assert bench.measure(case, CPU, CEILINGS, 2).problem is None
    monkeypatch.setattr(cpu, "small_linear", lambda *operands: wrong(right(*operands), how))
    row = bench.measure(case, CPU, CEILINGS, 2)
    assert row.problem.startswith("wrong: off by") and row.quartiles is None and not row.rivals


@needs_kernels
def test_a_kernel_that_fails_is_a_line(monkeypatch):
    def fails(*operands):
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(cpu, "rms_norm", fails)
    assert bench.measure(bench.norm_case(2, 64), CPU, CEILINGS, 2).problem == "RuntimeError: no room at all"


@needs_kernels
def test_rivals_that_cannot_or_do_something_else_are_left_out():
    case = bench.linear_case(3, 200, 300, False)

    def make(g) -> Work:
        work = case.make(g)
        return replace(work, rivals={**work.rivals, "absent": lambda: torch.zeros(2) @ torch.zeros(3), "zero": lambda: torch.zeros(3, 200)})

    assert list(bench.measure(replace(case, make=make), CPU, CEILINGS, 2).rivals) == ["bf16"]


@needs_kernels
def test_every_set_of_data_is_another_and_together_they_exceed_the_caches(monkeypatch):
    seen = []
    case = bench.linear_case(1, 200, 300, False)
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 10 * case.bytes)

    def make(g) -> Work:
        work = case.make(g)
        seen.append(work.expected())
        return work

    assert bench.measure(replace(case, make=make), CPU, CEILINGS, 2).problem is None
    assert len(seen) == 20 and len({float(result.sum()) for result in seen}) == 20


def test_times_are_medians_of_rounds_and_rivals_take_turns(monkeypatch):
    clock = iter([99.0, 99.0, 1.0, 2.0, 9.0, 9.0, 2.0, 4.0, 3.0, 12.0, 4.0, 4.0])  # a round to warm up, then five; one of them disturbed
    monkeypatch.setattr(bench, "stopwatch", lambda device: lambda calls: next(clock))
    work = Work(lambda: None, lambda: None, {"torch": lambda: None})
    quartiles, ratios = bench.time_in_turn([work, work], ["torch"], CPU, 5)
    assert quartiles == (2.0, 3.0, 4.0) and ratios == {"torch": 2.0}


@pytest.mark.parametrize(
    "nbytes, operations, rate, floor, bound", [(10**9, 10**9, 1, 0.1, "memory"), (10**9, 10**11, 1, 1.0, "arithmetic"), (10**9, 10**11, 2, 0.5, "arithmetic")]
)
def test_floors(nbytes, operations, rate, floor, bound, monkeypatch):
    monkeypatch.setattr(bench, "time_in_turn", lambda *rest: ((floor * 2, floor * 4, floor * 5), {}))
    case = Case("name", "shape", nbytes, operations, lambda g: Work(lambda: torch.ones(1, 2), lambda: torch.ones(1, 2)), rate=rate)
    row = bench.measure(case, CPU, CEILINGS)
    assert (row.floor, row.bound, row.share) == (floor, bound, 0.25)


@pytest.fixture
def tiny(monkeypatch):
    """The benchmark with small cases and no ceilings to measure."""
    monkeypatch.setattr(bench, "cpu_cases", cpu_cases)
    monkeypatch.setattr(bench, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 2**16)


@needs_kernels
def test_report_through_a_file(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "decode", lambda weight, scale: torch.zeros(weight.shape, dtype=torch.bfloat16))
    heard, threads = [], torch.get_num_threads()
    report = bench.bench("cpu", threads=1, repeats=2, hear=heard.append)
    assert [case.name for case in heard] == [row.name for row in report.rows] and torch.get_num_threads() == threads
    assert [row.name for row in report.rows if row.problem] == ["decode"] and (report.threads, report.repeats, report.kind) == (1, 2, "cpu")
    bench.save(report, tmp_path / "report.json")
    assert bench.load(tmp_path / "report.json") == report
    fields = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert fields["torch"] == torch.__version__ and len(fields["rows"][0]["quartiles"]) == 3

    text = bench.table(report).splitlines()
    assert len(text) == 3 + 1 + len(report.rows) + 2 and "copy 10.0 GB/s, bf16 product 100 GFLOPS" in text[1]
    assert "wrong: off by" in text[4 + 4] and text[5].index("200 × 300") == text[3].index("shape")
    bench.save_plot(report, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


@needs_kernels
def test_only_chooses_by_name_and_shape(tiny):
    assert {row.name for row in bench.bench("cpu", "ATTEND*cached", 1, 2).rows} == {"attend bf16", "attend FP8"}
    assert [row.shape for row in bench.bench("cpu", "M 5", 1, 2).rows if row.name.startswith("small")] == ["200 × 300, M 5"] * 2


@needs_kernels
@pytest.mark.parametrize(
    "words, sentence",
    [
        ({"only": "quantum"}, "fits no kernel, there are small_linear bf16, small_linear FP8, decode"),
        ({"device": "abacus"}, "--device abacus is not available here"),
        ({"device": "meta"}, "--device meta has no kernels in this package"),
        ({"repeats": 1}, "at least 2 rounds"),
        ({"threads": 0}, "at least 2 rounds and 1 thread"),
    ],
)
def test_what_is_refused(words, sentence, tiny):
    with pytest.raises(InputError, match=sentence):
        bench.bench(**{"device": "cpu"} | words)


def test_nothing_is_timed_without_a_compiler_or_under_the_interpreter(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "kernels", lambda: None)
        with pytest.raises(InputError, match="C compiler"):
            bench.find_device("cpu")
    monkeypatch.setattr(torch, "empty", lambda *shape, device: types.SimpleNamespace(device=torch.device(device)))
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(knobs=types.SimpleNamespace(runtime=types.SimpleNamespace(interpret=True))))
    with pytest.raises(InputError, match="TRITON_INTERPRET is set"):
        bench.find_device("cuda")


def test_outputs_are_checked_first(tmp_path, monkeypatch):
    bench.check_outputs(tmp_path / "a.json", tmp_path / "a.png")
    bench.check_outputs(None, None)
    for json_file, plot, sentence in [(tmp_path, None, "--json .* cannot be written"), (None, Path("no/where.png"), "--plot .* cannot be written"), (None, tmp_path / "a.txt", "kind of picture")]:
        with pytest.raises(InputError, match=sentence):
            bench.check_outputs(json_file, plot)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs matplotlib"):
        bench.check_outputs(None, tmp_path / "a.png")


def test_ceilings_of_this_machine_are_sane():
    ceilings = bench.measure_ceilings(CPU, 1)
    assert 1e8 < ceilings.copy < 1e13 and 1e8 < ceilings.product < 1e15


def test_table_has_units():
    row = Row("a", "b", 10**9, 10**12, 0.1, "memory", 1, (0.1, 0.2, 0.3), 0.0, {"bf16": 1.5})
    assert bench.line(row) == ["a", "b", "200 ms", "±50%", "5.0 GB/s", "50% of memory", "1.50× bf16"]
    assert bench.speed(replace(row, bound="arithmetic", quartiles=(1e-3, 1e-3, 1e-3))) == "1000 TFLOPS"
    assert [bench.duration(t) for t in (2.345, 0.1234, 2.5e-5, 3e-8)] == ["2.35 s", "123 ms", "25 µs", "0.03 µs"]
