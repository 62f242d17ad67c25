"""The frame and the style sheet of every page."""

from __future__ import annotations

import html
import json
from typing import Any

STYLE = """
body{margin:0;background:#fff;color:#1e293b;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1000px;margin:0 auto;padding:1.5rem 1rem 3rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1rem;margin:0}
.summary{color:#475569;margin:.2rem 0 1rem}
.verdict{background:#f1f5f9;border-left:4px solid #334155;margin:0 0 1.5rem;padding:.7rem 1rem}
.charts{display:grid;gap:1.6rem 1.5rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr))}
figure{margin:0}svg{display:block;width:100%;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:0 1rem;margin-top:.25rem;font-size:.82rem;color:#475569}
.legend i{display:inline-block;width:1.2em;vertical-align:middle;margin-right:.35em}
.scroll{overflow-x:auto;margin-top:1.8rem}.scroll svg{min-width:640px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid #e2e8f0;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}td small{color:#64748b}
@media(max-width:560px){table{font-size:.82rem}th,td{padding:.35rem .3rem}td small{display:block}
th:first-child,td:first-child{white-space:normal}}
.section{margin-top:2rem}.note{color:#64748b;font-size:.88rem;margin:.2rem 0 .4rem}
.verdict p{margin:.25rem 0}.runs{list-style:none;padding:0;font-size:.92rem}.runs li{margin:.5rem 0}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.45em}
td.text{white-space:pre-wrap;overflow-wrap:anywhere;min-width:14rem;
font-family:ui-monospace,monospace;font-size:.85rem}
td.setting{white-space:normal;overflow-wrap:anywhere;min-width:6rem;font-size:.88rem;
vertical-align:top}
mark{background:#fed7aa;padding:0 .1em}
.bar{width:30%;min-width:6rem}.bar i{display:block;height:.7em}
.note+.scroll,h2+.scroll{margin-top:.4rem}
details{margin-top:1.5rem}summary{cursor:pointer}
pre{background:#f8fafc;padding:1rem;overflow-x:auto;font-size:.82rem;line-height:1.4}
"""


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
