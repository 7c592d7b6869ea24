"""What a device refuses. The same folder is installed by itself on devices, so it has an error class of its own."""

from __future__ import annotations


class DeviceError(Exception):
    """A client program, a message, a shard or a reading that cannot be used as it is; one line that says why."""

    exit_code = 2
