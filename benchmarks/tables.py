"""Tables of the documentation, made from the results: a figure without a result cannot appear.

Run: ``python benchmarks/tables.py`` to fill, in the pages of ``DOCUMENTS``, every block

    <!-- table: NAME -->
    ...
    <!-- end -->

Where a benchmark has no result yet, its block says so.
"""

import re
from pathlib import Path

import tables_of_a_gpu
import tables_of_recipes
import tables_of_steps

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "docs" / "recipes.md",
    ROOT / "docs" / "training.md",
    Path(__file__).parent / "README.md",
)
BLOCK = re.compile(r"(<!-- table: ([a-z_]+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES = tables_of_steps.TABLES | tables_of_a_gpu.TABLES | tables_of_recipes.TABLES


def main() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        document.write_text(filled(text))
        print(document, "changed" if filled(text) != text else "as it was")


def filled(text: str) -> str:
    """The document with every block as its results have it.

    Raises:
        KeyError: a block that nothing here makes.
    """
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block[2]]()}\n{block[3]}", text)


if __name__ == "__main__":
    main()
