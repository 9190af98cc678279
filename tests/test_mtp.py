"""The Multi-Token Prediction layer against transformers' layers and its own `use_mtp`; speculative decoding against plain decoding, token by token."""

import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import sys

import pytest
import torch
from models import random_config, random_model, write_checkpoint, write_dequantized
from safetensors.torch import load_file
from tolerances import LOGITS
from transformers import DeepseekV3ForCausalLM, modeling_layers
from transformers.utils import logging

import deepseek_lit as dl
from deepseek_lit import cli, generate
from deepseek_lit.checkpoint import load_model, resolve, save_model
from deepseek_lit.config import ModelConfig
from deepseek_lit.generate import keep_likely, prefill, read_prompts
from deepseek_lit.mla import LatentCache
from deepseek_lit.mtp import add_mtp, draft, further_logits, look_further, mtp_depth, mtp_losses

logging.disable_progress_bar()
logging.set_verbosity_error()
GREEDY = dl.SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


def write_mtp(path, config, own=(), fp8=False, seed=0):
    """Write a random model with an MTP layer whose norms are not one and whose gate is not trivial; returns `path`."""
    model = add_mtp(random_model(config, seed), [f"model.layers.{config.num_hidden_layers}.{name}.weight" for name in own])
    layer, generator = model.model.layers[-1], torch.Generator().manual_seed(seed + 2)
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    longer = random_model(dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers + 1), seed + 3)
    layer.load_state_dict(longer.model.layers[-1].state_dict(), strict=False)
    save_model(model, path, fp8=fp8)
    return path


def random_ids(config, batch, length, seed=0):
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def facts(out):
    return out.token_ids, out.text, out.finish_reason


# The layer, against transformers

CONFIGS = {
    "plain": (dict(), ()),
    "own-embedding": (dict(), ("embed_tokens",)),
    "own-head": (dict(), ("shared_head.head",)),
    "tied": (dict(tie_word_embeddings=True), ()),
    "no-query-latent": (dict(q_lora_rank=None), ()),
    "eight-groups": (dict(n_group=8, topk_group=4, n_routed_experts=32, num_experts_per_tok=8), ("embed_tokens", "shared_head.head")),
    "no-yarn": (dict(rope_scaling=None), ()),
    "wide-eps": (dict(rms_norm_eps=1e-2), ()),
}  # fmt: skip


def open_transformers(path):
    return DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()


def open_longer(path, longer):
    """The checkpoint in transformers, with its MTP layer passed off as a main one: its own code then fills and runs it."""
    shutil.copytree(path, longer)
    fields = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps({**fields, "num_hidden_layers": fields["num_hidden_layers"] + 1}))
    return open_transformers(longer)


def recompute(path, peer, ids_BS, swapped=False, shift=1, before_norm=False):
    """MTP logits by the layers of `peer`, which `open_longer` gave, and the checkpoint's raw tensors."""
    tensors, decoder, n = load_file(next(path.glob("*.safetensors"))), peer.model, peer.config.num_hidden_layers - 1
    prefix = f"model.layers.{n}."

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + peer.config.rms_norm_eps) * tensors[name].float()

    def run(layers, x_BSD):
        length = x_BSD.shape[1]
        mask_SS = torch.full((length, length), -math.inf).triu(1)[None, None]
        for layer in layers:
            x_BSD = layer(x_BSD, attention_mask=mask_SS, position_embeddings=decoder.rotary_emb(x_BSD, torch.arange(length)[None]))
        return x_BSD

    hidden_BSD = run(decoder.layers[:n], decoder.embed_tokens(ids_BS))[:, : ids_BS.shape[1] - shift]
    hidden_BSD = hidden_BSD if before_norm else norm(hidden_BSD, "model.norm.weight")
    embedding = tensors.get(prefix + "embed_tokens.weight", tensors["model.embed_tokens.weight"])
    both = [norm(embedding[ids_BS[:, shift:]].float(), prefix + "enorm.weight"), norm(hidden_BSD, prefix + "hnorm.weight")]
    x_BSD = run(decoder.layers[n:], torch.cat(both[::-1] if swapped else both, -1) @ tensors[prefix + "eh_proj.weight"].float().T)
    head = tensors.get(prefix + "shared_head.head.weight", peer.lm_head.weight)
    return norm(x_BSD, prefix + "shared_head.norm.weight") @ head.float().T


