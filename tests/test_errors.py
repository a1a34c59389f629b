"""Messages stay one line, whatever they quote."""

from gemmary.errors import GemmaryError


def test_a_message_is_one_printable_line() -> None:
    assert str(GemmaryError("a name\n\tof\x1b[31m \x00red\ud800")) == "a name of\ufffd[31m \ufffdred\ufffd"


def test_a_long_message_is_cut() -> None:
    assert len(str(GemmaryError("x" * 10_000))) == 800
    assert str(GemmaryError("x" * 800)) == "x" * 800
