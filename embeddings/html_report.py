"""report.html: what report.md says and a run's curves, in one file without scripts that any browser shows."""

import re
from html import escape

COLORS = ("#2563eb", "#d97706")
HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"><style>
body {font: 15px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 1rem auto; padding: 0 1rem; color: #1f2937}
h1 {font-size: 1.3rem; overflow-wrap: anywhere} h2 {font-size: 1.1rem; margin-top: 2rem} p {overflow-wrap: anywhere}
table {border-collapse: collapse; display: block; overflow-x: auto; max-width: 100%; margin: .7rem 0}
td, th {border-bottom: 1px solid #e5e7eb; padding: .25rem .6rem; text-align: start; vertical-align: top}
.text {min-width: 17rem; max-width: 40rem; max-height: 20rem; overflow: auto; overflow-wrap: anywhere}
svg {width: 100%; max-width: 40rem; font-size: 12px; display: block; margin: .7rem 0}
mark {background: #bbf7d0} mark.wrong {background: #fecaca} mark.both {background: #fde68a}</style>
"""


def curve(title: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """An SVG of lines of (step, value)."""
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*(p for line in lines.values() for p in line)))
    across, up = 540 / (right - left or 1), 140 / (high - low or 1)
    parts = ['<path d="M50 25V165H595" fill="none" stroke="#9ca3af"/>']
    texts = [(50, 14, f"{escape(title)} by step", "#1f2937"), (50, 182, f"{left:g}", "#1f2937")]
    texts += [(x, y, text, "#1f2937") for x, y, text in ((0, 32, f"{high:.3g}"), (0, 165, f"{low:.3g}"))]
    texts.append((560, 182, f"{right:g}", "#1f2937"))
    for place, (name, line) in enumerate(lines.items()):
        points = [f"{50 + across * (x - left):.1f} {165 - up * (y - low):.1f}" for x, y in line]
        style = f'fill="none" stroke="{COLORS[place]}" stroke-width="2" stroke-linecap="round"'  # one point: a dot
        parts.append(f'<path d="M{"L".join(points)}h0" {style}/>')
        texts.append((240 + 160 * place, 14, escape(name), COLORS[place]))
    parts += [f'<text x="{x}" y="{y}" fill="{color}">{text}</text>' for x, y, text, color in texts]
    return f'<svg viewBox="0 0 620 190" role="img">{"".join(parts)}</svg>'


def curves(records: list[dict], metric: str) -> str:
    """The loss and the metric that chooses, of the lines of metrics.jsonl; what was not finite is left out."""
    charts: dict[str, dict] = {"loss": {}, metric: {}}
    for record in records:
        for name in charts:
            if record["event"] in ("step", "evaluation") and record.get(name) is not None:
                line = "training" if record["event"] == "step" else "validation"
                charts[name].setdefault(line, []).append((record["step"], record[name]))
    return "".join(curve(title, lines) for title, lines in charts.items() if lines)


def tables(markdown: str) -> str:
    """Headings, tables and paragraphs of the Markdown that report.py writes, everything in them escaped."""
    parts, rows = [], []
    markdown = re.sub("&amp;(#[0-9]+;)", r"&\1", escape(markdown))  # what report.py's cell escaped is itself again
    for line in [*markdown.split("\n"), ""]:
        if line.startswith("| "):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
            continue
        if rows:
            body = [[f'<div class="text">{c}</div>' if len(c) > 40 else c for c in row] for row in rows[2:]]
            cells = [("th", rows[0]), *(("td", row) for row in body)]
            parts += ["<table>", *(f"<tr>{''.join(f'<{t} dir=auto>{c}</{t}>' for c in row)}" for t, row in cells)]
            parts, rows = [*parts, "</table>"], []
        if found := re.match("(#+|-)? *(.+)", line):
            tag = {"#": "h1", "##": "h2", None: "p", "-": "p"}.get(found[1], "h3")
            parts.append(f"<{tag} dir=auto>{found[2]}</{tag}>")
    return "\n".join(parts)


def page(markdown: str, records: list[dict], metric: str, more: str = "") -> str:
    """report.md with a run's curves behind its first table; more: HTML at the end."""
    first, found, rest = tables(markdown).partition("</table>")
    return f"{HEAD}{first}{found}\n{curves(records, metric)}{rest}\n{more}\n</html>\n"
