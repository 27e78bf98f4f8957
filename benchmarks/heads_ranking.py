"""How well scores rank heads: passkeys that are answered, over the share of KV heads that stream.

The heads that a score ranks lowest stream, first few, then more. The area under that curve, from no head (the dense
model) to all of them, is the mean share of passkeys over all budgets: 1 for a ranking that never loses one. Every
ranking answers the same questions through the same cache, and the two ends are the same for all of them; errors are of
the mean over questions, and differences from the first score are taken question by question.

Our own scores are taken on the prompts of the recipe's section `heads`, at `--profiled` tokens; other scores come from
the profile of a run. kvpress's DuoAttention scores (its `on_the_fly_scoring`, for models without published gates) are
taken by kvpress itself from texts of the same tokens, in its own environment:

    python -m venv KVPRESS && KVPRESS/bin/pip install kvpress
    python benchmarks/heads_ranking.py --model MODEL --kvpress KVPRESS/bin/python --json FILE
        [--scores blend,influence,distant] [--profile head_profile.json] [--seeds 0] [--shares 0.5,0.7,0.8,0.9,0.95]
        [--length 2048] [--depths 10] [--samples 1] [--profiled 1024,2048] [--items 4] [--texts 50]

What is in FILE isn't measured again, so that a run that was stopped goes on, and one with other questions or shares has
the scores already.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from compress.evalsuite.longcontext import LongContextSettings
from compress.evalsuite.statistics import mean_and_error
from heads_ways import Kept, all_heads, full_layers, keeping, passkeys, rule_from, streaming_options
from torch import Tensor

import compress
from compress.fingerprint import fingerprint_of
from compress.heads.data import Item, text_windows
from compress.heads.influence import influence
from compress.heads.methods import rule_of
from compress.heads.profile import read_profile
from compress.heads.profiling import Subject, prompts
from compress.heads.scores import ScoreSettings, mean_rank, score
from compress.heads.select import Head, rank
from compress.kv.attention import NAME
from compress.schema import Heads

KVPRESS = "kvpress"
SCRIPT = Path(__file__).with_name("heads_kvpress.py")


def asked(subject: Subject) -> list[dict[str, Any]]:
    """Prompts as JSON types; the model's own answers to half of them take a while."""
    return [
        {"ids": item.ids.tolist(), "supervised": item.supervised.tolist(), "kind": item.kind, "context": item.context}
        for item in prompts(subject)
    ]


def on_prompt(subject: Subject, prompt: dict[str, Any]) -> Any:
    """Influence on one prompt, [layers][KV heads]."""
    ids, supervised = torch.tensor(prompt["ids"]), torch.tensor(prompt["supervised"])
    item = Item(ids, supervised, prompt["kind"], prompt["context"])
    return influence(subject.model, [item], [rule_of(subject.settings)])[..., 0].tolist()


def influences(kept: Kept, subject: Subject) -> Tensor:
    """The score that is the default, prompt by prompt, [layers, KV heads]."""
    found = [
        kept.of(f"influence on prompt {number}", partial(on_prompt, subject, prompt))
        for number, prompt in enumerate(kept.of("prompts", partial(asked, subject)), 1)
    ]
    return torch.tensor(found).mean(0)


def published(args: argparse.Namespace, tokenizer: Any) -> list[list[float]]:
    """What kvpress finds, [layers][KV heads]."""
    windows = text_windows(tokenizer, [min(args.profiled)] * args.texts, args.seed)
    model, _ = compress.load(args.model, packed=False, kv=False)
    with tempfile.TemporaryDirectory() as name:
        folder, texts, out = Path(name), Path(name) / "texts.json", Path(name) / "scores.json"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        texts.write_text(json.dumps([tokenizer.decode(ids, skip_special_tokens=True) for ids in windows]))
        subprocess.run([args.kvpress, SCRIPT, folder, texts, out], check=True)
        found: list[list[float]] = json.loads(out.read_text())
    return found


def plain(name: str, subject: Subject, settings: ScoreSettings) -> Any:
    """A score that needs no gradients, [layers][KV heads]."""
    return score(name, subject.model, subject.tokenizer, settings).tolist()


def taken(args: argparse.Namespace, kept: Kept, subject: Subject) -> dict[str, Tensor]:
    """Scores by name, [layers, KV heads], more where far tokens matter more."""
    how, found = subject.settings, {}
    settings = ScoreSettings(how.lengths * how.items, how.seed, sink=how.sink, recent=how.recent)
    for name in filter(None, args.scores.split(",")):
        if name == "influence":
            found[name] = influences(kept, subject)
        elif name == "blend":
            values = kept.of("score mean_qk", partial(plain, "mean_qk", subject, settings))
            found[name] = mean_rank(influences(kept, subject), torch.tensor(values))
        else:
            values = kept.of(f"score {name}", partial(plain, name, subject, settings))
            found[name] = torch.tensor(values)
    if args.profile is not None:
        profile = read_profile(args.profile)
        profile.check(subject.model.config)
        found |= {f"{name} (profile)": torch.tensor(values) for name, values in profile.scores.items()}
    if args.kvpress is not None:
        found[KVPRESS] = torch.tensor(kept.of(f"score {KVPRESS}", lambda: published(args, subject.tokenizer)))
    else:
        print("kvpress isn't compared: --kvpress names no Python of an environment that has it", flush=True)
    return found


