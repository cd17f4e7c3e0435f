"""HTML page of a preview folder: one file with all records, which needs no server.

The template ``page.html`` is package data. The page contains the records as JSON. It refers to the
image files, which are stored next to it.
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
    """Return the latest records of a ``previews.jsonl``, sorted by step, raw weights first.

    A resumed run may have drawn a step again. Then only the last preview of that step is returned.
    Truncated lines (after a kill) and lines that are not records are skipped.

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
        if record["index"] == 0:  # the preview was drawn again, perhaps with fewer images
            previews[key] = {}
        previews.setdefault(key, {})[record["index"]] = record
    order = sorted(previews, key=lambda key: (key[0], key[1] != "raw", key[1]))
    return [previews[key][index] for key in order for index in sorted(previews[key])]


def render(records: Iterable[Mapping[str, Any]], title: str) -> str:
    """Return the HTML page for records from :func:`read_records`.

    Prompts may contain any text. The page stores them as data, and its script shows them as text.

    >>> page = render([], "</title> & co")
    >>> "<title>&lt;/title&gt; &amp; co</title>" in page
    True
    """
    # a single pass, so that a title cannot contain the placeholder of the data
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
        # NaN is not valid JSON, but other programs may write it
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):  # ValueError includes UnicodeDecodeError
        return None
    fits = isinstance(record, dict) and all(
        isinstance(record.get(key), kind) for key, kind in _NEEDED.items()
    )
    return record if fits else None


def _compact(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return compact data for the page: ``rows`` and ``previews``.

    A row is a seed and a prompt. A preview has the values shared by its images, and the image file
    of each row. If a seed and prompt occur twice in a preview, the second has its own row. Seeds
    are strings, because a JavaScript number has only 53 bits.
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
        for kind in ("sound", "video"):
            if isinstance(record.get(kind), str):
                preview.setdefault(kind, {})[row] = record[kind]
    return {
        # browsers reject half a surrogate pair, which truncated text may end with
        "rows": [
            {"seed": str(seed), "prompt": prompt.encode(errors="replace").decode()}
            for seed, prompt, _ in rows
        ],
        "previews": list(previews.values()),
    }


def _json_in_html(value: Any) -> str:
    """Return JSON that an HTML parser reads as text, for any strings in it.

    >>> _json_in_html("</script><!--")
    '"\\\\u003c/script\\\\u003e\\\\u003c!--"'
    """
    # ASCII output: no line separators, no lone surrogates
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
