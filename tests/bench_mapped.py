"""The release on one machine and a disk: `python tests/bench_mapped.py --json figures/bench/mapped.json`.

Three parts, each in a process of its own:

ways    Bringing a cold file into memory: page faults, one large wish, many small ones, and past the page cache for comparison.
layer   One MoE layer of the release's widths, 11.5 GB of random FP8 blocks: seconds per token with everything in the page cache and with nothing, beside the
        bytes that it touches over the memory's and the disk's bandwidth, both measured in the same run. Needs 12 GB of disk and 16 GB of memory.
token   Whole tokens through 61 layers and MTP over the hollow checkpoint of full size, which takes no disk but as many pages of memory as a true one: seconds per
        layer, pages touched by kind beside the theory, resident memory. Its first token reads nothing from a disk: pages of zeros are made instead.

Everything written is removed again. On a machine that does other work at the same time, times are longer: run it alone.
"""

import argparse
import datetime
import json
import mmap
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from bench_cast import forget, write_random

import deepseek_lit as dl
from deepseek_lit import mapped
from deepseek_lit.checkpoint import Entry, is_mtp, kind_of, read_checkpoint, write_hollow
from deepseek_lit.config import ModelConfig
from deepseek_lit.mla import LatentCache
from deepseek_lit.mtp import further_logits, look_further


def memory() -> dict[str, float]:
    """This process's resident GB, of its own and of files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[field].split()[0]) * 1024 / 1e9 for name, field in {"anonymous": "RssAnon", "file": "RssFile"}.items()}


class Watch(threading.Thread):
    """The largest that resident memory has been, looked at fifty times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.over = {"anonymous": 0.0, "file": 0.0, "together": 0.0}, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.02):
            now = memory()
            now["together"] = now["anonymous"] + now["file"]
            self.peak = {name: max(self.peak[name], now[name]) for name in self.peak}

    def stop(self) -> dict[str, float]:
        self.over.set()
        self.join()
        return self.peak


def timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_speed() -> float:
    """Bytes per second of reading memory, all threads, nothing done with it but a sum; the best of ten."""
    large = torch.ones(2**26)
    return large.nbytes / min(timed(large.sum) for _ in range(10))


# ways


class Way:
    """A file mapped for reading in several ways."""

    def __init__(self, file: Path):
        self.file, self.size = file, file.stat().st_size
        self.view = torch.frombuffer(mmap.mmap(os.open(file, os.O_RDONLY), 0, access=mmap.ACCESS_COPY), dtype=torch.int64)
        self.pages, step = mapped.Pages({file: self.view.data_ptr()}), 44 * 2**20  # an expert of the release
        self.whole, self.experts = mapped.Span(file, 0, self.size), [mapped.Span(file, first, min(first + step, self.size)) for first in range(0, self.size, step)]

    def forget(self, advice: int = mmap.MADV_RANDOM) -> None:
        mapped.drop(self.pages, [self.whole])
        self.pages.advise(self.whole, advice)

    def touch(self, share: int = 1) -> None:
        self.view[: self.size // share // 8 : 512].sum()

    def read(self, ask) -> None:
        for future in [future for span in self.experts for future in ask(span)]:
            future.result()
        self.touch()

    def all(self) -> dict[str, tuple[float, float]]:
        """GB/s and processor seconds per GB of each way to have the file in this process."""
        plans = {
            "faults of 4 KiB": (mmap.MADV_RANDOM, lambda: self.touch(16), 16),
            "faults with the kernel's read-ahead": (mmap.MADV_NORMAL, self.touch, 1),
            "small pages announced, then used": (mmap.MADV_RANDOM, lambda: self.read(lambda span: [self.pages.pool.submit(mapped.announce, self.pages, span)]), 1),
            "large pages populated, edges announced": (mmap.MADV_RANDOM, lambda: self.read(lambda span: mapped.ask_for(self.pages, span)), 1),
        }
        rows = {}
        for name, (advice, work, share) in plans.items():
            self.forget(advice)
            cpu = time.process_time()
            rows[name] = self.size / share / timed(work) / 1e9, (time.process_time() - cpu) / self.size * share * 1e9
        return rows


def ways(folder: Path, gigabytes: float) -> dict:
    """Speed of several ways to have a cold file in memory, their processor time on a hollow one (so that no disk takes part), and what one wish for a whole file brings."""
    file, hollow, size = folder / "ways", folder / "hollow", int(gigabytes * 2**30)
    with file.open("wb") as stream:
        block = random.Random(0).randbytes(2**26)
        for _ in range(size // 2**26):
            stream.write(block)
        os.fsync(stream.fileno())
    with hollow.open("wb") as stream:
        stream.truncate(size)
    true, empty = Way(file), Way(hollow)
    rows, spent = [], []
    for _ in range(5):
        rows.append({name: speed for name, (speed, _) in true.all().items()} | {"past the page cache": mapped.disk_speed([file], 1.0) / 1e9})
        true.forget()
        spent.append({name: cpu for name, (_, cpu) in empty.all().items()})
        empty.forget()
    os.posix_fadvise(true.pages.files[file], 0, size, os.POSIX_FADV_WILLNEED)
    time.sleep(2)  # longer than reading it all would take
    brought = sum(sum(mapped.cached_pages(true.pages, span)) for span in true.experts) * mapped.PAGE
    device = file.stat().st_dev
    read_ahead = int(Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text())
    medians = {key: {name: statistics.median(row[name] for row in found) for name in found[0]} for key, found in (("GB_per_s", rows), ("cpu_s_per_GB", spent))}
    return {"GB": size / 1e9, "one_wish_MB": brought / 1e6, "read_ahead_MB": read_ahead / 1e3, **medians}


# layer


def let_go(model: dl.DeepSeekV3) -> None:
    """Take all of a model's mapped weights out of this process."""
    for base, size in {(storage.data_ptr(), storage.nbytes()) for storage in (p.untyped_storage() for p in model.parameters())}:
        mapped.system().madvise(base, size, mmap.MADV_DONTNEED)


def disk_bytes() -> int:
    """What this process has had read from a disk so far."""
    return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))


