"""One experiment as a validated, hashable document.

A YAML file is read into :class:`ExperimentConfig`. Unknown keys are refused with a suggestion, ranges are
checked, and every message names the path of the key. What needs the plugins, the models or the data to
judge (does this attack exist, can this backbone be cut there) is checked by the room that knows it, before
anything is trained.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from mocosfl_priv.config.plugin_spec import PluginEntry, PluginSpec, with_labels
from mocosfl_priv.errors import did_you_mean

Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
NormName = Literal["group", "layer", "instance", "batch"]
CodecName = Literal["fp32", "fp16", "int8"]


class Section(BaseModel):
    """A block of the document: immutable, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """``true`` (in YAML also yes, no, on, off) where a number is wanted would become 1."""
        values = value if isinstance(value, list | tuple) else [value]
        wanted = plain_types(cls.model_fields[str(info.field_name)].annotation)
        if wanted & {int, float} and bool not in wanted and any(isinstance(one, bool) for one in values):
            raise ValueError(f"{str(value).lower()} is no number")
        return value


def plain_types(annotation: Any) -> set[Any]:
    """All types that an annotation names, however nested, its models left out."""
    inner = get_args(annotation)
    return set().union(*map(plain_types, inner)) if inner else {annotation}


def one_capture_group(pattern: str) -> re.Pattern[str]:
    """Compile `pattern`; raises ValueError unless it is a regular expression with exactly one capture group."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    if compiled.groups != 1:
        raise ValueError(
            f"{pattern!r} has {compiled.groups} capture groups; it needs exactly one, such as '(patient[0-9]+)_'"
        )
    return compiled


class DataConfig(Section):
    """Which images play which role."""

    dataset: str = Field(
        "photos",
        description="target data: a name from `ls datasets`, imagefolder:PATH, torchvision:CLASS, a file of arrays or "
        "tensors, a Parquet file, a folder of Hugging Face datasets, or your own file.py:function",
    )
    path: Path | None = Field(
        None, description="where the target files of torchvision lie: its root, or a class-folder tree of that data set"
    )
    labels: Path | None = Field(
        None, description="CSV file with columns file, label and optionally group, split: labels of a flat folder"
    )
    label_column: str | None = Field(None, description="column or array with the labels, if it has an unusual name")
    group_column: str | None = Field(
        None,
        description="column or array that says which images belong together (patient, subject, session); no two "
        "roles share a group. `group` is found without it",
    )
    group_pattern: str | None = Field(
        None, description="the same from the names of files: a regular expression with one capture group"
    )
    source: str = Field("photos-source", description="out-of-domain data for defender and attacker")
    source_path: Path | None = Field(None, description="like path, for the source data")
    image_size: Annotated[int, Field(ge=8, le=512)] = Field(32, description="pixels per side; resize + centre crop")
    train_limit: Count | None = Field(None, description="use at most this many target training images, balanced")
    test_limit: Count | None = Field(None, description="use at most this many target test images, balanced")
    victims: Count = Field(128, description="test images whose smashed data the attacker holds")
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="share of the target training set on which checkpoints and probes are selected"
    )
    auxiliary_target_fraction: Fraction = Field(
        0.1, description="attacker's knowledge of the target distribution, as a share of its training set"
    )
    auxiliary_source_fraction: Fraction = Field(
        0.5, description="share of the source data that is the attacker's; the rest is the defender's"
    )
    role_seed: int = Field(0, description="assigns roles; shared by all seeds so that victims are the same")

    @field_validator("group_pattern")
    @classmethod
    def _one_capture_group(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            one_capture_group(pattern)
        return pattern

    @model_validator(mode="after")
    def _groups_in_one_way(self) -> DataConfig:
        if self.group_column is not None and self.group_pattern is not None:
            raise ValueError("group_column and group_pattern both say which images belong together; give one of them")
        return self


class ModelConfig(Section):
    """The backbone and what is put around it."""

    backbone: str = Field(
        "resnet18",
        description="a name from `ls models`, or your own: path/to/file.py:function or package.module:function, "
        "where function(width, image_size) returns a list of torch modules to cut between",
    )
    width: Annotated[int, Field(ge=4, multiple_of=4)] | None = Field(
        None, description="channels of the first unit, which scale all others; the backbone's own when left out"
    )
    norm: NormName = Field(
        "group",
        description="norm of convolutional backbones: group (4 channels a group), layer (one group), instance (one "
        "channel a group), batch (needs mend_norms); vit_tiny always has a LayerNorm per token",
    )
    weight_standardisation: bool = Field(True, description="convolutions standardise their filters (not in vit_tiny)")
    mend_norms: bool = Field(
        False, description="replace every BatchNorm by a GroupNorm, instead of refusing a model that has one"
    )
    client_residuals: bool = Field(
        True, description="false takes the shortcuts of residual blocks away on the client; the server keeps its own"
    )
    bottleneck: str = Field("none", description="none, or (noReLU)(K<kernel>)C<channels>S<stride>, as in C4S2")
    head: Literal["v1", "v2", "large_v2"] = Field(
        "v2", description="projector: v1 Linear(1024); v2 Linear(1024)-ReLU-Linear(1024); large_v2 with 4096 and 2048"
    )
    projector_hidden: Count | None = Field(None, description="replaces the head's hidden size; not for v1")
    projector_out: Count | None = Field(None, description="replaces the head's output size")

    @model_validator(mode="after")
    def _bottleneck_grammar(self) -> ModelConfig:
        parse_bottleneck(self.bottleneck)
        return self

    @model_validator(mode="after")
    def _head_has_what_is_set(self) -> ModelConfig:
        if self.head == "v1" and self.projector_hidden is not None:
            raise ValueError("projector_hidden: head v1 is a single linear layer and has no hidden size")
        return self


class Bottleneck(Section):
    """A parsed bottleneck: conv to `channels`, total `stride`, square `kernel`."""

    channels: Count
    stride: Count
    kernel: Count = 3
    relu: bool = True


def parse_bottleneck(text: str) -> Bottleneck | None:
    """Read the name of a bottleneck layer, as in ResSFL: ``C4S2`` has 4 channels and stride 2.

    Args:
        text: ``none``, or ``(noReLU)(K<kernel>)C<channels>S<stride>``.

    Returns:
        The layer; None for ``none``.

    Raises:
        ValueError: the name is not in the grammar, or says something impossible.

    >>> parse_bottleneck("C4S2").channels
    4
    """
    if text == "none":
        return None
    match = re.fullmatch(r"(noReLU)?(?:K(\d+))?C(\d+)S(\d+)", text)
    if match is None:
        raise ValueError(f"bottleneck {text!r} is not of the form none or (noReLU)(K<kernel>)C<channels>S<stride>")
    no_relu, kernel, channels, stride = match.groups()
    if int(channels) < 1:
        raise ValueError(f"bottleneck {text!r}: it needs at least one channel")
    if int(stride) < 1 or int(stride) & (int(stride) - 1):
        raise ValueError(f"bottleneck {text!r}: the stride must be a power of two")
    if kernel is not None and int(kernel) % 2 == 0:
        raise ValueError(f"bottleneck {text!r}: the kernel must be odd")
    return Bottleneck(channels=int(channels), stride=int(stride), kernel=int(kernel or 3), relu=no_relu is None)


class Heterogeneity(Section):
    """Two kinds of clients: the first ones are rich in memory and data (Li et al., ICLR 2023, appendix)."""

    clients: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="share of the clients that are rich")
    data: Annotated[float, Field(gt=0, lt=1)] = Field(0.8, description="share of the data that they hold together")
    micro_batch: Count = Field(16, description="images of a rich client in a step")

    def rich(self, clients: int) -> int:
        """How many of `clients` are rich: at least one, and not all."""
        return min(max(1, round(self.clients * clients)), max(1, clients - 1))


class ReplayConfig(Section):
    """Communication saved by replaying stored smashed data when the loss no longer falls."""

    threshold: Positive = Field(description="fall of an epoch's mean loss below which clients are asked for less")
    warmup_epochs: Annotated[int, Field(ge=0)] = Field(10, description="first epochs, which always run in full")


class TrainingConfig(Section):
    """MocoSFL (Li et al., ICLR 2023), with the paper's values as defaults."""

    clients: Count = Field(100, description="clients that train together; each holds a part of the private data")
    partition: Literal["iid", "classes_per_client", "dirichlet"] = Field(
        "iid",
        description="who holds what: iid deals images at random, classes_per_client gives each client a few classes, "
        "dirichlet skews the classes as dirichlet_alpha says",
    )
    classes_per_client: Count = Field(2, description="label-sorted shards per client; used by that partition only")
    dirichlet_alpha: Annotated[float, Field(ge=1e-6, le=1e6)] = Field(
        0.5, description="concentration of the dirichlet partition: the smaller, the fewer classes a client sees"
    )
    server_batch: Annotated[int, Field(ge=2)] = Field(100, description="images per step, over all clients")
    micro_batch: Count | None = Field(None, description="images per client and step; server_batch // clients if unset")
    pool: Count | None = Field(
        None, description="clients that take part in a round; all below 200 clients, else server_batch"
    )
    heterogeneity: Heterogeneity | None = Field(None, description="rich and poor clients; all alike if unset")
    partial_batches: Literal["carry", "drop"] = Field(
        "carry", description="what happens to the last images of a client's pass that fill no micro-batch"
    )
    epochs: Count = Field(200, description="passes over the clients' private data")
    learning_rate: Positive = Field(0.06, description="of SGD at the start; a cosine schedule lowers it to zero")
    client_learning_rate: Positive | None = Field(None, description="of the clients; learning_rate if unset")
    server_schedule: Literal["per_step", "per_epoch"] = Field(
        "per_step", description="when the server's cosine rate changes"
    )
    client_schedule: Literal["cosine", "oscillating"] = Field(
        "cosine", description="oscillating: a cosine whose period is as many steps as there are epochs (research code)"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="of SGD, for clients and server")
    weight_decay: Annotated[float, Field(ge=0)] = Field(5e-4, description="of SGD, for clients and server")
    temperature: Positive = Field(0.1, description="of the contrastive loss: similarities are divided by it")
    queue_size: Count = Field(6000, description="keys in the feature memory, over all clients")
    feature_memory: Literal["shared", "per_client"] = Field(
        "shared", description="negatives from all clients, or from the client's own keys only"
    )
    ema: Annotated[float, Field(ge=0, le=1)] = Field(
        0.99, description="share of itself that a momentum encoder keeps in an update, at clients and server"
    )
    ema_update: Literal["after_step", "before_encoding"] = Field(
        "after_step", description="before_encoding: momentum models follow at the next encoding, after a sync"
    )
    symmetric: bool = Field(
        True, description="each of the two views of an image is query once and key once: (q1, k2) + (q2, k1)"
    )
    paper_gradient: Literal["both", "one_sided"] = Field(
        "both",
        description="which terms of a symmetric loss reach the clients; one_sided (research code): each view is "
        "encoded and sent once, and only the first one's gradient returns",
    )
    sync_period: Count = Field(50, description="steps between two FedAvg synchronisations")
    average_base: Literal["pool", "client_0"] = Field(
        "pool", description="client_0: the average takes client 0 for the pool's first client (research code)"
    )
    average_momentum_models: bool = Field(
        True,
        description="average the clients' momentum models too (MonAcoSFL, ECML 2024); without it, clients that learn "
        "from non-IID data give keys a signature, and the server learns that instead of images",
    )
    divergence_aware: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of its own model that a client keeps at its first sync, later as it diverges (FedEMA)"
    )
    replay: ReplayConfig | None = Field(None, description="loss-threshold replay; off if unset")
    monitor_every: Count = Field(10, description="epochs between two kNN validations")
    select_on: Literal["validation", "test"] = Field(
        "validation", description="what the kept checkpoint is chosen by; test (research code) is not honest"
    )
    codec: CodecName = Field(
        "fp32", description="how smashed data travel: fp16 with a scale per image, int8 with one per image and channel"
    )
    gradient_codec: CodecName = Field("fp32", description="the same for gradients on their way back")
    checkpoint_every: Count = Field(1, description="epochs between two checkpoints, where a run keeps them")

    @property
    def has_short_cut(self) -> bool:
        """Whether clients that learn are expected to give their keys a signature that tells the server their client.

        Expected of several clients with different classes whose momentum models are never averaged (docs/LEARNING.md).
        Clients with a frozen model are not concerned.
        """
        return self.clients > 1 and self.partition != "iid" and not self.average_momentum_models

    @model_validator(mode="after")
    def _pool_of_clients(self) -> TrainingConfig:
        if self.pool is not None and self.pool > self.clients:
            raise ValueError(f"a pool of {self.pool} cannot be drawn from {self.clients} clients")
        return self


