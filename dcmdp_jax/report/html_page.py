"""The frame and the style sheet of every page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

STYLE = """
:root{color-scheme:light dark;
--ink:#1e293b;--soft:#475569;--paper:#fff;--panel:#f1f5f9;--rule:#e2e8f0;--mark:#fed7aa}
@media screen and (prefers-color-scheme:dark){:root{
--ink:#e2e8f0;--soft:#a3b1c6;--paper:#0f172a;--panel:#1e293b;--rule:#334155;--mark:#7c2d12}}
body{margin:0;background:var(--paper);color:var(--ink);overflow-wrap:break-word;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1100px;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.6rem;line-height:1.25;margin:0}h2{font-size:1rem;margin:0}
.summary{color:var(--soft);margin:.2rem 0 1rem}
.verdict{background:var(--panel);border-left:4px solid var(--soft);
margin:0 0 1.5rem;padding:.7rem 1rem}
.verdict p{margin:.25rem 0}.verdict h2{margin-top:.7rem}
.verdict ul{margin:.2rem 0;padding-left:1.2rem}
.charts{display:grid;gap:1.6rem 1.5rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,400px),1fr))}
figure{margin:0}svg{display:block;width:100%;height:auto;fill:var(--soft);color:var(--ink)}
.paper{fill:none}.plot{position:relative}.readout{position:absolute;display:flex}
.readout input{position:absolute;opacity:0;margin:0;pointer-events:none}
.readout label:is(:hover,:focus-within){background:#94a3b84d}
.readout label:focus-within{outline:2px solid var(--ink)}
.readout b{position:absolute;z-index:1;top:100%;left:0;right:-3.8%;padding:.3rem .6rem;opacity:0;
pointer-events:none;white-space:pre-line;background:var(--panel);border:1px solid var(--soft);
font:.85rem/1.4 system-ui,sans-serif;font-variant-numeric:tabular-nums}
.readout label:is(:hover,:focus-within) b{opacity:1}
.readout i{display:inline-block;width:.7em;height:.7em;margin-right:.5em}
.legend{display:flex;flex-wrap:wrap;gap:0 1rem;margin-top:.25rem;font-size:.82rem;
color:var(--soft)}
.legend i{display:inline-block;width:1.2em;vertical-align:middle;margin-right:.35em;
color:var(--ink)}
.scroll{overflow-x:auto;margin-top:1.8rem}.scroll svg{min-width:640px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .4rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th{white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left;padding-left:0;white-space:normal;min-width:6rem}
td small{color:var(--soft)}
@media(max-width:560px){table{font-size:.82rem}th,td{padding:.35rem .3rem}td small{display:block}}
.section{margin-top:2rem}.note{color:var(--soft);font-size:.88rem;margin:.2rem 0 .4rem}
.runs{list-style:none;padding:0;font-size:.92rem}.runs li{margin:.5rem 0}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em}
.text{white-space:pre-wrap;overflow-wrap:anywhere;
font-family:ui-monospace,monospace;font-size:.85rem}
td.text{min-width:14rem}
.problem{border-top:1px solid var(--rule);padding:.6rem 0;display:grid;gap:.6rem 1.5rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr))}
.problem p{margin:0}.problem>*,figure{min-width:0}
td.setting{white-space:normal;overflow-wrap:anywhere;min-width:6rem;font-size:.88rem;
vertical-align:top}
mark{background:var(--mark);color:inherit;padding:0 .1em}
.bar{width:30%;min-width:6rem}.bar i{display:block;height:.7em}
.note+.scroll,h2+.scroll{margin-top:.4rem}
details{margin-top:1.5rem}details+details{margin-top:.5rem}summary{cursor:pointer;font-weight:600}
pre{background:var(--panel);padding:1rem;white-space:pre-wrap;overflow-wrap:anywhere;
font-size:.82rem;line-height:1.4}
@media print{.readout{display:none}.problem{grid-template-columns:none;grid-auto-flow:column;
grid-auto-columns:1fr}.scroll{overflow:visible}figure,tr,.problem{break-inside:avoid}
h2,h2+.note{break-after:avoid}.charts{grid-template-columns:1fr 1fr}table{font-size:.75rem}
th,td{padding:.25rem .3rem;white-space:normal}
i,mark{print-color-adjust:exact}}
"""


def verdict(sentences: Iterable[str], advice: Iterable[str]) -> str:
    """Returns the box at a page's top: a paragraph for each sentence, and what to do next."""
    paragraphs = "".join(f"<p>{html.escape(sentence)}</p>" for sentence in sentences)
    steps = "".join(f"<li>{html.escape(step)}</li>" for step in advice)
    todo = f"<h2>What to do next</h2><ul>{steps}</ul>" if steps else ""
    return f'<div class="verdict">{paragraphs}{todo}</div>'


def page(title: str, body: str, config: dict[str, Any]) -> str:
    """Returns a page that needs no other file: `body` (HTML) under the title and above the resolved
    configuration.
    """
    name = html.escape(title)
    resolved = html.escape(json.dumps(config, indent=2, ensure_ascii=False))
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><style>{STYLE}</style></head><body><main>
<h1>{name}</h1>{body}
<details><summary>Resolved configuration</summary><pre>{resolved}</pre></details>
</main></body></html>
"""
