"""The two ways in which a command may fail: each message is one sentence that says what to do."""


class UserError(Exception):
    """A wrong command, config or input file: exit code 2, no traceback."""


class RunError(Exception):
    """A failure while running that the message explains: exit code 1, no traceback."""
