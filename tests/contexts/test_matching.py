"""From names to documents: the order, and what is refused rather than guessed."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from making import EXAMPLES, write_corpus

from ragfleet.contexts.lexical import LexicalIndex, words
from ragfleet.contexts.matching import match
from ragfleet.contexts.names import names_in, normalise
from ragfleet.contexts.search import fuse
from ragfleet.contexts.store import Corpus, CorpusStore, NoCorpus
from ragfleet.corpus.document import Document
from ragfleet.errors import InputError

ROWS = [
    Document("pkg.array", "Make an array.", aliases=["pkg.core.array"]),
    Document("pkg.Frame", "A frame.", kind="class", mro=["pkg.Base"]),
    Document("pkg.Frame.merge", "Merge frames."),
    Document("pkg.Base.head", "The first rows."),
    Document("pkg.norm", "A distribution.", kind="instance", instance_of="pkg.gen", mro=["pkg.rv"]),
    Document("pkg.rv.pdf", "Density."),
    Document("pkg.a.solve", "Solve one."),
    Document("pkg.b.solve", "Solve two."),
    Document("pkg.X.Run", "Run."),
    Document("pkg.Y.run", "run."),
]


def corpus(rows: list[Document] | None = None) -> Corpus:
    documents = [row.complete("pkg", "1.0") for row in rows or ROWS]
    return Corpus("pkg", "1.0", Path("-"), documents, "0" * 64)


@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [
        ("pkg.array", "path", "pkg.array"),
        ("pkg.core.array", "alias", "pkg.array"),
        ("pkg.Frame.head", "member", "pkg.Base.head"),
        ("pkg.norm.pdf", "member", "pkg.rv.pdf"),
        ("PKG.frame.MERGE", "case_insensitive", "pkg.Frame.merge"),
        ("Frame.merge", "suffix", "pkg.Frame.merge"),
        ("merge", "suffix", "pkg.Frame.merge"),
        ("core.array", "suffix", "pkg.array"),
    ],
)
def test_the_order(name: str, kind: str, path: str) -> None:
    found = match([corpus()], name, True)
    assert found is not None
    assert (found.kind, found.corpus.documents[found.number].path) == (kind, path)
    if kind == "suffix":
        assert match([corpus()], name, False) is None


@pytest.mark.parametrize(
    "name",
    ["", "solve", "arr", "pkg.arr", "rray", "pkg.array.x", "other.array", "pkg", "Frame.mer"],
)
def test_never_a_substring_never_a_guess(name: str) -> None:
    assert match([corpus()], name, True) is None


def test_two_spellings_of_one_fold_are_no_match() -> None:
    rows = [Document("pkg.run", "a"), Document("pkg.RUN", "b")]
    assert match([corpus(rows)], "pkg.Run", True) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("np.argsort(a, axis=0)", "numpy.argsort"),
        ("`numpy.argsort`", "numpy.argsort"),
        ("from numpy import argsort", "numpy.argsort"),
        ("from numpy.linalg import eig as e", "numpy.linalg.eig"),
        ("import matplotlib.pyplot as plt", "matplotlib.pyplot"),
        ("plt.plot()", "matplotlib.pyplot.plot"),
        ("sp.x", "sp.x"),
        ("scikit-learn.svm.SVC", "sklearn.svm.SVC"),
        ("numpy::argsort", "numpy.argsort"),
        ("", ""),
    ],
)
def test_names_as_people_write_them(text: str, expected: str) -> None:
    roots = {"numpy", "sp", "sklearn"}
    assert normalise(text, roots, {"scikit-learn": "sklearn"}) == expected


def test_identifiers_in_chinese() -> None:
    assert list(names_in("怎样用numpy.linalg.eig求特征值？np.sort呢")) == [
        "numpy.linalg.eig",
        "np.sort",
    ]
    assert words("怎样CSV文件read_csv的") == [
        "怎样",
        "csv",
        "文件",
        "read_csv",
        "read",
        "csv",
        "的",
    ]


def test_words_of_other_scripts() -> None:
    """For users' own documents: Chinese ones are found by pairs of characters."""
    assert words("读取文件") == ["读取", "取文", "文件"]
    assert words("Größe naïve Файл x") == ["größe", "naïve", "файл", "x"]
    rows = [Document("p.a", "把数组写入文件。"), Document("p.b", "求矩阵的特征值。")]
    index = LexicalIndex.open(corpus(rows), None, print)
    assert index.rank("怎样计算特征值？") == [1]
    assert index.rank("写文件") == [0]


def test_words_of_identifiers() -> None:
    assert words("DataFrame.to_csv") == ["dataframe", "data", "frame", "to_csv", "csv"]
    assert words("HTTPAdapter parses keys") == ["httpadapter", "http", "adapter", "parse", "keys"]


