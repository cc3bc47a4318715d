# idunno/__init__.py: the Python door. Importing it is light: the client is loaded by the first `connect`.
from __future__ import annotations

from typing import TYPE_CHECKING, Any

from idunno.base.version import VERSION as __version__

if TYPE_CHECKING:
    from idunno.client.api import connect_async
    from idunno.client.sync import connect

__all__ = ["__version__", "connect", "connect_async"]


def __getattr__(name: str) -> Any:
    if name == "connect":
        from idunno.client.sync import connect

        return connect
    if name == "connect_async":
        from idunno.client.api import connect_async

        return connect_async
    raise AttributeError(f"module 'idunno' has no attribute {name!r}")
