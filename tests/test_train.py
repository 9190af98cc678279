"""Training: the pieces of chapter 16 that a wrong sign or an index off by one would break without an error message."""

import dataclasses
import math
import sysconfig
from pathlib import Path

import pytest
import torch

from deepseek_lit import train as training
from deepseek_lit.checkpoint import load_model, save_model
from deepseek_lit.config import is_quantized, tiny_config
from deepseek_lit.fp8 import dequantize, quantize
from deepseek_lit.generate import LLM, SamplingParams
from deepseek_lit.model import DeepSeekV3, init_weights
from deepseek_lit.train import LoadCounter, TrainConfig, draw_batch, learning_rate, loss_of, make_optimizer, make_tiny, pack, train, train_step
from deepseek_lit.train import train_tokenizer, training_steps, update_biases
from tolerances import LOGITS

SMALL = dataclasses.replace(
    tiny_config(vocab_size=320), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
)  # fmt: skip
SHORT = TrainConfig(steps=6, batch=2, seq=16, lr=3e-3, gamma=0.01)
TEXTS = [f"def add_{i}(a, b):\n    return a + b + {i}\n" for i in range(60)]


@pytest.fixture
def model():
    return init_weights(DeepSeekV3(SMALL), seed=0)


@pytest.fixture(scope="module")
def ids():
    return pack(TEXTS, train_tokenizer(TEXTS, SMALL.vocab_size))


def test_tokenizer_reads_every_byte_and_never_loses_one():
    tokenizer = train_tokenizer(TEXTS, SMALL.vocab_size)
    for text in ("".join(map(chr, range(256))), "naïve 東京 ひらがな 🦊\r\n\t \x00 １２３４ 12345", "   ", "\n\n"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert max(ids) < SMALL.vocab_size


def test_tokenizer_has_the_releases_special_tokens_and_cuts():
    tokenizer = train_tokenizer(TEXTS, SMALL.vocab_size)
    assert [tokenizer.token_to_id(token) for token in (training.BOS, training.EOS)] == [0, 1]
    assert tokenizer.encode("ab<｜end▁of▁sentence｜>").ids[-1] == 1
    pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("12345 words")]
    assert pieces == ["123", "45", "Ġwords"]


def test_pack_puts_every_text_between_bos_and_eos():
    tokenizer = train_tokenizer(TEXTS, SMALL.vocab_size)
    row = pack(TEXTS[:2], tokenizer).tolist()
    assert row == [0, *tokenizer.encode(TEXTS[0]).ids, 1, 0, *tokenizer.encode(TEXTS[1]).ids, 1]


def test_targets_are_the_next_token_and_windows_lie_in_the_row():
    inputs, targets = draw_batch(torch.arange(100), batch=64, seq=10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(targets, inputs + 1) and torch.equal(inputs[:, 1:], inputs[:, :-1] + 1)
    assert inputs.min() >= 0 and targets.max() <= 99


def test_the_last_token_can_be_a_target():
    inputs, targets = draw_batch(torch.arange(11), batch=3, seq=10, generator=torch.Generator().manual_seed(0))
    assert targets[:, -1].eq(10).all()


@pytest.mark.parametrize("steps", [50, 100, 1600])
def test_learning_rate_warms_up_stays_and_settles(steps):
    config = TrainConfig(steps=steps)
    rates = torch.tensor([learning_rate(step, config) for step in range(steps)], dtype=torch.float64)
    warm, start = round(0.02 * steps), round(0.52 * steps)
    assert (rates[: warm].diff() > 0).all() and math.isclose(rates[0], config.lr / warm)
    assert torch.allclose(rates[warm - 1 : start + 1], torch.tensor(config.lr, dtype=torch.float64))
    assert (rates[start:].diff() < 0).all()
    assert config.lr * config.final_lr < rates[-1] < config.lr * (config.final_lr + 10 / steps)


def test_a_fresh_model_is_surprised_by_the_logarithm_of_the_vocabulary(model, ids):
    assert abs(loss_of(model, *draw_batch(ids, 4, 32, torch.Generator().manual_seed(0))).item() - math.log(SMALL.vocab_size)) < 0.05


def test_counter_counts_every_choice_once(model, ids):
    counter, layer = LoadCounter(model), model.model.layers[1]
    seen = []
    hook = layer.mlp.gate.register_forward_hook(lambda gate, inputs, output: seen.append(output[1]))
    inputs, _ = draw_batch(ids, 2, 16, torch.Generator().manual_seed(0))
    model(inputs)
    model(inputs)
    assert counter.loads[0].tolist() == [int((torch.cat(seen) == e).sum()) for e in range(8)]
    assert counter.loads[0].sum() == 2 * 2 * 16 * SMALL.num_experts_per_tok
    counter.remove()
    hook.remove()
    before = counter.loads[0].clone()
    model(inputs)
    assert torch.equal(counter.loads[0], before)


def test_violation_is_the_worst_gates_excess(model):
    counter = LoadCounter(model)
    counter.loads = [torch.full((8,), 3), torch.tensor([8, 0, 0, 0, 0, 0, 0, 0])]
    assert counter.violation() == 7
    counter.loads = [torch.full((8,), 3)]
    assert counter.violation() == 0


def test_busy_experts_go_down_and_idle_ones_up(model):
    counter = LoadCounter(model)
    counter.loads = [torch.tensor([9, 0, 3, 3, 3, 3, 0, 3])]
    for _ in range(2):
        update_biases(counter, gamma=0.25)
    assert counter.gates[0].e_score_correction_bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0.5, 0]
    assert counter.gates[0].e_score_correction_bias.dtype == torch.float32


