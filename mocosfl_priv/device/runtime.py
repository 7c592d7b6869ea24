"""Run and train a client on a device, with ONNX Runtime for the networks and NumPy for the optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

from .errors import DeviceError
from .program import ClientProgram, RandomInput

State = dict[str, np.ndarray]
IMAGE, GRADIENT, SHARE, SMASHED = "image", "gradient", "share", "smashed"
PARAMETER, PARAMETER_GRADIENT = (
    "parameter.",
    "gradient.",
)  # prefixes of the graphs' inputs and outputs, before a parameter's name
RANDOM = "random."  # prefix before the number of a random input


class DeviceClient:
    """One client: encodes views, learns from returned gradients, and exchanges weights for FedAvg.

    It computes the same as one client of `mocosfl_priv.training.clients.ClientBank`. Images are processed one by one,
    so memory does not grow with the micro-batch, and gradients are summed.

    Args:
        program: The client program from the server.
        rng: Generator of the random inputs, by default seeded by the operating system, so that no one else can know
            the numbers.

    Raises:
        DeviceError: A graph cannot be run, or does not match the manifest.

    """

    def __init__(self, program: ClientProgram, rng: np.random.Generator | None = None) -> None:
        self.program = program
        self.settings = program.settings
        self.steps_taken = 0
        self._forward = _session(program.forward)
        self._vjp = None if program.vjp is None else _session(program.vjp)
        self._online: State = {name: np.array(value) for name, value in program.parameters.items()}
        self._key = self._online
        self._velocity: State = {}
        self._queries: np.ndarray | None = None
        self._drawn: list[State] = []  # for each of the queries
        self._rng = np.random.default_rng() if rng is None else rng
        if self.trainable:
            self._key = {name: value.copy() for name, value in self._online.items()}
            self._velocity = {name: np.zeros_like(value) for name, value in self._online.items()}
        _check_interface(self._forward, _takes(program, [IMAGE]), {SMASHED: (1, *program.smashed_shape)})
        if self._vjp is not None:
            gradients = {PARAMETER_GRADIENT + name: value.shape for name, value in program.parameters.items()}
            maps = [IMAGE, GRADIENT, *([SHARE] if program.own_loss else [])]
            _check_interface(self._vjp, _takes(program, maps), gradients)

    @property
    def trainable(self) -> bool:
        """Whether gradients come back to this client."""
        return self.settings.trainable

    def encode_queries(self, images: np.ndarray) -> np.ndarray:
        """Return the online model's smashed data, float32 (n, c, h, w), and keep the images for :meth:`learn`.

        images: float32 (n, 3, h, w) in [0, 1]. They replace images of an earlier call whose gradient has not come, as
            in the simulation.
        """
        self._require_images(images)
        drawn = self._draw(len(images))
        smashed = self._encode(self._online, images, drawn)
        if self.trainable:
            self._queries, self._drawn = images.copy(), drawn
        return smashed

    def encode_keys(self, images: np.ndarray) -> np.ndarray:
        """Return the momentum encoder's smashed data, float32 (n, c, h, w); images: float32 (n, 3, h, w) in [0, 1].

        With `ema_update: before_encoding` the momentum encoder is updated first.
        """
        self._require_images(images)
        if self.trainable and self.settings.ema_update == "before_encoding":
            self._follow()
        return self._encode(self._key, images, self._draw(len(images)))

    def learn(self, gradient: np.ndarray, rate: float, share: float = 0.0) -> None:
        """Take one SGD step with the gradient for the last queries, and update the momentum encoder.

        Args:
            gradient: float32 of the shape of the queries' smashed data.
            rate: Learning rate.
            share: Weight of the defense's own loss per query: one divided by the number of queries in the step.

        Raises:
            DeviceError: The gradient does not fit the last queries, is not finite, or would make a parameter overflow
                float32. Nothing is changed then.

        """
        if not np.isfinite(rate) or rate < 0:
            raise DeviceError(f"a learning rate must be a finite number of 0 or more, not {rate!r}")
        settings = self.settings
        online, velocity = {}, {}
        with np.errstate(over="ignore", invalid="ignore"):
            for name, its_gradient in self.parameter_gradients(gradient, share).items():
                decayed = its_gradient + np.float32(settings.weight_decay) * self._online[name]
                velocity[name] = np.float32(settings.momentum) * self._velocity[name] + decayed
                online[name] = self._online[name] - np.float32(rate) * velocity[name]
        if not all(np.isfinite(value).all() for value in (*online.values(), *velocity.values())):
            raise DeviceError("this step would make the client's parameters overflow float32")
        self._online, self._velocity, self._queries, self._drawn = online, velocity, None, []
        if settings.ema_update == "after_step":
            self._follow()
        self.steps_taken += 1

    def parameter_gradients(self, gradient: np.ndarray, share: float = 0.0) -> State:
        """Return the gradient of every parameter, summed over the last queries; arguments as for :meth:`learn`."""
        if self._vjp is None:
            raise DeviceError("a frozen client does not learn")
        if self._queries is None:
            raise DeviceError("there are no queries that this gradient belongs to")
        self._require(gradient, "gradient", (len(self._queries), *self.program.smashed_shape))
        names = [PARAMETER_GRADIENT + name for name in self._online]
        if not np.isfinite(share) or share < 0:
            raise DeviceError(f"a share must be a finite number of 0 or more, not {share!r}")
        feed = {PARAMETER + name: value for name, value in self._online.items()}
        if self.program.own_loss:
            feed[SHARE] = np.array(share, np.float32)
        total = {name: np.zeros_like(value) for name, value in self._online.items()}
        for row in range(len(gradient)):
            one = slice(row, row + 1)
            maps = {IMAGE: self._queries[one], GRADIENT: gradient[one], **self._drawn[row]}
            parts = self._vjp.run(names, {**feed, **maps})
            for name, part in zip(total, parts, strict=True):
                total[name] += part
        return total

    def parameters(self) -> State:
        """Return a copy of the online model, float32 arrays by name."""
        return {name: value.copy() for name, value in self._online.items()}

    def momentum_parameters(self) -> State:
        """Return a copy of the momentum encoder, float32 arrays by name."""
        return {name: value.copy() for name, value in self._key.items()}

    def set_parameters(self, parameters: Mapping[str, np.ndarray]) -> None:
        """Replace the online model, after FedAvg; raises DeviceError if names, shapes or values do not fit."""
        self._online = self._checked(parameters, "parameter")
        if not self.trainable:
            self._key = self._online

    def set_momentum_parameters(self, parameters: Mapping[str, np.ndarray]) -> None:
        """Replace the momentum encoder, after averaging (MonAcoSFL); raises DeviceError if it does not fit."""
        if not self.trainable:
            raise DeviceError("a frozen client has no momentum encoder")
        self._key = self._checked(parameters, "momentum parameter")

    def state(self) -> State:
        """Return copies of everything that changes: ``online.NAME``, ``key.NAME``, ``velocity.NAME``, ``steps_taken``.

        Queries that wait for their gradient are not included. A frozen client has no ``key`` and ``velocity``.
        """
        kinds = {"online": self._online, "key": self._key, "velocity": self._velocity}
        kinds = kinds if self.trainable else {"online": self._online}
        state = {f"{kind}.{name}": value.copy() for kind, model in kinds.items() for name, value in model.items()}
        return {**state, "steps_taken": np.array(self.steps_taken, np.int64)}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore what :meth:`state` returned; raises DeviceError, and changes nothing, if it does not fit."""
        kinds = ("online", "key", "velocity") if self.trainable else ("online",)
        models = {}
        for kind in kinds:
            prefix = f"{kind}."
            its_own = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
            models[kind] = self._checked(its_own, kind)
        steps = state.get("steps_taken")
        if steps is None or steps.shape != () or steps.dtype != np.int64 or steps < 0:
            raise DeviceError("state: steps_taken must be an int64 of 0 or more")
        if len(state) != 1 + sum(len(model) for model in models.values()):
            raise DeviceError("state: there are entries that this client does not have")
        self.steps_taken, self._queries, self._drawn = int(steps), None, []
        self._online = models["online"]
        self._key, self._velocity = models.get("key", self._online), models.get("velocity", {})

    def _draw(self, rows: int) -> list[State]:
        return [draw(self.program.random_inputs, self._rng) for _ in range(rows)]

    def _encode(self, model: State, images: np.ndarray, drawn: Sequence[State]) -> np.ndarray:
        feed = {PARAMETER + name: value for name, value in model.items()}
        smashed = np.empty((len(images), *self.program.smashed_shape), np.float32)
        for row in range(len(images)):
            maps = {IMAGE: images[row : row + 1], **drawn[row]}
            (smashed[row : row + 1],) = self._forward.run([SMASHED], {**feed, **maps})
        return smashed

    def _follow(self) -> None:
        """Update the momentum encoder, with the arithmetic of torch.lerp."""
        share = np.float32(1 - self.settings.ema)
        for name, fast in self._online.items():
            self._key[name] += share * (fast - self._key[name])

    def _require_images(self, images: np.ndarray) -> None:
        self._require(images, "images", (len(images), *self.program.image_shape))

    def _checked(self, model: Mapping[str, np.ndarray], what: str) -> State:
        if set(model) != set(self._online):
            odd = sorted(set(model) ^ set(self._online))
            raise DeviceError(f"{what}s: {odd[0]!r} is missing or unknown")
        for name, mine in self._online.items():
            self._require(model[name], f"{what} {name!r}", mine.shape)
        return {name: np.array(model[name], np.float32) for name in self._online}

    @staticmethod
    def _require(array: np.ndarray, what: str, shape: tuple[int, ...]) -> None:
        if array.dtype != np.float32 or array.shape != shape:
            raise DeviceError(f"{what} must be float32 {shape}, not {array.dtype} {array.shape}")
        if not np.isfinite(array).all():
            raise DeviceError(f"{what}: NaN or infinity")


