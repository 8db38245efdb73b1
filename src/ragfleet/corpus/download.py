"""Archives from the package index, without running anything that is in them.

Wheels come through `pip download --only-binary :all:`, so that the user's pip settings, mirrors and
certificates apply. Sdists come through unearth, because `pip download` of an sdist executes its
setup.py. Neither installs anything.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ragfleet.errors import InputError, RagfleetError

_SDIST_SUFFIXES: Final = (".tar.gz", ".tgz", ".zip", ".tar.bz2", ".tar.xz")
MAX_ARCHIVE_BYTES: Final = 2 << 30
_TIMEOUT_S: Final = 600
_NAME: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_VERSION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+!_-]*")


_CREDENTIALS: Final = re.compile(r"//[^/@\s]+@")


class DownloadError(RagfleetError):
    """The index has no such thing, or can't be reached. Index addresses may hold a password."""

    def __init__(self, message: str) -> None:
        super().__init__(_CREDENTIALS.sub("//***@", message))


@dataclass(frozen=True, order=True)
class Requirement:
    """One `package==version`; `name` is normalised as package indexes do."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def parse_requirement(text: str) -> Requirement:
    """Raises InputError for anything but `name==version`."""
    name, equals, version = text.strip().partition("==")
    name, version = name.strip(), version.strip()
    if not equals or not _NAME.fullmatch(name) or not _VERSION.fullmatch(version):
        raise InputError(
            f"{text!r} is not `package==version`: contexts are made from exactly the version a"
            " query depends on, so name one, for instance numpy==1.16.6."
        )
    return Requirement(normal_name(name), version)


def normal_name(name: str) -> str:
    """PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True)
class Archive:
    path: Path
    kind: str
    sha256: str


def fetch_archives(requirement: Requirement, cache: Path) -> tuple[list[Archive], list[str]]:
    """The wheel and the sdist of one version, from `cache` or the index; and what went wrong.

    The index may lack either. Raises DownloadError when there is none, listing the versions there
    are.
    """
    folder = cache / requirement.name / requirement.version
    folder.mkdir(parents=True, exist_ok=True)
    problems: list[str] = []
    archives = []
    for kind, fetch in (("wheel", _fetch_wheel), ("sdist", _fetch_sdist)):
        found = _cached(folder, kind)
        if found is None and not (folder / f"no-{kind}").exists():
            try:
                found = _into(folder, requirement, fetch)
                if found is None:
                    (folder / f"no-{kind}").touch()
            except DownloadError as error:
                problems.append(str(error))
        if found is not None:
            archives.append(Archive(found, kind, _sha256(found)))
    if not archives:
        for kind in ("wheel", "sdist"):
            (folder / f"no-{kind}").unlink(missing_ok=True)
        raise DownloadError(_nothing_message(requirement, problems))
    return archives, problems


def available_versions(name: str) -> list[str]:
    """Versions the index has, oldest first. Raises DownloadError when it can't be asked."""
    from packaging.version import InvalidVersion, Version

    found = {}
    for package in _find(name, "all"):
        try:
            found[Version(str(package.version))] = str(package.version)
        except InvalidVersion:
            continue
    return [found[version] for version in sorted(found)]


def _cached(folder: Path, kind: str) -> Path | None:
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix == ".whl" and kind == "wheel":
            return path
        if kind == "sdist" and path.name.endswith(_SDIST_SUFFIXES):
            return path
    return None


