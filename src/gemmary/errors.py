"""The one exception for what a user can put right: one line saying what is wrong and what to do.

The command line prints it as `error: …` and exits with 2; anything else that escapes is a bug of ours.
"""

__all__ = ["GemmaryError"]


class GemmaryError(ValueError):
    """A mistake in what was given (a file, a name, a value), told in one line with the way out."""
