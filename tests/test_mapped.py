"""A model that runs from its files: the same numbers, no page too many, memory that stays small, and a sentence for what cannot be."""

import contextlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from models import random_config, write_checkpoint
from tolerances import LOGITS

from deepseek_lit import LLM, InputError, LatentCache, SamplingParams, cli, load_model, mapped
from deepseek_lit.checkpoint import read_checkpoint, resolve, write_hollow

PAGED = {"hidden_size": 256, "moe_intermediate_size": 128, "n_routed_experts": 16, "torch_dtype": "bfloat16"}  # an expert is some dozens of pages


@pytest.fixture(scope="module")
def paged(tmp_path_factory) -> Path:
    """An FP8 checkpoint in several shards."""
    return write_checkpoint(tmp_path_factory.mktemp("mapped") / "paged", random_config(3, **PAGED), fp8=True, shards=3)


@pytest.fixture
def alone(paged, tmp_path) -> Path:
    """A copy whose pages nobody else uses, on the disk and not only on its way there."""
    path = Path(shutil.copytree(paged, tmp_path / "alone"))
    for file in path.glob("*.safetensors"):
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    return path


def logits(model, ids: list[list[int]], chunks: list[int]) -> torch.Tensor:
    """Logits of some sequences, read in chunks of these lengths."""
    config, out, first = model.config, [], 0
    cache = LatentCache(config, len(ids), len(ids[0]), dtype=getattr(torch, config.torch_dtype))
    for length in chunks:
        rows = torch.tensor(ids)[:, first : first + length]
        with torch.inference_mode():
            out.append(model(rows, torch.arange(first, first + length).expand_as(rows), cache))
        first += length
    return torch.cat(out, 1)


def forget(model) -> None:
    """Leave nothing of the model's files in memory."""
    keeper = model.keeper
    keeper.asked.clear()
    spans = [mapped.Span(file, 0, file.stat().st_size) for file in keeper.pages.files]
    mapped.release(keeper.pages, spans)
    mapped.drop(keeper.pages, spans)


def inner_pages(keeper, part) -> float:
    """The share of a part's pages that are in the page cache, those at the edges of its tensors left out: they belong to neighbours, too."""
    found = [mapped.cached_pages(keeper.pages, span)[1:-1] for span in keeper.spans(part)]
    return sum(map(sum, found)) / max(sum(map(len, found)), 1)


IDS = [[5, 80, 60, 7, 34, 9, 11, 3], [1, 2, 90, 4, 5, 66, 7, 8]]


# The same numbers


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}, {"n_shared_experts": 0}, {"first_k_dense_replace": 3}], ids=["plain", "tied", "no shared", "dense"])
def test_same_logits_as_plain(tmp_path, seed, fields):
    path = write_checkpoint(tmp_path / "model", random_config(seed, **fields), shards=2)
    expected = logits(load_model(path), IDS, [5, 1, 2])
    for room in (0, 50_000, None):
        model = load_model(path, placement="mapped")
        if room is not None:
            model.keeper.plan = mapped.plan_pages(model.keeper.sizes, room)
        assert torch.equal(logits(model, IDS, [5, 1, 2]), expected)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_rounds_of_experts(tmp_path, most):
    path = write_checkpoint(tmp_path / "model", random_config(1))
    model, expected = load_model(path, placement="mapped"), logits(load_model(path), IDS, [6, 2])
    for layer in model.model.layers[1:]:
        layer.mlp.source.most = most
    assert (logits(model, IDS, [6, 2]) - expected).abs().max() < LOGITS


@pytest.mark.parametrize("count", [1, 3, 8])
def test_slots_of_a_device(tmp_path, count):
    path = write_checkpoint(tmp_path / "model", random_config(2))
    plain = load_model(path, placement="mapped")
    model = load_model(path, placement="mapped", expert_memory=2 * count * mapped.expert_bytes(plain.keeper))
    sources = [layer.mlp.source for layer in model.model.layers[1:]]
    assert [source.most for source in sources] == [count, count]
    chunks = [4, 1, 1, 1, 1]
    assert (logits(model, IDS, chunks) - logits(load_model(path), IDS, chunks)).abs().max() < LOGITS
    for source in sources:
        source.settle()
        assert len(source.held) <= count and len(set(source.held.values())) == len(source.held)
        for expert, slot in source.held.items():
            for held, stored in zip(source.experts[slot].parameters(), source.stored[expert].parameters()):
                assert torch.equal(held, stored)
    assert sum(source.found for source in sources) > 0 or count == 1


