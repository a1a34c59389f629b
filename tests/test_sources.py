"""Every kind of source gives its documents, in any cut; what is broken is counted, and what cannot be read is said."""

from __future__ import annotations

import gzip
import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from gemmary.data.arithmetic import worked
from gemmary.data.readers import Broken, Document
from gemmary.data.sources import Source, read, shards
from gemmary.errors import GemmaryError


def _all(source: Source, task_bytes: int = 1 << 20, cache: Path = Path()) -> list[Document | Broken]:
    return [found for shard in shards(source, task_bytes, cache) for found in read(shard, cache)]


def _source(path: Path, kind: str = "jsonl", **given: Any) -> Source:
    return Source(name="x", kind=kind, path=str(path), **given)  # type: ignore[arg-type]


LINES = [
    json.dumps({"text": f"Text {i} " + "é" * (i % 50), "id": i, "metadata": {"i": i}}, ensure_ascii=False)
    for i in range(300)
]


@pytest.mark.parametrize("task_bytes", [1, 97, 4096, 1 << 20])
@pytest.mark.parametrize("ending", ["\n", ""])
def test_jsonl_is_the_same_in_any_cut(tmp_path: Path, task_bytes: int, ending: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(LINES) + ending, encoding="utf-8")
    found = _all(_source(path), task_bytes)
    assert found == [Document(str(i), json.loads(line)["text"], {"i": i}) for i, line in enumerate(LINES)]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_jsonl(tmp_path: Path, suffix: str) -> None:
    data = "\n".join(LINES).encode()
    packed = (
        gzip.compress(data) if suffix == ".gz" else zstandard.compress(data[:5000]) + zstandard.compress(data[5000:])
    )
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed)
    assert len(_all(_source(path))) == 300
    path.write_bytes(packed[: len(packed) // 2])
    if suffix == ".gz":
        with pytest.raises(GemmaryError, match="cannot be read"):
            _all(_source(path))


BROKEN = [
    b'{"text": "fine", "id": "first"}', b'{"text": ', b'{"text": ""}', b'{"other": "x"}', b'{"text": 3}', b"[1, 2]", b"",
    b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"[" * 100_000, b'{"text": "last"}',
]  # fmt: skip


@pytest.mark.parametrize("task_bytes", [1 << 20, 10])
def test_broken_lines_are_said_and_reading_goes_on(tmp_path: Path, task_bytes: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(BROKEN))
    found = _all(_source(path), task_bytes)
    assert [d.text for d in found if isinstance(d, Document)] == ["fine", "last"]
    said = [f"{d.where}: {d.why}" for d in found if isinstance(d, Broken)]
    assert len(said) == 8
    assert said[0].startswith("a.jsonl:2: not JSON")
    assert any(line.startswith("a.jsonl:9: not UTF-8") for line in said)
    assert {"no text at 'text'", "not an object", "a lone surrogate: not Unicode"} <= {
        d.why for d in found if isinstance(d, Broken)
    }


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a.txt").write_text("\ufeffOne.\n\nTwo.", encoding="utf-8")
    (tmp_path / "below" / "b.md").write_text("Three.", encoding="utf-8")
    (tmp_path / "c.txt").write_bytes(b"\xff")
    (tmp_path / "d.png").write_bytes(b"no")
    found = _all(_source(tmp_path, "text"))
    assert [(d.id, d.text) for d in found if isinstance(d, Document)] == [("a.txt", "One.\n\nTwo."), ("b.md", "Three.")]
    assert [d for d in found if isinstance(d, Broken)] == [Broken("c.txt", "not UTF-8: invalid start byte at byte 0")]


def test_a_large_text_file_is_cut_at_a_blank_line(tmp_path: Path) -> None:
    text = ("A line of some words.\n" * 50 + "\n") * 2500
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = [d for d in _all(_source(tmp_path / "a.txt", "text")) if isinstance(d, Document)]
    assert "".join(d.text for d in found) == text
    assert [d.id for d in found] == ["a.txt#1", "a.txt#2", "a.txt#3"]
    assert all(d.text.startswith(("A line", "\nA line")) for d in found)


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table(
        {"content": [f"Text {i}" for i in range(10)] + [None], "key": list(range(11)), "other": [0] * 11}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    source = _source(tmp_path, "parquet", text_key="content", id_key="key")
    found = _all(source, 1)
    assert len(shards(source, 1, Path())) == 3
    assert found[:10] == [Document(str(i), f"Text {i}", {}) for i in range(10)]
    assert isinstance(found[10], Broken)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(GemmaryError, match="Parquet"):
        _all(source)


def _record(kind: str, address: str, content: str, body: bytes) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {address}\r\nContent-Type: {content}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body + b"\r\n\r\n"


def _response(kind: str, body: str) -> bytes:
    answer = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n\r\n{body}".encode()
    return _record("response", "http://a.example/", "application/http; msgtype=response", answer)


def test_warc(tmp_path: Path) -> None:
    page = (
        "<html><body><nav>Home</nav><article><p>"
        + "The lighthouse stood on the rock above the bay. " * 8
        + "</p></article></body></html>"
    )
    pages = [
        _response(kind, body)
        for kind, body in (("text/html", page), ("image/png", "x"), ("text/html", "<html></html>"))
    ]
    plain_text = _record("conversion", "http://b.example/", "text/plain", b"Plain words.")
    (tmp_path / "a.warc.gz").write_bytes(b"".join(map(gzip.compress, [*pages, plain_text])))
    first, empty, plain = _all(_source(tmp_path, "warc"))
    assert isinstance(first, Document)
    assert first.text.startswith("The lighthouse")
    assert "Home" not in first.text
    assert first.metadata == {"url": "http://a.example/"}
    assert isinstance(empty, Broken)
    assert isinstance(plain, Document)
    assert plain.text == "Plain words."
    (tmp_path / "a.warc.gz").write_bytes(b"nothing of the kind")
    with pytest.raises(GemmaryError, match="WARC"):
        _all(_source(tmp_path, "warc"))


def test_huggingface_directory(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(LINES), encoding="utf-8")
    found = _all(_source(tmp_path / "set", "huggingface"), cache=tmp_path / "cache")
    assert [d.text for d in found if isinstance(d, Document)] == [json.loads(line)["text"] for line in LINES]
    with pytest.raises(GemmaryError, match="hub = true"):
        _all(_source(Path("someone/something"), "huggingface"))
    with pytest.raises(GemmaryError, match="datasets cannot load"):
        _all(_source(tmp_path / "set", "huggingface", split="absent"), cache=tmp_path / "cache")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "jsonl"}, "needs a path"),
        ({"kind": "python", "path": "x"}, "has no path"),
        ({"kind": "arithmetic", "name": "../x"}, "a source's name"),
        ({"kind": "arithmetic", "held_out": 1.0}, "held_out"),
        ({"kind": "arithmetic", "documents": 0}, "documents"),
        ({"kind": "jsonl", "path": "x", "hub": True}, "hub"),
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(GemmaryError, match=message):
        Source(**{"name": "x", **given})


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(GemmaryError, match="no jsonl file"):
        _all(_source(tmp_path))
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(GemmaryError, match="is empty"):
        _all(_source(tmp_path / "*.jsonl"))


def test_python_has_prose_and_code() -> None:
    source = Source(name="x", kind="python")
    prose = {d.id.split("/", 1)[1]: d.text for d in _all(source) if isinstance(d, Document)}
    assert sum(map(len, prose.values())) > 1_500_000
    assert prose["prose/json/__init__.py"].startswith("JSON (JavaScript Object Notation)")
    assert "\n\ndumps\nSerialize ``obj``" in prose["prose/json/__init__.py"]
    assert "topics/if" in prose
    code = shards(Source(name="x", kind="python", part="code"), 1 << 20, Path())
    assert len(code) > 5
    assert any(
        d.text == Path(json.__file__).read_text()
        for shard in code
        for d in read(shard, Path())
        if isinstance(d, Document)
    )


def test_arithmetic_is_fixed_and_varied() -> None:
    source = Source(name="x", kind="arithmetic", documents=5000, seed=3)
    whole = _all(source)
    assert whole == _all(source, 1 << 60)
    texts = {d.text for d in whole if isinstance(d, Document)}
    assert len(texts) == 5000
    assert worked(3, 17) != worked(4, 17)


NUMBER = r"(?:\(-?\d+\)|-?\d[\d./]*)"
SIDE = rf"{NUMBER}(?: [+×÷-] {NUMBER})*"
CHAIN = re.compile(rf"(?<![\w(+×÷-])(?<![+×÷-] )(?<!term ){SIDE}(?: = {SIDE})+(?! [+×÷-])")


def _value(sides: str) -> Fraction:
    """By the rules of precedence, independent of how it was generated."""
    tokens = [t.strip("()").rstrip(".") if t not in "+-×÷" else t for t in sides.split()]
    terms, sign = [Fraction(tokens[0])], "+"
    for operator, token in zip(tokens[1::2], tokens[2::2], strict=True):
        value = Fraction(token)
        if operator == "×":
            terms[-1] *= value
        elif operator == "÷":
            terms[-1] /= value
        else:
            sign = operator
            terms.append(value if sign == "+" else -value)
    return sum(terms, Fraction(0))


def test_every_stated_equation_holds() -> None:
    checked = 0
    for number in range(1500):
        for problem in worked(11, number).split("\n\n"):
            for chain in CHAIN.findall(problem):
                values = {_value(side) for side in chain.split(" = ")}
                assert len(values) == 1, (chain, problem)
                checked += 1
    assert checked > 8000


RESULTS = {
    r"What is (\d+) \+ (\d+)\?.*The sum is (\d+)\.$": lambda a, b, c: a + b == c,
    r"Subtract (\d+) from (\d+)\..*The difference is (\d+)\.$": lambda a, b, c: b - a == c,
    r"Multiply (\d+) by (\d+),.*So \d+ × \d+ = (\d+)\.$": lambda a, b, c: a * b == c,
    r"Divide (\d+) by (\d+) with.*quotient (\d+), remainder (\d+)\.$": lambda a, b, q, r: divmod(a, b) == (q, r),
    r"Work out (\S+) \+ (\S+)\..*that is (\S+)\.$": lambda a, b, c: a + b == c,
    r"Work out (\S+) - (\S+)\..*that is (\S+)\.$": lambda a, b, c: a - b == c,
    r"What is (\d+)% of (\d+)\?.*÷ 100 = (\S+)\.\n.*becomes \d+ - \S+ = (\S+)\.$": lambda p, w, s, r: (p * w == 100 * s) and w - s == r,
    r"Solve (\d+)\w \+ (\d+) = (-?\d+)\..*÷ \d+ = (-?\d+)\.\nCheck.*$": lambda a, b, c, x: a * x + b == c,
    r"A sequence begins (-?\d+), (-?\d+),.* first (\d+) terms.*= (-?\d+)\.\nThe sum is .* = (-?\d+)\.$": (
        lambda a, b, n, last, total: last == a + (n - 1) * (b - a) and 2 * total == n * (a + last)
    ),
    r".* buys (\d+) .* for (\d+) coins .* with (\d+) coins\..* = (\d+) coins\.$": lambda n, p, paid, c: paid - n * p == c >= 0,
    r"(.*) find (\d+) .* give (\d+) away.*Each gets (\d+), and (\d+) .*left over\.$": None,
    r".* travels (\d+) and a half hours at (\d+) km .* then (\d+) km more.* = (\d+) km in all\.$": (
        lambda h, v, more, far: 2 * far == (2 * h + 1) * v + 2 * more
    ),
    r"Find the greatest common divisor of (\d+) and (\d+) .*gcd\(\d+, \d+\) = (\d+), .* = (\d+)\.$": None,
}  # fmt: skip


def _divides_and_no_more(a: int, b: int, divisor: int) -> bool:
    return a % divisor == b % divisor == 0 and not any(a % d == b % d == 0 for d in range(divisor + 1, min(a, b) + 1))


def test_every_result_is_true() -> None:
    seen = dict.fromkeys(RESULTS, 0)
    for number in range(400):
        for problem in worked(5, number).split("\n\n"):
            matches = [(pattern, m) for pattern in RESULTS if (m := re.fullmatch(pattern, problem, re.DOTALL))]
            assert len(matches) == 1, problem
            pattern, match = matches[0]
            seen[pattern] += 1
            if "divisor of" in pattern:
                a, b, divisor, multiple = map(int, match.groups())
                assert _divides_and_no_more(a, b, divisor), problem
                assert multiple * divisor == a * b
            elif " find " in pattern:
                people = len(re.split(r", | and ", match[1]))
                total, lost, each, left = map(int, match.groups()[1:])
                assert divmod(total - lost, people) == (each, left), problem
            else:
                assert RESULTS[pattern](*map(Fraction, match.groups())), problem  # type: ignore[misc]
    assert min(seen.values()) > 10
