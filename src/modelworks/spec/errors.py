"""The two ways in which a command ends badly, as exceptions that every room raises.

The command line turns them into one sentence and an exit code, the API into an HTTP status, the web pages into a
notice. Whatever else is raised is a defect of ours and shows its traceback.
"""


class InputError(ValueError):
    """What the user gave cannot be used (exit code 2). The message names the field, the value and what is accepted."""


class OperationError(RuntimeError):
    """The input was good and the work failed (exit code 1): disk full, NaN loss, a download that broke off."""
