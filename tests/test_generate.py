"""Sampling against transformers' logits processors; batches, seeds, streaming and stops against the plain forward pass."""

import dataclasses
import json
import random
import shutil

import pytest
import torch
from models import random_config, write_checkpoint
from tolerances import LOGITS

import deepseek_lit as dl
from deepseek_lit import generate
from deepseek_lit.generate import ReplyText, Request, keep_likely, penalize_repetition, sample, top_logprobs

GREEDY = dl.SamplingParams(max_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def bundled():
    return dl.LLM(dtype=torch.float32, dequantize=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model of token ids only, without an end-of-sentence token."""
    config = random_config(3, vocab_size=97, hidden_size=72, max_position_embeddings=64, eos_token_id=None)
    return write_checkpoint(tmp_path_factory.mktemp("ids") / "model", config)


@pytest.fixture(scope="module")
def ids_only(directory):
    return dl.LLM(directory)


def random_logits(seed: int, vocab: int = 997, sharpness: float = 3.0) -> torch.Tensor:
    return sharpness * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))


def facts(out: dl.RequestOutput) -> tuple:
    return out.token_ids, out.text, out.finish_reason


# Sampling filters


def transformers_probabilities(logits_W: torch.Tensor, params: dl.SamplingParams) -> torch.Tensor:
    processors = pytest.importorskip("transformers.generation.logits_process")
    scores = logits_W[None]
    if params.temperature != 1:
        scores = processors.TemperatureLogitsWarper(float(params.temperature))(None, scores)
    if params.top_k:
        scores = processors.TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = processors.TopPLogitsWarper(params.top_p)(None, scores)
    if params.min_p:
        scores = processors.MinPLogitsWarper(params.min_p)(None, scores)
    return scores[0].softmax(-1)


KNOBS = [
    {}, {"top_k": 1}, {"top_k": 40}, {"top_k": 10_000}, {"top_p": 0.9}, {"top_p": 0.3}, {"top_p": 1e-9}, {"top_p": 0.9999}, {"min_p": 0.05}, {"min_p": 1.0},
    {"top_k": 30, "top_p": 0.6}, {"top_k": 50, "min_p": 0.2}, {"top_p": 0.8, "min_p": 0.1}, {"top_k": 25, "top_p": 0.7, "min_p": 0.3}, {"top_k": 25, "top_p": 0.7, "temperature": 0.6},
    {"top_p": 0.95, "temperature": 1.7},
]  # fmt: skip


@pytest.mark.parametrize("knobs", KNOBS, ids=str)
@pytest.mark.parametrize("sharpness", [0.3, 2.0, 8.0])
def test_filters_keep_what_transformers_keeps(knobs, sharpness):
    params = dl.SamplingParams(**knobs)
    for seed in range(4):
        logits_W = random_logits(seed, sharpness=sharpness)
        wanted_W = transformers_probabilities(logits_W, params)
        ours_W = keep_likely((logits_W / params.temperature).softmax(-1), params)
        assert torch.equal(ours_W > 0, wanted_W > 0)
        torch.testing.assert_close(ours_W, wanted_W, atol=1e-6, rtol=0)


@pytest.mark.parametrize("knobs", [{"top_k": 2}, {"top_k": 4}, {"min_p": 1.0}, {"min_p": 0.5}, {"top_k": 2, "min_p": 1.0}], ids=str)
def test_ties_are_kept_like_transformers_keeps_them(knobs):
    logits_W = torch.tensor([0.25, 0.125, 0.25, 0.25, 0.125]).log()
    params = dl.SamplingParams(**knobs)
    assert torch.equal(keep_likely(logits_W.softmax(-1), params) > 0, transformers_probabilities(logits_W, params) > 0)


@pytest.mark.parametrize("top_p", [0.1, 0.25, 0.26, 0.5, 0.75, 0.76, 1.0])
def test_top_p_among_equals_keeps_as_many_as_transformers(top_p):
    params, logits_W = dl.SamplingParams(top_p=top_p), torch.zeros(4)
    assert (keep_likely(logits_W.softmax(-1), params) > 0).sum() == (transformers_probabilities(logits_W, params) > 0).sum()


@pytest.mark.parametrize("vocab", [1, 2, 129280])
@pytest.mark.parametrize("top_p", [1e-12, 0.5, 1 - 1e-9])
def test_top_p_never_keeps_nothing(vocab, top_p):
    for p_W in (torch.full((vocab,), 1 / vocab), torch.nn.functional.one_hot(torch.tensor(vocab - 1), vocab).float()):
        kept_W = keep_likely(p_W, dl.SamplingParams(top_p=top_p))
        assert (kept_W > 0).any() and kept_W.sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("penalty", [0.7, 1.1, 2.0])
def test_repetition_penalty_equals_transformers(penalty):
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits_W, seen = random_logits(0), [5, 9, 5, 900, 0]
    seen_W = torch.zeros(len(logits_W), dtype=torch.bool)
    seen_W[seen] = True
    wanted = processors.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits_W[None].clone())[0]
    torch.testing.assert_close(penalize_repetition(logits_W, seen_W, penalty), wanted, atol=1e-6, rtol=0)


def test_sample_draws_in_proportion():
    logits_W, dice = torch.tensor([0.5, 0.25, 0.125, 0.125]).log(), torch.Generator().manual_seed(0)
    draws = torch.tensor([sample(logits_W, dl.SamplingParams(top_k=2), None, dice) for _ in range(4000)]).bincount(minlength=4)
    assert (draws / 4000 - torch.tensor([2 / 3, 1 / 3, 0, 0])).abs().max() < 0.03


@pytest.mark.parametrize("temperature", [1e-5, 1e5])
def test_extreme_temperatures_are_finite(temperature):
    logits_W, dice = random_logits(1, sharpness=30), torch.Generator().manual_seed(0)
    token = sample(logits_W, dl.SamplingParams(temperature=temperature, top_p=0.5), None, dice)
    assert temperature > 1 or token == logits_W.argmax()


BAD_PARAMS = [
    {"max_tokens": 0}, {"max_tokens": None}, {"max_tokens": 2.5}, {"max_tokens": "3"}, {"temperature": -1}, {"temperature": float("nan")}, {"temperature": None},
    {"temperature": float("inf")}, {"temperature": 1e-9}, {"top_p": 0}, {"top_p": 1.1}, {"top_p": "0.9"}, {"top_k": -1}, {"top_k": 0.5}, {"min_p": -0.1}, {"min_p": 2},
    {"repetition_penalty": 0}, {"repetition_penalty": float("nan")}, {"stop": ""}, {"stop": ["a", ""]}, {"stop": [3]}, {"stop_token_ids": ["a"]}, {"stop_token_ids": [-1]},
    {"seed": -1}, {"seed": 2**70}, {"seed": 0.5}, {"logprobs": -1}, {"logprobs": 1.5},
]  # fmt: skip


@pytest.mark.parametrize("knobs", BAD_PARAMS, ids=str)
def test_bad_sampling_params(knobs):
    with pytest.raises(dl.InputError, match=f"^{next(iter(knobs))} is .*expected"):
        dl.SamplingParams(**knobs)


def test_one_stop_or_a_list_mean_the_same():
    assert dl.SamplingParams(stop="a", stop_token_ids=3) == dl.SamplingParams(stop=["a"], stop_token_ids=[3])


# Batches


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("fp8", [False, True])
def test_batch_equals_one_at_a_time_equals_plain_forward(tmp_path, seed, fp8):
    path = write_checkpoint(tmp_path / "model", random_config(seed, eos_token_id=None), fp8=fp8, seed=seed)
    draw = random.Random(seed)
    llm = dl.LLM(path, max_batch=4, prefill_chunk=draw.choice([1, 3, 7]))
    vocab = llm.model.config.vocab_size
    prompts = [[draw.randrange(vocab) for _ in range(n)] for n in (1, 9, 4, 17, 2, 30)]
    params = [dataclasses.replace(GREEDY, max_tokens=n) for n in (12, 3, 7, 1, 9, 5)]
    together = [facts(out) for out in llm.generate(prompts, params)]
    assert together == [facts(llm.generate([p], s)[0]) for p, s in zip(prompts, params)]
    for prompt, (tokens, _, _) in zip(prompts, together):
        logits_SW = llm.model(torch.tensor([prompt + tokens]))[0, len(prompt) - 1 : -1]
        assert logits_SW.argmax(-1).tolist() == tokens


def test_batch_equals_one_at_a_time_on_the_bundled_checkpoint(bundled):
    prompts = ["def ", "import os\nimport ", "class Reader(object):\n    def __init__(self", "x"]
    params = [GREEDY, dl.SamplingParams(max_tokens=8, seed=5), dl.SamplingParams(max_tokens=5, seed=5, repetition_penalty=1.3, min_p=0.02), GREEDY]
    assert [facts(out) for out in bundled.generate(prompts, params)] == [facts(bundled.generate(p, s)[0]) for p, s in zip(prompts, params)]


def test_padding_does_not_reach_the_logits(ids_only):
    model, prompts = ids_only.model, [[3, 4], [5] * 11, [7, 8, 9, 10, 11]]

    def last_logits(rows, chunk):
        return generate.prefill(model, rows, dl.LatentCache(model.config, len(rows), 16), chunk)

    alone = torch.cat([last_logits([prompt], 512) for prompt in prompts])
    for chunk in (1, 2, 5, 11, 512):
        assert (last_logits(prompts, chunk) - alone).abs().max() < LOGITS


def test_same_seed_same_text_wherever_it_stands(ids_only):
    params = dl.SamplingParams(max_tokens=10, seed=11)
    alone = ids_only.generate([[1, 2, 3]], params)[0].token_ids
    assert ids_only.generate([[9] * 5, [1, 2, 3], [4]], params)[1].token_ids == alone
    assert ids_only.generate([[1, 2, 3]], dl.SamplingParams(max_tokens=10, seed=12))[0].token_ids != alone


# Ends


def test_reply_ends_with_the_context(ids_only):
    room = ids_only.model.config.max_position_embeddings - 60
    [out] = ids_only.generate([[1] * 60], dl.SamplingParams(max_tokens=10**6, temperature=0))
    assert len(out.token_ids) == room and out.finish_reason == "length"


def test_stop_ids_end_a_reply(ids_only):
    [free] = ids_only.generate([[1, 2]], dl.SamplingParams(max_tokens=6, seed=3))
    end = free.token_ids[3]
    [out] = ids_only.generate([[1, 2]], dl.SamplingParams(max_tokens=6, seed=3, stop_token_ids=[end]))
    assert out.token_ids == free.token_ids[: free.token_ids.index(end) + 1] and out.finish_reason == "stop" and out.text is None


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_eos_ends_a_reply_unless_ignored(directory, ids_only, tmp_path, where):
    [free] = ids_only.generate([[1, 2]], GREEDY)
    copy = shutil.copytree(directory, tmp_path / "model")
    fields = json.loads((copy / where).read_text()) if (copy / where).exists() else {}
    (copy / where).write_text(json.dumps({**fields, "eos_token_id": [96, free.token_ids[1]]}))
    llm = dl.LLM(copy)
    [out] = llm.generate([[1, 2]], GREEDY)
    assert out.finish_reason == "stop" and out.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[1]) + 1]
    assert llm.generate([[1, 2]], dataclasses.replace(GREEDY, ignore_eos=True))[0].token_ids == free.token_ids


@pytest.mark.parametrize("stop", [("lo wor",), ("world", "o w"), ("xx", "d"), ("zz",), ("hello world!!",)])
@pytest.mark.parametrize("seed", range(4))
def test_stop_texts_in_any_pieces(stop, seed):
    whole, draw, reply, shown = "hello world, hello moon", random.Random(seed), ReplyText(stop), ""
    while whole and not reply.ended:
        n = draw.randint(1, 6)
        reply.add(whole[:n])
        whole = whole[n:]
        assert reply.settled().startswith(shown)
        shown = reply.settled()
    text = "hello world, hello moon"
    assert reply.text == text[: min((text.find(s) for s in stop if s in text), default=len(text))]


def play(llm, tokens: list[int], **knobs) -> tuple[list[str], dl.RequestOutput]:
    """Feed a request logits that leave no choice but `tokens`."""
    config = llm.model.config
    params = dl.SamplingParams(temperature=0, **{"max_tokens": len(tokens), **knobs})
    request = Request([5], params, llm.eos, llm.tokenizer, 10**6, config.vocab_size)
    shown = []
    for token in tokens:
        shown.append(request.advance(torch.nn.functional.one_hot(torch.tensor(token), config.vocab_size).float()))
        if request.output.finish_reason:
            break
    return shown, request.output


def test_streamed_text_is_the_decoded_text_even_of_broken_bytes(bundled):
    draw = random.Random(0)
    for _ in range(150):
        tokens = [draw.choice([draw.randrange(5, bundled.model.config.vocab_size), draw.randrange(5, 260)]) for _ in range(draw.randint(1, 9))]
        shown, out = play(bundled, tokens)
        assert "".join(shown) == out.text == bundled.tokenizer.decode(tokens)


def test_held_text_comes_when_the_reply_ends(bundled):
    tokens = bundled.tokenizer.encode("so it goes\n")[1:]
    shown, out = play(bundled, tokens, stop="goes\nUser")
    assert "".join(shown) == out.text == "so it goes\n" and out.finish_reason == "length"
    shown, out = play(bundled, [*tokens, 1], stop="goes\nUser", max_tokens=99)
    assert "".join(shown) == out.text == "so it goes\n" and out.finish_reason == "stop"


def test_stop_text_wins_over_the_last_token(bundled):
    tokens = bundled.tokenizer.encode("one two")[1:]
    shown, out = play(bundled, tokens, stop="two")
    assert "".join(shown) == out.text == "one " and out.finish_reason == "stop"


# The rest of LLM


def test_logprobs_are_the_models(ids_only):
    [out] = ids_only.generate([[1, 2, 3]], dl.SamplingParams(max_tokens=5, seed=1, top_k=3, temperature=0.5, logprobs=4))
    logprobs_SW = ids_only.model(torch.tensor([[1, 2, 3, *out.token_ids]]))[0, 2:-1].log_softmax(-1)
    assert len(out.logprobs) == 5
    for step, token, logprobs_W in zip(out.logprobs, out.token_ids, logprobs_SW):
        assert token in step and 4 <= len(step) <= 5 and set(logprobs_W.topk(4).indices.tolist()) <= step.keys()
        assert all(value == pytest.approx(float(logprobs_W[t]), abs=1e-4) for t, value in step.items())


def test_logprobs_of_few_and_of_too_many():
    logits_W = random_logits(0, vocab=7)
    assert list(top_logprobs(logits_W, 3, 0)) == [3] and len(top_logprobs(logits_W, 3, 100)) == 7


@pytest.mark.parametrize("trouble", [ValueError, KeyboardInterrupt])
def test_trouble_in_the_callback_leaves_the_model_usable(bundled, trouble):
    before = facts(bundled.generate("def ", GREEDY)[0])

    def fail(index, text):
        raise trouble

    with pytest.raises(trouble):
        bundled.generate(["def ", "import "], GREEDY, on_text=fail)
    assert facts(bundled.generate("def ", GREEDY)[0]) == before


def test_streaming_says_which_prompt(bundled):
    heard = {0: "", 1: ""}

    def hear(index, text):
        heard[index] += text

    outs = bundled.generate(["def ", "import os"], dl.SamplingParams(max_tokens=6, seed=1), on_text=hear)
    assert [heard[0], heard[1]] == [out.text for out in outs]


def test_no_prompts_no_replies(bundled):
    assert bundled.generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ([1, 2, 3], r"a single prompt of ids is \[\[1, 2, 3\]\]"),
        (None, "prompts must be"),
        (7, "prompts must be"),
        ("", "prompt 0 is empty"),
        (["a", ""], "prompt 1 is empty"),
        ([[]], "prompt 0 is empty"),
        ([[10**6]], "outside 0 … [0-9]+ .vocab_size"),
        ([[-1]], "outside 0"),
        ([[1.5]], "neither text nor"),
        ([None], "neither text nor"),
        ([[5] * 10_000], "prompt 0 has 10000 tokens, expected at most"),
        (["a\udcffb"], "not valid UTF-8"),
    ],
)
def test_bad_prompts(bundled, prompts, sentence):
    with pytest.raises(dl.InputError, match=sentence):
        bundled.generate(prompts, GREEDY)


@pytest.mark.parametrize("params", [[], [GREEDY, GREEDY], {"max_tokens": 3}, [None]], ids=str)
def test_bad_params(bundled, params):
    with pytest.raises(dl.InputError, match="params must be one SamplingParams"):
        bundled.generate("a", params)


def test_text_needs_a_tokenizer(ids_only):
    with pytest.raises(dl.InputError, match="no tokenizer.json"):
        ids_only.generate("hello")
    with pytest.raises(dl.InputError, match="stop texts need a tokenizer"):
        ids_only.generate([[1]], dl.SamplingParams(stop="x"))
    [out] = ids_only.generate([[1]], GREEDY)
    assert out.text is None and len(out.token_ids) == 8


@pytest.mark.parametrize("sizes", [{"max_batch": 0}, {"prefill_chunk": -1}, {"max_batch": 1.5}], ids=str)
def test_bad_batch_sizes(directory, sizes):
    with pytest.raises(dl.InputError, match="expected a whole number"):
        dl.LLM(directory, **sizes)


def test_a_cache_beyond_memory_is_one_sentence(ids_only, monkeypatch):
    def no_memory(*arguments):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(generate, "LatentCache", no_memory)
    with pytest.raises(dl.InputError, match=r"a cache of 1 prompts × 9 tokens needs .* GB"):
        ids_only.generate([[1]], GREEDY)
