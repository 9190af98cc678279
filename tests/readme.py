"""README.md is chapter 00 without its code: `python tests/readme.py` writes it, test_house checks that it is in sync."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def readme(root: Path = ROOT) -> str:
    """The markdown cells of the index, with paths as they are seen from the root. Cells tagged `book` stay in the book."""
    cells = json.loads((root / "notebooks/00_index.ipynb").read_text(encoding="utf-8"))["cells"]
    pages = ["".join(c["source"]) for c in cells if c["cell_type"] == "markdown" and "book" not in c["metadata"].get("tags", [])]
    text = "\n\n".join(pages).replace("](../", "](").replace('src="../', 'src="')
    for notebook in sorted((root / "notebooks").glob("*.ipynb")):
        text = text.replace(f"]({notebook.name})", f"](notebooks/{notebook.name})")
    return text + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
