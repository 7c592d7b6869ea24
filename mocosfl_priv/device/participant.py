"""A device's side of a training: connect, register, encode and learn on request, and reconnect after failures.

A process keeps its client model through lost connections and restarts of the server. What it computes depends only on
the state and requests that it is sent, so a device that lost its state is sent it again and continues.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np

from .augmentation import two_views
from .errors import DeviceError
from .messages import (
    LARGEST_FRAME,
    Ask,
    Draw,
    Finish,
    Gradient,
    Packed,
    Reason,
    RefusedError,
    Register,
    Report,
    Smashed,
    Weights,
    Welcome,
)
from .program import ClientProgram, ClientSettings
from .runtime import DeviceClient
from .shard import Shard
from .transport import ClosedError, Conversation, Dialogue

LOG = logging.getLogger("mocosfl-priv-client")
WELCOME_SECONDS = 60.0  # time limit for the answer to a registration
IDLE_SECONDS = 3600.0  # servers may validate for long between steps; the transport notices a lost connection itself
HOPELESS = (Reason.WRONG_IDENTITY, Reason.REPLACED, Reason.OTHER_VERSION)  # refusals after which retrying is useless
FIRST_DELAY, LONGEST_DELAY = 0.2, 30.0  # seconds before the next attempt to connect


class Views(Protocol):
    """The source of a device's augmented images. images: number of images."""

    images: int

    def views(self, offset: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return two views of each of `count` images, after the `offset` images that were drawn before.

        Each is float32 (count, 3, h, w) in [0, 1]. Equal arguments give equal views, so that a request can be repeated.
        """


class ShardViews:
    """Views of the images of a shard, in a new random order in every pass.

    Args:
        shard: The images.
        settings: Settings of the client, with its augmentation.
        seed: With `client`, determines all random numbers.
        client: Index of the client.
        drop_partial: Whether to skip the rest of a pass that no longer fills a draw.

    """

    def __init__(self, shard: Shard, settings: ClientSettings, seed: int, client: int, drop_partial: bool) -> None:
        self.images = len(shard)
        self._shard = shard
        self._augment = settings.augmentation == "moco_v2"
        self._seed = (seed, client)
        self._drop_partial = drop_partial

    def views(self, offset: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Views`."""
        images = self._shard.take(self.positions(offset, count))
        if not self._augment:
            plain = images.astype(np.float32) / 255
            return plain, plain.copy()
        return two_views(images, np.random.default_rng((*self._seed, 1, offset)))

    def positions(self, offset: int, count: int) -> np.ndarray:
        """Return the positions of these images in the shard, int64 (count,)."""
        size = self.images
        per_pass = size - size % count if self._drop_partial and size >= count else size
        drawn = np.arange(offset, offset + count)
        positions = np.empty(count, np.int64)
        for number in range(offset // per_pass, (offset + count - 1) // per_pass + 1):
            order = np.random.default_rng((*self._seed, 0, number)).permutation(size)
            mine = drawn // per_pass == number
            positions[mine] = order[drawn[mine] % per_pass]
        return positions


class Device:
    """One client, over any number of connections to a server.

    Args:
        name: Its name, as in its certificate.
        images: Number of its images.
        views: Makes the source of images, once program and seed are known.
        measure: Returns the measurements to report.
        noise_seed: Seed of a defense's noise, for repeatable experiments.

    """

    def __init__(
        self,
        name: str,
        images: int,
        views: Callable[[ClientProgram, Welcome], Views],
        measure: Callable[[], Report] = Report,
        noise_seed: int | None = None,
    ) -> None:
        self.name = name
        self.client: DeviceClient | None = None
        self.welcomed = 0  # number of successful registrations
        self._images = images
        self._make_views = views
        self._measure = measure
        self._noise_seed = noise_seed
        self._views: Views | None = None
        self._run = self._session = self._digest = ""
        self._serial = 0
        self._pending: tuple[int, int] | None = None  # number and rows of the request whose gradient is still to come
        self._encode_seconds = self._learn_seconds = 0.0

    def forget(self) -> None:
        """Drop all state, so that the next connection joins the server's run from the start."""
        self.client = self._views = self._pending = None
        self._run = self._session = self._digest = ""
        self._serial = 0

    def attend(self, conversation: Conversation) -> None:
        """Take part until the server has finished.

        Raises ClosedError if the connection ends before, and RefusedError if the server sends an invalid message.
        """
        dialogue = Dialogue(conversation, LARGEST_FRAME, self._run)
        stop = threading.Event()
        try:
            welcome = self._register(dialogue)
            beats = threading.Thread(
                target=self._beat, args=(dialogue, stop, welcome.heartbeat_seconds), daemon=True, name="heartbeat"
            )
            beats.start()
            while self._answer(dialogue, welcome):
                pass
        except RefusedError as error:
            dialogue.close(error.reason, error.detail)
            raise
        finally:
            stop.set()
            dialogue.close()

    def _register(self, dialogue: Dialogue) -> Welcome:
        """Register with the server, and set up the client that it assigns."""
        known = self.client is not None
        dialogue.send(Register(self.name, self._images, self._digest, self._session if known else "", self._serial))
        welcome = _expect(Welcome, dialogue.receive(WELCOME_SECONDS))
        dialogue.name(welcome.run, welcome.session)
        if welcome.program:
            program = ClientProgram.from_bytes(welcome.program)
            if program.digest != welcome.program_digest:
                raise RefusedError(Reason.MALFORMED, "the program does not have the digest that came with it")
            self.client = DeviceClient(program, noise(self._noise_seed, welcome.client))
            self._serial, self._pending = 0, None
        if self.client is None or welcome.program_digest != self.client.program.digest:
            raise RefusedError(Reason.UNEXPECTED, "got a welcome without the program that it names")
        self._views = self._make_views(self.client.program, welcome)
        self._run, self._session, self._digest = welcome.run, welcome.session, welcome.program_digest
        self.welcomed += 1
        LOG.info("client %d of run %s", welcome.client, welcome.run)
        return welcome

    def _answer(self, dialogue: Dialogue, welcome: Welcome) -> bool:
        """Receive and process one message; returns False after the last."""
        assert self.client is not None
        try:
            message = dialogue.receive(IDLE_SECONDS)
        except TimeoutError:
            return True
        if isinstance(message, Draw):
            dialogue.send(self._encode(message, welcome))
        elif isinstance(message, Gradient):
            self._learn(message, welcome)
        elif isinstance(message, Ask):
            dialogue.send(self._weights(message))
        elif isinstance(message, Weights):
            self._take_over(message)
        elif isinstance(message, Finish):
            dialogue.send(self._report())
            return False
        else:
            _expect(Draw, message)
        return True

    def _encode(self, draw: Draw, welcome: Welcome) -> Smashed:
        assert self.client is not None and self._views is not None
        first, second = self._views.views(draw.offset, draw.count)
        started = time.monotonic()
        settings = self.client.settings
        if settings.symmetric and not settings.encodes_once:
            query_views, key_views = np.concatenate([first, second]), np.concatenate([second, first])
        else:
            query_views, key_views = first, second
        queries = self.client.encode_queries(query_views)
        keys = self.client.encode_keys(key_views)
        self._pending = (draw.request, len(queries))
        self._encode_seconds += time.monotonic() - started
        return Smashed(draw.request, Packed.of(queries, welcome.activations), Packed.of(keys, welcome.activations))

    def _learn(self, message: Gradient, welcome: Welcome) -> None:
        assert self.client is not None
        if self._pending is None or message.request != self._pending[0]:
            raise RefusedError(
                Reason.UNEXPECTED, f"got a gradient for request {message.request}, which has no open queries"
            )
        shape = (self._pending[1], *self.client.program.smashed_shape)
        gradient = message.gradient.array(shape, welcome.gradients)
        started = time.monotonic()
        self.client.learn(gradient, message.rate, message.share)
        self._pending = None
        self._learn_seconds += time.monotonic() - started

    def _weights(self, ask: Ask) -> Weights:
        assert self.client is not None
        kinds = ["online", *(["key"] if ask.momentum_model else []), *(["velocity"] if ask.velocity else [])]
        tensors = {
            name: Packed.of(value) for name, value in self.client.state().items() if name.split(".", 1)[0] in kinds
        }
        return Weights(ask.request, self._serial, self.client.steps_taken, tensors)

    def _take_over(self, weights: Weights) -> None:
        """Replace the client's state by the server's; kinds of tensors that the message leaves out stay."""
        assert self.client is not None
        mine = self.client.state()
        unknown = set(weights.tensors) - set(mine)
        if weights.request or unknown:
            raise RefusedError(Reason.UNEXPECTED, "got weights that do not belong to this client")
        arrays = {name: packed.array(mine[name].shape) for name, packed in weights.tensors.items()}
        self.client.load_state({**mine, **arrays, "steps_taken": np.array(weights.steps_taken, np.int64)})
        self._serial, self._pending = weights.serial, None

    def _report(self) -> Report:
        steps = self.client.steps_taken if self.client else 0
        return replace(
            self._measure(), steps=steps, encode_seconds=self._encode_seconds, learn_seconds=self._learn_seconds
        )

    def _beat(self, dialogue: Dialogue, stop: threading.Event, seconds: float) -> None:
        """Send a report every `seconds` as a heartbeat, also while this device computes."""
        while not stop.wait(seconds):
            try:
                dialogue.send(self._report())
            except (ClosedError, TimeoutError):
                return


def stay(
    device: Device,
    connect: Callable[[], Conversation],
    patience: float = float("inf"),
    rng: random.Random | None = None,
) -> None:
    """Let `device` take part until the server has finished, and reconnect whenever the connection is lost.

    Args:
        device: The client.
        connect: Opens a connection to the server.
        patience: Seconds without a successful registration after which to give up.
        rng: Randomises delays; seeded by the system by default.

    Raises:
        DeviceError: `patience` is over, or the server refuses this device for good.

    """
    delays, last_welcome, welcomed = back_off(rng), time.monotonic(), 0
    while True:
        try:
            device.attend(connect())
            return
        except RefusedError as error:
            LOG.warning("the server sent an invalid message: %s", error)
        except ClosedError as error:
            if error.reason in HOPELESS:
                raise DeviceError(f"the server refuses this device: {error}") from error
            if error.reason is Reason.OTHER_RUN:
                device.forget()
            LOG.warning("connection lost: %s", error)
        except TimeoutError as error:
            LOG.warning("the server does not answer: %s", error)
        if device.welcomed > welcomed:
            delays, last_welcome, welcomed = back_off(rng), time.monotonic(), device.welcomed
        delay = next(delays)
        if time.monotonic() - last_welcome + delay > patience:
            raise DeviceError(f"no server answered for {patience:g} s")
        time.sleep(delay)


def noise(seed: int | None, client: int) -> np.random.Generator:
    """Return the random generator of a client's defense, by default seeded by the operating system.

    It must not depend on anything that the server knows, or the server could compute the noise and remove it.
    """
    return np.random.default_rng(None if seed is None else (seed, client))


def back_off(rng: random.Random | None = None) -> Iterator[float]:
    """Yield the seconds to wait before each next attempt: doubling up to a limit, and randomised to spread devices."""
    rng = rng or random.Random()  # noqa: S311 - spreads attempts, not used for security
    delay = FIRST_DELAY
    while True:
        yield delay * rng.uniform(0.5, 1.0)
        delay = min(LONGEST_DELAY, 2 * delay)


T = TypeVar("T")


def _expect(kind: type[T], message: object) -> T:
    if not isinstance(message, kind):
        raise RefusedError(Reason.UNEXPECTED, f"got a {type(message).__name__}, expected a {kind.__name__}")
    return message
