"""What is found in sources: each trap of real packages, in small."""

from __future__ import annotations

import pytest
from making import Maker

from ragfleet.corpus.archives import ArchiveError
from ragfleet.corpus.build import BuildOptions, make_corpus
from ragfleet.corpus.download import Archive, DownloadError, parse_requirement
from ragfleet.corpus.stubs import cython_to_python, python2_to_python3

F = 'def {0}(x, *, y=1):\n    """Do {0}."""\n'


def f(*names: str) -> str:
    return "\n".join(F.format(name) for name in names)


def test_paths_aliases_and_signature(make: Maker) -> None:
    made = make(
        {
            "pkg/__init__.py": "from .core import *\nfrom pkg._low import low as high\n",
            "pkg/core.py": "import os\n__all__ = ['g']\n" + f("g", "hidden"),
            "pkg/_low.py": f("low"),
        }
    )
    assert made.names("pkg.g") == ["pkg.g", "pkg.core.g"]
    assert made.documents["pkg.g"].signature == "g(x, *, y=1)"
    assert made.documents["pkg.g"].defined_in == "pkg.core.g"
    assert "pkg.hidden" not in made.documents
    assert "pkg.core.hidden" in made.documents
    assert made.names("pkg.high") == ["pkg.high"]  # nothing in a private module has its own path
    assert not any("os" in path.split(".") for path in made.documents)


@pytest.mark.parametrize(
    "exports",
    [
        "from . import low\n__all__ = []\n__all__ += low.__all__",
        "from . import low\n__all__ = []\n__all__.extend(low.__all__)",
        "from . import low\n__all__ = []\ndef extend_all(m):\n  pass\nextend_all(low)",
        "__all__ = [s for s in dir() if not s.startswith('_')]",
        "__all__ = list(globals())",
        "__all__ = ['g'] + ['h']",
        "__all__ = []\nfor n in ('g', 'h'):\n    __all__.append(n)",
    ],
)
def test_computed_exports(make: Maker, exports: str) -> None:
    made = make(
        {
            "pkg/__init__.py": "from .mid import *\n",
            "pkg/mid.py": f"from .low import *\n{exports}\n",
            "pkg/low.py": "__all__ = ['g', 'h']\n" + f("g", "h"),
        }
    )
    assert {"pkg.g", "pkg.h"} <= made.documents.keys()


def test_a_function_with_the_name_of_its_module(make: Maker) -> None:
    made = make(
        {
            "pkg/__init__.py": "from .solve import solve\n",
            "pkg/solve.py": f("solve", "other"),
        }
    )
    assert made.documents["pkg.solve"].kind == "function"
    assert made.doc("pkg.solve.other") == "Do other."


def test_cycles_of_imports_end(make: Maker) -> None:
    made = make(
        {
            "pkg/__init__.py": "from .a import *\nfrom .b import *\n",
            "pkg/a.py": "from .b import *\nfrom pkg import x\nx = x\n" + f("one"),
            "pkg/b.py": "from .a import *\nfrom pkg import x\n" + f("two"),
        }
    )
    assert {"pkg.one", "pkg.two"} <= made.documents.keys()


def test_docs_added_to_c_functions(make: Maker) -> None:
    add = (
        "from pkg.core import add_newdoc\n"
        "add_newdoc('pkg.core.c', 'array', '''\n    array(x)\n\n    Make it.\n    ''')\n"
        "add_newdoc('pkg.core.c', 'nd', ('copy', '''a.copy()\n\n    Copy.'''))\n"
        "add_newdoc('pkg.core.c', 'nd', [('sum', 'Sum.'), ('max', 'Max.')])\n"
        "add_newdoc('pkg.core.c', 'nd', 'An array.')\n"
    )
    made = make(
        {
            "pkg/__init__.py": "from .core import *\n",
            "pkg/core/__init__.py": "from .c import *\n__all__ = ['array', 'nd']\n",
            "pkg/core/_docs.py": add,
            "pkg/core/c.cpython-37m.so": "binary",
        },
        {
            "pkg-1.0/pkg/__init__.py": "",
            "pkg-1.0/pkg/core/generators/ufuncs.py": "subst = {'P': 'where : array'}\n"
            "def add_newdoc(a, b, c): pass\n"
            "add_newdoc('pkg.core.c', 'sin', '''Sine.\n\n    $P''')\n",
        },
    )
    assert made.documents["pkg.array"].source == "c-ext"
    assert made.documents["pkg.array"].signature == "array(x)"
    assert made.doc("pkg.nd.copy") == "a.copy()\n\nCopy."
    assert made.doc("pkg.nd.max") == "Max."
    assert made.documents["pkg.nd"].kind == "class"
    assert made.doc("pkg.core.c.sin").endswith("where : array")


def test_cython_and_stubs(make: Maker) -> None:
    pyx = (
        "cdef class Hidden:\n    pass\n"
        "cdef inline int fast(int x) except -1:\n    return x\n"
        'cpdef double area(double w, double h=2.0) nogil:\n    """Area."""\n    return w\n'
        'class State(object):\n    """A state."""\n    cdef int n\n'
        "    def draw(self, int size not None, object kind=None):\n"
        '        """Draw."""\n        x = y\n'
        "_one = State()\ndraw = _one.draw\n"
    )
    made = make(
        {"pkg/__init__.py": "from .m import *\n", "pkg/m.cpython-37m.so": ""},
        {"pkg-1.0/pkg/__init__.py": "", "pkg-1.0/pkg/m/m.pyx": pyx},
    )
    assert made.documents["pkg.area"].signature == "area(w, h=2.0)"
    assert made.documents["pkg.draw"].doc == "Draw."
    assert made.documents["pkg.draw"].source == "pyx"
    assert made.documents["pkg.State"].kind == "class"
    made = make(
        {
            "pkg/__init__.py": "def g(x): ...\n",
            "pkg/__init__.pyi": 'def g(x: int): "From the stub."\n',
        }
    )
    assert made.doc("pkg.g") == "From the stub."


