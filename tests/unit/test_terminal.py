"""What models, engines and servers write reaches a terminal without its control sequences."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from rich.table import Table
from rich.text import Text

from llmrun_cli import terminal
from llmrun_cli.commands import chat, models
from llmrun_cli.terminal import printable

# A title, the clipboard, a link, colors, the cursor; C1; a bell, a backspace.
HOSTILE = "a\x1b]0;title\x07b\x1b]52;c;eA==\x1b\\c\x1b[31md\x1b[2Je\x9b1mf\x9d0;x\x9cg\x07\x08\x7fh\x1b(Bi\tj\n"
SHOWN = "abcdefghi\tj\n"


class Screen(io.StringIO):
    """Standard output; a terminal or not."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal = terminal

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._terminal


@pytest.fixture(params=[True, False], ids=["terminal", "file"])
def screen(request: pytest.FixtureRequest) -> Screen:
    """What a test redirects standard output to."""
    return Screen(request.param)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, SHOWN),
        ("é ✓ 漢\n\tx", "é ✓ 漢\n\tx"),
        ("a\r\nb", "a\nb"),
        ("10%\r20%\r100%\n", "10%\n20%\n100%\n"),
        ("\x1b]0;the text after a string without an end", "]0;the text after a string without an end"),
        ("\x1b]0;two\nlines\x07", "]0;two\nlines"),
        ("\x1b\x1b[0m[31mred", "[31mred"),
        ("half a sequence\x1b", "half a sequence"),
        ("\x1bPq#0\x1b\\\x1b_x\x1b\\\x1bcend", "end"),
    ],
)
def test_control_sequences_are_removed(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_no_control_character_is_left_wherever_a_text_is_cut() -> None:
    for at in range(len(HOSTILE)):
        left = printable(HOSTILE[:at]) + printable(HOSTILE[at:])
        assert not [char for char in left if char not in "\n\t" and (char < " " or "\x7f" <= char <= "\x9f")]


def test_logs_are_printable_on_a_terminal(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def __init__(self, settings: object) -> None: ...

        def logs(self, model: str, tail: int, follow: bool) -> Iterator[dict[str, str]]:
            yield {"source": "engine", "text": HOSTILE}

    monkeypatch.setattr(models, "Client", Client)
    with contextlib.redirect_stdout(screen):
        models.logs("m")
    assert screen.getvalue() == (SHOWN if screen.isatty() else HOSTILE)


def test_replies_are_printable_on_a_terminal_and_kept_as_sent(screen: Screen) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return httpx.Response(404)
        event = {"choices": [{"delta": {"content": HOSTILE}}]}
        return httpx.Response(200, text=f"data: {json.dumps(event)}\n\ndata: [DONE]\n\n")

    http = httpx.Client(base_url="http://a", transport=httpx.MockTransport(respond))
    with http, contextlib.redirect_stdout(screen):
        assert chat._reply(http, {"model": "m"}) == HOSTILE
    assert screen.getvalue() == (SHOWN if screen.isatty() else HOSTILE) + "\n"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_other_output_is_printable_on_a_terminal(is_terminal: bool) -> None:
    shown = io.StringIO()
    options: dict[str, Any] = {"file": shown, "force_terminal": is_terminal, "width": 200}
    console = terminal._console(color_system="truecolor" if is_terminal else None, **options)
    table = Table(box=None)
    table.add_row("cell \x1b[2J")
    for item in ("text \x1b[2J", Text("styled \x1b[2J", style="red"), table):
        console.print(item)
    text = shown.getvalue()
    assert text.count("\x1b[2J") == (0 if is_terminal else 3)
    assert all(word in text for word in ("text", "styled", "cell"))
    assert ("\x1b[31m" in text) == is_terminal, "rich's own styles stay"
