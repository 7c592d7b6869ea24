"""A TCP proxy that counts what it carries, and can be told to lose connections, delay or hold what they carry."""

from __future__ import annotations

import random
import socket
import threading
import time
from contextlib import suppress

CHUNK = 2**14


class Proxy:
    """Carries connections to a port of this machine. sent, received: bytes of all devices, up and down.

    delay: seconds that every chunk is held, at random up to it. loss: probability that a chunk is the last of its
    connection, which is then reset.
    """

    def __init__(self, target: int, delay: float = 0.0, loss: float = 0.0, seed: int = 0) -> None:
        self.delay, self.loss = delay, loss
        self.target = target
        self.sent = self.received = self.connections = self.lost = 0
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                device, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(device,), daemon=True).start()

    def _carry(self, device: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            device.close()
            return
        with self._lock:
            self.connections += 1
            self._open |= {device, server}
        threading.Thread(target=self._pump, args=(server, device, False), daemon=True).start()
        self._pump(device, server, True)

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with suppress(OSError):
            while chunk := source.recv(CHUNK):
                with self._lock:
                    cut = self._rng.random() < self.loss
                    pause = self._rng.random() * self.delay
                    self.lost += cut
                if pause:
                    time.sleep(pause)
                if cut:
                    break
                sink.sendall(chunk)
                with self._lock:
                    if up:
                        self.sent += len(chunk)
                    else:
                        self.received += len(chunk)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut_all(self) -> None:
        """Reset every connection that is open now."""
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Carry nothing any more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut_all()
