"""Converting checkpoints: equal to the plain formula, resumable to the byte, readable by transformers, and refusing what makes no sense."""

import json
import math
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import random_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tolerances import LOGITS

from deepseek_lit import cast as module
from deepseek_lit.cast import Job, cast, pieces
from deepseek_lit.checkpoint import INDEX, Entry, load_model, make_header
from deepseek_lit.config import InputError, checkpoint_tensors, scale_shape, to_json

CONFIG = random_config(
    11, hidden_size=200, intermediate_size=260, moe_intermediate_size=150, num_hidden_layers=2, kv_lora_rank=140, qk_rope_head_dim=16, num_nextn_predict_layers=1,
    torch_dtype="bfloat16", fp8=True,
)  # fmt: skip
DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32}


def random_tensor(code: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if code == "F8_E4M3":
        return torch.randint(0, 254, shape, dtype=torch.uint8, generator=generator).apply_(lambda byte: byte + (byte >= 127)).view(torch.float8_e4m3fn)
    return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(DTYPES[code])


def write_fp8(path: Path, shards: int = 5, powers_of_two: bool = False) -> Path:
    """A checkpoint of CONFIG, MTP layer and all, whose tensors are dealt to the shards at random: scales lie apart from their weights."""
    generator, draw = torch.Generator().manual_seed(1), random.Random(2)
    files = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    dealt, weight_map = {file: {} for file in files}, {}
    for name, (code, shape) in checkpoint_tensors(CONFIG).items():
        tensor = random_tensor(code, shape, generator)
        if name.endswith("_scale_inv"):
            tensor = 2.0 ** -torch.randint(9, 13, shape, generator=generator) if powers_of_two else torch.rand(shape, generator=generator) * 1e-3 + 1e-4
        if name.endswith("norm.weight"):
            tensor += 1
        weight_map[name] = draw.choice(files)
        dealt[weight_map[name]][name] = tensor
    path.mkdir(parents=True)
    for file, tensors in dealt.items():
        save_file(tensors, path / file, metadata={"format": "pt"})
    (path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({**to_json(CONFIG), "a_field_of_the_future": [1, 2]}))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE.bin"):
        (path / name).write_text(f'"this is {name}"')
    return path


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return write_fp8(tmp_path_factory.mktemp("cast") / "fp8")


@pytest.fixture(scope="module")
def bf16(fp8):
    """Its conversion, never interrupted."""
    cast(fp8, fp8.parent / "bf16", "bf16")
    return fp8.parent / "bf16"


@pytest.fixture
def source(fp8, tmp_path):
    """A copy to do harm to."""
    return Path(shutil.copytree(fp8, tmp_path / "source"))


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    weight_map = json.loads((path / INDEX).read_text())["weight_map"]
    tensors = {name: tensor for file in sorted(set(weight_map.values())) for name, tensor in load_file(path / file).items()}
    assert tensors.keys() == weight_map.keys()
    return tensors


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def plain_formula(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Dequantised by code that shares nothing with the package."""
    rows, columns = weight.shape
    return (weight.float() * torch.kron(scale, torch.ones(128, 128))[:rows, :columns]).bfloat16()


# What goes right


def test_bf16_is_the_plain_formula_and_the_rest_is_copied(fp8, bf16):
    stored, wide = tensors_of(fp8), tensors_of(bf16)
    assert wide.keys() == {name for name in stored if not name.endswith("_scale_inv")}
    assert any(name.startswith("model.layers.2.mlp.experts") for name in wide), "the MTP layer is kept"
    for name, tensor in wide.items():
        scale = stored.get(f"{name}_scale_inv")
        assert same(tensor, stored[name] if scale is None else plain_formula(stored[name], scale)), name


def test_the_result_is_a_complete_directory(fp8, bf16):
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        assert (bf16 / name).read_bytes() == (fp8 / name).read_bytes()
    assert not (bf16 / "LICENSE.bin").exists() and not list(bf16.glob("*.part"))
    before, after = (json.loads((path / "config.json").read_text()) for path in (fp8, bf16))
    assert before.pop("quantization_config") and before == after and after["a_field_of_the_future"] == [1, 2]
    index = json.loads((bf16 / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(bf16).values())
    homes = json.loads((fp8 / INDEX).read_text())["weight_map"]
    assert index["weight_map"] == {name: file for name, file in homes.items() if name in index["weight_map"]}, "tensors stay in the file of the same name"
    for file in bf16.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_without_a_compiler_the_bytes_are_the_same(fp8, bf16, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "loops", lambda: None)
    cast(fp8, tmp_path / "bf16", "bf16")
    assert contents(tmp_path / "bf16") == contents(bf16)
    cast(bf16, tmp_path / "slow", "fp8")
    monkeypatch.undo()
    cast(bf16, tmp_path / "fast", "fp8")
    assert contents(tmp_path / "slow") == contents(tmp_path / "fast")


def test_there_and_back(fp8, bf16, tmp_path):
    cast(bf16, tmp_path / "fp8", "fp8", verify=True)
    stored, back, wide = tensors_of(fp8), tensors_of(tmp_path / "fp8"), tensors_of(bf16)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in back.items()} == {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()}
    assert json.loads((tmp_path / "fp8/config.json").read_text()) == json.loads((fp8 / "config.json").read_text())
    for name, tensor in back.items():
        scale = back.get(f"{name}_scale_inv")
        if scale is not None:
            error = (tensor.float() * torch.kron(scale, torch.ones(128, 128))[: tensor.shape[0], : tensor.shape[1]] - wide[name].float()).abs()
            assert (error <= wide[name].float().abs() / 16 + 2**-10 * scale.max() * 1.001).all()
            assert tensor.float().abs().max() == 448
    load_model(tmp_path / "fp8")


def test_a_second_trip_changes_nothing(bf16, tmp_path):
    for i, (source, to) in enumerate([(bf16, "fp8"), (tmp_path / "0", "bf16"), (tmp_path / "1", "fp8")]):
        cast(source, tmp_path / str(i), to)
    first, second = tensors_of(tmp_path / "0"), tensors_of(tmp_path / "2")
    assert all(same(first[name], second[name]) for name in first)


def test_transformers_reads_the_result(tmp_path):
    """Scales that are powers of two lose nothing in bfloat16, so transformers on the result must say what our FP8 model says."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = write_fp8(tmp_path / "fp8", powers_of_two=True)
    (path / "generation_config.json").unlink()
    cast(path, tmp_path / "bf16", "bf16")
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
    ours, ids = load_model(path, dtype=torch.float32, dequantize=True), torch.arange(24).view(2, 12) % CONFIG.vocab_size
    with torch.inference_mode():
        assert (theirs(ids).logits - ours(ids)).abs().max() <= LOGITS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("to", ["bf16", "fp8"])
def test_other_plain_checkpoints(bf16, tmp_path, dtype, to):
    """One file, no index, wider or narrower numbers."""
    bias = "e_score_correction_bias"
    plain = {name: tensor if name.endswith(bias) else tensor.to(dtype) for name, tensor in tensors_of(bf16).items()}
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain/model.safetensors")
    config = {name: value for name, value in json.loads((bf16 / "config.json").read_text()).items() if name not in ("scoring_func", "topk_method")}
    (tmp_path / "plain/config.json").write_text(json.dumps({**config, "torch_dtype": str(dtype)[6:]}))
    cast(tmp_path / "plain", tmp_path / "out", to, verify=True)
    out, fields = tensors_of(tmp_path / "out"), json.loads((tmp_path / "out/config.json").read_text())
    assert fields["scoring_func"] == "sigmoid" and fields["topk_method"] == "noaux_tc"
    assert fields["torch_dtype"] == ("bfloat16" if to == "bf16" else str(dtype)[6:])
    kept = {name: tensor for name, tensor in plain.items() if f"{name}_scale_inv" not in out}
    assert all(same(out[name], tensor if to == "fp8" or name.endswith(bias) else tensor.bfloat16()) for name, tensor in kept.items())
    assert (len(out) == len(plain)) == (to == "bf16")
    load_model(tmp_path / "out")


@pytest.mark.parametrize("shape", [(1, 1), (127, 5), (128, 128), (129, 300), (576, 7168), (18432, 7168), (129280, 7168), (7168,), (3, 40_000_000)])
def test_pieces_cover_a_tensor_once(shape):
    entry = Entry(Path("a"), 1000, torch.float8_e4m3fn, shape)
    scale = Entry(Path("b"), 8, torch.float32, scale_shape(shape)) if len(shape) == 2 else None
    runs = list(pieces(Job(entry, scale, (entry._replace(dtype=torch.bfloat16),))))
    reached = {"source": 1000, "scale": 8, "target": 1000}
    for run in runs:
        for key, part in (("source", run.source), ("scale", run.scale), ("target", run.targets[0])):
            if part is not None:
                assert part.first == reached[key] and part.nbytes > 0
                reached[key] += part.nbytes
        assert scale is None or run.scale.shape == scale_shape(run.source.shape)
        assert run.source.nbytes <= max(module.PIECE_BYTES, 128 * math.prod(shape[1:]))
    assert reached["source"] == 1000 + entry.nbytes and reached["target"] == 1000 + 2 * entry.nbytes and (scale is None or reached["scale"] == 8 + scale.nbytes)


# Interrupted, and begun again


@pytest.mark.parametrize("pieces_done", [0, 1, 30, 60])
def test_interrupted_anywhere_and_resumed(fp8, bf16, tmp_path, monkeypatch, pieces_done):
    honest, done = module.carry_out, []

    def failing(job):
        done.append(job)
        if len(done) > pieces_done:
            raise KeyboardInterrupt
        return honest(job)

    monkeypatch.setattr(module, "carry_out", failing)
    with pytest.raises(KeyboardInterrupt):
        cast(fp8, tmp_path / "out", "bf16")
    assert not (tmp_path / "out/config.json").exists()
    monkeypatch.undo()
    cast(fp8, tmp_path / "out", "bf16")
    assert contents(tmp_path / "out") == contents(bf16)


def test_killed_and_resumed(fp8, bf16, tmp_path):
    """The process is gone between one moment and the next; what it had finished is kept as it is."""
    code = f"""
import os, signal, sys
from deepseek_lit import cast as module
begun, honest = [], module.begin
def begin(shard):
    begun.append(shard)
    honest(shard)
    while len(begun) == 4 and not all(earlier.is_finished() for earlier in begun[:2]): pass
    if len(begun) == 4: os.kill(os.getpid(), signal.SIGKILL)
module.begin = begin
module.cast({str(fp8)!r}, {str(tmp_path / "out")!r}, "bf16")
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    finished = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")}
    assert len(finished) >= 2 and len(list((tmp_path / "out").glob("*.part"))) >= 1 and not (tmp_path / "out/config.json").exists()
    cast(fp8, tmp_path / "out", "bf16", verify=True)
    assert contents(tmp_path / "out") == contents(bf16)
    assert all(file.stat().st_mtime_ns == time for file, time in finished.items())


def test_a_finished_conversion_has_nothing_left_to_do(fp8, tmp_path):
    assert cast(fp8, tmp_path / "out", "bf16") > 0
    assert cast(fp8, tmp_path / "out", "bf16") == 0


def test_a_shard_of_the_wrong_size_or_header_is_written_again(fp8, bf16, tmp_path):
    out = Path(shutil.copytree(bf16, tmp_path / "out"))
    short, other = sorted(out.glob("*.safetensors"))[:2]
    short.write_bytes(short.read_bytes()[:-1])
    other.write_bytes(other.read_bytes().replace(b"BF16", b"F16 "))
    assert cast(fp8, out, "bf16") == sum((bf16 / file.name).stat().st_size for file in (short, other))
    assert contents(out) == contents(bf16)


def test_verification_finds_one_bit(fp8, tmp_path):
    cast(fp8, tmp_path / "out", "bf16")
    file = sorted((tmp_path / "out").glob("*.safetensors"))[2]
    data = bytearray(file.read_bytes())
    data[-1000] ^= 4
    file.write_bytes(data)
    cast(fp8, tmp_path / "out", "bf16")
    with pytest.raises(InputError, match=f"{file.name} differs"):
        cast(fp8, tmp_path / "out", "bf16", verify=True)
    file.unlink()
    cast(fp8, tmp_path / "out", "bf16", verify=True)


# What is refused: in one sentence, and before anything is written


def refused(path, out, to, sentence):
    before = set(out.iterdir()) if out.is_dir() else None
    with pytest.raises(InputError) as caught:
        cast(path, out, to)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    assert not list(out.glob("*.safetensors")) if before is None else set(out.iterdir()) == before


def test_refusals(fp8, bf16, tmp_path):
    refused(fp8, tmp_path / "out", "fp8", "holds FP8 weights already")
    refused(bf16, tmp_path / "out", "bf16", "nothing to convert")
    refused(fp8, tmp_path / "out", "int4", "expected bf16 or fp8")
    refused(tmp_path / "nowhere", tmp_path / "out", "bf16", "does not exist")
    refused(bf16, bf16, "fp8", "is the checkpoint itself")
    (tmp_path / "file").write_text("")
    refused(fp8, tmp_path / "file", "bf16", "is a file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/precious").write_text("")
    refused(fp8, tmp_path / "full", "bf16", "is not empty")
    (tmp_path / "link").symlink_to(bf16)
    refused(bf16, tmp_path / "link", "fp8", "is the checkpoint itself")


def test_another_source_or_target_is_not_mixed_in(source, tmp_path):
    cast(source, tmp_path / "out", "bf16")
    next(source.glob("*.safetensors")).touch()
    refused(source, tmp_path / "out", "bf16", "of another checkpoint, or of")
    refused(tmp_path / "out", source, "fp8", "is not empty")
    (tmp_path / "out/cast.json").write_text("rubbish")
    refused(source, tmp_path / "out", "bf16", "of another checkpoint, or of")


def test_the_disk_is_asked_first(fp8, bf16, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(fp8, tmp_path / "out", "bf16", "GB free, expected")
    out = Path(shutil.copytree(bf16, tmp_path / "done"))
    assert cast(fp8, out, "bf16") == 0, "what is written already needs no room"


def test_a_full_disk_is_one_sentence(fp8, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "shard")

    monkeypatch.setattr(module, "store", full)
    with pytest.raises(InputError, match="No space left on device"):
        cast(fp8, tmp_path / "out", "bf16")


def edit(path: Path, name: str, change) -> None:
    file = path / json.loads((path / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)


@pytest.mark.parametrize("layer", [1, 2], ids=["main", "MTP"])
def test_a_weight_without_its_scale(source, tmp_path, layer):
    name = f"model.layers.{layer}.mlp.experts.3.up_proj.weight_scale_inv"
    edit(source, name, lambda scale: torch.cat([scale, scale]))
    refused(source, tmp_path / "out", "bf16", "up_proj.weight")


def test_a_scale_without_its_weight(source, tmp_path):
    edit(source, "model.layers.2.mlp.experts.3.up_proj.weight", lambda weight: weight.bfloat16())
    refused(source, tmp_path / "out", "bf16", "is a scale without an FP8 weight")


def test_a_damaged_source(source, tmp_path):
    file = sorted(source.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    refused(source, tmp_path / "out", "bf16", f"{file.name} is truncated")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_cannot_be_quantised(bf16, tmp_path, value):
    path = Path(shutil.copytree(bf16, tmp_path / "bf16"))

    def poison(weight):
        weight[130, 3] = value
        return weight

    edit(path, "model.layers.0.mlp.up_proj.weight", poison)
    with pytest.raises(InputError, match="infinite or not a number"):
        cast(path, tmp_path / "out", "fp8")
    assert not (tmp_path / "out/config.json").exists()


def test_not_a_number_stays_so_on_the_way_to_bf16(source, tmp_path):
    def poison(weight):
        weight.view(torch.uint8)[0, :2] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
        return weight

    edit(source, "model.layers.0.mlp.up_proj.weight", poison)
    cast(source, tmp_path / "out", "bf16")
    assert tensors_of(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"][0, :3].isnan().tolist() == [True, True, False]


def test_headers_are_aligned_and_read_by_others(tmp_path):
    header, firsts, size = make_header({"a": ("F32", (3, 1)), "b": ("BF16", (5,)), "c": ("F8_E4M3", (7, 3))})
    (tmp_path / "x.safetensors").write_bytes(header + bytes(size - len(header)))
    assert len(header) % 8 == 0 and firsts == {"a": len(header), "b": len(header) + 12, "c": len(header) + 22} and size == len(header) + 43
    assert {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "x.safetensors").items()} == {"a": (3, 1), "b": (5,), "c": (7, 3)}
