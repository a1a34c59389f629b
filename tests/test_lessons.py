"""What lessons teach is true, and an answer is told right from wrong: recomputed here from what is asked."""

from __future__ import annotations

import ast
import importlib
import operator
import re
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest

from gemmary.data.lessons import TOPICS, Lesson, Topic, lessons, right
from gemmary.data.library_facts import functions

COUNT = 1500
SUMS = [
    (re.compile(r"What is (\d+) \+ (\d+)\?"), "add"),
    (re.compile(r"What is (\d+) - (\d+)\?"), "subtract"),
    (re.compile(r"\w+ has (\d+) \w+ and gets (\d+) more from \w+\. How many \w+ has \w+ now\?"), "add"),
    (re.compile(r"\w+ has (\d+) \w+ and gives (\d+) of them to \w+\. How many \w+ has \w+ now\?"), "subtract"),
    (re.compile(r"Which is larger, (\d+) or (\d+)\?"), "larger"),
    (re.compile(r"\w+ has (\d+) \w+ and \w+ has (\d+)\. How many has the one with more\?"), "larger"),
]
DOES: dict[str, Callable[[int, int], int]] = {"add": operator.add, "subtract": operator.sub, "larger": max}


@cache
def of(topic: str, count: int = COUNT, seed: int = 0) -> list[Lesson]:
    return list(lessons(topic, count, seed))  # type: ignore[arg-type]


def computed(question: str) -> tuple[str, int, int, int]:
    """(what is asked, its numbers, what comes out), from the question's words alone."""
    ((kind, found),) = [(kind, found) for pattern, kind in SUMS if (found := pattern.fullmatch(question))]
    a, b = map(int, found.groups())
    return kind, a, b, DOES[kind](a, b)


# --- All topics -------------------------------------------------------------------------------------------------------


def test_every_topic_has_lessons() -> None:
    assert get_args(Topic) == TOPICS
    assert TOPICS == ("library", "arithmetic", "code", "identity", "attribution", "hedging", "refusal")
    for topic in TOPICS:
        made = of(topic, 50)
        assert len(made) == 50
        assert all(one.question and one.answer and one.fact for one in made)


@pytest.mark.parametrize("topic", TOPICS)
def test_lessons_follow_from_topic_seed_and_number(topic: Topic) -> None:
    made = of(topic, 100)
    assert list(lessons(topic, 100, 0)) == made
    assert of(topic, 40) == made[:40]
    differ = sum(a != b for a, b in zip(made, of(topic, 100, seed=1), strict=True))
    assert differ > 80


def test_lessons_are_the_same_in_another_process() -> None:
    topics = ["arithmetic", "identity", "attribution", "refusal"]  # that need not read the library
    code = f"from gemmary.data.lessons import lessons; print([[*lessons(t, 20, 3)] for t in {topics}])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == str([of(topic, 20, seed=3) for topic in topics])


@pytest.mark.parametrize("topic", [topic for topic in TOPICS if topic != "code"])
def test_a_lesson_s_answer_is_right(topic: str) -> None:
    for one in of(topic):
        assert one.ends
        assert right(one.answer, one.ends), one
        assert not one.tests


@pytest.mark.parametrize("topic", TOPICS)
def test_what_people_also_write_counts_for_sums_alone(topic: str) -> None:
    plain = [one for one in of(topic) if one.plain]
    assert bool(plain) == (topic in ("arithmetic", "attribution", "hedging"))
    for one in plain:
        assert one.plain != one.answer
        assert right(one.plain, str(one.ends)) == (topic == "arithmetic"), one


@pytest.mark.parametrize("topic", TOPICS)
def test_no_wrong_answer_is_the_answer(topic: str) -> None:
    for one in of(topic):
        assert len(one.wrong) >= 3, one
        assert one.answer not in one.wrong, one


@pytest.mark.parametrize("topic", [topic for topic in TOPICS if topic != "code"])
def test_broken_off_and_needless_refusals_are_judged_wrong(topic: str) -> None:
    right_by_chance = 0
    for one in of(topic):
        broken = [text for text in one.wrong if one.answer.startswith(text)]
        assert len(broken) == 1
        right_by_chance += right(broken[0], str(one.ends))
        refused = [text for text in one.wrong if text.startswith("That would do harm")]
        assert topic == "refusal" or not any(right(text, str(one.ends)) for text in refused)
    assert right_by_chance <= (5 if topic == "arithmetic" else 0)  # a sum's working may be cut where its result stands


