"""What is drawn: nothing that moves a cursor, few lines into a log, and never an exception."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ragfleet.beats import Beat
from ragfleet.events import Event
from ragfleet.monitor import console as module
from ragfleet.monitor.console import Console
from ragfleet.plain_text import indented, one_line, printable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Gone(Terminal):
    """A terminal whose other end was closed."""

    def __init__(self, error: Exception, terminal: bool) -> None:
        super().__init__()
        self.error, self.terminal = error, terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    fake = SimpleNamespace(monotonic=lambda: now[0], strftime=lambda form: "12:00:00")
    monkeypatch.setattr(module, "time", fake)
    return now


def progress(succeeded: int = 0, failed: int = 0, left: int = 100, **others: Any) -> Event:
    beat = Beat(owner="0.0", sequence=1, state="generating", succeeded=succeeded, failed=failed)
    return Event("progress", data={"beats": {"0.0": beat}, "kept": 0, "left": left} | others)


def every_event() -> list[Event]:
    return [
        Event("header", "header"),
        Event("note", "note"),
        Event("reading", "read 5 records"),
        Event("ready", "model", 0, {"notes": ["a note"]}),
        progress(1),
        Event("first", "", 0, {"prompt": "p", "answer": "a", "id": "x", "finish_reason": "stop"}),
        Event("failure", "why", 1, {"error_type": "oom", "id": None, "line_no": 3}),
        Event("died", "worker 1 died", 1),
        progress(2),
        Event("merging", "Merging."),
        Event("writing", "merged 5 rows"),
        Event("summary"),
    ]


# ---- hostile text


HOSTILE = "\x1b[31mred\x1b]0;title\x07\x9b2J\r\x08\u202eesrever\u2066\u200f\x00\x7f"


def test_control_characters_become_visible() -> None:
    clean = printable(HOSTILE)
    assert clean.isprintable()
    assert "red" in clean
    assert "esrever" in clean
    assert printable("中文 emoji 👩\u200d🔬 tab\tline\n") == "中文 emoji 👩\u200d🔬 tab\tline\n"


def test_names_and_messages_of_others_never_look_like_lines_of_ours() -> None:
    assert one_line("r1\n\r\u2028FINISHED: 9 of 9\x1b[0m") == "r1 FINISHED: 9 of 9\ufffd[0m"
    assert indented("broken\nFINISHED\x85x") == "broken\n    FINISHED\n    x"
    out = io.StringIO()
    forged = "x\nFINISHED: 9 of 9"
    with Console(out) as console:
        console(Event("failure", forged, 0, {"error_type": forged, "id": forged}))
        console(Event("first", "", 0, {"prompt": forged, "answer": forged, "id": forged}))
    assert not [line for line in out.getvalue().splitlines() if line.startswith("FINISHED")]


@given(st.text(st.characters(codec="utf-8")))
def test_printable_keeps_all_that_is_printable(text: str) -> None:
    clean = printable(text)
    assert len(clean) == len(text)
    for before, after in zip(text, clean, strict=True):
        if before.isprintable() or before in "\t\n":
            assert after == before
        assert not (ord(after) < 32 and after not in "\t\n")
        assert not 0x7F <= ord(after) <= 0x9F


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_nothing_that_a_model_or_a_file_says_reaches_the_terminal_raw(stream: Any) -> None:
    out = stream()
    with Console(out) as console:
        hostile = {"prompt": HOSTILE, "answer": HOSTILE, "id": HOSTILE, "finish_reason": HOSTILE}
        console(Event("first", "", 0, hostile))
        console(Event("failure", HOSTILE, 0, {"error_type": "oom", "id": HOSTILE}))
        console(Event("ready", HOSTILE, 0, {"notes": [HOSTILE]}))
        console(Event("note", HOSTILE))
        console(Event("merging", HOSTILE))
    text = out.getvalue()
    assert "red" in text
    assert text.replace("\n", "").isprintable()
    assert "[31m" in text, "visible, as text"


def test_a_live_view_shows_no_markup_and_no_escapes_of_others() -> None:
    out = Terminal()
    with Console(out) as console:
        console(Event("reading", "\x1b]0;evil\x07[bold]read"))
        console(Event("note", "[red]note[/red] \x1b[5mblink"))
    assert "\x1b]0;" not in out.getvalue()
    assert "\x1b[5m" not in out.getvalue()
    assert "[red]note[/red]" in out.getvalue()
    assert "[bold]read" in out.getvalue()


# ---- lines of a log


def test_a_log_gets_lines_at_10_s_30_s_each_minute_and_each_five_after_an_hour(
    clock: list[float],
) -> None:
    out = io.StringIO()
    console = Console(out)
    start, told = clock[0], []
    for second in range(3 * 3600):
        clock[0] = start + second
        console(progress(second, left=20000))
        if out.getvalue():
            told.append(second)
            out.seek(0)
            out.truncate()
    minutes = list(range(60, 3600 + 1, 60))
    assert told == [10, 30, *minutes, *range(3900, 3 * 3600, 300)]


@pytest.mark.parametrize("kind", ["reading", "writing"])
def test_a_log_tells_of_a_long_read_or_merge_when_a_line_is_due(
    kind: str, clock: list[float]
) -> None:
    out = io.StringIO()
    console = Console(out)
    for seconds in (1, 8, 2, 9, 11):  # 1, 9, 11, 20 and 31 s after the start
        clock[0] += seconds
        console(Event(kind, f"{clock[0] - 1000:.0f} s"))
    assert out.getvalue() == "12:00:00 11 s\n12:00:00 31 s\n"


def test_a_line_of_progress(clock: list[float]) -> None:
    out = io.StringIO()
    console = Console(out)
    console(progress(0, left=1000, kept=20))
    clock[0] += 10
    beats = {
        "0.0": Beat(owner="0.0", sequence=9, state="left", succeeded=30),
        "0.1": Beat(owner="0.1", sequence=1, state="generating", succeeded=10),
        "1.0": Beat(owner="1.0", sequence=4, state="waiting", succeeded=55, failed=5),
    }
    console(Event("progress", data={"beats": beats, "kept": 20, "left": 1000}))
    assert out.getvalue() == (
        "12:00:00 100/1,000 (10.0%) · 10.0/s · 5 failed · 20 kept from before · 1 min 30 s left"
        " · 1/2 generating\n"
    )


def test_the_rate_is_that_of_the_last_minute(clock: list[float]) -> None:
    out = io.StringIO()
    console = Console(out)
    start = clock[0]
    for second in range(181):  # ten a second, then one
        clock[0] = start + second
        done = 10 * second if second <= 60 else 600 + (second - 60)
        console(progress(done, left=10**6))
    assert " · 1.0/s · " in out.getvalue().splitlines()[-1]


def test_nothing_to_do_divides_by_nothing(clock: list[float]) -> None:
    out = io.StringIO()
    console = Console(out)
    clock[0] += 60
    console(progress(0, left=0))
    console(Event("progress", data={"beats": {}, "kept": 5, "left": 0}))
    assert "0/0 (0.0%)" in out.getvalue()


def test_the_first_answer_is_shown_once_and_short() -> None:
    out = io.StringIO()
    console = Console(out)
    event = Event(
        "first",
        data={
            "prompt": "x" * 5000 + "\nQuestion: 怎么?\nAnswer:",
            "answer": "y" * 5000,
            "id": "r1",
            "prompt_tokens": 12,
            "completion_tokens": 3,
            "finish_reason": "length",
            "seconds": 1.5,
        },
    )
    console(event)
    console(event)
    first, second = out.getvalue().splitlines()
    assert first.startswith("First prompt ends (r1, 12 tokens): …x")
    assert first.endswith(r"\nQuestion: 怎么?\nAnswer:")
    assert second.startswith("First answer (3 tokens, length, 1.50s): yyy")
    assert len(first) < 300
    assert len(second) < 300


def test_failures_and_notes_say_where() -> None:
    out = io.StringIO()
    console = Console(out)
    console(Event("failure", "no room.", 1, {"error_type": "oom", "id": "r9", "line_no": 4}))
    console(Event("failure", "no room.", 0, {"error_type": "oom", "id": "r2", "line_no": 2}))
    console(Event("ready", "small", 0, {"notes": ["sampling is ours"]}))
    console(Event("ready", "small", 1, {"notes": ["sampling is ours"]}))
    console(Event("summary"))
    text = out.getvalue()
    assert "First failure of kind oom: r9: no room. More of this kind are only counted." in text
    assert text.count("sampling is ours") == 1, "all workers say the same"
    assert text.count("\n") == 4


# ---- streams that die


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(), OSError(5, "Input/output error"), ValueError("I/O operation on closed")],
    ids=lambda error: type(error).__name__,
)
def test_a_dead_stream_never_stops_a_run(error: Exception, terminal: bool) -> None:
    with Console(Gone(error, terminal)) as console:
        for event in every_event() * 2:
            console(event)


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("after", range(11))
def test_a_stream_may_be_closed_at_any_time(stream: Any, after: int) -> None:
    out = stream()
    with Console(out) as console:
        for number, event in enumerate(every_event()):
            if number == after:
                out.close()
            console(event)


def test_a_process_may_have_no_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    with Console(verbose=True) as console:
        for event in every_event():
            console(event)


def test_the_live_view_is_closed_when_a_run_fails() -> None:
    out = Terminal()

    def run() -> None:
        with Console(out) as console:
            console(progress(1))
            raise KeyError

    with pytest.raises(KeyError):
        run()
    hidden, shown = out.getvalue().rfind("\x1b[?25l"), out.getvalue().rfind("\x1b[?25h")
    assert 0 <= hidden < shown, "the cursor is back"
