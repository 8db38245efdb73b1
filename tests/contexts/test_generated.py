"""Members that exist only once a package is imported, found without importing it."""

from __future__ import annotations

from making import Made, Maker

from ragfleet.contexts.matching import match
from ragfleet.contexts.store import Corpus
from ragfleet.corpus.document import Document

PANDAS = {
    "pandas/__init__.py": "from .frame import DataFrame, Series, Index\n",
    "pandas/deco.py": "def delegate_names(*a, **k): pass\nclass Appender: pass\n",
    "pandas/window.py": (
        "from .deco import Appender\nouter = 'over windows.'\n"
        "@Appender('Roll ' + outer)\ndef rolling(): pass\n"
    ),
    "pandas/core/__init__.py": "",
    "pandas/core/ops.py": (
        "def add_flex_arithmetic_methods(cls): secret()\n"
        "_op_descriptions = {\n"
        "    'add': {'op': '+', 'desc': 'Addition', 'reverse': 'radd',\n"
        "            'series_examples': ' Ex.'},\n"
        "    'truediv': {'op': '/', 'desc': 'Division', 'reverse': 'rtruediv'},\n"
        "    'divmod': {'op': 'divmod', 'desc': 'Both', 'reverse': None},\n"
        "    'eq': {'op': '==', 'desc': 'Equality', 'reverse': None},\n}\n"
        "_flex_doc_SERIES = 'Series: {desc} `{op_name}`, {equiv}; see {reverse}.'\n"
        "_flex_doc_FRAME = 'Frame: {desc} `{op_name}`, {equiv}; see {reverse}.'\n"
        "_flex_comp_doc_FRAME = 'Frame: {desc} compared by `{op_name}`.'\n"
    ),
    "pandas/frame.py": (
        "from .deco import Appender, Substitution, delegate_names\n"
        "from .core import ops\n"
        "_num_doc = '''%(desc)s\n\nReturns\n-------\n%(name1)s or %(klass)s'''\n"
        "def _make_stat(cls, name, name1, desc, f, klass='any'):\n"
        "    @Substitution(desc=desc, name1=name1, klass=klass)\n"
        "    @Appender(_num_doc)\n"
        "    def stat_func(self, axis=None, skipna=True): return f(self)\n"
        "    return set_function_name(stat_func, name, cls)\n"
        "class Base:\n"
        "    @classmethod\n"
        "    def _add_numbers(cls):\n"
        "        outer = 'of the caller'\n"
        "        axis, name = _parms(cls)\n"
        "        klass = 'Thing'\n"
        "        @Appender('Mean deviation of a ' + klass + '.')\n"
        "        def mad(self, level=None): pass\n"
        "        cls.mad = mad\n"
        "        cls.sum = _make_stat(cls, 'sum', name, 'Return the sum.', nansum, klass=klass)\n"
        "        cls.total = cls.sum\n"
        "        cls._add_more()\n"
        "    @classmethod\n"
        "    def _add_more(cls):\n"
        "        outer = 'of the caller'\n"
        "        from pandas import window as rwindow\n"
        "        def _make(name, desc):\n"
        "            @Substitution(desc=desc)\n"
        "            @Appender('%(desc)s')\n"
        "            def logical(self): pass\n"
        "            logical.__name__ = name\n"
        "            return logical\n"
        "        cls.any = _make('any', 'Whether any is true.')\n"
        "        @Appender(rwindow.rolling.__doc__)\n"
        "        def rolling(self, window): pass\n"
        "        cls.rolling = rolling\n"
        "        self.other = 1\n"
        "    def not_a_classmethod(cls):\n"
        "        cls.ghost = _make_stat(cls, 'ghost', '', 'Never there.', None)\n"
        "class Array:\n"
        "    _field_ops = ['year', 'month']\n"
        "    _ops = _field_ops + ['tz'] + list(unknown())\n"
        "    year = property(lambda self: 1)\n"
        "    @property\n    def month(self):\n        '''The month.'''\n"
        "    def tz(self):\n        '''The zone.'''\n"
        "    def hidden(self):\n        '''Not delegated.'''\n"
        "    _doc = 'The {}.'\n"
        "    day = _accessor('day', 'D', _doc.format('day'))\n"
        "    T = property(tz, doc='Transposed.')\n"
        "    U = property(tz)\n"
        "def _accessor(name, field, docstring=None): pass\n"
        "class _Loc:\n    '''Locate by label.'''\n"
        "def indexers():\n    return [('loc', _Loc), ('bad', unknown)]\n"
        "for _name, _cls in indexers():\n    Base._create(_name, _cls)\n"
        "class Mixin:\n"
        "    _props = Array._ops + ['nothing']\n"
        "@delegate_names(Array, Mixin._props, typ='property')\n"
        "class Index:\n"
        "    '''An index.'''\n"
        "    def tz(self):\n        '''Its own zone.'''\n"
        "class Series(Base):\n    '''A series.'''\n"
        "class DataFrame(Base):\n    '''A frame.'''\n"
        "DataFrame._add_numbers()\nDataFrame.not_a_classmethod()\nDataFrame._missing()\n"
        "ops.add_flex_arithmetic_methods(Series)\nops.add_flex_arithmetic_methods(DataFrame)\n"
    ),
}