def test_the_update_balances_a_gate_whose_weights_stand_still(model):
    gate, x = model.model.layers[1].mlp.gate, torch.randn(512, SMALL.hidden_size, generator=torch.Generator().manual_seed(0)) + 0.5
    torch.nn.init.normal_(gate.weight, std=0.2, generator=torch.Generator().manual_seed(1))
    counter, violations = LoadCounter(model), []
    for _ in range(100):
        counter.reset()
        gate(x)
        violations.append(counter.violation())
        update_biases(counter, gamma=0.01)
    assert violations[0] > 0.5 and max(violations[-10:]) < violations[0] / 2


def test_gate_biases_get_no_gradient_and_idle_experts_none_either(model, ids):
    counter, optimizer = LoadCounter(model), make_optimizer(model, SHORT)
    inputs, targets = draw_batch(ids, 1, 3, torch.Generator().manual_seed(0))
    loss_of(model, inputs, targets).backward()
    moe = model.model.layers[1].mlp
    assert [expert.up_proj.weight.grad is not None for expert in moe.experts] == (counter.loads[0] > 0).tolist()
    assert 0 < int((counter.loads[0] > 0).sum()) < 8
    assert moe.gate.weight.grad.abs().sum() > 0 and moe.gate.e_score_correction_bias.grad is None
    handled = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert handled == {id(p) for name, p in model.named_parameters() if not name.endswith("bias")}


def test_only_matrices_decay(model):
    decaying, plain = make_optimizer(model, SHORT).param_groups
    assert decaying["weight_decay"] == SHORT.weight_decay and all(p.dim() == 2 for p in decaying["params"])
    assert plain["weight_decay"] == 0 and all(p.dim() == 1 for p in plain["params"]) and plain["params"]


def test_one_batch_can_be_learned_by_heart(model, ids):
    batch, optimizer, counter = draw_batch(ids, 2, 16, torch.Generator().manual_seed(0)), make_optimizer(model, dataclasses.replace(SHORT, lr=1e-2)), LoadCounter(model)
    losses = [train_step(model, optimizer, batch, SHORT, counter) for _ in range(80)]
    assert losses[0] > 5 and losses[-1] < 0.1


def test_same_seed_same_losses_and_another_seed_others(ids):
    def losses(seed: int) -> list[float]:
        return [loss for loss, _ in training_steps(init_weights(DeepSeekV3(SMALL), seed=0), ids, dataclasses.replace(SHORT, seed=seed))]

    assert losses(0) == losses(0) != losses(1)


def test_train_logs_every_so_often_and_at_the_end(model, ids):
    rows = train(model, ids, ids, SHORT, every=4)
    assert [row["step"] for row in rows] == [4, 6]
    assert all(row.keys() == {"step", "loss", "max_violation", "validation_loss"} for row in rows)
    assert rows[-1]["validation_loss"] < math.log(SMALL.vocab_size)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.abs().max() > 0
    assert not model.model.layers[1].mlp.gate._forward_hooks


def test_a_trained_model_survives_fp8(model, ids, tmp_path):
    train(model, ids, ids, dataclasses.replace(SHORT, steps=60, seq=32))
    inputs, _ = draw_batch(ids, 2, 32, torch.Generator().manual_seed(5))
    save_model(model, tmp_path, fp8=True)
    with torch.no_grad():
        exact = model(inputs)
        for name, parameter in model.named_parameters():
            if is_quantized(name):
                parameter.copy_(dequantize(*quantize(parameter), torch.float32))
            elif not name.endswith("bias"):
                parameter.copy_(parameter.bfloat16())
        rounded = model(inputs)
        loaded = load_model(tmp_path, dtype=torch.float32, dequantize=True)(inputs)
    assert (loaded - rounded).abs().max() <= LOGITS                                   # the file holds what was quantised, and nothing else
    assert 0 < (loaded - exact).norm() / exact.norm() < 0.05                          # and quantising costs a few per cent at most


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A whole `make_tiny` in miniature: a library of 42 files, two steps."""
    library, path = tmp_path_factory.mktemp("library"), tmp_path_factory.mktemp("models") / "tiny"
    files = [library / f"m{i:02d}.py" for i in range(42)]
    for i, file in enumerate(files):
        file.write_text(TEXTS[i] * 10)
    files[7].write_bytes(b"# \xff\xfe is not UTF-8\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "standard_library", lambda: files)
        return path, make_tiny(path, dataclasses.replace(SHORT, steps=2), SMALL)


def test_make_tiny_leaves_a_checkpoint_that_writes(tiny_run):
    path, rows = tiny_run
    assert rows[-1]["step"] == 2 and len((path / "log.csv").read_text().splitlines()) == 1 + len(rows)
    output = LLM(path).generate("def ", SamplingParams(max_tokens=4, temperature=0.0))[0]
    assert output.text and len(output.token_ids) <= 4


def test_the_card_says_what_made_the_checkpoint(tiny_run):
    path, rows = tiny_run
    card = (path / "README.md").read_text(encoding="utf-8")
    for fact in ("make tiny", "seed 0", "2 steps of 2 windows of 16 tokens", f"{rows[-1]['validation_loss']:.3f}", "64 read", "PSF License", "gamma=0.01", "Limits"):
        assert fact in card
    assert "{" not in card


def test_the_standard_library_is_found_in_order_and_without_tests():
    root, files = Path(sysconfig.get_paths()["stdlib"]), training.standard_library()
    assert {"argparse.py", "textwrap.py"} <= {file.name for file in files} and files == sorted(files)
    assert not any({"test", "tests", "site-packages"} & set(file.relative_to(root).parts) for file in files)
