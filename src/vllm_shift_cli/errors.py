"""The error that a command shows to its user."""


class CommandError(Exception):
    """Input that a command cannot use; the text says what is wrong and what would work."""
