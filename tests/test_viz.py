"""What is recorded is what the model did, whatever its weights are stored in; and the pictures of it."""

import dataclasses
import sys
import warnings

import matplotlib.pyplot as plt
import pytest
import torch
from models import random_config, random_model, write_checkpoint
from transformers import DeepseekV3ForCausalLM
from transformers.utils import logging

from deepseek_lit import viz
from deepseek_lit.checkpoint import load_model
from deepseek_lit.config import InputError, ModelConfig, tiny_config
from deepseek_lit.gate import Gate, choose_experts
from deepseek_lit.generate import LLM
from deepseek_lit.mla import MLA, LatentCache
from deepseek_lit.model import Layer

logging.disable_progress_bar()
TOKENS = 24
STORED = {  # how the weights lie on disk and in memory, and how well attention can be rebuilt
    "fp32": (False, dict(dtype=torch.float32), 1e-4),
    "bf16": (False, dict(dtype=torch.bfloat16), 3e-2),
    "fp8": (True, dict(dtype=torch.bfloat16), 3e-2),
    "fp8 in fp32": (True, dict(dtype=torch.float32), 1e-4),
    "dequantized": (True, dict(dtype=torch.float32, dequantize=True), 1e-4),
}


def random_ids(config: ModelConfig, length: int = TOKENS) -> list[int]:
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def small_model(**fields):
    return random_model(random_config(3, **fields))


def hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def spy(model, kind: type) -> tuple[dict, list]:
    """What modules of one kind take and give while they run, under their names, and the hooks that see it."""
    seen = {}
    handles = [m.register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: (inputs, output)})) for name, m in model.named_modules() if isinstance(m, kind)]
    return seen, handles


def rebuilt(attention: MLA, inputs: tuple, maps_HST: torch.Tensor) -> torch.Tensor:
    """The output of an attention module from its probabilities, with keys never built and values built plainly."""
    x_BSD, _, rope, cache, extent = inputs
    c_kv_BTC = attention.latents(x_BSD, rope)[0] if cache is None else cache.read(attention.layer, extent)[0]
    w_uv_HVC = attention.key_value_weights(torch.float32)[1]
    v_HTV = torch.einsum("hvc,tc->htv", w_uv_HVC, c_kv_BTC[0].float())
    return (maps_HST @ v_HTV).transpose(0, 1).flatten(1) @ attention.o_proj.plain_weight(torch.float32).mT