class EvaluationConfig(Section):
    """Utility and leak metrics."""

    knn_neighbours: Count = Field(200, description="neighbours that vote in the kNN monitor")
    knn_temperature: Positive = Field(0.1, description="of the votes: a neighbour counts exp(similarity / temperature)")
    linear_probe_penalties: tuple[Positive, ...] = Field(
        (0.01, 0.1, 1.0, 10.0), min_length=1, description="inverse L2 strengths; chosen on the validation role"
    )
    label_fractions: tuple[PositiveFraction, ...] = Field(
        (0.1, 0.01), description="shares of the probe training labels for the semi-supervised evaluation; may be empty"
    )
    probe_selection: Literal["validation", "test"] = Field(
        "validation",
        description="role on which probe penalty and semi-supervised epoch are chosen; test is optimistic, and only "
        "there to repeat published protocols",
    )
    lpips_network: Literal["alex", "vgg", "squeeze"] = Field(
        "alex", description="network behind the perceptual metric LPIPS; left out of the results without its weights"
    )
    recognition_epochs: Annotated[int, Field(ge=0)] = Field(
        12, description="training of the classifier that judges reconstructions; 0 leaves recognition out"
    )
    linkage_candidates: Annotated[int, Field(ge=0)] = Field(
        2000,
        description="images with which victims' messages are matched, the victims' own included; at least 1000 unless "
        "fewer are asked for; 0 leaves linkage out",
    )
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = Field(0.95, description="of all intervals in a report")
    bootstrap_samples: Annotated[int, Field(ge=100)] = Field(
        2000, description="how often the images are resampled for an interval"
    )


