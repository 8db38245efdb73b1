"""The wording of questions and headings, English and Chinese.

`{x}` is the API's name, `{p}` a parameter's. The first form of a kind is asked most often.
"""

from __future__ import annotations

import random

FORMS: dict[str, tuple[str, ...]] = {
    "signature": (
        "What is the signature of {x}?",
        "Which parameters does {x} take, and what are their defaults?",
        "How to use {x}?",
        "How is {x} called?",
        "What arguments does {x} take?",
        "How do I call {x}?",
        "Show the signature of {x}.",
        "{x} 的签名是什么？",
        "如何使用 {x}？",
        "{x} 有哪些参数，默认值是什么？",
    ),
    "summary": (
        "What does {x} do, in one sentence?",
        "What does {x} do?",
        "What is {x} for?",
        "Describe {x} in one sentence.",
        "What is the purpose of {x}?",
        "{x} 是做什么的？",
        "{x} 有什么作用？",
    ),
    "parameter": (
        "What is the parameter {p} of {x}?",
        "What does the parameter {p} of {x} mean?",
        "What is {p} in {x}?",
        "What is the argument {p} of {x} for?",
        "{x} 的参数 {p} 是什么意思？",
        "{x} 的参数 {p} 有什么用？",
    ),
    "default": (
        "What is the default of {p} in {x}?",
        "What is the default value of {p} in {x}?",
        "What is the default of the parameter {p} of {x}?",
        "Which default does {p} have in {x}?",
        "{x} 的参数 {p} 的默认值是什么？",
        "{x} 中 {p} 的默认值是多少？",
    ),
    "returns": (
        "What does {x} return?",
        "What is returned by {x}?",
        "What is the return value of {x}?",
        "{x} 返回什么？",
        "{x} 的返回值是什么？",
    ),
    "raises": (
        "Which exceptions can {x} raise?",
        "What does {x} raise?",
        "{x} 会抛出哪些异常？",
    ),
    "caveat": (
        "Is there anything to watch out for when calling {x}?",
        "What should I know before calling {x}?",
        "调用 {x} 时要注意什么？",
    ),
    "example": (
        "Show a short example of {x}.",
        "Give an example of {x}.",
        "{x} 的示例？",
    ),
    "related": (
        "How is {x} different from the functions it refers to?",
        "What is related to {x}?",
        "与 {x} 相关的函数有哪些？",
    ),
}

HEADINGS = (
    "Documentation of the API asked about:",
    "Documentation matched by name:",
    "Documentation retrieved for the question:",
    "Documentation:",
    "Context:",
    "Here is the documentation:",
    "Documentation found for this question, best first:",
    "",
)


def ask(rng: random.Random, kind: str, name: str, parameter: str = "") -> str:
    """A question of `kind` in one of its wordings, sometimes with backticks around names."""
    forms = FORMS[kind]
    form = forms[0] if rng.random() < 0.2 else rng.choice(forms)
    if rng.random() < 0.1:
        name, parameter = f"`{name}`", f"`{parameter}`"
    return form.format(x=name, p=parameter)
