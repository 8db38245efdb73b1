"""The command line: `ragfleet infer | plan | merge | corpus | contexts | pipeline | …`.

Owns the commands, their exit codes and what is printed. Start-up stays instant: each command
imports what it needs when it runs.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TextIO

from ragfleet.arguments import parse, parse_config
from ragfleet.errors import STORAGE_ERRNOS, ConfigError, Interrupted, RagfleetError, RunError

_HELP: Final = """\
usage: ragfleet COMMAND [OPTIONS]

Offline batch inference for retrieval-augmented generation: one result per input line, in order.

commands:
  infer    answer a contexts file and merge the results (resumes by itself)
  plan     show what infer would do, without loading a model
  show     print the exact prompt of one record: ragfleet show ID [the same options as infer]
  status   what a run has finished: ragfleet status --output_file FILE
  merge    merge what is finished: ragfleet merge --output_file FILE [--partial]
  verify   prove a results file: ragfleet verify CONTEXTS RESULTS
  failures print the input lines that failed: ragfleet failures RESULTS > again.jsonl
  corpus   make API corpora: ragfleet corpus build PACKAGE==VERSION …; check DIR
  contexts generate a context for every query of a file
  pipeline corpora, contexts and answers in one go: queries in, results out
  export   write unfinished requests as a batch file: ragfleet export FILE [options as infer]
  import   take the replies of such a file: ragfleet import FILE --output_file OUTPUT

ragfleet COMMAND --help lists a command's options. To infer, plan, show, export, contexts and
pipeline, --config FILE.toml gives any of them; options on the command line win.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 1 run failed, 2 usage, 3 failed rows, 128 + signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # to a file, nothing is written before
    except RagfleetError as error:
        _report(error, arguments)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nragfleet: interrupted; what is finished is safe.", file=sys.stderr)
        return 130
    except OSError as error:
        found = _known(error)
        if found is None:
            raise
        return found
    finally:
        try:
            sys.stderr.flush()
        except OSError:
            _lead_nowhere(sys.stderr)
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        import ragfleet

        print(f"ragfleet {ragfleet.__version__}")
        return 0
    command = _COMMANDS.get(arguments[0])
    if command is None:
        import difflib

        near = difflib.get_close_matches(arguments[0], _COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"ragfleet: there is no command {arguments[0]}.{hint}", file=sys.stderr)
        return 2
    return command(arguments[1:])


def _infer(arguments: list[str]) -> int:
    config = parse_config(arguments, "ragfleet infer")
    if config is None:
        return 0
    from ragfleet.monitor.console import Console
    from ragfleet.monitor.statistics import full_text
    from ragfleet.runner import run

    interrupt_on_signals()
    if config.private:
        os.umask(0o077)  # also what nobody can reach anyway, inside the run's closed folder
    with Console(verbose=config.verbose) as console:
        summary = run(config, console, owns_process=True)
    if summary is None:  # a torchrun rank above 0: rank 0 tells
        return 0
    try:
        _print(full_text(summary))
        sys.stdout.flush()
    except OSError as error:
        if _known(error, f"The results are complete: {summary.output_file}.") is None:
            raise
    return summary.exit_code


def _plan(arguments: list[str]) -> int:
    from ragfleet.config import PlanConfig

    config = parse_config(arguments, "ragfleet plan", plan=True, kind=PlanConfig)
    if config is None:
        return 0
    from ragfleet.inspection import plan_lines
    from ragfleet.monitor.console import Console

    assert isinstance(config, PlanConfig)
    with Console() as console:
        lines = plan_lines(config, console)
    _print("\n".join(lines))
    return 0


def _show(arguments: list[str]) -> int:
    identifier = next((text for text in arguments[:1] if not text.startswith("-")), None)
    if identifier is None:
        if set(arguments) & {"-h", "--help"}:
            parse_config(arguments, "ragfleet show ID")
            return 0
        raise ConfigError("ragfleet show needs an id: ragfleet show ID --contexts_file … .")
    config = parse_config(arguments[1:], "ragfleet show ID", plan=True)
    if config is None:
        return 0
    from ragfleet.prompt_view import rendered_prompt

    prompt, facts = rendered_prompt(config, identifier)
    _print(facts, sys.stderr)
    if sys.stdout.isatty():
        _print(prompt)
    else:
        print(prompt)  # exactly, for whoever compares it
    return 0


def _status(arguments: list[str]) -> int:
    from ragfleet.inspection import OutputOptions, status_lines

    options = parse(OutputOptions, arguments, "ragfleet status")
    if options is not None:
        _print("\n".join(status_lines(options)))
    return 0


def _merge(arguments: list[str]) -> int:
    from ragfleet.inspection import MergeOptions, merge_now

    options = parse(MergeOptions, arguments, "ragfleet merge")
    if options is not None:
        _print(merge_now(options))
    return 0


def _verify(arguments: list[str]) -> int:
    contexts, results = _paths(arguments, "ragfleet verify CONTEXTS RESULTS", 2)
    from ragfleet.verify import verify

    found = verify(contexts, results)
    _print("\n".join(found.lines(results)))
    return 1 if found.num_problems else 0


def _failures(arguments: list[str]) -> int:
    (results,) = _paths(arguments, "ragfleet failures RESULTS", 1)
    from ragfleet.verify import failed_inputs

    for line in failed_inputs(results):
        if sys.stdout.isatty():
            _print(line.decode("utf-8", "replace").rstrip("\n"))
        else:
            sys.stdout.buffer.write(line)
    return 0


def _print(text: str, stream: TextIO | None = None) -> None:
    """For all that may hold a piece of a record, an answer or a user's error."""
    from ragfleet.plain_text import printable

    print(printable(text), file=stream)


