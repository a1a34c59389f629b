"""Worked mathematics, generated: every result stated is true, every document follows from the seed and its number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import gcd

from gemmary.data.readers import Document, Piece

__all__ = ["arithmetic_pieces", "read_arithmetic", "worked"]

_PROBLEMS = 2_000  # documents in a piece

_PEOPLE = (
    "Ada",
    "Ben",
    "Carla",
    "Deniz",
    "Emeka",
    "Farah",
    "Goran",
    "Hana",
    "Ivo",
    "Jun",
    "Kofi",
    "Lena",
    "Mira",
    "Noor",
)
_PLACES = ("market", "library", "bakery", "school", "harbour", "orchard", "museum", "workshop", "station", "farm")
_THINGS = (
    "apples",
    "books",
    "tickets",
    "pencils",
    "stamps",
    "bottles",
    "marbles",
    "cards",
    "bricks",
    "shells",
    "coins",
)


def _addition(r: random.Random) -> str:
    a, b = (r.randrange(10 ** r.randint(1, 6)) for _ in "ab")
    rows, carry = [], 0
    width = len(str(max(a, b)))
    for place in range(width):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        said = f"{x} + {y}" + (f" + {carry} carried" if carry else "")
        rows.append(f"Digit {place + 1} from the right: {said} = {total}, so write {total % 10}, carry {total // 10}.")
        carry = total // 10
    return f"What is {a} + {b}?\n" + "\n".join(rows) + f"\nThe sum is {a + b}."


def _subtraction(r: random.Random) -> str:
    a, b = sorted((r.randrange(10 ** r.randint(1, 6)) for _ in "ab"), reverse=True)
    cut = 10 ** max(len(str(b)) - 1, 0)
    first, rest = b // cut * cut, b % cut
    return (
        f"Subtract {b} from {a}.\nTake {b} apart: {b} = {first} + {rest}.\n{a} - {first} = {a - first}\n"
        f"{a - first} - {rest} = {a - b}\nCheck: {a - b} + {b} = {a}. The difference is {a - b}."
    )


def _multiplication(r: random.Random) -> str:
    a, b = r.randrange(2, 10 ** r.randint(1, 4)), r.randrange(11, 10 ** r.randint(2, 4))
    parts = [int(d) * 10**i for i, d in enumerate(reversed(str(b))) if d != "0"]
    lines = [f"{a} × {part} = {a * part}" for part in parts]
    summed = " + ".join(str(a * part) for part in parts)
    return (
        f"Multiply {a} by {b}, one digit of {b} at a time.\n"
        + "\n".join(lines)
        + f"\n{summed} = {a * b}\nSo {a} × {b} = {a * b}."
    )


def _division(r: random.Random) -> str:
    a, b = r.randrange(10, 10 ** r.randint(2, 6)), r.randrange(2, 100)
    rows, rest = [], 0
    for digit in str(a):
        now = 10 * rest + int(digit)
        rows.append(
            f"Bring down {digit}: {now} ÷ {b} gives {now // b}, and {now} - {now // b} × {b} = {now % b} remains."
        )
        rest = now % b
    return (
        f"Divide {a} by {b} with remainder.\n" + "\n".join(rows) + f"\n{a} = {b} × {a // b} + {a % b}: "
        f"quotient {a // b}, remainder {a % b}."
    )


def _fractions(r: random.Random) -> str:
    (a, b), (c, d) = ((r.randint(1, 30), r.randint(2, 30)) for _ in "xy")
    common = b * d // gcd(b, d)
    x, y = a * common // b, c * common // d
    sign, top, result = ("+", x + y, Fraction(a, b) + Fraction(c, d)) if r.random() < 0.5 or x < y else ("-", x - y, Fraction(a, b) - Fraction(c, d))  # fmt: skip
    return (
        f"Work out {a}/{b} {sign} {c}/{d}.\nThe least common denominator of {b} and {d} is {common}.\n"
        f"{a}/{b} = {x}/{common} and {c}/{d} = {y}/{common}.\n{x}/{common} {sign} {y}/{common} = {top}/{common}\n"
        f"In lowest terms that is {result}."
    )


def _percent(r: random.Random) -> str:
    share, whole = r.choice((5, 10, 12, 15, 20, 25, 30, 40, 45, 60, 75, 80)), 20 * r.randint(1, 400)
    part = share * whole // 100 if share * whole % 100 == 0 else None
    said = str(part) if part is not None else f"{share * whole / 100:.1f}"
    after = f"{whole - share * whole / 100:.1f}".removesuffix(".0")
    return (
        f"What is {share}% of {whole}?\n1% of {whole} is {whole} ÷ 100, and {share}% is {share} times as much:\n"
        f"{share} × {whole} = {share * whole}, and {share * whole} ÷ 100 = {said}.\n"
        f"A price of {whole} lowered by {share}% becomes {whole} - {said} = {after}."
    )


def _equation(r: random.Random) -> str:
    a, x, b = r.randint(2, 40), r.randint(-60, 60), r.randint(1, 300)
    v = r.choice("xyznktm")
    c = a * x + b
    return (
        f"Solve {a}{v} + {b} = {c}.\nSubtract {b} from both sides: {a}{v} = {c} - {b} = {c - b}.\n"
        f"Divide both sides by {a}: {v} = {c - b} ÷ {a} = {x}.\nCheck: {a} × ({x}) + {b} = {a * x} + {b} = {c}."
    )


def _sequence(r: random.Random) -> str:
    first, step, n, shown = r.randint(-50, 200), r.randint(2, 60), r.randint(10, 80), r.randint(4, 7)
    terms = ", ".join(str(first + i * step) for i in range(shown))
    last = first + (n - 1) * step
    return (
        f"A sequence begins {terms}. Which is term {n}, and what do the first {n} terms add up to?\n"
        f"Each term is {step} more than the one before, so term {n} = {first} + {n - 1} × {step} = {last}.\n"
        f"The sum is {n} × ({first} + {last}) ÷ 2 = {n * (first + last) // 2}."
    )


def _shopping(r: random.Random) -> str:
    who, other = r.sample(_PEOPLE, 2)
    thing, price, count, given = r.choice(_THINGS), r.randint(2, 30), r.randint(3, 40), r.randint(1, 2)
    paid = (price * count // 50 + given) * 50
    return (
        f"{who} buys {count} {thing} for {price} coins each at the {r.choice(_PLACES)} and pays with {paid} coins. "
        f"{other} wonders what comes back.\nThe {thing} cost {count} × {price} = {count * price} coins.\n"
        f"The change is {paid} - {count * price} = {paid - count * price} coins."
    )


def _sharing(r: random.Random) -> str:
    people, thing = r.sample(_PEOPLE, r.randint(2, 6)), r.choice(_THINGS)
    each, left, lost = r.randint(3, 60), r.randrange(len(people)), r.randint(1, 20)
    total = each * len(people) + left
    names = ", ".join(people[:-1]) + " and " + people[-1]
    return (
        f"{names} find {total + lost} {thing} near the {r.choice(_PLACES)}. They give {lost} away and share the rest equally. "
        f"How many does each get?\n{total + lost} - {lost} = {total} {thing} are left.\n"
        f"{total} = {len(people)} × {each} + {left}, and {left} cannot be shared among {len(people)}.\n"
        f"Each gets {each}, and {left} {'is' if left == 1 else 'are'} left over."
    )


def _journey(r: random.Random) -> str:
    who, speed, hours, rest = r.choice(_PEOPLE), 2 * r.randint(2, 60), r.randint(2, 9), r.randint(1, 40)
    far = speed * hours + speed // 2
    return (
        f"{who} travels {hours} and a half hours at {speed} km per hour, and then {rest} km more to the {r.choice(_PLACES)}. "
        f"How far is that?\nIn {hours} hours: {hours} × {speed} = {speed * hours} km. In half an hour: {speed} ÷ 2 = {speed // 2} km.\n"
        f"{speed * hours} + {speed // 2} = {far} km, and {far} + {rest} = {far + rest} km in all."
    )


def _divisor(r: random.Random) -> str:
    a, b = (r.randint(12, 3000) for _ in "ab")
    first, second, rows = a, b, []
    while b:
        rows.append(f"{a} = {a // b} × {b} + {a % b}")
        a, b = b, a % b
    return (
        f"Find the greatest common divisor of {first} and {second} by dividing with remainder.\n" + "\n".join(rows)
        + f"\nThe last divisor is {a}, so gcd({first}, {second}) = {a}, and their least common multiple is "
        f"{first} × {second} ÷ {a} = {first * second // a}."
    )  # fmt: skip


_KINDS: tuple[Callable[[random.Random], str], ...] = (
    _addition, _subtraction, _multiplication, _division, _fractions, _percent, _equation, _sequence, _shopping, _sharing,
    _journey, _divisor,
)  # fmt: skip


def worked(seed: int, number: int) -> str:
    """One document of two to five worked problems. Python's generator draws alike in every version."""
    r = random.Random(f"{seed}/{number}")
    return "\n\n".join(r.choice(_KINDS)(r) for _ in range(r.randint(2, 5)))


def arithmetic_pieces(documents: int) -> list[Piece]:
    """Ranges of numbers."""
    starts = range(0, documents, _PROBLEMS)
    return [
        Piece("arithmetic", 750 * min(_PROBLEMS, documents - at), at, min(at + _PROBLEMS, documents)) for at in starts
    ]


def read_arithmetic(piece: Piece, seed: int) -> Iterator[Document]:
    """The documents of these numbers."""
    return (Document(f"arithmetic/{seed}/{n}", worked(seed, n), {}) for n in range(piece.start, piece.end))
