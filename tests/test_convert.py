"""Per-rank files: the same parameters as slices, bit by bit; killed and resumed; damaged, misnamed, opened under another layout. No processes are spawned here; test_parallel runs one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from deepseek_lit import LLM, InputError, cli, load_model
from deepseek_lit import convert as module
from deepseek_lit import parallel
from deepseek_lit.cast import cast
from deepseek_lit.checkpoint import inspect_checkpoint, map_checkpoint, own_copies, read_checkpoint, read_ranks, save_model
from deepseek_lit.config import ModelConfig
from deepseek_lit.convert import convert, shifted, verify_ranks
from deepseek_lit.mtp import add_mtp
from deepseek_lit.parallel import find_part, open_part, parse_layout, rank_file
from models import random_config, random_model

SIZES = {
    "vocab_size": 256, "num_attention_heads": 4, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128, "hidden_size": 200, "q_lora_rank": 130, "kv_lora_rank": 33,
    "moe_intermediate_size": 256, "intermediate_size": 512, "n_shared_experts": 1, "num_hidden_layers": 3, "torch_dtype": "bfloat16",
}  # fmt: skip
PLACEMENT = {1: [7, 6, 5, 4, 3, 2, 1, 0, 3, 4], 2: [0, 2, 4, 6, 1, 3, 5, 7, 7, 7]}


def write(path: Path, fp8: bool, own: tuple[str, ...] = ()) -> Path:
    """A random model with an MTP layer that has the embedding or the head of its `own`, in many files; tensors that it shares with the main model are stored again, as in the release."""
    config = random_config(3, **SIZES, num_nextn_predict_layers=1)
    model = add_mtp(random_model(config), [f"model.layers.3.{name}" for name in own])
    generator = torch.Generator().manual_seed(4)
    for parameter in model.model.layers[-1].parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    save_model(model.requires_grad_(False), path, fp8=fp8, max_shard_bytes=700_000)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    write(folder / "fp8", fp8=True, own=("embed_tokens.weight",))
    write(folder / "plain", fp8=False)
    (folder / "fp8/tokenizer_config.json").write_text("{}")
    convert(folder / "fp8", folder / "done", "tp2")
    return folder


def part_of(path: Path, layout: str, rank: int, dequantize: bool = False, mtp: bool = False, placement=None, dtype=None) -> dict[str, torch.Tensor]:
    """What one rank holds when it opens a directory, by name."""
    layout = parse_layout(layout)
    part = find_part(path, layout, rank, dequantize, placement, mtp)
    return dict(open_part(path, part, layout, rank, torch.device("cpu"), dtype, dequantize, quiet=True).named_parameters())


def check_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)), name


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


# The same numbers


SAME = {"fp8": ("tp2", "tp2xep4", "dp2xep2+2", "pp2xtp2"), "fp8 dequantized": ("tp4", "tp2xep4", "dp2xep2+2"), "plain": ("tp4", "tp2xep4", "pp3")}


@pytest.mark.parametrize("model, layout", [(model, layout) for model, layouts in SAME.items() for layout in layouts])
def test_same_parameters_as_slices(folder, tmp_path, model, layout):
    model, dequantize = model.split()[0], model.endswith("dequantized")
    source, out = folder / model, tmp_path / "out"
    placement = PLACEMENT if "+" in layout else None
    convert(source, out, layout, placement, dequantize, verify=True)
    mtp = "pp" not in layout
    for rank in range(parse_layout(layout).ranks):
        for with_mtp in {False, mtp}:
            check_same(part_of(out, layout, rank, mtp=with_mtp), part_of(source, layout, rank, dequantize, with_mtp, placement, torch.bfloat16))
        if not dequantize:
            check_same(part_of(out, layout, rank, dtype=torch.float32), part_of(source, layout, rank, dtype=torch.float32, placement=placement))


def test_converted_files_can_be_dequantized_when_opened(folder):
    for rank in range(2):
        check_same(part_of(folder / "done", "tp2", rank, dequantize=True, mtp=True), part_of(folder / "fp8", "tp2", rank, dequantize=True, mtp=True))


def test_dequantized_equals_cast_first(folder, tmp_path):
    convert(folder / "fp8", tmp_path / "direct", "tp4", dequantize=True)
    cast(folder / "fp8", tmp_path / "bf16", "bf16")
    convert(tmp_path / "bf16", tmp_path / "twice", "tp4")
    direct, twice = contents(tmp_path / "direct"), contents(tmp_path / "twice")
    assert "quantization_config" not in json.loads(direct["config.json"])
    for rank in range(4):
        check_same(part_of(tmp_path / "direct", "tp4", rank, mtp=True), part_of(tmp_path / "twice", "tp4", rank, mtp=True))
    assert direct.keys() == twice.keys()


def test_small_pieces_change_nothing(folder, tmp_path, monkeypatch):
    """Runs of one block of rows, on the writing and on the reading side."""
    from deepseek_lit import cast as casting

    monkeypatch.setattr(casting, "PIECE_BYTES", 1000)
    monkeypatch.setattr(parallel, "READ_BYTES", 1000)
    monkeypatch.setattr(parallel, "AHEAD_BYTES", 5000)
    monkeypatch.setattr(parallel, "stays_view", lambda *_: False)
    convert(folder / "fp8", tmp_path / "out", "tp2")
    assert {name: data for name, data in contents(tmp_path / "out").items() if name.startswith("rank")} == {
        name: data for name, data in contents(folder / "done").items() if name.startswith("rank")
    }
    small = part_of(folder / "fp8", "tp2", 1, dequantize=True, mtp=True)
    monkeypatch.undo()
    check_same(small, part_of(folder / "fp8", "tp2", 1, dequantize=True, mtp=True))


def test_what_is_in_the_files(folder):
    """Other people's readers, anybody's checksum, and the MTP layer with the embedding of its own."""
    listed, layout = read_ranks(folder / "done"), parse_layout("tp2")
    assert listed["layout"] == "tp2" and listed["mtp"] and not listed["dequantized"] and listed["experts"] is None
    assert own_copies(map_checkpoint(folder / "fp8"), ModelConfig.from_pretrained(folder / "fp8")) == {"model.layers.3.embed_tokens.weight"}
    for rank in range(2):
        file = rank_file(folder / "done", layout, rank)
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt", "layout": "tp2", "rank": str(rank), "dequantized": "false"}
            names = set(opened.keys())
            assert opened.get_tensor("model.layers.3.eh_proj.weight").shape == (200, 400)
        assert "model.layers.3.embed_tokens.weight" in names and "model.layers.3.shared_head.head.weight" not in names
        assert zlib.crc32(file.read_bytes()) == listed["files"][file.name]["crc32"] and file.stat().st_size == listed["files"][file.name]["bytes"]
    assert (folder / "done/tokenizer_config.json").exists() and not (folder / "done/progress.json").exists() and not list((folder / "done").glob("*.part"))


def test_experts_are_recorded(folder, tmp_path):
    out = tmp_path / "out"
    convert(folder / "fp8", out, "dp2xep2+2", PLACEMENT)
    part = find_part(out, parse_layout("dp2xep2+2"), 1, False)
    assert part.expert_placement == PLACEMENT, "who opens it need not say it again"
    with safe_open(rank_file(out, parse_layout("dp2xep2+2"), 1), "pt") as opened:
        assert json.loads(opened.metadata()["experts"]) == {str(layer): slots for layer, slots in PLACEMENT.items()}
    with pytest.raises(InputError, match="in other slots than expert_placement says"):
        find_part(out, parse_layout("dp2xep2+2"), 1, False, {1: PLACEMENT[2], 2: PLACEMENT[2]})
    with pytest.raises(InputError, match="not to layout dp2xep2"):
        convert(folder / "fp8", out, "dp2xep2+2")
    with pytest.raises(InputError, match="layer 2 has 9 slots for 8 experts, expected 10"):
        convert(folder / "fp8", tmp_path / "wrong", "dp2xep2+2", PLACEMENT | {2: PLACEMENT[2][:9]})


@pytest.mark.parametrize("runs", [1, 7])
def test_checksums_in_any_order(runs):
    generator = torch.Generator().manual_seed(runs)
    data = bytes(torch.randint(256, (3_000_001,), dtype=torch.uint8, generator=generator).tolist())
    edges = [0, *sorted(torch.randint(len(data), (runs - 1,), generator=generator).tolist()), len(data)]
    total = 0
    for i in torch.randperm(runs, generator=generator).tolist():
        total ^= shifted(zlib.crc32(data[edges[i] : edges[i + 1]]), len(data) - edges[i + 1])
    assert total == zlib.crc32(data)


# Interrupted, and begun again


def test_killed_and_resumed(folder, tmp_path):
    """The process is gone between one moment and the next, with some of the source noted and some of it dealt and not noted."""
    out, sources = tmp_path / "out", len({entry.file for entry in read_checkpoint(folder / "fp8").values()})
    code = f"""
