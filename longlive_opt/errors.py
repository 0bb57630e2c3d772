"""The one exception that a user's mistake raises: command lines print it without a traceback."""


class UserError(ValueError):
    """A wrong input. The message names the field, the value found and the remedy, in one sentence or two."""


class NotAvailable(UserError):
    """What was asked for is right and cannot run on this machine; a campaign goes on and reports `n/a:
    reason`.
    """