def test_docstrings_computed_by_decorators(make: Maker) -> None:
    made = make(
        {
            "pkg/__init__.py": "from .a import A, read\nfrom .b import plot, Axes\n",
            "pkg/deco.py": "class Appender:\n    pass\ndef doc(*a): pass\ndef copy(f): pass\n",
            "pkg/a.py": (
                "from .deco import Appender, Substitution, doc\n"
                "_shared = dict()\n_kw = dict(klass='A', other=unknown())\n"
                "_text = '''Read {what}.''' + computed()\n"
                "class A:\n"
                "    _shared['fill'] = '''Fill %(klass)s by %(how)s.'''\n"
                "    @Substitution(how='hand')\n    @Appender(_shared['fill'] % _kw)\n"
                "    def fill(self): pass\n"
                "    def base(self):\n        '''The base.'''\n"
                "    alias = base\n"
                "class B(A):\n    def base(self): pass\n"
                "read = Appender(_text.format(what='csv'))(make('read'))\n"
            ),
            "pkg/b.py": (
                "from .deco import copy\n"
                "class _Base:\n    def draw(self):\n        '''Draw it.'''\n"
                "class Axes(_Base):\n    '''Axes.'''\n"
                "@copy(Axes.draw)\ndef plot(): pass\n"
            ),
        }
    )
    assert made.doc("pkg.A.fill") == "Fill A by hand."
    assert made.doc("pkg.read") == "Read csv...."
    assert made.doc("pkg.a.B.base") == "The base."
    assert made.doc("pkg.A.alias") == "The base."
    assert made.doc("pkg.Axes.draw") == "Draw it."
    assert made.doc("pkg.plot") == "Draw it."


def test_instances_and_accessors(make: Maker) -> None:
    made = make(
        {
            "pkg/__init__.py": ("from .d import norm, Series\n"),
            "pkg/d.py": (
                "class Base:\n    '''Base.'''\n    def pdf(self):\n        '''Density.'''\n"
                "class _gen(Base):\n    '''A normal.'''\n    def fit(self):\n        '''Fit.'''\n"
                "norm = _gen(name='norm')\n"
                "class Methods:\n    '''Methods.'''\n    def split(self):\n        '''Split.'''\n"
                "class Series:\n    '''Series.'''\n    str = CachedAccessor('str', Methods)\n"
            ),
        }
    )
    norm = made.documents["pkg.norm"]
    assert (norm.kind, norm.doc) == ("instance", "A normal.")
    assert norm.mro == ["pkg.d.Base"]
    assert made.doc("pkg.norm.fit") == "Fit."
    assert made.documents["pkg.Series.str"].instance_of == "pkg.d.Methods"


def test_broken_files_cost_themselves_alone(make: Maker) -> None:
    made = make(
        {
            "pkg/__init__.py": "from .good import *\n",
            "pkg/good.py": f("g"),
            "pkg/broken.py": "def (:\n",
            "pkg/null.py": "x = '\0'\n",
            "pkg/deep.py": "x = " + "(" * 5000 + ")" * 5000,
            "pkg/old.py": "print 'hello', `x`\nexcept_ = 1\n" + f("old"),
            "pkg/latin.py": "# -*- coding: latin-1 -*-\n" + f("latin").replace("Do", "Dô"),
        }
    )
    assert {"pkg.g", "pkg.old.old", "pkg.latin.latin"} <= made.documents.keys()
    assert set(made.manifest.parse_failures) == {"pkg/broken.py", "pkg/null.py", "pkg/deep.py"}


def test_source_code_corpora(make: Maker) -> None:
    made = make({"pkg/__init__.py": "@wraps\n" + f("g")}, corpus_type="srccodes")
    assert made.documents["pkg.g"].doc.startswith("@wraps\ndef g(x")


def test_archives_without_a_package(make: Maker) -> None:
    with pytest.raises(DownloadError, match="no Python package"):
        make({"README.txt": "nothing"})
    (make.folder / "broken-1.0-py3-none-any.whl").write_bytes(b"broken")
    archive = Archive(make.folder / "broken-1.0-py3-none-any.whl", "wheel", "")
    options = BuildOptions(corpus_path=make.folder / "c", cache_path=make.folder / "cache")
    wanted, target = parse_requirement("broken==1.0"), make.folder / "c" / "x.jsonl"
    with pytest.raises(ArchiveError, match="can't be read"):
        make_corpus(wanted, [archive], target, options)
    assert not target.exists()


def test_rewriting_old_languages() -> None:
    assert "def g(a, b=None)" in cython_to_python("cpdef g(int a, int[:, :] b=None):\n")
    source = "cpdef g(np.ndarray[double, ndim=2] a, b=x[0]):\n"
    assert "def g(a, b=x[0])" in cython_to_python(source)
    assert "print('x')" in python2_to_python3("print 'x'\n")
    with pytest.raises(ValueError, match="neither"):
        python2_to_python3("def (:\n")
