"""Whatever text or value comes in, both databases take what the store makes of it."""

from __future__ import annotations

import json
import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from oodmon.store.rows import clean, compact, key

texts = st.one_of(
    st.text(st.characters(exclude_categories=())),
    st.text(st.sampled_from("a\x00\ud800é𝄞~"), min_size=200, max_size=400),
)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)


@given(texts)
def test_cleaned_text_can_be_stored(value: str) -> None:
    found = clean(value)
    assert "\x00" not in found
    assert found.encode().decode() == found
    assert clean(found) == found


@given(texts)
def test_ordinary_text_is_left_alone(value: str) -> None:
    plain = "".join(c for c in value if c != "\x00" and not 0xD800 <= ord(c) < 0xE000)
    assert clean(plain) == plain
    if len(plain.encode()) <= 256:
        assert key(plain) == plain


@given(texts, texts)
def test_keys_fit_into_an_index_and_stay_apart(one: str, other: str) -> None:
    assert len(key(one).encode()) <= 256
    assert clean(key(one)) == key(one)
    assert key(one) == key(one)
    assert (key(one) == key(other)) == (one == other)


@given(values)
def test_json_is_plain_and_the_same_where_it_can_be(value: Any) -> None:
    text = compact(value)
    assert text.isascii()
    assert "\\u0000" not in text.replace("\\\\", "")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    found = json.loads(text, parse_constant=refuse)
    json.dumps(found, ensure_ascii=False).encode()
    if ordinary(value):
        assert found == value


def ordinary(value: Any) -> bool:
    """Without NaN, infinity, NUL and lone surrogates anywhere."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return clean(value) == value
    if isinstance(value, list):
        return all(map(ordinary, value))
    if isinstance(value, dict):
        return all(ordinary(name) and ordinary(item) for name, item in value.items())
    return True