class LayerClock:
    """Feeds a model one token after the other and notes, of its first layer, the seconds and the GB that were read from a disk meanwhile."""

    def __init__(self, model: dl.DeepSeekV3, tokens: int):
        self.model, self.cache, self.position = model, LatentCache(model.config, 1, tokens, dtype=torch.bfloat16), 0
        model.model.layers[0].register_forward_pre_hook(self.start, prepend=True)
        model.model.layers[0].register_forward_hook(self.end)

    def start(self, *_) -> None:
        self.row = [time.perf_counter(), disk_bytes() / 1e9]

    def end(self, *_) -> None:
        self.row = [time.perf_counter() - self.row[0], disk_bytes() / 1e9 - self.row[1]]

    def feed(self, token: int) -> list[float]:
        with torch.inference_mode():
            self.model.model(torch.tensor([[token]]), torch.tensor([[self.position]]), self.cache)
        self.position += 1
        return self.row


def one_layer(folder: Path, tokens: int) -> dict:
    """A layer of the release's widths, with nothing in the page cache and with everything; managed, and left to page faults and the kernel, in turn."""
    config = ModelConfig(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, vocab_size=16160)
    path = folder / "layer"
    write_random(config, path, 4)
    cold, warm = tokens // 2, tokens
    ids = torch.randint(config.vocab_size, (1 + cold + 1 + warm,), generator=torch.Generator().manual_seed(1)).tolist()
    clocks = {name: LayerClock(dl.load_model(path, placement=placement), len(ids)) for name, placement in {"mapped": "mapped", "page faults": None}.items()}
    keeper = clocks["mapped"].model.keeper
    keeper.following = {}  # there is no next layer to read ahead
    files = list(keeper.pages.files)
    touched = keeper.sizes[0, "always"] + config.num_experts_per_tok * mapped.expert_bytes(keeper)
    speeds = {"memory": read_speed() / 1e9, "weights": mapped.weight_speed(config, torch.device("cpu"), 10) / 1e9}
    runs, disk = {f"{name}, {state}": [] for state in ("cold", "warm") for name in clocks}, []
    keeper.plan = mapped.Plan(frozenset(keeper.sizes), config.n_routed_experts, False)
    for number, token in enumerate(ids):
        if number == 1 + cold:
            for file in files:
                with file.open("rb") as stream:
                    while stream.read(2**24):
                        pass
        if 0 < number <= cold:
            disk.append(mapped.disk_speed(files, 1.0) / 1e9)
        for name, clock in clocks.items():
            if number <= cold:
                for each in clocks.values():
                    let_go(each.model)
                keeper.asked.clear()
                forget(path)
            row = clock.feed(token)
            if number not in (0, 1 + cold):  # what is done once in a model's life, or after a pause
                runs[f"{name}, {'cold' if number <= cold else 'warm'}"].append(row)
    keeper.plan = mapped.Plan(keeper.plan.kept, keeper.plan.experts, True)
    clocks["mapped"].position = 1 + cold
    fits = [clocks["mapped"].feed(token) for token in ids[1 + cold :]]
    runs["mapped, warm, all of it fits"] = fits[1:]
    return {"GB": sum(keeper.sizes.values()) / 1e9, "touched_GB": touched / 1e9, "GB_per_s": speeds | {"disk": statistics.median(disk)},
            "disk_GB_per_s": disk, "seconds": {name: [row[0] for row in rows] for name, rows in runs.items()}, "read_GB": {name: [row[1] for row in rows] for name, rows in runs.items()}}  # fmt: skip


