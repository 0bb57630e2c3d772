"""User mistakes raise `UserError`; command lines print its message without a traceback."""

import reprlib
from typing import Any


class UserError(ValueError):
    """A wrong input. The message names the field, the value found and the remedy, in one sentence or two."""


class NotAvailable(UserError):
    """The request is valid, but this machine cannot run it. A campaign goes on and reports `n/a: reason`."""


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, 100, 100
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 20

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if abs(x) < 10**60 else f"a number of {x.bit_length()} bits"


def short(value: Any) -> str:
    """`value` as a message shows it: at most 120 characters, whatever it is."""
    text = _Short().repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
