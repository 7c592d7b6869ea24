"""No defense."""

from __future__ import annotations

from mocosfl_priv import Defense


class NoDefense(Defense):
    """The undefended control: smashed data is sent as the client computes it."""
