"""Layouts over real processes: one spawn of four gloo ranks runs them all and writes down what happened; the tests read."""

import dataclasses
import datetime
import re
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from deepseek_lit import InputError, LatentCache, ModelConfig, SamplingParams, load_model, save_model
from deepseek_lit.checkpoint import map_checkpoint, read_checkpoint, write_hollow
from deepseek_lit.config import checkpoint_tensors, tensor_bytes, tiny_config
from deepseek_lit.convert import convert
from deepseek_lit.fp8 import dequantize
from deepseek_lit.gate import Gate
from deepseek_lit.generate import Request, decode, prefill, run_batch
from deepseek_lit.mtp import add_mtp
from deepseek_lit.parallel import (
    Layout, bytes_to_copy, check_layout, fan_out, fill_rank, layers_of, load_rank, parse_layout, pieces, place_experts, place_layer, rank_loads, rank_model, recorded_loads,
    refusal, wire_bytes,
)  # fmt: skip
from deepseek_lit.viz import record
from models import random_config, random_model, write_checkpoint

SIZES = {"vocab_size": 128, "num_attention_heads": 4, "moe_intermediate_size": 64, "intermediate_size": 160, "num_hidden_layers": 4}
FP8_SIZES = {
    "vocab_size": 256, "num_attention_heads": 4, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "hidden_size": 200, "q_lora_rank": 130,
    "moe_intermediate_size": 256, "intermediate_size": 512, "n_shared_experts": 1,
}  # fmt: skip
LAYOUTS = ("tp2", "tp4", "ep2", "tp2xep4", "dp2xep2", "dp4xep4", "dp2xtp2xep4", "pp2", "pp4", "pp2xtp2", "pp2xdp2xep2", "ep2+2", "dp4xep4+4")
BLOCK_IDS = torch.arange(4 * 6).view(4, 6) * 5 % 97
PROMPTS = 4


def prompts(vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in (9, 15, 12, 10)]


