from __future__ import annotations

from mocosfl_priv.evaluation.multiple_comparisons import holm
from mocosfl_priv.evaluation.reliability import FLAGS
from mocosfl_priv.results import RunRecord
from reports.analysis.families import against_undefended
from reports.analysis.flags import EXPLANATIONS, explained_flags
from reports.analysis.key_findings import key_findings
from reports.analysis.leaderboard import leaderboard
from reports.analysis.summary import SummaryRow
from tests.reports.made_up import made_up


def test_every_defense_is_compared_with_none_at_its_cut_and_all_p_values_answer_for_all() -> None:
    record = made_up({"none": (0.8, 0.9), "strong": (0.3, 0.9), "same": (0.8, 0.9), "tiny": (0.795, 0.9)}, seeds=3)
    family = against_undefended(record)
    assert [member.system for member in family.members] == [f"{name} (cut 1)" for name in ("strong", "same", "tiny")]
    assert [member.adjusted_p for member in family.members] == holm([m.comparison.p_value for m in family.members])
    # the last one differs, but by less than what is claimed
    assert [m.finding for m in family.members] == ["leaks less", "no difference shown", "no difference shown"]
    assert "Of 3 comparisons 1 shows a difference" in family.statement


def test_where_no_attack_succeeded_on_both_nothing_is_compared() -> None:
    failed = [("mine", "decoder"), ("none", "rmle")]
    family = against_undefended(made_up({"none": (0.8, 0.9), "mine": (0.3, 0.9)}, seeds=3, failed=failed))
    assert [member.finding for member in family.members] == ["not compared: no attack succeeded on both"]
    assert family.statement == "Nothing was compared."


def test_a_training_that_failed_with_one_seed_leaves_pairs_of_the_others() -> None:
    record = made_up({"none": (0.8, 0.9), "mine": (0.3, 0.9)}, seeds=3)
    for name in ("cells", "per_image", "probe"):
        frame = getattr(record, name)
        setattr(record, name, frame[(frame["defense"] != "mine") | (frame["seed"] != 1)])
    (member,) = against_undefended(record).members
    assert member.comparison.leak is not None and member.comparison.leak.seeds == 2
    assert member.comparison.linear.seeds == 2


def test_in_short_answers_four_questions(sweep: RunRecord, sweep_rows: list[SummaryRow]) -> None:
    rows = sweep_rows
    short = key_findings(sweep, rows, leaderboard(sweep, rows), against_undefended(sweep), [])
    assert list(short) == ["What leaks", "To whom", "How sure", "At what price"]
    assert "none (cut 1): attacks remove" in short["What leaks"] and "SSIM above 0.5" in short["What leaks"]
    assert "client weights" in short["To whom"] and "knows the defense" in short["To whom"]
    assert "3 training seeds" in short["How sure"] and "Of 6 comparisons" in short["How sure"]
    assert "bytes sent per image" in short["At what price"]


def test_every_kind_of_flag_is_explained() -> None:
    assert set(EXPLANATIONS) == set(FLAGS)
    flags = [{"name": "few-seeds", "sentence": "One."}, {"name": "out-of-time", "sentence": "Two."}]
    explained = explained_flags([*flags, {"name": "few-seeds", "sentence": "Three."}])
    assert [(flag.name, flag.sentences) for flag in explained] == [
        ("few-seeds", ["One.", "Three."]),
        ("out-of-time", ["Two."]),
    ]
