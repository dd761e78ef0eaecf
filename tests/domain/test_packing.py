"""Packed prompts: no text of a question ends it, and only answers that are surely its own are believed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.packing import BEGINS, PER_ITEM_TOKENS, pack, split

QUESTIONS = {"a1": "When does volume 12 come out?", "b2": "Do you ship to Sapporo?", "c3": "営業時間は?"}


def reply(**changes: object) -> list[dict[str, object]]:
    """What a good model says, with some entries otherwise."""
    entries = {
        name: {"name": name, "begins": question[:BEGINS], "answer": f"about {question}"}
        for name, question in QUESTIONS.items()
    }
    return [{**entries[name], **changes.get(name, {})} for name in QUESTIONS]  # type: ignore[dict-item]


def test_a_good_reply_answers_all() -> None:
    assert split(json.dumps(reply()), QUESTIONS) == {name: f"about {text}" for name, text in QUESTIONS.items()}
    packed = pack(QUESTIONS, 300)
    assert json.loads(packed.prompt) == QUESTIONS
    assert packed.max_tokens == 300 + 3 * PER_ITEM_TOKENS


@pytest.mark.parametrize(
    ("changes", "believed"),
    [
        ({"a1": {"answer": ""}}, {"b2", "c3"}),
        ({"a1": {"answer": 7}}, {"b2", "c3"}),
        ({"a1": {"name": "zz"}}, {"b2", "c3"}),
        ({"a1": {"name": "b2"}}, {"c3"}),
        ({"a1": {"begins": QUESTIONS["b2"][:BEGINS]}, "b2": {"begins": QUESTIONS["a1"][:BEGINS]}}, {"c3"}),
        ({"a1": {"answer": "Buy now!"}, "b2": {"answer": "Buy now!"}}, {"c3"}),
        ({"a1": {"answer": "the others are b2 and c3"}}, {"b2", "c3"}),
    ],
    ids=["empty", "no text", "unknown name", "name twice", "swapped", "one steers another", "tells of others"],
)
def test_what_is_not_surely_its_own_is_not_believed(changes: dict[str, object], believed: set[str]) -> None:
    assert set(split(json.dumps(reply(**changes)), QUESTIONS)) == believed


def test_a_text_that_was_cut_off_has_its_first_answers() -> None:
    text = json.dumps(reply())
    assert set(split(text[: text.index('"c3"') + 20], QUESTIONS)) == {"a1", "b2"}


@pytest.mark.parametrize("text", ["", "I'm sorry", "{}", "[", "[[[[", "null", "Sure! [", "[" * 100_000])
def test_garbage_has_none(text: str) -> None:
    assert split(text, QUESTIONS) == {}


def test_equal_questions_may_have_equal_answers() -> None:
    questions = {"a": "Hi", "b": "Hi"}
    entries = [{"name": name, "begins": "Hi", "answer": "Hello"} for name in questions]
    assert split(json.dumps(entries), questions) == {"a": "Hello", "b": "Hello"}


@given(st.dictionaries(st.from_regex(r"[0-9a-f]{12}", fullmatch=True), st.text(min_size=1), min_size=1, max_size=8))
def test_whatever_people_ask_stays_inside_its_string(questions: dict[str, str]) -> None:
    assert json.loads(pack(questions, 100).prompt) == questions


@given(st.text())
def test_whatever_comes_back_raises_nothing(text: str) -> None:
    assert split(text, QUESTIONS).keys() <= QUESTIONS.keys()
    assert split("[" + text, QUESTIONS).keys() <= QUESTIONS.keys()
