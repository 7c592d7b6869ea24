"""Defenses that act at the client, on devices: the same computation as in torch, noise of the right distribution."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnxruntime as ort

from mocosfl_priv.config import PluginSpec
from mocosfl_priv.defending.noise import clip_rms
from mocosfl_priv.deployment import export
from mocosfl_priv.deployment.deployment import require_runs_on_devices
from mocosfl_priv.deployment.export import client_settings, export_client
from mocosfl_priv.device.participant import noise
from mocosfl_priv.device.program import ClientProgram
from mocosfl_priv.device.runtime import DeviceClient
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.plugins import DEFENSES, Defense
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.training import participants
from mocosfl_priv.training.clients import ClientBank
from tests.deployment.devices import deployment, engine, smooth_model, training_of
from tests.deployment.test_in_process import SameViews, given

SEED, ROWS, SIDE, SHARE = 5, 3, 16, 0.25
DIFFERENT: list[tuple[str, dict[str, Any]]] = [
    ("laplace", {"scale": 0.3, "clip": 0.1}),
    ("dropout", {"rate": 0.3, "unit": "channel"}),
    ("composition", {"parts": ("bottleneck", "gaussian_l2", "topk_prune")}),
]
ALIKE: list[tuple[str, dict[str, Any]]] = [  # in their operations to one of those
    ("gaussian", {"sigma": 0.3, "clip": 0.2}),
    ("local_dp", {"epsilon": 200.0}),
    ("dropout", {"rate": 0.3}),
    ("topk_prune", {"keep": 0.2}),
    ("gaussian_l2", {"beta": 0.5, "sigma": 0.3}),
]


def defense(name: str, parameters: dict[str, Any]) -> Defense:
    return DEFENSES.create(PluginSpec.model_validate({"name": name, **parameters})).plugin


class Redraw:
    """In place of torch.randn and torch.rand: what devices draw, message by message, of which each draws once a call.

    rngs: for every device of a call, where it draws and how many messages it sends.
    """

    def __init__(self, rngs: Sequence[tuple[np.random.Generator, int]]) -> None:
        self._rngs = rngs

    def __call__(self, make: str) -> Callable[..., Tensor]:
        def drawn(shape: Sequence[int], **_: Any) -> Tensor:
            single = (1, *shape[1:])
            rows = [getattr(rng, make)(single, np.float32) for rng, rows in self._rngs for _ in range(rows)]
            assert len(rows) == shape[0]
            return torch.from_numpy(np.concatenate(rows))

        return drawn

    def __enter__(self) -> None:
        self._patches = [
            patch.object(torch, "randn", self("standard_normal")), patch.object(torch, "rand", self("random"))
        ]  # fmt: skip
        for each in self._patches:
            each.start()

    def __exit__(self, *ended: object) -> None:
        for each in self._patches:
            each.stop()


def program_of(hooks: Any, trainable: bool = True) -> ClientProgram:
    model = smooth_model()
    return export_client(model.client, model.image_shape, client_settings(training_of(), trainable), hooks)


def images(rows: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((rows, 3, SIDE, SIDE), np.float32))


@pytest.mark.parametrize(
    ("name", "parameters"), [*DIFFERENT, *(pytest.param(*each, marks=pytest.mark.slow) for each in ALIKE)]
)
def test_a_defended_device_learns_as_torch_does_with_the_same_draws(name: str, parameters: dict[str, Any]) -> None:
    """Messages, gradients through clipping, masks and noise, and the defense's own loss, over three steps."""
    hooks = defense(name, parameters)
    bank, pool = ClientBank(smooth_model().client, 1, training_of()), torch.tensor([0])
    device = DeviceClient(ClientProgram.from_bytes(program_of(hooks).to_bytes()), noise(SEED, 0))
    rng = torch.Generator()
    with Redraw([(noise(SEED, 0), ROWS)]):
        for step in range(3):
            queries, keys = images(ROWS, step), images(ROWS, 100 + step)
            smashed = bank.encode_queries(pool, [ROWS], queries)
            sent = hooks.protect(smashed, rng)
            loss = hooks.client_loss(queries, smashed)
            sent_keys = hooks.protect(bank.encode_keys(pool, [ROWS], keys), rng)
            assert_close(device.encode_queries(queries.numpy()), sent)
            assert_close(device.encode_keys(keys.numpy()), sent_keys)
            gradient = torch.randn_like(sent)
            objective = (sent * gradient).sum() + (0 if loss is None else SHARE * ROWS * loss)
            objective.backward()
            bank.learn(pool, torch.tensor([0.05]))
            device.learn(gradient.numpy(), 0.05, SHARE)
    for kind in ("online", "key", "velocity"):
        for key, value in getattr(bank, kind).items():
            assert_close(device.state()[f"{kind}.{key}"], value[0])
    assert device.program.own_loss == (name in ("gaussian_l2", "composition"))


