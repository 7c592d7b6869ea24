"""The expert of attacker-aware defenses: a model trained at the server, whose client side initialises the clients."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mocosfl_priv.config import ModelConfig, TrainingConfig, parse_bottleneck
from mocosfl_priv.defending.simulated_attacker import (
    DECODER_DECAY,
    DECODER_MILESTONES,
    Mode,
    Objective,
    SimulatedAttacker,
    check_decoders,
)
from mocosfl_priv.errors import ConfigurationError, RunFailedError
from mocosfl_priv.inversion.own_decoder import check_architecture
from mocosfl_priv.models.split import SplitModel
from mocosfl_priv.plugins import CheckpointScore, DefenderContext, ExpertDefense, PreparedModel, TrainedExpert
from mocosfl_priv.published.loader import load_published_client
from mocosfl_priv.runtime.seeding import generator
from mocosfl_priv.training.loop import train_mocosfl
from mocosfl_priv.training.sampling import ClientBatch, total_steps

DECODER = "res_normN4C64"

Batch = Literal["together", "each"]
Checkpoint = Literal["last", "best_knn"]

# What the public code of MocoSFL does, where it differs from the defaults here. ResSFL's code computes the penalty in
# the same way, with the same decoder, and its expert is the checkpoint with the best test accuracy of its classifier.
PAPER: dict[str, Any] = {
    "batch": "each",
    "decoder": "ressfl_N4C64",
    "penalty_mode": "eval",
    "checkpoint": "best_knn",
}

# Settings that do not apply to an expert, since it is trained by one party and without validation: those on clients,
# their data and traffic, and on the choice of a checkpoint.
MEANINGLESS = (
    "partition", "classes_per_client", "dirichlet_alpha", "micro_batch", "pool", "heterogeneity", "partial_batches",
    "client_learning_rate", "average_base", "average_momentum_models", "divergence_aware", "replay", "monitor_every",
    "select_on", "codec", "gradient_codec",
)  # fmt: skip


class AttackerAware(ExpertDefense):
    """What ResSFL and TAResSFL share: an expert that is trained against a simulated attacker, and its transfer.

    The expert is trained on MoCo's task with a penalty for what the attacker's decoders reconstruct
    (`SimulatedAttacker`). Clients then start from its client side.

    Args:
        preset: `paper` changes the defaults of `batch`, `decoder`, `penalty_mode` and `checkpoint` to what the public
            code does. A field that is written out wins.
        alpha: Weight of the penalty.
        threshold: Score of the decoders below which there is no penalty.
        layer: The bottleneck.
        decoder: Decoder of the simulated attacker, in the decoder grammar, or several in a list with the strongest
            first. Adaptive attackers are told the first. If left out, it is res_normN4C64; with the preset
            ressfl_N4C64, which is what the public code calls res_normN4C64.
        penalty_mode: Mode of the decoders while the penalty is computed: train (if left out) or eval (with the preset).
            In eval mode their BatchNorm uses its running statistics. Their own step is always in train mode.
        objective: Score of the decoders: ssim, as published, or mse+ssim (see `simulated_attacker.score`).
        refresh: Number of epochs after which, again and again, the decoder that has learned longest is restarted; 0
            for never. It needs several decoders, since the client would have no attacker for a while.
        decoder_milestones: Shares of the pre-training after which the decoders' learning rate is multiplied by
            `decoder_decay`.
        decoder_decay: See `decoder_milestones`.
        epochs: Epochs of the pre-training; an epoch is a pass over all its images, or over the larger kind if each
            kind fills a batch.
        batch_size: Batch size of the pre-training, in images; see `batch`.
        batch: What `batch_size` counts where there are target and source images: all images of a step, half of them of
            either kind (together, if left out), or those of each kind, so that a step has twice as many (each, with
            the preset).
        checkpoint: Which state of the expert is handed out: that after the last step (last, if left out), or that of
            the epoch with the best kNN accuracy (best_knn, with the preset). It is measured after every epoch on the
            images that `training.select_on` names, with labelled images of the clients as neighbours, which a real
            server does not have. The public code uses test images, as `training.select_on: test` does.
        learning_rate: Learning rate of the pre-training.
        transfer: Whether clients keep the expert's client side unchanged (frozen), or train it at a low rate (low_lr).
        transfer_learning_rate: Learning rate of the server after the transfer.
        client_learning_rate: Learning rate of the clients after the transfer.
        server_start: Whether the server starts from the expert's server side, or with new weights.
        expert: A client of the public MocoSFL release to use instead of training an expert (see `import_client` for
            which fit). It keeps its own normalisation, and the server starts with new weights. The target data that it
            was trained on is fixed by the file, so the defense is run once for all target fractions.

    Raises:
        ConfigurationError: A decoder or bottleneck is invalid, `refresh` is used with a single decoder, or the expert
            cannot be read.

    """

    def __init__(
        self,
        preset: Literal["paper"] | None = None,
        alpha: Annotated[float, Field(ge=0)] = 2.0,
        threshold: Annotated[float, Field(ge=-1, le=1)] = 0.6,
        layer: str = "C4S2",
        decoder: str | list[str] | None = None,
        penalty_mode: Mode | None = None,
        objective: Objective = "ssim",
        refresh: Annotated[int, Field(ge=0)] = 0,
        decoder_milestones: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = DECODER_MILESTONES,
        decoder_decay: Annotated[float, Field(gt=0, le=1)] = DECODER_DECAY,
        epochs: Annotated[int, Field(ge=1)] = 200,
        batch_size: Annotated[int, Field(ge=2)] = 128,
        batch: Batch | None = None,
        checkpoint: Checkpoint | None = None,
        learning_rate: Annotated[float, Field(gt=0)] = 0.06,
        transfer: Literal["frozen", "low_lr"] = "frozen",
        transfer_learning_rate: Annotated[float, Field(gt=0)] = 0.001,
        client_learning_rate: Annotated[float, Field(gt=0)] = 0.0001,
        server_start: Literal["expert", "scratch"] = "expert",
        expert: Path | None = None,
    ) -> None:
        published = PAPER if preset == "paper" else {}
        parse_bottleneck(layer)
        self.decoders = decoder_set(published.get("decoder", DECODER) if decoder is None else decoder)
        self.penalty_mode: Mode = penalty_mode or published.get("penalty_mode", "train")
        self.batch: Batch = batch or published.get("batch", "together")
        self.checkpoint: Checkpoint = checkpoint or published.get("checkpoint", "last")
        if refresh and all(len(decoders) < 2 for decoders in self.opponents):
            raise ConfigurationError("refresh: a single decoder cannot be restarted; name several decoders")
        if expert is not None:
            load_published_client(expert)  # raises now if the file is missing or not a published client
            self.uses_target_data = False
        self.alpha = alpha
        self.threshold = threshold
        self.layer = layer
        self.objective: Objective = objective
        self.refresh = refresh
        self.decoder_milestones = decoder_milestones
        self.decoder_decay = decoder_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.transfer = transfer
        self.transfer_learning_rate = transfer_learning_rate
        self.client_learning_rate = client_learning_rate
        self.server_start = server_start
        self.expert = expert

    @property
    def opponents(self) -> list[list[str]]:
        """The decoders of each simulated attacker."""
        return [self.decoders]

    @property
    def simulator(self) -> str:
        """The first decoder of the first simulated attacker, which adaptive attackers are told."""
        return self.opponents[0][0]

    @property
    def freezes_clients(self) -> bool:
        """See :class:`Defense`."""
        return self.transfer == "frozen"

    def architecture(self, model: ModelConfig) -> ModelConfig:
        """The configured model with this defense's bottleneck."""
        return model.model_copy(update={"bottleneck": self.layer})

    def check(self, context: DefenderContext) -> None:
        """Decoders of one's own must fit the model, and choosing a checkpoint takes labels."""
        check_decoders([decoder for decoders in self.opponents for decoder in decoders], context)
        if self.expert_document(context) is not None:
            self._score(context)

    def planned_steps(self, context: DefenderContext) -> int:
        """Return the number of training steps of the expert; 0 for an imported one.

        Raises ConfigurationError if there are no images to train it on, or if an imported one does not fit.
        """
        if self.expert is not None:
            import_client(
                context.build_model(), self.expert
            )  # raises now, before anything is trained, if it does not fit
            return 0
        images = len(context.source_images) + len(self.target_images(context))
        if images == 0:
            raise ConfigurationError("the defender has neither source nor target images to train an expert on")
        return total_steps(self._batches(context).images_per_epoch, self.batch_size, self.epochs)

    def prepare(self, context: DefenderContext) -> PreparedModel:
        """Train or import the expert, and return the model that clients and server start from."""
        if self.expert is not None:
            expert = TrainedExpert(context.build_model())
            import_client(expert.model, self.expert)
        else:
            expert = context.expert or self.train_expert(context)
            if self.server_start == "scratch":
                fresh = context.build_model()
                expert.model.trunk, expert.model.projector = fresh.trunk, fresh.projector
        return PreparedModel(
            expert.model,
            frozen_client=self.freezes_clients,
            learning_rate=self.transfer_learning_rate,
            client_learning_rate=None if self.freezes_clients else self.client_learning_rate,
            earlier_seconds=expert.earlier_seconds,
        )

    def expert_document(self, context: DefenderContext) -> dict[str, Any] | None:
        """See :class:`Defense`; settings of the transfer are left out."""
        if self.expert is not None:
            return None
        score = self._score(context)
        return {
            "alpha": self.alpha,
            "threshold": self.threshold,
            "decoders": self.decoders,
            "penalty_mode": self.penalty_mode,
            "batch": self.batch,
            "checkpoint": [self.checkpoint, score.document if score else None],
            "objective": self.objective,
            "refresh": self.refresh,
            "decoder_milestones": self.decoder_milestones,
            "decoder_decay": self.decoder_decay,
            "batch_size": self.batch_size,
            "target_images": self.uses_target_data,
            "training": self._expert_settings(context).model_dump(mode="json", exclude={"checkpoint_every"}),
        }

    def train_expert(self, context: DefenderContext) -> TrainedExpert:
        """Train the expert; returns the whole split model. Raises RunFailedError if training diverges."""
        model, steps = context.build_model(), self.planned_steps(context)
        attacker = self.attacker(self.decoders, model, steps, self.epochs, self.batch_size, context)
        score = self._score(context)
        context.progress.begin("expert", steps)
        try:
            trained = train_mocosfl(
                model, self._batches(context), self._expert_settings(context), steps=steps, compute=context.compute,
                seed=context.seed, hooks=attacker, validate=score.of if score else None,
                checkpoints=context.checkpoints, progress=context.progress,
            )  # fmt: skip
        except RunFailedError as error:
            raise RunFailedError(f"the defender's expert: {error}") from error
        finally:
            context.progress.end()
        return TrainedExpert(model, trained.earlier_seconds, trained.selected_step if score else None)

    def _batches(self, context: DefenderContext) -> HalfTargetBatches:
        """The batches of the pre-training, from the first on."""
        return HalfTargetBatches(
            self.target_images(context),
            context.source_images,
            self.batch_size,
            generator(context.seed, "expert batches"),
            self.batch,
        )

    def _score(self, context: DefenderContext) -> CheckpointScore | None:
        """What the checkpoint is chosen by; None for the last one. Raises ConfigurationError without labels."""
        if self.checkpoint == "last":
            return None
        if context.checkpoint_score is None:
            raise ConfigurationError(
                "checkpoint: best_knn takes labelled images, and there are none; checkpoint: last needs no labels"
            )
        return context.checkpoint_score

    def _expert_settings(self, context: DefenderContext) -> TrainingConfig:
        """The experiment's training settings for one client, with defaults for those in `MEANINGLESS`."""
        settings = context.training
        own = {
            "clients": 1,
            "server_batch": self.batch_size,
            "epochs": self.epochs,
            "learning_rate": self.learning_rate,
            # averaging one client has no effect, but a sync_period of 1 may select another kernel
            "sync_period": min(settings.sync_period, 2),
        }
        defaults = {name: type(settings).model_fields[name].default for name in MEANINGLESS}
        if self.checkpoint == "best_knn":
            own["monitor_every"] = 1
        return settings.model_copy(update={**defaults, **own})

    def restore(self, context: DefenderContext) -> PreparedModel | None:  # noqa: ARG002
        """See :class:`Defense`; returns None, since of the pre-training only the model is kept."""
        return None

    def target_images(self, context: DefenderContext) -> Tensor:
        """Return the target images that the expert may train on; none if the defense uses no target data."""
        return context.target_images if self.uses_target_data else context.target_images[:0]

    def attacker(
        self, decoders: Sequence[str], model: SplitModel, steps: int, epochs: int, batch_size: int,
        context: DefenderContext,
    ) -> SimulatedAttacker:  # fmt: skip
        """Return a simulated attacker with `decoders` for a training of `model` over `steps` steps and `epochs`."""
        return SimulatedAttacker(
            decoders,
            model.smashed_shape,
            model.image_shape,
            alpha=self.alpha,
            threshold=self.threshold,
            steps=steps,
            batch_size=batch_size,
            compute=context.compute,
            seed=context.seed,
            objective=self.objective,
            refresh=-(-self.refresh * steps // epochs) if len(decoders) > 1 else 0,
            milestones=self.decoder_milestones,
            decay=self.decoder_decay,
            penalty_mode=self.penalty_mode,
        )


def decoder_set(decoder: str | list[str]) -> list[str]:
    """One or several names of inversion networks as a list.

    Args:
        decoder: a name, or a list of names; see :func:`mocosfl_priv.build_decoder`.

    Returns:
        A list of at least one name.

    Raises:
        ConfigurationError: there is none, or one is not in the grammar.

    >>> decoder_set("res_normN1C16")
    ['res_normN1C16']
    """
    decoders = [decoder] if isinstance(decoder, str) else decoder
    if not decoders:
        raise ConfigurationError("decoder: name at least one")
    for architecture in decoders:
        check_architecture(architecture)
    return decoders


def import_client(model: SplitModel, path: Path) -> None:
    """Replace the client of `model` by the one of the public MocoSFL release in `path`; the server side stays.

    Raises ConfigurationError unless the model's own client computes the same with these weights. It must be the paper's
    ResNet-18 for 32 pixels, or a network that begins like it, with the cut layer and bottleneck of the published one.
    """
    client = load_published_client(path)
    own = copy.deepcopy(model.client)
    try:
        own.load_state_dict(client.state_dict())
    except RuntimeError:
        fits = False
    else:
        own.normalise = client.normalise  # the release's constants, which are no weights
        probe = torch.rand(2, *model.image_shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found, published = own(probe), client(probe)
        fits = found.shape == published.shape and torch.allclose(found, published, atol=1e-5)
    if not fits:
        cut = sum(unit.isdecimal() for unit, _ in client.named_children())
        raise ConfigurationError(
            f"{path}: this published client is a ResNet-18 for 32 pixels, cut after unit {cut}, with smashed data "
            f"{tuple(client(torch.zeros(1, *model.image_shape)).shape[1:])}; the configured client does not match it"
        )
    model.client = client


class HalfTargetBatches:
    """Batches of an expert's training: half target images (over-sampled) and half source images.

    If there are no target images or no source images, batches consist of `batch_size` images of the other kind.

    batch: `batch_size` is the number of images of both kinds (together), or of each kind (each). An epoch is over when
        as many images were drawn as there are of both kinds, or as there are of the larger kind.
    """

    clients = 1

    def __init__(
        self, target: Tensor, source: Tensor, batch_size: int, rng: torch.Generator, batch: Batch = "together"
    ) -> None:
        whole = batch == "each" or len(target) == 0 or len(source) == 0
        of_target = batch_size if whole else batch_size // 2
        counts = [(source, batch_size if whole else batch_size - of_target), (target, of_target)]
        self._parts = [(images, count) for images, count in counts if len(images)]
        self.images_per_epoch = max(len(target), len(source)) if batch == "each" else len(target) + len(source)
        self._rng = rng

    def next(self) -> ClientBatch:
        """Return the next batch, drawn with replacement, so that few target images may be repeated within a batch."""
        chosen = [images[torch.randint(len(images), (count,), generator=self._rng)] for images, count in self._parts]
        images = torch.cat(chosen)
        return ClientBatch(torch.zeros(1, dtype=torch.long), (len(images),), images)

    def state(self) -> dict[str, Tensor]:
        """Return the state of the random generator, which alone determines the next batch."""
        return {"generator": self._rng.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""
        self._rng.set_state(state["generator"])
