"""Decode steps on the way that a GPU takes: nothing waits, and what is recorded once says the same as the step itself. Kernels run in Triton's interpreter where there is no GPU."""

import copy
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("triton")

from deepseek_lit import LatentCache, ModelConfig, SamplingParams, cpu, fp8, generate, moe, parallel
from deepseek_lit.generate import Request, run_batch
from deepseek_lit.graphs import NoWaiting, Recorder, imaginary_gpu, padded_batch, read_step, record_tape, recordable, recorder_for
from deepseek_lit.model import Decoder, DeepSeekV3, frequencies_on
from deepseek_lit.mtp import add_mtp, guess_ahead
from deepseek_lit.parallel import parallelize, parse_layout, rank_model, wire_bytes
from models import random_model, write_checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = ModelConfig(
    vocab_size=96, hidden_size=136, num_hidden_layers=1, num_attention_heads=2, q_lora_rank=24, kv_lora_rank=40, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16,
    first_k_dense_replace=0, intermediate_size=48, moe_intermediate_size=48, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, n_group=4, topk_group=2,
    num_nextn_predict_layers=1, max_position_embeddings=256,
)  # fmt: skip


def as_on_a_gpu(monkeypatch) -> None:
    """Every dispatch chooses the Triton kernels."""
    monkeypatch.setattr(fp8, "runs_triton", lambda x: True)
    monkeypatch.setattr(cpu, "serves", lambda x, *matrices: False)
    monkeypatch.setattr(cpu, "readable", lambda matrix: False)


@pytest.fixture
def gpu(monkeypatch) -> None:
    as_on_a_gpu(monkeypatch)


def ready(eight_bit: bool = False, mtp: bool = False, dtype: torch.dtype = torch.bfloat16) -> DeepSeekV3:
    """A model as `load_model` leaves it on a GPU: bfloat16 or FP8, experts side by side."""
    model = random_model(CONFIG, 3)
    if mtp:
        model = add_mtp(model)
        generator = torch.Generator().manual_seed(4)
        for parameter in model.model.layers[-1].parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1 + (parameter.dim() == 1)
    model = model.to(DEVICE, dtype).requires_grad_(False)
    for module in model.modules():
        if eight_bit and isinstance(module, fp8.Linear) and module is not model.lm_head:
            module.weight, module.weight_scale_inv = (torch.nn.Parameter(t, requires_grad=False) for t in fp8.quantize(module.weight))
    for module in model.modules():
        if isinstance(module, moe.MoE):
            module.stack()
    return model


def filled_cache(model: DeepSeekV3, batch: int, further: int = 0) -> LatentCache:
    """A cache of two pages per sequence, of which every slot holds something."""
    cache = LatentCache(model.config, batch, 128, DEVICE, torch.bfloat16, further)
    generator = torch.Generator().manual_seed(1)
    for part in (cache.c_kv, cache.k_rope):
        part.copy_(torch.randn(part.shape, generator=generator))
    return cache