@pytest.mark.parametrize("cached", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("stored", STORED)
@torch.no_grad()
def test_a_recording_is_what_happened(stored, cached, tmp_path):
    fp8, options, tolerance = STORED[stored]
    model = load_model(write_checkpoint(tmp_path, random_config(5, hidden_size=96), fp8), **options)
    ids, caches = random_ids(model.config), [LatentCache(model.config, 1, 32, dtype=options["dtype"]) if cached else None for _ in range(2)]
    expected = model.model(torch.tensor([ids]), cache=caches[0])
    (gates, g), (attentions, a), (whole, w) = spy(model, Gate), spy(model, MLA), spy(model, type(model.model))
    recording = viz.record(model, ids, cache=caches[1])
    for handle in g + a + w:
        handle.remove()
    assert torch.equal(whole["model"][1], expected)  # the watched forward is the forward
    assert list(recording.routing) == [1, 2] and list(recording.attention) == [0, 1, 2]
    for layer, routing in recording.routing.items():
        weights, experts = gates[f"model.layers.{layer}.mlp.gate"][1]
        assert torch.equal(routing.experts, experts) and torch.equal(routing.weights, weights)
        again = choose_experts(routing.scores, routing.bias, model.config)
        assert torch.equal(again.sort(-1).values, experts.sort(-1).values)
        assert (routing.kept | ~routing.chosen).all() and (routing.chosen.sum(-1) == model.config.num_experts_per_tok).all()
    for layer, maps_HST in recording.attention.items():
        inputs, output = attentions[f"model.layers.{layer}.self_attn"]
        assert maps_HST.shape == (model.config.num_attention_heads, TOKENS, TOKENS) and maps_HST.dtype == torch.float32
        assert not maps_HST.triu(1).any() and (maps_HST.sum(-1) - 1).abs().max() < 1e-5
        difference = (rebuilt(model.model.layers[layer].self_attn, inputs, maps_HST) - output[0].float()).norm() / output.float().norm()
        assert difference < tolerance


@pytest.mark.parametrize("fields", [dict(), dict(q_lora_rank=None), dict(rope_scaling=None, num_attention_heads=1), dict(n_group=1, topk_group=1)])
def test_attention_equals_transformers(fields, tmp_path):
    path = write_checkpoint(tmp_path, random_config(7, **fields))
    model = load_model(path, dtype=torch.float32)
    peer = DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()
    ids = random_ids(model.config)
    with torch.no_grad():
        peer_maps = peer(torch.tensor([ids]), output_attentions=True).attentions
    for layer, maps_HST in viz.record(model, ids).attention.items():
        torch.testing.assert_close(maps_HST, peer_maps[layer][0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("start", [1, 10, TOKENS - 1])
def test_the_end_of_a_text_behind_a_cache(start):
    model = small_model()
    ids, cache = random_ids(model.config), LatentCache(model.config, 1, 40)
    whole = viz.record(model, torch.tensor([ids]))
    with torch.no_grad():
        model(torch.tensor([ids[:start]]), cache=cache)
    end = viz.record(model, ids, cache=cache, start=start)
    assert end.start == start and end.ids == whole.ids == tuple(ids)
    for layer, maps_HST in end.attention.items():
        torch.testing.assert_close(maps_HST, whole.attention[layer][:, start:], atol=1e-5, rtol=1e-4)
    for layer, routing in end.routing.items():
        torch.testing.assert_close(routing.scores, whole.routing[layer].scores[start:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layers, heads", [(None, None), ([2], [1]), ([2, 0], [3, 0]), ([0], ()), ((), None), (range(1, 3), range(2))])
def test_only_what_was_asked_for_is_kept(layers, heads):
    model = small_model(num_attention_heads=4)
    c, ids = model.config, random_ids(model.config)
    recording, whole = viz.record(model, ids, layers, heads), viz.record(model, ids)
    asked, chosen = range(3) if layers is None else layers, tuple(range(4) if heads is None else heads)
    assert set(recording.attention) == (set(asked) if chosen else set()) and set(recording.routing) == {i for i in asked if i > 0}
    assert all(torch.equal(maps, whole.attention[layer][list(chosen)]) for layer, maps in recording.attention.items())
    assert recording.nbytes == viz.recording_bytes(c, TOKENS, TOKENS, asked, len(chosen))


def test_bytes_of_the_release():
    release = ModelConfig()
    assert viz.recording_bytes(release, 1, 1, range(61), 0) == 58 * (256 * 4 + 8 * 12 + 256 * 4)
    assert viz.recording_bytes(release, 4096, 4096, [0], 128) == 128 * 4096 * 4096 * 4


REFUSED = {
    "layer 3 was asked for, expected 0 to 2": dict(layers=[0, 3]),
    "head -1 was asked for": dict(heads=[-1]),
    "expected the token ids of one text": dict(ids=[[1, 2], [3, 4]]),
    "str that holds more than numbers": dict(ids="def"),
    "type torch.float32": dict(ids=[0.5]),
    "at most 256": dict(ids=[1] * 257),
    "outside 0 …": dict(ids=[1, 100_000]),
    "at least one": dict(ids=torch.zeros(1, 0, dtype=torch.int64)),
    "a cache of batch 1": dict(start=2),
    "with at least 24 slots": dict(cache=8),
    "more than max_bytes (1,000)": dict(max_bytes=1000),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused_before_the_model_runs(message):
    model, request = small_model(), dict(REFUSED[message])
    if "cache" in request:
        request["cache"] = LatentCache(model.config, 1, request["cache"])
    _, handles = spy(model, Layer)
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    before = hooks(model)
    with pytest.raises(InputError, match=message.replace("(", r"\(").replace(")", r"\)")):
        viz.record(model, request.pop("ids", random_ids(model.config)), **request)
    assert hooks(model) == before


def test_hooks_are_gone_also_when_the_forward_raises():
    model = small_model()
    viz.record(model, random_ids(model.config))
    assert hooks(model) == 0
    fuse = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        viz.record(model, random_ids(model.config))
    fuse.remove()
    assert hooks(model) == 0


def test_a_layer_behind_the_last_is_left_alone():
    model = small_model()
    expected = viz.record(model, random_ids(model.config))
    model.model.layers.append(Layer(model.config, model.config.num_hidden_layers))  # uninitialised: whoever runs it gets nonsense
    recording = viz.record(model, random_ids(model.config))
    assert list(recording.attention) == [0, 1, 2]
    assert all(torch.equal(recording.attention[i], expected.attention[i]) for i in recording.attention)


def test_a_recording_does_not_change_when_the_model_learns():
    model = small_model().requires_grad_(True)
    recording = viz.record(model, random_ids(model.config))
    kept = [tensor.clone() for r in recording.routing.values() for tensor in (r.bias, r.scores)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(map(torch.equal, kept, [tensor for r in recording.routing.values() for tensor in (r.bias, r.scores)]))
    assert not any(tensor.requires_grad for tensor in (*kept, *recording.attention.values()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nothing_stays_on_the_gpu():
    model = small_model().to("cuda", torch.bfloat16)
    recording = viz.record(model, random_ids(model.config))
    tensors = [tensor for r in recording.routing.values() for tensor in (r.scores, r.bias, r.experts, r.weights)] + list(recording.attention.values())
    assert all(tensor.device.type == "cpu" for tensor in tensors)


def test_choice_without_the_bias_is_that_of_a_gate_without_one():
    model = small_model()
    routing = viz.record(model, random_ids(model.config)).routing[1]
    gate = Gate(model.config).requires_grad_(False)
    experts = choose_experts(routing.scores, gate.e_score_correction_bias, model.config)
    assert all(set(row.nonzero().flatten().tolist()) == set(ids) for row, ids in zip(routing.chosen_without_bias, experts.tolist()))
    assert (routing.chosen_without_bias != routing.chosen).any()  # else the test would see nothing
    counts = [sum(e in row for row in routing.experts.tolist()) for e in range(8)]
    assert viz.relative_load(routing.chosen).tolist() == pytest.approx([8 * n / sum(counts) for n in counts])


# Pictures


def wide_recording(start: int = 0) -> viz.Recording:
    """Routers and heads of the release's shape, without a model: 256 experts in 8 groups."""
    config, generator = ModelConfig(), torch.Generator().manual_seed(3)
    scores = torch.randn(40 - start, 256, generator=generator).mul(1.5).sigmoid()
    bias = 3 + 0.05 * torch.randn(256, generator=generator)
    experts = choose_experts(scores, bias, config)
    weights = scores.gather(1, experts)
    routing = viz.Routing(config, scores, bias, experts, 2.5 * weights / weights.sum(-1, keepdim=True))
    maps = torch.randn(3, 40, 40, generator=generator).masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf")).softmax(-1)[:, start:]
    return viz.Recording(config, tuple(range(1000, 1040)), start, (0, 64, 127), {3: routing, 60: routing}, {3: maps, 60: maps})


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(dtype=torch.float32)


@pytest.fixture(scope="module")
def bundled(llm) -> viz.Recording:
    return viz.record(llm.model, llm.tokenizer.encode("def f(x):\n\tif x > 0:\n        return '$x$ costs $5'\n\n\n    raise é漢\n" * 2))


def words(figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in (*ax.texts, *ax.get_xticklabels(), *ax.get_yticklabels(), ax.title)]


@pytest.mark.parametrize("start", [0, 11, 39])
def test_all_pictures_at_the_release_s_size(start):
    recording = wide_recording(start)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        figures = [
            viz.plot_load(recording), viz.plot_load({"a": recording, "b": recording}, [60]), viz.plot_routing(recording, 3), viz.plot_routing(recording, 60, tokens=[39]),
            viz.plot_choice(recording, 3, 39), viz.plot_heads(recording), viz.plot_heads(recording, pixels=8), viz.plot_attention(recording, 60, 127), viz.plot_gaze(recording, 3, 64, start),
        ]  # fmt: skip
        for figure in figures:
            figure.canvas.draw()
    assert plt.get_fignums() == []  # none of them is pyplot's to keep


@pytest.mark.filterwarnings("ignore:Glyph:UserWarning")
def test_tokens_keep_their_letters(llm, bundled):
    figure = viz.plot_gaze(bundled, 1, 0, len(bundled.ids) - 1, llm.tokenizer)
    figure.canvas.draw()  # dollars are no mathematics, tabs and half characters no trouble
    shown = "".join(words(figure))
    assert "⇥" in shown and "⏎" in shown and "'" in shown and "BOS" in "".join(viz.token_labels(bundled.ids, llm.tokenizer))
    assert viz.token_labels([5, 7], None) == ["5", "7"]


def test_load_is_drawn_as_it_is(bundled):
    image = viz.plot_load({"x": bundled, "y": bundled}, [2]).axes[0].images[0].get_array()
    expected = viz.relative_load(bundled.routing[2].chosen).log2().clamp(-2, 2)
    assert image.shape == (2, 16) and torch.allclose(torch.tensor(image.data), expected.expand(2, 16))


def test_one_choice_names_experts_weights_and_groups(llm, bundled):
    routing, token = bundled.routing[2], 9
    figure = viz.plot_choice(bundled, 2, token, llm.tokenizer)
    shown = words(figure) + [ax.get_title(loc="left") for ax in figure.axes]
    assert f"Layer 2, token {token} asks experts {', '.join(map(str, sorted(routing.experts[token].tolist())))}" in shown
    assert all(f"{weight:.2f}" in shown for weight in routing.weights[token].tolist())
    assert sum(text.startswith("kept") for text in shown) == 2 and sum(text.startswith("out") for text in shown) == 2


def test_gaze_lists_the_strongest(llm, bundled):
    figure = viz.plot_gaze(bundled, 3, 2, 20, llm.tokenizer)
    best = figure.axes[2]
    expected = bundled.attention[3][2, 20].topk(5)
    assert [bar.get_width() for bar in best.patches] == pytest.approx(expected.values.tolist())
    assert [label.get_text().split()[-1] for label in best.get_yticklabels()] == [str(t) for t in expected.indices.tolist()]


@pytest.mark.parametrize("call, message", [
    (lambda r: viz.plot_routing(r, 0), "the router of layer 0 is not in the recording, which has 3, 60"),
    (lambda r: viz.plot_attention(r, 4, 0), "the attention of layer 4 is not in the recording, which has 3, 60"),
    (lambda r: viz.plot_gaze(r, 3, 1, 20), "head 1 is not in the recording, which has 0, 64, 127"),
    (lambda r: viz.plot_choice(r, 3, 2), "token 2 was asked for, expected 5 to 39"),
    (lambda r: viz.plot_heads(dataclasses.replace(r, attention={})), "no head is in the recording"),
    (lambda r: viz.attention_explorer(dataclasses.replace(r, attention={}, heads=())), "at least one layer and one head"),
    (lambda r: viz.router_explorer({"a": r, "b": dataclasses.replace(r, routing={})}), "recordings of the same layers"),
])  # fmt: skip
def test_pictures_say_what_is_missing(call, message):
    with pytest.raises(InputError, match=message):
        call(wide_recording(5))


@pytest.mark.parametrize("columns", [10, 72])
def test_text_is_laid_out_whole(columns):
    texts = ["BOS ", "def", " f", "(x):⏎", "    ", "a" * 33, "⏎⏎    ", "漢字", "⏎"]
    placed = viz.lay_out(texts, columns)
    assert ["".join(piece for t, *_, piece in placed if t == token) for token in range(len(texts))] == texts
    taken = [(line, column + i) for _, line, column, piece in placed for i in range(viz.cells(piece))]
    assert len(taken) == len(set(taken)) and max(column for _, column in taken) < columns
    assert taken == sorted(taken)


# Instruments


@pytest.mark.parametrize("make, controls", [(viz.router_explorer, 1), (viz.attention_explorer, 2)])
def test_an_explorer_follows_its_controls(make, controls, llm, bundled):
    end = viz.record(llm.model, llm.tokenizer.encode("1 + 2 = 3\n"))
    box = make({"long": bundled, "short": end}, llm.tokenizer)
    text, (*numbers,), token, picture = box.children[0], box.children[1].children, box.children[2], box.children[3]
    assert len(numbers) == controls and token.max == len(bundled.ids) - 1
    pictures = [bytes(picture.value)]
    for control, value in ((token, 20), *((number, number.options[-1]) for number in numbers), (text, "short"), (token, 1)):
        control.value = value
        pictures.append(bytes(picture.value))
    assert len(set(pictures)) == len(pictures) and all(png.startswith(b"\x89PNG") for png in pictures)
    assert token.max == len(end.ids) - 1


def test_an_explorer_of_one_recording_that_begins_behind_a_cache():
    box = viz.attention_explorer(wide_recording(30))
    assert (box.children[2].min, box.children[2].max) == (30, 39) and box.children[0].layout.display == "none"
    before = bytes(box.children[3].value)
    box.children[2].value = 30
    assert bytes(box.children[3].value) != before


# Dependencies


@pytest.mark.parametrize("missing, call", [("matplotlib", viz.plot_load), ("ipywidgets", viz.router_explorer)])
def test_what_to_install_is_said_in_one_sentence(missing, call, monkeypatch):
    for name in [missing, *(name for name in sys.modules if name.startswith(f"{missing}."))]:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    one = viz.Routing(tiny_config(), torch.rand(1, 16), torch.zeros(16), torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4))
    with pytest.raises(ImportError) as error:
        call(viz.Recording(tiny_config(), (1,), 0, (), {1: one}, {}))
    assert str(error.value) == f"deepseek_lit.viz needs {missing} for this, which is not installed: pip install 'deepseek-lit[book]'"
