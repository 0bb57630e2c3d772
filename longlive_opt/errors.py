"""User mistakes raise `UserError`; command lines print its message without a traceback."""


class UserError(ValueError):
    """A wrong input. The message names the field, the value found and the remedy, in one sentence or two."""


class NotAvailable(UserError):
    """The request is valid, but this machine cannot run it. A campaign goes on and reports `n/a: reason`."""
