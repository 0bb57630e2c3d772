"""Export an executed notebook as one HTML file that opens offline and embeds all styles, pictures and videos.

nbconvert's own templates load require.js, MathJax, Mermaid and the widget manager from the internet, even
with `embed_images`. The template below leaves these blocks out, so a report has no LaTeX and no live widgets.
It keeps the alternative text of pictures, which the original drops, and folds parameters and code. HTML
outputs pass through unchanged, so the caller must escape strings such as prompts. Style sheets keep only the
rules that the page uses: a report needs a tenth of JupyterLab's 260 KB. The cells of an experiment are in the
reader's order: what came out first, how it was made below.
"""

from __future__ import annotations

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import tinycss2
from tinycss2.ast import Declaration, Node, QualifiedRule

from ..errors import UserError
from ..files import without_places
from .stylesheet import REPORT

FIRST = ("looking", "video", "concluding", "conclusion", "difference", "charts-text", "charts")
"""Ids of the cells that follow the question in a report, in their order."""
MAX_BYTES = 8_000_000
"""A report that can be mailed. `workbook` and the presets' video keys keep it."""

_TEMPLATE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block body_header -%}{{ super() }}<style>{{ resources.style }}</style>{{ resources.card }}{%- endblock -%}
{%- block body_footer -%}<footer>{{ resources.foot }}</footer>{{ super() }}{%- endblock -%}
{%- block input_group -%}
{%- set tags = cell.metadata.get('tags', []) -%}
<details class="code"><summary>
{%- if 'injected-parameters' in tags -%}Parameters of this run
{%- elif 'parameters' in tags -%}Parameters that the notebook declares
{%- else -%}Code{%- endif -%}
</summary>{{ super() }}</details>
{%- endblock -%}
{%- block output_group -%}
{%- if cell.source.rstrip().endswith('.parameters()') -%}
<details class="code"><summary>Parameters that are not the defaults</summary>{{ super() }}</details>
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock -%}
{%- block data_png scoped -%}
<div class="jp-RenderedImage jp-OutputArea-output">
<img src="data:image/png;base64,{{ output.data['image/png'] | replace("\\n", "") }}"
 alt="{{ (output | get_metadata('alt', 'image/png') or 'figure') | escape_html }}">
</div>
{%- endblock -%}
"""

_LOADING_ATTRIBUTES = ("src", "srcset", "href", "xlink:href", "poster", "data", "background", "style",
                       "srcdoc", "action", "formaction", "content")
_REMOTE = re.compile(r"^\s*(https?:)?//", re.IGNORECASE)
_REMOTE_IN_CSS = re.compile(r"""(?:(?:url|image-set)\(\s*['"]?|@import\s+['"])((?:https?:)?//[^'")\s]+)""",
                            re.IGNORECASE)
_REMOTE_IN_JS = re.compile(r"""\b(?:import|from|fetch|src|href)\b[^'"`;\n]*['"`]((?:https?:)?//[^'"`\s]+)""")


def export_html(notebook_path: Path, html_path: Path, *, title: str, hide_code: bool = False,
                card: str = "", foot: str = "") -> None:
    """Write an executed notebook as one self-contained HTML file.

    Args:
        hide_code: leave the code out.
        card: HTML to show above the notebook.
        foot: HTML to show below it.

    Raises:
        UserError: the notebook cannot be read, or the report would load something from the network.
    """
    import nbformat
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    try:
        notebook = nbformat.read(notebook_path, as_version=4)
        notebook.cells, notebook.metadata
    except (OSError, ValueError, AttributeError, TypeError, nbformat.ValidationError) as error:
        raise UserError(f"{notebook_path}: this is not a readable notebook ({error}); run it") from error
    # The template reads the title from here first.
    notebook.metadata["title"] = title
    notebook.cells = readers_order(notebook.cells)
    exporter = HTMLExporter(extra_loaders=[DictLoader({"offline.html.j2": _TEMPLATE})],
                            template_file="offline.html.j2", embed_images=True, exclude_input=hide_code,
                            exclude_input_prompt=True, exclude_output_prompt=True)
    # nbconvert resolves relative picture paths in Markdown against this path.
    resources = {"metadata": {"name": title, "path": str(notebook_path.parent)}, "card": card,
                 "foot": foot, "style": REPORT}
    try:
        html, _ = exporter.from_notebook_node(notebook, resources=resources)
    except (AttributeError, TypeError, LookupError) as error:
        raise UserError(f"{notebook_path}: this is not a readable notebook ({error!r}); run it") from error
    html = drop_unused_styles(html)
    # A report lies elsewhere than its notebook, and is handed on alone.
    html = re.sub(r'<a href="README\.md">([^<]*)</a>', r"\1 (notebooks/README.md)", html)
    references = network_references(html)
    if references:
        raise UserError(f"{notebook_path}: the report would load {references[0]} from the network; "
                        "embed it as data or link to it")
    temporary = html_path.with_name(html_path.name + ".tmp")
    temporary.write_text(without_places(html), encoding="utf-8")
    os.replace(temporary, html_path)


def readers_order(cells: list[Any]) -> list[Any]:
    """The cells of an executed notebook as a report shows them: the question, then those of `FIRST`, then the
    rest. Only if the notebook has a conclusion.
    """
    named = {cell.get("id"): cell for cell in cells}
    if "conclusion" not in named:
        return cells
    start = 1 + next((index for index, cell in enumerate(cells) if cell.cell_type == "markdown"), -1)
    first = [named[name] for name in FIRST if name in named]
    rest = [cell for cell in cells[start:] if cell.get("id") not in FIRST]
    return [*(cell for cell in cells[:start] if cell.get("id") not in FIRST), *first, *rest]


def network_references(html: str) -> list[str]:
    """The remote addresses that a browser loads when it opens `html`. Links (`<a href>`) do not count."""
    finder = _ReferenceFinder()
    finder.feed(html)
    finder.close()
    return finder.found


class _ReferenceFinder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("style", "script"):
            self._inside = tag
        for name, value in attrs:
            if tag in ("a", "area") and name == "href" or not value or name not in _LOADING_ATTRIBUTES:
                continue
            value = re.sub(r"[\t\r\n]", "", value).replace("\\", "/")  # as browsers read an address
            if name == "style":
                self.found += _REMOTE_IN_CSS.findall(value)
            elif name == "srcdoc":
                self.found += network_references(value)
            elif name == "content":
                self.found += re.findall(r"(?i)^[\d.\s]*;\s*url=['\"]?((?:https?:)?//\S+)", value)
            elif name == "srcset":
                self.found += [part.split()[0] for part in value.split(",") if _REMOTE.match(part)]
            elif _REMOTE.match(value):
                self.found.append(value.strip())

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.found += _REMOTE_IN_CSS.findall(data)
        elif self._inside == "script":
            self.found += _REMOTE_IN_JS.findall(data)


_STYLE = re.compile(r"(<style[^>]*>)(.*?)(</style>)", re.DOTALL)
_VARIABLE = re.compile(r"var\(\s*(--[\w-]+)")


def drop_unused_styles(html: str) -> str:
    """Remove the rules for classes that no element has, and the variables that no rule reads.

    Only for pages without scripts, since a class that a script adds counts as unused.
    """
    rest = _STYLE.sub("", html)
    finder = _ClassFinder()
    finder.feed(rest)
    finder.close()
    sheets = [_used_rules(style[1], finder.classes) for style in _STYLE.findall(html)]
    read: set[str] = set()
    while True:  # dropping a variable may leave another one unread
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
    """The classes that each selector of a rule requires, without those inside `:not(...)` and the like."""
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
