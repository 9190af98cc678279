"""Runs of several ranks from the command line, and what they say when something goes wrong. Ranks are forked from one process that has imported the package already."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from deepseek_lit import InputError, LLM, SamplingParams, launch
from deepseek_lit.checkpoint import find_shards
from deepseek_lit.launch import Crew, Place, find_place, files_of, first_difference, open_board, span
from models import random_config, write_checkpoint

TINY = Path(launch.__file__).parent / "tiny"
PROMPTS = ["def read(", "import os\n", "The house", "class A:\n    ", "3 + 4 ="]
WORDS = ["--dtype", "float32", "--temperature", "0", "--max-tokens", "12", "--timeout", "20"]

forks = multiprocessing.get_context("forkserver")


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(*_) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def while_loading(action, monkeypatch) -> None:
    monkeypatch.setattr("deepseek_lit.parallel.fill_rank", action)


def while_decoding(action, monkeypatch) -> None:
    from deepseek_lit import generate

    take_in, steps = generate.take_in, []

    def taken(*arguments):
        steps.append(1)
        return action() if len(steps) == 4 else take_in(*arguments)

    monkeypatch.setattr(generate, "take_in", taken)


def with_older_version(monkeypatch) -> None:
    monkeypatch.setattr(launch, "version", lambda _: "0.0.9")


def out_of_memory(monkeypatch) -> None:
    def fill(*_):
        raise MemoryError

    while_loading(fill, monkeypatch)


def overheard(monkeypatch) -> None:
    from deepseek_lit import generate

    take = generate.Request.take

    def taken(request, token, *rest):
        with open(f"tokens{os.environ['RANK']}", "a") as notes:
            print(token, file=notes)
        return take(request, token, *rest)

    monkeypatch.setattr(generate.Request, "take", taken)


SPOILERS = {
    "killed while loading": lambda m: while_loading(die, m), "killed while decoding": lambda m: while_decoding(die, m), "frozen": lambda m: while_decoding(stop, m),
    "older": with_older_version, "out of memory": out_of_memory, "overheard": overheard,
}  # fmt: skip


def rank(place: Place, port: int, words: list[str], folder: Path, spoiler: str | None) -> None:
    """One rank of a run, as a launcher that is no torchrun would start it."""
    from deepseek_lit import cli

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
    os.environ |= {name: str(number) for name, number in zip(names, place)} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for number, name in enumerate(("in", "out", "err")):
        os.dup2(os.open(folder / f"{name}{place.rank}", os.O_RDWR | os.O_CREAT), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
    torch.set_num_threads(1)
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(launch, "PATIENCE", 3.0)
    if spoiler:
        SPOILERS[spoiler](monkeypatch)
    os.chdir(folder / f"node{place.node}")
    sys.argv = ["deepseek-lit", *words]
    cli.main()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def crew(tmp_path):
    """A function that runs a command on so many nodes of so many ranks; some may be spoiled (rank → spoiler), and None never starts. Exit codes, outputs and errors by rank."""
    running = []

    def run(words, nodes=1, here=2, spoiled=None, typed="") -> tuple[dict[int, int], dict[int, str], dict[int, str]]:
        spoiled, port, world = spoiled or {}, free_port(), nodes * here
        for node in range(nodes):
            (tmp_path / f"node{node}").mkdir(exist_ok=True)
        processes = {}
        for number in (number for number in range(world) if spoiled.get(number, "") is not None):
            (tmp_path / f"in{number}").write_text(typed)
            place = Place(number, world, number % here, here, number // here)
            processes[number] = forks.Process(target=rank, args=(place, port, [str(word) for word in words], tmp_path, spoiled.get(number)))
            processes[number].start()
        running.extend(processes.values())
        end = time.monotonic() + 60
        for number, process in processes.items():
            if spoiled.get(number) != "frozen":
                process.join(max(0, end - time.monotonic()))
                assert process.exitcode is not None, f"rank {number} still runs"
        return {n: p.exitcode for n, p in processes.items()}, *({n: (tmp_path / f"{name}{n}").read_text() for n in processes} for name in ("out", "err"))

    yield run
    for process in running:
        process.kill()


def check_end(codes: dict[int, int], errors: dict[int, str], sentence: str, survivors: list[int], code: int = 1) -> None:
    """All survivors have ended with one sentence that says what happened."""
    for number in survivors:
        assert codes[number] == code, errors[number]
        lines = [line for line in errors[number].splitlines() if line.startswith("deepseek-lit: ")]
        assert len(lines) == 1 and sentence in lines[0] and lines[0].startswith(f"deepseek-lit: rank {number} (node "), errors[number]
        assert "Traceback" not in errors[number]


# All is well


@pytest.fixture(scope="module")
def alone() -> list[str]:
    llm = LLM(dtype=torch.float32)
    return [out.text for out in llm.generate(PROMPTS, SamplingParams(max_tokens=12, temperature=0))]


def test_one_reply_from_two_ranks(crew, alone):
    codes, outs, errors = crew(["generate", "--prompt", PROMPTS[0], "--layout", "ep2", *WORDS])
    assert codes == {0: 0, 1: 0} and outs == {0: f"{PROMPTS[0]}{alone[0]}\n", 1: ""} and errors[1] == ""
    assert "2 ranks hold" in errors[0] and "layout ep2" in errors[0] and "tokens/s" in errors[0]


@pytest.mark.parametrize("layout, extra", [("dp2xep2", []), ("dp4xep4", []), ("ep2", []), ("pp2", []), ("dp2xep2", ["--speculative-tokens", "2"]), (None, [])])
def test_a_file_of_prompts(layout, extra, crew, alone, tmp_path):
    """Five prompts and rows that keep step: some have more to read or to write than others, and in the last round one has nothing at all."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    words = ["generate", "--prompts", tmp_path / "prompts.jsonl", "--output", tmp_path / "replies.jsonl", "--batch", 2, *WORDS, *extra, *(["--layout", layout] if layout else [])]
    codes, outs, errors = crew(words, nodes=2, here=1 if layout in ("pp2", None) else 2)
    assert set(codes.values()) == {0}, errors
    replies = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert [reply["prompt"] for reply in replies] == PROMPTS and [reply["text"] for reply in replies] == alone
    assert not any(outs.values()) and not errors[1] and ("guesses right" in errors[0]) == bool(extra)


