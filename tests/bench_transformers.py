"""Decode and prefill speed beside transformers on the "mid" configuration: `make bench`.

Both run the same random bfloat16 checkpoint with the same threads in one process, in turn, one prompt of 132 tokens; what is
reported are medians and their ratio, because absolute times depend on the machine.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

import deepseek_lit as dl
from deepseek_lit.config import Yarn
from deepseek_lit.generate import decode, prefill
from deepseek_lit.model import init_weights

MID = dl.ModelConfig(
    vocab_size=4096, hidden_size=1024, num_hidden_layers=8, max_position_embeddings=163840, num_attention_heads=16,
    q_lora_rank=384, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, rope_scaling=Yarn(),
    first_k_dense_replace=1, intermediate_size=2816, moe_intermediate_size=256, n_routed_experts=64, n_shared_experts=1,
    num_experts_per_tok=8, n_group=8, topk_group=4, num_nextn_predict_layers=0, fp8=False,
)  # fmt: skip


def run_ours(model: dl.DeepSeekV3, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and for `tokens` greedy steps after it."""
    weight = model.lm_head.weight
    start = time.perf_counter()
    cache = dl.LatentCache(model.config, 1, len(prompt) + tokens, weight.device, weight.dtype)
    logits = prefill(model, [prompt], cache, 512)
    middle = time.perf_counter()
    for i in range(tokens):
        logits = decode(model, [int(logits.argmax())], [len(prompt) + i], cache)
    return middle - start, time.perf_counter() - middle


@torch.inference_mode()
def run_transformers(model: torch.nn.Module, prompt: list[int], tokens: int) -> tuple[float, float]:
    """The same work with transformers' model and its own cache, without the overhead of its `generate`."""
    start = time.perf_counter()
    out = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    middle = time.perf_counter()
    for _ in range(tokens):
        out = model(out.logits[:, -1].argmax(-1)[:, None], past_key_values=out.past_key_values, use_cache=True)
    return middle - start, time.perf_counter() - middle


def measure(runs: dict[str, Callable[[], tuple[float, float]]], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """Run the contestants in turn, after one warm-up each."""
    for run in runs.values():
        run()
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(run())
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=132)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    arguments = parser.parse_args()
    import transformers

    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    prompt = torch.randint(MID.vocab_size, (arguments.prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    with tempfile.TemporaryDirectory() as path:
        dl.save_model(init_weights(dl.DeepSeekV3(MID)), path, fp8=False)
        ours = dl.load_model(path, dtype=torch.bfloat16)
        theirs = transformers.DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        runs = {
            "deepseek-lit": lambda: run_ours(ours, prompt, arguments.tokens),
            "transformers": lambda: run_transformers(theirs, prompt, arguments.tokens),
        }
        times = measure(runs, arguments.repeats)
    speeds = {}
    for phase, column, tokens in (("prefill", 0, arguments.prompt_tokens), ("decode", 1, arguments.tokens)):
        speeds[phase] = {name: tokens / statistics.median(t[column] for t in rows) for name, rows in times.items()}
        speeds[phase]["ratio"] = statistics.median(b[column] / a[column] for a, b in zip(times["deepseek-lit"], times["transformers"]))
    if arguments.json:
        print(json.dumps(speeds | {"torch": torch.__version__, "transformers": transformers.__version__, "threads": arguments.threads}))
        return
    print(f"mid configuration, bfloat16, {arguments.threads} threads, batch 1, {arguments.prompt_tokens}-token prompt; tokens/s, medians of {arguments.repeats}")
    for phase, row in speeds.items():
        print(f"{phase:8} deepseek-lit {row['deepseek-lit']:8.1f}   transformers {row['transformers']:8.1f}   ratio {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
