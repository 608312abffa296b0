"""The generated pages of docs/reference are current."""

from __future__ import annotations

import pytest

from tests.support.reference import FOLDER, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_generated_pages_are_current(name: str) -> None:
    assert (FOLDER / name).read_text() == PAGES[name](), "run `just reference`"
