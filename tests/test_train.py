"""Training: the pieces of chapter 16 that a wrong sign or an index off by one would break without an error message."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import socket
import subprocess
import sys

import pytest
import torch

from deepseek_lit import cli
from deepseek_lit import train as training
from deepseek_lit.checkpoint import load_model, save_model
from deepseek_lit.config import InputError, is_quantized, tiny_config
from deepseek_lit.data import Corpus, Domain, batches, pack_domains, train_tokenizer
from deepseek_lit.fp8 import dequantize, quantize
from deepseek_lit.generate import LLM, SamplingParams
from deepseek_lit.train import (
    LoadCounter, Objective, TrainConfig, acceptance, agreement, check_training, continue_greedily, learning_rate, losses_of, make_optimizer, make_tiny, mtp_weight, new_model,
    read_run, sequence_balance, train, train_run, train_step, update_biases, validate,
)  # fmt: skip
from tolerances import LOGITS

SMALL = dataclasses.replace(
    tiny_config(vocab_size=320), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
)  # fmt: skip
SHORT = TrainConfig(steps=6, batch=2, seq=16, lr=3e-3, gamma=0.01)
TEXTS = [f"def add_{i}(a, b):\n    return a + b + {i}\n" for i in range(60)]
DOMAINS = {"code": Domain(2.0, TEXTS[:50], TEXTS[50:]), "sums": Domain(1.0, [f"{i} + 1 = {i + 1}\n" * 5 for i in range(40)], [f"{i} + 1 = {i + 1}\n" * 5 for i in range(40, 50)])}


@pytest.fixture
def model():
    return new_model(SMALL, seed=0)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return pack_domains(DOMAINS, train_tokenizer(TEXTS, SMALL.vocab_size))


@pytest.fixture
def batch(corpus):
    return next(batches(corpus, 4, 16, seed=0))


def run_steps(model, corpus, config) -> list[dict[str, float]]:
    objective, optimizer = Objective(model, config), make_optimizer(model, config)
    rows = [train_step(objective, optimizer, batch, step) for step, batch in zip(range(config.steps), batches(corpus, config.batch, config.seq, config.seed))]
    objective.remove_hooks()
    return rows


@pytest.mark.parametrize("steps", [50, 100, 1600])
def test_learning_rate_warms_up_stays_and_settles(steps):
    config = TrainConfig(steps=steps, warmup=0.02)
    rates = torch.tensor([learning_rate(step, config) for step in range(steps)], dtype=torch.float64)
    warm, start = round(0.02 * steps), round(0.52 * steps)
    assert (rates[: warm].diff() > 0).all() and math.isclose(rates[0], config.lr / warm)
    assert torch.allclose(rates[warm - 1 : start + 1], torch.tensor(config.lr, dtype=torch.float64))
    assert (rates[start:].diff() < 0).all()
    assert config.lr * config.final_lr < rates[-1] < config.lr * (config.final_lr + 10 / steps)


def test_the_look_further_weighs_less_once_the_rate_falls():
    config = TrainConfig(steps=100, warmup=0.1, constant=0.5)
    weights = [mtp_weight(step, config) for step in range(100)]
    assert weights == [0.3] * 60 + [0.1] * 40


def test_a_fresh_model_is_surprised_by_the_logarithm_of_the_vocabulary_twice(model, batch):
    for loss in losses_of(model, *batch):
        assert abs(loss.item() - math.log(SMALL.vocab_size)) < 0.05


def test_losses_are_those_of_the_next_token_and_of_the_one_after(model, batch):
    from deepseek_lit.mtp import further_logits, look_further

    inputs, targets = batch
    main, further = losses_of(model, inputs, targets, "float32")
    hidden = model.model(inputs)
    logits = further_logits(model, 0, look_further(model, 0, hidden[:, :-1], inputs[:, 1:]))
    for loss, predicted, wanted in ((main, model(inputs), targets), (further, logits, targets[:, 1:])):
        expected = -predicted.log_softmax(-1).gather(-1, wanted[..., None]).mean()
        assert torch.allclose(loss, expected, atol=1e-5)


def test_a_model_without_mtp_has_no_loss_further(batch):
    main, further = losses_of(new_model(dataclasses.replace(SMALL, num_nextn_predict_layers=0), 0), *batch)
    assert main > 0 and further == 0


def test_the_look_further_teaches_trunk_embedding_and_head(model, batch):
    losses_of(model, *batch, "float32")[1].backward()
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.layers.2.eh_proj.weight"):
        assert model.get_parameter(name).grad.abs().sum() > 0, name


def test_counter_counts_every_choice_once_and_knows_the_mtp_gate(model, batch):
    counter, seen = LoadCounter(model), {}
    for layer in (1, 2):
        model.model.layers[layer].mlp.gate.register_forward_hook(lambda gate, inputs, output, layer=layer: seen.setdefault(layer, []).append(output[1]))
    losses_of(model, *batch)
    for layer in (1, 2):
        assert counter.loads[layer - 1].tolist() == [int((torch.cat(seen[layer]) == e).sum()) for e in range(8)]
    assert counter.loads[0].sum() == 4 * 16 * 2 and counter.loads[1].sum() == 4 * 15 * 2
    counter.remove()
    before = counter.loads[0].clone()
    model(batch[0])
    assert torch.equal(counter.loads[0], before)


def test_violation_is_the_worst_gates_excess_and_silent_gates_do_not_count(model):
    counter = LoadCounter(model)
    counter.loads = [torch.full((8,), 3), torch.tensor([8, 0, 0, 0, 0, 0, 0, 0]), torch.zeros(8)]
    assert counter.violation() == 7
    counter.loads = [torch.full((8,), 3), torch.zeros(8)]
    assert counter.violation() == 0


def test_busy_experts_go_down_and_idle_ones_up(model):
    counter = LoadCounter(model)
    counter.loads = [torch.tensor([9, 0, 3, 3, 3, 3, 0, 3]), torch.zeros(8)]
    for _ in range(2):
        update_biases(counter, gamma=0.25)
    assert counter.gates[0].e_score_correction_bias.tolist() == [-0.5, 0.5, 0, 0, 0, 0, 0.5, 0]
    assert counter.gates[1].e_score_correction_bias.tolist() == [0.0] * 8
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


def test_sequence_balance_is_the_reports_sum():
    generator = torch.Generator().manual_seed(0)
    scores, experts = torch.rand(3, 7, 8, generator=generator), torch.rand(3, 7, 8, generator=generator).topk(2, -1).indices
    total = 0.0
    for s, chosen in zip(scores.double(), experts):                                            # TR eq. 17–20, written out
        for i in range(8):
            f = 8 / (2 * 7) * sum(int(i in row) for row in chosen.tolist())
            p = sum(float(s[t, i] / s[t].sum()) for t in range(7)) / 7
            total += f * p / 3
    assert math.isclose(sequence_balance(scores, experts).item(), total, rel_tol=1e-5)


def test_sequence_balance_sees_single_sequences():
    scores = torch.full((2, 8, 8), 0.01)
    scores[0, :, 0] = scores[1, :, 1] = 0.9                                                    # each alone is one-sided, both together less so
    experts = scores.topk(1, -1).indices
    together = sequence_balance(scores.flatten(0, 1)[None], experts.flatten(0, 1)[None])
    assert sequence_balance(scores, experts) > 1.5 * together


def test_the_balance_loss_spreads_the_load_and_reaches_every_gate(corpus):
    calm = {}
    for alpha in (0.0, 0.1):
        model = new_model(SMALL, 0)
        rows = run_steps(model, corpus, dataclasses.replace(SHORT, steps=24, batch=4, gamma=0.0, alpha=alpha))
        calm[alpha] = sum(row["max_violation"] for row in rows[-8:])
    assert calm[0.1] < 0.8 * calm[0.0]


def test_objective_adds_up_balance_over_gates_and_leaves_no_hooks(model, batch):
    objective = Objective(model, SHORT)
    main, further, balance = objective(*batch)
    assert len(objective.balance.terms) == 2 and torch.isclose(balance, sum(objective.balance.terms)) and balance >= 1.9
    balance.backward()
    for layer in (1, 2):
        assert model.model.layers[layer].mlp.gate.weight.grad.abs().sum() > 0
    objective.remove_hooks()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_rounding_the_runs_of_experts_changes_nothing(batch):
    found = []
    for rounded in (True, False):
        objective = Objective(new_model(SMALL, 0), dataclasses.replace(SHORT, dtype="float32"))
        for hook in () if rounded else objective.rounding:
            hook.remove()
        losses = objective(*batch)
        sum(losses).backward()
        found.append((torch.stack(losses), [p.grad for p in objective.model.parameters()]))
    assert torch.allclose(found[0][0], found[1][0])
    for ours, plain in zip(*(gradients for _, gradients in found)):
        assert (ours is None) == (plain is None) and (ours is None or torch.allclose(ours, plain, atol=1e-6))


def test_gate_biases_get_no_gradient_and_idle_experts_none_either(model, corpus):
    counter, optimizer = LoadCounter(model), make_optimizer(model, SHORT)
    losses_of(model, *next(batches(corpus, 1, 3, seed=0)))[0].backward()
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


def test_long_gradients_are_cut_to_length_one(model, batch):
    objective = Objective(model, dataclasses.replace(SHORT, dtype="float32"))
    with torch.no_grad():
        model.lm_head.weight *= 50
    seen = []
    optimizer = make_optimizer(model, SHORT)
    optimizer.register_step_pre_hook(lambda *_: seen.append(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()))
    assert train_step(objective, optimizer, batch, 0)["gradient_norm"] > 1.5
    assert torch.isclose(seen[0], torch.tensor(1.0), atol=1e-3)


def test_one_batch_can_be_learned_by_heart_twice(model, batch):
    config = dataclasses.replace(SHORT, lr=1e-2, steps=60, final_lr=0.3)
    objective, optimizer = Objective(model, config), make_optimizer(model, config)
    rows = [train_step(objective, optimizer, tuple(part[:2] for part in batch), step) for step in range(config.steps)]
    assert rows[0]["loss"] > 5 and rows[-1]["loss"] < 0.1 and rows[-1]["mtp_loss"] < 0.3


def test_same_seed_same_losses_and_another_seed_others(corpus):
    def losses(seed: int) -> list[float]:
        return [row["loss"] for row in run_steps(new_model(SMALL, 0), corpus, dataclasses.replace(SHORT, seed=seed))]

    assert losses(0) == losses(0) != losses(1)


def test_train_logs_means_every_so_often_and_at_the_end(model, corpus):
    rows, seconds = train(model, corpus, SHORT, every=4)
    assert [row["step"] for row in rows] == [4, 6] and seconds > 0
    assert {"learning_rate", "loss", "mtp_loss", "balance_loss", "gradient_norm", "max_violation", "validation_code", "validation_sums"} < rows[0].keys()
    single = run_steps(new_model(SMALL, 0), corpus, SHORT)
    assert math.isclose(rows[1]["loss"], (single[4]["loss"] + single[5]["loss"]) / 2, abs_tol=1e-5)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.abs().max() > 0
    assert not model.model.layers[1].mlp.gate._forward_hooks


def test_validation_is_by_domain_and_always_on_the_same_windows(model, corpus):
    first, second = (validate(model, corpus.held_out, SHORT, count=4) for _ in range(2))
    assert first == second and first.keys() == {"code", "sums"} and first["code"] != first["sums"]
    assert not any(p.grad is not None for p in model.parameters())


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The rows, the folder and the model of a run that nothing happened to."""
    path, model = tmp_path_factory.mktemp("whole"), new_model(SMALL, 0)
    return train(model, corpus, SHORT, path, every=2)[0], path, model


