"""Opening checkpoints: sound ones of every kind, and damaged ones, each of which must be refused in one sentence that names what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import random_config, write_checkpoint
from safetensors.torch import load_file, save_file

from deepseek_lit import checkpoint
from deepseek_lit.checkpoint import INDEX, inspect_checkpoint, load_model, map_checkpoint, save_model, spread, write_hollow
from deepseek_lit.config import InputError, ModelConfig, checkpoint_tensors
from deepseek_lit.model import DeepSeekV3, init_weights
from deepseek_lit.mtp import add_mtp

FP8 = random_config(3, fp8=True, torch_dtype="bfloat16")
PLAIN = random_config(3)
WEIGHT = "model.layers.1.mlp.experts.2.up_proj.weight"
SCALE = f"{WEIGHT}_scale_inv"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """An FP8 checkpoint in several shards."""
    return write_checkpoint(tmp_path_factory.mktemp("fp8"), FP8, fp8=True, shards=12)


@pytest.fixture
def model_dir(sound, tmp_path):
    """A copy of the FP8 checkpoint that a test may damage."""
    for file in sound.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def read_index(path: Path) -> dict:
    return json.loads((path / INDEX).read_text())


def write_index(path: Path, index: dict) -> None:
    (path / INDEX).write_text(json.dumps(index))


def shard_of(path: Path, name: str) -> Path:
    return path / read_index(path)["weight_map"][name]


def edit(path: Path, name: str, change) -> None:
    """Rewrite the shard that holds `name` after `change` has altered its dict of tensors."""
    file = shard_of(path, name)
    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file)


def drop(path: Path, name: str) -> None:
    """Take a tensor out of its shard and out of the index."""
    edit(path, name, lambda tensors: tensors.pop(name))
    index = read_index(path)
    del index["weight_map"][name]
    write_index(path, index)


def edit_header(path: Path, name: str, change) -> None:
    """Alter the JSON header of the shard that holds `name`, data left as it is."""
    file = shard_of(path, name)
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def edit_config(path: Path, change) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def truncate(path):
    file = shard_of(path, WEIGHT)
    file.write_bytes(file.read_bytes()[:-100])
    return file.name, "truncated"


def truncate_in_header(path):
    file = shard_of(path, WEIGHT)
    file.write_bytes(file.read_bytes()[:50])
    return file.name, "truncated"


def empty(path):
    file = shard_of(path, WEIGHT)
    file.write_bytes(b"")
    return file.name, "0 bytes"


def missing_shard(path):
    file = shard_of(path, WEIGHT)
    file.unlink()
    return file.name, "does not exist"


def git_lfs_pointer(path):
    file = shard_of(path, WEIGHT)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4302383966\n")
    return file.name, "git-lfs pointer"


def header_not_json(path):
    file = shard_of(path, WEIGHT)
    file.write_bytes((8).to_bytes(8, "little") + b"not JSON" + bytes(100))
    return file.name, "not a JSON object"


def header_a_list(path):
    file = shard_of(path, WEIGHT)
    file.write_bytes((2).to_bytes(8, "little") + b"[]")
    return file.name, "not a JSON object"


def trailing_bytes(path):
    file = shard_of(path, WEIGHT)
    file.write_bytes(file.read_bytes() + b"more")
    return file.name, "goes on after its last tensor"


def unknown_dtype(path):
    edit_header(path, WEIGHT, lambda header: header[WEIGHT].update(dtype="F8_E5M2"))
    return WEIGHT, "F8_E5M2", "expected one of"


def entry_without_shape(path):
    edit_header(path, WEIGHT, lambda header: header[WEIGHT].pop("shape"))
    return WEIGHT, "expected a dtype, a shape"


def negative_offset(path):
    edit_header(path, WEIGHT, lambda header: header[WEIGHT].update(data_offsets=[-4, 4]))
    return WEIGHT, "data_offsets of 0 or more"


def overlapping_offsets(path):
    def shift(header):
        header[WEIGHT]["data_offsets"] = [offset - 1 for offset in header[WEIGHT]["data_offsets"]]

    edit_header(path, WEIGHT, shift)
    return shard_of(path, WEIGHT).name, "begins at data byte", "expected"


def span_against_shape(path):
    edit_header(path, WEIGHT, lambda header: header[WEIGHT]["shape"].append(2))
    return WEIGHT, "spans", "bytes, expected"


def index_not_json(path):
    (path / INDEX).write_text("<html>")
    return INDEX, "is not an index"


def index_without_map(path):
    write_index(path, {"metadata": {}})
    return INDEX, "weight_map"


def index_with_numbers(path):
    write_index(path, {"weight_map": {WEIGHT: 3}})
    return INDEX, "weight_map"


def index_leaves_the_directory(path):
    index = read_index(path)
    index["weight_map"][WEIGHT] = "../elsewhere.safetensors"
    write_index(path, index)
    return INDEX, "a file of this directory"


def index_with_absolute_name(path):
    index = read_index(path)
    index["weight_map"][WEIGHT] = "/etc/model.safetensors"
    write_index(path, index)
    return INDEX, "a file of this directory"


def index_names_absent_tensor(path):
    index = read_index(path)
    index["weight_map"]["model.layers.9.guest.weight"] = shard_of(path, WEIGHT).name
    write_index(path, index)
    return "model.layers.9.guest.weight", "does not hold"


def duplicate_tensor(path):
    other = next(name for name in read_index(path)["weight_map"] if shard_of(path, name) != shard_of(path, WEIGHT))
    tensor = load_file(shard_of(path, WEIGHT))[WEIGHT]
    edit(path, other, lambda tensors: tensors.update({WEIGHT: tensor}))
    return WEIGHT, "is also in"


def no_shards(path):
    for file in path.glob("*.safetensors"):
        file.unlink()
    (path / INDEX).unlink()
    return (str(path), "no *.safetensors")


def missing_weight(path):
    drop(path, WEIGHT)
    drop(path, SCALE)
    return WEIGHT, "is missing", "expected F8_E4M3"


def weight_without_scale(path):
    drop(path, SCALE)
    return SCALE, "has no scale"


def scale_without_weight(path):
    drop(path, WEIGHT)
    return SCALE, "has no weight"


def scale_of_plain_weight(path):
    edit(path, "model.norm.weight", lambda tensors: tensors.update({"model.norm.weight_scale_inv": torch.ones(1, 1)}))
    return "model.norm.weight_scale_inv", "should not have one"


def wrong_shape(path):
    edit(path, WEIGHT, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].view(torch.uint8).mT.contiguous().view(torch.float8_e4m3fn)}))
    return shard_of(path, WEIGHT).name, WEIGHT, "has shape", "expected"


def wrong_scale_shape(path):
    edit(path, SCALE, lambda tensors: tensors.update({SCALE: torch.ones(1, 99)}))
    return SCALE, "has shape [1, 99]"


def plain_weight_in_fp8(path):
    edit(path, WEIGHT, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].bfloat16()}))
    return WEIGHT, "is bfloat16, expected float8_e4m3fn", "quantization_config"


def fp8_without_config(path):
    edit_config(path, lambda config: config.pop("quantization_config"))
    return "float8_e4m3fn", "has no quantization_config"


def fp8_norm(path):
    edit(path, "model.norm.weight", lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}))
    return "model.norm.weight", "is float8_e4m3fn, expected bfloat16"


def unknown_tensor(path):
    edit(path, WEIGHT, lambda tensors: tensors.update({"model.layers.0.self_attn.guest.weight": torch.ones(2)}))
    return "model.layers.0.self_attn.guest.weight", "belongs to no part"


def more_experts_than_config(path):
    edit_config(path, lambda config: config.update(n_routed_experts=4, n_group=2))
    return "mlp.gate.weight has shape [8, ", "expected [4, "


def dtype_auto(path):
    edit_config(path, lambda config: config.update(torch_dtype="auto"))
    return "config.json", "torch_dtype is 'auto', expected one of"


def no_config(path):
    (path / "config.json").unlink()
    return ("config.json", "does not exist")


DAMAGE = [
    truncate, truncate_in_header, empty, missing_shard, git_lfs_pointer, header_not_json, header_a_list, trailing_bytes, unknown_dtype, entry_without_shape,
    negative_offset, overlapping_offsets, span_against_shape, index_not_json, index_without_map, index_with_numbers, index_leaves_the_directory, index_with_absolute_name, index_names_absent_tensor, duplicate_tensor,
    no_shards, missing_weight, weight_without_scale, scale_without_weight, scale_of_plain_weight, wrong_shape, wrong_scale_shape, plain_weight_in_fp8,
    fp8_without_config, fp8_norm, unknown_tensor, more_experts_than_config, dtype_auto, no_config,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_is_refused(damage, model_dir):
    wanted = damage(model_dir)
    with pytest.raises(InputError) as caught:
        load_model(model_dir)
    message = str(caught.value)
    assert "\n" not in message
    for text in (str(model_dir), *wanted):
        assert text in message


def test_plain_files_under_an_fp8_config(tmp_path):
    write_checkpoint(tmp_path, PLAIN)
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    edit_config(tmp_path, lambda config: config.update(quantization_config=quantization))
    with pytest.raises(InputError, match="is float32, expected float8_e4m3fn"):
        load_model(tmp_path)


@pytest.mark.parametrize("dequantize", [False, True])
def test_not_enough_memory_is_said_beforehand(sound, monkeypatch, dequantize):
    monkeypatch.setattr(checkpoint, "free_bytes", lambda device: 1000)
    load_model(sound, dtype=torch.bfloat16)  # views take no memory
    with pytest.raises(InputError, match="GiB free"):
        load_model(sound, dtype=torch.float32, dequantize=dequantize)


@pytest.mark.parametrize("path", ["nobody/no-such-model", "./nowhere", "nowhere", "/nowhere/model"])
def test_unknown_model_is_one_sentence(path):
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_is_no_directory(sound):
    with pytest.raises(InputError, match="is a file, expected the directory"):
        load_model(next(sound.glob("*.safetensors")))


def test_weights_are_views_of_the_files(sound):
    model = load_model(sound)
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(storages) == len(list(sound.glob("*.safetensors"))) > 1
    assert model.get_parameter(WEIGHT).dtype == torch.float8_e4m3fn


def test_writing_to_a_weight_leaves_the_file_alone(model_dir):
    before = shard_of(model_dir, "model.norm.weight").read_bytes()
    load_model(model_dir).model.norm.weight.fill_(7)
    assert shard_of(model_dir, "model.norm.weight").read_bytes() == before


def logits(path, **options):
    with torch.inference_mode():
        return load_model(path, dtype=torch.float32, **options)(torch.arange(6)[None])


def test_shards_do_not_matter(sound, tmp_path):
    """A file of its own for every tensor: a weight, its scale and an expert's matrices all lie apart."""
    weight_map = {}
    for i, (name, tensor) in enumerate(map_checkpoint(sound).items()):
        save_file({name: tensor.clone()}, tmp_path / f"{i}.safetensors")
        weight_map[name] = f"{i}.safetensors"
    write_index(tmp_path, {"weight_map": weight_map})
    (tmp_path / "config.json").write_bytes((sound / "config.json").read_bytes())
    assert torch.equal(logits(tmp_path), logits(sound))


