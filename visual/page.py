"""One self-contained page: pictures inside, nothing fetched, made for laptops and phones."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; color: var(--ink);
  background: #fff; font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .4rem; }
p { margin: .4rem 0 .8rem; max-width: 44rem; }
.soft { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1rem 0; }
.scroll { overflow-x: auto; }
img { display: block; max-width: min(100%, 44rem); height: auto; }
.wide img { width: 100%; max-width: 100%; }
@media (max-width: 40rem) { .wide img { max-width: none; width: 52rem; } }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
th, td { white-space: nowrap; }
th { font-weight: 600; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: #0550ae; }
code { font-size: .88em; overflow-wrap: anywhere; }
"""


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An HTML table; its first column is text."""

    def line(tag: str, cells: Sequence[object]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells) + "</tr>"

    body = "".join(line("td", row) for row in rows)
    return (
        f'<div class="scroll"><table><thead>{line("th", header)}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(
    name: str, title: str, text: str, picture: Path, figures: str = "", is_wide: bool = False
) -> str:
    """A heading, what the picture shows, the picture, and the figures behind it.

    On a phone a wide picture is moved sideways, where others are made to fit.
    """
    kind = "scroll wide" if is_wide else "scroll"
    data = base64.b64encode(picture.read_bytes()).decode()
    behind = f"<details><summary>Figures</summary>{figures}</details>" if figures else ""
    return (
        f'<section id="{name}"><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>'
        f'<div class="{kind}"><img alt="{html.escape(title)}" '
        f'src="data:image/png;base64,{data}"></div>{behind}</section>'
    )


def page(title: str, head: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """The whole page. sections: (name, title, HTML)."""
    links = "".join(f'<a href="#{name}">{html.escape(text)}</a>' for name, text, _ in sections)
    body = "".join(content for _, _, content in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{head}<nav>{links}</nav>{body}</body></html>\n"
    )
