"""Ratios of rounds, their spread, and the table."""

import pytest
from compress.evalsuite.efficiency import exact_row, paired_row, table


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    row = paired_row("decode_tokens_per_second", "tokens/s", [10.0, 20.0, 40.0], [11.0, 30.0, 40.0], True)
    assert (row.baseline, row.model) == (20.0, 30.0)
    assert row.ratio == pytest.approx(1.1)
    assert (row.ratio_low, row.ratio_high) == (1.0, 1.5)
    assert row.higher_is_better


def test_many_rounds_give_the_deciles() -> None:
    row = paired_row("m", "s", [1.0] * 11, [float(n) for n in range(11)], False)
    assert (row.ratio, row.ratio_low, row.ratio_high) == (5.0, 1.0, 9.0)


def test_one_round_has_no_spread() -> None:
    row = paired_row("m", "s", [2.0], [1.0], False)
    assert (row.ratio, row.ratio_low, row.ratio_high) == (0.5, None, None)


def test_bytes_are_exact() -> None:
    row = exact_row("weight_bytes_on_disk", 8, 2)
    assert (row.ratio, row.ratio_low, row.ratio_high) == (0.25, 0.25, 0.25)
    assert exact_row("weight_bytes_on_disk", 0, 2).ratio is None
    assert paired_row("peak_memory", "bytes", [1, 4], [2, 3], False).baseline in (2, 3)


def section(lengths: list[int], notes: int) -> dict:
    rows = [
        {"metric": metric, "unit": unit, "baseline": before, "model": after, "ratio": ratio}
        | {"ratio_low": low, "ratio_high": high, "higher_is_better": False}
        for metric, unit, before, after, ratio, low, high in (
            ("weight_bytes_on_disk", "bytes", 4_000_000, 1_000_000, 0.25, 0.25, 0.25),
            ("weight_bytes_in_memory", "bytes", 4_000_000, 4_000_000, 1.0, 1.0, 1.0),
            ("peak_memory", "bytes", 99_999, 0, None, None, None),
            ("peak_memory_generating", "bytes", 1, 2, 2.0, None, None),
            ("time_to_first_token", "s", 0.12345, 0.2, 1.6, 1.5, 1.7),
            ("prefill_tokens_per_second", "tokens/s", 1234.5, 100.0, 0.1, 0.05, 0.2),
            ("decode_tokens_per_second", "tokens/s", 12.0, 12.0, 1.0, 1.0, 1.0),
        )
    ]
    kv = [{"length": n, "baseline_bytes": n * 10, "model_bytes": n * 5, "ratio": 0.5} for n in lengths]
    head = {"model": "small", "baseline": "large", "device": "cpu", "threads": 1, "dtype": "float32"}
    head |= {"prompt_tokens": 8, "new_tokens": 4, "rounds": 3, "spread": "min-max"}
    return {**head, "rows": rows, "kv": kv, "notes": ["measured"] * notes}


def test_the_table_is_short_whatever_was_measured() -> None:
    lines = table(section([512, 1024, 2048, 4096], 2))
    assert len(lines) == 14
    assert lines[0] == "small against large: cpu, 1 thread, float32, 8 + 4 tokens, 3 rounds"
    assert table(section([512], 0) | {"threads": 2, "rounds": 1})[0].endswith(
        "2 threads, float32, 8 + 4 tokens, 1 round"
    )
    assert "| weights on disk | 4.0 MB | 1.0 MB | 0.25x |" in lines
    assert "| peak memory | 99,999 B | 0 B | - |" in lines
    assert "| time to first token | 0.123 s | 0.2 s | 1.60x (1.50-1.70) |" in lines
    assert [line for line in lines if "KV" in line] == [
        "| KV cache of 512 tokens | 5,120 B | 2,560 B | 0.50x |",
        "| KV cache of 4,096 tokens | 40,960 B | 20,480 B | 0.50x |",
    ]
    assert lines[-1] == "note: measured"
    assert len(table(section([], 0))) == 10
