"""The house is in order: exports and README in sync with the notebooks, the package free of the book's dependencies."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from readme import ROOT, readme

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def exported(root: Path) -> dict[str, str]:
    return {file.relative_to(root).as_posix(): file.read_text(encoding="utf-8") for folder in ("deepseek_lit", "kernels") for file in (root / folder).glob("*.py")}


def test_exports_in_sync(tmp_path):
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "deepseek_lit", tmp_path / "deepseek_lit", symlinks=True, ignore=shutil.ignore_patterns("tiny", "__pycache__"))
    subprocess.run([str(Path(sys.executable).with_name("nbdev-export"))], cwd=tmp_path, check=True)
    assert exported(tmp_path) == exported(ROOT), "run `make export`"


def test_readme_in_sync():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run `make export`"


def test_readme_links_exist():
    for link in re.findall(r'(?:\]\(|src=")([^)"#]+)', readme()):
        assert link.startswith("http") or (ROOT / link).exists(), link


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_chapter_is_presentable(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    lines = [len("".join(c["source"]).splitlines()) for c in cells if c["cell_type"] == "code"]
    outputs = [o for c in cells for o in c.get("outputs", [])]
    assert max(lines, default=0) <= 40
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if "Warning" in "".join(o.get("text", ""))]
    assert notebook.stat().st_size < 600_000


def test_importing_needs_nothing_of_the_book_no_triton_and_no_gpu():
    unasked = "{'nbdev', 'IPython', 'matplotlib', 'ipywidgets', 'transformers', 'fastcore', 'triton'}"
    code = f"import sys, deepseek_lit.cli, deepseek_lit.train, deepseek_lit.viz; print({unasked} & set(sys.modules))"
    code += "; import torch, deepseek_lit.kernels.quant, deepseek_lit.kernels.gemm, deepseek_lit.kernels.mla, deepseek_lit.kernels.moe; print(torch.cuda.is_initialized())"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}  # kernels that nobody interprets, and nobody can run
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "set()\nFalse\n", done.stderr


def test_repository_is_small():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    assert sum((ROOT / file).stat().st_size for file in files if file and (ROOT / file).is_file()) < 60_000_000
    assert sum(file.stat().st_size for file in (ROOT / "deepseek_lit/tiny").iterdir()) <= 12_000_000
