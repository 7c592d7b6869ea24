"""What every defense promises, as checks: for the tests of this project, for a user's own, and before a trial.

A check takes a function that makes a fresh defense (the class itself, where all its parameters have defaults), tries
it on a small model and random images, and raises AssertionError with a sentence where it breaks its promise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mocosfl_priv.config import ComputeConfig, ModelConfig, TrainingConfig
from mocosfl_priv.models.split import SplitModel, build_split_model
from mocosfl_priv.plugins.contract import copied, require, same
from mocosfl_priv.plugins.defense import DefenderContext, Defense, Detector, ExpertDefense, PreparedModel, detector_in
from mocosfl_priv.runtime.compute import Compute
from mocosfl_priv.runtime.seeding import global_seed
from mocosfl_priv.training.hooks import MessageKind
from mocosfl_priv.training.loop import train_mocosfl
from mocosfl_priv.training.sampling import PooledClients, PoolShape

MESSAGES = 5
SAID = ("a defense", "a small batch")  # in the message of a broken contract
SMALL_MODEL = ModelConfig(backbone="resnet8", width=8, projector_hidden=8, projector_out=8)
SMALL_TRAINING = TrainingConfig(clients=2, server_batch=8, queue_size=16, epochs=1, sync_period=2)

Make = Callable[[], Defense]


def keeps_shape_and_lets_gradients_through(make: Make) -> None:
    """What goes out and what comes in keep shape and type; `protect` has a finite gradient."""
    defense, smashed = _ready(make)
    before = smashed.clone()
    smashed.requires_grad_(True)
    protected = defense.protect(smashed, _rng(), MessageKind.QUERY)
    assert torch.equal(smashed, before), "protect changes the smashed data that it is given"
    assert _alike(protected, smashed), f"protect makes {_form(protected)} of smashed data {_form(smashed)}"
    assert protected.requires_grad, "no gradient passes through protect: is something detached?"
    protected.square().sum().backward()
    assert smashed.grad is not None, "no gradient passes through protect: is something detached?"
    assert bool(smashed.grad.isfinite().all()), "the gradient through protect is not finite"
    keys = torch.randn(smashed.shape, generator=_rng(2))
    if (detector := detector_in(defense)) is not None:
        sent = detector.replace_keys(keys, torch.zeros(MESSAGES, dtype=torch.long), 0, _rng())
        assert _alike(sent, keys), f"replace_keys makes {_form(sent)} of keys {_form(keys)}"
    gradient = torch.randn(smashed.shape, generator=_rng(1))
    filtered = defense.filter_gradient(gradient, _rng())
    assert _alike(filtered, gradient), f"filter_gradient makes {_form(filtered)} of a gradient {_form(gradient)}"


def draws_from_its_generator_and_says_so(make: Make) -> None:
    """Same generator state, same messages; `randomised` says whether another state gives other ones."""
    defense, smashed = _ready(make)
    first, same, other = (defense.protect(smashed, _rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, same), "protect draws from elsewhere than `rng`: the same state gives other messages"
    differ = not torch.equal(first, other)
    assert differ == defense.randomised, (
        "protect draws at random, but the class does not say randomised = True"
        if differ
        else "the class says randomised = True, but protect sends the same whatever `rng` draws"
    )


def works_image_by_image(make: Make) -> None:
    """What is sent for an image does not depend on the others of its batch, but for the draws."""
    defense, smashed = _ready(make)
    together = defense.protect(smashed, _rng())
    for image in range(MESSAGES):
        changed = smashed.clone()
        changed[image] = -2 * changed[image]
        others = torch.arange(MESSAGES) != image
        protected = defense.protect(changed, _rng())
        assert torch.allclose(protected[others], together[others], atol=1e-6), (
            "protect mixes the images of a batch: another image, and the same draws, change what is sent for this one"
        )
    if not defense.randomised:
        alone = torch.cat([defense.protect(message[None], _rng()) for message in smashed])
        # wider than above: another batch size is computed by other kernels, and networks of a defense round differently
        assert torch.allclose(alone, together, atol=2e-5), "protect treats an image alone unlike one in a batch"


def keeps_its_state_while_it_protects(make: Make) -> None:
    """`protect` leaves `state` as it is; keys and messages outside of training leave no trace at all."""
    defense, smashed = _ready(make)
    for kind in MessageKind:
        before = copied(defense.state())
        defense.protect(smashed.clone().requires_grad_(kind is MessageKind.QUERY), _rng(), kind)
        assert same(before, copied(defense.state())), f"protect changes the state of the defense ({kind})"
    gradient = torch.randn(smashed.shape, generator=_rng(2))
    outcomes = []
    for others in ((), (MessageKind.KEY, MessageKind.INFERENCE)):
        defense, smashed = _ready(make)
        defense.protect(smashed, _rng(), MessageKind.QUERY)
        for kind in others:
            with torch.set_grad_enabled(kind is MessageKind.INFERENCE):  # attackers search through the defense
                defense.protect(-smashed, _rng(3), kind)
        if not isinstance(defense, Detector) and not defense.parts:  # those need keys between the two
            outcomes.append({"gradient": defense.filter_gradient(gradient, _rng(4)), **copied(defense.state())})
    assert not outcomes or same(*outcomes), (
        "protect remembers something of a key, or of a message outside of training, and filter_gradient then does "
        "something else; ask whether `kind` is MessageKind.QUERY"
    )


def trains_a_split_model(make: Make) -> None:
    """Three steps of MocoSFL with every hook; afterwards all weights are finite, and the state can be taken back."""
    outfit = _outfit(make)
    shape = PoolShape.of(SMALL_TRAINING)
    batches = PooledClients(_images(32), [torch.arange(16), torch.arange(16, 32)], shape, _rng())
    training = SMALL_TRAINING.model_copy(update={"client_learning_rate": outfit.prepared.client_learning_rate})
    outcome = train_mocosfl(
        outfit.prepared.model, batches, training, steps=3, compute=outfit.context.compute, seed=0,
        hooks=outfit.defense, frozen_client=outfit.prepared.frozen_client,
        learning_rate=outfit.prepared.learning_rate,
    )  # fmt: skip
    weights = [*outcome.model.client.parameters(), *outcome.model.trunk.parameters()]
    assert all(bool(weight.isfinite().all()) for weight in weights), "three steps of training end in NaN or infinity"
    learned = copied(outfit.defense.state())
    other = _outfit(make).defense
    other.load_state(learned)
    assert same(other.state(), learned), "load_state does not bring back what state returned"


def comes_back_from_disk(make: Make) -> None:
    """With `restore` and `load_state` instead of `prepare`, it sends what it sent, and promises what it promised."""
    outfit = _outfit(make)
    learned = copied(outfit.defense.state())
    other = make()
    other.restore(outfit.context)
    other.load_state(learned)
    smashed = torch.randn(MESSAGES, *outfit.prepared.model.smashed_shape, generator=_rng(1))
    assert same(other.state(), learned), "after restore and load_state the state is another one"
    with torch.no_grad():
        sent = [defense.protect(smashed, _rng()) for defense in (outfit.defense, other)]
    assert torch.equal(*sent), "after restore and load_state protect sends something else: what prepare sets is missing"
    assert outfit.defense.guarantee(1) == other.guarantee(1), "after restore and load_state it promises something else"


def prepares_repeatably(make: Make) -> None:
    """`prepare` twice, from the same context: the same client and the same state. The second time with an expert that
    was trained before, where the defense has one.
    """
    first, second = _outfit(make), _outfit(make, with_expert=True)
    clients = [outfit.prepared.model.client.state_dict() for outfit in (first, second)]
    assert same(*clients), "prepare makes another client every time: draw from context.seed"
    assert same(first.defense.state(), second.defense.state()), "prepare ends in another state every time"


PROTECTION = (
    keeps_shape_and_lets_gradients_through,
    draws_from_its_generator_and_says_so,
    works_image_by_image,
    keeps_its_state_while_it_protects,
)
CHECKS = (*PROTECTION, trains_a_split_model, comes_back_from_disk, prepares_repeatably)


def require_protection(make: Make, who: str) -> None:
    """Raise ConfigurationError, in one line that names `who`, unless the checks of `PROTECTION` pass."""
    require(PROTECTION, make, who, *SAID)


def require_defense_contract(make: Make, who: str) -> None:
    """The same for all `CHECKS`, which prepare and train as well."""
    require(CHECKS, make, who, *SAID)


@dataclass(frozen=True)
class _Outfit:
    """A defense after `prepare`, as a system finds it before its first step."""

    defense: Defense
    prepared: PreparedModel
    context: DefenderContext


def small_context(defense: Defense, compute: Compute) -> DefenderContext:
    """What `defense` may use before a training of a small model on random images."""
    model = defense.architecture(SMALL_MODEL)

    def build() -> SplitModel:
        with global_seed(0, "small model"):
            return build_split_model(model, 1, 32, [0.5] * 3, [0.25] * 3)

    images = _images(20)
    return DefenderContext(images[:4], images[4:], build, SMALL_TRAINING, compute, seed=0)


def _outfit(make: Make, with_expert: bool = False) -> _Outfit:
    defense = make()
    context = small_context(defense, Compute.resolve(ComputeConfig(device="cpu", precision="float32", threads=1)))
    if with_expert and isinstance(defense, ExpertDefense) and defense.expert_document(context) is not None:
        other = make()
        assert isinstance(other, ExpertDefense)
        context = replace(context, expert=other.train_expert(context))
    return _Outfit(defense, defense.prepare(context) or PreparedModel(context.build_model()), context)


def _ready(make: Make) -> tuple[Defense, Tensor]:
    """A prepared defense, and smashed data of the shape of its model's."""
    outfit = _outfit(make)
    return outfit.defense, torch.randn(MESSAGES, *outfit.prepared.model.smashed_shape, generator=_rng(1))


def _images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=_rng())


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _alike(first: Tensor, second: Tensor) -> bool:
    return isinstance(first, Tensor) and first.shape == second.shape and first.dtype == second.dtype


def _form(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
