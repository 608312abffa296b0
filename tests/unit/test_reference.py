"""The pages of docs/reference are current."""

from __future__ import annotations

import pytest

from tests.support.reference import FOLDER, PAGES


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_what_the_code_generates(name: str) -> None:
    assert (FOLDER / name).read_text() == PAGES[name](), "run `just reference`"