def rankings(args: argparse.Namespace, config: Any, scores: dict[str, Tensor]) -> Iterator[tuple[str, list[Head]]]:
    """Names, and heads in the order in which they are to keep everything."""
    for name, values in scores.items():
        yield name, list(rank(values, full_layers(config)).heads)
    for seed in args.seeds:
        heads = all_heads(config)
        Random(seed).shuffle(heads)
        yield f"random {seed}", heads


class Curve:
    """Passkeys over shares of streaming heads.

    Args:
        args: of the command line.
        kept: where answers are kept, by the heads that keep everything.
        model: attends by plans.
        tokenizer: the model's.
    """

    def __init__(self, args: argparse.Namespace, kept: Kept, model: Any, tokenizer: Any) -> None:
        self.args, self.kept, self.model, self.tokenizer = args, kept, model, tokenizer
        self.shares = sorted({0.0, *args.shares, 1.0})

    def answers(self, name: str, heads: list[Head]) -> np.ndarray:
        """[shares, questions], 1 where the pass key is in the answer."""
        return np.array([self._at(f"{name} at {share:g}", heads, share) for share in self.shares])

    def areas(self, answers: np.ndarray) -> list[float]:
        """Of every question alone."""
        found: list[float] = np.trapezoid(answers, self.shares, axis=0).tolist()
        return found

    def _at(self, name: str, heads: list[Head], share: float) -> list[float]:
        keep = heads[: round((1 - share) * len(heads))]
        mark = hashlib.sha256(json.dumps(sorted(keep)).encode()).hexdigest()[:16]
        settings = LongContextSettings((self.args.length,), self.args.depths, self.args.samples, self.args.seed)
        way = keeping(name, self.model.config, rule_from(self.args.sink, self.args.recent), keep)
        found: list[float] = self.kept.of(
            f"{self.args.depths} x {self.args.samples} passkeys in {self.args.length}, {len(keep)} full heads {mark}",
            lambda: list(passkeys(self.model, self.tokenizer, way.plan, settings)),
            told=name,
        )
        return found


def measured(args: argparse.Namespace, curve: Curve, scores: dict[str, Tensor]) -> list[dict[str, Any]]:
    """A row a ranking, printed as it comes."""
    shares = "  ".join(f"{share:>4g}" for share in curve.shares)
    print(f"streaming heads  {shares}  area, and over the first", flush=True)
    rows: list[dict[str, Any]] = []
    first: list[float] = []
    for name, heads in rankings(args, curve.model.config, scores):
        answers = curve.answers(name, heads)
        areas = curve.areas(answers)
        first = first or areas
        area, error = mean_and_error(areas)
        more, paired = mean_and_error([own - other for own, other in zip(areas, first, strict=True)])
        share = answers.mean(1).tolist()
        rows.append({"ranking": name, "passkey": share, "area": area, "error": error, "more": more, "paired": paired})
        told = "  ".join(f"{value:4.2f}" for value in share)
        print(f"{name:15}  {told}  {area:.3f} ± {error or 0:.3f}, {more:+.3f} ± {paired or 0:.3f}", flush=True)
    return rows


def floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def environment(python: str) -> str:
    command = [python, "-c", "import importlib.util as u; print(u.find_spec('kvpress'))"]
    if shutil.which(python) is None or b"kvpress" not in subprocess.run(command, capture_output=True).stdout:
        raise argparse.ArgumentTypeError(f"{python} is no Python that has kvpress: PYTHON -m pip install kvpress")
    return python


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--kvpress", type=environment, help="Python of an environment that has kvpress")
    parser.add_argument("--scores", default=f"{Heads().score},distant")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--seeds", type=integers, default=(0,), help="of random rankings")
    parser.add_argument("--shares", type=floats, default=[0.5, 0.7, 0.8, 0.9, 0.95], help="of heads that stream")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--depths", type=int, default=10)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profiled", type=integers, default=Heads().lengths)
    parser.add_argument("--items", type=int, default=Heads().items)
    parser.add_argument("--texts", type=int, default=50, help="that kvpress reads, as many as it does by itself")
    streaming_options(parser)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser


def main() -> None:
    args = options().parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    how = Heads(
        lengths=args.profiled, items=args.items, seed=args.seed, sink=args.sink, recent=args.recent,
        budget_tokens=max(args.length, args.sink + args.recent + 1),
    )  # fmt: skip
    model, tokenizer = compress.load(args.model)
    names = ("seed", "profiled", "items", "texts", "sink", "recent")
    settings = {name: getattr(args, name) for name in names} | {"model": fingerprint_of(model.config).config_hash}
    kept = Kept(args.json, json.loads(json.dumps(settings)))
    scores = taken(args, kept, Subject(lambda: model, tokenizer, how))
    model.set_attn_implementation(NAME)
    kept.content["rows"] = measured(args, Curve(args, kept, model, tokenizer), scores)
    kept.save()


if __name__ == "__main__":
    main()