@pytest.mark.parametrize("killed_in", [1, 3, 5, 6])
def test_killed_and_continued_equals_undisturbed(corpus, tmp_path, undisturbed, killed_in):
    victim, continued = new_model(SMALL, 0), new_model(SMALL, 0)
    expected, whole, model = undisturbed
    calls = itertools.count(1)

    def unplug(*_) -> None:
        if torch.is_grad_enabled() and next(calls) == 2 * killed_in:                           # head is used twice a step
            raise KeyboardInterrupt

    victim.lm_head.register_forward_pre_hook(unplug)
    path = tmp_path / "killed"
    path.mkdir()
    with contextlib.suppress(KeyboardInterrupt):
        train(victim, corpus, SHORT, path, every=2)
    assert (path / "training.pt").exists() == (killed_in > 2)
    rows, _ = train(continued, corpus, SHORT, path, every=2)
    assert rows == expected
    assert (path / "log.csv").read_text() == (whole / "log.csv").read_text()
    for (name, a), b in zip(continued.state_dict().items(), model.state_dict().values()):
        assert torch.equal(a, b), name


def test_a_kill_while_writing_leaves_the_old_state(corpus, tmp_path, monkeypatch):
    train(new_model(SMALL, 0), corpus, dataclasses.replace(SHORT, steps=2), tmp_path, every=2)
    before = (tmp_path / "training.pt").read_bytes()

    def die(state, file) -> None:
        file.write_bytes(b"half a st")
        raise KeyboardInterrupt

    objective = Objective(new_model(SMALL, 1), SHORT)
    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        training.save_state(tmp_path / "training.pt", objective, make_optimizer(objective.model, SHORT), [], 0.0)
    assert (tmp_path / "training.pt").read_bytes() == before


