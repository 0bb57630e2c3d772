"""Playing a stream in a notebook: an engine that runs the session, and the widget that shows it.

    from longlive_opt.live import Player
    player = Player.preset("static_kv")    # or Player(session)
    player                                 # shows it; its buttons are also methods

The widgets come when they are asked for: the engine and the recordings need neither ipywidgets nor Jupyter.
"""

from __future__ import annotations

from typing import Any

_HOMES = {"Player": "player", "Comparison": "wipe"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
