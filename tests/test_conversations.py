"""Every shape of record that is accepted, as messages; and what is said of each that is not."""

from __future__ import annotations

from typing import Any

import pytest

from gemmary.data.conversations import Conversation, Preference, conversation, preference
from gemmary.errors import GemmaryError


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def model(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [user("2 + 2?"), model("4")]


# --- Conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"messages": ASKED}, ASKED),
        ({"messages": [*ASKED, user("Sure?"), model("Yes.")]}, [*ASKED, user("Sure?"), model("Yes.")]),
        ({"messages": [user("2 + 2?"), {"role": "model", "content": "4"}]}, ASKED),
        ({"messages": [user(" 2 + 2?\n"), model("\n4 ")]}, ASKED),
        ({"messages": [user([{"type": "text", "text": "2 + 2?"}]), model("4")]}, ASKED),
        ({"messages": [user("2 + 2?")]}, ASKED[:1]),
        ({"messages": [{**user("2 + 2?"), "name": "Ada"}, model("4")], "source": "x"}, ASKED),
        ({"prompt": "2 + 2?", "completion": "4"}, ASKED),
        ({"prompt": "2 + 2?", "response": "4"}, ASKED),
        ({"prompt": "2 + 2?", "output": "4"}, ASKED),
        ({"prompt": [user("2 + 2?")], "completion": [model("4")]}, ASKED),
        ({"prompt": user("2 + 2?"), "response": model("4")}, ASKED),
        (
            {"prompt": [*ASKED, user("Sure?")], "completion": "Yes."},
            [*ASKED, user("Sure?"), model("Yes.")],
        ),
        (
            {"prompt": "2 + 2?", "completion": [model("4"), user("Sure?"), model("Yes.")]},
            [*ASKED, user("Sure?"), model("Yes.")],
        ),
        ({"instruction": "2 + 2?", "output": "4"}, ASKED),
        ({"instruction": "2 + 2?", "input": "", "output": "4"}, ASKED),
        ({"instruction": "2 + 2?", "input": None, "output": "4"}, ASKED),
        ({"instruction": "Add.", "input": "2, 2", "output": "4"}, [user("Add.\n\n2, 2"), model("4")]),
        ({"prompt": "2 + 2?"}, ASKED[:1]),
        ({"prompt": [*ASKED, user("Sure?")]}, [*ASKED, user("Sure?")]),
    ],
)
def test_shapes_of_conversations(record: dict[str, Any], messages: list[dict[str, str]]) -> None:
    for system in ("refuse", "prefix"):
        assert conversation(record, system) == Conversation(messages)


def test_a_system_message_goes_before_the_question_or_is_refused() -> None:
    for record in (
        {"messages": [SYSTEM, *ASKED]},
        {"prompt": [SYSTEM, ASKED[0]], "completion": "4"},
        {"prompt": [SYSTEM, ASKED[0]], "completion": [ASKED[1]]},
    ):
        assert conversation(record, "prefix").messages == [user("Be brief.\n\n2 + 2?"), model("4")]
        with pytest.raises(GemmaryError, match=r"message 0: .*no system role"):
            conversation(record, "refuse")


def test_what_stands_before_the_last_answer_is_the_prompt() -> None:
    whole = conversation({"messages": [*ASKED, user("Sure?"), model("Yes.")]}, "prefix")
    assert whole.prompt == [*ASKED, user("Sure?")]
    assert whole.texts == ["2 + 2?", "4", "Sure?", "Yes."]
    assert whole.said == ["4", "Yes."]
    open_ = conversation({"messages": [*ASKED, user("Sure?")]}, "prefix")
    assert open_.prompt == open_.messages == [*ASKED, user("Sure?")]
    assert open_.said == ["4"]


@pytest.mark.parametrize(
    ("given", "answer", "tests"),
    [
        ({}, None, ()),
        ({"answer": "four"}, "four", ()),
        ({"answer": 4}, "4", ()),
        ({"answer": -2.5}, "-2.5", ()),
        ({"answer": 0}, "0", ()),
        ({"answer": None, "tests": None}, None, ()),
        ({"tests": []}, None, ()),
        ({"tests": ["assert f(1) == 2", "assert f(2)"]}, None, ("assert f(1) == 2", "assert f(2)")),
    ],
)
def test_what_an_answer_is_judged_by(given: dict[str, Any], answer: str | None, tests: tuple[str, ...]) -> None:
    for record in ({"prompt": "2 + 2?"}, {"messages": ASKED}, {"instruction": "2 + 2?", "output": "4"}):
        read = conversation({**record, **given}, "prefix")
        assert (read.answer, read.tests) == (answer, tests)


