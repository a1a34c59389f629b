"""The one exception for mistakes that a user can mend."""

__all__ = ["GemmaryError"]

_MOST = 800


class GemmaryError(ValueError):
    """Bad input. The message is one line: what is wrong, and what to do. The command line prints it and exits with 2.

    Messages quote what files hold, and a file may hold anything: white space is folded, what a terminal would obey is
    replaced, and a long message is cut.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(message.split()))
        super().__init__(line if len(line) <= _MOST else line[: _MOST - 1] + "…")
