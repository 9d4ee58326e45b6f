"""One round as an SVG picture: the tree, the accepted path, what the target chose itself."""

from html import escape
from typing import Any

COLUMN, LINE, CHIP, HIGH, MARGIN = 112, 30, 92, 22, 14  # pixels
STYLE = """
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1c2430 }
text.small { font-size: 10px; fill: #5d6878 }
rect { fill: #fff; stroke: #b9c2ce } path { fill: none; stroke: #b9c2ce; stroke-width: 1.5 }
rect.back { fill: #fbfcfd; stroke: none }
.root rect { fill: #e9edf2 } .drafted rect { fill: #d3e8fb; stroke: #1b6fb8 }
.found rect { fill: #e5dbfb; stroke: #6b45c0 }
.own rect { fill: #ffe6ad; stroke: #a86400 } .rejected rect { stroke-dasharray: 3 2; stroke: #8a95a5 }
.other { opacity: .55 } path.kept { stroke: #1b6fb8; stroke-width: 2.5 }
@media (prefers-color-scheme: dark) {
text { fill: #e6e9ef } text.small { fill: #9aa5b5 } rect { fill: #171c24; stroke: #465164 } path { stroke: #465164 }
rect.back { fill: #0f1319 } .root rect { fill: #2a313c }
.drafted rect { fill: #123a5e; stroke: #5aa9e6 } .found rect { fill: #392a68; stroke: #a78bfa }
.own rect { fill: #574008; stroke: #e0a526 }
.rejected rect { stroke: #6c788a } path.kept { stroke: #5aa9e6 } }
"""


def round_picture(trace: dict[str, Any], number: int, *, text: int = 0, most_nodes: int = 24) -> str:
    """Draw a round.

    Args:
        trace (`dict`):
            What [`Trace.to_dict`] returns.
        number (`int`):
            Of the round; 0 is the prompt's pass, which has no tree.
        text (`int`, *optional*, defaults to 0):
            Whose.
        most_nodes (`int`, *optional*, defaults to 24):
            Nodes drawn: the accepted path, and the likeliest others.

    Returns:
        `str`: An SVG document that follows the reader's light or dark mode.
    """
    seen = trace["texts"][text]["rounds"][number]
    drawn = sorted({*range(min(most_nodes, len(seen["tokens"]))), *seen["path"]})
    used = sorted({seen["lanes"][node] for node in drawn})
    line = {lane: place for place, lane in enumerate(used)}  # without the lines of what is not drawn
    depths = [0] * len(seen["tokens"])
    for node, parent in enumerate(seen["parents"]):
        depths[node] = depths[parent] + 1 if parent >= 0 else 0
    end = seen["path"][-1]

    def place(node: int) -> tuple[int, int]:
        return MARGIN + depths[node] * COLUMN, MARGIN + line[seen["lanes"][node]] * LINE

    own = (MARGIN + (depths[end] + 1) * COLUMN, place(end)[1])
    links, chips = [_link(place(end), own, "kept")], []
    for node in drawn:
        parent, kept = seen["parents"][node], node in seen["path"]
        if parent >= 0:
            links.append(_link(place(parent), place(node), "kept" if kept else ""))
        kind = "found" if node in seen["found"] else "drafted"
        kind = "root" if node == 0 else kind if kept else "rejected" if parent in seen["path"] else "other"
        share = "" if node == 0 else f"{seen['drafter'][node]:.2f}"
        chips.append(_chip(place(node), trace["tokens"][str(seen["tokens"][node])], share, kind))
    chips.append(_chip(own, trace["tokens"][str(seen["emitted"][-1])], "", "own"))
    width = 2 * MARGIN + CHIP + COLUMN * max(depths[end] + 1, *(depths[node] for node in drawn))
    height = 2 * MARGIN + HIGH + LINE * (len(used) - 1)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="The draft tree of one round">\n<style>{STYLE}</style>\n'
        f'<rect class="back" width="{width}" height="{height}" rx="8"/>\n'
        + "\n".join(sorted(links, key=lambda link: "kept" in link) + chips)
        + "\n</svg>\n"
    )


def shown(token: str, most: int) -> str:
    """Return a token with its blanks made visible, cut to a width."""
    marked = token.replace(" ", "\N{MIDDLE DOT}").replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}")
    marked = marked.replace("\t", "\N{RIGHTWARDS ARROW TO BAR}")
    return marked if len(marked) <= most else marked[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _link(start: tuple[int, int], end: tuple[int, int], kind: str) -> str:
    (left, top), (right, bottom) = (start[0] + CHIP, start[1] + HIGH // 2), (end[0], end[1] + HIGH // 2)
    middle = (left + right) // 2
    return f'<path class="{kind}" d="M{left} {top}C{middle} {top} {middle} {bottom} {right} {bottom}"/>'


def _chip(at: tuple[int, int], token: str, share: str, kind: str) -> str:
    left, top = at
    return (
        f'<g class="{kind}"><rect x="{left}" y="{top}" width="{CHIP}" height="{HIGH}" rx="5"/>'
        f'<text x="{left + 7}" y="{top + 15}">{escape(shown(token, 7 if share else 11))}</text>'
        f'<text class="small" x="{left + CHIP - 6}" y="{top + 15}" text-anchor="end">{share}</text></g>'
    )


__all__ = ["round_picture", "shown"]
