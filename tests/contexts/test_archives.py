"""Archives built to do harm: nothing is written outside, nothing is run."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from ragfleet.corpus import archives
from ragfleet.corpus.archives import ArchiveError, extract
from ragfleet.corpus.build import BuildOptions, build_one
from ragfleet.corpus.download import parse_requirement


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def add(tar: tarfile.TarFile, name: str, data: bytes = b"x = 1\n", **fields: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


HOSTILE = ["../outside.py", "/absolute.py", "a/../../outside.py", "a\\..\\outside.py", "..", "a/.."]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_leave_the_folder(tmp_path: Path, name: str) -> None:
    sdist, wheel = tmp_path / "a.tar.gz", tmp_path / "a.whl"
    with tarfile.open(sdist, "w:gz") as tar:
        add(tar, name)
        add(tar, "pkg/__init__.py")
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.writestr(name, "x = 1\n")
        zipped.writestr("pkg/__init__.py", "x = 1\n")
    before = tree(tmp_path)
    for archive in (sdist, wheel):
        out = tmp_path / f"out-{archive.suffix}"
        extracted = extract(archive, out)
        assert [path.relative_to(out).as_posix() for path in extracted.files] == ["pkg/__init__.py"]
    new = tree(tmp_path) - before
    assert {text.partition("/")[0] for text in new} == {"out-.gz", "out-.whl"}
    assert not Path("/absolute.py").exists()


@pytest.mark.parametrize(
    ("place", "value", "says"),
    [(8, 1, r"a\.whl can't be read: pkg/a\.py is encrypted"), (10, 99, r"a\.whl can't be read")],
)
def test_what_zipfile_cannot_open(tmp_path: Path, place: int, value: int, says: str) -> None:
    """A flag, and a compression nobody knows, in the central directory's entry of a member."""
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("pkg/a.py", "x = 1\n")
        zipped.writestr("pkg/a.bin", "")
    data = bytearray(archive.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + place] = value
    archive.write_bytes(data)
    with pytest.raises(ArchiveError, match=says):
        extract(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    data[entry + place] = 0
    data[data.index(b"PK\x01\x02", entry + 4) + place] = value
    archive.write_bytes(data)
    assert len(extract(archive, tmp_path / "out").files) == 1, "what isn't wanted may be so"


def test_links_and_devices_are_never_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.py"
    secret.write_text("secret = 1\n")
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        add(tar, "pkg/link.py", b"", type=tarfile.SYMTYPE, linkname=str(secret))
        add(tar, "pkg/hard.py", b"", type=tarfile.LNKTYPE, linkname="../../secret.py")
        add(tar, "pkg/dir", b"", type=tarfile.SYMTYPE, linkname=str(tmp_path))
        add(tar, "pkg/dir/through.py")
        add(tar, "pkg/fifo.py", b"", type=tarfile.FIFOTYPE)
    out = tmp_path / "out"
    extracted = extract(archive, out)
    assert [path.name for path in extracted.files] == ["through.py"]
    assert not (out / "pkg" / "dir").is_symlink()
    assert not (tmp_path / "through.py").exists()
    assert len(extracted.refused) == 4
    zipped_archive = tmp_path / "a.whl"
    with zipfile.ZipFile(zipped_archive, "w") as zipped:
        info = zipfile.ZipInfo("pkg/link.py")
        info.external_attr = 0o120777 << 16
        zipped.writestr(info, str(secret))
    assert extract(zipped_archive, tmp_path / "out2").files == []


def test_bombs_stop_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1 << 20)
    monkeypatch.setattr(archives, "MAX_TOTAL_BYTES", 2 << 20)
    monkeypatch.setattr(archives, "MAX_STREAM_BYTES", 8 << 20)
    zeros = bytes(4 << 20)
    one, many, unwanted = tmp_path / "one.whl", tmp_path / "many.whl", tmp_path / "data.tar.gz"
    with zipfile.ZipFile(one, "w", zipfile.ZIP_DEFLATED) as zipped:
        zipped.writestr("pkg/big.py", zeros)
    with zipfile.ZipFile(many, "w", zipfile.ZIP_DEFLATED) as zipped:
        for number in range(4):
            zipped.writestr(f"pkg/{number}.py", zeros[: 900 << 10])
    with tarfile.open(unwanted, "w:gz") as tar:
        add(tar, "pkg/data.bin", bytes(32 << 20))
        add(tar, "pkg/__init__.py")
    for archive in (one, many, unwanted):
        out = tmp_path / f"out-{archive.stem}"
        with pytest.raises(ArchiveError, match=r"[MG]iB"):
            extract(archive, out)
        assert not out.exists()


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 10)
    archive = tmp_path / "a.whl"
    with zipfile.ZipFile(archive, "w") as zipped:
        for number in range(11):
            zipped.writestr(f"pkg/{number}.txt", "")
    with pytest.raises(ArchiveError, match="more than 10 members"):
        extract(archive, tmp_path / "out")


