"""The commands as a user meets them: output, streams, interrupts, and one sentence for everything that can be wrong."""

import io
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from models import random_config, write_checkpoint
from safetensors.torch import load_file, save_file

from deepseek_lit import LLM, cli, generate
from deepseek_lit.checkpoint import inspect_checkpoint, resolve
from deepseek_lit.tokenizer import Tokenizer

COMMAND = [sys.executable, "-c", "from deepseek_lit.cli import main; main()"]
SHORT = ["--max-tokens", "4", "--seed", "1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def master(tmp_path_factory) -> Path:
    """A small FP8 checkpoint in several shards with the bundled tokenizer, which never ends a reply by itself."""
    config = random_config(1, vocab_size=4096, hidden_size=45, max_position_embeddings=4096, eos_token_id=None)
    path = write_checkpoint(tmp_path_factory.mktemp("cli") / "master", config, fp8=True, shards=3)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve(None) / name, path / name)
    return path


@pytest.fixture
def model(master, tmp_path) -> Path:
    """A copy of the checkpoint to do harm to."""
    return Path(shutil.copytree(master, tmp_path / "model"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command in this process: exit code, stdout, stderr."""

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["deepseek-lit", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run


def type_lines(monkeypatch, *lines) -> None:
    """Let `input()` give these lines, raise those that are exceptions, and then end."""
    waiting = iter(lines)

    def typed(prompt: str = "") -> str:
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", typed)


# What goes right


def test_version_and_help(run):
    assert run("--version") == (0, f"deepseek-lit {version('deepseek-lit')}\n", "")
    code, out, _ = run("--help")
    assert code == 0 and "generate" in out and "chat" in out and "--debug" in out
    assert run()[1] == out
    for command, words in {"inspect": ["path", "--json"], "cast": ["path", "out", "--to", "--verify"]}.items():
        code, out, _ = run(command, "--help")
        assert code == 0 and all(word in out.lower() for word in words)
    for command in ("generate", "chat"):
        code, out, _ = run(command, "--help")
        names = ("--model", "--device", "--dtype", "--dequantize", "--max-tokens", "--temperature", "--top-p", "--top-k", "--min-p", "--repetition-penalty", "--seed", "--stop")
        assert code == 0 and all(name in out for name in names)


def test_generate_prints_prompt_and_reply(run, master):
    code, out, err = run("generate", "-m", master, "--prompt", "def ", *SHORT)
    assert code == 0 and out.startswith("def ") and out.endswith("\n") and len(out) > 5
    assert err.count("\n") == 1 and err.count("tokens/s") == 2 and "wrote 4 tokens" in err
    assert run("generate", "-m", master, "--prompt", "def ", *SHORT)[1] == out


def test_a_file_of_prompts_becomes_json_lines(run, master, tmp_path):
    prompts = [f"line {n}" for n in range(5)]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts) + "\n")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    code, out, err = run("generate", "-m", master, "--prompts", tmp_path / "prompts.txt", "--batch", 2, *SHORT)
    replies = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [reply["prompt"] for reply in replies] == prompts and err.count("\n") == 1
    assert all(set(reply) == {"prompt", "text", "token_ids", "finish_reason"} and len(reply["token_ids"]) == 4 for reply in replies)
    code, nothing, _ = run("generate", "-m", master, "--prompts", tmp_path / "prompts.jsonl", "-o", tmp_path / "out.jsonl", *SHORT)
    assert code == 0 and nothing == "" and (tmp_path / "out.jsonl").read_text() == out


def test_token_ids_need_no_tokenizer(run, model, tmp_path):
    (model / "tokenizer.json").unlink()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": [1, 2, 3]}\n')
    code, out, _ = run("generate", "-m", model, "--prompts", tmp_path / "prompts.jsonl", *SHORT)
    assert code == 0 and json.loads(out)["text"] is None and len(json.loads(out)["token_ids"]) == 4


def test_an_interrupt_keeps_finished_batches(run, master, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    finished, calls = LLM.generate, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return finished(self, *arguments)

    monkeypatch.setattr(LLM, "generate", interrupted)
    code, _, err = run("generate", "-m", master, "--prompts", tmp_path / "prompts.txt", "-o", tmp_path / "out.jsonl", "--batch", 1, *SHORT)
    assert code == 130 and "Traceback" not in err
    assert [json.loads(line)["prompt"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ["one", "two"]


# Chat


@pytest.fixture
def conversations(monkeypatch) -> list[list[str]]:
    """What the model was asked: the contents of the messages of every turn."""
    seen, render = [], Tokenizer.apply_chat_template

    def spy(self, messages, *rest):
        seen.append([message["content"] for message in messages])
        return render(self, messages, *rest)

    monkeypatch.setattr(Tokenizer, "apply_chat_template", spy)
    return seen


def test_chat_remembers_clears_and_exits(run, master, monkeypatch, conversations):
    type_lines(monkeypatch, "hello", "  ", "again", "/clear", "fresh", "/what", "/exit", "never")
    code, _, err = run("chat", "-m", master, *SHORT)
    assert code == 0
    first, second, third = conversations[1:]  # the one before is the check that there is a template
    assert first == ["hello"] and second[0] == "hello" and second[2] == "again" and second[1] and third == ["fresh"]
    assert "/what is no command" in err and err.count("tokens/s") == 6


def test_interrupt_stops_the_reply_and_not_the_session(run, master, monkeypatch, conversations):
    step, steps = generate.read_on, []

    def interrupted(*arguments):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(generate, "read_on", interrupted)
    type_lines(monkeypatch, "hello", KeyboardInterrupt(), "go on")
    code, out, err = run("chat", "-m", master, "--max-tokens", "6", "--seed", "1", "--dtype", "float32")
    assert code == 0 and "(stopped)" in err and "/exit ends the session" in out
    assert conversations[-1][0] == "hello" and conversations[-1][1] in out and conversations[-1][2] == "go on"


def test_a_turn_beyond_the_context_is_forgotten(run, master, monkeypatch, conversations):
    type_lines(monkeypatch, "word " * 5000, "hello")
    code, _, err = run("chat", "-m", master, *SHORT)
    assert code == 0 and "expected at most 4095" in err and "/clear" in err and "Traceback" not in err
    assert conversations[-1] == ["hello"]


# Checkpoints


def test_inspect_prints_a_table_and_json(run, master):
    code, out, err = run("inspect", master)
    assert code == 0 and err == "" and "F8_E4M3" in out and "routed experts" in out and "fits its config.json" in out
    code, out, err = run("inspect", master, "--json")
    report = json.loads(out)
    assert code == 0 and err == "" and report == inspect_checkpoint(master)
    code, out, _ = run("inspect")
    assert code == 0 and "in 1 shard," in out


def test_inspect_of_a_damaged_checkpoint(run, model):
    some_shard(model).unlink()
    code, out, err = run("inspect", model)
    assert code == 2 and "2 problems:" in out and err.count("\n") == 1 and "has 2 problems; the first: " in err and "does not exist" in err
    code, out, err = run("inspect", model, "--json")
    assert code == 2 and len(json.loads(out)["problems"]) == 2 and err.count("\n") == 1
    (model / "config.json").unlink()
    code, out, err = run("inspect", model)
    assert code == 2 and "config.json does not exist" in out and "routed experts" in out


def test_a_thousand_problems_are_not_printed(run, model):
    edit_json(model / "config.json", n_routed_experts=16)
    code, out, _ = run("inspect", model)
    assert code == 2 and " more, all in --json" in out and out.count("\n- ") == 21


def test_nothing_to_inspect(run, model, tmp_path):
    check_sentence(run("inspect", tmp_path / "nowhere"), "does not exist")
    check_sentence(run("inspect", "deepseek-ai/DeepSeek-V3"), "does not exist")
    check_sentence(run("inspect", some_shard(model)), "is a file")
    (model / "model.safetensors.index.json").write_text("[]")
    check_sentence(run("inspect", model), "is not an index")
    (tmp_path / "empty").mkdir()
    check_sentence(run("inspect", tmp_path / "empty"), "holds no *.safetensors")


def test_cast_there_and_back(run, master, tmp_path):
    code, out, err = run("cast", master, tmp_path / "wide", "--to", "bf16", "--verify")
    assert code == 0 and out == "" and err.count("\n") == 1 and "wrote " in err and "verified" in err
    reply = run("generate", "-m", tmp_path / "wide", "--prompt", "def ", *SHORT)[1]
    assert reply.startswith("def ")
    assert run("cast", tmp_path / "wide", tmp_path / "narrow", "--to", "fp8")[0] == 0
    assert run("inspect", tmp_path / "narrow")[0] == 0


def test_cast_refuses(run, master, tmp_path):
    check_sentence(run("cast", master, tmp_path / "out", "--to", "fp8"), "holds FP8 weights already")
    check_sentence(run("cast", master, tmp_path / "out", "--to", "int4"), "expected bf16 or fp8")
    check_sentence(run("cast", master, master, "--to", "bf16"), "is the checkpoint itself")
    check_sentence(run("cast", tmp_path / "nowhere", tmp_path / "out", "--to", "bf16"), "does not exist")
    check_sentence(run("cast", master, "/dev/null/out", "--to", "bf16"), "Not a directory")
    code, _, err = run("cast", master, tmp_path / "out")
    assert code == 2 and "--to" in err and "Traceback" not in err


def test_an_interrupted_cast_says_that_it_can_go_on(run, master, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "cast", interrupted)
    code, _, err = run("cast", master, tmp_path / "out", "--to", "bf16")
    assert code == 130 and err == "stopped; the same command goes on from here\n"


# In a shell of their own


def test_chat_through_a_pipe(master):
    done = subprocess.run([*COMMAND, "chat", "-m", master, *SHORT], input="hello\n/exit\n", capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0 and not done.stdout.startswith(">") and "\x1b" not in done.stdout and "tokens/s" in done.stderr


def test_a_reader_that_leaves_is_no_error(master, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\n" * 6)
    command = [*COMMAND, "generate", "-m", master, "--prompts", tmp_path / "prompts.txt", "--batch", "1", *SHORT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert json.loads(process.stdout.readline())["prompt"] == "a"
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


def read_until(terminal: int, wanted: str, seconds: float = 120) -> str:
    """Read from a pseudo-terminal until `wanted` has appeared."""
    seen, end = "", time.monotonic() + seconds
    while wanted not in seen:
        assert time.monotonic() < end and select.select([terminal], [], [], end - time.monotonic())[0], f"{wanted!r} never came after {seen!r}"
        seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


def test_chat_in_a_terminal_with_ctrl_c(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    terminal, inside = pty.openpty()
    own = "import os, signal; signal.signal(2, signal.default_int_handler); os.open(os.ttyname(0), os.O_RDWR)"  # a background job would ignore Ctrl-C; the first terminal that a session opens is the one that sends it Ctrl-C
    command = [sys.executable, "-c", f"{own}; from deepseek_lit.cli import main; main()", "chat", "-m", model, "--max-tokens", "90000", "--seed", "1", "--dtype", "float32"]
    with subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, start_new_session=True) as process:
        os.close(inside)
        try:
            read_until(terminal, "> ")
            os.write(terminal, b"hello\n")
            read_until(terminal, "hello\r\n")
            select.select([terminal], [], [], 60)  # the first words of the reply
            os.write(terminal, b"\x03")
            read_until(terminal, "(stopped)")
            os.write(terminal, b"/exit\n")
            assert process.wait(60) == 0
        finally:
            process.kill()
            os.close(terminal)


# What goes wrong: a spoiler gets the model directory, spoils it, and gives the command's words and a word of the sentence


def edit_json(file: Path, **fields) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_tensor(model: Path, name: str, change) -> None:
    """Replace a tensor in its shard by `change` of it, or take it out of shard and index for None."""
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = model / weight_map[name]
    tensors = load_file(shard)
    changed = change(tensors.pop(name))
    if changed is None:
        del weight_map[name]
    else:
        tensors[name] = changed
    save_file(tensors, shard, metadata={"format": "pt"})
    edit_json(index, weight_map=weight_map)


def some_shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[1]


def missing_directory(model):
    return ["--model", model / "nowhere"], "nowhere does not exist"


def model_is_a_file(model):
    return ["--model", some_shard(model)], "is a file, expected the directory"


def no_config(model):
    (model / "config.json").unlink()
    return [], "config.json does not exist"


def broken_config(model):
    (model / "config.json").write_text("{")
    return [], "not valid JSON"


def llama(model):
    edit_json(model / "config.json", model_type="llama")
    return [], "'llama', expected 'deepseek_v3'"


def r1_distill_qwen(model):
    edit_json(model / "config.json", model_type="qwen2")
    return [], "R1-Distill"


def unknown_rope(model):
    edit_json(model / "config.json", rope_scaling={"type": "dynamic", "factor": 2.0})
    return [], "rope type is 'dynamic'"


def softmax_scores(model):
    edit_json(model / "config.json", scoring_func="softmax")
    return [], "scoring_func is 'softmax'"


def grouped_query_heads(model):
    edit_json(model / "config.json", num_key_value_heads=77)
    return [], "num_key_value_heads is 77"


def other_quantization(model):
    edit_json(model / "config.json", quantization_config={"quant_method": "awq"})
    return [], "quant_method is 'awq'"


def truncated_shard(model):
    with some_shard(model).open("r+b") as stream:
        stream.truncate(some_shard(model).stat().st_size - 100)
    return [], "is truncated"


def page_instead_of_shard(model):
    some_shard(model).write_text("<html>404 not found</html>")
    return [], "no safetensors file"


def missing_shard(model):
    name = some_shard(model).name
    some_shard(model).unlink()
    return [], f"{name} does not exist"


def missing_tensor(model):
    edit_tensor(model, "model.norm.weight", lambda tensor: None)
    return [], "model.norm.weight is missing"


def missing_scale(model):
    edit_tensor(model, "model.layers.0.self_attn.o_proj.weight_scale_inv", lambda tensor: None)
    return [], "o_proj.weight_scale_inv"


def index_names_a_stranger(model):
    index = model / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "model.stranger.weight": some_shard(model).name})
    return [], "does not hold model.stranger.weight"


def wrong_shape(model):
    edit_tensor(model, "model.norm.weight", lambda tensor: torch.cat([tensor, tensor]))
    return [], "model.norm.weight has shape [90], expected [45]"


def wrong_dtype(model):
    edit_tensor(model, "model.layers.0.self_attn.o_proj.weight", lambda tensor: tensor.to(torch.bfloat16))
    return [], "o_proj.weight"


def no_tokenizer(model):
    (model / "tokenizer.json").unlink()
    return [], "no tokenizer.json"


def broken_tokenizer(model):
    (model / "tokenizer.json").write_text("{}")
    return [], "is not a tokenizer"


def empty_prompt(model):
    return ["--prompt", ""], "prompt 0 is empty"


def prompt_beyond_context(model):
    return ["--prompt", "word " * 5000], "expected at most 4095"


def two_prompts(model):
    return ["--prompts", model / "x.txt"], "both given"


def temperature(model):
    return ["--temperature", "-1"], "temperature is -1.0, expected"


def top_p(model):
    return ["--top-p", "0"], "top_p is 0.0, expected"


def max_tokens(model):
    return ["--max-tokens", "0"], "max_tokens is 0, expected"


def empty_stop(model):
    return ["--stop", ""], "stop is ('',), expected"


def dtype(model):
    return ["--dtype", "int4"], "--dtype is 'int4', expected"


def device(model):
    return ["--device", "abacus"], "--device abacus is not available"


def batch(model):
    return ["--batch", "0"], "max_batch is 0 and"


def output_without_prompts(model):
    return ["--output", model / "out.jsonl"], "--output goes with --prompts"


SPOILERS = [
    missing_directory, model_is_a_file, no_config, broken_config, llama, r1_distill_qwen, unknown_rope, softmax_scores, grouped_query_heads, other_quantization,
    truncated_shard, page_instead_of_shard, missing_shard, missing_tensor, missing_scale, index_names_a_stranger, wrong_shape, wrong_dtype, no_tokenizer, broken_tokenizer,
    empty_prompt, prompt_beyond_context, two_prompts, temperature, top_p, max_tokens, empty_stop, dtype, device, batch, output_without_prompts,
]  # fmt: skip


def check_sentence(result: tuple[int, str, str], sentence: str) -> None:
    code, out, err = result
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("deepseek-lit: ") and sentence in err


@pytest.mark.parametrize("spoil", SPOILERS, ids=lambda spoil: spoil.__name__)
def test_one_sentence_and_exit_code_2(run, model, spoil):
    words, sentence = spoil(model)
    words = [*([] if "--model" in words else ["--model", model]), *([] if "--prompt" in words else ["--prompt", "def "]), *words]
    check_sentence(run("generate", "--max-tokens", "2", *words), sentence)


@pytest.mark.parametrize(
    ("content", "name", "sentence"),
    [
        (None, "prompts.txt", "cannot be read"),
        (b"", "prompts.txt", "holds no prompts"),
        (b"\n \n", "prompts.jsonl", "holds no prompts"),
        (b'{"prompt": "a"}\n{"prompt"', "prompts.jsonl", "is not JSONL"),
        (b'{"text": "a"}\n', "prompts.jsonl", "is not JSONL"),
        (b'["a"]\n', "prompts.jsonl", "is not JSONL"),
        (b"\xff\xfe\n", "prompts.txt", "not UTF-8"),
        (b'{"prompt": "a"}\n{"prompt": 7}\n', "prompts.jsonl", "prompt 1 is neither text nor"),
        (b'{"prompt": "a"}\n{"prompt": ""}\n', "prompts.jsonl", "prompt 1 is empty"),
    ],
)
def test_bad_prompt_files(run, master, tmp_path, content, name, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    check_sentence(run("generate", "-m", master, "--prompts", tmp_path / name, "-o", tmp_path / "out.jsonl"), sentence)
    assert not (tmp_path / "out.jsonl").exists()


def test_outputs_are_checked_before_the_model_is_opened(run, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "there.jsonl").write_text("precious\n")
    words = ["generate", "-m", tmp_path / "no-model", "--prompts", tmp_path / "prompts.txt", "-o"]
    check_sentence(run(*words, tmp_path / "there.jsonl"), "exists already")
    check_sentence(run(*words, tmp_path / "nowhere" / "out.jsonl"), "cannot be written")
    check_sentence(run(*words, tmp_path), "cannot be written")
    assert (tmp_path / "there.jsonl").read_text() == "precious\n"


def test_chat_needs_a_tokenizer_and_a_template(run, model):
    edit_json(model / "tokenizer_config.json", chat_template=None)
    check_sentence(run("chat", "-m", model), "no chat template")
    (model / "tokenizer.json").unlink()
    check_sentence(run("chat", "-m", model), "no tokenizer.json")


def test_prompt_from_standard_input(run, master, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("import os  # é\n".encode()), encoding="ascii"))
    code, out, _ = run("generate", "-m", master, *SHORT)
    assert code == 0 and out.startswith("import os  # é\n")


@pytest.mark.parametrize(("given", "sentence"), [(b"", "prompt 0 is empty"), (b"\xff", "not valid UTF-8")])
def test_bad_standard_input(run, master, monkeypatch, given, sentence):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="ascii"))
    check_sentence(run("generate", "-m", master), sentence)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr)
def test_out_of_memory_is_one_sentence(run, master, monkeypatch, error):
    def no_memory(*arguments):
        raise error

    monkeypatch.setattr(cli, "open_llm", no_memory)
    check_sentence(run("generate", "-p", "a"), "memory ran out")


def test_debug_shows_the_traceback_and_bugs_are_never_hushed_up(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["deepseek-lit", "generate", "--prompt", "a", "--temperature", "-1", "--debug"])
    with pytest.raises(cli.InputError):
        cli.main()
    monkeypatch.setattr(cli, "open_llm", lambda *arguments: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["deepseek-lit", "generate", "--prompt", "a"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_words_that_are_no_options(run):
    code, out, err = run("generate", "--max-tokens", "many")
    assert code == 2 and out == "" and "--max-tokens" in err and "Traceback" not in err
    assert run("sing")[0] == 2


def test_bench_measures_and_writes(run, tmp_path):
    code, out, err = run("bench", "--device", "cpu", "--only", "route", "--repeats", 2, "--threads", 1, "--json", tmp_path / "bench.json")
    assert code == 0 and "route" in out and err == ""
    assert json.loads((tmp_path / "bench.json").read_text())["rows"]


@pytest.mark.parametrize("words, sentence", [(["--only", "nothing-like-it"], "nothing-like-it"), (["--plot", "a.txt"], "a.txt"), (["--device", "abacus"], "abacus"), (["--repeats", 0], "repeats")])
def test_bench_refuses_in_one_sentence(run, words, sentence):
    code, out, err = run("bench", *words)
    assert code == 2 and out == "" and sentence in err and err.count("\n") == 1