def test_a_state_of_another_run_is_refused(corpus, tmp_path):
    train(new_model(SMALL, 0), corpus, dataclasses.replace(SHORT, steps=2), tmp_path, every=2)
    with pytest.raises(InputError, match=r"training.pt belongs to a run with lr = 0.003, expected 0.004"):
        train(new_model(SMALL, 0), corpus, dataclasses.replace(SHORT, steps=2, lr=4e-3), tmp_path)
    other = new_model(dataclasses.replace(SMALL, hidden_size=48), 0)
    with pytest.raises(InputError, match="another model"):
        train(other, corpus, dataclasses.replace(SHORT, steps=2), tmp_path)


WORKER = """
import json, sys, torch
sys.path.insert(0, {tests!r})
from test_train import DOMAINS, SMALL, TEXTS
from deepseek_lit.data import pack_domains, train_tokenizer
from deepseek_lit.train import TrainConfig, new_model, process_group, train
torch.set_num_threads(1)
corpus = pack_domains(DOMAINS, train_tokenizer(TEXTS, SMALL.vocab_size))
with process_group("cpu"):
    model = new_model(SMALL, 0)
    rows, _ = train(model, corpus, TrainConfig(steps=3, batch=8, seq=16, lr=3e-3, gamma=0.01, dtype="float32"), every=1)
    torch.save((rows, model.state_dict()), {out!r} + torch.distributed.get_rank().__str__())
"""


