"""The names of real packages, from archives of the package index (slow, needs it).

RAGFLEET_CORPUS names a folder that has these corpora already.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ragfleet.contexts.matching import match
from ragfleet.contexts.store import CorpusStore
from ragfleet.corpus.build import BuildOptions, build_all
from ragfleet.corpus.download import DownloadError, available_versions

LIST = Path(__file__).parent / "api_names.txt"
NAMES = [line.split() for line in LIST.read_text().splitlines()]
SAME = {"numpy.ma.masked_array": "numpy.ma.MaskedArray", "numpy.float64": "numpy.double"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_seventy_two_names(tmp_path: Path) -> None:
    folder = Path(os.environ.get("RAGFLEET_CORPUS", tmp_path / "corpus"))
    if "RAGFLEET_CORPUS" not in os.environ:
        try:
            available_versions("requests")
        except DownloadError as error:
            pytest.skip(f"the package index can't be reached: {error}")
        options = BuildOptions(corpus_path=folder, cache_path=tmp_path / "cache", num_workers=2)
        requirements = sorted({requirement for _, requirement in NAMES})
        failed = [each for each in build_all(requirements, options, print) if each.error]
        assert not failed
    store = CorpusStore(folder, "docstring")
    missing, wrong = [], []
    for name, requirement in NAMES:
        package, _, version = requirement.partition("==")
        found = match([store.load(package, version)], name, False)
        if found is None:
            missing.append(name)
            continue
        document = found.corpus.documents[found.number]
        right = document.name == name.rpartition(".")[2] or document.path == SAME.get(name)
        if not right or not (document.doc or document.signature):
            wrong.append((name, document.path))
    assert missing == []
    assert wrong == []
