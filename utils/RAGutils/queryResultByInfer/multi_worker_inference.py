#!/usr/bin/env python3
"""Answer a file of contexts with several workers: the documented entry point of ragfleet.

    python utils/RAGutils/queryResultByInfer/multi_worker_inference.py \\
        --contexts_file contexts.jsonl --output_file results.jsonl \\
        --model_path MODEL --inference_type local --max_new_tokens 512 --temperature 0.1

The same as `ragfleet infer`, and the file to give to torchrun. Users' own backends may import
`QueryBasedInference` from here. The code lives in the package; this file only finds it, and keeps
to syntax that every Python reads, so that an old one gets a sentence instead of a SyntaxError.
"""

import os
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(HERE)))

TOO_OLD = """\
ragfleet needs Python 3.11 or newer, and {python} is {version}.
Activate a newer environment, or run `make demo`, which makes one in .venv.
"""
MISSING = """\
The package {package} is missing in {python}.
Install what ragfleet needs (it never installs or changes torch or vLLM):
    "{python}" -m pip install -e "{root}"
"""

if sys.version_info < (3, 11):  # noqa: UP036 (the script may meet any Python)
    version = ".".join(map(str, sys.version_info[:3]))
    sys.stderr.write(TOO_OLD.format(python=sys.executable, version=version))
    sys.exit(2)

# This tree's package comes first even where ragfleet is installed: the installed copy may be an
# older one, and a script that quietly runs other code than the code beside it misleads.
sys.path.insert(0, os.path.join(ROOT, "src"))


def __getattr__(name):
    if name == "QueryBasedInference":
        from ragfleet import QueryBasedInference

        return QueryBasedInference
    raise AttributeError("multi_worker_inference has no attribute " + repr(name))


def main(argv, command="infer"):
    """Run `ragfleet infer` (or another command) with these arguments and return its exit code."""
    # Workers are processes of their own, and a user's file may import its base class from here.
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = HERE + (os.pathsep + inherited if inherited else "")
    arguments = list(argv)
    arguments.insert(0, command)
    try:
        from ragfleet.cli import main as ragfleet

        return ragfleet(arguments)
    except ModuleNotFoundError as error:  # ragfleet imports what it needs when it needs it
        package = str(error.name)
        if package.startswith("ragfleet"):
            raise
        sys.stderr.write(MISSING.format(package=package, python=sys.executable, root=ROOT))
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
