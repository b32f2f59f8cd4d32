"""The tour's page: one HTML file with everything in it."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from jaxlab.core.report import Report

_LONG = 40  # characters from which a text is a quotation, not a figure

_CSS = """
:root { --ink:#1c2430; --soft:#5b6675; --line:#e3e7ec; --paper:#fff; --ground:#f5f6f8; --accent:#2457c5; --bad:#b3261e;
        --good:#1b7f4b; --warn:#8a5a00; }
* { box-sizing:border-box }
body { margin:0; background:var(--ground); color:var(--ink); font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif }
main, header > div, footer { max-width:1080px; margin:0 auto; padding:0 24px }
header { background:#131a26; color:#fff; padding:44px 0 36px }
header h1 { margin:0 0 6px; font-size:34px; letter-spacing:-.5px }
header p { margin:0; color:#b9c3d3 }
nav { display:grid; grid-template-columns:repeat(auto-fill,minmax(235px,1fr)); gap:14px; margin:-20px 0 30px }
nav a { background:var(--paper); border:1px solid var(--line); border-radius:10px; padding:14px 16px; color:inherit;
        text-decoration:none; box-shadow:0 1px 3px rgba(20,30,50,.06) }
nav a:hover { border-color:var(--accent) }
nav small { display:block; color:var(--soft) }
nav b { display:block; line-height:1.3; margin-bottom:6px }
section { background:var(--paper); border:1px solid var(--line); border-radius:12px; padding:26px 28px; margin:0 0 26px }
section h2 { margin:0 0 4px; font-size:23px; letter-spacing:-.2px }
section .about { color:var(--soft); margin:0 0 18px; font-size:14px }
.badge { display:inline-block; border-radius:99px; padding:1px 10px; font-size:12px; font-weight:600; margin-left:6px;
         background:#e7f4ec; color:var(--good) }
.badge.failed { background:#fbe9e7; color:var(--bad) } .badge.reused { background:#e8eefb; color:var(--accent) }
.badge.synthetic { background:#fff3d6; color:var(--warn) }
.figures { display:grid; grid-template-columns:repeat(auto-fill,minmax(170px,1fr)); gap:10px; margin:0 0 20px }
.figures div { background:var(--ground); border-radius:8px; padding:10px 12px }
.figures b { display:block; font-size:20px; font-variant-numeric:tabular-nums; overflow-wrap:anywhere }
.figures small { color:var(--soft) }
.plots { display:grid; grid-template-columns:repeat(auto-fit,minmax(420px,1fr)); gap:18px }
figure { margin:0 0 14px } figure img { max-width:100%; height:auto; border:1px solid var(--line); border-radius:8px }
figcaption, caption { color:var(--soft); font-size:14px; text-align:left; padding:4px 0 }
.scroll { overflow-x:auto; margin:0 0 18px }
table { border-collapse:collapse; font-size:14px; min-width:50%; font-variant-numeric:tabular-nums }
th { text-align:left; border-bottom:2px solid var(--line); padding:5px 14px 5px 0; white-space:nowrap }
td { border-bottom:1px solid var(--line); padding:5px 14px 5px 0; vertical-align:top; white-space:pre-wrap }
td.number { text-align:right; white-space:nowrap } td.yes { color:var(--good) } td.no { color:var(--bad) }
td.text { font-family:ui-monospace,Menlo,Consolas,monospace; font-size:13px; max-width:640px; overflow-wrap:anywhere }
blockquote { margin:0 0 16px; padding:10px 16px; border-left:3px solid var(--accent); background:var(--ground);
             white-space:pre-wrap; font-family:ui-monospace,Menlo,Consolas,monospace; font-size:13px }
ul.notes { color:var(--soft); font-size:14px; padding-left:18px; margin:0 }
.error { color:var(--bad); font-family:ui-monospace,monospace; font-size:14px; overflow-wrap:anywhere }
footer { color:var(--soft); font-size:13px; padding-bottom:50px } footer table { font-size:13px }
@media (max-width:520px) { .plots { grid-template-columns:1fr } section { padding:18px } }
"""

Part = tuple[str, str, float, str, Report | None]  # name, state, seconds, error, report


def render(parts: Sequence[Part], facts: Mapping[str, Any]) -> str:
    """The whole page."""
    good = sum(state != "failed" for _, state, *_ in parts)
    seconds = sum(part[2] for part in parts)
    machine = facts["machine"]
    where = f"{escape(str(machine['cpu']))}, {machine['cores']} cores, Python {machine['python']}"
    return "\n".join(
        (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>jaxlab: the tour</title>',
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_CSS}</style></head><body>',
            "<header><div><h1>jaxlab: the tour</h1>",
            f"<p>{good} of {len(parts)} sections, {seconds:.0f} s of work &middot; {where} &middot; "
            f"JAX {escape(facts['versions'].get('jax', '?'))} &middot; {escape(facts['date'])}</p></div></header><main><nav>",
            *map(_card, parts),
            "</nav>",
            *map(_section, parts),
            "</main><footer>",
            "<p>Every figure on this page was measured by the run that wrote it. Again: <code>jaxlab tour --fresh</code>; "
            "one section: <code>jaxlab tour --only NAME</code>. The same as data: <code>report.json</code>.</p>",
            _table("Versions", ("package", "version"), list(facts["versions"].items())),
            "</footer></body></html>\n",
        )
    )


def _card(part: Part) -> str:
    name, state, seconds, _, report = part
    title = report.title if report else name.replace("_", " ")
    return f'<a href="#{escape(name)}"><b>{escape(title)}</b><small>{seconds:.0f} s{_badge(state)}</small></a>'


def _section(part: Part) -> str:
    name, state, seconds, error, report = part
    if report is None:
        return (
            f'<section id="{escape(name)}"><h2>{escape(name.replace("_", " "))}{_badge(state)}</h2>'
            f'<p class="error">{escape(error)}</p><p class="about">The whole trace: {escape(name)}/error.txt</p></section>'
        )
    synthetic = '<span class="badge synthetic">synthetic input</span>' if report.synthetic else ""
    texts = {key: value for key, value in report.metrics.items() if isinstance(value, str) and len(value) > _LONG}
    tiles = "".join(
        f"<div><b>{escape(_cell(value))}</b><small>{escape(key.replace('_', ' '))}</small></div>"
        for key, value in report.metrics.items()
        if key not in texts
    )
    quotes = (f"<blockquote><b>{escape(key)}</b>\n{escape(str(value))}</blockquote>" for key, value in texts.items())
    plots = "".join(
        f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>{escape(title)}</figcaption></figure>"
        for title, png in report.plots
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return "\n".join(
        (
            f'<section id="{escape(name)}"><h2>{escape(report.title)}{_badge(state)}{synthetic}</h2>',
            f'<p class="about">{escape(report.system)} &middot; {escape(name)} &middot; {seconds:.1f} s</p>',
            f'<div class="figures">{tiles}</div>',
            *quotes,
            f'<div class="plots">{plots}</div>' if plots else "",
            *(_table(title, columns, rows) for title, columns, rows in report.tables),
            f'<ul class="notes">{notes}</ul>' if notes else "",
            "</section>",
        )
    )


def _table(title: str, columns: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f'<td class="{_kind(cell)}">{escape(_cell(cell))}</td>' for cell in row) + "</tr>" for row in rows
    )
    caption = f"<caption>{escape(title)}</caption>"
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _badge(state: str) -> str:
    return "" if state == "done" else f'<span class="badge {state}">{state}</span>'


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) and len(value) > _LONG else ""


def _cell(value: Any) -> str:
    """A value as a reader wants it: four figures, thousands separated, nothing for nothing."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value and not 1e-3 <= abs(value) < 1e6:
            return f"{value:.3g}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
