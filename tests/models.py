"""Small random DeepSeek-V3 checkpoints for the tests."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from deepseek_lit.checkpoint import save_model
from deepseek_lit.config import ModelConfig, Yarn
from deepseek_lit.model import DeepSeekV3, init_weights

YARN = Yarn(factor=4.0, original_max_position_embeddings=64)


def random_config(seed: int = 0, **fields) -> ModelConfig:
    """A small configuration with awkward widths drawn from `seed`; `fields` are set as given. Three layers, YaRN, 8 experts in 4 groups unless told otherwise."""
    draw = random.Random(seed)
    hidden = draw.choice([45, 72, 96, 131, 200])
    widths = {
        "vocab_size": draw.choice([97, 128, 211]), "hidden_size": hidden, "initializer_range": hidden**-0.5,
        "num_attention_heads": draw.choice([1, 2, 3, 4]), "q_lora_rank": draw.choice([24, 48, 130]), "kv_lora_rank": draw.choice([16, 33, 140]),
        "qk_nope_head_dim": draw.choice([8, 15, 32]), "qk_rope_head_dim": draw.choice([2, 8, 16]), "v_head_dim": draw.choice([7, 16, 40]),
        "intermediate_size": draw.choice([77, 160, 260]), "moe_intermediate_size": draw.choice([31, 64, 150]),
        "n_shared_experts": draw.choice([1, 2]), "routed_scaling_factor": draw.choice([1.0, 2.5]),
    }  # fmt: skip
    rest = {
        "num_hidden_layers": 3, "first_k_dense_replace": 1, "max_position_embeddings": 256, "rope_scaling": YARN,
        "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
        "num_nextn_predict_layers": 0, "torch_dtype": "float32", "fp8": False,
    }  # fmt: skip
    return ModelConfig(**{**widths, **rest, **fields})


def random_model(config: ModelConfig, seed: int = 0) -> DeepSeekV3:
    """A model in eval mode whose norms are not one, whose routers have opinions and whose gate biases are mostly negative: mistakes in any of them show."""
    model = init_weights(DeepSeekV3(config), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
        if name.endswith("mlp.gate.weight"):
            parameter.data *= 3
        if name.endswith("e_score_correction_bias"):
            torch.nn.init.uniform_(parameter, -0.8, 0.4, generator=generator)
    return model.eval().requires_grad_(False)


def write_checkpoint(path: Path, config: ModelConfig, fp8: bool = False, shards: int = 1, seed: int = 0) -> Path:
    """Write a random model of `config` to the directory `path` in the Hugging Face layout, in `shards` files or a few more; returns `path`."""
    model = random_model(config, seed)
    total = sum(parameter.nbytes for parameter in model.parameters())
    save_model(model, path, fp8=fp8, max_shard_bytes=total // shards if shards > 1 else 2 * total)
    return path


def write_dequantized(fp8_path: Path, path: Path) -> Path:
    """Write the FP8 checkpoint `fp8_path` as a plain float32 one, by code that shares nothing with the package's."""
    path.mkdir(parents=True)
    tensors = {name: tensor for file in sorted(fp8_path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    plain = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        plain[name] = tensor.float()
        if f"{name}_scale_inv" in tensors:
            scale = torch.kron(tensors[f"{name}_scale_inv"], torch.ones(128, 128))
            plain[name] *= scale[: tensor.shape[0], : tensor.shape[1]]
    save_file(plain, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((fp8_path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    return path