def ours(path, ids_BS):
    model = load_model(path, mtp=True, dtype=torch.float32)
    return further_logits(model, 0, look_further(model, 0, model.model(ids_BS)[:, :-1], ids_BS[:, 1:]))


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_logits_equal_a_recomputation_by_transformers(name, tmp_path):
    fields, own = CONFIGS[name]
    config = random_config(list(CONFIGS).index(name), num_nextn_predict_layers=1, **fields)
    path, ids_BS = write_mtp(tmp_path / "model", config, own), random_ids(config, 2, 19)
    logits, peer = ours(path, ids_BS), open_longer(path, tmp_path / "longer")
    want = recompute(path, peer, ids_BS)
    assert logits.shape == want.shape and 0.3 < want.std() < 5
    assert (logits - want).abs().max() <= LOGITS
    for mistake in ({"swapped": True}, {"shift": 0}, {"before_norm": True}):
        wrong = recompute(path, peer, ids_BS, **mistake)[:, : logits.shape[1]]
        assert (logits - wrong).abs().max() > (100 if "before_norm" not in mistake else 2) * LOGITS, mistake


@torch.inference_mode()
def test_fp8_logits_equal_those_of_dequantized_weights(tmp_path):
    config = random_config(5, num_nextn_predict_layers=1)
    path, ids_BS = write_mtp(tmp_path / "fp8", config, fp8=True), random_ids(config, 2, 19)
    assert load_model(path, mtp=True).model.layers[-1].self_attn.o_proj.weight.dtype == torch.float8_e4m3fn
    assert load_model(path, mtp=True).model.layers[-1].eh_proj.weight.dtype == torch.float32  # not quantised in the release
    assert (ours(path, ids_BS) - ours(write_dequantized(path, tmp_path / "plain"), ids_BS)).abs().max() <= LOGITS


@torch.inference_mode()
def test_the_main_model_does_not_run_it(tmp_path):
    config = random_config(1, num_nextn_predict_layers=1)
    path, ids_BS = write_mtp(tmp_path, config), random_ids(config, 2, 9)
    with_mtp, without = load_model(path, mtp=True), load_model(path)
    assert mtp_depth(with_mtp) == 1 and mtp_depth(without) == 0
    assert torch.equal(with_mtp(ids_BS), without(ids_BS))


# Training


@torch.inference_mode()
def test_losses_are_those_of_each_depth_written_out():
    config = random_config(2, num_nextn_predict_layers=3)
    model = random_model(config)
    add_mtp(model)
    for parameter in itertools.chain.from_iterable(layer.parameters() for layer in model.model.layers[3:]):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    text_BS = random_ids(config, 2, 12)
    hidden_BSD = model.model(text_BS[:, :-1])
    losses = mtp_losses(model, hidden_BSD, text_BS[:, :-1], text_BS[:, 1:])
    assert len(losses) == 3
    for depth, loss in enumerate(losses):
        hidden_BSD = look_further(model, depth, hidden_BSD[:, :-1], text_BS[:, depth + 1 : -1])
        logprobs_BSW = further_logits(model, depth, hidden_BSD).log_softmax(-1)
        nats = [-logprobs_BSW[b, i, text_BS[b, i + depth + 2]] for b in range(2) for i in range(logprobs_BSW.shape[1])]
        assert len(nats) == 2 * (12 - depth - 2) and float(loss) == pytest.approx(float(sum(nats)) / len(nats), abs=1e-5)