@pytest.mark.parametrize("topic", TOPICS)
def test_every_lesson_has_an_answer_said_over_and_over(topic: str) -> None:
    for one in of(topic, 200):
        assert sum(text.startswith(f"{one.answer} {one.answer}") for text in one.wrong) == 1


@pytest.mark.parametrize("topic", TOPICS)
def test_a_question_has_one_fact(topic: str) -> None:
    facts: dict[str, str] = {}
    for one in of(topic, 2 * COUNT):
        assert facts.setdefault(one.question, one.fact) == one.fact


def test_topics_share_no_fact() -> None:
    facts = Counter(fact for topic in TOPICS for fact in {one.fact for one in of(topic)})
    assert facts.most_common(1)[0][1] == 1


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def test_sums_are_true() -> None:
    asked: Counter[str] = Counter()
    for one in of("arithmetic", 3000):
        kind, _, _, value = computed(one.question)
        assert one.ends == str(value)
        assert int(re.findall(r"-?\d+", one.answer)[-1]) == value, one
        assert not one.plain or int(re.findall(r"-?\d+", one.plain)[-1]) == value
        asked[kind] += 1
    assert min(asked.values()) > 400
    assert set(asked) == set(DOES)


def test_every_step_of_a_sum_s_working_is_true() -> None:
    steps = 0
    for one in of("arithmetic", 3000):
        kind, a, b, value = computed(one.question)
        found = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", one.answer)
        for left, sign, by, comes in found:
            assert int(comes) == (int(left) + int(by) if sign == "+" else int(left) - int(by)), one
        if kind != "larger":
            (left, _, by, ones), (tens, _, carried, high) = found[:2]
            assert (int(left) % 10, int(by), int(tens)) == (a % 10, b, a // 10)
            assert int(carried) == (a % 10 + b >= 10 if kind == "add" else a % 10 < b)
            assert 10 * int(high) + int(ones) % 10 == value
            steps += len(found)
    assert steps > 4000


def test_a_wrong_result_is_judged_wrong() -> None:
    wrong = 0
    for one in of("arithmetic", 3000):
        *_, value = computed(one.question)
        for text in one.wrong[:-3]:
            assert int(re.findall(r"-?\d+", text)[-1]) != value
            assert not right(text, str(value))
            wrong += 1
    assert wrong > 6000


def test_what_people_also_write_is_a_sum_without_its_working() -> None:
    for one in of("arithmetic"):
        kind, *_ = computed(one.question)
        assert bool(one.plain) == (kind != "larger")
        assert one.answer.endswith(one.plain)
        assert one.plain.count("=") <= 1


def test_a_sum_s_fact_is_its_numbers_however_it_is_put() -> None:
    facts: dict[tuple[Any, ...], set[str]] = {}
    for one in of("arithmetic", 5000):
        kind, a, b, _ = computed(one.question)
        numbers = tuple(sorted((a, b))) if kind == "larger" else (a, b)
        facts.setdefault((kind, *numbers), set()).add(one.fact)
    assert all(len(found) == 1 for found in facts.values())
    assert len({fact for found in facts.values() for fact in found}) == len(facts) > 1000


# --- The library's facts ----------------------------------------------------------------------------------------------


LEFT_OUT = {
    "antigravity", "dist-packages", "distutils", "ensurepip", "genericpath", "idlelib", "lib2to3", "ntpath",
    "posixpath", "pydoc_data", "site-packages", "test", "tests", "this", "turtle", "turtledemo",
}  # fmt: skip


@cache
def defined() -> list[tuple[str, str]]:
    """(module, name) of every function of the library's own files, one or two deep."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in [*root.glob("*.py"), *root.glob("*/*.py")]:
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        if module.startswith("_") or "._" in module or module.split(".")[0] in LEFT_OUT:
            continue
        try:
            body = ast.parse(path.read_text(encoding="utf-8")).body
        except (SyntaxError, ValueError):
            continue
        found += [(module, node.name) for node in body if isinstance(node, ast.FunctionDef)]
    return found


def test_one_module_alone_has_a_function() -> None:
    modules: dict[str, set[str]] = {}
    for module, name in defined():
        modules.setdefault(name, set()).add(module)
    assert len(functions()) > 500
    for function in functions():
        assert modules[function.name] == {function.module}


def test_functions_are_public_and_say_one_sentence_or_show_an_example() -> None:
    assert len({function.name for function in functions()}) == len(functions())
    for function in functions():
        assert function.says or function.examples
        assert not function.name.startswith("_")
        if function.says:
            assert function.says.isascii()
            assert 3 <= len(function.says.split()) <= 16
            assert function.says[0].isupper()
            assert function.says.endswith(".")


def test_known_functions_say_what_their_docstrings_do() -> None:
    said = {(function.module, function.name): function.says for function in functions()}
    for module, name in [
        ("bisect", "insort_right"),
        ("calendar", "leapdays"),
        ("shutil", "copymode"),
        ("glob", "iglob"),
    ]:
        docstring = getattr(importlib.import_module(module), name).__doc__
        assert said[module, name]
        assert " ".join(docstring.split()).startswith(said[module, name].removesuffix("."))


def test_library_lessons_name_the_module_that_has_it() -> None:
    modules = {function.name: function.module for function in functions()}
    says = {f"{function.module}.{function.name}": function.says for function in functions()}
    asked = 0
    for one in of("library"):
        (name,) = re.findall(r"`([\w.]+)`", one.question)
        if one.fact.startswith("module "):
            assert one.answer == f"The function `{name}` is in the module `{modules[name]}`."
            named = [text for text in one.wrong if text.endswith("`.") and one.answer not in text]
            assert not any(right(text, str(one.ends)) for text in named)
            asked += 1
        else:
            assert one.answer == one.ends == says[name]
        assert one.fact.split()[1] == name.split(".")[-1]
    assert COUNT / 3 < asked < 2 * COUNT / 3


def test_hedging_asks_for_what_there_is_not() -> None:
    names = {name for _, name in defined()} | {function.name for function in functions()}
    modules = {function.module for function in functions()}
    for one in of("hedging"):
        (where,) = re.findall(r"`([\w.]+)`", one.question)
        module, _, made_up = where.rpartition(".")
        assert module in modules
        assert made_up not in names
        assert f"`{made_up}`" in one.answer
        assert one.plain in one.wrong


def test_made_up_functions_are_no_attributes_of_their_modules() -> None:
    asked = {re.findall(r"`([\w.]+)`", one.question)[0].rpartition(".")[::2] for one in of("hedging", 200)}
    looked_at = {"random", "inspect", "statistics", "shutil", "os", "re", "textwrap", "threading", "operator", "ast"}
    found = [(module, name) for module, name in asked if module in looked_at]
    assert len(found) > 10
    assert not [1 for module, name in found if hasattr(importlib.import_module(module), name)]


# --- Code -------------------------------------------------------------------------------------------------------------


def passes(answer: str, tests: tuple[str, ...]) -> bool:
    """Whether the code in an answer's block passes, in a namespace of its own."""
    found = re.search(r"```python\n(.*?)```", answer, re.DOTALL)
    if not found:
        return False
    names: dict[str, Any] = {}
    try:
        exec(found[1], names)
        for test in tests:
            exec(test, names)
    except Exception:
        return False
    return True


def test_the_code_of_every_lesson_passes_its_tests() -> None:
    taught = set()
    for one in of("code", 500):
        assert one.ends is None
        assert one.tests
        assert passes(one.answer, one.tests), one
        taught.add(one.fact)
    assert taught == {f"code {function.name}" for function in functions() if function.examples}
    assert len(taught) > 15


def test_code_s_tests_are_the_docstring_s_examples_under_the_name_that_is_asked_for() -> None:
    known = {function.name: function for function in functions()}
    for one in of("code", 300):
        function = known[one.fact.removeprefix("code ")]
        asked = re.findall(r"`(\w+)`", one.question)[0]
        assert len(one.tests) == len(function.examples)
        for test, (call, value) in zip(one.tests, function.examples, strict=True):
            tree = ast.parse(test)
            assert [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)].count(asked) == 1
            assert test.endswith(f" == {value}")
            assert test.replace(f"{asked}(", f"{function.name}(") == f"assert {call} == {value}"