@pytest.mark.parametrize("record", [None, 7, "2 + 2?", [user("2 + 2?")], True])
def test_what_is_no_object(record: Any) -> None:
    with pytest.raises(GemmaryError, match=r"^not an object$"):
        conversation(record, "prefix")
    with pytest.raises(GemmaryError, match="a preference has chosen and rejected"):
        preference(record, "prefix")


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({}, "no messages, no prompt, and no instruction with its output, but nothing"),
        ({"conversations": []}, "no instruction with its output, but conversations"),
        ({"instruction": "2 + 2?", "id": 1}, "no instruction with its output, but instruction, id"),
        ({"x" * 999: 1}, "but " + "x" * 80),
        ({"messages": []}, "has at least one"),
        ({"messages": None}, "a conversation is a list of messages"),
        ({"messages": "2 + 2?"}, "a conversation is a list of messages"),
        ({"messages": ["2 + 2?"]}, "message 0 needs a role and a content"),
        ({"messages": [{"from": "human", "value": "2 + 2?"}]}, "message 0 needs a role and a content"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "message 0 has the role 'tool'"),
        ({"messages": ASKED[1:]}, "message 0 is the model's: turns go user, model"),
        ({"messages": [ASKED[0], ASKED[0]]}, "message 1 is the user's: turns go user, model"),
        ({"messages": [*ASKED, ASKED[1]]}, "message 2 is the model's: turns go user, model"),
        ({"messages": [*ASKED, SYSTEM]}, "message 2 is the system's"),
        ({"messages": [SYSTEM]}, "message 0 is the system's and the only one"),
        ({"messages": [ASKED[0], model(" \n")]}, "message 1: its content is empty"),
        ({"messages": [user(""), model("4")]}, "message 0: its content is empty"),
        ({"messages": [user("2 + 2?"), model(4)]}, "message 1: its content must be text"),
        ({"messages": [user([{"type": "image"}]), model("4")]}, "message 0: its content must be text"),
        ({"messages": [user("\ud800"), model("4")]}, "message 0: its content has a lone surrogate"),
        ({"prompt": "", "completion": "4"}, "message 0: its content is empty"),
        ({"prompt": None}, "message 0: its content must be text"),
        ({"prompt": "2 + 2?", "completion": None}, "message 1: its content must be text"),
        ({"prompt": "2 + 2?", "response": ""}, "message 1: its content is empty"),
        ({"prompt": ASKED, "completion": "4"}, "message 2 is the model's"),
        ({"prompt": "2 + 2?", "completion": [user("4")]}, "message 1 is the user's"),
        ({"prompt": []}, "has at least one"),
        ({"instruction": 4, "output": "4"}, "instruction is not a text"),
        ({"instruction": "Add.", "input": ["2", "2"], "output": "4"}, "input is not a text"),
        ({"instruction": "2 + 2?", "output": 4}, "message 1: its content must be text"),
        ({"instruction": " ", "output": "4"}, "message 0: its content is empty"),
        ({"prompt": "2 + 2?", "answer": True}, "answer is a text or a number"),
        ({"prompt": "2 + 2?", "answer": ["4"]}, "answer is a text or a number"),
        ({"prompt": "2 + 2?", "answer": " "}, "answer is a text or a number"),
        ({"prompt": "2 + 2?", "tests": "assert f(1)"}, "tests is a list of assertions"),
        ({"prompt": "2 + 2?", "tests": [1]}, "tests is a list of assertions"),
        ({"prompt": "2 + 2?", "tests": {"a": "b"}}, "tests is a list of assertions"),
        ({"prompt": "2 + 2?", "answer": "\ud800"}, "answer or tests has a lone surrogate"),
        ({"prompt": "2 + 2?", "tests": ["\udfff"]}, "answer or tests has a lone surrogate"),
    ],
)
def test_what_is_wrong_with_a_conversation(record: dict[str, Any], complaint: str) -> None:
    with pytest.raises(GemmaryError) as caught:
        conversation(record, "prefix")
    assert complaint in str(caught.value)


# --- Preferences ------------------------------------------------------------------------------------------------------

