"""Plans against what layouts and models really hold."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import typer
from torch.distributed.run import parse_args
from torch.testing._internal.distributed.fake_pg import FakeStore

from deepseek_lit import InputError, LatentCache, ModelConfig, cli
from deepseek_lit.config import tiny_config
from deepseek_lit.checkpoint import opened_config, resolve
from deepseek_lit.parallel import load_rank, parse_layout, pieces, rank_model
from deepseek_lit.plan import ENVIRONMENT, Work, activation_bytes, as_text, best_layout, cache_bytes, fits, most, nodes_taken, plan, program, slurm_script, step_floor, weight_bytes
from models import random_config

RELEASE = ModelConfig()
H100 = 79.1


@pytest.mark.parametrize("text, mtp", [("tp8", False), ("tp8", True), ("pp2xtp8", True), ("pp4xdp2xtp2xep4", True), ("dp16xep16+16", True), ("tp16xep16", True)])
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


@pytest.mark.parametrize("text, dequantize, mtp", [
    ("tp1", False, False), ("tp1", False, True), ("tp1", True, True), ("ep4", False, True), ("dp4xep4+4", False, True), ("dp2xep2", True, False),
    ("tp2xep4", True, True), ("dp2xtp2xep4", True, True), ("tp4", True, True), ("pp2xep2", False, False), ("pp4", False, False), ("pp2xtp2", True, False),
])  # fmt: skip
def test_a_loaded_rank_weighs_what_was_planned(text, dequantize, mtp):
    """Real ranks of the bundled FP8 checkpoint, loaded one after the other in a process group that only pretends, to the byte; and their caches."""
    config, layout = opened_config(resolve(None), mtp), parse_layout(text)
    weights, caches = weight_bytes(config, layout, dequantize, mtp), cache_bytes(config, layout, 128, 2 * layout.dp, mtp=mtp)
    for rank in {0, layout.ranks // 2, layout.ranks - 1}:
        dist.init_process_group("fake", rank=rank, world_size=layout.ranks, store=FakeStore())
        try:
            model = load_rank(None, layout, dtype=torch.bfloat16, dequantize=dequantize, mtp=mtp)
        finally:
            dist.destroy_process_group()
        cache = LatentCache(model.config, 2, 128, dtype=torch.bfloat16, further=int(mtp))
        assert weights[rank // layout.stage_ranks] == sum(parameter.nbytes for parameter in model.parameters())
        assert caches[rank // layout.stage_ranks] == cache.c_kv.nbytes + cache.k_rope.nbytes


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


def test_a_plan_with_the_prediction_layer_has_no_stages():
    assert parse_layout(plan(RELEASE, "best", 8, H100, 4096, 1, nodes=2, mtp=True)["layout"]).pp == 1
    with pytest.raises(InputError, match="expected a layout without pp"):
        plan(RELEASE, "pp2xtp8", 8, H100, 4096, 1, nodes=2, mtp=True)


# How it is started


@pytest.mark.parametrize("text, gpus, nodes, taken", [
    ("tp16", 8, 2, (2, 8)), ("tp8", 8, 1, (1, 8)), ("tp8", 8, 2, (1, 8)), ("tp4", 8, 1, (1, 4)), ("dp16xep16+32", 4, 4, (4, 4)), ("tp1", 8, 1, (1, 1)),
])  # fmt: skip
@pytest.mark.parametrize("batch, dequantize, mtp", [(1, False, False), (3, True, False), (1, False, True)])
def test_torchrun_reads_every_command(text, gpus, nodes, taken, batch, dequantize, mtp):
    model = "/models/it's mine/V3 $HOME"
    answer = plan(RELEASE, text, gpus, 10_000, 1000, batch, nodes, dequantize, mtp, model=model, host="node-0.lan")
    assert len(answer["commands"]) == taken[0] == nodes_taken(parse_layout(text), gpus)[0]
    for node, command in enumerate(answer["commands"]):
        executable, *words = shlex.split(command)
        read = parse_args(words)
        assert executable == "torchrun" and read.nproc_per_node == str(taken[1]) and (read.module, read.training_script) == (True, "deepseek_lit")
        if len(answer["commands"]) > 1:
            assert (read.nnodes, read.node_rank, read.master_addr, read.standalone) == (str(taken[0]), node, "node-0.lan", False)
            assert (read.master_port, read.rdzv_conf) == (29500, "timeout=60")
        else:
            assert read.standalone
        name, *words = read.training_script_args
        given = typer.main.get_command(cli.app).commands[name].make_context(name, words).params  # and so does the command that it starts
        assert name == "generate" and (given["model"], given["layout"], given["dequantize"], given["speculative_tokens"]) == (model, text, dequantize, int(mtp))
        assert given["max_tokens"] + mtp == 500 and (given["prompt"] is None) == (batch > 1)
        assert batch == 1 or (given["batch"], str(given["prompts"])) == (batch, "prompts.txt")


def test_nodes_are_used_alike():
    """Twelve ranks on nodes of eight are three nodes of four."""
    words = shlex.split(plan(RELEASE, "pp3xtp4", 8, 10_000, 1000, 1, nodes=3)["commands"][2])
    assert nodes_taken(parse_layout("pp3xtp4"), 8) == (3, 4) and words[1:7] == ["--nnodes", "3", "--nproc-per-node", "4", "--node-rank", "2"]


@pytest.mark.parametrize("text", ["tp16", "tp8"])
def test_the_batch_script_does_the_same(text, tmp_path):
    """Run by a shell whose `srun`, `scontrol` and `torchrun` are stand-ins: two tasks, each with its number."""
    words = program("/models/it's mine/V3 $HOME", parse_layout(text), Work(1000, 1))
    script = slurm_script(parse_layout(text), 8, words)
    nodes = nodes_taken(parse_layout(text), 8)[0]
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert f"#SBATCH --nodes={nodes}\n" in script and "#SBATCH --gpus-per-node=8\n" in script and script.startswith("#!/bin/bash\n#SBATCH")
    stand_ins = {
        "scontrol": 'test "$*" = "show hostnames n[3-4]" && printf "n3\\nn4\\n"',
        "srun": f'test "$1 $2" = "--kill-on-bad-exit=1 --cpus-per-task=96" || exit 1; shift 2; for node in $(seq 0 {nodes - 1}); do SLURM_NODEID=$node "$@"; done',
        "torchrun": 'printf "%s\\0" "$@"; echo',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[3-4]", "SLURM_CPUS_ON_NODE": "96"}
    done = subprocess.run(["bash"], input=script, env=environment, text=True, capture_output=True, check=True)
    tasks = [line.rstrip("\0").split("\0") for line in done.stdout.splitlines()]
    assert len(tasks) == nodes
    for node, task in enumerate(tasks):
        read = parse_args(task)
        assert ["-m", read.training_script, *read.training_script_args] == words and read.nproc_per_node == "8"
        assert nodes == 1 or (read.node_rank, read.master_addr) == (node, "n3")


def test_the_text_says_how_to_start():
    answer = plan(RELEASE, "tp16", 8, H100, 8192, 1, nodes=2, host="n0")
    text = as_text(answer)
    assert all(command in text for command in answer["commands"]) and all(f"export {name}=" in text for name in ENVIRONMENT)
    assert "NCCL" not in as_text(plan(RELEASE, "tp8", 8, 139.8, 8192, 1))
    assert "one copy of 2" in as_text(plan(RELEASE, "tp8", 8, 139.8, 8192, 1, nodes=2))
    refused = plan(RELEASE, "tp8", 8, H100, 8192, 1)
    assert not refused["fits"] and refused["commands"] == [] and refused["slurm"] is None


def test_command_prints_the_script(monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "--nodes", "2", "--layout", "tp16", "--slurm")
    assert code == 0 and out == plan(RELEASE, "tp16", 8, H100, 8192, 1, nodes=2)["slurm"]
    directory = str(resolve(None))
    code, out, _ = command(monkeypatch, capsys, directory, "--gpus", "2", "--layout", "ep2", "--context", "100", "--host", "n0", "--json")
    assert code == 0 and shlex.quote(directory) in json.loads(out)["commands"][0]
    code, out, err = command(monkeypatch, capsys, "--layout", "tp8", "--slurm")
    assert code == 2 and not out and "does not fit, so there is no script; expected 2 nodes" in err
    code, out, err = command(monkeypatch, capsys, "--slurm", "--json")
    assert code == 2 and "expected one of them" in err