def test_slots_hold_fp8(paged):
    size = mapped.expert_bytes(load_model(paged, placement="mapped").keeper)
    plain, model = load_model(paged, placement="mapped"), load_model(paged, placement="mapped", expert_memory=2 * 6 * size)
    ids = [IDS[0]]
    assert torch.equal(logits(model, ids, [1] * 8), logits(plain, ids, [1] * 8))


def test_least_recently_used_slot_goes(paged):
    model = load_model(paged, placement="mapped", expert_memory=2 * 3 * mapped.expert_bytes(load_model(paged, placement="mapped").keeper))
    source = model.model.layers[1].mlp.source
    for experts, held in (([4, 5, 6], {4, 5, 6}), ([5, 7], {5, 6, 7}), ([6], {5, 6, 7}), ([1, 2], {6, 1, 2})):
        mapped.fetch(source, experts)
        assert set(source.held) == held


def test_speculation_writes_the_same(tmp_path):
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    prompts = ["def read(file):\n", "class "]
    replies = {guesses: [out.token_ids for out in LLM(placement="mapped", speculative_tokens=guesses).generate(prompts, params)] for guesses in (0, 2)}
    assert replies[0] == replies[2]


def test_hollow_checkpoint_with_mtp(tmp_path):
    write_hollow(random_config(0, num_nextn_predict_layers=1, fp8=True, torch_dtype="bfloat16", hidden_size=96, moe_intermediate_size=64), tmp_path, shards=2)
    llm = LLM(tmp_path, placement="mapped", speculative_tokens=1)
    llm.model.keeper.plan = mapped.plan_pages(llm.model.keeper.sizes, 0)
    assert len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))[0].token_ids) == 6


# No page too many


def test_only_chosen_experts_are_read(alone):
    model = load_model(alone, placement="mapped")
    keeper, chosen = model.keeper, {}
    for index in (1, 2):
        model.model.layers[index].mlp.gate.register_forward_hook(lambda gate, args, out, index=index: chosen.setdefault(index, set()).update(out[1].flatten().tolist()))
    forget(model)
    if any(inner_pages(keeper, part) for part in keeper.sizes):
        pytest.skip("this file system's pages cannot be dropped")
    logits(model, [IDS[0][:1]], [1])
    for (layer, kind) in keeper.sizes:
        wanted = isinstance(kind, str) or kind in chosen[layer]
        assert inner_pages(keeper, (layer, kind)) > 0.9 if wanted else inner_pages(keeper, (layer, kind)) == 0, (layer, kind)
    assert all(0 < len(experts) < 16 for experts in chosen.values())


def test_pages_follow_the_plan(alone):
    model = load_model(alone, placement="mapped")
    keeper = model.keeper
    always = sum(size for (_, kind), size in keeper.sizes.items() if isinstance(kind, str))
    keeper.plan = mapped.plan_pages(keeper.sizes, always + 2 * 5 * mapped.expert_bytes(keeper))
    assert keeper.plan.experts == 5 and not keeper.plan.everything
    forget(model)
    if any(inner_pages(keeper, part) for part in keeper.sizes):
        pytest.skip("this file system's pages cannot be dropped")
    logits(model, [IDS[0]], [1] * 8)
    for layer in (1, 2):
        there = {kind for at, kind in keeper.sizes if at == layer and inner_pages(keeper, (layer, kind)) > 0.9}
        assert there == {"always", *keeper.recent[layer]} and len(keeper.recent[layer]) == 5
    keeper.plan = mapped.plan_pages(keeper.sizes, 0)
    logits(model, [IDS[0]], [1] * 8)
    keeper.asked.clear()  # after a token the first layer is asked for once more
    assert all(inner_pages(keeper, part) == 0 for part in keeper.sizes if part != keeper.first)