import os, signal
from deepseek_lit import convert as module
files, honest = set(), module.deal
def deal(job, cuts, checksums):
    files.add(job.source.file)
    while len(files) == 4 and not (module.Path({str(out)!r}) / module.PROGRESS).exists(): pass
    if len(files) == 5: os.kill(os.getpid(), signal.SIGKILL)
    return honest(job, cuts, checksums)
module.deal = deal
module.convert({str(folder / "fp8")!r}, {str(out)!r}, "tp2")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    noted = json.loads((out / "progress.json").read_text())["done"]
    assert 1 <= len(noted) <= 4 < sources and len(list(out.glob("*.part"))) == 2 and not (out / "config.json").exists()
    with pytest.raises(InputError, match="config.json"):
        find_part(out, parse_layout("tp2"), 0, False)
    written = convert(folder / "fp8", out, "tp2", verify=True)
    assert written < sum(row["bytes"] for row in read_ranks(out)["files"].values())
    assert contents(out) == contents(folder / "done")


@pytest.mark.parametrize("jobs_done", [0, 40, 10**9])
def test_interrupted_anywhere_and_resumed(folder, tmp_path, monkeypatch, jobs_done):
    """Also after the last file of the source, when one of two files has its name and the other has not."""
    honest, settle, done = module.deal, module.settle, []

    def failing(job, cuts, checksums):
        done.append(job)
        if len(done) > jobs_done:
            raise KeyboardInterrupt
        return honest(job, cuts, checksums)

    def settle_one(shard):
        if list((tmp_path / "out").glob("rank*.safetensors")):
            raise KeyboardInterrupt
        settle(shard)

    monkeypatch.setattr(module, "deal", failing)
    monkeypatch.setattr(module, "settle", settle_one)
    with pytest.raises(KeyboardInterrupt):
        convert(folder / "fp8", tmp_path / "out", "tp2")
    monkeypatch.undo()
    written = convert(folder / "fp8", tmp_path / "out", "tp2")
    assert (written == 0) == (jobs_done > 1000), "everything was written, only a name was missing"
    assert contents(tmp_path / "out") == contents(folder / "done")


