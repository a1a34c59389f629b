"""What is personal or secret is masked, and ordinary numbers stay."""

from __future__ import annotations

import time

import pytest

from gemmary.data.privacy import RULES, masked

# Made up, or published as examples; split so that no scanner of repositories takes them for real.
FOUND = {
    "email": ["jane.doe+list@mail.example.co.uk", "x@y-z.org"],
    "phone": ["(415) 555-2671", "415-555-2671", "1-800-555-0199", "+44 20 7946 0958", "+49 (0)30 901820", "+1 415 555 2671"],
    "ip_address": ["8.8.8.8", "2001:4860:4860:0:0:0:0:8888", "2001:4860:4860::8888"],
    "card": ["4111 1111 1111 1111", "5500-0000-0000-0004", "4012888888881881", "378282246310005", "3782 822463 10005"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "FR1420041010050500013M02606"],
    "social_security_number": ["078-05-1120"],
    "api_key": [
        "AKIA" + "IOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9, "sk-" + "proj-" + "Ab3d" * 8, "AIza" + "Sy0" * 11 + "ab", "xoxb-" + "12345-abcdef",
        "sk_live_" + "4eC39HqLyjWDarjt", "hf_" + "aB3d" * 9, "glpat-" + "a1b2c3d4e5" * 2,
    ],
    "token": [
        "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0NSJ9" + ".dozjgNryP4J3jVmNHl0w5N", "api_key = 'a1b2c3d4e5f6a7b8'",
        'SECRET_TOKEN: "9f8e7d6c5b4a39281706"', "Bearer abcdefghij0123456789",
    ],
    "private_key": ["-----BEGIN RSA PRIVATE " + "KEY-----\nMIIEow\nIBAAK\n-----END RSA PRIVATE " + "KEY-----"],
}  # fmt: skip
STAYS = [
    "in 1999-2000 and 12345678 people", "version 1.2.3.4.5 and 10.0.0.1", "192.168.1.1 or 127.0.0.1", "4111 1111 1111 1112",
    "DE88 3704 0044 0532 0130 00", "000-12-3456 or 666-12-3456", "ISBN 978-3-16-148410-0", "at 12:30:45 on 2024-01-02",
    "x = a @ b", "@decorator", "3.14159265358979", "0000 0000 0000 0000", "token = 'abcdefghijklmnopqrst'",
    "password = 'correct'", "pages 101-115, 2000", "1,234,567,890 dollars", "call 911", "12 34 56 78 90",
    "dead:beef is not an address", "sk-learn and hf_hub", "a +1 b", "1 + 415 555 2671 4",
]  # fmt: skip


@pytest.mark.parametrize(("rule", "example"), [(rule, example) for rule, given in FOUND.items() for example in given])
@pytest.mark.parametrize("around", [("Say ", " now."), ("(", ")"), ("", ""), ("at: ", ",\nthen")])
def test_found(rule: str, example: str, around: tuple[str, str]) -> None:
    before, after = around
    text, counts = masked(f"{before}{example}{after}")
    assert f"[{rule}]" in text
    assert counts[rule] == 1
    assert example not in text
    assert text.startswith(before)
    assert text.endswith(after)


@pytest.mark.parametrize("text", STAYS)
def test_stays(text: str) -> None:
    assert masked(text) == (text, {})


def test_every_rule_is_tested() -> None:
    assert {rule.name for rule in RULES} == set(FOUND)


def test_only_what_is_asked_for() -> None:
    text = f"mail a@b.org, key {FOUND['api_key'][0]}"
    assert masked(text, ("personal",))[0].endswith(FOUND["api_key"][0])
    assert masked(text, ("secret",))[0].startswith("mail a@b.org")
    assert masked(text, ())[0] == text


@pytest.mark.parametrize(
    "part",
    [
        "-----BEGIN PRIVATE KEY-----",
        "a@a.a.",
        "1 ",
        "+1 2 ",
        "a:1:",
        "token='",
        "eyJaaaaaaaaaaaa.",
        "AA11 ",
        "1.1.",
        "a1-",
    ],
)
def test_hostile_text_takes_no_longer(part: str) -> None:
    started = time.perf_counter()
    masked(part * (100_000 // len(part)))
    assert time.perf_counter() - started < 10  # a tenth of a second, unless time grows with the square