def test_the_loss_reaches_the_shared_embedding_and_head_and_the_main_layers():
    config = random_config(2, num_nextn_predict_layers=1)
    model = random_model(config).requires_grad_(True)
    add_mtp(model)
    for parameter in model.model.layers[-1].parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    text_BS = random_ids(config, 2, 12)
    sum(mtp_losses(model, model.model(text_BS[:, :-1]), text_BS[:, :-1], text_BS[:, 1:])).backward()
    named = dict(model.named_parameters())
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.o_proj.weight", "model.norm.weight", "model.layers.3.eh_proj.weight"):
        assert named[name].grad.abs().max() > 0, name


# The cache


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random model with an MTP layer and so few tokens that some guesses come true."""
    config = random_config(3, vocab_size=7, max_position_embeddings=64, num_nextn_predict_layers=1, eos_token_id=None)
    return write_mtp(tmp_path_factory.mktemp("mtp") / "model", config)


@pytest.mark.parametrize("chunk", [1, 2, 5, 512])
@torch.inference_mode()
def test_prompts_of_any_lengths_in_chunks_leave_the_same_guesses(small, chunk):
    model = load_model(small, mtp=True)
    prompts = [row[:n].tolist() for row, n in zip(random_ids(model.config, 4, 17), (1, 17, 6, 11))]
    cache = LatentCache(model.config, 4, 24, further=1)
    hidden_BD = read_prompts(model, prompts, cache, chunk)
    chosen_B = model.lm_head(hidden_BD).argmax(-1)
    last_B1 = torch.tensor([[len(p) - 1] for p in prompts])
    guesses_BG = draft(model, hidden_BD[:, None], chosen_B[:, None], last_B1, torch.zeros(4, dtype=torch.long), 3, cache)
    for prompt, chosen, guesses in zip(prompts, chosen_B.tolist(), guesses_BG.tolist()):
        ids = torch.tensor([prompt + [chosen]])
        further_SD = look_further(model, 0, model.model(ids[:, :-1]), ids[:, 1:])
        for guess in guesses:  # a chain by hand, everything again for each: true hidden states, then the layer's own
            assert int(further_logits(model, 0, further_SD)[0, -1].argmax()) == guess
            ids = torch.cat([ids, torch.tensor([[guess]])], 1)
            states = torch.cat([model.model(ids[:, : len(prompt)]), further_SD[:, len(prompt) - 1 :]], 1)
            further_SD = look_further(model, 0, states, ids[:, 1:])


@torch.inference_mode()
def test_a_cache_without_room_for_the_layer_is_as_before(small):
    model = load_model(small, mtp=True)
    caches = [LatentCache(model.config, 1, 8, further=further) for further in (0, 1)]
    assert torch.equal(*[prefill(model, [[1, 2, 3]], cache, 2) for cache in caches])
    assert len(caches[0].c_kv) == 3 and caches[1].c_kv[3].abs().sum() > 0


# Speculative decoding is plain decoding


@pytest.mark.parametrize(("seed", "fp8", "guesses"), [(0, False, 1), (0, False, 2), (0, False, 3), (1, True, 2)])
def test_greedy_text_of_random_models(tmp_path, seed, fp8, guesses):
    config = random_config(seed, vocab_size=5, num_nextn_predict_layers=1)
    path = write_mtp(tmp_path, config, fp8=fp8, seed=seed)
    plain, fast = dl.LLM(path, dtype=torch.float32), dl.LLM(path, dtype=torch.float32, speculative_tokens=guesses, prefill_chunk=4)
    prompts = [row[: 1 + 3 * i].tolist() for i, row in enumerate(random_ids(config, 8, 30, seed))]
    params = dataclasses.replace(GREEDY, max_tokens=14)
    want, got = plain.generate(prompts, params), fast.generate(prompts, params)
    assert got == want and fast.generate(prompts[3:4], params) == want[3:4]
    assert 0 < sum(out.accepted for out in got) < sum(out.drafted for out in got)


@pytest.fixture(scope="module")
def bundled():
    """The bundled checkpoint without guesses, and with one, two and three."""
    return [dl.LLM(dtype=torch.float32, dequantize=True, speculative_tokens=guesses) for guesses in range(4)]


TEXTS = [
    "def read(path):\n    ", "import os\nimport ", "class Reader(object):\n    def __init__(self", "x", "12 + 30 = ", "The module provides a ",
    "    for name in sorted(names):\n        if name", "Return the number of ",
]  # fmt: skip


@pytest.mark.parametrize("guesses", [1, 2, 3])
def test_greedy_text_of_the_bundled_checkpoint(bundled, guesses):
    want, got = bundled[0].generate(TEXTS, GREEDY), bundled[guesses].generate(TEXTS, GREEDY)
    assert got == want and bundled[guesses].generate(TEXTS[0], GREEDY) == want[:1]
    accepted, drafted = sum(out.accepted for out in got), sum(out.drafted for out in got)
    assert drafted > accepted > 0.1 * drafted
    assert all(out.steps + out.accepted - 24 in (0, 1) for out in got)  # 1 when the last token was a guess


def test_greedy_text_of_the_bundled_checkpoint_in_fp8():
    plain, fast = (dl.LLM(dtype=torch.float32, speculative_tokens=guesses) for guesses in (0, 2))
    params = dataclasses.replace(GREEDY, max_tokens=10)
    assert fast.model.model.layers[-1].self_attn.o_proj.weight.dtype == torch.float8_e4m3fn
    assert fast.generate(TEXTS[:3], params) == plain.generate(TEXTS[:3], params)


@pytest.mark.parametrize("guesses", [1, 3])
def test_every_knob_gives_what_it_gives_without_guesses(bundled, guesses):
    knobs = [
        {"seed": 1}, {"seed": 2, "temperature": 0.7, "top_p": 0.9}, {"seed": 3, "top_k": 5, "logprobs": 3}, {"seed": 4, "min_p": 0.1, "stop": "\n"},
        {"temperature": 0, "repetition_penalty": 1.3, "logprobs": 0}, {"seed": 6, "repetition_penalty": 1.2, "top_p": 0.8}, {"temperature": 0, "stop": ("e", "(")},
        {"seed": 8, "temperature": 1.5},
    ]  # fmt: skip
    params = [dl.SamplingParams(max_tokens=8 + 3 * i, **knob) for i, knob in enumerate(knobs)]
    want, got, heard = bundled[0].generate(TEXTS, params), [], [""] * 8

    def hear(index, text):
        heard[index] += text

    got = bundled[guesses].generate(TEXTS, params, on_text=hear)
    assert [facts(out) for out in got] == [facts(out) for out in want] and heard == [out.text for out in got]
    for a, b in zip(got, want):
        for step_a, step_b in zip(a.logprobs or [], b.logprobs or [], strict=True):
            assert step_a == pytest.approx(step_b, abs=1e-4)


@pytest.mark.parametrize("guesses", [1, 2, 3])
def test_the_end_of_the_context_and_of_every_reply(small, guesses, monkeypatch):
    plain, fast = dl.LLM(small), dl.LLM(small, speculative_tokens=guesses)
    written, write = [], LatentCache.write
    monkeypatch.setattr(LatentCache, "write", lambda self, layer, positions_BS, *rest: (written.append(int(positions_BS.max())), write(self, layer, positions_BS, *rest)))
    prompts = [[1] * 60, [2] * 63, [3] * 30, [4] * 50, [5, 6]]
    params = [dataclasses.replace(GREEDY, max_tokens=n) for n in (100, 100, 7, 100, 1)]
    want = plain.generate(prompts, params)
    assert [len(out.token_ids) for out in want] == [4, 1, 7, 14, 1]
    assert fast.generate(prompts, params) == want and max(written) <= 63
    assert fast.generate(prompts[:1], params[0]) == want[:1]
    for most in range(1, 9):  # a prompt alone never fills a slot that its reply does not
        written.clear()
        fast.generate([[1, 2, 3]], dataclasses.replace(GREEDY, max_tokens=most))
        assert max(written) <= 2 + most - 1


def with_an_oracle(monkeypatch, replies, mistakes, vocab_size):
    """Let drafts come from the `replies` that are known already (prompt → ids), each token wrong with probability `mistakes`."""
    requests, read_on, dice = [], generate.read_on, random.Random(0)

    def overheard(model, live, *rest):
        requests[:] = live
        return read_on(model, live, *rest)

    def tell(model, hidden, next_ids, positions, last, guesses, cache):
        rows = []
        for out in (request.output for request in requests):
            future = (replies[tuple(out.prompt_token_ids)] + [0] * guesses)[len(out.token_ids) :][:guesses]
            rows.append([(token + (dice.random() < mistakes)) % vocab_size for token in future])
        return torch.tensor(rows)

    monkeypatch.setattr(generate, "read_on", overheard)
    monkeypatch.setattr(generate, "draft", tell)


@pytest.mark.parametrize("mistakes", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("guesses", [1, 2, 3])
def test_any_pattern_of_right_and_wrong_guesses(bundled, monkeypatch, guesses, mistakes):
    llm, plain = bundled[guesses], bundled[0]
    knobs = [{"temperature": 0}, {"seed": 1}, {"seed": 2, "repetition_penalty": 1.4}, {"seed": 3, "stop": ("\n", "e")}, {"temperature": 0, "stop": "("}]
    params = [dl.SamplingParams(max_tokens=9 + 3 * i, ignore_eos=True, **knob) for i, knob in enumerate(knobs)]
    ids = [plain.encode(text) for text in TEXTS[:5]]
    free = plain.generate(ids, [dataclasses.replace(p, stop=()) for p in params])
    params += [dataclasses.replace(params[1], stop_token_ids=(free[1].token_ids[5],))]  # ends by id within a run
    ids, want = ids + ids[1:2], plain.generate(ids + ids[1:2], params)
    with_an_oracle(monkeypatch, {tuple(p): out.token_ids for p, out in zip(ids, free)}, mistakes, plain.model.config.vocab_size)
    got = llm.generate(ids, params)
    assert [facts(out) for out in got] == [facts(out) for out in want]
    if mistakes == 0:
        assert [out.steps for out in got] == [1 + math.ceil((len(out.token_ids) - 1) / (guesses + 1)) for out in got]
    if mistakes == 1:
        assert all(out.accepted == 0 and out.steps == len(out.token_ids) and out.tokens_per_step == 1 for out in got)


HELD_OUT = [
    'import os\n\n\nclass Shelf:\n    """A shelf holds books, and remembers the order in which they came."""\n\n    def __init__(self, name, books=None):\n        self.name = name\n'
    "        self.books = list(books or [])\n\n    def add(self, book):\n        if book in self.books:\n            raise ValueError(\"book is already on the shelf\")\n"
    "        self.books.append(book)\n        return self\n",
    "A queue holds the things that still have to be done. New ones are added at the end, and the next one is taken from the front.\nIf the queue is empty, the caller waits until "
    "another thread adds something, or until the given number of seconds has passed. In that case\nan error is raised. The size of a queue may be limited.\n",
    "38 - 10 = 28\n33 - 8 = 25\n22 - 13 = 9\n36 - 23 = 13\n8 - 5 = 3\n40 - 39 = 1\n42 - 3 = 39\n47 - 30 = 17\n34 - 22 = 12\n40 - 29 = 11\n",
]  # fmt: skip


def test_most_second_tokens_are_guessed_right_on_text_that_was_never_learned(bundled):
    """From every other place of three texts that the training has not seen: written for this test, and calculations that are kept out."""
    ids = [bundled[1].encode(text) for text in HELD_OUT]
    outs = bundled[1].generate([text[:n] for text in ids for n in range(9, len(text), 2)], dataclasses.replace(GREEDY, max_tokens=3))
    assert len(outs) > 100 and sum(out.accepted for out in outs) >= 0.6 * sum(out.drafted for out in outs)


def test_acceptance_is_counted_alike_alone_and_in_a_batch(bundled):
    params = [dataclasses.replace(GREEDY, max_tokens=4 + 2 * i) for i in range(8)]
    together = bundled[2].generate(TEXTS, params)
    for out, alone in zip(together, (bundled[2].generate(text, p)[0] for text, p in zip(TEXTS, params))):
        assert (out.steps, out.drafted, out.accepted) == (alone.steps, alone.drafted, alone.accepted)
        assert out.tokens_per_step == len(out.token_ids) / out.steps


# The distribution


def p_value(counts, expected):
    """Of Pearson's chi-square test; cells expected below 5 are taken together."""
    large = expected >= 5
    pooled = torch.stack([torch.cat([x[large], x[~large].sum()[None]]) for x in (counts, expected)])
    if pooled[1, -1] < 5:
        pooled = torch.cat([pooled[:, :-2], pooled[:, -2:].sum(1, keepdim=True)], 1)
    chi = ((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum()
    return float(torch.special.gammaincc(torch.tensor((pooled.shape[1] - 1) / 2, dtype=torch.float64), chi.double() / 2))


@torch.inference_mode()
def joint_distribution(model, prompt, params, length=3):
    """Probability of every reply of `length` tokens, [W ** length], from plain forwards."""
    joint = torch.ones(1, dtype=torch.float64)
    for written in range(length):
        replies = itertools.product(range(model.config.vocab_size), repeat=written)
        logits = model(torch.tensor([[*prompt, *reply] for reply in replies]))[:, -1]
        p = torch.stack([keep_likely((row / params.temperature).softmax(-1), params) for row in logits])
        joint = (joint[:, None] * p).flatten()
    return joint


def replies_of(llm, prompt, params, number):
    """How often each reply of three tokens came, drawn with as many seeds."""
    outs = llm.generate([prompt] * number, [dataclasses.replace(params, seed=seed) for seed in range(number)])
    ids = torch.tensor([out.token_ids for out in outs])
    powers = llm.model.config.vocab_size ** torch.arange(2, -1, -1)
    return (ids * powers).sum(1).bincount(minlength=llm.model.config.vocab_size**3).double(), outs


def second_throw(request, logits_SW, guessed, seconds=0.0):
    """The tempting mistake: when a sample from the model is not what was guessed, throw again."""
    request.output.steps += 1
    for logits_W, guess in zip(logits_SW, [*guessed, None]):
        if generate.sample(logits_W, request.sampler.params, None, request.sampler.generator) == guess:
            logits_W = torch.full_like(logits_W, -math.inf).index_fill(0, torch.tensor([guess]), 0.0)
        request.advance(logits_W, seconds)
        if request.output.finish_reason or request.output.token_ids[-1] != guess:
            return ""
    return ""


@pytest.mark.parametrize("knobs", [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 4, "min_p": 0.15}], ids=str)
def test_guesses_do_not_change_the_distribution(small, knobs, monkeypatch):
    llm = dl.LLM(small, speculative_tokens=2, max_batch=1024)
    prompt, params, number = [1, 2, 3, 4], dl.SamplingParams(max_tokens=3, **knobs), 2048
    expected = number * joint_distribution(llm.model, prompt, params)
    counts, outs = replies_of(llm, prompt, params, number)
    assert sum(out.accepted for out in outs) > 100 and counts[expected == 0].sum() == 0
    assert p_value(counts, expected) > 1e-3
    if not knobs:  # the test can tell
        monkeypatch.setattr(generate, "follow", second_throw)
        assert p_value(replies_of(llm, prompt, params, number)[0], expected) < 1e-6


# transformers' use_mtp


@pytest.mark.skipif(not hasattr(modeling_layers, "MtpModel"), reason="this transformers has no MTP")
@pytest.mark.parametrize("where", ["random", "bundled"])
def test_transformers_guesses_the_same_tokens(where, small, tmp_path, monkeypatch):
    path = small if where == "random" else write_dequantized(resolve(None), tmp_path / "plain")
    config = ModelConfig.from_pretrained(path)
    peer = open_transformers(path)
    prompt = random_ids(config, 1, 9) if where == "random" else torch.tensor([dl.LLM().encode(TEXTS[0])])
    settings = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    plain = peer.generate(prompt, **settings)
    with pytest.raises((RuntimeError, ValueError), match="missing|MTP layer patterns"):  # it looks for layer 61, whatever config.json says
        peer.generate(prompt, use_mtp=True, **settings)
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [rf"model\.layers\.{config.num_hidden_layers}\."])
    peer = open_transformers(path)
    theirs, forward, mine = [], modeling_layers.MtpModel.forward, []
    monkeypatch.setattr(modeling_layers.MtpModel, "forward", lambda *a, **k: (out := forward(*a, **k), theirs.append(out[0].tolist()))[0])
    monkeypatch.setattr(generate, "draft", lambda *a: (out := draft(*a), mine.append(out.tolist()))[0])
    assert torch.equal(peer.generate(prompt, use_mtp=True, **settings), plain)
    [out] = dl.LLM(path, dtype=torch.float32, speculative_tokens=1).generate(prompt.tolist(), dataclasses.replace(GREEDY, max_tokens=30))
    assert out.prompt_token_ids + out.token_ids == plain[0].tolist()
    assert mine == theirs[: len(mine)] and len(theirs) - len(mine) <= 1  # theirs guesses once more when there is no room left
    assert out.accepted > 0