def step_of(batch: int, tokens: int, first: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and positions of a step whose sequences stand at `first`."""
    ids_BS = torch.randint(96, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return ids_BS, torch.tensor(first)[:, None] + torch.arange(tokens)


def plain(model: DeepSeekV3, cache: LatentCache, ids_BS: torch.Tensor, positions_BS: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.model(ids_BS.to(DEVICE), positions_BS.to(DEVICE), cache)


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_step_never_waits(tokens, gpu):
    model = ready(eight_bit=tokens == 1, mtp=True)
    cache = filled_cache(model, 2, 1)
    ids_BS, positions_BS = (t.to(DEVICE) for t in step_of(2, tokens, [62, 5]))
    last_B = torch.full((2,), tokens - 1, device=DEVICE)
    with torch.inference_mode():
        frequencies_on(model.config, ids_BS.device)  # computed once, on the host
        with NoWaiting():
            hidden_BSD = model.model(ids_BS, positions_BS, cache)
            logits_BSW = model.lm_head(hidden_BSD).float()
            guess_ahead(model, hidden_BSD, ids_BS, positions_BS, last_B, 1, cache.at_rows(torch.tensor([1, 0], device=DEVICE)))
    assert logits_BSW.isfinite().all()


def asking_place(decoder, ids, positions, cache):
    return *asking_place.plain(decoder, ids, positions, cache)[:3], int(positions.max()) + 1


asking_place.plain = Decoder.place
MISTAKES = {
    "the newest position": lambda patch: patch.setattr(Decoder, "place", asking_place),
    "rows of each expert": lambda patch: patch.setattr(moe.MoE, "stack", lambda layer: None),
    "boolean index": lambda patch: patch.setattr(fp8, "plain", lambda w, s, dtype: fp8.dequantize(w, s, dtype).index_put((w.float() > 1e9,), torch.zeros((), dtype=dtype))),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wait_is_noticed(mistake, gpu, monkeypatch):
    MISTAKES[mistake](monkeypatch)
    model = ready(eight_bit=True)
    ids_BS, positions_BS = (t.to(DEVICE) for t in step_of(2, 1, [3, 5]))
    with torch.inference_mode(), NoWaiting(), pytest.raises(RuntimeError, match="makes the host wait"):
        model.model(ids_BS, positions_BS, filled_cache(model, 2))


def meta_rank(layout: str, monkeypatch) -> DeepSeekV3:
    """A rank's model without numbers, whose messages go nowhere."""
    layout = parse_layout(layout)
    for name in ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "send", "recv"):
        monkeypatch.setattr(parallel.dist, name, lambda *args, **kwargs: None)

    def link(size: int) -> SimpleNamespace:
        return SimpleNamespace(size=size, index=0, group=None, sent=Counter())

    monkeypatch.setattr(parallel, "Audience", lambda team: None)
    row, stage, pipeline = link(layout.tp), link(layout.stage_ranks), link(layout.pp)
    team = SimpleNamespace(layout=layout, rank=0, seat=parallel.seat_of(layout, 0), row=row, stage=stage, pipeline=pipeline, sent=Counter(), keeps_step=True)
    config = ModelConfig(**SMALL_RELEASE)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            model = rank_model(config, layout, 0)
            for module in model.modules():
                if isinstance(module, moe.MoE):
                    module.stack()
            return parallelize(model.requires_grad_(False), config, team)
    finally:
        torch.set_default_dtype(torch.float32)


SMALL_RELEASE = {"num_hidden_layers": 4, "first_k_dense_replace": 1, "n_routed_experts": 16, "vocab_size": 128 * 16, "num_nextn_predict_layers": 0}


@pytest.mark.parametrize("layout", ["tp1", "tp8", "ep8", "tp4xep8", "tp4xep8+8", "dp8xep8", "dp2xtp4xep8+8", "pp2xtp4"])
def test_no_rank_of_any_layout_waits(layout, monkeypatch):
    """At the release's widths, on tensors without numbers: whoever needs one to go on is an error."""
    with torch.no_grad(), imaginary_gpu():
        model = meta_rank(layout, monkeypatch)
        cache = LatentCache(model.config, 3, 128, "meta", torch.bfloat16)
        ids_BS = torch.zeros(3, 1, dtype=torch.int64, device="meta")
        model(ids_BS, ids_BS, cache)
        with NoWaiting():
            assert model(ids_BS, ids_BS, cache).shape == (3, 1, 2048)


def test_travelling_tokens_wait_and_so_do_selected_experts(monkeypatch):
    with torch.no_grad(), imaginary_gpu():
        model = meta_rank("dp8xep8", monkeypatch)
        ids_BS = torch.zeros(3, 1, dtype=torch.int64, device="meta")
        for layer in model.model.layers[1:]:
            layer.mlp.team.keeps_step = False
        with NoWaiting(), pytest.raises(RuntimeError, match="nonzero.default makes the host wait"):
            model(ids_BS, ids_BS, LatentCache(model.config, 3, 128, "meta", torch.bfloat16))


def test_copies_between_devices_are_waits():
    with NoWaiting():
        for copied in (lambda: torch.zeros(3).to("meta"), lambda: torch.zeros(3, device="meta").copy_(torch.zeros(3)), lambda: torch.zeros(3, device="meta")[torch.tensor([1])]):
            with pytest.raises(RuntimeError, match="makes the host wait"):
                copied()
        torch.zeros(3, device="meta").mul_(2.0).copy_(torch.zeros(3, device="meta"))