def test_ranks_agree_on_tokens_drawn_at_random(crew, tmp_path):
    """Nobody gives a seed, and each rank would draw others."""
    codes, outs, errors = crew(["generate", "--prompt", "def ", "--layout", "ep2", *WORDS, "--temperature", "2", "--max-tokens", "30"], spoiled={0: "overheard", 1: "overheard"})
    assert codes == {0: 0, 1: 0}, errors
    tokens = [(tmp_path / "node0" / f"tokens{number}").read_text().split() for number in (0, 1)]
    assert tokens[0] == tokens[1] and len(tokens[0]) > 1


def test_chat_reads_on_rank_0_alone(crew):
    codes, outs, errors = crew(["chat", "--layout", "ep2", *WORDS], typed="hello\n/wrong\n\nthere\n")
    assert codes == {0: 0, 1: 0} and outs[0].strip() and not outs[1] and not errors[1]
    assert errors[0].count("wrote 12 tokens") == 2 and "/wrong is no command" in errors[0]


def test_bench_counts_what_ranks_send(crew, tmp_path):
    codes, outs, errors = crew(["bench", "--layout", "ep2", "--repeats", 1, "--batch", 1, "--prompt-tokens", 8, "--max-tokens", 3, "--dtype", "float32", "--json", tmp_path / "bench.json"])
    assert codes == {0: 0, 1: 0} and "tok/s" in outs[0] and not outs[1], errors
    [measured] = json.loads((tmp_path / "bench.json").read_text())["measured"]
    hidden, layers = LLM().model.config.hidden_size, 3
    assert measured["sent"]["experts"] == pytest.approx(4 * hidden * layers)  # an all-reduce between two sends everything once


# What goes wrong


@pytest.mark.parametrize("spoiler", ["killed while loading", "killed while decoding"])
def test_a_killed_rank_ends_all(spoiler, crew):
    codes, _, errors = crew(["generate", "--prompt", "def ", "--layout", "ep4", *WORDS], nodes=1, here=4, spoiled={2: spoiler})
    assert codes[2] == -signal.SIGKILL
    check_end(codes, errors, "rank 2 (node 0) has ended without a word", [0, 1, 3])


