"""Lists in the form of OpenAI's API, a page at a time with a cursor, and their query parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sapwood.base.errors import InvalidRequest

CURSOR_QUERY = ("after", "limit", "order", "include", "include[]")
"""Parameters of a list of items; all items have everything that `include` can ask for."""
MAX_PAGE = 100


def page(items: Sequence[Mapping[str, Any]], *, has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }


def paged(items: Sequence[Mapping[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """The page that the query asks for; `items` are all, the oldest first.

    Raises InvalidRequest if `after` is none of them."""
    limit, newest_first, after = cursor(query)
    ordered = list(reversed(items)) if newest_first else list(items)
    if after is not None:
        places = [i for i, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"after is {after[:80]!r}, which is not there", param="after")
        ordered = ordered[places[0] + 1 :]
    return page(ordered[:limit], has_more=len(ordered) > limit)


def cursor(query: Mapping[str, str]) -> tuple[int, bool, str | None]:
    """(limit, whether the newest come first, the item before the page) of a list of items."""
    limit = query_int(query, "limit", 20, low=1, high=MAX_PAGE)
    newest_first = query_choice(query, "order", ("desc", "asc")) == "desc"
    return limit, newest_first, query.get("after")


def check_query(query: Mapping[str, str], known: Collection[str]) -> None:
    """InvalidRequest if there is a parameter that is not known."""
    for name in query:
        if name not in known:
            raise InvalidRequest(
                f"unknown query parameter {name!r}; known are {', '.join(sorted(known))}",
                param=name,
            )


def query_int(query: Mapping[str, str], name: str, default: int, *, low: int, high: int) -> int:
    given = query.get(name)
    if given is None:
        return default
    # Long digit strings are refused before they cost anything.
    value = int(given) if given.isdecimal() and len(given) < 20 else None
    if value is None or not low <= value <= high:
        raise InvalidRequest(f"{name} is {given[:40]!r} but must be in [{low}, {high}]", param=name)
    return value


def query_choice(query: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    """The parameter's value, which must be among `choices`; the first choice is the default."""
    given = query.get(name, choices[0])
    if given not in choices:
        raise InvalidRequest(
            f"{name} is {given[:40]!r} but must be one of: {', '.join(choices)}", param=name
        )
    return given


def query_bool(query: Mapping[str, str], name: str) -> bool:
    return query_choice(query, name, ("false", "true")) == "true"
