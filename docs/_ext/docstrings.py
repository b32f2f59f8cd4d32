"""Docstrings are written for a terminal: backticks for code, indented examples. This makes reStructuredText of them."""

import re

_SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields", "Note", "Notes", "References", "Keyword Args")
_CODE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def to_rst(lines: list[str]) -> list[str]:
    """A docstring's lines as reStructuredText (Google sections are left to napoleon)."""
    out: list[str] = []
    text: list[str] = []
    inside = code = False  # of a Google section; of an indented block

    def flush() -> None:
        out.extend(_inline("\n".join(text)).split("\n") if text else [])
        text.clear()

    for index, line in enumerate(lines):
        indented = line.startswith("  ")
        after_blank = index > 0 and not lines[index - 1].strip()
        if line.strip() and not indented:
            inside = line.rstrip() in {f"{name}:" for name in _SECTIONS}
            example = line.rstrip() in ("Example:", "Examples:")
            if code or example:
                flush()
                if code and out and out[-1].strip():
                    out.append("")
            code = example
            if example:
                out.extend([f"{line.rstrip()}:", ""])
                continue
        elif indented and after_blank and not inside and not code:
            flush()
            out.extend(["::", ""])
            code = True
        (out if code else text).append(line)
    flush()
    return out


def _inline(text: str) -> str:
    """Backticks become literals; a star is a star."""
    parts = _CODE.split(text)
    for index, part in enumerate(parts):
        if index % 2:
            glued = index + 1 < len(parts) and re.match(r"\w", parts[index + 1])
            parts[index] = f"``{part}``" + ("\\ " if glued else "")
        elif "``" not in part:
            parts[index] = re.sub(r"(?<!\\)\*", r"\\*", part)
    return "".join(parts)


def setup(app):
    """Runs before napoleon, which sees sections only."""

    def process(app, what, name, obj, options, lines):
        if what == "data" and lines and "\n".join(lines).strip() == (type(obj).__doc__ or "").strip():
            lines[:] = []  # what its type says is not about it
        if what == "module":
            lines[:] = [*obj.__doc__.strip().splitlines(), ""]  # autodoc would take the examples' indentation away
        lines[:] = to_rst(lines)

    app.connect("autodoc-process-docstring", process, priority=100)
    return {"parallel_read_safe": True}