STEPS = [(1, 1, True, [[62], [64]]), (3, 1, False, [[62, 10, 0], [64, 100, 1]]), (3, 3, False, [[60, 10, 0], [63, 64, 62]])]


def recorder_here(model: DeepSeekV3) -> Recorder:
    """The GPU's, or what takes its place."""
    return Recorder(model, record_tape) if DEVICE == "cpu" else recorder_for(model)


@pytest.mark.parametrize("batch, tokens, eight_bit, firsts", STEPS, ids=["alone", "three of four", "guesses at a page's end"])
def test_replays_equal_steps(batch, tokens, eight_bit, firsts, gpu):
    """Ids and positions change, the recording does not; what other rows of the cache hold is left alone."""
    model = ready(eight_bit)
    cache = filled_cache(model, 6)
    cache.recorder = recorder_here(model)
    cache.keep([4, 1, 2][:batch])
    twin = copy.copy(cache)
    twin.c_kv, twin.k_rope, twin.recorder = cache.c_kv.clone(), cache.k_rope.clone(), None
    for seed, first in enumerate(firsts):
        step = step_of(batch, tokens, first, seed)
        with torch.inference_mode():
            replayed = read_step(model, *step, cache).clone()
        expected = plain(model, twin, *step)
        assert replayed.shape == (batch, tokens, 136) and replayed.isfinite().all()
        torch.testing.assert_close(replayed, expected)
        for mine, wanted in ((cache.c_kv, twin.c_kv), (cache.k_rope, twin.k_rope)):
            torch.testing.assert_close(mine, wanted)
            assert torch.equal(mine[:, [0, 3, 5]], wanted[:, [0, 3, 5]])
    assert list(cache.recorder.recordings) == [(padded_batch(batch), tokens)]


def test_sizes():
    assert [padded_batch(n) for n in (1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 250)] == [1, 2, 4, 4, 8, 8, 16, 16, 24, 32, 256]


def replies(model: DeepSeekV3, guesses: int) -> list[list[int]]:
    requests = [
        Request(prompt, SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True), frozenset(), None, 200, 96)
        for prompt, n in (([5, 7, 9, 11, 2, 3], 3), ([3, 4], 6), ([8], 4))
    ]
    run_batch(model, requests, 0, 8, guesses, None)
    return [request.output.token_ids for request in requests]


def call_again(function):
    """Recording without a GPU or kernels: the same function of the same tensors, its result always in the same place."""
    result = function().clone()
    return lambda: result.copy_(function()), result


@pytest.mark.parametrize("guesses", [0, 2])
def test_the_engine_writes_the_same(guesses, monkeypatch):
    """Replies that end one after the other, with and without guesses ahead: rows keep their places, batches are filled up."""
    monkeypatch.setattr(cpu, "serves", lambda x, *matrices: False)
    model, made = ready(mtp=guesses > 0, dtype=torch.float32 if DEVICE == "cpu" else torch.bfloat16), []

    def recorder(model):
        made.append(Recorder(model, call_again) if DEVICE == "cpu" else recorder_for(model))
        return made[-1]

    monkeypatch.setattr(generate, "recorder_for", lambda model: None)
    expected = replies(model, guesses)
    monkeypatch.setattr(generate, "recorder_for", recorder)
    assert replies(model, guesses) == expected
    assert {batch for batch, _ in made[0].recordings} == {1, 2, 4} and len(made) == 1
    assert (guesses > 0) == any(isinstance(shape, tuple) for _, shape in made[0].recordings)


def test_a_cache_goes_with_its_batch(monkeypatch):
    """Without the help of the garbage collector, which knows nothing of a GPU's memory; a CUDA graph keeps no Python object but its result."""
    monkeypatch.setattr(cpu, "serves", lambda x, *matrices: False)
    model = ready(dtype=torch.float32)
    cache = LatentCache(CONFIG, 1, 64, DEVICE, torch.float32)
    cache.recorder = Recorder(model, lambda function: (lambda: None, function()))
    read_step(model, *step_of(1, 1, [0]), cache)
    memory = weakref.ref(cache)
    assert cache.recorder.recordings
    del cache
    assert memory() is None


