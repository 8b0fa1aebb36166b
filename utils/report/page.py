"""The report as one HTML page that asks the network for nothing; every text that comes from users is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import IO, Any

from utils.images.copies import THUMBNAIL_SIDE, thumbnail_path

THUMBNAILS = "thumbnails"  # folder beside the page
MAX_LINE, MAX_HOVER = 200, 1_000  # characters of metadata shown on hover, of a field and of all
STYLE = """
:root { color-scheme: light; font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff }
body { max-width: 1200px; margin: 0 auto; padding: 1rem } h1, h2, h3 { line-height: 1.2 } a { color: #0b5394 }
svg { width: 100%; max-width: 720px; height: auto; font-size: 12px; display: block }
table { border-collapse: collapse; margin: .5rem 0 } td, th { padding: .15rem .7rem; border-bottom: 1px solid #bbb }
td { text-align: right; font-variant-numeric: tabular-nums } th[scope=row] { text-align: left; font-weight: 400 }
.row { display: flex; flex-wrap: wrap; gap: .5rem } figure { margin: 0; width: 136px; font-size: .8rem }
#about { position: fixed; left: 0; right: 0; bottom: 0; margin: 0; padding: .5rem 1rem; white-space: pre-line;
background: #1b1b1b; color: #fff; max-height: 40vh; overflow: auto; overflow-wrap: anywhere }
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
const about = document.getElementById('about'), groups = [...document.querySelectorAll('.group')];
const near = new IntersectionObserver(entries => entries.filter(entry => entry.isIntersecting).forEach(entry => {
  near.unobserve(entry.target);
  entry.target.querySelectorAll('img[data-src]').forEach(image => { image.src = image.dataset.src; });
  entry.target.querySelectorAll('figure').forEach((figure, i) => { figure.tabIndex = i ? -1 : 0; });
}), {rootMargin: '1000px'});
document.querySelectorAll('.group, :not(.group) > .row').forEach(row => near.observe(row));

let texts;
function textsOf(group) {
  const lines = [...group.querySelectorAll('figure')].map(figure => figure.title.toLowerCase().split('\\n'));
  const ids = lines.map(listed => listed.pop());
  return {ids, metadata: lines.flat().join('\\n')};
}
function fits(group, i, query) {
  const number = /^(?:group\\s*|#)(\\d+)$/.exec(query);
  if (number) return group.id === `group${Number(number[1])}`;
  texts ??= groups.map(textsOf);
  return query.split(/\\s+/).every(word => texts[i].metadata.includes(word) ||
    word.length >= 8 && texts[i].ids.some(id => id.startsWith(word)));
}
input.addEventListener('input', () => {
  const query = input.value.trim().toLowerCase();
  groups.forEach((group, i) => { group.hidden = query !== '' && !fits(group, i, query); });
  count.textContent = `${groups.filter(group => !group.hidden).length} of ${groups.length} groups`;
});
input.disabled = false;

document.addEventListener('focusin', event => {
  about.hidden = !event.target.matches('figure:focus-visible');
  about.textContent = event.target.title;
});
document.addEventListener('focusout', () => { about.hidden = true; });
document.addEventListener('keydown', event => {
  const figure = event.target.closest('figure');
  const way = {ArrowRight: 'nextElementSibling', ArrowLeft: 'previousElementSibling'}[event.key];
  if (figure && way) figure[way]?.focus();
  if (event.key === 'Escape') about.hidden = true;
});
"""
FILTER = """<p class="filter"><label for="filter">Only groups with these words in their metadata, or group 12, or an id
(8 characters or more of its beginning):</label>
<input id="filter" type="search" size="30" disabled> <span id="count" role="status"></span></p>
<p>By keyboard: Tab goes from group to group, the arrow keys from image to image, and what is known of it is shown.</p>
<noscript><p>The filter, and pictures far down, need JavaScript.</p></noscript>
"""
ABOUT = '<p id="about" aria-hidden="true" hidden></p>'  # a screen reader has it already, from the figure itself


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
    file.write(f"</main>{ABOUT}<script>{SCRIPT}</script></body></html>\n")


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


def figure(id_: str, kind: str, caption: str, hover: str, has_thumbnail: bool, is_far: bool = False) -> str:
    """One image; `kind` is main, kept or deleted.

    `is_far`, a long way down, leaves it to the script to load the picture when its row comes near: a page with 20,000
    images of `loading="lazy"` takes seconds more to open.
    """
    if has_thumbnail:
        size = f'width="{THUMBNAIL_SIDE}" height="{THUMBNAIL_SIDE}"'
        source = "data-src" if is_far else 'loading="lazy" src'
        picture = f'<img {source}="{THUMBNAILS}/{thumbnail_path(id_)}" {size} alt="{escape(caption)}">'
    else:
        picture = '<div class="none">no image in the cache</div>'
    title = escape(f"{hover[:MAX_HOVER]}\n{id_}".strip())
    return f'<figure class="{kind}" title="{title}">{picture}<figcaption>{escape(caption)}</figcaption></figure>'


def hover_text(item: Mapping[str, Any]) -> str:
    """Metadata as people read it: a line a field."""
    lines = (" ".join(f"{name}: {value}".split()) for name, value in item.items())
    return "\n".join(line if len(line) <= MAX_LINE else line[: MAX_LINE - 1] + "…" for line in lines)


def row(figures: Iterable[str]) -> str:
    return f'<div class="row">{"".join(figures)}</div>'


def group(number: int, heading: str, figures: Iterable[str]) -> str:
    return f'<section class="group" id="group{number}"><h3>{escape(heading)}</h3>{row(figures)}</section>\n'
