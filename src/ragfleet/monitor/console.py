"""What a person sees while a run goes on: a line per worker on a terminal, few lines elsewhere.

Progress goes to stderr, results of a command to stdout. Text that a model or a file brought is
stripped of control characters, and a terminal that is gone never stops a run.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TextIO

from ragfleet.beats import Beat
from ragfleet.events import Event
from ragfleet.plain_text import indented, one_line, printable

if TYPE_CHECKING:
    from rich.live import Live

_RATE_WINDOW_S: Final = 60.0


class Console:
    """An `on_event` that draws. Use as a context manager, so that a live view is always closed."""

    def __init__(self, stream: TextIO | None = None, verbose: bool = False) -> None:
        """`verbose` shows the notes of every worker and when each step began."""
        # A process without a terminal may have no stderr at all; what goes there is lost.
        self._stream = stream or sys.stderr or io.StringIO()
        self._is_terminal = self._stream.isatty()
        self._live: Live | None = None
        self._started_s = time.monotonic()
        self._next_line_s = 10.0
        self._history: list[tuple[float, int]] = []
        self._first_shown = False
        self._failures_shown: set[str] = set()
        self._verbose = verbose

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close_live()

    def __call__(self, event: Event) -> None:
        if event.kind == "progress":
            self._progress(event.data)
        elif event.kind == "first":
            if not self._first_shown:
                self._first(event.data)
            self._first_shown = True
        elif event.kind == "failure":
            where = one_line(str(event.data.get("id") or f"line {event.data.get('line_no')}"))
            kind = one_line(str(event.data.get("error_type")))
            if kind in self._failures_shown:
                return  # every worker tells its own first one
            self._failures_shown.add(kind)
            self.line(
                f"First failure of kind {kind}: {where}:"
                f" {indented(event.message).removesuffix('.')}. More of this"
                " kind are only counted."
            )
        elif event.kind == "ready":
            self.line(f"worker {event.rank} ready: {event.message}")
            if event.rank == 0 or self._verbose:
                for note in event.data.get("notes", []):
                    self.line(f"  note: {note}")
        elif event.kind in ("reading", "writing"):
            self._show([event.message], event.message)
        elif event.kind == "merging":
            self._close_live()
            self.line(event.message)
        elif event.message:
            self.line(event.message)

    def line(self, text: str) -> None:
        """Print above the live view."""
        text = printable(text)
        if self._verbose:
            text = f"[{time.monotonic() - self._started_s:8.2f} s] {text}"
        try:
            if self._live is not None:
                self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                self._stream.write(text + "\n")
                self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone
            self._live, self._is_terminal = None, False

    def _first(self, data: Mapping[str, Any]) -> None:
        prompt, answer = str(data.get("prompt", "")), str(data.get("answer", ""))
        tokens = "" if data.get("prompt_tokens") is None else f", {data['prompt_tokens']} tokens"
        made = f"{data.get('finish_reason')}, {data.get('seconds', 0.0):.2f}s"
        if data.get("completion_tokens") is not None:
            made = f"{data['completion_tokens']} tokens, {made}"
        self.line(
            f"First prompt ends ({one_line(str(data.get('id')))}{tokens}): …{_short(prompt[-160:])}"
        )
        self.line(f"First answer ({made}): {_short(answer)}")

    # ---- progress

    def _progress(self, data: Mapping[str, Any]) -> None:
        beats: Mapping[str, Beat] = data["beats"]
        now_s = time.monotonic() - self._started_s
        finished = sum(beat.succeeded + beat.failed for beat in beats.values())
        failed = sum(beat.failed for beat in beats.values())
        self._history.append((now_s, finished))
        while len(self._history) > 2 and self._history[1][0] < now_s - _RATE_WINDOW_S:
            self._history.pop(0)
        total = self._total_line(finished, failed, data["left"], data["kept"])
        if data.get("cost") is not None:
            total += f" · cost {data['cost']:,.4f}"
        newest: dict[int, Beat] = {}
        for owner, beat in sorted(beats.items(), key=lambda item: _incarnation(item[0])):
            newest[int(owner.partition(".")[0])] = beat
        states = [beat.state for beat in newest.values()]
        at_work = sum(state == "generating" for state in states)
        self._show(
            [total, *(_worker_line(rank, newest[rank]) for rank in sorted(newest))],
            f"{total} · {at_work}/{len(states)} generating",
        )

    def _show(self, lines: list[str], summary: str) -> None:
        """All of it on a terminal; elsewhere a line with the time, when one is due."""
        now_s = time.monotonic() - self._started_s
        if self._is_terminal:
            self._draw(lines)
        elif now_s >= self._next_line_s:
            self.line(f"{time.strftime('%H:%M:%S')} {summary}")
            self._next_line_s = _next_line_s(now_s)

    def _total_line(self, finished: int, failed: int, left: int, kept: int) -> str:
        (start_s, before), (now_s, _) = self._history[0], self._history[-1]
        rate = (finished - before) / (now_s - start_s) if now_s > start_s else 0.0
        parts = [
            f"{finished:,}/{left:,} ({finished / max(left, 1):.1%})",
            f"{rate:.1f}/s",
            f"{failed:,} failed",
        ]
        if kept:
            parts.append(f"{kept:,} kept from before")
        if rate > 0:
            parts.append(f"{_duration((left - finished) / rate)} left")
        return " · ".join(parts)

    def _draw(self, lines: list[str]) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live
        from rich.text import Text

        try:
            if self._live is None:
                console = RichConsole(file=self._stream)
                self._live = Live(console=console, auto_refresh=False, transient=True)
                self._live.start()
            text = Text("\n".join(printable(line) for line in lines), overflow="ellipsis")
            text.no_wrap = True
            self._live.update(text, refresh=True)
        except (OSError, ValueError):
            self._live, self._is_terminal = None, False

    def _close_live(self) -> None:
        if self._live is not None:
            live, self._live = self._live, None
            try:
                live.stop()
            except (OSError, ValueError):
                self._is_terminal = False


def _worker_line(rank: int, beat: Beat) -> str:
    done = beat.succeeded + beat.failed
    parts = [f"worker {rank}", f"{beat.state:<10}", f"{done:,} done", f"{beat.in_flight} in flight"]
    if beat.progress:
        parts.append(f"{beat.progress:,} tokens")
    if beat.oldest_s > 30:
        parts.append(f"oldest {_duration(beat.oldest_s)}")
    if beat.stolen:
        parts.append(f"{beat.stolen} chunks stolen")
    return " · ".join(parts)


def _incarnation(owner: str) -> int:
    return int(owner.partition(".")[2])


def _next_line_s(now_s: float) -> float:
    """10 s, 30 s, each minute; each five minutes after the first hour: logs stay readable."""
    for step_s in (10.0, 30.0, 60.0):
        if now_s < step_s:
            return step_s
    return now_s + (60.0 if now_s < 3600 else 300.0)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _short(text: str) -> str:
    return repr(text)[1:-1] if len(text) <= 200 else repr(text[:200])[1:-1] + "…"