class ThreatConfig(Section):
    """What the attacker is granted. In split federated learning every participant holds the client model, and an
    honest-but-curious server its own.
    """

    grants: tuple[str, ...] = Field(
        ("client_weights", "query", "architecture", "auxiliary_data", "server_model"),
        description="capabilities from `mocosfl_priv.Capability`",
    )
    adaptive: bool = Field(True, description="the attacker knows the defense and trains through it")
    seconds: Positive | None = Field(None, description="wall-clock limit of one attack; none keeps runs repeatable")
    steps: Count | None = Field(None, description="limit of the steps of one attack; repeatable, unlike seconds")
    messages_per_victim: Count = Field(
        8,
        description="how often a victim's message is seen where the defense is randomised: an adaptive attacker takes "
        "their mean, and trains on such means; training sends every image once per epoch",
    )


class ComputeConfig(Section):
    """Where and how precisely to compute. Recorded, since it can change the last digits."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one, else cpu")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="bfloat16 autocast where the hardware has it, else float32"
    )
    threads: Count | None = Field(None, description="torch threads; all usable cores if unset")
    rows_per_pass: Count = Field(
        200,
        description="views that go through the networks at once, those of one client always together; bounds memory, "
        "whatever the number of clients",
    )
    client_kernel: Literal["auto", "measure", "grouped", "matmul", "loop"] = Field(
        "auto", description="how different clients are computed at once; measure times them at the start"
    )


class LeakageConfig(Section):
    """Attacks on the model while it trains: the leakage curve."""

    every: Annotated[int, Field(ge=0)] = Field(0, description="epochs between two points of the curve; 0 for no curve")
    attacks: tuple[PluginEntry, ...] = Field((), description="attacks of the curve; those of the experiment if empty")

    @model_validator(mode="after")
    def _labels(self) -> LeakageConfig:
        if self.attacks and not self.every:
            raise ValueError("leakage.attacks are given, but leakage.every is 0: say every how many epochs they run")
        object.__setattr__(self, "attacks", with_labels(self.attacks, "leakage.attacks"))
        return self


# What MocoSFL's research code does, where it differs from `protocol: strict`, which is what a careful reader of the
# paper would do. Each is a field of its own, and one that is written out in a configuration wins.
PAPER_PROTOCOL: dict[str, dict[str, Any]] = {
    "training": {
        "paper_gradient": "one_sided",
        "client_schedule": "oscillating",
        "server_schedule": "per_epoch",
        "ema_update": "before_encoding",
        "average_base": "client_0",
        "average_momentum_models": False,
        "partial_batches": "drop",
        "select_on": "test",
    },
    "evaluation": {"probe_selection": "test"},
}


def _distinct(values: Sequence[Any], where: str) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{where}: a value stands twice")


class ExperimentConfig(Section):
    """The whole document: a grid of cells that share data, training and threat model."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$")] = Field(
        "experiment", description="name of the experiment, in reports and tables"
    )
    description: str = Field("", description="one sentence for `ls configs` and the report")
    protocol: Literal["strict", "paper"] = Field(
        "strict", description="paper: repeat the choices of MocoSFL's research code, pitfalls included"
    )
    audit_models: Path | None = Field(
        None,
        description="audit: attack the published client models below this folder (the public MocoSFL release's layout, "
        "or flat files) instead of training; defenses, cut_layers, target_fractions, model and training are theirs",
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0,), min_length=1, description="every system is trained and attacked once per seed"
    )
    cut_layers: tuple[Count, ...] = Field(
        (1,), min_length=1, description="units of the backbone that clients run; `ls models` says how many there are"
    )
    target_fractions: tuple[Fraction, ...] = Field(
        (0.01,), min_length=1, description="share of the target training set that a defender may pre-train on"
    )
    defenses: tuple[PluginEntry, ...] = Field(
        (PluginSpec(name="none"),),
        min_length=1,
        description="defenses to compare, each by name, or as {name: ..., label: ..., parameters}; a list of some "
        "stands for all of them at once",
    )
    candidate: str | None = Field(
        None, description="label of the defense on trial: the report gives a verdict on it against none and taressfl"
    )
    attacks: tuple[PluginEntry, ...] = Field(
        (PluginSpec(name="floor"), PluginSpec(name="decoder")),
        min_length=1,
        description="attacks on every system, each by name, or as {name: ..., label: ..., parameters}",
    )
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    threat: ThreatConfig = ThreatConfig()
    leakage: LeakageConfig = LeakageConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="before")
    @classmethod
    def _sections_may_be_empty(cls, raw: object) -> object:
        """``training:`` with nothing under it means the defaults, as YAML writers expect."""
        if isinstance(raw, dict):
            return {key: value for key, value in raw.items() if value is not None}
        return raw

    @model_validator(mode="before")
    @classmethod
    def _protocol(cls, raw: object) -> object:
        """``protocol: paper`` changes the defaults of `PAPER_PROTOCOL`."""
        if not isinstance(raw, dict) or raw.get("protocol") != "paper":
            return raw
        filled = dict(raw)
        for section, choices in PAPER_PROTOCOL.items():
            given = raw.get(section) or {}
            if isinstance(given, BaseModel):
                given = given.model_dump(exclude_unset=True)
            if isinstance(given, dict):
                filled[section] = {**choices, **given}
        return filled

    @model_validator(mode="after")
    def _labels_and_duplicates(self) -> ExperimentConfig:
        object.__setattr__(self, "defenses", with_labels(self.defenses, "defenses"))
        object.__setattr__(self, "attacks", with_labels(self.attacks, "attacks"))
        labels = [str(spec.label) for spec in self.defenses]
        if self.candidate is not None and self.candidate not in labels:
            raise ValueError(
                f"candidate {self.candidate!r} is none of the defenses; {did_you_mean(self.candidate, labels)}"
            )
        for where in ("seeds", "cut_layers", "target_fractions"):
            _distinct(getattr(self, where), where)
        _distinct(self.evaluation.label_fractions, "evaluation.label_fractions")
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical document: equal exactly when every setting is equal."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_yaml(self) -> str:
        """The document with every default written out; reading it back gives an equal one."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
