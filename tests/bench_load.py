"""Loading a rank and converting for ranks, with layers of the release's widths, beside copying the same files: `python tests/bench_load.py`.

Writes one dense layer and `--layers` - 1 layers with experts of random FP8 blocks, and then, each in a process of its own and each from an empty page cache unless it is called
warm: copies the files; reads one of them to the end; loads ranks of every layout from slices, converts for that layout, loads a rank's own file; kills a conversion half-way
and resumes it. Every number of a part is copied to memory, as it would be for a GPU, though on a CPU `load_rank` would leave most of it mapped; for comparison the same slices
are also copied out of memory maps. Speeds of loading count the bytes that the rank wants, speeds of writing the bytes written until they are on the disk.
With 2 layers and 256 experts: 12.4 GB, and as much again for whatever is being written.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench_cast import copy, forget, nbytes, write_random
from bench_cpu import processor_name
from deepseek_lit.config import ModelConfig

WATCH = """
import json, sys, threading, time
from pathlib import Path
import torch
from deepseek_lit import parallel
from deepseek_lit.convert import convert

def status(file, key):
    return next(int(line.split()[1]) for line in open(f"/proc/self/{file}") if line.startswith(key))

peaks = {"RssAnon": 0, "RssFile": 0}
def watch():
    while True:
        for key in peaks:
            peaks[key] = max(peaks[key], status("status", key))
        time.sleep(0.01)

start_anon, wanted, started = status("status", "RssAnon"), 0, time.perf_counter()
threading.Thread(target=watch, daemon=True).start()
"""
REPORT = """
print(json.dumps({"seconds": time.perf_counter() - started, "wanted": wanted, "disk": status("io", "read_bytes"), "RssAnon": (peaks["RssAnon"] - start_anon) * 1024,
                  "RssFile": peaks["RssFile"] * 1024}))
