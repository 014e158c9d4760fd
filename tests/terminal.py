"""A terminal that tests print on, and a stranger's text that acts on one."""

from __future__ import annotations

import io

from verify.report.tables import OutputConsole

#: Markup of rich, an emoji's name, ESC, BEL, CR, C1, a direction override and a lone surrogate.
NASTY = "a[bold]b[/bold] [/x] :smile: \x1b]0;owned\x07 \r\x9b2J \u202egnp.exe \ud800"
SHOWN = r"a[bold]b[/bold] [/x] :smile: \x1b]0;owned\x07 \r\x9b2J \u202egnp.exe \ud800"


def console() -> tuple[OutputConsole, io.TextIOWrapper]:
    """A console whose stream refuses what is no UTF-8, as a terminal's does."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    made = OutputConsole(400)
    made.file = stream
    return made, stream


def text_of(stream: io.TextIOWrapper) -> str:
    """What was printed; nothing in it acts on a terminal."""
    stream.flush()
    buffer = stream.buffer
    assert isinstance(buffer, io.BytesIO)
    text = buffer.getvalue().decode()
    assert not [letter for letter in text if not letter.isprintable() and letter != "\n"]
    return text
