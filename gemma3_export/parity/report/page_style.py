"""The stylesheet of the HTML report, in light and dark."""

from __future__ import annotations

__all__ = ["STYLE"]

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --line: #dfe3e8; --ink: #1b2430; --soft: #5d6b7c;
  --key: #2563c9; --value: #c2571a; --good: #17784a; --bad: #c02b37; --track: #e8ebef; }
@media (prefers-color-scheme: dark) { :root {
  --page: #11161d; --card: #1a212b; --line: #2d3743; --ink: #e6ebf1; --soft: #9aa8b8;
  --key: #6aa5ff; --value: #f2945a; --good: #4cc38a; --bad: #ff6b76; --track: #28313c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 56px; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.02rem; margin: 0 0 2px; }
p { margin: 0; } .soft { color: var(--soft); }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .92em; }
header { display: flex; flex-wrap: wrap; gap: 8px 18px; align-items: center; margin-bottom: 20px; }
.verdict { font-weight: 700; padding: 4px 14px; border-radius: 999px; color: #fff;
  background: var(--good); } .verdict.bad { background: var(--bad); }
@media (prefers-color-scheme: dark) { .verdict { color: #0d1218; } }
header p { flex-basis: 100%; color: var(--soft); }
.cards, .charts { display: grid; gap: 14px; margin-bottom: 14px; }
.cards { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.pair { display: grid; gap: 14px; align-items: start; margin-bottom: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); }
.pair section { margin: 0; }
section, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 16px 18px; min-width: 0; }
section { margin-bottom: 14px; } .charts section { margin: 0; }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .87rem; }
.alarm { border-color: var(--bad); border-left-width: 5px; }
.scroll { overflow-x: auto; margin-top: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: 5px 10px; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, .left { text-align: left; }
td.wrap { white-space: normal; overflow-wrap: anywhere; text-align: left; }
.good { color: var(--good); font-weight: 600; } .wrong { color: var(--bad); font-weight: 700; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; color: var(--soft); font-size: .85rem;
  margin: 2px 0 8px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 50%;
  margin-right: 6px; } .legend i.dash { height: 0; width: 16px; border-radius: 0;
  border-top: 2px dashed currentColor; vertical-align: middle; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 14px system-ui, sans-serif; fill: var(--soft); }
svg .name { font-size: 13px; fill: var(--ink); }
svg .axis-label { font-size: 14px; }
svg .grid, svg .axis { stroke: var(--line); stroke-width: 1; }
svg .guide { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 4; }
svg .noise { fill: var(--soft); opacity: .55; }
svg .floor-value { fill: none; stroke: var(--value); stroke-width: 1; opacity: .55; }
svg .floor-key { fill: none; stroke: var(--key); stroke-width: 1; opacity: .55; }
svg .limit { fill: none; stroke: var(--bad); stroke-width: 1.4; stroke-dasharray: 6 4; }
svg .key { fill: var(--key); } svg .value { fill: var(--value); }
svg .beyond { fill: var(--bad); }
svg .bar { fill: var(--key); } svg .bar.bad, svg .bar.part { fill: var(--value); }
svg .track { fill: var(--track); }
details summary { cursor: pointer; color: var(--soft); }
"""
