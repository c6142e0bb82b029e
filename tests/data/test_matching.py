"""What of an answer is compared with its reference."""

import time

import pytest

from qlora_lite.data.checks import matching
from qlora_lite.data.checks.matching import WHOLE, Matching

GSM8K = Matching(r"#### (-?[0-9.,]+)", r"[,$]|[.]$")
CLASS = Matching("positive|negative", ignore_case=True)


@pytest.mark.parametrize(
    ("rules", "text", "compared"),
    [
        (WHOLE, "  Two words.\n", "Two words."),
        (WHOLE, " \n", None),
        (GSM8K, "48 / 2 = 24\n#### 24", "24"),
        (GSM8K, "#### 1,200.", "1200"),
        (GSM8K, "#### -3\n#### 4", "-3"),  # the first one, as lm-eval's strict-match takes it
        (Matching(r"(?s:.*)#### (-?[0-9.,]+)"), "#### -3\n#### 4", "4"),
        (GSM8K, "the answer is 24", None),
        (CLASS, "The mood is negative, NOT Positive", "negative"),
        (CLASS, "POSITIVE", None),  # the pattern itself looks at case; (?i) makes it not to
        (Matching("(?i)positive|negative", ignore_case=True), "Negative, I think", "negative"),
        (Matching(r"is (\d+)|(\d+) it is"), "42 it is", "42"),  # the group that took part
        (Matching(r"#(\d*)"), "#", None),
        (Matching(ignore="[^a-z]", ignore_case=True), "A b!", "b"),
    ],
)
def test_what_is_compared_of_a_text(rules, text, compared):
    assert rules.extract(text) == compared


def test_a_pattern_that_takes_for_ever_gives_up(monkeypatch):
    monkeypatch.setattr(matching, "MATCH_SECONDS", 0.05)
    started = time.process_time()
    for rules in (Matching("(a|aa)+$"), Matching(ignore="(a|aa)+$")):
        with pytest.raises(TimeoutError):
            rules.extract("a" * 200 + "b")
    assert time.process_time() - started < 10
