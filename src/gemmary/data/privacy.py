"""Personal data and secrets, masked in place: what was found becomes a name in brackets, such as `[email]`.

Where a number carries a checksum it must hold (cards by Luhn, IBAN by ISO 7064 mod 97) or keep to the issuer's rules
(social security numbers, addresses of public networks), so that ordinary numbers stay. Names of people are not looked for.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["RULES", "masked"]


def _luhn(found: str) -> bool:
    digits = [int(c) for c in found if c.isdigit()]
    doubled = [d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and sum(doubled) % 10 == 0 and len(set(digits)) > 1


def _iban(found: str) -> bool:
    code = "".join(found.split())
    moved = code[4:] + code[:4]
    return 15 <= len(code) <= 34 and int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def _public_address(found: str) -> bool:
    try:
        address = ipaddress.ip_address(found)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


def _phone(found: str) -> bool:
    return 7 <= sum(c.isdigit() for c in found) <= 15


def _mixed(found: str) -> bool:
    """A secret's value is neither a word nor a number."""
    value = re.split(r"[:=\s\"']+", found.rstrip("\"'"))[-1]
    return any(c.isdigit() for c in value) and any(c.isalpha() for c in value)


def _always(_: str) -> bool:
    return True


@dataclass(frozen=True)
class _Rule:
    name: str
    kind: str
    hint: re.Pattern[str] | tuple[str, ...]
    """Cheap to look for; without it, or without any of them, the pattern cannot match."""
    pattern: re.Pattern[str]
    holds: Callable[[str], bool] = _always

    def may_match(self, text: str) -> bool:
        """Whether it is worth looking."""
        if isinstance(self.hint, tuple):
            return any(literal in text for literal in self.hint)
        return self.hint.search(text) is not None


def _rule(
    name: str, kind: str, hint: str | tuple[str, ...], pattern: str, holds: Callable[[str], bool] = _always
) -> _Rule:
    return _Rule(name, kind, re.compile(hint) if isinstance(hint, str) else hint, re.compile(pattern), holds)


_KEY_HINTS = (
    "AKIA", "ASIA", "AIza", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "xox", "sk-", "sk_", "rk_", "hf_",
    "npm_", "pypi-", "SG.", "ya29.",
)  # fmt: skip
_TOKEN_HINTS = (
    "ecret",
    "ECRET",
    "oken",
    "OKEN",
    "assw",
    "ASSW",
    "pi_key",
    "PI_KEY",
    "piKey",
    "PIKEY",
    "pi_Key",
    "earer ",
)
_DIGITS = r"\d{3}"
RULES: tuple[_Rule, ...] = (
    _rule(
        "private_key", "secret", ("-----BEGIN ",),
        r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----(?:.|\n){1,20000}?-----END (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
    ),
    _rule(
        "api_key", "secret", _KEY_HINTS,
        r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}"
        r"|xox[abprs]-[\w-]{10,}|sk-(?:[a-z]+-)*[A-Za-z0-9_-]{20,}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|hf_[A-Za-z0-9]{30,}"
        r"|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,}|SG\.[\w-]{16,}\.[\w-]{16,}|ya29\.[\w-]{20,})(?![\w-])", _mixed,
    ),
    _rule("token", "secret", ("eyJ",), r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    _rule(
        "token", "secret", _TOKEN_HINTS,
        r"(?:[Ss]ecret|[Tt]oken|[Pp]assw(?:or)?d|[Aa]pi_?[Kk]ey|SECRET|TOKEN|PASSW(?:OR)?D|API_?KEY)[\w-]*[\"']?\s*[:=]\s*"
        r"[\"'][\w+/=.-]{16,}[\"']|[Bb]earer [\w+/=.-]{20,}",
        _mixed,
    ),
    _rule(
        "email", "personal", ("@",),
        r"(?<![\w.+/-])[A-Za-z0-9][\w.+-]{0,63}@[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}\.)+[A-Za-z]{2,24}(?![\w-])",
    ),
    _rule("iban", "personal", r"[A-Z]{2}\d\d", r"\b[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", _iban),
    _rule("card", "personal", r"\d{4}", r"(?<![\d.,-])[2-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7}(?![\d.,-]*\d)", _luhn),
    _rule("card", "personal", r"3[47]\d\d", r"(?<![\d.,-])3[47]\d{2}[ -]?\d{6}[ -]?\d{5}(?![\d.,-]*\d)", _luhn),
    _rule(
        "social_security_number", "personal", r"\d{3}-\d\d-\d{4}",
        r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])",
    ),
    _rule("ip_address", "personal", r"\d\.\d", r"(?<![\w.-])(?:\d{1,3}\.){3}\d{1,3}(?![\w-]|\.\d)", _public_address),
    _rule("ip_address", "personal", r"[0-9a-fA-F]:[0-9a-fA-F:]", r"(?<![\w:.])(?:[0-9a-fA-F]{1,4}:{1,2}){3,7}[0-9a-fA-F]{1,4}(?![\w:])", _public_address),
    _rule(
        "phone", "personal", _DIGITS,
        r"(?<![\w.+/$€£-])(?:\+\d{1,3}[ .-]?(?:\(0?\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
        r"|(?:1[ .-])?\(\d{3}\) ?\d{3}[ .-]\d{4}|(?:1[ .-])?[2-9]\d{2}([.-])\d{3}\1\d{4})(?![\w/-]|\.\d)", _phone,
    ),
)  # fmt: skip
"""In the order in which they are applied. `kind` is "personal" or "secret"."""


def masked(text: str, kinds: tuple[str, ...] = ("personal", "secret")) -> tuple[str, Counter[str]]:
    """The text with what was found replaced by its rule's name in brackets, and how often each rule did."""
    found: Counter[str] = Counter()
    for rule in RULES:
        if rule.kind not in kinds or not rule.may_match(text):
            continue

        def mask(match: re.Match[str], rule: _Rule = rule) -> str:
            if not rule.holds(match[0]):
                return match[0]
            found[rule.name] += 1
            return f"[{rule.name}]"

        text = rule.pattern.sub(mask, text)
    return text, found
