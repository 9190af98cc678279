"""The recorded experiments: what a run writes, that none is repeated, and that the recorded file is one of these settings."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from deepseek_lit import ablation
from deepseek_lit.ablation import ABLATION_MODEL, ABLATION_TRAINING, VARIANTS, domain_loads, every_tenth, run_ablations
from deepseek_lit.data import Domain, calculations, pack_domains, train_tokenizer
from deepseek_lit.train import new_model

DOMAINS = {"sums": Domain(1.0, calculations(8, False), calculations(8, True)), "more": Domain(1.0, calculations(8, False, 1), calculations(8, True, 1))}
FIGURES = Path(__file__).parent.parent / "figures"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(ablation, "builtin_mixture", lambda: DOMAINS)
    monkeypatch.setattr(ablation, "ABLATION_MODEL", dataclasses.replace(ABLATION_MODEL, num_hidden_layers=2, hidden_size=32, vocab_size=300))
    quick = dataclasses.replace(ABLATION_TRAINING, steps=11, batch=2, seq=16)
    real = ablation.run_variant
    monkeypatch.setattr(ablation, "run_variant", lambda name, seed, corpus: real(name, seed, corpus, quick))


def test_every_run_is_written_and_none_twice(small, tmp_path, monkeypatch):
    file = tmp_path / "out.json"
    run_ablations(file, seeds=1)
    results = json.loads(file.read_text())
    assert [run["variant"] for run in results["runs"]] == list(VARIANTS)
    for run in results["runs"]:
        assert len(run["loss"]) == len(run["max_violation"]) == 2 and run["validation"].keys() == {"sums", "more"}
        assert (run["acceptance"].keys() == {"sums", "more"}) == ("MTP" in run["variant"])
        loads = torch.tensor(run["loads"])
        assert loads.shape == (1, 2, 16) and torch.allclose(loads.mean(-1), torch.tensor(1.0), atol=1e-3)
    monkeypatch.setattr(ablation, "run_variant", lambda *_: pytest.fail("a finished run was repeated"))
    run_ablations(file, seeds=1)
    assert json.loads(file.read_text())["runs"] == results["runs"] and not list(tmp_path.glob("*.part"))


def test_means_of_ten():
    assert every_tenth([float(i) for i in range(25)]) == [4.5, 14.5, 22.0]


def test_domain_loads_count_each_domain_by_itself():
    tokenizer = train_tokenizer(DOMAINS["sums"].texts, 300)
    corpus = pack_domains(DOMAINS, tokenizer)
    model = new_model(dataclasses.replace(ABLATION_MODEL, num_hidden_layers=2, hidden_size=32, vocab_size=300), 0)
    together, alone = domain_loads(model, corpus.held_out, 16, 8), domain_loads(model, {"more": corpus.held_out["more"]}, 16, 8)
    assert torch.equal(together[:, 1], alone[:, 0]) and not torch.equal(together[:, 0], together[:, 1])


def test_the_recorded_results_are_of_these_settings():
    results = json.loads((FIGURES / "16b_balance.json").read_text())
    assert results["training"] == json.loads(json.dumps(dataclasses.asdict(ABLATION_TRAINING))) and results["variants"] == VARIANTS
    assert results["model"] == json.loads(json.dumps(dataclasses.asdict(ABLATION_MODEL)))
    assert {(run["variant"], run["seed"]) for run in results["runs"]} == {(name, seed) for name in VARIANTS for seed in range(3)}
