"""The one exception for mistakes that a user can mend, and the check that most settings need."""

__all__ = ["GemmaryError", "check_bounds"]

_MOST = 800


class GemmaryError(ValueError):
    """Bad input. The message is one line: what is wrong, and what to do. The command line prints it and exits with 2.

    Messages quote what files hold, and a file may hold anything: white space is folded, what a terminal would obey is
    replaced, and a long message is cut.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(message.split()))
        super().__init__(line if len(line) <= _MOST else line[: _MOST - 1] + "…")


def check_bounds(settings: object, prefix: str = "", **bounds: tuple[float, float | None]) -> None:
    """Every field named lies within its bounds, both included (None: no upper one); else GemmaryError, `prefix` before its name."""
    for name, (least, most) in bounds.items():
        value = getattr(settings, name)
        if not least <= value or (most is not None and not value <= most):
            may = f"it is at least {least}" if most is None else f"it may be {least} to {most}"
            raise GemmaryError(f"{prefix}{name} is {value}; {may}")
