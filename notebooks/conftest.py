"""What stands between nbdev and nbval: the two disagree about execution counts, and some cells want hardware."""

import os
import shutil

import pytest
import torch
from nbval.plugin import IPyNbCell

COMPILED = {"18_cpu", "19_cast", "20_bench"}  # pages about the C kernels: without a C compiler they are skipped
os.environ.setdefault("PYTHONWARNINGS", "ignore:no compiled kernels for the CPU")  # said once per process, and no part of any other page


def wants_missing_hardware(source: str) -> bool:
    """Whether a cell is marked for GPUs that this machine does not have."""
    directives = {line.strip() for line in source.splitlines() if line.startswith("#|")}
    return "#| cuda" in directives and not torch.cuda.is_available() or "#| multigpu" in directives and torch.cuda.device_count() < 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, IPyNbCell):
            # nbdev-clean removes the counts, and nbval takes a cell without one for a cell that never ran.
            item.cell.execution_count = item.cell.execution_count or 1
            if item.path.stem in COMPILED and shutil.which("cc") is None:
                item.add_marker(pytest.mark.skip(reason="no C compiler"))
            item.options["skip"] = item.options["skip"] or wants_missing_hardware(item.cell.source)