PAIR = Preference(ASKED[:1], "4", "5")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, PAIR),
        ({"prompt": " 2 + 2?", "chosen": "4\n", "rejected": " 5"}, PAIR),
        ({"prompt": [user("2 + 2?")], "chosen": [model("4")], "rejected": [model("5")]}, PAIR),
        ({"prompt": user("2 + 2?"), "chosen": "4", "rejected": {"role": "model", "content": "5"}}, PAIR),
        ({"chosen": ASKED, "rejected": [ASKED[0], model("5")]}, PAIR),
        (
            {"chosen": [*ASKED, user("Sure?"), model("Yes.")], "rejected": [*ASKED, user("Sure?"), model("No.")]},
            Preference([*ASKED, user("Sure?")], "Yes.", "No."),
        ),
        (
            {"prompt": [*ASKED, user("Sure?")], "chosen": "Yes.", "rejected": "No."},
            Preference([*ASKED, user("Sure?")], "Yes.", "No."),
        ),
        (
            {"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "answer": 4},
            Preference(ASKED[:1], "4", "5", answer="4"),
        ),
    ],
)
def test_shapes_of_preferences(record: dict[str, Any], expected: Preference) -> None:
    for system in ("refuse", "prefix"):
        assert preference(record, system) == expected


def test_a_preference_says_only_what_is_preferred() -> None:
    assert PAIR.texts == ["2 + 2?", "4", "5"]
    assert PAIR.said == ["4"]


def test_a_system_message_of_a_preference_goes_before_the_question_or_is_refused() -> None:
    for record in (
        {"prompt": [SYSTEM, ASKED[0]], "chosen": "4", "rejected": "5"},
        {"chosen": [SYSTEM, *ASKED], "rejected": [SYSTEM, ASKED[0], model("5")]},
    ):
        assert preference(record, "prefix") == Preference([user("Be brief.\n\n2 + 2?")], "4", "5")
        with pytest.raises(GemmaryError, match=r"message 0: .*no system role"):
            preference(record, "refuse")


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ({"prompt": "2 + 2?", "chosen": "4"}, "a preference has chosen and rejected"),
        ({"prompt": "2 + 2?", "rejected": "4"}, "a preference has chosen and rejected"),
        ({"chosen": "4", "rejected": "5"}, "there is no prompt, and the two answers do not begin alike"),
        ({"chosen": ASKED, "rejected": [user("3 + 2?"), model("5")]}, "there is no prompt"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "4"}, "its two answers are equal"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": " 4\n"}, "its two answers are equal"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": [model("4")]}, "its two answers are equal"),
        (
            {"prompt": "2 + 2?", "chosen": model("4"), "rejected": {"role": "model", "content": "4"}},
            "its two answers are equal",
        ),
        ({"chosen": ASKED, "rejected": ASKED}, "its two answers are equal"),
        ({"chosen": "4", "rejected": "4"}, "its two answers are equal"),
        ({"prompt": "2 + 2?", "chosen": ASKED, "rejected": "5"}, "chosen has 2 turns after the prompt"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": []}, "rejected has 0 turns after the prompt"),
        ({"chosen": ASKED, "rejected": [*ASKED, user("Sure?"), model("No.")]}, "chosen has 0 turns after the prompt"),
        ({"prompt": ASKED, "chosen": [user("Yes?")], "rejected": [user("No?")]}, "chosen ends with the user's turn"),
        ({"chosen": [*ASKED, user("Yes?")], "rejected": [*ASKED, user("No?")]}, "chosen ends with the user's turn"),
        ({"prompt": ASKED, "chosen": "Yes.", "rejected": "No."}, "message 2 is the model's"),
        ({"prompt": "2 + 2?", "chosen": "", "rejected": "5"}, "message 1: its content is empty"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": 5}, "message 1: its content must be text"),
        ({"prompt": "", "chosen": "4", "rejected": "5"}, "message 0: its content is empty"),
        ({"prompt": None, "chosen": "4", "rejected": "5"}, "message 0: its content must be text"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "answer": False}, "answer is a text or a number"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "tests": "assert"}, "tests is a list of assertions"),
    ],
)
def test_what_is_wrong_with_a_preference(record: dict[str, Any], complaint: str) -> None:
    with pytest.raises(GemmaryError) as caught:
        preference(record, "prefix")
    assert complaint in str(caught.value)
