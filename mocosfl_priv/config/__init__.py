"""One experiment as a validated document: its schema, how files are read into it, and named scales."""

from mocosfl_priv.config.documents import (
    load_config,
    parse_config,
    parse_yaml,
    read_document,
    with_added_plugins,
    with_candidate,
    with_overrides,
)
from mocosfl_priv.config.keys import (
    Key,
    document_keys,
    keys_of,
    section_summaries,
)
from mocosfl_priv.config.plugin_spec import (
    COMPOSITION,
    PluginEntry,
    PluginSpec,
)
from mocosfl_priv.config.schema import (
    PAPER_PROTOCOL,
    Bottleneck,
    CodecName,
    ComputeConfig,
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    LeakageConfig,
    ModelConfig,
    NormName,
    ThreatConfig,
    TrainingConfig,
    parse_bottleneck,
    plain_types,
)

__all__ = [
    "COMPOSITION",
    "PAPER_PROTOCOL",
    "Bottleneck",
    "CodecName",
    "ComputeConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "Key",
    "LeakageConfig",
    "ModelConfig",
    "NormName",
    "PluginEntry",
    "PluginSpec",
    "ThreatConfig",
    "TrainingConfig",
    "document_keys",
    "keys_of",
    "load_config",
    "parse_bottleneck",
    "parse_config",
    "parse_yaml",
    "plain_types",
    "read_document",
    "section_summaries",
    "with_added_plugins",
    "with_candidate",
    "with_overrides",
]