def draw(inputs: Sequence[RandomInput], rng: np.random.Generator) -> State:
    """Draw the random inputs for one image from `rng`, in order; returns float32 arrays by name."""
    drawn = {}
    for number, wanted in enumerate(inputs):
        make = rng.standard_normal if wanted.distribution == "normal" else rng.random
        drawn[f"{RANDOM}{number}"] = np.asarray(make(wanted.shape, np.float32))
    return drawn


def _session(graph: bytes) -> ort.InferenceSession:
    """An inference session with one thread and without memory arena, since devices are shared and tensors small."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.log_severity_level = 4  # no log messages, since errors are raised as exceptions
    try:
        return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise DeviceError(f"client program: a graph cannot be run: {' '.join(str(error).split())[:200]}") from error


def _takes(program: ClientProgram, maps: list[str]) -> dict[str, tuple[int, ...]]:
    shapes = {IMAGE: (1, *program.image_shape), GRADIENT: (1, *program.smashed_shape), SHARE: ()}
    return {
        **{name: shapes[name] for name in maps},
        **{f"{RANDOM}{number}": each.shape for number, each in enumerate(program.random_inputs)},
        **{PARAMETER + name: value.shape for name, value in program.parameters.items()},
    }


def _check_interface(
    session: ort.InferenceSession, takes: Mapping[str, tuple[int, ...]], gives: Mapping[str, tuple[int, ...]]
) -> None:
    for what, nodes, expected in (("input", session.get_inputs(), takes), ("output", session.get_outputs(), gives)):
        found = {node.name: tuple(node.shape) for node in nodes}
        if found != dict(expected) or any(node.type != "tensor(float)" for node in nodes):
            raise DeviceError(f"client program: the {what}s of a graph do not match the manifest")
