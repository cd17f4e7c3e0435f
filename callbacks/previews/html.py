"""The page of a preview folder: the records of all previews in one self-contained HTML file that
needs no server.

The template ``page.html`` is package data. The records stand in it as JSON; the images are its
neighbours on the disk.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

PAGE_NAME = "index.html"
RECORDS_NAME = "previews.jsonl"

_NEEDED = {"step": int, "weights": str, "image": str, "index": int, "seed": int, "prompt": str}
_SHARED = (
    "step",
    "epoch",
    "weights",
    "grid",
    "sampler",
    "steps",
    "guidance_scale",
    "schedule",
    "seconds",
    "note",
)


def read_records(content: bytes) -> list[dict[str, Any]]:
    """Return the records of a ``previews.jsonl``, the last word on each preview alone, by step; raw
    weights first.

    A run that was resumed may have drawn a step again: what it drew last counts. Lines that were
    cut off by a kill, or are no records, are passed over.

    >>> line = '{"step": 5, "weights": "raw", "image": "%s", "index": 0, "seed": 0, "prompt": ""}'
    >>> text = "\\n".join([line % "a.png", line % "b.png", line[:20]])
    >>> [record["image"] for record in read_records(text.encode())]
    ['b.png']
    """
    previews: dict[tuple[int, str], dict[int, dict[str, Any]]] = {}
    for line in content.split(b"\n"):
        record = _record(line)
        if record is None:
            continue
        key = record["step"], record["weights"]
        if record["index"] == 0:  # a preview begins anew, perhaps with fewer images than before
            previews[key] = {}
        previews.setdefault(key, {})[record["index"]] = record
    order = sorted(previews, key=lambda key: (key[0], key[1] != "raw", key[1]))
    return [previews[key][index] for key in order for index in sorted(previews[key])]


def render(records: Iterable[Mapping[str, Any]], title: str) -> str:
    """Return the page that shows these records, as :func:`read_records` returns them.

    Prompts may hold anything: in the page they are data, and its script shows them as text.

    >>> page = render([], "</title> & co")
    >>> "<title>&lt;/title&gt; &amp; co</title>" in page
    True
    """
    # one pass, so that a title cannot name the place of the data
    head, rest = _template().split("{{title}}", 1)
    middle, tail = rest.split("{{data}}", 1)
    return (
        head
        + html.escape(title)
        + middle
        + _json_in_html({"title": title, **_compact(records)})
        + tail
    )


def _template() -> str:
    return files(str(__package__)).joinpath("page.html").read_text(encoding="utf-8")


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        # NaN, which others may write, is no JSON
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):  # UnicodeDecodeError among them
        return None
    fits = isinstance(record, dict) and all(
        isinstance(record.get(key), kind) for key, kind in _NEEDED.items()
    )
    return record if fits else None


def _compact(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return rows, what an image is of: its seed and prompt; and previews: what is known of all its
    images, once, and files.

    Where a seed and prompt come twice in a preview, the second has a row of its own. Seeds are
    text: a number of JavaScript has 53 bits.
    """
    rows: dict[tuple[int, str, int], int] = {}
    previews: dict[tuple[int, str], dict[str, Any]] = {}
    seen: dict[tuple[Any, ...], int] = {}
    for record in records:
        key = record["step"], record["weights"]
        same = *key, record["seed"], record["prompt"]
        seen[same] = seen.get(same, -1) + 1
        row = rows.setdefault((record["seed"], record["prompt"], seen[same]), len(rows))
        preview = previews.setdefault(
            key, {name: record.get(name) for name in _SHARED} | {"images": {}}
        )
        preview["images"][row] = record["image"]
    return {
        # half a surrogate pair, as cut-off text may end in, is no text to a browser
        "rows": [
            {"seed": str(seed), "prompt": prompt.encode(errors="replace").decode()}
            for seed, prompt, _ in rows
        ],
        "previews": list(previews.values()),
    }


def _json_in_html(value: Any) -> str:
    """Return JSON that an HTML parser takes for text, whatever strings it holds.

    >>> _json_in_html("</script><!--")
    '"\\\\u003c/script\\\\u003e\\\\u003c!--"'
    """
    # ASCII: no line separators, no lone surrogates
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
