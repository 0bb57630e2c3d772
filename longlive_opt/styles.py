"""Style sheets of a page without what it does not use: of JupyterLab's 260 KB a report needs a tenth."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import tinycss2
from tinycss2.ast import Declaration, Node, QualifiedRule

_STYLE = re.compile(r"(<style[^>]*>)(.*?)(</style>)", re.DOTALL)
_VARIABLE = re.compile(r"var\(\s*(--[\w-]+)")


def drop_unused_styles(html: str) -> str:
    """The page with the rules left out that ask for a class no element has, and the variables nobody reads.

    For pages without scripts: a class that a script would add counts as not there.
    """
    rest = _STYLE.sub("", html)
    finder = _ClassFinder()
    finder.feed(rest)
    finder.close()
    sheets = [_used_rules(style[1], finder.classes) for style in _STYLE.findall(html)]
    read: set[str] = set()
    while True:  # a variable may be read by one that is dropped itself
        now_read = {name for text in (rest, *map(_text, sheets)) for name in _VARIABLE.findall(text)}
        if now_read == read:
            break
        read = now_read
        sheets = [[_without_unread(rule, read) for rule in sheet] for sheet in sheets]
    kept = iter(sheets)
    return _STYLE.sub(lambda match: f"{match[1]}{_text(next(kept))}{match[3]}", html)


def _used_rules(css: str, classes: set[str]) -> list[Node]:
    rules = tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True)
    return [rule for rule in rules
            if not isinstance(rule, QualifiedRule) or any(map(classes.issuperset, _asked(rule.prelude)))]


def _asked(prelude: list[Node]) -> list[set[str]]:
    """The classes that each selector of a rule asks for; those in `:not(...)` and the like do not count."""
    selectors: list[set[str]] = [set()]
    for before, token in zip([None, *prelude], prelude):
        if token == ",":
            selectors.append(set())
        elif before == "." and token.type == "ident":
            selectors[-1].add(token.value)
    return selectors


def _without_unread(rule: Node, read: set[str]) -> Node:
    """The rule without the variables that are not in `read`."""
    if not isinstance(rule, QualifiedRule):
        return rule
    body = tinycss2.parse_blocks_contents(rule.content, skip_comments=True, skip_whitespace=True)
    kept = [item for item in body
            if not isinstance(item, Declaration) or not item.name.startswith("--") or item.name in read]
    if len(kept) == len(body):
        return rule
    content = tinycss2.parse_component_value_list(_text(kept))
    return QualifiedRule(rule.source_line, rule.source_column, rule.prelude, content)


def _text(nodes: list[Node]) -> str:
    ends = {True: ";\n", False: "\n"}
    return "".join(node.serialize() + ends[isinstance(node, Declaration)] for node in nodes)


class _ClassFinder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.classes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.classes.update((dict(attrs).get("class") or "").split())