@pytest.mark.parametrize("name", ["a.whl", "a.tar.gz", "a.zip"])
@pytest.mark.parametrize(
    "data", [b"", b"no archive", b"PK\x03\x04" + bytes(50), b"\x1f\x8b\x08", b"\xfd7zXZ\0torn"]
)
def test_broken_archives(tmp_path: Path, name: str, data: bytes) -> None:
    archive = tmp_path / name
    archive.write_bytes(data)
    with pytest.raises(ArchiveError, match=name):
        extract(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_torn_sdist(tmp_path: Path) -> None:
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        add(tar, "pkg/__init__.py", os.urandom(100_000))
    archive.write_bytes(archive.read_bytes()[:50_000])
    with pytest.raises(ArchiveError):
        extract(archive, tmp_path / "out")


def test_building_never_runs_the_package(tmp_path: Path) -> None:
    """The whole build, from archives that write a canary however they are run."""
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w').write('ran')\n"
    folder = tmp_path / "cache" / "archives" / "pkg" / "1.0"
    folder.mkdir(parents=True)
    with tarfile.open(folder / "pkg-1.0.tar.gz", "w:gz") as tar:
        for name in ("setup.py", "conftest.py", "pkg/__init__.py", "pkg/sub/__init__.py"):
            add(tar, f"pkg-1.0/{name}", (code + 'def f():\n    """Do f."""\n').encode())
        add(tar, "pkg-1.0/pkg/evil.pth", b"import os; " + code.encode())
        add(tar, "pkg-1.0/setup.cfg", b"[metadata]\nname = pkg\n")
        add(tar, "pkg-1.0/pyproject.toml", b"[build-system]\nbuild-backend = 'pkg'\n")
    (folder / "no-wheel").touch()
    options = BuildOptions(corpus_path=tmp_path / "corpus", cache_path=tmp_path / "cache")
    built = build_one(parse_requirement("pkg==1.0"), options)
    assert built.error is None
    assert built.manifest is not None
    assert built.manifest.num_documents == 2
    assert not canary.exists()
    assert tree(tmp_path / "corpus") == {"pkg", "pkg/1.0.jsonl", "pkg/1.0.manifest.json"}
    again = build_one(parse_requirement("pkg==1.0"), options)
    assert again.was_there


def test_hostile_archives_through_the_whole_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is harmless in them becomes a corpus, a bomb an error; nothing lands anywhere else."""
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1 << 20)
    code = b'def f():\n    """Do f."""\n'
    cache = tmp_path / "cache" / "archives"
    for name in ("evil", "bomb"):
        (cache / name / "1.0").mkdir(parents=True)
        (cache / name / "1.0" / "no-wheel").touch()
    with tarfile.open(cache / "evil" / "1.0" / "evil-1.0.tar.gz", "w:gz") as tar:
        add(tar, "evil-1.0/evil/__init__.py", code)
        add(tar, "../outside.py", code)
        add(tar, str(tmp_path / "absolute.py"), code)
        add(tar, "evil-1.0/evil/link", b"", type=tarfile.SYMTYPE, linkname=str(tmp_path))
        add(tar, "evil-1.0/evil/link/through.py", code)
    with tarfile.open(cache / "bomb" / "1.0" / "bomb-1.0.tar.gz", "w:gz") as tar:
        add(tar, "bomb-1.0/bomb/__init__.py", bytes(8 << 20))
    before = tree(tmp_path)
    options = BuildOptions(corpus_path=tmp_path / "corpus", cache_path=tmp_path / "cache")
    built = build_one(parse_requirement("evil==1.0"), options)
    assert built.manifest is not None
    assert len(built.manifest.refused_members) == 3
    assert "3 archive members refused" in built.line()
    bomb = build_one(parse_requirement("bomb==1.0"), options)
    assert bomb.error is not None
    assert "larger than 1 MiB" in bomb.error
    new = {"corpus", "corpus/evil", "corpus/evil/1.0.jsonl", "corpus/evil/1.0.manifest.json"}
    assert tree(tmp_path) - before == new


def test_a_compression_that_nobody_knows(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    with zipfile.ZipFile(wheel, "w") as zipped:
        zipped.writestr("pkg.py", "x = 1\n")
    data = bytearray(wheel.read_bytes())
    # The method's place in the member's own header, and in the central directory.
    for header, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):
        data[data.index(header) + place] = 77
    wheel.write_bytes(data)
    with pytest.raises(ArchiveError, match=r"can't be read: .*compression method"):
        extract(wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()