def test_a_frozen_machine_is_noticed_by_the_others(crew):
    codes, _, errors = crew(["generate", "--prompt", "def ", "--layout", "ep2", *WORDS], nodes=2, here=1, spoiled={1: "frozen"})
    check_end(codes, errors, "rank 1 (node 1) has given no sign of life for 3 s", [0])


def test_the_first_node_dies(crew):
    """And the board with it."""
    codes, _, errors = crew(["generate", "--prompt", "def ", "--layout", "ep2", *WORDS], nodes=2, here=1, spoiled={0: "killed while decoding"})
    assert codes[0] == -signal.SIGKILL
    check_end(codes, errors, "the first node (MASTER_ADDR) no longer answers", [1])


def test_a_node_that_never_starts_is_named(crew):
    codes, _, errors = crew(["generate", "--prompt", "def ", *WORDS[:-1], "2"], nodes=2, here=2, spoiled={2: None, 3: None})
    for number in (0, 1):
        assert codes[number] == 2 and "ranks 2–3 (node 1) of 4 did not come within 2 s; expected the same command on every node" in errors[number]


def test_the_first_node_never_starts(crew):
    codes, _, errors = crew(["generate", "--prompt", "def ", *WORDS[:-1], "2"], nodes=2, here=1, spoiled={0: None})
    assert codes[1] == 2 and "(MASTER_ADDR:MASTER_PORT) did not answer within 2 s" in errors[1] and "Traceback" not in errors[1]


def test_versions_must_be_the_same(crew):
    codes, _, errors = crew(["generate", "--prompt", "def ", *WORDS], nodes=2, here=1, spoiled={1: "older"})
    check_end(codes, errors, "rank 1 (node 1) has deepseek-lit 0.0.9, but rank 0 (node 0) has deepseek-lit 0.1.0; expected the same on every node", [0, 1], code=2)


def test_a_truncated_shard_on_one_node(crew, tmp_path):
    for node in (0, 1):
        shutil.copytree(TINY, tmp_path / f"node{node}" / "model")
    shard = find_shards(tmp_path / "node1" / "model")[0]
    os.truncate(shard, shard.stat().st_size - 1000)
    codes, _, errors = crew(["generate", "--prompt", "def ", "--model", "model", *WORDS], nodes=2, here=1)
    check_end(codes, errors, f"rank 1 (node 1) has {shard.name} of {shard.stat().st_size} bytes", [0, 1], code=2)


def test_memory_that_runs_out_on_one_rank(crew):
    codes, _, errors = crew(["generate", "--prompt", "def ", "--layout", "ep2", *WORDS], spoiled={1: "out of memory"})
    assert codes == {0: 1, 1: 2}
    assert "rank 1 (node 0): memory ran out" in errors[0] and "rank 1 (node 0): memory ran out" in errors[1]


@pytest.mark.parametrize("words, sentence", [
    (["--layout", "tp3"], "layout tp3"),
    (["--layout", "ep4"], "this run has 2"),
    (["--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
    (["--prompt", ""], "prompt 0 is empty"),
    (["--prompt", "a", "--model", "nowhere"], "nowhere does not exist"),
])  # fmt: skip
def test_what_a_user_gets_wrong_ends_all(words, sentence, crew):
    codes, _, errors = crew(["generate", *(words if "--prompt" in str(words) else ["--prompt", "a", *words]), *WORDS])
    assert all(code in (1, 2) for code in codes.values()) and 2 in codes.values()
    for number in (0, 1):
        assert sentence in errors[number] and "Traceback" not in errors[number], errors[number]


# torchrun, on two machines that are two network namespaces of this one


@pytest.fixture
def machines():
    """Two network namespaces with a cable between them; skipped where making them is not allowed."""
    names = [f"lit{os.getpid()}{side}" for side in "ab"]
    commands = [*(f"netns add {name}" for name in names), f"link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}"]
    for number, name in enumerate(names):
        commands += [f"-n {name} addr add 10.213.7.{number + 1}/24 dev {name}", f"-n {name} link set {name} up", f"-n {name} link set lo up"]
    try:
        for command in commands:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True) if shutil.which("ip") else None


def torchrun(machine: str, node: int, words: list[str], environment: dict[str, str] | None = None) -> subprocess.Popen:
    command = ["ip", "netns", "exec", machine, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node), "--master-addr", "10.213.7.1"]
    command += ["--master-port", "29500", "--rdzv-conf", "timeout=20", "-m", "deepseek_lit", *words]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": machine, "OMP_NUM_THREADS": "1"} | (environment or {})
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8")


