"""Plans against what layouts and models really hold."""

import dataclasses
import json
import sys

import pytest
import torch

from deepseek_lit import InputError, LatentCache, ModelConfig, cli
from deepseek_lit.config import tiny_config
from deepseek_lit.parallel import parse_layout, pieces, rank_model
from deepseek_lit.plan import Work, activation_bytes, as_text, best_layout, cache_bytes, fits, most, plan, step_floor, weight_bytes
from models import random_config

RELEASE = ModelConfig()
H100 = 79.1


@pytest.mark.parametrize("text", ["tp8", "pp2xtp8", "pp4xdp2xtp2xep4", "dp16xep16+16", "tp16xep16"])
@pytest.mark.parametrize("mtp", [False, True])
def test_weights_of_the_release(text, mtp):
    """The sum over parts is the sum over pieces, but for the prediction layer's copies of embedding and head."""
    layout = parse_layout(text)
    for stage in {0, layout.pp - 1}:
        held = pieces(RELEASE, layout, stage * layout.stage_ranks, mtp=mtp)
        exact = sum(piece.nbytes for piece in held if not piece.name.startswith("model.layers.61.") or not piece.name.endswith(("embed_tokens.weight", "head.head.weight")))
        assert weight_bytes(RELEASE, layout, mtp=mtp)[stage] == exact


@pytest.mark.parametrize("text", ["tp1", "tp2", "pp2", "pp2xep2", "dp2xtp2xep4"])
def test_weights_are_those_of_the_model(text):
    """A rank's own model, in bfloat16: what its parameters weigh, but for the gate's bias, which stays float32."""
    config, layout = random_config(1, num_attention_heads=4, intermediate_size=160, moe_intermediate_size=64, vocab_size=128, torch_dtype="bfloat16", num_hidden_layers=5), parse_layout(text)
    for stage, planned in enumerate(weight_bytes(config, layout)):
        with torch.device("meta"):
            model = rank_model(config, layout, stage * layout.stage_ranks)
        assert planned == sum(p.numel() * (4 if name.endswith("bias") else 2) for name, p in model.named_parameters())


def test_dequantized_weights_are_twice_as_many_bytes():
    config = tiny_config()
    plain, fp8 = weight_bytes(config, parse_layout("tp1"), dequantize=True), weight_bytes(config, parse_layout("tp1"))
    assert fp8 < plain < [2 * nbytes for nbytes in fp8]
    with torch.device("meta"):
        model = rank_model(config, parse_layout("tp1"), 0)
    assert plain == [sum(p.numel() * (4 if name.endswith("bias") else 2) for name, p in model.named_parameters())]


@pytest.mark.parametrize("context, slots", [(100, 128), (128, 128), (1, 64)])
def test_cache_is_that_of_the_pages(context, slots):
    cache = LatentCache(RELEASE, 3, slots, device="meta", dtype=torch.bfloat16)
    assert cache_bytes(RELEASE, parse_layout("tp8"), context, 3) == [cache.c_kv.nbytes + cache.k_rope.nbytes]
    assert sum(cache_bytes(RELEASE, parse_layout("pp4"), context, 3)) == cache.c_kv.nbytes + cache.k_rope.nbytes
    assert cache_bytes(RELEASE, parse_layout("dp16xep16"), context, 48) == [cache.c_kv.nbytes + cache.k_rope.nbytes]


def test_more_of_anything_needs_more():
    layout = parse_layout("tp16")
    base = activation_bytes(RELEASE, layout, 4096, 4, 512)
    assert base <= activation_bytes(RELEASE, layout, 8192, 4, 512) and base < activation_bytes(RELEASE, layout, 4096, 8, 512)
    assert step_floor(RELEASE, layout, 1, 8) < step_floor(RELEASE, layout, 64, 8)
    assert step_floor(RELEASE, parse_layout("tp8"), 1, 8) < step_floor(RELEASE, parse_layout("tp8"), 1, 4)  # across machines