"""
LOAD = """
path, layout, rank, way = Path(sys.argv[1]), parallel.parse_layout(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
part = parallel.find_part(path, layout, rank, False)
wanted = sum(piece.nbytes for piece in part.wanted)
if way == "map":
    mapped = parallel.map_entries({piece.name: part.entries[piece.name] for piece in part.wanted})
    with parallel.ThreadPoolExecutor(4) as pool:
        order = sorted(part.wanted, key=lambda piece: part.entries[piece.name][:2])
        kept = list(pool.map(lambda piece: mapped[piece.name][piece.index].clone(memory_format=torch.contiguous_format), order))
else:
    parallel.stays_view = lambda *_: False
    model = parallel.open_part(path, part, layout, rank, torch.device("cpu"), None, False, quiet=True)
"""
CONVERT = """
wanted = convert(sys.argv[1], sys.argv[2], sys.argv[3])
"""
VERIFY = """
from deepseek_lit.convert import verify_ranks
wanted = sum(file.stat().st_size for file in Path(sys.argv[1]).glob("*.safetensors"))
verify_ranks(sys.argv[1])
"""


def start(code: str, *words: object) -> subprocess.Popen:
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}  # large pages for what is loaded: page faults of 4 KiB would be slower than the reading, and a GPU has none
    return subprocess.Popen([sys.executable, "-c", WATCH + code + REPORT, *map(str, words)], stdout=subprocess.PIPE, text=True, env=environment)


def run(code: str, *words: object) -> dict:
    """What a process measured: seconds, bytes wanted or written, bytes from the disk, peaks of memory above the start (RssAnon) and of mapped pages (RssFile)."""
    process = start(code, *words)
    found = json.loads(process.communicate()[0])
    return {**found, "GB/s": found["wanted"] / found["seconds"] / 1e9}


def load(path: Path, layout: str, rank: int, way: str = "read", warm: bool = False) -> dict:
    """Load a rank's part; the first of a pair of runs fills the page cache for a `warm` one."""
    if not warm:
        forget(path)
    return run(LOAD, path, layout, rank, way)


def read_one(path: Path) -> float:
    """GB/s of reading the largest file of a directory from front to back."""
    forget(path)
    file, buffer = max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size), bytearray(2**24)
    begin = time.perf_counter()
    with file.open("rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    return file.stat().st_size / (time.perf_counter() - begin) / 1e9


def killed(source: Path, out: Path, layout: str, after: float) -> tuple[float, dict]:
    """Kill a conversion after so many seconds; GB on the disk then, and the run that goes on from there."""
    forget(source)
    process = start(CONVERT, source, out, layout)
    time.sleep(after)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the conversion was over before it could be killed"
    held = sum(file.stat().st_blocks * 512 for file in out.glob("*.part")) / 1e9
    forget(source)
    return held, run(CONVERT, source, out, layout)


def measure(here: Path, layouts: list[str]) -> dict[str, dict]:
    """One round of everything: name → what was measured."""
    source, out = here / "source", here / "out"
    rows = {"copy": {"GB/s": nbytes(source) / copy(source, here / "copy") / 1e9}}
    shutil.rmtree(here / "copy")
    rows["plain read"] = {"GB/s": read_one(source)}
    for layout in layouts:
        rows[f"{layout} slices"] = load(source, layout, 0)
        rows[f"{layout} slices, next rank"] = load(source, layout, 1, warm=True)
        rows[f"{layout} slices, warm"] = load(source, layout, 0, warm=True)
        rows[f"{layout} slices by map"] = load(source, layout, 0, "map")
        rows[f"{layout} slices by map, warm"] = load(source, layout, 0, "map", warm=True)
        forget(source)
        rows[f"{layout} convert"] = run(CONVERT, source, out, layout)
        rows[f"{layout} own file"] = load(out, layout, 0)
        rows[f"{layout} own file, warm"] = load(out, layout, 0, warm=True)
        rows[f"{layout} verify"] = run(VERIFY, out)
        whole = json.loads((out / "ranks.json").read_text())
        shutil.rmtree(out)
        held, resumed = killed(source, out, layout, rows[f"{layout} convert"]["seconds"] / 2)
        assert json.loads((out / "ranks.json").read_text()) == whole, "resumed, and not the same bytes"
        rows[f"{layout} resumed"] = {**resumed, "on disk when killed, GB": held}
        shutil.rmtree(out)
    return rows


def summarize(rounds: list[dict[str, dict]]) -> dict[str, dict]:
    """Medians, and the least and most of the speeds."""
    found = {}
    for name in rounds[0]:
        rows = [row[name] for row in rounds]
        found[name] = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        found[name]["range"] = [min(row["GB/s"] for row in rows), max(row["GB/s"] for row in rows)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layouts", nargs="+", default=["tp8", "tp8xep8"])
    parser.add_argument("--dir", help="where to work; everything written there is removed again")
    parser.add_argument("--json", type=Path, help="write what was measured to this file")
    arguments = parser.parse_args()
    config = ModelConfig(num_hidden_layers=arguments.layers, first_k_dense_replace=1, n_routed_experts=arguments.experts, num_nextn_predict_layers=0, vocab_size=16384)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        write_random(config, Path(folder) / "source", arguments.shards)
        size = nbytes(Path(folder) / "source")
        rounds = [measure(Path(folder), arguments.layouts) for _ in range(arguments.repeats)]
    rows = summarize(rounds)
    print(f"{size / 1e9:.1f} GB, {torch.get_num_threads()} threads, medians of {len(rounds)}")
    for name, row in rows.items():
        memory = f"{row['RssAnon'] / 1e9:8.2f} GB anonymous {row['RssFile'] / 1e9:6.2f} GB mapped {row['disk'] / 1e9:6.2f} GB from the disk" if "disk" in row else ""
        print(f"{name:28}{row['GB/s']:8.2f} GB/s{memory}")
    if arguments.json:
        machine = {"date": datetime.date.today().isoformat(), "cpu": processor_name(), "threads": torch.get_num_threads(), "torch": torch.__version__, "python": sys.version.split()[0]}
        arguments.json.write_text(json.dumps({**machine, "GB": size / 1e9, "shards": arguments.shards, "repeats": arguments.repeats, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