def test_torchrun_on_two_machines(machines, alone):
    processes = [torchrun(machine, node, ["generate", "--prompt", PROMPTS[0], "--layout", "dp2xep2", *WORDS]) for node, machine in enumerate(machines)]
    (out, err), (other, quiet) = (process.communicate(timeout=60) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], err
    assert out == f"{PROMPTS[0]}{alone[0]}\n" and other == ""
    ours = [line for line in (err + quiet).splitlines() if "torch/distributed/elastic" not in line]  # torchrun logs a traceback when its other agent has left first
    assert any("2 ranks hold" in line for line in ours) and not any("Traceback" in line for line in ours), err + quiet


def test_a_cable_that_leads_nowhere(machines):
    """The board is reached, but gloo is told to use an interface that the other machine cannot see."""
    words = ["generate", "--prompt", "def ", "--layout", "ep2", *WORDS[:-1], "4"]
    processes = [torchrun(machine, node, words, {"GLOO_SOCKET_IFNAME": "lo"}) for node, machine in enumerate(machines)]
    for process in processes:
        _, error = process.communicate(timeout=60)
        assert process.returncode != 0 and "GLOO_SOCKET_IFNAME names the network interface" in error


def test_ctrl_c_on_two_machines(machines):
    processes = [torchrun(machine, node, ["chat", "--layout", "ep2", *WORDS]) for node, machine in enumerate(machines)]
    while "2 ranks hold" not in (line := processes[0].stderr.readline()):
        assert line, "the run ended by itself"
    processes[0].send_signal(signal.SIGINT)
    start = time.monotonic()
    for process in processes:
        process.wait(60)
    assert time.monotonic() - start < 30
    for number, error in enumerate(process.stderr.read() for process in processes):
        assert f"deepseek-lit: rank {number} (node {number}): stopped by Ctrl-C on node 0" in error, error


# The parts


def test_places():
    assert find_place({}) is None and find_place({"RANK": "1"}) is None
    assert find_place({"RANK": "3", "WORLD_SIZE": "4"}) == Place(3, 4, 3, 4, 0)
    assert find_place({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}) == Place(9, 16, 1, 8, 1)
    with pytest.raises(InputError, match="whole numbers"):
        find_place({"RANK": "one", "WORLD_SIZE": "4"})


@pytest.mark.parametrize("numbers, text", [([3], "3"), ([0, 1, 2], "0–2"), ([0, 2, 3, 9], "0, 2–3, 9")])
def test_runs_of_ranks(numbers, text):
    assert span(numbers) == text


def test_notes_are_compared_key_by_key():
    places = [Place(r, 3, r, 1, r) for r in range(3)]
    assert first_difference([{"a": "1"}, {}, {"a": "1"}], places) is None  # who notes nothing is not asked
    assert "rank 2 (node 2) has a 2, but rank 0 (node 0) has a 1" in first_difference([{"a": "1"}, {"a": "1"}, {"a": "2"}], places)
    assert "rank 1 (node 1) has no a" in first_difference([{"a": "1"}, {"b": "1"}, {"a": "1"}], places)
    assert "rank 1 (node 1) has b 1, but rank 0 (node 0) has no b" in first_difference([{"a": "1"}, {"a": "1", "b": "1"}, {}], places)


def test_files_are_told_apart_by_size_header_and_settings(tmp_path):
    write_checkpoint(tmp_path, random_config(0), shards=2)
    before = files_of(tmp_path)
    assert set(before) == {file.name for file in tmp_path.iterdir()}
    for file in tmp_path.iterdir():
        whole = file.read_bytes()
        place = 40 if file.suffix == ".safetensors" else len(whole) // 2
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        changed = files_of(tmp_path)
        assert {name for name in before if changed[name] != before[name]} == {file.name}
        file.write_bytes(whole[:-1])
        assert files_of(tmp_path)[file.name] != before[file.name]
        file.write_bytes(whole)


def test_a_board_that_nobody_keeps(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(InputError, match="did not answer within 1 s"):
        open_board(Place(1, 2, 0, 1, 1), 1)


def test_a_process_alone_shares_with_itself():
    crew = Crew(Place(), [Place()])
    assert crew.alone and crew.share(lambda: "\ud800") == "\ud800"
    crew.compare("anything", {"a": "1"})