def test_two_processes_of_four_windows_do_what_one_does_with_eight(corpus, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = WORKER.format(tests=os.path.dirname(__file__), out=str(tmp_path / "rank"))
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}  # what torchrun would set
    workers = [subprocess.Popen([sys.executable, "-c", script], env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in range(2)]
    for worker in workers:
        _, err = worker.communicate(timeout=240)
        assert worker.returncode == 0, err
    alone = new_model(SMALL, 0)
    expected, _ = train(alone, corpus, TrainConfig(steps=3, batch=8, seq=16, lr=3e-3, gamma=0.01, dtype="float32"), every=1)
    (rows, first), (_, second) = (torch.load(tmp_path / f"rank{r}", weights_only=True) for r in range(2))
    for row, want in zip(rows, expected, strict=True):
        assert row.keys() == want.keys() and all(math.isclose(row[key], want[key], rel_tol=1e-3, abs_tol=1e-4) for key in want)
    for (name, a), b, c in zip(first.items(), second.values(), alone.state_dict().values()):
        assert torch.equal(a, b), name                                                         # the copies stay copies
        assert torch.allclose(a, c, atol=2e-4), name


def test_agreement_is_one_when_the_guess_is_the_next_say_and_near_chance_before_learning(model, batch, monkeypatch):
    assert agreement(model, batch[0]) < 0.2
    inputs = batch[0]
    said = model(inputs).argmax(-1)
    monkeypatch.setattr(training, "further_logits", lambda *_: torch.nn.functional.one_hot(said[:, 1:], SMALL.vocab_size).float())
    assert agreement(model, inputs) == 1.0
    monkeypatch.setattr(training, "further_logits", lambda *_: torch.nn.functional.one_hot((said[:, 1:] + torch.arange(15).ge(9)) % SMALL.vocab_size, SMALL.vocab_size).float())
    assert agreement(model, inputs, first=9) == 0.0 and math.isclose(agreement(model, inputs), 9 / 15, rel_tol=1e-5)


def test_greedy_continuation_is_what_the_engine_writes(model):
    row = torch.tensor([[5, 9, 200]])
    longer = continue_greedily(model, row, 5)
    for end in range(3, 8):
        assert longer[0, end] == model(longer[:, :end])[0, -1].argmax()


def test_acceptance_of_a_model_without_mtp_is_empty(corpus):
    assert acceptance(new_model(dataclasses.replace(SMALL, num_nextn_predict_layers=0), 0), corpus.held_out, 16) == {}


def test_a_trained_model_survives_fp8(model, corpus, tmp_path):
    train(model, corpus, dataclasses.replace(SHORT, steps=20, seq=32))
    inputs, _ = next(batches(corpus, 2, 32, seed=5))
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
    """A whole `make_tiny` in miniature, two steps."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    many = {name: Domain(domain.weight, domain.texts * 30, domain.held_out * 30) for name, domain in DOMAINS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "builtin_mixture", lambda: many)
        return path, make_tiny(path, dataclasses.replace(SHORT, steps=2), SMALL)


def test_make_tiny_leaves_a_checkpoint_that_writes(tiny_run):
    path, rows = tiny_run
    assert rows[-1]["step"] == 2 and len((path / "log.csv").read_text().splitlines()) == 1 + len(rows)
    assert not (path / "training.pt").exists() and not list(path.glob("*.part"))
    output = LLM(path).generate("def ", SamplingParams(max_tokens=4, temperature=0.0))[0]
    assert len(output.token_ids) <= 4 and load_model(path, mtp=True) is not None


def test_the_card_says_what_made_the_checkpoint(tiny_run):
    path, rows = tiny_run
    card = (path / "README.md").read_text(encoding="utf-8")
    for fact in ("make tiny", "seed 0", "2 steps of 2 windows of 16 tokens", "| code | 200% |", "64 read", "PSF License", "gamma=0.01", "Limits", "second token accepted"):
        assert fact in card
    assert "{" not in card


SETTINGS = {"train": {"steps": 3, "batch": 2, "seq": 16, "dtype": "float32"}, "every": 2}
FEW = {name: getattr(SMALL, name) for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "n_routed_experts", "n_group")}


@pytest.fixture
def settings(tmp_path):
    """Writes a settings file and gives its path."""
    (tmp_path / "text").mkdir()
    for i in range(25):
        (tmp_path / "text" / f"{i:02}.py").write_text(TEXTS[i] * 30)

    def write(name: str = "run.json", **fields) -> str:
        whole = {"output": str(tmp_path / "model"), "data": {"code": {"files": [str(tmp_path / "text")]}}, "model": FEW | {"topk_group": 1, "num_experts_per_tok": 2}, **SETTINGS, **fields}
        (tmp_path / name).write_text(json.dumps(whole))
        return str(tmp_path / name)

    return write


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command in this process: exit code and stderr."""

    def run(*words) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["deepseek-lit", "train", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capsys.readouterr().err

    return run


def test_the_command_trains_and_leaves_a_checkpoint(settings, command, tmp_path):
    code, err = command("--config", settings(), "--device", "cpu")
    assert code == 0, err
    path = tmp_path / "model"
    assert {"config.json", "generation_config.json", "log.csv", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"} < {file.name for file in path.iterdir()}
    assert not (path / "training.pt").exists() and [line.split(",")[0] for line in (path / "log.csv").read_text().splitlines()] == ["step", "2", "3"]
    assert load_model(path, mtp=True)(torch.tensor([[1, 2, 3]])).shape == (1, 3, SMALL.vocab_size)
    code, err = command("--config", settings())
    assert code == 2 and "holds a checkpoint already" in err and err.count("\n") == 1


def test_the_command_goes_on_after_ctrl_c(settings, command, tmp_path, monkeypatch):
    whole = settings("whole.json", output=str(tmp_path / "whole"))
    assert command("--config", whole)[0] == 0
    real, calls = training.train_step, itertools.count(1)

    def interrupted(*words) -> dict:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(*words)

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_step", interrupted)
        code, err = command("--config", settings())
    assert code == 130 and "--resume" in err
    code, err = command("--config", settings())
    assert code == 2 and "holds an interrupted run: --resume" in err
    assert command("--config", settings(), "--resume")[0] == 0
    for name in ("log.csv", "model-00001-of-00001.safetensors"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("fields, sentence", [
    ({"outptu": "x"}, "outptu is unknown"),
    ({"output": 3}, "output is 3, expected a path"),
    ({"every": 0}, "every is 0"),
    ({"train": {"learning_rate": 1e-3}}, "train.learning_rate is unknown, expected one of steps"),
    ({"train": {"steps": "many"}}, "train.steps is 'many', expected a number"),
    ({"train": {"steps": 0}}, "train.steps is 0"),
    ({"train": {"dtype": "float16"}}, "train.dtype is 'float16'"),
    ({"model": {"hidden": 3}}, "model.hidden is unknown"),
    ({"model": {"hidden_size": -3}}, "hidden_size is -3"),
    ({"model": {"n_routed_experts": 9}}, "n_routed_experts is 9"),
    ({"data": {"code": {"files": ["nowhere/*.py"]}}}, "names nowhere/*.py, where there is no file"),
    ({"data": {"code": {"file": ["x"]}}}, "data.code is"),
    ({"data": {"code": {"files": ["x"], "weight": -1}}}, "weight is -1"),
    ({"train": {"steps": 1, "seq": 10**6}}, "tokens, expected more than 1000000"),
    ({"tokenizer": "nowhere"}, "tokenizer.json does not exist"),
])  # fmt: skip
def test_the_command_refuses_in_one_sentence(settings, command, fields, sentence):
    code, err = command("--config", settings(**fields))
    assert code == 2 and sentence in err and err.count("\n") == 1, err


@pytest.mark.parametrize("name, content, sentence", [("run.json", "{", "is not valid JSON"), ("run.json", "[]", "holds a list"), ("absent", None, "cannot be read"), ("run.toml", "x =", "TOML")])
def test_files_that_are_no_settings_are_refused(command, tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_text(content)
    code, err = command("--config", str(tmp_path / name))
    assert code == 2 and sentence in err and err.count("\n") == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python reads TOML from 3.11 on")
def test_toml_says_the_same_as_json(settings, tmp_path):
    text = "\n".join([f'output = "{tmp_path}/model"', "every = 2", f'[data.code]\nfiles = ["{tmp_path}/text"]', "[model]", *(f"{k} = {v}" for k, v in FEW.items()),
                      "topk_group = 1", "num_experts_per_tok = 2", "[train]", "steps = 3", "batch = 2", "seq = 16", 'dtype = "float32"'])  # fmt: skip
    (tmp_path / "run.toml").write_text(text)
    run = read_run(tmp_path / "run.toml")
    assert run == read_run(type(tmp_path)(settings()))
    assert run.training == dataclasses.replace(TrainConfig(), **SETTINGS["train"]) and run.model.hidden_size == 32


def test_settings_keep_their_types():
    assert check_training({"betas": [0.8, 0.9], "lr": 1}, "x") == dataclasses.replace(TrainConfig(), betas=(0.8, 0.9), lr=1)


def test_an_existing_tokenizer_must_fit(settings, tmp_path):
    from deepseek_lit.checkpoint import resolve

    run = read_run(type(tmp_path)(settings(tokenizer=str(resolve(None)))))
    with pytest.raises(InputError, match="vocab_size is 320, expected at least"):
        train_run(run)