@given(st.text())
def test_any_text_has_words(text: str) -> None:
    assert all(word == word.lower() and word for word in words(text))


SCORES = st.lists(st.floats(0, 50, width=32), min_size=1, max_size=9)


@given(SCORES, st.data())
def test_fusion_keeps_what_both_agree_on(found: list[float], data: st.DataObject) -> None:
    lexical = np.array(found, np.float32)
    cosines = st.floats(-1, 1, width=32)
    other = data.draw(st.lists(cosines, min_size=len(found), max_size=len(found)))
    dense = np.array(other, np.float32)
    fused = fuse(lexical, dense)
    assert fused.shape == lexical.shape
    assert np.all((fused >= 0) & (fused <= 1 + 1e-6))
    for a, b in itertools.combinations(range(len(found)), 2):
        if lexical[a] >= lexical[b] and dense[a] >= dense[b]:
            assert fused[a] >= fused[b]


def test_fusion_of_a_question_without_known_words() -> None:
    dense = np.array([0.1, 0.9, 0.5], np.float32)
    assert list(np.argsort(-fuse(np.zeros(3, np.float32), dense))) == [1, 2, 0]
    assert list(np.argsort(-fuse(np.array([5, 0, 0], np.float32), dense, 0.1))) == [0, 1, 2]
    assert fuse(np.zeros(0, np.float32), np.zeros(0, np.float32)).size == 0


def test_an_index_is_kept_and_used_again(tmp_path: Path) -> None:
    made = corpus()
    first = LexicalIndex.open(made, tmp_path, print)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert stamps
    again = LexicalIndex.open(made, tmp_path, print)
    assert first.rank("merge the frames") == again.rank("merge the frames")
    assert made.documents[first.rank("merge the frames")[0]].path == "pkg.Frame.merge"
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert first.rank("") == first.rank("怎样") == first.rank("zzz") == []


def test_versions(tmp_path: Path) -> None:
    for version in ("1.2.0", "1.10.0", "2.0"):
        write_corpus(tmp_path, "my-pkg", version, [{"path": "my_pkg.f", "doc": version}])
    store = CorpusStore(tmp_path, "docstring")
    assert store.versions("My_Pkg") == ["1.2.0", "1.10.0", "2.0"]
    assert store.resolve("my.pkg", ["1.2"], False) == "1.2.0"
    assert store.resolve("my-pkg", ["9.9", "2.0"], False) == "2.0"
    assert store.resolve("my-pkg", [">=1,<2"], False) == "1.10.0"
    assert store.resolve("my-pkg", ["1.9.1"], True) == "1.10.0"
    assert store.resolve("my-pkg", ["1.3"], True) == "1.2.0"
    with pytest.raises(NoCorpus, match=r"my-pkg 1\.9\.1; there are 1\.2\.0, 1\.10\.0, 2\.0"):
        store.resolve("my-pkg", ["1.9.1"], False)
    folder = shlex.quote(str(store.folder))
    for package, wanted, requirement in [
        ("my-pkg", ("1.9.1",), "my-pkg==1.9.1"),
        ("my-pkg", (">=9",), "my-pkg==VERSION"),
        ("other", ("1.0",), "other==1.0"),
        ("other", (), "other==VERSION"),
    ]:
        with pytest.raises(NoCorpus) as caught:
            store.resolve(package, wanted, False)
        made = f"ragfleet corpus build {requirement} --corpus_path {folder}"
        assert made in str(caught.value), "what it says makes what was missing"
    with pytest.raises(NoCorpus, match="no corpus of other"):
        store.resolve("other", ["1.0"], True)
    with pytest.raises(NoCorpus, match="unnamed version"):
        store.resolve("my-pkg", [], False)


def test_folders_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no corpus folder"):
        CorpusStore(tmp_path / "none", "docstring")
    with pytest.raises(InputError, match="no corpus of type docstring"):
        CorpusStore(tmp_path, "docstring")


def test_real_names_of_the_bundled_packages() -> None:
    """The bundled part of the name list; all of it is in test_real_packages.py (slow)."""
    store = CorpusStore(EXAMPLES / "corpus", "docstring")
    missing, total = [], 0
    for line in (Path(__file__).parent / "api_names.txt").read_text().splitlines():
        name, requirement = line.split()
        package, _, version = requirement.partition("==")
        if package not in store.packages:
            continue
        total += 1
        found = match([store.load(package, version)], name, False)
        if found is None:
            missing.append(name)
        else:
            assert found.corpus.documents[found.number].name == name.rpartition(".")[2] or (
                name == "numpy.ma.masked_array"
            )
    assert total == 43
    assert missing == ["numpy.float64"]
