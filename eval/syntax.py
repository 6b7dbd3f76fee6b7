"""Where the top-level statements of Python text begin, also of text that breaks off or has errors.

A text is cut where its last top-level statement begins: a line in column 0, outside of strings, that can begin one and
is neither an `else` or the like nor the `def` under a decorator. Inside open brackets only a word that cannot stand in
an expression counts: it shows that a bracket was left open.
"""

from __future__ import annotations

import ast
import re
import warnings

# Comments, strings (of three quotes first; one that is left open ends with its line or with the text), brackets, line
# continuations, and line ends before a line in column 0.
_LEXEMES = re.compile(
    r"""[#][^\n]* | ("{3}|'{3})(?:\\.|(?!\1).)*(?:\1|\Z) | "(?:\\.|[^"\\\n])*"? | '(?:\\.|[^'\\\n])*'?
      | [()\[\]{}] | \\\n | (?P<line>\n(?=\S))""",
    re.DOTALL | re.VERBOSE,
)
# What begins no statement; a word at the very end of the text may have more letters to come.
_CONTINUES = re.compile(r"[#)\]},.:=]|(?:else|elif|except|finally)\b|\w*\Z")
# What begins a statement and never stands in an expression.
_STATEMENT = re.compile(r"@|(?:def|class|import|from|while|try|return|raise|with|del|pass)\b")


def last_cut(text: str) -> int:
    """Where the last top-level statement of a text begins, 0 when there is only one."""
    cut, depth, decorated = 0, 0, text.startswith("@")
    for lexeme in _LEXEMES.finditer(text):
        if lexeme["line"] is None:
            token = lexeme[0]
            depth = depth + 1 if token in "([{" else max(0, depth - 1) if token in ")]}" else depth
            continue
        begin = lexeme.end()
        if _CONTINUES.match(text, begin) or (depth and not _STATEMENT.match(text, begin)):
            continue
        if not decorated:
            cut = begin
        decorated, depth = text[begin] == "@", 0
    return cut


def verdict(prompt: str, completion: str, ended: bool) -> str:
    """What a completion makes of its prompt, the whole cut as above, or not at all if it `ended` by itself.

    "unfinished" when nothing of the completion, blanks and comments aside, stands before the cut; else "parses" if the
    cut text does, or "fails".
    """
    text = prompt + completion
    cut = len(text) if ended else last_cut(text)
    written = text[len(prompt) : cut]
    if not re.sub(r"#[^\n]*", "", written).strip():
        return "unfinished"
    return "fails" if parse(text[:cut]) is None else "parses"


def parse(text: str) -> ast.Module | None:
    """What `ast.parse` makes of a text, None where it refuses; its warnings of odd escapes and the like are dropped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # null bytes; brackets nested too deep
            return None


def statement_starts(text: str) -> list[int]:
    """Where a file's top-level statements begin, the file's own beginning first; empty for what does not parse."""
    if (tree := parse(text)) is None:
        return []
    lines = [0]
    for line in text.split("\n"):
        lines.append(lines[-1] + len(line) + 1)
    firsts = [min([n.lineno, *(d.lineno for d in getattr(n, "decorator_list", ()))]) for n in tree.body]
    starts = {lines[first - 1] for first in firsts}
    return sorted({0} | {s for s in starts if text[s : s + 1].strip()})
