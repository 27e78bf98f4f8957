"""What a row of the table says."""

import math

import pytest
from compress.evalsuite.report.findings import Finding, findings
from compress.evalsuite.report.wording import change, nbytes, p_value, seconds, shortened, three_digits
from report_builders import row


def finding(*args: object, **kwargs: object) -> Finding:
    (found,) = findings({"eval": {"rows": [row(*args, **kwargs)]}})  # type: ignore[arg-type]
    return found


def test_a_plus_is_an_improvement_whatever_the_metric() -> None:
    assert finding("perplexity", "perplexity@512", 20.0, 22.0, False).gain == pytest.approx(-0.1)
    assert finding("piqa", "acc", 0.5, 0.55, True).gain == pytest.approx(0.1)
    assert finding("odd", "thing", 1.0, 2.0, None).gain is None


def test_ranges_come_from_the_paired_test_where_it_is_of_the_same_figure() -> None:
    low, high = finding("piqa", "acc", 0.5, 0.45, True, 0.01).gain_range() or (0, 0)
    t = 1.9647  # of Student's t for the builder's 500 items
    assert (low, high) == pytest.approx((-0.1 - t * 0.005, -0.1 + t * 0.005), abs=1e-6)
    few = {"n": 5, "difference": -0.05, "stderr": 0.0025, "p_value": 0.0}
    assert finding("piqa", "acc", 0.5, 0.45, True, paired=few).gain_range() == pytest.approx(
        (-0.1 - 2.776 * 0.005, -0.1 + 2.776 * 0.005), abs=1e-5
    )
    untested = finding("piqa", "acc", 0.5, 0.45, True).gain_range() or (0, 0)
    assert untested == pytest.approx((-0.1 - 1.96 * 0.01 * math.sqrt(2), -0.1 + 1.96 * 0.01 * math.sqrt(2)))
    logarithm = {"difference": math.log(1.1), "stderr": 0.01, "p_value": 0.0}
    ends = finding("perplexity", "perplexity@512", 20.0, 22.0, False, paired=logarithm).gain_range() or (0, 0)
    assert ends == pytest.approx((1 - 1.1 * math.exp(0.0196), 1 - 1.1 * math.exp(-0.0196)))
    other = {"difference": 7.0, "stderr": 0.01, "p_value": 0.0}
    assert finding("piqa", "acc", 0.5, 0.45, True, paired=other).gain_range() == pytest.approx(untested)


def test_shares_are_per_cent_and_nothing_else_is() -> None:
    assert finding("piqa", "acc", 0.5, 0.45, True).change() == "−5.0 points"
    assert finding("cola", "mcc", 0.5, 0.45, True).change() == "−10.0 %"
    assert finding("perplexity", "perplexity@512", 0.9, 0.8, False).change() == "−11.1 %"
    assert finding("perplexity", "perplexity@512", 20.0, 124.0, False).change() == "6.20×"
    assert finding("piqa", "acc", 0.5, 0.5, True).verdict() == "Unchanged"


def test_a_difference_that_chance_explains_is_neither_good_nor_bad() -> None:
    assert finding("piqa", "acc", 0.5, 0.45, True, 0.051).tone == ""
    assert finding("piqa", "acc", 0.5, 0.45, True, 0.049).tone == "bad"
    assert finding("piqa", "acc", 0.5, 0.55, True, 0.049).tone == "good"
    assert finding("piqa", "acc", 0.5, 0.45, True).tone == "bad"
    assert finding("piqa", "acc", 0.5, 0.495, True).tone == ""
    assert finding("piqa", "acc", 0.5, 0.45, True, before_stderr=None).tone == ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (nbytes(142_466_112), "142 MB"),
        (nbytes(1_204_000_000), "1.20 GB"),
        (nbytes(999), "999 bytes"),
        (nbytes(None), "–"),
        (three_digits(0.000123), "0.000123"),
        (three_digits(0.0000123), "1.23e−05"),
        (three_digits(12345), "12,345"),
        (change(-2.345), "−2.3 %"),
        (change(0.01), "±0 %"),
        (seconds(0.042), "42.0 ms"),
        (seconds(611.4), "10 min 11 s"),
        (seconds(7261), "2 h 1 min"),
        (p_value(0.0004), "p < 0.001"),
        (p_value(0.0042), "p = 0.004"),
        (p_value(0.2), "p = 0.20"),
        (shortened("abcdefghij", 5), "ab…ij"),
        (shortened("abcde", 5), "abcde"),
    ],
)
def test_numbers_are_written_for_people(text: str, expected: str) -> None:
    assert text == expected
