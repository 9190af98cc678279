"""Converting a checkpoint of the release's widths, beside copying it: `python tests/bench_cast.py`.

Writes `--layers` layers (three dense, then MoE) of random FP8 blocks to a directory of its own, copies the files, converts them with `deepseek_lit.cast`
in a process of its own, and, when asked, converts the result back. Source pages are dropped from the page cache before each run, and every run ends when
its bytes are on the disk. Speeds count bytes read and bytes written. A copy writes as much as it reads and the conversion twice as much, so where the disk
writes more slowly than it reads, "ratio written", of the bytes written per second, is the fairer one. With 4 layers and 256 experts: 13.7 GB of FP8, 41 GB on the disk at most.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from deepseek_lit.checkpoint import DTYPES, INDEX, make_header, spread, write_json
from deepseek_lit.config import ModelConfig, checkpoint_tensors, to_json

RUN = """
import sys, time
from deepseek_lit.cast import cast
start = time.perf_counter()
cast(sys.argv[1], sys.argv[2], sys.argv[3])
seconds = time.perf_counter() - start
peak = next(int(line.split()[1]) / 1e6 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, peak)
"""


def write_random(config: ModelConfig, path: Path, shards: int) -> None:
    """A checkpoint of `config` whose weights are random bytes (never not-a-number) and whose scales, norms and embeddings are random too."""
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    fp8 = torch.randint(0, 254, (2**26,), dtype=torch.uint8, generator=generator)
    fp8 += (fp8 >= 127).to(torch.uint8)  # 0x7f and 0xff are not-a-number
    random = {"F8_E4M3": fp8, "BF16": torch.randn(2**22, generator=generator).bfloat16(), "F32": torch.rand(2**20, generator=generator) * 1e-3 + 1e-4}
    blocks = {code: memoryview(tensor.view(torch.uint8).numpy()) for code, tensor in random.items()}
    tensors, weight_map, dealt = checkpoint_tensors(config), {}, spread(config, shards)
    for i, names in enumerate(dealt, 1):
        file = path / f"model-{i:05d}-of-{len(dealt):06d}.safetensors"
        header, firsts, size = make_header({name: tensors[name] for name in names})
        with file.open("wb") as stream:
            stream.write(header)
            for name in names:
                left = torch.Size(tensors[name][1]).numel() * DTYPES[tensors[name][0]].itemsize
                while left:
                    left -= stream.write(blocks[tensors[name][0]][:left])
            assert stream.tell() == size
            os.fsync(stream.fileno())
        weight_map |= dict.fromkeys(names, file.name)
    write_json(path / INDEX, {"weight_map": weight_map})
    write_json(path / "config.json", to_json(config))


def nbytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def forget(path: Path) -> None:
    """Drop the pages of a directory's files from the page cache."""
    for file in path.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(path: Path, out: Path) -> float:
    """Seconds to copy all files to `out` and have them on the disk."""
    forget(path)
    out.mkdir()
    start = time.perf_counter()
    for file in path.iterdir():
        with file.open("rb") as source, (out / file.name).open("wb") as target:
            shutil.copyfileobj(source, target, 2**24)
            os.fsync(target.fileno())
    return time.perf_counter() - start


def convert(path: Path, out: Path, to: str) -> tuple[float, float]:
    """Seconds and peak resident GB of a conversion."""
    forget(path)
    done = subprocess.run([sys.executable, "-c", RUN, str(path), str(out), to], stdout=subprocess.PIPE, text=True, check=True)
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--back", action="store_true", help="also convert the result to FP8 again")
    parser.add_argument("--dir", help="where to work; everything written there is removed again")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    config = ModelConfig(num_hidden_layers=arguments.layers, n_routed_experts=arguments.experts, num_nextn_predict_layers=0, vocab_size=16160)
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        here = Path(folder)
        write_random(config, here / "fp8", arguments.shards)
        for _ in range(arguments.repeats):
            row = {"copy": 2 * nbytes(here / "fp8") / copy(here / "fp8", here / "copy") / 1e9}
            shutil.rmtree(here / "copy")
            seconds, row["cast peak GB"] = convert(here / "fp8", here / "bf16", "bf16")
            row["cast"] = (nbytes(here / "fp8") + nbytes(here / "bf16")) / seconds / 1e9
            row["cast seconds"], row["ratio"] = seconds, row["cast"] / row["copy"]
            row["ratio written"] = nbytes(here / "bf16") / seconds / (row["copy"] * 1e9 / 2)
            if arguments.back:
                seconds, row["back peak GB"] = convert(here / "bf16", here / "again", "fp8")
                row["back"] = (nbytes(here / "bf16") + nbytes(here / "again")) / seconds / 1e9
                shutil.rmtree(here / "again")
            rows.append(row)
            size = nbytes(here / "fp8")
            shutil.rmtree(here / "bf16")
    result = {key: sorted(row[key] for row in rows)[len(rows) // 2] for key in rows[0]}
    if arguments.json:
        print(json.dumps({"fp8 GB": size / 1e9, "threads": torch.get_num_threads(), **result}))
        return
    print(f"{size / 1e9:.1f} GB of FP8, {arguments.shards} shards, {torch.get_num_threads()} threads; medians of {len(rows)}, speeds are bytes read + bytes written")
    for key, value in result.items():
        print(f"{key:14} {value:8.2f}{' GB/s' if key in ('copy', 'cast', 'back') else ''}")


if __name__ == "__main__":
    main()
