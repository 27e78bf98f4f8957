"""Reports of a made-up model of four layers: with everything, and with other figures for a second artifact."""

import copy
import math
from typing import Any

KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LAYERS = 4


def full_report() -> dict[str, Any]:
    """A report with every section."""
    return {
        "schema": "compress.report/1",
        "model": {
            "name": "org/Small-100M",
            "source": "models/small.gguf",
            "hub_id": "org/Small-100M",
            "family": "llama",
            "license": "apache-2.0",
            "layers": LAYERS,
            "parameters": 100_000_000,
        },
        "recipe": {"name": "rsq", "description": "RSQ, 3 bits", "weights": {"bits": 3, "symmetric": True}},
        "seed": 17,
        "command": "compress run --model models/small.gguf --recipe rsq",
        "device": "cpu",
        "versions": {"compress": "0.1.0", "torch": "2.13.0"},
        "calibration": {
            "source": "self",
            "origin": "text that the model wrote itself",
            "notes": ["the Hub can't be reached"],
            "samples": 16,
            "seq_len": 1024,
            "digest": "c0ffee" * 10,
        },
        "fingerprint": {"model": {"small.gguf": "ab" * 32}},
        "weights": {
            "group_size": 64,
            "rotation": {"residual": "hadamard", "heads": "hadamard", "seed": 17},
            "lm_head_bits": 8,
            "dtype": "float16",
            "degraded": [],
            "modules": _modules(),
            "tuning": {
                "epochs": 3,
                "learning_rate": 1e-4,
                "steps": 24,
                "kl_by_epoch": [0.21, 0.16, 0.14],
                "held_out": {"windows": 1, "kl_before": 0.2012345, "kl_after": 0.1512345},
                "kept": True,
                "seconds": 95.0,
            },
        },
        "artifact": {
            "format": "compressed-tensors",
            "weight_bytes": 80_000_000,
            "bits_per_weight": 6.4,
            "parameters": 100_000_000,
            "source_bytes": 70_000_000,
            "bytes_16bit": 200_000_000,
            "formats": {
                "compressed-tensors": {"path": ".", "weight_bytes": 80_000_000},
                "gguf": {"path": "gguf", "weight_bytes": 90_000_000},
            },
            "files": {"model.safetensors": {"bytes": 80_000_000, "sha256": "cd" * 32}},
        },
        "reload_check": {
            "weights_identical": True,
            "relative_difference": 0.001,
            "top1_agreement": 1.0,
            "tolerance": 0.01,
        },
        "eval": _evaluation(),
        "efficiency": _efficiency(),
        "seconds": 611.4,
    }