def run(model, ids: list[list[int]], steps: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of all steps [prompts, 1 + steps, vocab] and greedy tokens, with a prompt read in two chunks and the cache."""
    cache = LatentCache(model.config, len(ids), 64, dtype=model.lm_head.weight.dtype)
    logits = [prefill(model, ids, cache, chunk=8)]
    for step in range(steps):
        logits.append(decode(model, logits[-1].argmax(-1).tolist(), [len(p) + step for p in ids], cache))
    logits = torch.stack(logits, 1)
    return logits, logits.argmax(-1)


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    layout: str
    dtype: torch.dtype = torch.float32
    dequantize: bool = False

    def __str__(self) -> str:
        return f"{self.model}-{self.layout}-{str(self.dtype)[6:]}{'-dequantized' if self.dequantize else ''}"


CASES = (
    *(Case("random", layout) for layout in LAYOUTS),
    *(Case("other", layout) for layout in ("tp4", "dp2xtp2xep4")),
    *(Case("fp8", layout) for layout in ("tp2", "tp2xep2", "pp2xtp2", "dp2xtp2xep4+4")),
    *(Case("bundled", layout) for layout in ("ep2", "dp4xep4", "pp2xdp2xep2")),
    *(Case("bundled", layout, dequantize=True) for layout in ("tp2", "tp4", "pp2xtp2")),
    *(Case("bundled", layout, torch.bfloat16) for layout in ("ep4", "dp2xep2")),
)  # fmt: skip


def worker(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4, timeout=datetime.timedelta(seconds=60))
    results = {}
    for case in CASES:
        path = None if case.model == "bundled" else folder / case.model
        model = load_rank(path, case.layout, dtype=case.dtype, dequantize=case.dequantize)
        team = model.team
        rows = rows_of(team.layout, team.seat.row)
        logits, tokens = run(model, prompts(model.config.vocab_size)[rows])
        team.sent.clear()
        with torch.inference_mode():
            model(BLOCK_IDS[rows])
        results[str(case)] = {"row": team.seat.row, "logits": logits, "tokens": tokens, "sent": dict(team.sent)}
    for source, layout, guesses in TALKS:
        model = load_rank(folder / source, layout, dtype=torch.float32, mtp=guesses > 0)
        results[source, layout, guesses] = talk(model, guesses)
    placement = torch.load(folder / "placement.pt")
    for layout in PLACED:
        model = load_rank(folder / "random", layout, expert_placement=placement)
        results["placed", layout] = run(model, prompts(model.config.vocab_size)[rows_of(model.team.layout, model.team.seat.row)])
    for layout in WATCHED:
        model = load_rank(folder / "random", layout)
        results["watched", layout] = record(model, WATCHED_IDS, heads=()).routing, layers_of(ModelConfig.from_pretrained(folder / "random"), model.team.layout, model.team.seat.stage).start
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


def rows_of(layout: Layout, row: int) -> slice:
    """The prompts that a row of ranks answers."""
    return slice(row * PROMPTS // layout.dp, (row + 1) * PROMPTS // layout.dp) if layout.dp > 1 else slice(None)


PLACED = ("tp2xep4+4", "dp4xep4+4")  # experts where EPLB puts them
TALKS = (("mtp", "pp2xtp2", 0), ("mtp", "tp2", 2), ("mtp", "tp2xep4", 1), ("converted", "tp2xep4", 1))


WATCHED, WATCHED_IDS = ("tp2xep4", "dp4xep4", "pp2xtp2"), list(range(3, 20))


def talk(model, guesses: int) -> list[list[int]]:
    """Greedy replies of several lengths by the engine of chapter 14, with so many tokens guessed in every step."""
    requests = [
        Request(prompt, SamplingParams(max_tokens=4 + 2 * i, temperature=0.0, ignore_eos=True), frozenset(), None, 200, model.config.vocab_size)
        for i, prompt in enumerate(prompts(model.config.vocab_size))
    ]
    run_batch(model, requests, 0, 8, guesses, None)
    return [request.output.token_ids for request in requests]


def write_mtp(path: Path) -> Path:
    """A random model with an MTP layer that has an embedding of its own, and the main model's head."""
    config = random_config(1, **SIZES, num_nextn_predict_layers=1)
    model = add_mtp(random_model(config), [f"model.layers.{config.num_hidden_layers}.embed_tokens.weight"])
    generator = torch.Generator().manual_seed(4)
    for parameter in model.model.layers[-1].parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * (config.initializer_range if parameter.dim() > 1 else 0.3) + (parameter.dim() == 1)
    save_model(model.requires_grad_(False), path, fp8=False)
    return path


def recorded_placement(path: Path) -> dict[int, list[int]]:
    """Slots for four redundant experts, from what the router chooses for some tokens."""
    model = load_model(path)
    with recorded_loads(model) as loads:
        model(BLOCK_IDS)
    return place_experts(model.config, parse_layout(PLACED[0]), loads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    write_checkpoint(folder / "random", random_config(1, **SIZES), shards=3)
    write_checkpoint(folder / "other", random_config(5, **SIZES, q_lora_rank=None, num_experts_per_tok=4, tie_word_embeddings=True), seed=3)
    write_checkpoint(folder / "fp8", random_config(2, **FP8_SIZES), fp8=True, shards=4)
    convert(write_mtp(folder / "mtp"), folder / "converted", "tp2xep4")
    torch.save(recorded_placement(folder / "random"), folder / "placement.pt")
    mp.start_processes(worker, (folder,), nprocs=4, start_method="forkserver")
    return folder


@pytest.fixture(scope="module")
def ranks(folder) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.fixture(scope="module")
def alone(folder) -> dict:
    """What one process says."""
    found = {}
    for model, dtype, dequantized in {(case.model, case.dtype, case.dequantize) for case in CASES}:
        whole = load_model(None if model == "bundled" else folder / model, dtype=dtype, dequantize=dequantized)
        found[model, dtype, dequantized] = run(whole, prompts(whole.config.vocab_size))
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_equals_one_process(case, ranks, alone):
    logits, tokens = alone[case.model, case.dtype, case.dequantize]
    for rank in ranks:
        found = rank[str(case)]
        rows = rows_of(parse_layout(case.layout), found["row"])
        if case.dtype == torch.float32:
            assert (found["logits"] - logits[rows]).norm() <= 1e-3 * logits[rows].norm()
            assert torch.equal(found["tokens"], tokens[rows])
        else:  # other sums, other roundings: the first logits only, for later ones may follow other tokens
            assert (found["logits"][:, 0] - logits[rows, 0]).norm() <= 3e-2 * logits[rows, 0].norm()


@pytest.mark.parametrize("layout", PLACED)
def test_placed_experts_say_the_same(layout, ranks, alone, folder):
    placement = torch.load(folder / "placement.pt")
    assert placement.keys() == {1, 2, 3} and any(slots != [*range(8), 0, 1, 2, 3] for slots in placement.values())
    logits, tokens = alone["random", torch.float32, False]
    for r, rank in enumerate(ranks):
        rows = rows_of(parse_layout(layout), r)
        assert (rank["placed", layout][0] - logits[rows]).norm() <= 1e-3 * logits[rows].norm()
        assert torch.equal(rank["placed", layout][1], tokens[rows])


@pytest.mark.parametrize("source, layout, guesses", TALKS)
def test_the_engine_writes_the_same(source, layout, guesses, ranks, folder):
    """Prompts of several lengths, replies that end one after the other, tokens guessed by the MTP layer, slices or files of the ranks' own: what one process writes without guessing."""
    alone = talk(load_model(folder / "mtp", dtype=torch.float32), 0)
    assert [len(reply) for reply in alone] == [4, 6, 8, 10]
    for rank in ranks:
        assert rank[source, layout, guesses] == alone


@pytest.mark.parametrize("layout", WATCHED)
def test_routers_of_ranks_can_be_watched(layout, ranks, folder):
    whole = record(load_model(folder / "random"), WATCHED_IDS, heads=()).routing
    for rank in ranks:
        routing, first = rank["watched", layout]
        assert routing and all(torch.equal(routing[layer].chosen, whole[first + layer].chosen) for layer in routing)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_counted_bytes_are_the_derived_ones(layout, ranks, folder):
    layout, case = parse_layout(layout), str(Case("random", layout))
    counted = Counter()
    for rank in ranks:
        counted.update(rank[case]["sent"])
    counted.pop("counts", None)
    config = ModelConfig.from_pretrained(folder / "random")
    tokens = BLOCK_IDS.numel() * 4 // layout.ranks  # so many copies of the model have read the block
    derived = {purpose: nbytes * tokens for purpose, nbytes in wire_bytes(config, layout, width=4).items()}
    if layout.dp > 1:
        visits = travels(load_model(folder / "random"), layout) if layout.tp == 1 and not layout.redundant else counted["combine"] / (4 * config.hidden_size)
        derived |= {"combine": visits * 4 * config.hidden_size, "dispatch": visits * (4 * config.hidden_size + 8 * config.num_experts_per_tok)}
        assert 0 < visits <= (layout.ep - 1) * tokens * 3
    assert counted == pytest.approx(derived)


def travels(model, layout: Layout) -> int:
    """How often a token of the block visits another rank, summed over layers, rows and the copies of the model, from the router's own choices."""
    chosen, each = [], model.config.n_routed_experts // layout.ep
    for gate in filter(lambda module: isinstance(module, Gate), model.modules()):
        gate.register_forward_hook(lambda module, args, out: chosen.append(out[1]))
    model(BLOCK_IDS)
    home_T = torch.arange(layout.dp).repeat_interleave(BLOCK_IDS.numel() // layout.dp).tolist()
    visits = sum(len({e // each for e in experts} - {home}) for layer in chosen for home, experts in zip(home_T, layer.tolist()))
    return visits * 4 // layout.ranks


def test_expected_fan_out():
    """Against a router that has no favourites, drawn at random."""
    config, layout = ModelConfig(), parse_layout("dp16xep16")
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(3000):
        groups = torch.randperm(8, generator=generator)[:4]
        eligible = (groups[:, None] * 32 + torch.arange(32)).flatten()
        ranks = eligible[torch.randperm(128, generator=generator)[:8]] // 16
        found.append(len(set(ranks.tolist()) - {3}))
    assert fan_out(config, layout) == pytest.approx(sum(found) / len(found), rel=0.02)
    assert fan_out(config, parse_layout("dp4xep4")) < 4 and fan_out(config, parse_layout("dp256xep256")) == pytest.approx(8 * 255 / 256)


@pytest.mark.parametrize("layout", [*LAYOUTS, "pp3xtp2", "dp2xtp4xep8", "tp2xep8+8"])
@pytest.mark.parametrize("fp8", [False, True])
def test_pieces_make_the_whole(layout, fp8):
    """Every number of every tensor is somewhere, and as often as it should be."""
    config = random_config(2, **FP8_SIZES | {"num_attention_heads": 8, "moe_intermediate_size": 512}, num_hidden_layers=4, fp8=fp8)
    layout, copies, tensors = parse_layout(layout), {}, checkpoint_tensors(config)
    check_layout(config, layout, fp8)
    for rank in range(layout.ranks):
        with torch.device("meta"):
            model = rank_model(config, layout, rank)
        held = list(pieces(config, layout, rank))
        for piece in held:
            copies.setdefault(piece.name, torch.zeros(tensors[piece.name][1], dtype=torch.int32))[piece.index] += 1
            assert model.get_parameter(piece.local.removesuffix("_scale_inv")).dim() == len(piece.shape)
            assert piece.name.endswith("_scale_inv") or model.get_parameter(piece.local).shape == piece.shape
        assert {piece.local for piece in held if not piece.name.endswith("_scale_inv")} == set(dict(model.named_parameters()))
    assert copies.keys() == tensors.keys()
    for name, count in copies.items():
        shared = re.search(r"q_proj|q_b_proj|kv_b_proj|o_proj|gate_proj|up_proj|down_proj|embed|lm_head", name)
        wanted = layout.stage_ranks if not shared else layout.rows
        if ".experts." in name:
            wanted = 1 if layout.ep == 1 else 1 + (int(name.split(".")[5]) < layout.redundant)
        assert (count == wanted).all(), name


REPLICATED = r"norm|q_a_proj|kv_a_proj|mlp\.gate\.|bias|eh_proj"


@pytest.mark.parametrize("text", ["tp8", "tp16", "ep16", "ep32", "pp2xtp8"])
def test_release_adds_up(text):
    """The ranks of the real model hold its 688,574,839,360 bytes, and the replicated parts once more for each that repeats them: exactly."""
    layout, config = parse_layout(text), ModelConfig()
    check_layout(config, layout, fp8=True)
    tensors = checkpoint_tensors(config)
    whole = tensor_bytes(tensors)
    assert whole == 688_574_839_360
    repeated = {name: t for name, t in tensors.items() if (".experts." not in name if layout.ep > 1 else re.search(REPLICATED, name))}
    total = 0
    for stage in range(layout.pp):  # the ranks of a stage hold as much as each other: look at the first and the last
        first, last = (sum(p.nbytes for p in pieces(config, layout, rank, mtp=True)) for rank in (stage * layout.stage_ranks, (stage + 1) * layout.stage_ranks - 1))
        assert first == last
        total += first * layout.stage_ranks
    assert total == whole + (layout.stage_ranks - 1) * tensor_bytes(repeated)


@pytest.mark.parametrize("layout, reason, instead", [
    ("tp32", "model.layers.0.mlp.gate_proj.weight has 18432 rows, 576 for each of 32 ranks, which cuts through 128-blocks", "pp2xtp16"),
    ("tp3", "model.embed_tokens.weight has 129280 rows, which 3 ranks cannot share evenly", "pp3"),
    ("tp256xep256", "has 128 heads, which 256 ranks cannot share evenly", None),
    ("ep24", "model.layers.*.mlp.experts are 256 with the redundant ones, which 24 ranks cannot share evenly", "pp3xep8"),
    ("ep16+5", "experts are 261", "ep16"),
    ("pp62", "61 layers", "pp31xep2"),
])  # fmt: skip
def test_refused(layout, reason, instead):
    with pytest.raises(InputError) as error:
        check_layout(ModelConfig(), parse_layout(layout), fp8=True)
    assert reason in str(error.value) and layout in str(error.value)
    if instead:
        assert f"expected for example {instead}" in str(error.value)
        assert refusal(ModelConfig(), parse_layout(instead), True) is None


def test_dequantized_weights_can_be_cut_anywhere():
    assert "or the weights dequantized" in refused(tiny_config(), "tp2")
    check_layout(tiny_config(), parse_layout("tp2"), fp8=False)
    assert "dequantized" not in refused(tiny_config(), "tp3")


def refused(config: ModelConfig, layout: str) -> str:
    with pytest.raises(InputError) as error:
        check_layout(config, parse_layout(layout), fp8=True)
    return str(error.value)


def test_tied_embedding_stays_in_one_stage():
    config = random_config(0, tie_word_embeddings=True, vocab_size=128, num_attention_heads=2)
    assert refusal(config, parse_layout("tp2"), False) is None
    assert "model.embed_tokens.weight" in refusal(config, parse_layout("pp2"), False)


@pytest.mark.parametrize("text", ["", "tp", "tp0", "8", "tp2xtp2", "xp2", "tp2+", "tp2,ep2", "tp-2"])
def test_no_layout(text):
    with pytest.raises(InputError, match="is no layout|sizes are positive"):
        parse_layout(text)


@pytest.mark.parametrize("text, reason", [("dp2", "share nothing"), ("tp4+2", "redundant"), ("tp4xep2", "no multiple"), ("dp2xtp2xep8", "ep4"), ("dp4xep2", "ep4")])
def test_sizes_that_do_not_go_together(text, reason):
    with pytest.raises(InputError, match=reason):
        parse_layout(text)


@pytest.mark.parametrize("text, ranks", [("tp8", 8), ("pp2xtp8", 16), ("ep16", 16), ("tp16xep16", 16), ("dp4xtp4xep16+32", 16), ("tp8xep32", 32), ("PP4", 4), ("tp1", 1)])
def test_layout_text(text, ranks):
    assert parse_layout(text).ranks == ranks and str(parse_layout(text)) == text.lower()


def test_rank_reads_only_its_slices(folder):
    """Views of the mapped files where rows are cut; every number where it belongs, in FP8 and dequantised."""
    path, config = folder / "fp8", ModelConfig.from_pretrained(folder / "fp8")
    whole, entries, layout = map_checkpoint(path), read_checkpoint(path), parse_layout("tp2")
    for dequantized in (False, True):
        model = rank_model(config, layout, 1)
        held = list(pieces(config, layout, 1))
        fill_rank(model, held, entries, torch.device("cpu"), torch.float32, dequantized, quiet=True)
        for piece in held:
            if dequantized and piece.name.endswith("_scale_inv"):
                continue
            wanted = whole[piece.name]
            if dequantized and f"{piece.name}_scale_inv" in whole:
                wanted = dequantize(wanted, whole[f"{piece.name}_scale_inv"])
            assert torch.equal(model.get_parameter(piece.local).float(), wanted[piece.index].float()), piece.name


def test_example_of_eplb():
    """The README of deepseek-ai/EPLB: two layers of 12 experts in 4 groups, 16 slots on 8 GPUs of 2 nodes."""
    loads = [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
    assert [place_layer(layer, 16, 8, groups=4, nodes=2) for layer in loads] == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]


def test_placement_balances_recorded_loads():
    model = load_model(dtype=torch.float32)
    with recorded_loads(model) as loads, torch.inference_mode():
        model(torch.arange(300)[None])
    assert loads.shape == (3, 16) and (loads.sum(1) == 300 * 4).all()
    layout = parse_layout("dp4xep4+8")
    placement = place_experts(model.config, layout, loads)
    assert placement.keys() == {1, 2, 3}
    for layer, load in zip(placement, loads.tolist()):
        assert set(placement[layer]) == set(range(16)) and len(placement[layer]) == 24
        before, after = max(rank_loads(load, range(16), 4)), max(rank_loads(load, placement[layer], 4))
        assert after <= before and after <= 1.2 * sum(load) / 4


def test_rank_opens_the_release(tmp_path):
    """One of 16 ranks of the real layout, from files as large as the real ones: every weight is a view, nothing is copied."""
    config, layout = ModelConfig(), parse_layout("dp16xep16")
    write_hollow(config, tmp_path)
    start, entries = time.process_time(), read_checkpoint(tmp_path)
    held = list(pieces(config, layout, 3))
    with torch.device("meta"):
        model = rank_model(config, layout, 3)
    fill_rank(model, held, entries, torch.device("cpu"), torch.bfloat16, dequantize_now=False, quiet=True)
    assert time.process_time() - start < 10
    assert bytes_to_copy(held, entries, torch.device("cpu"), torch.bfloat16, dequantize=False) == 0
    assert sum(piece.nbytes for piece in held) == sum(p.nbytes for p in model.parameters())
    assert len(model.model.layers[60].mlp.experts) == 16 and model.model.layers[60].mlp.gate.weight.shape == (256, 7168)