def assert_close(found: np.ndarray, expected: Tensor) -> None:
    scale = float(expected.detach().abs().max())
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=0, atol=1e-4 * max(scale, 1e-3))


def noise_of(hooks: Defense, clean: Callable[[Tensor], Tensor], messages: int = 500) -> np.ndarray:
    """What a device adds to the message of one image, float32 (messages, elements)."""
    device = DeviceClient(program_of(hooks, trainable=False), noise(SEED, 0))
    image = images(1, 0)
    sent = np.concatenate([device.encode_queries(image.numpy()) for _ in range(messages)])
    with torch.no_grad():
        expected = clean(smooth_model().client(image))
    return (sent - expected.numpy()).reshape(messages, -1)


@pytest.mark.parametrize(
    ("name", "parameters", "clip", "distribution"),
    [
        ("gaussian", {"sigma": 0.5, "clip": 0.2}, 0.2, stats.norm(scale=0.1)),
        # a clip that no message reaches, and noise beside which the message is nothing
        ("laplace", {"scale": 0.35, "clip": 1e9}, None, stats.laplace(scale=0.35e9)),
        ("local_dp", {"epsilon": 50.0, "mechanism": "laplace", "delta": 0.0, "clip": 1e9}, None, None),
    ],
)
def test_noise_has_the_distribution_that_the_defense_names(
    name: str, parameters: dict[str, Any], clip: float | None, distribution: Any
) -> None:
    """By Kolmogorov and Smirnov; independent between elements and from message to message."""
    hooks = defense(name, parameters)
    found = noise_of(hooks, lambda smashed: smashed if clip is None else clip_rms(smashed, clip))
    if distribution is None:  # the sensitivity in L1 is twice the clip per element, times elements
        distribution = stats.laplace(scale=2 * 1e9 * found.shape[1] / 50.0)
    assert stats.kstest(found.ravel()[:20_000], distribution.cdf).pvalue > 0.001
    assert found.var() == pytest.approx(distribution.var(), rel=0.05)
    for one, other in ((found[:-1], found[1:]), (found[:, :-1], found[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02


def test_dropout_loses_the_share_that_it_says_and_keeps_the_mean() -> None:
    device = DeviceClient(program_of(defense("dropout", {"rate": 0.3}), trainable=False), noise(SEED, 0))
    image = images(1, 0)
    sent = np.concatenate([device.encode_queries(image.numpy()) for _ in range(300)])
    clean = smooth_model().client(image).detach().numpy()
    lost = sent == 0
    assert lost.mean() == pytest.approx(0.3, abs=0.01)
    np.testing.assert_allclose(sent[~lost], np.broadcast_to(clean, sent.shape)[~lost] / 0.7, rtol=1e-4, atol=1e-6)


def test_nobody_but_the_device_knows_its_noise() -> None:
    """Unless a seed is asked for, two processes of the same client draw differently; with one, clients still do."""
    program, image = program_of(defense("gaussian", {}), trainable=False), images(1, 0).numpy()

    def sent(rng: np.random.Generator) -> np.ndarray:
        return DeviceClient(program, rng).encode_queries(image)

    assert not np.array_equal(sent(noise(None, 0)), sent(noise(None, 0)))
    assert np.array_equal(sent(noise(SEED, 0)), sent(noise(SEED, 0)))
    assert not np.array_equal(sent(noise(SEED, 0)), sent(noise(SEED, 1)))


def test_a_query_is_answered_with_its_own_draws_also_after_keys_were_drawn() -> None:
    """Its gradient goes through the mask with which it was sent, not through the keys'."""
    hooks = defense("dropout", {"rate": 0.5, "unit": "channel"})
    device = DeviceClient(program_of(hooks), noise(SEED, 0))
    sent = device.encode_queries(images(1, 0).numpy())
    device.encode_keys(images(1, 1).numpy())
    lost = np.abs(sent).max((0, 2, 3)) == 0
    assert 0 < lost.sum() < len(lost)
    gradient = np.zeros_like(sent)
    gradient[:, lost] = 1  # of what was never sent
    assert all(not value.any() for value in device.parameter_gradients(gradient).values())
    gradient[:, ~lost] = 1
    assert any(value.any() for value in device.parameter_gradients(gradient).values())


@pytest.mark.parametrize(
    ("name", "remote"),
    [
        ("gaussian_l2", range(1)),
        pytest.param("gaussian_l2", range(3), marks=pytest.mark.slow),
        pytest.param("gaussian", range(1), marks=pytest.mark.slow),
        pytest.param("gaussian", range(3), marks=pytest.mark.slow),
    ],
)
def test_defended_devices_train_as_defended_simulated_clients(name: str, remote: range, compute: Compute) -> None:
    """Over the whole protocol, alone or beside simulated clients."""
    training, hooks = training_of(), defense(name, {})
    rest = [client for client in range(3) if client not in remote]
    drawing = {client: noise(SEED, client) for client in range(3)}

    def losses(remote_clients: Iterable[int], in_process: list[int]) -> list[float]:
        there = deployment(remote_clients, given, noise_seed=SEED) if remote_clients else None
        run = engine(training, compute, there, smooth_model(), hooks=copy.copy(hooks))
        views = SameViews([2] * len(in_process), first=3 - len(in_process))
        with patch.object(participants, "moco_v2_view", views), Redraw([(drawing[c], 4) for c in in_process]):
            found = [float(run.step()) for _ in range(4)]
        run.participants.finish()
        if there is not None:
            there.close()
        return found

    found = losses(remote, rest)
    drawing = {client: noise(SEED, client) for client in range(3)}
    np.testing.assert_allclose(found, losses((), [0, 1, 2]), rtol=2e-5)


@pytest.mark.parametrize("x", [np.array([-1 + 2**-24, -0.5, -1e-3, -1e-7, -1e-30, 0, 1e-30, 1e-7, 1e-3, 1, 100])])
def test_the_logarithm_of_laplace_noise_keeps_its_digits(x: np.ndarray) -> None:
    numbers = torch.from_numpy(x.astype(np.float32))
    model, _ = export._record(torch.log1p, ["x"], [numbers], ["y"])
    (found,) = ort.InferenceSession(model).run(["y"], {"x": numbers.numpy()})
    np.testing.assert_allclose(found, np.log1p(numbers.double().numpy()), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters", "reason"),
    [
        ("shredder", {}, "handles what the server sends back"),
        ("mid", {}, "handles what the server sends back"),
        ("adversarial_noise", {}, "learned from the messages of all clients"),
        ("ressfl", {"layer": "C4S2"}, "learned from the messages of all clients"),
        ("splitguard", {}, "handles what the server sends back"),
        ("composition", {"parts": ("adversarial_noise", "bottleneck")}, r"AdversarialNoise.* learned from"),
    ],
)
def test_what_clients_learn_together_is_refused(name: str, parameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        require_runs_on_devices(defense(name, parameters), name)


def test_what_devices_can_run_is_let_through() -> None:
    for name, parameters in [*DIFFERENT, *ALIKE, ("taressfl", {"layer": "C4S2"})]:
        require_runs_on_devices(defense(name, parameters), name)


class Together(Defense):
    """Has no state, and a loss over all clients."""

    def joint_loss(self, images: Tensor, smashed: Tensor) -> Tensor:
        return smashed.square().mean()


def test_a_loss_over_all_clients_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"\(joint_loss\) is learned from the messages of all clients"):
        require_runs_on_devices(Together(), "together")


class OneMask(Defense):
    """The same noise for all images of a batch."""

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return smashed + torch.randn(smashed.shape[1:], generator=rng)


class Centred(Defense):
    """What one image sends depends on the others."""

    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return smashed - smashed.mean(0)


class Coin(Defense):
    def protect(self, smashed: Tensor, rng: torch.Generator, kind: object = None) -> Tensor:
        return smashed * torch.bernoulli(torch.full_like(smashed, 0.5), generator=rng)


@pytest.mark.parametrize(
    ("hooks", "reason"),
    [
        (OneMask(), "random numbers that it draws for a batch"),
        (Centred(), "depends on the other images|are wrong by"),
        (Coin(), "draws random numbers"),
        (defense("nopeek", {}), "not a mean over images"),
    ],
)
def test_a_defense_that_looks_at_several_images_is_refused(hooks: Defense, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        program_of(hooks)