def other_report() -> dict[str, Any]:
    """Another artifact of the same model: fewer bits, worse scores, a smaller KV cache."""
    report = copy.deepcopy(full_report())
    report["artifact"] |= {"weight_bytes": 60_000_000, "bits_per_weight": 4.8}
    for module in report["weights"]["modules"]:
        module["relative_error"] *= 2
    for row in report["eval"]["rows"]:
        row["after"] = row["after"] * (1.2 if row["task"] == "perplexity" else 0.9)
        row["paired"] = None
    report["eval"]["divergence"]["top1_agreement"] = 0.6
    for entry in report["efficiency"]["kv"]:
        entry |= {"model_bytes": entry["model_bytes"] // 4, "ratio": 0.25}
    return report


def row(
    task: str, metric: str, before: float, after: float, higher: bool | None, p_value: float | None = None, **more: Any
) -> dict[str, Any]:
    """A row of the table of scores, tested if ``p_value`` is given."""
    error = 0.01 * before
    paired = {"test": "paired t", "n": 500, "difference": after - before, "stderr": error / 2, "p_value": p_value}
    return {
        "task": task,
        "metric": metric,
        "before": before,
        "before_stderr": error,
        "after": after,
        "after_stderr": error,
        "delta": after - before,
        "ratio": after / before,
        "higher_is_better": higher,
        "n": 500,
        "paired": None if p_value is None else paired,
    } | more


def _modules() -> list[dict[str, Any]]:
    """Errors rise with the layer and the kind; the last layer's output of the MLP is the worst, at 8 bits."""
    return [
        {
            "name": f"model.layers.{layer}.{kind}",
            "bits": 8 if (layer, kind) == (LAYERS - 1, KINDS[-1]) else 3,
            "group_size": 64,
            "relative_error": 0.001 * 1.2 ** (layer * len(KINDS) + index),
            "damp": 0.01,
            "seconds": 0.1,
            "note": "",
            "degraded": False,
        }
        for layer in range(LAYERS)
        for index, kind in enumerate(KINDS)
    ]


def _evaluation() -> dict[str, Any]:
    lengths, depths = (2048, 4096), (0.0, 0.5, 1.0)
    perplexity = row("perplexity", "perplexity@1024", 20.0, 22.0, False, 1e-9, n=24552)
    perplexity["paired"] |= {"test": "paired t on the logarithm", "difference": math.log(1.1), "stderr": 0.004}

    def cells(passkey: float, tracking: float) -> list[dict[str, Any]]:
        hidden = [
            {"task": "passkey", "length": length, "depth": depth, "score": passkey * (1.0 - depth / 2), "n": 2}
            for length in lengths
            for depth in depths
        ]
        whole = [{"task": "ruler_vt", "length": length, "depth": None, "score": tracking, "n": 2} for length in lengths]
        return [*hidden, *whole]

    return {
        "settings": {"limit": 500, "num_fewshot": 0},
        "text": "WikiText-2",
        "note": "Perplexity in windows of 1024 tokens, on WikiText-2.",
        "rows": [
            perplexity,
            row("arc_easy", "acc", 0.55, 0.50, True, 0.004),
            row("arc_easy", "acc_norm", 0.50, 0.49, True, 0.4),
            row("piqa", "acc", 0.51, 0.53, True, 0.02),
        ],
        "divergence": {
            "text": "WikiText-2",
            "windows": 24,
            "tokens": 24552,
            "mean_kl": 0.123456,
            "kl_stderr": 0.004,
            "top1_agreement": 0.8125,
            "greedy": {"prompts": 8, "tokens": 64, "changed_answers": 0.75, "changed_tokens": 0.5},
        },
        "sinks": {"before": 90.0, "after": 84.5, "sequences": 16, "tokens": 64, "threshold": 0.3},
        "long_context": {
            "lengths": list(lengths),
            "depths": 3,
            "samples": 2,
            "seed": 0,
            "haystack": "repeat",
            "before": cells(1.0, 0.25),
            "after": cells(0.8, 0.2),
        },
    }


def _efficiency() -> dict[str, Any]:
    def figure(metric: str, unit: str, ratio: float, spread: float, higher: bool) -> dict[str, Any]:
        ends = {"ratio_low": ratio * (1 - spread), "ratio_high": ratio * (1 + spread)}
        figures = {"metric": metric, "unit": unit, "baseline": 100.0, "model": 100.0 * ratio, "ratio": ratio}
        return figures | ends | {"higher_is_better": higher}

    return {
        "device": "cpu",
        "threads": 2,
        "dtype": "float32",
        "rounds": 5,
        "spread": "min-max",
        "prompt_tokens": 512,
        "new_tokens": 64,
        "baseline": "Small-100M",
        "model": "this",
        "rows": [
            figure("weight_bytes_on_disk", "bytes", 0.4, 0.0, False),
            figure("peak_memory_generating", "bytes", 0.6, 0.01, False),
            figure("time_to_first_token", "s", 1.02, 0.1, False),
            figure("decode_tokens_per_second", "tokens/s", 0.8, 0.05, True),
        ],
        "kv": [
            {"length": length, "baseline_bytes": length * 1000, "model_bytes": length * 1000, "ratio": 1.0}
            for length in (512, 2048, 8192)
        ],
        "notes": ["transformers unpacked the weights while loading"],
    }
