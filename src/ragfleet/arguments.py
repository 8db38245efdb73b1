"""From the words of a command line and a TOML file to a configuration, or to what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ragfleet.errors import ConfigError

if TYPE_CHECKING:
    from ragfleet.config import RunConfig


def parse_config(
    arguments: Sequence[str], prog: str, plan: bool = False, kind: type[RunConfig] | None = None
) -> RunConfig | None:
    """A RunConfig from options, over those of `--config FILE.toml`; None when help was asked for.

    Args:
        plan: --output_file may be left out.
        kind: what else than a RunConfig is wanted: one with more settings.

    Raises:
        ConfigError: with what is wrong and, for an unknown option, the nearest one.
    """
    from ragfleet.config import RunConfig

    arguments = list(arguments)
    if any(text.partition("=")[0] in ("--api_key", "--api-key") for text in arguments):
        raise ConfigError(
            "An API key is not given as a flag, where others can read it: set it in the"
            " environment (OPENAI_API_KEY, TOGETHER_API_KEY, HF_TOKEN) or use --api_key_file."
        )
    arguments = with_config_file(arguments, kind or RunConfig)
    names = {text.partition("=")[0].replace("-", "_") for text in arguments}
    if plan and "__output_file" not in names:
        arguments = ["--output_file", "results.jsonl", *arguments]
    config: RunConfig | None = parse(kind or RunConfig, arguments, prog)
    return config


def parse(kind: type[Any], arguments: Sequence[str], prog: str) -> Any:
    import tyro

    try:
        return tyro.cli(
            kind,
            prog=prog,
            args=list(arguments),
            use_underscores=True,
            registry=_registry(),
        )
    except SystemExit as stop:
        if stop.code in (0, None):
            return None
        raise


def _registry() -> Any:
    """tyro's rule for options that are JSON objects."""
    import json

    import tyro

    def parse_object(values: list[str]) -> dict[str, Any]:
        try:
            value = json.loads(values[0])
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def json_object(info: Any) -> Any:
        if info.type != dict[str, Any]:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="JSON",
            instance_from_str=parse_object,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [json.dumps(value)],
        )

    return registry


def with_config_file(arguments: Sequence[str], *kinds: type[Any]) -> list[str]:
    """The options, after those of `--config FILE.toml`: the later of two equal ones wins."""
    config_file, arguments = _take_config_option(list(arguments))
    if config_file is None:
        return arguments
    return [*_toml_arguments(Path(config_file), *kinds), *arguments]


def _take_config_option(arguments: list[str]) -> tuple[str | None, list[str]]:
    for number, text in enumerate(arguments):
        if text == "--config":
            if number + 1 == len(arguments):
                raise ConfigError("--config needs a TOML file.")
            return arguments[number + 1], arguments[:number] + arguments[number + 2 :]
        if text.startswith("--config="):
            return text.partition("=")[2], arguments[:number] + arguments[number + 1 :]
    return None, arguments


def _toml_arguments(path: Path, *kinds: type[Any]) -> list[str]:
    """The options a TOML file stands for."""
    import dataclasses
    import difflib
    import json
    import tomllib
    from typing import get_type_hints

    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"--config {path} can't be read: {reason}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--config {path} is not valid TOML: {error}") from None
    known: dict[str, Any] = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        known |= {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    arguments = []
    for name, value in table.items():
        key = name.replace("-", "_")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{path}: there is no setting {name}.{hint}")
        if not _may_be(value, known[key]):
            shown = json.dumps(value, default=str, ensure_ascii=False)
            raise ConfigError(f"{path}: {name} is {shown}; it must be {_wanted(known[key])}.")
        if isinstance(value, bool):
            arguments.append(f"--{key}" if value else f"--no_{key}")
        elif isinstance(value, list):
            first, *more = map(str, value or [""])
            arguments += [f"--{key}={first}" if value else f"--{key}", *more]
        elif isinstance(value, dict):
            arguments.append(f"--{key}={json.dumps(value, default=str)}")
        else:
            arguments.append(f"--{key}={value}")
    return arguments


def _may_be(value: Any, kind: Any) -> bool:
    """Whether a value of a TOML file can be a setting of this type; texts are read as options are.

    Asked here, because the same words as options would pass for others: `overwrite = "yes"` for a
    stray word, and `seed = true` for an option without its value.
    """
    import json
    from types import NoneType, UnionType
    from typing import Literal, Union, get_args, get_origin

    origin = get_origin(kind) or kind
    if origin in (Union, UnionType):
        return any(_may_be(value, each) for each in get_args(kind))
    if origin is Literal:
        return value in get_args(kind)
    if kind is NoneType:
        return bool(value == "None")
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    if origin is tuple:
        return not isinstance(value, dict)
    if origin is dict:
        try:
            return isinstance(json.loads(value) if isinstance(value, str) else value, dict)
        except ValueError:
            return False
    if kind in (int, float):
        try:
            kind(value if isinstance(value, str) else str(value))
        except ValueError:
            return False
    return not isinstance(value, list | dict)


def _wanted(kind: Any) -> str:
    """What a setting of this type must be, for people."""
    from types import NoneType, UnionType
    from typing import Literal, Union, get_args, get_origin

    origin = get_origin(kind) or kind
    if origin in (Union, UnionType):
        return " or ".join(_wanted(each) for each in get_args(kind) if each is not NoneType)
    if origin is Literal:
        return " or ".join(get_args(kind))
    names = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
    return {**names, tuple: "a list of strings", dict: "a table"}.get(origin, "a string")
