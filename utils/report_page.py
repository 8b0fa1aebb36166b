"""The report as one HTML page that asks the network for nothing; every text that comes from users is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import IO, Any

from utils.thumbnails import SIDE, relative_path

THUMBNAILS = "thumbnails"  # folder beside the page
MAX_HOVER = 600  # characters of metadata shown on hover
STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff }
body { max-width: 1200px; margin: 0 auto; padding: 1rem } h1, h2, h3 { line-height: 1.2 } a { color: #0b5394 }
svg { width: 100%; max-width: 720px; height: auto; font-size: 12px; display: block }
table { border-collapse: collapse; margin: .5rem 0 } td, th { padding: .15rem .7rem; border-bottom: 1px solid #bbb }
td { text-align: right; font-variant-numeric: tabular-nums } th[scope=row] { text-align: left; font-weight: 400 }
.row { display: flex; flex-wrap: wrap; gap: .5rem } figure { margin: 0; width: 136px; font-size: .8rem }
figure img, .none { width: 128px; height: 128px; object-fit: contain; background: #eee; display: block }
.none { display: grid; place-content: center; text-align: center; color: #444 }
figure img, figure .none { border: 4px solid #1b1b1b } .kept img, .kept .none { border-color: #38761d }
.deleted img, .deleted .none { border: 4px dashed #b45f06 }
.group { content-visibility: auto; contain-intrinsic-size: auto 420px; margin: 1rem 0 }
.filter { position: sticky; top: 0; background: #fff; padding: .5rem 0; z-index: 1 } input { font: inherit }
:focus-visible { outline: 3px solid #0b5394; outline-offset: 2px }
"""
SCRIPT = """
const input = document.getElementById('filter'), count = document.getElementById('count');
const groups = [...document.querySelectorAll('.group')];
let texts;
function textOf(group) {
  const hovers = [...group.querySelectorAll('[title]')].map(element => element.title);
  return [group.textContent, ...hovers].join(' ').toLowerCase();
}
input.addEventListener('input', () => {
  texts ??= groups.map(textOf);
  const words = input.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  groups.forEach((group, i) => {
    group.hidden = !words.every(word => texts[i].includes(word));
    shown += !group.hidden;
  });
  count.textContent = `${shown} of ${groups.length} groups`;
});
input.disabled = false;
"""
FILTER = """<p class="filter"><label for="filter">Only groups with these words (metadata, ids, kept, deleted):</label>
<input id="filter" type="search" size="30" disabled> <span id="count" role="status"></span></p>
"""


def write_page(file: IO[str], title: str, sections: Iterable[str]) -> None:
    """The page. Its policy lets the browser run this script and no other, and load images only."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    file.write(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n<h1>{escape(title)}</h1>\n"
    )
    file.writelines(sections)
    file.write(f"</main><script>{SCRIPT}</script></body></html>\n")


def section(heading: str, *parts: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>\n" + "\n".join(parts) + "</section>\n"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The first column names the row."""
    lines = ["".join(f'<th scope="col">{escape(name)}</th>' for name in head)]
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell_text(cell))}</td>" for cell in rest)
        lines.append(f'<th scope="row">{escape(cell_text(first))}</th>{cells}')
    return "<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def cell_text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def figure(id_: str, kind: str, caption: str, hover: str, has_thumbnail: bool) -> str:
    """One image; `kind` is main, kept or deleted."""
    title = escape(f"{hover[:MAX_HOVER]}\n{id_}".strip())
    if has_thumbnail:
        picture = (
            f'<img src="{THUMBNAILS}/{relative_path(id_)}" loading="lazy" width="{SIDE}" height="{SIDE}" '
            f'alt="{escape(caption)}" title="{title}">'
        )
    else:
        picture = f'<div class="none" title="{title}">no image in the cache</div>'
    return f'<figure class="{kind}">{picture}<figcaption>{escape(caption)}</figcaption></figure>'


def hover_text(item: Mapping[str, Any]) -> str:
    """Metadata as people read it: a line a field."""
    return "\n".join(f"{name}: {value}" for name, value in item.items())


def row(figures: Iterable[str]) -> str:
    return f'<div class="row">{"".join(figures)}</div>'


def group(number: int, heading: str, figures: Iterable[str]) -> str:
    return f'<section class="group" id="group{number}"><h3>{escape(heading)}</h3>{row(figures)}</section>\n'
