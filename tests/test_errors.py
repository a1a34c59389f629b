"""Messages stay one line, whatever they quote."""

from dataclasses import dataclass

import pytest

from gemmary.errors import GemmaryError, check_bounds


def test_a_message_is_one_printable_line() -> None:
    assert str(GemmaryError("a name\n\tof\x1b[31m \x00red\ud800")) == "a name of\ufffd[31m \ufffdred\ufffd"


def test_a_long_message_is_cut() -> None:
    assert len(str(GemmaryError("x" * 10_000))) == 800
    assert str(GemmaryError("x" * 800)) == "x" * 800


@dataclass
class Settings:
    least: float = 1
    share: float = 0.5


def test_bounds_are_included_and_their_breach_is_named() -> None:
    check_bounds(Settings(1, 0.0), least=(1, None), share=(0, 1))
    check_bounds(Settings(1e9, 1.0), least=(1, None), share=(0, 1))
    for wrong, message in (
        (Settings(least=0), r"^a\.least is 0; it is at least 1$"),
        (Settings(share=1.1), r"^a\.share is 1\.1; it may be 0 to 1$"),
        (Settings(share=-0.1), r"^a\.share is -0\.1"),
        (Settings(least=float("nan")), "least is nan"),
        (Settings(share=float("nan")), "share is nan"),
    ):
        with pytest.raises(GemmaryError, match=message):
            check_bounds(wrong, "a.", least=(1, None), share=(0, 1))