def _paths(arguments: list[str], usage: str, count: int) -> list[Path]:
    if set(arguments) & {"-h", "--help"}:
        print(f"usage: {usage}")
        raise SystemExit(0)
    if len(arguments) != count or any(text.startswith("-") for text in arguments):
        raise ConfigError(f"usage: {usage}")
    return [Path(text) for text in arguments]


def _corpus(arguments: list[str]) -> int:
    from ragfleet.context_commands import corpus

    return corpus(arguments)


def _contexts(arguments: list[str]) -> int:
    from ragfleet.context_commands import contexts

    return contexts(arguments)


def _pipeline(arguments: list[str]) -> int:
    from ragfleet.context_commands import pipeline

    return pipeline(arguments)


def _export(arguments: list[str]) -> int:
    file, rest = _take_file(arguments, "export")
    config = parse_config(rest, "ragfleet export FILE")
    if config is None or file is None:
        return 0
    from ragfleet.batch_files import export_requests

    print("\n".join(export_requests(config, file)))
    return 0


def _import(arguments: list[str]) -> int:
    file, rest = _take_file(arguments, "import")
    from ragfleet.inspection import OutputOptions

    options = parse(OutputOptions, rest, "ragfleet import FILE")
    if options is None or file is None:
        return 0
    from ragfleet.batch_files import import_replies

    print("\n".join(import_replies(options.output_file, file)))
    return 0


def _take_file(arguments: list[str], command: str) -> tuple[Path | None, list[str]]:
    if arguments and not arguments[0].startswith("-"):
        return Path(arguments[0]), arguments[1:]
    if set(arguments) & {"-h", "--help"}:
        return None, arguments
    raise ConfigError(f"ragfleet {command} needs a file: ragfleet {command} FILE … .")


_COMMANDS: Final[dict[str, Callable[[list[str]], int]]] = {
    "infer": _infer,
    "plan": _plan,
    "show": _show,
    "status": _status,
    "merge": _merge,
    "verify": _verify,
    "failures": _failures,
    "corpus": _corpus,
    "contexts": _contexts,
    "pipeline": _pipeline,
    "export": _export,
    "import": _import,
}


# ---- streams, signals and errors


def _open_closed_streams() -> None:
    """Let closed streams (`2>&-`) lead nowhere, before another file takes their place."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is not None:
            continue
        try:
            os.fstat(fd)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != fd:
                os.dup2(opened, fd)
                os.close(opened)
            os.set_inheritable(fd, True)
        nowhere = os.open(os.devnull, os.O_RDWR)
        setattr(sys, name, os.fdopen(nowhere, "w" if fd else "r", encoding="utf-8"))


def _known(error: OSError, note: str = "") -> int | None:
    """The exit code where it is the place that is wrong, which is said; None for other errors."""
    if isinstance(error, BrokenPipeError):
        text = ""
    elif error.filename is None and error.errno in STORAGE_ERRNOS:
        text = f"Can't write the output: {error.strerror}."
    elif isinstance(error, FileNotFoundError) and not _has_directory():
        text = "The working directory is gone: cd into one that exists."
    else:
        return None
    if text:
        with contextlib.suppress(OSError):
            _print(f"ragfleet: {text}{note and ' '}{note}", sys.stderr)
    if isinstance(error, FileNotFoundError):
        return 2
    _lead_nowhere(sys.stdout)
    return 1


def _lead_nowhere(stream: TextIO) -> None:
    """Python flushes what is left at its end, and its exit code is 120 where that fails."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _has_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


_RESUMABLE: Final = ("infer", "corpus", "contexts", "pipeline")


def interrupt_on_signals() -> None:
    """Leave reading and merging cleanly too; while workers run, their supervisor has the signals.

    What is ignored from the start (nohup) stays ignored.
    """
    import signal

    def interrupt(number: int, frame: object) -> None:
        raise Interrupted("Interrupted. What is finished is safe.", number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def _report(error: RagfleetError, arguments: list[str]) -> None:
    text = str(error)
    rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
    resumable = isinstance(error, Interrupted | RunError) and arguments[0] in _RESUMABLE
    if rank != "0" and resumable:  # rank 0 says what is kept and how to go on, once for all
        if isinstance(error, Interrupted):
            return
        text = f"rank {rank}: {text}"
    elif resumable:
        text += f"\nGo on with:\n  {resume_command(arguments)}"
    try:
        _print(f"ragfleet: {text}", sys.stderr)
    except OSError:
        return  # the terminal is gone; the exit code and the log say it
    if os.environ.get("RANK", "0") == "0":
        from ragfleet.launchers.torchrun import report_error

        report_error(os.environ, text)
    if {"--verbose"} & set(arguments):
        import traceback

        traceback.print_exception(error)


def resume_command(arguments: Sequence[str]) -> str:
    """The command that goes on with this run: the same one, without --overwrite."""
    rest = [text for text in arguments[1:] if text not in ("--overwrite", "--no_overwrite")]
    script = sys.argv[0] if sys.argv and sys.argv[0].endswith(".py") else None
    if script is not None and Path(script).name == "__main__.py":
        script = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
        words = ["torchrun", "--standalone", f"--nproc_per_node={processes}"]
        words += [script] if script else ["-m", "ragfleet", arguments[0]]
    elif script:
        words = [_python(), script]
    else:
        words = ["ragfleet", arguments[0]]
    if any(text.partition("=")[0] == "--config" for text in rest):
        rest.append("--no_overwrite")  # the file may hold it
    return shlex.join([*words, *rest])


def _python() -> str:
    """How this interpreter is called: `python` where that is the one on the PATH."""
    found = shutil.which("python")
    return "python" if found and os.path.samefile(found, sys.executable) else sys.executable


if __name__ == "__main__":
    sys.exit(main())
