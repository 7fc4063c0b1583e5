import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.http.listing import (
    check_query,
    page,
    query_bool,
    query_choice,
    query_int,
)


def test_a_page_has_its_ends():
    items = [{"id": "a"}, {"id": "b"}]
    assert page(items, has_more=True) == {
        "object": "list",
        "data": items,
        "first_id": "a",
        "last_id": "b",
        "has_more": True,
    }
    assert page([], has_more=False)["first_id"] is None


@pytest.mark.parametrize("given", ["", "x", "-1", "0", "101", "1e2", "9" * 5000, "٣x", "1.0"])
def test_a_number_out_of_range_is_refused(given):
    with pytest.raises(InvalidRequest, match=r"limit is .* \[1, 100\]") as refused:
        query_int({"limit": given}, "limit", 20, low=1, high=100)
    assert len(refused.value.message) < 120


def test_what_is_left_out_has_its_default():
    assert query_int({}, "limit", 20, low=1, high=100) == 20
    assert query_choice({}, "order", ("desc", "asc")) == "desc"
    assert query_bool({}, "stream") is False
    assert query_bool({"stream": "true"}, "stream") is True


def test_other_words_and_names_are_refused():
    with pytest.raises(InvalidRequest, match="desc, asc"):
        query_choice({"order": "up"}, "order", ("desc", "asc"))
    with pytest.raises(InvalidRequest, match="'colour'"):
        check_query({"colour": "red"}, ("limit",))