def mapped_now(path: Path) -> int:
    """Bytes of a directory's files that are in this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            ours = str(path) in line
        elif ours and words[0] == "Rss:":
            total += int(words[1]) * 1024
    return total


def test_process_gives_pages_back(alone):
    model = load_model(alone, placement="mapped")
    plan = mapped.plan_pages(model.keeper.sizes, 10**12)
    size = sum(model.keeper.sizes.values())
    model.keeper.plan = plan._replace(everything=False)  # all is kept in the page cache, nothing in the process
    before = mapped_now(alone)
    logits(model, IDS, [6, 2])
    assert mapped_now(alone) - before < 0.3 * size
    model.keeper.plan = plan
    logits(model, IDS, [6, 2])
    assert mapped_now(alone) - before > 0.5 * size


def test_wishes_are_no_longer_than_the_read_ahead(paged, monkeypatch):
    model, asked = load_model(paged, placement="mapped"), []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, first, length, advice: asked.append((first, length)))
    pages = model.keeper.pages
    pages.piece = 5000
    mapped.announce(pages, mapped.Span(next(iter(pages.files)), 100, 22_000))
    assert sum(length for _, length in asked) == 21_900 and max(length for _, length in asked) == 5000
    assert all(first + length == after for (first, length), (after, _) in zip(asked, asked[1:]))


@pytest.mark.parametrize("room", [0, 1, 299, 300, 350, 700, 1000, 2000])
def test_plan(room):
    sizes = {(None, "head"): 100, (0, "always"): 100, (1, "always"): 100} | {(1, expert): 50 for expert in range(16)}
    plan = mapped.plan_pages(sizes, room)
    used = sum(sizes[part] for part in plan.kept) + plan.experts * 50
    assert used <= room and (room - used < 50 or plan.everything or not plan.kept or room < 300)
    assert plan.everything == (room >= sum(sizes.values())) and len(plan.kept) == min(room // 100, 3)


# Sentences


@pytest.mark.parametrize(
    "wish, words",
    [
        ({"placement": "disk"}, ["'disk'", "'mapped'"]),
        ({"placement": "mapped", "dequantize": True}, ["dequantize"]),
        ({"placement": "mapped", "dtype": torch.float32}, ["bfloat16", "float32", ".safetensors"]),
        ({"placement": "mapped", "expert_memory": 5}, ["expert_memory", "at least", "2 layers"]),
        ({"expert_memory": 10**9}, ["expert_memory", "placement"]),
    ],
)
def test_refused(paged, wish, words):
    with pytest.raises(InputError) as refused:
        load_model(paged, **wish)
    assert all(word in str(refused.value) for word in words) and "\n" not in str(refused.value)


def test_layout_and_placement_are_one_too_many():
    with pytest.raises(InputError, match="placement"):
        LLM(placement="mapped", layout="tp2")


# What a person sees


def test_first_token_grows_by_layers(paged, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.n, self.closed = total, 0, False
            bars.append(self)

        def update(self):
            self.n += 1

        def close(self):
            self.closed = True

    monkeypatch.setattr(mapped, "tqdm", Bar)
    model = load_model(paged, placement="mapped")
    logits(model, IDS, [6, 1, 1])
    assert [(bar.total, bar.n, bar.closed) for bar in bars] == [(3, 3, True)]


def test_estimate(paged, monkeypatch):
    model = load_model(paged, placement="mapped")
    keeper, config = model.keeper, model.config
    monkeypatch.setattr(mapped, "disk_speed", lambda files: 1e6)
    monkeypatch.setattr(mapped, "weight_speed", lambda config, device: 1e9)
    monkeypatch.setattr(mapped, "share_cached", lambda keeper, parts: 0.0)
    always = sum(size for (_, kind), size in keeper.sizes.items() if isinstance(kind, str))
    token = always + 2 * config.num_experts_per_tok * mapped.expert_bytes(keeper)
    keeper.plan = mapped.plan_pages(keeper.sizes, 0)
    nothing = mapped.estimate(model)
    assert nothing.later == pytest.approx(token) and nothing.seconds == pytest.approx((token / 1e6 + token / 1e9,) * 2)
    assert mapped.estimate(model, 10_000).first == pytest.approx(sum(keeper.sizes.values()), rel=0.01)
    keeper.plan = mapped.plan_pages(keeper.sizes, 10**12)
    assert mapped.estimate(model).later_stored == 0 and "an estimate" in str(nothing)


def test_speeds_are_measured(paged):
    assert mapped.disk_speed(sorted(paged.glob("*.safetensors")), 0.1) > 0
    assert mapped.weight_speed(random_config(0), torch.device("cpu"), 1) > 1e6


def test_command(paged, tmp_path, monkeypatch, capsys):
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    for file in resolve(None).iterdir():
        (tiny / file.name).symlink_to(file)
    for words, expected in ((["--placement", "mapped"], 0), (["--placement", "mapped", "--expert-memory", "0.01"], 0), (["--placement", "shelf"], 2)):
        monkeypatch.setattr(sys, "argv", ["deepseek-lit", "generate", "--model", str(tiny), "--prompt", "def f(", "--max-tokens", "4", "--temperature", "0", "--device", "cpu", *words])
        with contextlib.suppress(SystemExit) if expected == 0 else pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        if expected:
            assert ended.value.code == expected and "placement" in err and not out
        else:
            assert out.startswith("def f(") and "an estimate" in err and "GB/s from the disk" in err


def test_parts_are_all_tensors():
    entries = read_checkpoint(resolve(None))
    parts = mapped.parts_of(entries, tied=False)
    rows = sum("embed_tokens" in name for name in entries)
    assert sum(map(len, parts.values())) + rows == len(entries)
    assert len(parts[1, 3]) == 6 and {kind for _, kind in parts} >= {"always", "head", 0, 15}
