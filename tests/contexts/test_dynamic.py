"""`--extractor dynamic` from end to end: a wheel of our own, installed without any index."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from making import write_sdist

from ragfleet.corpus.build import BuildOptions, build_one
from ragfleet.corpus.document import Document, read_documents
from ragfleet.corpus.download import Requirement, parse_requirement

SOURCE = '''
"""A package that makes its functions when it is imported."""
import os, socket
print('{"path": "not a row"}')
def plain():
    """Written down."""
def make(name):
    def made(x, y=1): pass
    made.__name__, made.__doc__ = name, "Made " + name + "."
    return made
grown = make("grown")
def reached():
    try:
        socket.create_connection(("127.0.0.1", int(os.environ.get("PORT", "9"))), 5)
    except OSError as error:
        return "no network"
    return "network"
def seen(): pass
seen.__doc__ = ", secret ".join([reached(), os.environ.get("SECRET", "unseen")])
class Base:
    def kept(self):
        """Of the base."""
class Child(Base):
    """A child."""
'''
CAN_UNSHARE = (
    shutil.which("unshare") is not None
    and subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0
)


def write_wheel(folder: Path) -> None:
    info = "pkg-1.0.dist-info"
    files = {
        "pkg/__init__.py": SOURCE,
        "pkg/broken.py": "import sys; sys.exit(3)\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: pkg\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    folder.mkdir()
    with zipfile.ZipFile(folder / "pkg-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(name, text)


def options(folder: Path) -> BuildOptions:
    archives = folder / "cache" / "archives" / "pkg" / "1.0"
    archives.mkdir(parents=True)
    write_sdist(archives / "pkg-1.0.tar.gz", {"pkg-1.0/pkg/__init__.py": SOURCE})
    (archives / "no-wheel").touch()
    return BuildOptions(
        corpus_path=folder / "corpus", cache_path=folder / "cache", extractor="dynamic"
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(not CAN_UNSHARE, reason="unshare -rn is not allowed here")
def test_what_an_import_shows_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("SECRET", "value")
    built = build_one(parse_requirement("pkg==1.0"), options(tmp_path))
    assert built.error is None
    assert built.manifest is not None
    documents = {
        document.path: document
        for document in read_documents(built.path, "pkg", "1.0")
        if isinstance(document, Document)
    }
    assert (documents["pkg.plain"].doc, documents["pkg.plain"].source) == ("Written down.", "py")
    grown = documents["pkg.grown"]
    assert (grown.doc, grown.source) == ("Made grown.", "dynamic")
    assert grown.signature == "grown(x, y=1)"
    assert documents["pkg.seen"].doc == "no network, secret unseen"
    assert documents["pkg.seen"].source == "dynamic"
    assert "pkg.Child.kept" not in documents  # look-ups find it through its class
    assert not any("not a row" in path for path in documents)
    assert built.manifest.extractor == "dynamic"
    assert any(note.startswith("dynamic: ") for note in built.manifest.notes)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["archives"]


def this_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]
) -> BuildOptions:
    """`files` beside an interpreter instead of a venv, which takes seconds; paths are relative."""

    def environment(requirement: Requirement, python: str, folder: Path) -> Path:
        for name, text in files.items():
            (folder / name).write_text(text)
        script = f'#!/bin/sh\nPYTHONPATH={folder} exec {python} "$2" "$3"\n'
        (folder / "python").write_text(script)
        (folder / "python").chmod(0o755)
        return folder / "python"

    monkeypatch.setattr("ragfleet.corpus.dynamic._environment", environment)
    monkeypatch.chdir(tmp_path)
    options(Path())
    return BuildOptions(corpus_path=Path("corpus"), cache_path=Path("cache"), extractor="dynamic")


@pytest.mark.skipif(not CAN_UNSHARE, reason="unshare -rn is not allowed here")
def test_a_cache_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = this_interpreter(tmp_path, monkeypatch, {"pkg.py": SOURCE})
    built = build_one(parse_requirement("pkg==1.0"), given)
    assert built.error is None
    assert built.manifest is not None
    note = built.manifest.notes[0]
    assert note.startswith("dynamic: 1 documents added, 1 filled"), "grown, and what seen says"


@pytest.mark.skipif(not CAN_UNSHARE, reason="unshare -rn is not allowed here")
def test_a_package_that_can_not_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = this_interpreter(tmp_path, monkeypatch, {"pkg.py": "import nowhere_to_be_found\n"})
    built = build_one(parse_requirement("pkg==1.0"), given)
    assert built.error is not None
    assert "pkg (ModuleNotFoundError: No module named 'nowhere_to_be_found')" in built.error
    assert "--python" in built.error
    assert not built.path.exists()


@pytest.mark.skipif(not CAN_UNSHARE, reason="unshare -rn is not allowed here")
def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    given = options(tmp_path)
    wanted = BuildOptions(
        corpus_path=given.corpus_path,
        cache_path=given.cache_path,
        extractor="dynamic",
        python=str(tmp_path / "python0.1"),
    )
    built = build_one(parse_requirement("pkg==1.0"), wanted)
    assert built.error is not None
    assert "python0.1" in built.error
    assert not built.path.exists()


def test_where_the_network_cannot_be_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ragfleet.corpus.dynamic._can_unshare", lambda: False)
    built = build_one(parse_requirement("pkg==1.0"), options(tmp_path))
    assert built.error is not None
    assert "--extractor static" in built.error
    assert not built.path.exists()
