"""The error class of this package, which is separate because the package is also installed alone on devices."""

from __future__ import annotations


class DeviceError(Exception):
    """An option, client program, message, shard or meter reading cannot be used; the message says why in one line."""

    exit_code = 2
