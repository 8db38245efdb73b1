"""`ragfleet corpus | contexts | pipeline`: their arguments, their exit codes, what they print."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ragfleet.arguments import parse, parse_config, with_config_file
from ragfleet.cli import interrupt_on_signals
from ragfleet.errors import ConfigError
from ragfleet.monitor.console import Console
from ragfleet.plain_text import printable

if TYPE_CHECKING:
    from ragfleet.corpus.build import Built

_CORPUS_HELP: Final = """\
usage: ragfleet corpus build PACKAGE==VERSION … [OPTIONS]
       ragfleet corpus check DIR

  build    make corpora from the package index, without executing any of the packages' code
  check    say what is usable in a folder of corpora, yours or made

ragfleet corpus build --help lists its options.
"""


def corpus(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_CORPUS_HELP, end="")
        return 0 if arguments else 2
    action, rest = arguments[0], arguments[1:]
    if action == "build":
        return _build(rest)
    if action == "check":
        return _check(rest)
    raise ConfigError(f"ragfleet corpus {action}: there is build and check.")


def _build(arguments: list[str]) -> int:
    from ragfleet.corpus.build import BuildOptions, build_all

    requirements = []
    while arguments and not arguments[0].startswith("-"):
        requirements.append(arguments.pop(0))
    options = parse(BuildOptions, arguments, "ragfleet corpus build PACKAGE==VERSION …")
    if options is None:
        return 0
    interrupt_on_signals()
    with _BuildProgress(len(set(requirements))) as progress:
        built = build_all(requirements, options, progress)
    failed = [each for each in built if each.manifest is None]
    unreadable = sum(len(each.manifest.parse_failures) for each in built if each.manifest)
    print(
        f"{len(built) - len(failed)} corpora in {options.corpus_path}; {unreadable} files could not"
        f" be read (named in the manifests); {len(failed)} packages failed."
    )
    return 1 if failed else 0


class _BuildProgress:
    """A line per package, and a bar below them on a terminal."""

    def __init__(self, total: int) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

        self._done, self._total = 0, total
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        console = RichConsole(stderr=True)
        self._bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self._task = self._bar.add_task("corpora", total=total)

    def __enter__(self) -> _BuildProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, built: Built) -> None:
        self._done += 1
        print(printable(f"[{self._done}/{self._total}] {built.line()}"), flush=True)
        self._bar.advance(self._task)


def _check(arguments: list[str]) -> int:
    from ragfleet.corpus.folder import check_folder

    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: ragfleet corpus check DIR")
        return 0 if set(arguments) & {"-h", "--help"} else 2
    lines, is_usable = check_folder(Path(arguments[0]))
    print(printable("\n".join(lines)))
    return 0 if is_usable else 1


def contexts(arguments: list[str]) -> int:
    from ragfleet.contexts.options import ContextsOptions

    arguments = with_config_file(arguments, ContextsOptions)
    options = parse(ContextsOptions, arguments, "ragfleet contexts")
    if options is None:
        return 0
    from ragfleet.contexts.generate import generate_contexts

    interrupt_on_signals()
    summary = generate_contexts(options, _say)
    print(printable("\n".join(summary.lines())))
    return 0


def pipeline(arguments: list[str]) -> int:
    from ragfleet.config import RunConfig
    from ragfleet.pipeline import PipelineOptions, run_pipeline

    arguments = with_config_file(arguments, PipelineOptions, RunConfig)
    own, rest = split_arguments(arguments, PipelineOptions)
    if set(rest) & {"-h", "--help"}:
        own = ["--help"]
    options = parse(PipelineOptions, own, "ragfleet pipeline")
    if options is None:
        print("Besides these, every option of `ragfleet infer`; --output_file is needed.")
        return 0
    # infer's own --contexts_file is made from the results file's name where it isn't given.
    config = parse_config(["--contexts_file", "-", *rest], "ragfleet pipeline")
    assert config is not None
    config = config.replace(contexts_file=options.contexts_file_for(config.output_file))
    from ragfleet.monitor.statistics import full_text

    interrupt_on_signals()
    with Console(verbose=config.verbose) as console:
        summary = run_pipeline(options, config, console.line, console)
    if summary is None:
        return 0
    print(printable(full_text(summary.inference)))
    return summary.inference.exit_code


def split_arguments(arguments: Sequence[str], kind: type[Any]) -> tuple[list[str], list[str]]:
    """The options of `kind` with their values, and all others."""
    names = {field.name for field in dataclasses.fields(kind)}
    groups: tuple[list[str], list[str]] = ([], [])
    group = groups[1]
    for text in arguments:
        if text.startswith("--"):
            name = text[2:].partition("=")[0].replace("-", "_")
            group = groups[0] if {name, name.removeprefix("no_")} & names else groups[1]
        group.append(text)
    return groups


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