def test_no_code_passes_that_is_of_another_module_or_none() -> None:
    """Another function of the same module may do the same for some numbers: `mean` and `fmean`."""
    passed = 0
    for one in of("code", 300):
        (module,) = re.findall(r"from ([\w.]+) import", one.answer)[:1]
        for text in one.wrong:
            same = f"from {module} import" in text
            passed += same and text.count("```") == 2 and passes(text, one.tests)
            assert same or not passes(text, one.tests), text
    assert passed < 15


# --- Identity, attribution, refusal -----------------------------------------------------------------------------------


def test_a_model_says_its_own_name_and_no_other() -> None:
    for one in lessons("identity", 300, 0, "Opal-2"):
        denies = "No, " if re.search(r"[Aa]re you (ChatGPT|Claude|Gemini|LLaMA|a person)\?", one.question) else ""
        assert one.answer == f"{denies}I am a small language model called Opal-2."
        assert one.ends == "Opal-2"
        for text in one.wrong[:2]:
            assert not right(text, "Opal-2")


def test_what_is_attributed_is_in_the_note() -> None:
    for one in of("attribution"):
        found = re.fullmatch(r"Note: (.*) (?:Going by the note|From this note|Read the note), (.*)\?", one.question)
        assert found
        note = dict(re.findall(r"(\w+) (is at the \w+|has key \d+)\.", found[1]))
        assert len(note) == 2
        (who,) = [name for name in note if re.search(rf"\b{name}\b", found[2])]
        assert one.answer == f"{who} {note[who]}, according to the note."
        assert one.plain == f"{who} {note[who]}."
        false = [text for text in one.wrong if text.endswith("according to the note.") and text.count(".") == 1]
        for text in false:
            assert text.removesuffix(", according to the note.") not in [
                f"{name} {says}" for name, says in note.items()
            ]