def test_dequantised_once_or_at_each_use(sound):
    torch.testing.assert_close(logits(sound, dequantize=True), logits(sound), rtol=0, atol=1e-5)


def test_power_of_two_scales(model_dir):
    """`F8_E8M0` scales, as V3.1 could have them, mean the same as float32 ones of equal value."""
    for file in model_dir.glob("*.safetensors"):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name] = tensors[name].log2().ceil().exp2()
        save_file(tensors, file)
    wide = logits(model_dir)
    for file in model_dir.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: t.to(torch.float8_e8m0fnu) if name.endswith("_scale_inv") else t for name, t in tensors.items()}, file)
    assert torch.equal(logits(model_dir), wide)


def test_only_the_index_decides_which_files_are_read(model_dir):
    (model_dir / "old-copy.safetensors").write_bytes(b"rubbish")
    load_model(model_dir)


def test_no_index_no_metadata(tmp_path):
    write_checkpoint(tmp_path, PLAIN, shards=1)
    expected = logits(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    save_file(load_file(file), file)
    (tmp_path / INDEX).unlink()
    assert torch.equal(logits(tmp_path), expected)


def test_odd_addresses_are_copied(tmp_path):
    """A header of odd length puts float32 data where it cannot be viewed."""
    write_checkpoint(tmp_path, PLAIN)
    expected = map_checkpoint(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    file.unlink()  # the maps above live on
    file.write_bytes((length + 1).to_bytes(8, "little") + raw[8 : 8 + length] + b" " + raw[8 + length :])
    odd = map_checkpoint(tmp_path)
    assert odd.keys() == expected.keys() and all(torch.equal(odd[name], expected[name]) for name in odd)


@pytest.mark.parametrize("announced", [0, 1, None])
@pytest.mark.parametrize("own", [None, "embed_tokens", "shared_head.head"])
def test_mtp_layer_is_opened_when_wanted(announced, own, tmp_path, capsys):
    config = random_config(3, num_nextn_predict_layers=1)
    model = init_weights(add_mtp(DeepSeekV3(config), {f"model.layers.3.{own}.weight"} if own else ()))
    save_model(model, tmp_path, fp8=True)
    edit_config(tmp_path, lambda fields: fields.pop("num_nextn_predict_layers") if announced is None else fields.update(num_nextn_predict_layers=announced))
    assert len(load_model(tmp_path).model.layers) == 3
    opened = load_model(tmp_path, mtp=True, dtype=torch.float32)
    assert capsys.readouterr() == ("", "")
    layer, saved = opened.model.layers[3], model.model.layers[3]
    assert torch.equal(layer.enorm.weight, saved.enorm.weight) and layer.self_attn.o_proj.weight.dtype == torch.float8_e4m3fn
    assert (layer.embed_tokens is not None) == (own == "embed_tokens") and (layer.shared_head.head is not None) == (own == "shared_head.head")


@pytest.mark.parametrize("copied", [True, False])
def test_copies_of_embedding_and_head_are_tied_and_others_kept(copied, tmp_path):
    config = random_config(3, num_nextn_predict_layers=1)
    names = {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}
    model = init_weights(add_mtp(DeepSeekV3(config), names))
    layer = model.model.layers[3]
    if copied:
        layer.embed_tokens.weight.data.copy_(model.model.embed_tokens.weight.data)
        layer.shared_head.head.weight.data.copy_(model.lm_head.weight.data)
    save_model(model, tmp_path, fp8=False)
    assert names <= map_checkpoint(tmp_path).keys()
    layer = load_model(tmp_path, mtp=True).model.layers[3]
    assert (layer.embed_tokens is None) == (layer.shared_head.head is None) == copied


def test_missing_mtp_tensors_are_an_error_only_when_wanted(tmp_path):
    write_checkpoint(tmp_path, random_config(3))
    with pytest.raises(InputError, match="has no Multi-Token Prediction layer .model.layers.3"):
        load_model(tmp_path, mtp=True)
    save_model(init_weights(add_mtp(DeepSeekV3(random_config(3, num_nextn_predict_layers=1)))), tmp_path, fp8=False)
    drop(tmp_path, "model.layers.3.hnorm.weight")
    load_model(tmp_path)
    with pytest.raises(InputError, match="model.layers.3.hnorm.weight is missing"):
        load_model(tmp_path, mtp=True)


def test_tied_embedding(tmp_path):
    config = random_config(5, tie_word_embeddings=True)
    model = load_model(write_checkpoint(tmp_path, config))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" not in map_checkpoint(tmp_path)
    assert logits(tmp_path).isfinite().all()


def test_an_fp8_model_is_not_quantised_again(sound, tmp_path):
    with pytest.raises(InputError, match="FP8 already"):
        checkpoint.save_model(load_model(sound), tmp_path, fp8=True)


def test_saving_leaves_no_temporary_names(sound):
    assert not list(sound.glob("*.part"))
    assert {file.name for file in sound.glob("*.safetensors")} == set(read_index(sound)["weight_map"].values())


# What is in there


def header_facts(path: Path) -> dict[str, tuple[str, int]]:
    """Dtype and bytes of every tensor, by reading the headers as the format says and nothing else."""
    facts = {}
    for file in path.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        facts |= {name: (entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0]) for name, entry in header.items()}
    return facts


def test_inspection_equals_the_headers(sound):
    report, facts = json.loads(json.dumps(inspect_checkpoint(sound))), header_facts(sound)
    assert report["tensors"] == len(facts) and report["bytes"] == sum(nbytes for _, nbytes in facts.values())
    assert report["shards"] == len(list(sound.glob("*.safetensors"))) and report["problems"] == report["missing"] == report["extra"] == []
    for code, row in report["dtypes"].items():
        found = [nbytes for dtype, nbytes in facts.values() if dtype == code]
        assert row == {"tensors": len(found), "bytes": sum(found)}
    assert report["parameters"] == sum(parameter.numel() for name, parameter in load_model(sound).named_parameters() if not name.endswith("_scale_inv"))
    for layer in report["layers"]:
        found = [nbytes for name, (_, nbytes) in facts.items() if (f".layers.{layer['layer']}." in name if layer["layer"] is not None else ".layers." not in name)]
        assert layer["tensors"] == len(found) and layer["bytes"] == sum(found) == sum(layer["kinds"].values())
    marks = {"routed experts": ".experts.", "shared expert": "shared_experts", "attention": "self_attn", "gate": "mlp.gate.", "norms": "norm", "scales": "_scale_inv"}
    for kind, mark in marks.items():
        found = [nbytes for name, (_, nbytes) in facts.items() if mark in name and (kind == "scales" or "_scale_inv" not in name) and (kind != "attention" or "norm" not in name)]
        assert report["kinds"][kind] == {"tensors": len(found), "bytes": sum(found)}


@pytest.mark.parametrize("damage", [damage for damage in DAMAGE if damage not in (empty, no_shards)], ids=lambda damage: damage.__name__)
def test_inspection_tells_what_loading_refuses(damage, model_dir):
    """Whatever stops `load_model` stands in the report, unless nothing at all can be read."""
    damage(model_dir)
    with pytest.raises(InputError) as caught:
        load_model(model_dir)
    try:
        problems = inspect_checkpoint(model_dir)["problems"]
    except InputError as error:
        problems = [str(error)]
        assert INDEX in problems[0]
    assert any(problem in str(caught.value) for problem in problems)


def test_inspection_lists_everything(model_dir):
    total = len(header_facts(model_dir))
    lost = next(file for file in sorted(model_dir.glob("*.safetensors")) if file != shard_of(model_dir, "model.norm.weight"))
    edit(model_dir, "model.norm.weight", lambda tensors: tensors.update({"model.guest.weight": torch.ones(2)}))
    drop(model_dir, "model.norm.weight")
    lost.unlink()
    report = inspect_checkpoint(model_dir)
    assert len(report["problems"]) == 4 and "model.norm.weight" in report["missing"] and report["extra"] == ["model.guest.weight"]
    assert report["tensors"] == total - len(report["missing"]) + 1
    assert f"{len(report['missing']) - 1} tensors of the model lie in shards that could not be read" in report["problems"]


def test_the_map_of_the_release():
    tensors, dealt = checkpoint_tensors(ModelConfig()), spread(ModelConfig())
    assert len(dealt) == 163 and sorted(name for names in dealt for name in names) == sorted(tensors)
    assert [len(spread(FP8, shards)) for shards in (1, 2, 7)] == [1, 2, 7]


OPEN = """
import json, sys, time, torch
torch.set_num_threads(1)
from deepseek_lit.checkpoint import inspect_checkpoint, load_model
status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
start = time.process_time()
model = load_model(sys.argv[1])
seconds = time.process_time() - start
parameters = sum(p.numel() for name, p in model.named_parameters() if "_scale_inv" not in name)
start = time.process_time()
report = inspect_checkpoint(sys.argv[1])
print(json.dumps({"seconds": seconds, "peak": status("VmHWM"), "parameters": parameters, "inspect": time.process_time() - start, "kinds": report["kinds"], "problems": report["problems"]}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_full_size_layout_opens_in_seconds(tmp_path):
    """91,991 tensors and 641 GiB of holes. The clock is the processor's and the bound generous: this must not fail because a machine is busy."""
    write_hollow(ModelConfig(), tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) > 688e9 > 1e8 > sum(512 * file.stat().st_blocks for file in tmp_path.iterdir())
    done = subprocess.run([sys.executable, "-c", OPEN, str(tmp_path)], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    facts = json.loads(done.stdout)
    assert facts["parameters"] == 671_026_419_200 and facts["problems"] == []
    assert facts["peak"] < 2e9 and facts["seconds"] < 9 and facts["inspect"] < 9
    assert facts["kinds"]["MTP"]["tensors"] == 1564 and sum(row["tensors"] for row in facts["kinds"].values()) == 91_991