def test_eight_h100_are_not_enough():
    answer = plan(RELEASE, "best", 8, H100, context=4096, batch=1)
    assert not answer["fits"] and answer["most_context"] == answer["most_batch"] == 0
    assert answer["instead"][0].startswith("2 nodes of 8 GPUs") and "does not fit" in as_text(answer)


@pytest.mark.parametrize("gpus, nodes, memory", [(8, 1, 139.8), (8, 2, H100)])
def test_these_are(gpus, nodes, memory):
    answer = plan(RELEASE, "best", gpus, memory, context=4096, batch=4, nodes=nodes)
    layout, capacity = parse_layout(answer["layout"]), answer["memory"]
    assert answer["fits"] and layout.ranks == gpus * nodes and not answer["instead"]
    for limit, field in ((answer["most_context"], "context"), (answer["most_batch"], "batch")):
        work = Work(context=4096, batch=4)
        assert fits(RELEASE, layout, dataclasses.replace(work, **{field: limit}), capacity)
        assert limit == RELEASE.max_position_embeddings or not fits(RELEASE, layout, dataclasses.replace(work, **{field: limit + 1}), capacity)


def test_what_would_fit_fits():
    answer = plan(RELEASE, "dp16xep16", 8, H100, context=65536, batch=64, nodes=2)
    assert not answer["fits"]
    context = next(int(way.split()[3]) for way in answer["instead"] if "context" in way)
    assert plan(RELEASE, "dp16xep16", 8, H100, context, 64, nodes=2)["fits"] and context == answer["most_context"]


def test_best_is_refused_by_nothing():
    assert best_layout(RELEASE, 7, Work(128, 4), 10**15, 8) is not None  # a pipeline of seven
    assert best_layout(RELEASE, 64, Work(4096, 1), int(H100 * 2**30), 8).dp == 1  # one prompt: no rows of their own


@pytest.mark.parametrize("arguments, reason", [
    (("tp32", 8, H100, 4096, 1, 4), "128-blocks"), (("tp8", 6, H100, 4096, 1), "takes 8 GPUs"), (("most", 8, H100, 4096, 1), "is no layout"), (("best", 67, H100, 4096, 1), "there is no layout of 67"),
])  # fmt: skip
def test_impossible_plans(arguments, reason):
    with pytest.raises(InputError, match=reason):
        plan(RELEASE, *arguments)


def test_most():
    assert [most(9, lambda n, k=k: n <= k) for k in (-1, 0, 4, 9, 20)] == [0, 0, 4, 9, 9]


def command(monkeypatch, capsys, *words) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["deepseek-lit", "plan", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0, *capsys.readouterr()


def test_command(monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "--gpus", "8", "--memory", "139.8", "--layout", "tp8")
    assert code == 0 and "layout tp8" in out and "It fits" in out
    code, out, _ = command(monkeypatch, capsys, "671B", "--nodes", "2", "--layout", "pp2xtp8", "--batch", "4", "--json")
    answer = json.loads(out)
    assert code == 0 and answer == plan(RELEASE, "pp2xtp8", 8, H100, 8192, 4, nodes=2)
    assert all(sum(stage.values()) == 2 * stage["total"] for stage in answer["stages"])


@pytest.mark.parametrize("words, reason", [
    (["--layout", "tp32", "--nodes", "4"], "expected for example pp2xtp16"), (["--context", "999999"], "expected at most 163840"), (["/nowhere"], "/nowhere does not exist"),
])  # fmt: skip
def test_command_refuses(monkeypatch, capsys, words, reason):
    code, out, err = command(monkeypatch, capsys, *words)
    assert code == 2 and not out and reason in err and err.count("\n") == 1


def test_dequantized_plan_says_that_fp8_would_fit():
    answer = plan(RELEASE, "pp2xtp8", 8, H100, 4096, 1, nodes=2, dequantize=True)
    assert not answer["fits"] and "FP8 weights left as they are (no dequantize)" in answer["instead"]
    assert plan(RELEASE, "pp2xtp8", 8, H100, 4096, 1, nodes=2)["fits"]