def _into(
    folder: Path, requirement: Requirement, fetch: Callable[[Requirement, Path], Path | None]
) -> Path | None:
    """Fetch to a temporary folder and rename, so that a torn download is never taken for one."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        found = fetch(requirement, Path(temporary))
        if found is None:
            return None
        target = folder / found.name
        found.replace(target)
        return target


def _fetch_wheel(requirement: Requirement, folder: Path) -> Path | None:
    """One wheel, whichever Python and platform it is for: it is read, not run."""
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    candidates = []
    for package in _find(str(requirement), "wheels"):
        try:
            tags = parse_wheel_filename(package.link.filename)[3]
        except InvalidWheelFilename:
            continue
        tag = min(tags, key=str)
        candidates.append((_preference(tag.interpreter, tag.platform), tag))
    if not candidates:
        return None
    tag = min(candidates, key=lambda candidate: candidate[0])[1]
    digits = tag.interpreter.lstrip("abcdefghijklmnopqrstuvwxyz") or "3"
    done = _pip_download(
        [
            "--ignore-requires-python",
            f"--platform={tag.platform}",
            f"--python-version={digits}",
            f"--implementation={tag.interpreter.rstrip('0123456789')}",
            f"--abi={tag.abi}",
            str(requirement),
        ],
        folder,
    )
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise DownloadError(f"pip could not get a wheel of {requirement}: {_tail(done.stderr)}")
    return wheels[0]


def _preference(interpreter: str, platform: str) -> tuple[bool, int, str]:
    """Pure wheels, then Linux, then the newest CPython: stubs and sources differ little."""
    order = ("any", "manylinux", "linux", "macosx", "win")
    rank = next((number for number, word in enumerate(order) if platform.startswith(word)), 9)
    rank = 2 * rank + ("64" not in platform)
    minor = interpreter.removeprefix("cp3")
    newest = -int(minor) if interpreter.startswith("cp3") and minor.isdigit() else 0
    return (not interpreter.startswith(("py", "cp3")), rank * 100 + newest, platform)


def _pip_download(flags: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-m", "pip", "download", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--quiet"),
        *("--dest", str(folder)),
        *flags,
    ]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DownloadError(f"pip download failed: {error}") from error


def _fetch_sdist(requirement: Requirement, folder: Path) -> Path | None:
    finder = _finder("sdists")
    packages = [
        package
        for package in _find(str(requirement), "sdists")
        if package.link.filename.endswith(_SDIST_SUFFIXES)
    ]
    if not packages:
        return None
    link = packages[0].link
    name = Path(link.filename).name
    target = folder / name
    try:
        with finder.session.get_stream(link.normalized) as response:
            response.raise_for_status()
            with open(target, "wb") as file:
                for block in response.iter_bytes(1 << 16):
                    file.write(block)
                    if file.tell() > MAX_ARCHIVE_BYTES:
                        raise DownloadError(f"{name} is larger than {MAX_ARCHIVE_BYTES >> 30} GiB.")
    except DownloadError:
        raise
    except Exception as error:  # unearth's sessions raise whatever their HTTP client does
        raise DownloadError(f"the sdist of {requirement} could not be fetched: {error}") from error
    expected = (link.hashes or {}).get("sha256")
    digests = expected if isinstance(expected, list) else [expected]
    if expected and _sha256(target) not in digests:
        raise DownloadError(f"{name} does not have the hash the index gives; it is not read.")
    return target


def _find(text: str, kind: Literal["all", "wheels", "sdists"]) -> list[Any]:
    finder = _finder(kind)
    try:
        if kind == "all":
            return list(finder.find_all_packages(text))
        return list(finder.find_matches(text, allow_yanked=True, allow_prereleases=True))
    except Exception as error:  # as above
        raise DownloadError(f"the package index could not be asked for {text}: {error}") from error


def _finder(kind: str) -> Any:
    try:
        from unearth import PackageFinder, TargetPython
    except ImportError:
        raise DownloadError(
            "ragfleet corpus build needs more packages: pip install 'ragfleet[contexts]'."
        ) from None
    logging.getLogger("unearth").setLevel(logging.ERROR)  # its warnings come back as our errors
    urls = [_pip_setting("index-url") or "https://pypi.org/simple"]
    urls += (_pip_setting("extra-index-url") or "").split()
    certificate = _pip_setting("cert")
    if certificate:
        os.environ.setdefault("SSL_CERT_FILE", certificate)
    return PackageFinder(
        index_urls=urls,
        no_binary=[":all:"] if kind == "sdists" else [],
        only_binary=[":all:"] if kind == "wheels" else [],
        ignore_compatibility=True,
        target_python=TargetPython((3, 11)),
    )


def _pip_setting(name: str) -> str | None:
    value = os.environ.get(f"PIP_{name.replace('-', '_').upper()}")
    if value is not None:
        return value
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", f"global.{name}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout.strip() or None if done.returncode == 0 else None


def _nothing_message(requirement: Requirement, problems: list[str]) -> str:
    if problems:
        return " ".join(dict.fromkeys(problems))  # wheel and sdist often fail for the same reason
    try:
        versions = available_versions(requirement.name)
    except DownloadError as error:
        return f"{requirement} could not be fetched: {error}"
    if not versions:
        return f"the index has no package {requirement.name}."
    shown = ", ".join(versions[-40:])
    more = f" (and {len(versions) - 40} older)" if len(versions) > 40 else ""
    return f"the index has no {requirement}; it has {shown}{more}."


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tail(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("ERROR")]
    return lines[-1][7:] if lines else text.strip()[-200:]