def test_members_of_another_class(make: Maker) -> None:
    made = make(PANDAS)
    assert made.doc("pandas.Index.month") == "The month."
    assert made.doc("pandas.Index.tz") == "Its own zone."
    assert not any("hidden" in name and "Index" in name for name in made.documents)
    assert "pandas.Index.nothing" not in made.documents


def test_documentation_that_is_an_argument(make: Maker) -> None:
    made = make(PANDAS)
    assert made.doc("pandas.frame.Array.day") == "The day."
    assert made.doc("pandas.frame.Array.T") == "Transposed."
    assert made.doc("pandas.frame.Array.U") == "The zone."


def test_instances_from_a_list(make: Maker) -> None:
    made = make(PANDAS)
    corpus = corpus_of(made, "pandas")
    for name in ("pandas.DataFrame.loc", "pandas.Series.loc"):
        hit = match([corpus], name, False)
        assert hit is not None
        assert corpus.documents[hit.number].doc == "Locate by label."
    assert match([corpus], "pandas.DataFrame.bad", False) is None


def test_methods_that_a_classmethod_assigns(make: Maker) -> None:
    made = make(PANDAS)
    document = made.documents["pandas.DataFrame.sum"]
    assert document.doc == "Return the sum.\n\nReturns\n-------\n[name1] or Thing"
    assert document.signature == "sum(axis=None, skipna=True)"
    assert (document.kind, document.source) == ("method", "py")
    assert made.doc("pandas.DataFrame.total").startswith("Return the sum.")
    assert made.doc("pandas.DataFrame.mad") == "Mean deviation of a Thing."
    assert made.doc("pandas.DataFrame.any") == "Whether any is true."
    assert made.doc("pandas.DataFrame.rolling") == "Roll over windows."
    assert "pandas.Series.sum" not in made.documents  # nobody called it for Series
    assert "pandas.DataFrame.ghost" not in made.documents
    code = make(PANDAS, corpus_type="srccodes")
    assert code.doc("pandas.DataFrame.sum").strip().startswith("@Substitution(desc=desc")
    assert "def stat_func" in code.doc("pandas.DataFrame.sum")


def test_operators_of_pandas(make: Maker) -> None:
    made = make(PANDAS)
    add = "Series: Addition `add`, series + other; see radd. Ex."
    assert made.doc("pandas.Series.add") == add
    reverse = "Frame: Addition `radd`, other + dataframe; see add."
    assert made.doc("pandas.DataFrame.radd") == reverse
    assert made.doc("pandas.DataFrame.eq") == "Frame: Equality compared by `eq`."
    assert made.doc("pandas.Series.eq").startswith("Series: Equality")
    assert made.doc("pandas.DataFrame.div") == made.doc("pandas.DataFrame.truediv")
    assert made.doc("pandas.Series.divmod").startswith("Series: Both")
    assert "pandas.DataFrame.divmod" not in made.documents
    assert made.documents["pandas.Series.add"].signature.startswith("add(other, level=None")


NUMPY = {
    "numpy/__init__.py": "from .core import *\n",
    "numpy/core/__init__.py": "from .numerictypes import *\n",
    "numpy/core/numerictypes.py": (
        "allTypes = {}\n__all__ = ['allTypes']\nfor key in allTypes:\n    __all__.append(key)\n"
        "generic = allTypes['generic']\nmore = ['float_', 'datetime64']\n"
    ),
    "numpy/core/_add_newdocs.py": (
        "from numpy.lib import add_newdoc\n"
        "aliases = [('float64', 'wide'), ('int64', 'wide')]\n"
        "add_newdoc('numpy.core.numerictypes', 'generic', 'Base of scalars.')\n"
        "add_newdoc('numpy.core.numerictypes', 'generic', ('mean', 'The mean.'))\n"
        "for_number = add_newdoc('numpy.core.numerictypes', 'number', 'Base of numbers.')\n"
        "add_newdoc('numpy.core.numerictypes', 'inexact', 'Not exact.')\n"
        "add_newdoc('numpy.core.numerictypes', 'floating', 'Floats.')\n"
        "add_newdoc_for_scalar_type('double', [], 'Double precision.')\n"
        "add_newdoc_for_scalar_type('int_', [], 'As C long.')\n"
    ),
}


def corpus_of(made: Made, package: str) -> Corpus:
    documents: list[Document] = list(made.documents.values())
    return Corpus(package, "1.0", made.path, documents, "0" * 64)


def test_scalar_types_of_numpy(make: Maker) -> None:
    made = make(NUMPY)
    corpus = corpus_of(made, "numpy")

    def found(name: str) -> str | None:
        hit = match([corpus], name, False)
        return None if hit is None else f"{hit.kind} {corpus.documents[hit.number].path}"

    assert found("numpy.double") == "path numpy.double"
    assert found("numpy.float64") == found("numpy.float_") == "alias numpy.double"
    assert found("numpy.float64.mean") == "member numpy.generic.mean"
    assert made.doc("numpy.generic.mean") == "The mean."
    assert made.doc("numpy.datetime64") == "Base of scalars."
    bases = ["numpy.floating", "numpy.inexact", "numpy.number", "numpy.generic"]
    assert made.documents["numpy.double"].mro == bases
    assert made.documents["numpy.double"].kind == "class"
    # This version never mentions them.
    assert found("numpy.longfloat") is None
    assert found("numpy.half.mean") == "member numpy.generic.mean"
    assert found("numpy.intp") is None
