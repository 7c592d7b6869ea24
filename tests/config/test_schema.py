from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mocosfl_priv.config import (
    PAPER_PROTOCOL,
    ExperimentConfig,
    TrainingConfig,
    load_config,
    parse_bottleneck,
    parse_config,
    with_added_plugins,
    with_candidate,
)
from mocosfl_priv.errors import ConfigurationError
from mocosfl_priv.sweep.document import load_sweep

CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_described(path: Path) -> None:
    assert load_sweep(path).variants[0].config.description


def test_unknown_key_is_refused_with_its_path_and_a_suggestion() -> None:
    with pytest.raises(ConfigurationError, match=r"training\.client: unknown key; did you mean 'clients'\?"):
        parse_config({"training": {"client": 3}})


def test_every_problem_is_named_in_one_line() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_config({"training": {"clients": 0, "ema": 2}, "sedes": [1]})
    message = str(caught.value)
    assert "\n" not in message
    for part in ("training.clients", "training.ema", "sedes", "'seeds'"):
        assert part in message


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "stands twice"),
        ({"cut_layers": [0]}, "cut_layers.0"),
        ({"target_fractions": [1.5]}, "target_fractions.0"),
        ({"model": {"bottleneck": "C4S3"}}, "power of two"),
        ({"model": {"bottleneck": "4S2"}}, "not of the form"),
        ({"defenses": ["none", "none"]}, "two entries are called 'none'"),
        ({"attacks": [{"sigma": 1}]}, "attacks.0.name"),
        ({"training": {"dirichlet_alpha": 0}}, "training.dirichlet_alpha"),
        ({"training": {"partition": "dirichlett"}}, "training.partition"),
        ({"evaluation": {"label_fractions": [0.1, 0]}}, "evaluation.label_fractions.1"),
        ({"evaluation": {"label_fractions": [0.1, 0.1]}}, "evaluation.label_fractions: a value stands twice"),
        ({"evaluation": {"probe_selection": "train"}}, "evaluation.probe_selection"),
        ({"training": {"learning_rate": float("nan")}}, "training.learning_rate"),
    ],
)
def test_impossible_values(document: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_config(document)
    assert expected in str(caught.value)


def test_overrides_reach_nested_keys_lists_and_bare_plugin_names() -> None:
    config = parse_config(
        {"defenses": ["none", "gaussian"], "training": None},
        ["training.clients=7", "defenses.1.sigma=0.25", "seeds=[3, 4]", "data.path=/tmp/x"],
    )
    assert config.training.clients == 7
    assert config.defenses[1].name == "gaussian"
    assert config.defenses[1].parameters == {"sigma": 0.25}
    assert config.seeds == (3, 4)
    assert config.data.path == Path("/tmp/x")


@pytest.mark.parametrize("override", ["novalue", "=3", "seeds.9=1", "name.a.b=1", "training.clients.x=2", "a=[1"])
def test_bad_overrides_are_one_clear_error(override: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_config({"seeds": [0], "name": "x", "training": {"clients": 4}}, [override])
    assert "\n" not in str(caught.value)


def test_repeated_yaml_key_and_broken_yaml_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(ConfigurationError, match="stands twice"):
        load_config(path)
    path.write_text("name: [a\n")
    with pytest.raises(ConfigurationError, match="not valid YAML"):
        load_config(path)
    path.write_text("- a\n")
    with pytest.raises(ConfigurationError, match="mapping"):
        load_config(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_config(tmp_path / "missing.yaml")


def test_labels_follow_names_and_parameters() -> None:
    config = parse_config(
        {"defenses": ["none", {"name": "gaussian", "sigma": 0.1}, {"name": "gaussian", "sigma": 0.2}, "d.py:Mine"]}
    )
    assert [d.label for d in config.defenses] == ["none", "gaussian(sigma=0.1)", "gaussian(sigma=0.2)", "Mine"]


def test_added_plugins_come_last_and_keep_the_rest() -> None:
    config = with_added_plugins(parse_config({"defenses": ["none"]}), ["mine.py:Mine"], ["floor2.py:F"])
    assert [d.name for d in config.defenses] == ["none", "mine.py:Mine"]
    assert [a.label for a in config.attacks][-1] == "F"


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "seeds": st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
            "cut_layers": st.lists(st.integers(1, 5), min_size=1, unique=True),
            "target_fractions": st.lists(st.floats(0, 1), min_size=1, max_size=3, unique=True),
        },
    )
)
def test_written_out_configuration_reads_back_equal(document: dict[str, object]) -> None:
    config = parse_config(document)
    again = ExperimentConfig.model_validate(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert again.digest == config.digest


def test_digest_changes_with_any_setting() -> None:
    digests = {parse_config(d).digest for d in ({}, {"seeds": [1]}, {"training": {"ema": 0.5}}, {"attacks": ["rmle"]})}
    assert len(digests) == 4


@pytest.mark.parametrize(
    ("text", "channels", "stride", "kernel", "relu"),
    [("C4S2", 4, 2, 3, True), ("noReLUK5C8S4", 8, 4, 5, False), ("C1S1", 1, 1, 3, True)],
)
def test_bottleneck_grammar(text: str, channels: int, stride: int, kernel: int, relu: bool) -> None:
    parsed = parse_bottleneck(text)
    assert parsed is not None
    assert (parsed.channels, parsed.stride, parsed.kernel, parsed.relu) == (channels, stride, kernel, relu)
    assert parse_bottleneck("none") is None


def test_paper_protocol_changes_defaults_and_nothing_that_is_written_out() -> None:
    strict, paper = parse_config({}), parse_config({"protocol": "paper"})
    for section, choices in PAPER_PROTOCOL.items():
        for name, value in choices.items():
            assert getattr(getattr(paper, section), name) == value
            assert getattr(getattr(strict, section), name) != value
    built = ExperimentConfig(protocol="paper", training=TrainingConfig(clients=5))
    assert (built.training.clients, built.training.paper_gradient) == (5, "one_sided")
    mixed = parse_config({"protocol": "paper", "training": {"select_on": "validation"}})
    assert mixed.training.select_on == "validation"
    assert mixed.training.paper_gradient == "one_sided"
    # what was resolved is written out, so that a stored configuration says the same without the protocol's help
    assert parse_config(yaml.safe_load(paper.to_yaml())) == paper


@pytest.mark.parametrize(
    ("settings", "has_it"),
    [
        ({}, False),
        ({"partition": "classes_per_client"}, False),
        ({"average_momentum_models": False}, False),  # IID clients drift alike
        ({"partition": "classes_per_client", "average_momentum_models": False}, True),
        ({"partition": "dirichlet", "average_momentum_models": False}, True),
        ({"partition": "dirichlet", "average_momentum_models": False, "clients": 1}, False),
    ],
)
def test_settings_with_the_short_cut_are_known(settings: dict[str, Any], has_it: bool) -> None:
    assert TrainingConfig(**settings).has_short_cut == has_it
    assert parse_config({"protocol": "paper", "training": {"partition": "dirichlet"}}).training.has_short_cut


def test_an_entry_may_start_from_another_one(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text(
        "defenses: [&weak {name: gaussian, sigma: 0.1, clip: 2.0}, {<<: *weak, label: strong, sigma: 1.0}]\n"
    )
    weak, strong = load_config(path).defenses
    assert strong.parameters == {"sigma": 1.0, "clip": 2.0} and weak.parameters["sigma"] == 0.1


def test_a_candidate_is_one_of_the_defenses() -> None:
    config = parse_config({"defenses": ["none", "gaussian"]})
    assert config.candidate is None
    tried = with_candidate(config, "some/where/mine.py")
    assert tried.candidate == "mine" and [d.label for d in tried.defenses] == ["mine", "none", "gaussian"]
    assert with_candidate(config, "mine.py:Mine").candidate == "Mine"
    with pytest.raises(ConfigurationError, match="none takes part in every trial"):
        with_candidate(config, "none")
    with pytest.raises(
        ConfigurationError, match="candidate 'gausian' is none of the defenses; did you mean 'gaussian'"
    ):
        parse_config({"defenses": ["none", "gaussian"], "candidate": "gausian"})


def test_a_key_under_its_former_name_is_read_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    line = "threat.observations is now called threat.messages_per_victim; its former name is read for the last time"
    assert parse_config({"threat": {"observations": 3}}).threat.messages_per_victim == 3
    assert [record.message for record in caplog.records] == [line]
    assert parse_config({}, ["threat.observations=2"]).threat.messages_per_victim == 2
    assert [record.message for record in caplog.records] == [line, line]
    with pytest.raises(ConfigurationError, match=r"threat\.observations is the former name of"):
        parse_config({"threat": {"observations": 3, "messages_per_victim": 4}})
    assert parse_config({"checkpoints": "somewhere"}).audit_models == Path("somewhere")  # a key of no section
    assert parse_config({}, ["checkpoints=there"]).audit_models == Path("there")
    assert caplog.records[-1].message.startswith("checkpoints is now called audit_models")