def test_what_cannot_be_recorded_runs_plainly_and_says_so_once(gpu):
    def fails(function):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model = ready()
    cache, twin = filled_cache(model, 2), filled_cache(model, 2)
    cache.recorder = Recorder(model, fails)
    cache.keep([1])
    with pytest.warns(UserWarning, match="run launch by launch: operation not permitted when stream is capturing$") as heard:
        for seed in range(2):
            step = step_of(1, 1, [7 + seed], seed)
            torch.testing.assert_close(read_step(model, *step, cache), plain(model, twin.at_rows(torch.tensor([1], device=DEVICE)), *step))
    assert len(heard) == 1
    model.team = SimpleNamespace(sent=Counter())
    cache.recorder = Recorder(model, fails)
    with pytest.raises(RuntimeError, match="not permitted"):  # other ranks would wait for ever
        read_step(model, *step_of(1, 1, [9]), cache)


def test_what_is_recorded(monkeypatch):
    """Not on a CPU, not in float32, not where a hook would be missed or rows have requests of their own."""
    model = ready()
    assert recordable(model) == (DEVICE == "cuda") and (recorder_for(model) is None or DEVICE == "cuda")
    as_on_a_gpu(monkeypatch)
    assert recordable(model) and not recordable(ready(dtype=torch.float32))
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: out)
    assert not recordable(model)
    model.team = SimpleNamespace(layout=parse_layout("tp2"))  # whose messages are hooks
    assert recordable(model)
    model.team = SimpleNamespace(layout=parse_layout("dp2xep2"))
    assert not recordable(model)
    handle.remove()
    model.team = None
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: None)
    assert not recordable(model)
    model.team = SimpleNamespace(layout=parse_layout("tp2"))
    assert not recordable(model)


LAYOUTS = ("dp2xep2", "dp2xep2+2", "ep2")


def worker(rank: int, folder) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    results = {}
    for layout in LAYOUTS:
        model = parallel.load_rank(folder / "model", layout, dtype=torch.float32)
        ids_BS, team = torch.tensor([[5, 7, 9], [8, 3, 1], [2, 2, 6], [4, 60, 90]]), model.team
        mine = ids_BS[rank * 2 : rank * 2 + 2] if layout.startswith("dp") else ids_BS
        with torch.inference_mode():
            travelled = model(mine)
            team.sent.clear()
            team.keeps_step = True
            results[layout] = travelled, model(mine), dict(team.sent)
    with pytest.MonkeyPatch.context() as patch:
        as_on_a_gpu(patch)
        model = parallel.load_rank(folder / "model", "tp2xep2", dtype=torch.bfloat16)
        for module in model.modules():
            if isinstance(module, moe.MoE):
                module.stack()
        cache = filled_cache(model, 2)
        twin, cache.recorder = copy.deepcopy(cache), Recorder(model, record_tape)
        for seed in range(2):
            step, before = step_of(2, 1, [63 + seed, 5], seed), Counter(model.team.sent)
            with torch.inference_mode():
                replayed = read_step(model, *step, cache).clone()
            sent = model.team.sent - before
            expected = plain(model, twin, *step)
            results["recorded", seed] = replayed, expected, sent, model.team.sent - before - sent
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("graphs")
    config = ModelConfig(**{field: getattr(CONFIG, field) for field in CONFIG.__dataclass_fields__} | {"num_nextn_predict_layers": 0, "torch_dtype": "float32", "fp8": False})
    write_checkpoint(folder / "model", config)
    mp.start_processes(worker, (folder,), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_static_messages_say_the_same_and_are_as_long_as_derived(layout, ranks):
    sent = Counter()
    for rank in ranks:
        travelled, gathered, counted = rank[layout]
        torch.testing.assert_close(gathered, travelled, atol=1e-5, rtol=1e-4)
        sent.update(counted)
    config = ModelConfig(**{field: getattr(CONFIG, field) for field in CONFIG.__dataclass_fields__} | {"num_nextn_predict_layers": 0})
    assert sent == pytest.approx({purpose: 12 * n for purpose, n in wire_bytes(config, parse_layout(layout), 4, keeps_step=True).items()})


def test_recorded_messages(ranks):
    """Messages between ranks are part of the recording, and are counted at every replay."""
    for rank in ranks:
        for seed in range(2):
            replayed, expected, sent, sent_plainly = rank["recorded", seed]
            torch.testing.assert_close(replayed, expected)
            assert sent == sent_plainly and sum(sent.values()) > 0