# What can be asked for


@pytest.mark.parametrize("guesses", [-1, 4, 1.5, None, "2"])
def test_a_number_of_guesses_that_cannot_be(small, guesses):
    with pytest.raises(dl.InputError, match="speculative_tokens is .* expected a whole number from 0 .* to 3"):
        dl.LLM(small, speculative_tokens=guesses)


def test_a_checkpoint_without_the_layer(tmp_path):
    path = write_checkpoint(tmp_path, random_config(3))
    assert dl.LLM(path).speculative_tokens == 0
    with pytest.raises(dl.InputError, match="has no Multi-Token Prediction layer"):
        dl.LLM(path, speculative_tokens=1)


# The command line


def command(monkeypatch, capsys, *words):
    """Exit code, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["deepseek-lit", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code, *capsys.readouterr()


def test_the_command_writes_the_same_and_says_what_guesses_were_worth(monkeypatch, capsys):
    words = ["generate", "--prompt", TEXTS[0], "--max-tokens", "20", "--seed", "3", "--dtype", "float32", "--dequantize"]
    plain = command(monkeypatch, capsys, *words)
    fast = command(monkeypatch, capsys, *words, "--speculative-tokens", "2")
    assert plain[0] == fast[0] == 0 and plain[1] == fast[1] and "guesses" not in plain[2]
    right, drafted, per_step = re.search(r"(\d+) of (\d+) guesses right, (\d\.\d\d) tokens a step", fast[2]).groups()
    assert int(right) <= int(drafted) and float(per_step) >= 1


def test_a_file_of_prompts_with_guesses(small, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in ([1, 2], [3], [4, 5, 6])))
    words = ["generate", "--model", str(small), "--prompts", str(tmp_path / "prompts.jsonl"), "--temperature", "0", "--max-tokens", "9", "--batch", "2"]
    plain, fast = (command(monkeypatch, capsys, *words, "--speculative-tokens", guesses) for guesses in "03")
    assert plain[:2] == fast[:2] and len(fast[1].splitlines()) == 3
    assert "wrote 27 tokens for 3 prompts" in fast[2] and "guesses right" in fast[2] and "guesses" not in plain[2]


@pytest.mark.parametrize(("guesses", "sentence"), [("9", "speculative_tokens is 9, expected a whole number from 0 (off) to 3"), ("-1", "speculative_tokens is -1")])
def test_the_command_refuses_what_cannot_be(guesses, sentence, monkeypatch, capsys):
    code, _, said = command(monkeypatch, capsys, "generate", "--prompt", "x", "--speculative-tokens", guesses)
    assert code == 2 and sentence in said and said.count("\n") == 1