# token


def in_cache(keeper: mapped.Keeper, entry: Entry) -> int:
    """Bytes of a tensor that the page cache holds; of the pages at its edges, which it shares, nothing is said."""
    first, end = -(-entry.first // mapped.PAGE) * mapped.PAGE, (entry.first + entry.nbytes) // mapped.PAGE * mapped.PAGE
    return sum(mapped.cached_pages(keeper.pages, mapped.Span(entry.file, first, end))) * mapped.PAGE if end > first else 0


class Clock:
    """Seconds of every layer of a model's passes. With `look`, a function of the layer's index, what that gives before and at the end of the layer instead."""

    def __init__(self, model: dl.DeepSeekV3):
        self.seconds, self.look, self.clear, self.before, self.after = {}, None, None, {}, {}
        for index, layer in enumerate(model.model.layers):
            layer.register_forward_pre_hook(lambda *_, index=index: self.start(index), prepend=True)
            layer.register_forward_hook(lambda *_, index=index: self.peek(index), prepend=True)
            layer.register_forward_hook(lambda *_, index=index: self.end(index))

    def start(self, index: int) -> None:
        if self.look is not None:
            self.before[index] = self.look(index)
        self.seconds[index] = -time.perf_counter()

    def peek(self, index: int) -> None:
        if self.look is not None:
            self.after[index] = self.look(index)
            self.clear(index)

    def end(self, index: int) -> None:
        self.seconds[index] += time.perf_counter()


def whole_token(folder: Path, placement: str | None) -> dict:
    """Three tokens through the hollow release and its MTP layer: the first with an empty page cache, the second timed again, the third looked at."""
    path = folder / "hollow"
    write_hollow(ModelConfig(), path)
    entries, watch = read_checkpoint(path), Watch()
    watch.start()
    start = time.perf_counter()
    model = dl.load_model(path, mtp=True, placement=placement)
    config, result = model.config, {"open_seconds": time.perf_counter() - start, "memory_after_opening_GB": memory()}
    names = {part: {} for part in mapped.parts_of(entries, False)}
    for name, entry in entries.items():
        if (part := mapped.part_of(name)) is not None and not (is_mtp(name, config) and "shared_head.head" in name):
            names[part][name] = entry
    tensors = {name: weight for name, weight in model.named_parameters()}
    keeper = getattr(model, "keeper", None) or mapped.Keeper(mapped.Pages(mapped.addresses({name: entries[name] for name in tensors}, tensors)), mapped.parts_of(entries, False), [(0, "always")], 0)
    if placement is not None:
        guess = mapped.estimate(model)
        result |= {"estimate": {"text": str(guess), "seconds": guess.seconds, "disk_GB_per_s": guess.disk / 1e9, "weights_GB_per_s": guess.weights / 1e9},
                   "kept_GB": sum(keeper.sizes[part] for part in keeper.plan.kept) / 1e9, "kept_experts": keeper.plan.experts}  # fmt: skip
    else:
        for storage, size in {(s.data_ptr(), s.nbytes()) for s in (p.untyped_storage() for p in model.parameters())}:
            mapped.system().madvise(storage, size, mmap.MADV_NORMAL)
            mapped.system().madvise(storage, size, mmap.MADV_HUGEPAGE)
    let_go(model)
    forget(path)
    chosen = {index: set() for index in range(config.first_k_dense_replace, len(model.model.layers))}
    if placement is not None:
        for index in chosen:
            model.model.layers[index].mlp.gate.register_forward_hook(lambda gate, args, out, index=index: chosen[index].update(out[1].flatten().tolist()))
    clock, cache, passes = Clock(model), LatentCache(config, 1, 8, dtype=torch.bfloat16, further=1), []

    def parts(index: int) -> list:
        return [(index, "always"), *((index, expert) for expert in chosen.get(index) or (range(config.num_experts_per_tok) if index in chosen else ()))]

    def look(index: int) -> dict[str, int]:
        """Bytes in the page cache, by kind, and of the experts that nobody has chosen."""
        sums = {}
        for part in names:
            if part[0] == index:
                for name, entry in names[part].items():
                    kind = "experts not chosen" if part[1] not in ("always", "head") and part not in parts(index) else kind_of(name, None)
                    sums[kind] = sums.get(kind, 0) + in_cache(keeper, entry)
        return sums

    def clear(index: int) -> None:
        """What the plan would have dropped, had it not been kept to be looked at."""
        for part in names:
            if part[0] == index and part[1] not in ("always", "head"):
                mapped.drop(keeper.pages, keeper.spans(part))

    for position in range(3):
        if position == 2:
            clock.look, clock.clear, keeper.plan = look, clear if placement else lambda index: None, keeper.plan._replace(experts=config.n_routed_experts)
        cpu = time.process_time()
        with torch.inference_mode():
            ids, place = torch.tensor([[7]]), torch.tensor([[position]])
            times = [time.perf_counter()]
            hidden = model.model(ids, place, cache)
            times.append(time.perf_counter())
            model.lm_head(hidden)
            times.append(time.perf_counter())
            further_logits(model, 0, look_further(model, 0, hidden, ids, place, cache))
            times.append(time.perf_counter())
        steps = dict(zip(("layers", "head", "mtp with head"), (b - a for a, b in zip(times, times[1:]))))
        passes.append({"layer_seconds": [clock.seconds[index] for index in range(len(model.model.layers))], **steps, "cpu_seconds": time.process_time() - cpu, "memory_GB": memory()})
    theory = {}
    for part in names:
        if part[0] is not None and part in parts(part[0]):
            for name, entry in names[part].items():
                theory.setdefault(part[0], {}).setdefault(kind_of(name, None), 0)
                theory[part[0]][kind_of(name, None)] += entry.nbytes
    return result | {
        "resident_peak_GB": watch.stop(), "passes": passes[:2], "theory_bytes": theory, "head_bytes": sum(entry.nbytes for entry in names[None, "head"].values()),
        "touched_bytes": clock.after, "still_cached_bytes": clock.before, "chosen": {index: sorted(experts) for index, experts in chosen.items()},
    }  # fmt: skip


# all of it

PARTS = {
    "ways": lambda folder, words: ways(folder, words.gigabytes),
    "layer": lambda folder, words: one_layer(folder, words.tokens),
    "token": lambda folder, words: whole_token(folder, "mapped"),
    "token, left to the kernel": lambda folder, words: whole_token(folder, None),
}


def machine() -> dict:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    available = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return {
        "date": datetime.date.today().isoformat(), "cpu": next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.processor()),
        "threads": torch.get_num_threads(), "free_memory_GB": available * 1024 / 1e9, "kernel": platform.release().partition("-")[0], "load_before": os.getloadavg()[0],
        "versions": {"deepseek-lit": dl.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), action="append", help="only this part; may be repeated")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the file of the first part")
    parser.add_argument("--tokens", type=int, default=30, help="warm tokens of the second part; half as many are cold")
    parser.add_argument("--dir", help="where to work, on the disk to be measured; everything written there is removed again")
    parser.add_argument("--json", type=Path, help="write the result here; parts that are not run now stay as they are")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.work:
        print(json.dumps(machine() | PARTS[words.work](Path(words.dir), words)))
        return
    found = json.loads(words.json.read_text()) if words.json and words.json.exists() else {}
    for part in words.only or PARTS:
        with tempfile.TemporaryDirectory(dir=words.dir) as folder:
            command = [sys.executable, __file__, "--work", part, "--dir", folder, "--gigabytes", str(words.gigabytes), "--tokens", str(words.tokens)]
            found[part] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        print(part, json.dumps(found[part])[:2000], flush=True)
        if words.json:
            words.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