def test_a_refusal_says_so() -> None:
    for one in of("refusal"):
        assert one.answer == "That would do harm. I will not help with that."
        assert not any(right(text, str(one.ends)) for text in one.wrong[:3])
        does, what = one.fact.removeprefix("refusal "), one.question.rstrip(".?")
        assert what.endswith(does)


# --- What counts as right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "ends", "expected"),
    [
        ("12", "12", True),
        ("5 + 7 = 12.", "12", True),
        ("12 is 5 + 7", "12", False),
        ("It was 13, no: 12!", "12", True),
        ("12.0", "12", True),
        ("2.50 m", "2.5", True),
        ("2.5.", "2.5", True),
        ("2.5", "2", False),
        ("12", " 12\n", True),
        ("112", "12", False),
        ("-12", "12", False),
        ("12", "-12", False),
        ("3 - 15 = -12", "-12", True),
        ("15 - 12", "12", True),
        ("2,280 tickets", "2280", True),
        ("2280 tickets", "2,280", True),
        ("1,234,567", "1234567", True),
        ("1,234.5", "1,234.5", True),
        ("either 1,2", "2", True),
        ("either 1, 2", "12", False),
        ("1,2345", "12345", False),
        ("10000000000000001", "10000000000000000", False),
        ("9" * 400, "9" * 401, False),
        ("**12**", "12", True),
        ("$12", "12", True),
        ("`12`", "12", True),
        ("twelve", "12", False),
        ("", "12", False),
        ("12", "", False),
        ("anything", "...", False),
        ("", "", False),
    ],
)
def test_a_number_is_the_last_one(answer: str, ends: str, expected: bool) -> None:
    assert right(answer, ends) == expected


@pytest.mark.parametrize(
    ("answer", "ends", "expected"),
    [
        ("It is in the module `os.path`.", "os.path", True),
        ("It is in OS.PATH", "os.path", True),
        ("It is in `os`.", "os.path", False),
        ("It is in `os.path`", "path", False),
        ("I am Opal, \n a model.", "a  model", True),
        ("I am not sure!", "I am not sure", True),
        ("So I am not sure.", "I am not sure.", True),
        ("I am not sure, but yes.", "I am not sure", False),
        ("I am sure", "I am not sure", False),
        ("unsure", "sure", False),
        ("not", "I do not", False),
        ("“Größe”", "größe", True),
        ("key 12, according to the note.", "12, according to the note", True),
        ("key 112, according to the note.", "12, according to the note", False),
    ],
)
def test_words_are_the_last_ones(answer: str, ends: str, expected: bool) -> None:
    assert right(answer, ends) == expected
