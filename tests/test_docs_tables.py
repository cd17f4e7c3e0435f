"""The tables of docs/from are those that the code gives now."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
SPEC = importlib.util.spec_from_file_location("tables", DOCS / "site_build" / "tables.py")
assert SPEC is not None and SPEC.loader is not None
tables = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tables)
PAGES = {
    path.name: path.read_text(encoding="utf-8") for path in sorted((DOCS / "from").glob("*.md"))
}


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_a_page_are_current(page: str) -> None:
    assert tables.current(PAGES[page]) == PAGES[page], "run: python docs/site_build/tables.py"


def test_every_table_is_on_a_page() -> None:
    text = "".join(PAGES.values())
    assert all(f"<!-- table: {name} -->" in text for name in tables.TABLES)