def test_a_finished_conversion_has_nothing_left_to_do(folder, tmp_path):
    out = Path(shutil.copytree(folder / "done", tmp_path / "out"))
    assert convert(folder / "fp8", out, "tp2", verify=True) == 0
    assert contents(out) == contents(folder / "done")


def test_a_temporary_file_that_is_not_ours_is_begun_again(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(module, "settle", lambda shard: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(folder / "fp8", out, "tp2")
    monkeypatch.undo()
    part = next(out.glob("*.part"))
    os.truncate(part, part.stat().st_size - 1)
    assert convert(folder / "fp8", out, "tp2", verify=True) > 0
    assert contents(out) == contents(folder / "done")


def test_a_damaged_file_is_found_and_written_again(folder, tmp_path):
    out = Path(shutil.copytree(folder / "done", tmp_path / "out"))
    file = rank_file(out, parse_layout("tp2"), 1)
    data = bytearray(file.read_bytes())
    data[-1000] ^= 4
    file.write_bytes(data)
    find_part(out, parse_layout("tp2"), 1, False)  # size and header are right
    for check in (lambda: verify_ranks(out), lambda: convert(folder / "fp8", out, "tp2", verify=True)):
        with pytest.raises(InputError, match=f"{file.name} is damaged"):
            check()
    file.unlink()
    with pytest.raises(InputError, match=f"{file.name} is missing"):
        verify_ranks(out)
    assert convert(folder / "fp8", out, "tp2", verify=True) == len(data)
    assert contents(out) == contents(folder / "done")


@pytest.mark.parametrize("damage, sentence", [
    (lambda one, other: os.truncate(one, one.stat().st_size - 1), "is truncated"),
    (lambda one, other: shutil.copyfile(other, one), "is not the file that ranks.json lists"),
    (lambda one, other: one.unlink(), "cannot be read"),
])  # fmt: skip
def test_a_wrong_file_is_refused_when_opened(folder, tmp_path, damage, sentence):
    out = Path(shutil.copytree(folder / "done", tmp_path / "out"))
    damage(*(rank_file(out, parse_layout("tp2"), rank) for rank in (0, 1)))
    with pytest.raises(InputError, match=sentence):
        find_part(out, parse_layout("tp2"), 0, False)
    find_part(out, parse_layout("tp2"), 1, False)


@pytest.mark.parametrize("stays", [True, False], ids=["mapped", "read"])
def test_a_shard_that_becomes_shorter_is_a_sentence(folder, tmp_path, monkeypatch, stays):
    """Cut after its header was read: no SIGBUS, and no thread is left waiting."""
    path = Path(shutil.copytree(folder / "plain", tmp_path / "plain"))
    layout = parse_layout("tp2")
    part = find_part(path, layout, 0, False)
    file = sorted({entry.file for entry in part.entries.values()})[1]
    if not stays:
        monkeypatch.setattr(parallel, "stays_view", lambda *_: False)
        monkeypatch.setattr(parallel, "check_sizes", lambda _: None)
    os.truncate(file, file.stat().st_size - 100_000)
    with pytest.raises(InputError, match=f"{file.name} became shorter while it was read"):
        open_part(path, part, layout, 0, torch.device("cpu"), None, False, quiet=True)


def test_reading_ahead_stays_in_its_window(folder, monkeypatch):
    """What is asked for is what will be read, each byte once, in the order of the files, and never more than the window before it is."""
    monkeypatch.setattr(parallel, "READ_BYTES", 4096)
    monkeypatch.setattr(parallel, "AHEAD_BYTES", 20_000)
    part, asked = find_part(folder / "fp8", parse_layout("tp2"), 0, False), []
    order = sorted(part.wanted, key=lambda piece: part.entries[piece.name][:2])
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, first, length, advice: asked.append(length))
    spans = parallel.spans(order, part.entries)
    ahead, read = parallel.ReadAhead(spans), 0
    for piece in order:
        nbytes = piece.shape[0] * parallel.row_bytes(part.entries[piece.name])
        ahead.move(nbytes)
        read += nbytes
        assert read <= sum(asked) <= read + 20_000 + 4096 or sum(asked) == sum(end - first for _, first, end in spans)
    assert sum(asked) == read == sum(end - first for _, first, end in spans) and max(asked) <= 4096 and len(spans) < len(order)


# What is refused: in one sentence, before anything is written


def refused(sentence: str, *arguments, **options) -> None:
    out = arguments[1]
    before = contents(out) if out.is_dir() else None
    with pytest.raises(InputError, match=sentence) as caught:
        convert(*arguments, **options)
    assert "\n" not in str(caught.value)
    assert (contents(out) if before is not None else sorted(out.glob("*.safetensors*"))) == (before if before is not None else [])


def test_another_layout_names_both(folder):
    for layout in ("tp1", "pp2xtp2", "tp2xep2", "ep2"):
        with pytest.raises(InputError, match=rf"converted for layout tp2 and cannot be opened under layout {layout}"):
            find_part(folder / "done", parse_layout(layout), 0, False)


def test_a_converted_directory_is_no_checkpoint(folder, tmp_path):
    for work in (load_model, LLM, inspect_checkpoint, lambda path: cast(path, tmp_path / "out", "bf16"), lambda path: convert(path, tmp_path / "out", "tp2")):
        with pytest.raises(InputError, match="converted for the 2 ranks of layout tp2 and holds no whole tensors"):
            work(folder / "done")
    assert not (tmp_path / "out").exists()
    broken = Path(shutil.copytree(folder / "done", tmp_path / "broken"))
    (broken / "ranks.json").write_text("[]")
    with pytest.raises(InputError, match="is not the list that"):
        load_model(broken)


def test_without_mtp(folder, tmp_path):
    convert(folder / "plain", tmp_path / "pp2", "pp2")
    assert not read_ranks(tmp_path / "pp2")["mtp"]
    config = json.loads((folder / "plain/config.json").read_text())
    save_model(load_model(folder / "plain"), tmp_path / "main", fp8=False)
    assert config["num_nextn_predict_layers"] == 1
    convert(tmp_path / "main", tmp_path / "out", "tp2")
    with pytest.raises(InputError, match="converted without a Multi-Token Prediction layer"):
        find_part(tmp_path / "out", parse_layout("tp2"), 0, False, mtp=True)


def test_refusals(folder, tmp_path):
    refused("cuts through 128-blocks", folder / "fp8", tmp_path / "out", "tp4")
    refused("is no layout", folder / "fp8", tmp_path / "out", "8")
    refused("nothing to dequantize", folder / "plain", tmp_path / "out", "tp2", dequantize=True)
    refused("does not exist", tmp_path / "nowhere", tmp_path / "out", "tp2")
    refused("is the checkpoint itself", folder / "plain", folder / "plain", "tp2")
    refused("to layout tp2, not to layout ep2", folder / "fp8", folder / "done", "ep2")
    refused("to layout tp2, not to layout tp2, dequantized", folder / "fp8", folder / "done", "tp2", dequantize=True)
    refused("of another checkpoint, or of", folder / "plain", folder / "done", "tp2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("")
    refused("is not empty", folder / "fp8", tmp_path / "full", "tp2")


def test_the_disk_is_asked_first(folder, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    out = Path(shutil.copytree(folder / "done", tmp_path / "done"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused("GB free, expected", folder / "fp8", tmp_path / "out", "tp2")
    assert convert(folder / "fp8", out, "tp2") == 0, "what is written already needs no room"


def test_a_full_disk_is_one_sentence(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "rank")

    monkeypatch.setattr(module, "store", full)
    with pytest.raises(InputError, match="No space left on device"):
        convert(folder / "fp8", tmp_path / "out", "tp2")
    assert not (tmp_path / "out/config.json").exists()


# On the command line


def command(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["deepseek-lit", "convert", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    captured = capsys.readouterr()
    return ended.value.code or 0, captured.out, captured.err


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    code, out, err = command(monkeypatch, capsys, folder / "fp8", tmp_path / "out", "--layout", "tp4", "--dequantize", "--verify")
    assert code == 0 and out == "" and err.count("\n") == 1 and err.startswith("wrote ") and err.endswith(", verified\n")
    assert read_ranks(tmp_path / "out")["dequantized"] and read_ranks(tmp_path / "out")["layout"] == "tp4"
    code, out, err = command(monkeypatch, capsys, folder / "fp8", tmp_path / "out", "--layout", "tp2")
    assert code == 2 and out == "" and err.count("\n") == 1 and "to layout tp4, dequantized, not to layout tp2" in err
    code, _, err = command(monkeypatch, capsys, folder / "fp8", tmp_path / "other")
    assert code == 2 and "--layout" in err and "Traceback" not in err


def test_an_interrupted_command_says_that_it_can_go_on(folder, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "convert", interrupted)
    code, _, err = command(monkeypatch, capsys, folder / "fp8", tmp_path / "out", "--layout", "tp4")
    assert code == 130 and err.startswith("stopped; the same command goes on from here\n")
