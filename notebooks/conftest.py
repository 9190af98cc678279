"""What stands between nbdev and nbval: the two disagree about execution counts, and some cells want hardware."""

import pytest
import torch
from nbval.plugin import IPyNbCell


def wants_missing_hardware(source: str) -> bool:
    """Whether a cell is marked for GPUs that this machine does not have."""
    directives = {line.strip() for line in source.splitlines() if line.startswith("#|")}
    return "#| cuda" in directives and not torch.cuda.is_available() or "#| multigpu" in directives and torch.cuda.device_count() < 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, IPyNbCell):
            # nbdev-clean removes the counts, and nbval takes a cell without one for a cell that never ran.
            item.cell.execution_count = item.cell.execution_count or 1
            item.options["skip"] = item.options["skip"] or wants_missing_hardware(item.cell.source)
