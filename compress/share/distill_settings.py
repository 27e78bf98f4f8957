"""How a student that shares attention is distilled, and what its settings ask of the text: known before any model."""

from dataclasses import dataclass
from typing import Literal

from compress.calibrate.errors import InputError

HELD_SHARE = 16  # one window of so many is held out, and at least one
HELD_MOST = 4  # windows: more would make checks cost as much as learning
OPTION = "share.distill_{}"


@dataclass(frozen=True)
class Distillation:
    """Settings of the two stages of EchoAtt's distillation (arXiv 2409.14595).

    Attributes:
        minutes: budget of time; None: no limit of this kind. The first limit that is reached ends the training.
        steps: budget of steps of the optimiser.
        tokens: budget of tokens learnt from.
        passes: how often a window is learnt from at most.
        length: tokens of a window.
        batch: windows a step, of all processes together.
        at_once: windows in memory at once in a process; gradients of the others are accumulated.
        lr: learning rate of AdamW, after a short rise and before a cosine's fall; of each stage.
        decay: weight decay of matrices.
        clip: largest norm of the gradient.
        trained: all parameters; or the projections that consumers keep, and the norms from the first consumer on.
        hidden: weight of the intermediate-layer loss, as are the next two of theirs.
        soft: of the teacher's probabilities.
        hard: of the teacher's most probable token.
        temperature: of the soft labels.
        next_share: share of the budget that is the second stage's, on the text's own next tokens alone.
        check: share of the budget after which the held-out windows are looked at.
        keep_steps: steps after which everything is written to disk.
        keep_minutes: minutes after which it is, if they come first.
        worst: held-out divergence, as a multiple of the best, at which training stops.
        source: of the text, as of ``calibration.source``; None takes the calibration windows.
        windows: of a source of its own.
        processes: that torchrun starts on this machine.
        dtype: in which models multiply; auto: bfloat16 where the processor multiplies it natively, else float32.
    """

    minutes: float | None = 10.0
    steps: int | None = None
    tokens: int | None = None
    passes: int = 8
    length: int = 512
    batch: int = 4
    at_once: int = 2
    lr: float = 3e-4
    decay: float = 0.0
    clip: float = 1.0
    trained: Literal["consumers", "all"] = "consumers"
    hidden: float = 1.0
    soft: float = 1.0
    hard: float = 0.1
    temperature: float = 2.0
    next_share: float = 0.0
    check: float = 0.2
    keep_steps: int = 50
    keep_minutes: float = 2.0
    worst: float = 2.0
    source: str | None = None
    windows: int = 512
    processes: int = 1
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"


def window_count(settings: Distillation, samples: int, seq_len: int) -> int:
    """How many windows there will be.

    Args:
        settings: of the distillation.
        samples: calibration windows.
        seq_len: tokens of each.

    Raises:
        InputError: calibration windows are to be cut, and are shorter.
    """
    if settings.source is not None:
        return settings.windows
    if settings.length > seq_len:
        fix = "lower it, raise calibration.seq_len, or give the distillation a source of its own (distill_source)"
        raise _wrong("length", settings.length, f"the calibration windows have {seq_len} tokens", fix)
    return samples * (seq_len // settings.length)


def held_out(windows: int) -> int:
    """How many windows, the last ones, aren't learnt from."""
    return min(HELD_MOST, max(1, windows // HELD_SHARE))


def steps_of(settings: Distillation) -> int | None:
    """Steps that the budget allows, time and the size of the text aside; None where there is no such limit."""
    limits = [] if settings.steps is None else [settings.steps]
    if settings.tokens is not None:
        limits.append(max(1, settings.tokens // (settings.batch * settings.length)))
    return min(limits) if limits else None


def most_steps(settings: Distillation, windows: int) -> int:
    """Steps until every window that isn't held out has been learnt from as often as it may be."""
    return settings.passes * (windows - held_out(windows)) // settings.batch


def check(settings: Distillation, windows: int) -> None:
    """Find from the settings alone what can't work.

    Args:
        settings: of the distillation.
        windows: how many there will be, each of ``settings.length`` tokens.

    Raises:
        InputError: no limit, no loss, a batch that doesn't divide, or a text too small for the steps and the batch.
    """
    if settings.minutes is None and settings.steps is None and settings.tokens is None:
        raise _wrong("minutes", None, "neither minutes, nor steps, nor tokens are limited", "give one of them")
    if settings.batch % settings.at_once:
        fix = f"choose a divisor of distill_batch={settings.batch}"
        raise _wrong("at_once", settings.at_once, "isn't a divisor of the batch", fix)
    if settings.next_share < 1 and not settings.hidden + settings.soft + settings.hard > 0:
        raise _wrong("soft", settings.soft, "no loss of the first stage has a weight", "give one of them a weight")
    learnt = windows - held_out(windows)
    if learnt < settings.batch:
        given = f"the text gives {max(learnt, 0)} beside those that are held out"
        told = f"a step needs {settings.batch} windows of {settings.length} tokens, and {given}"
        raise _wrong("batch", settings.batch, told, "give more text (calibration.samples), or lower distill_batch")
    steps, most = steps_of(settings), most_steps(settings, windows)
    if steps is not None and steps > most:
        problem = (
            f"{steps:,} steps of {settings.batch} windows would go through the {learnt:,} windows of the text"
            f" {steps * settings.batch / learnt:.1f} times, where distill_passes={settings.passes} are allowed"
        )
        name, value = ("steps", settings.steps) if steps == settings.steps else ("tokens", settings.tokens)
        fix = f"at most {most:,} steps fit: give more text (calibration.samples), or raise distill_passes"
        raise _wrong(name, value, problem, fix)


def check_processes(settings: Distillation, processes: int) -> None:
    """Whether a batch can be divided among processes.

    Raises:
        InputError: it can't.
    """
    if settings.batch % (settings.at_once * processes):
        problem = f"can't be divided among {processes} processes, {settings.at_once} windows at once each"
        raise _wrong("batch", settings.batch, problem, f"take a multiple of {settings.at_once * processes}")


def _wrong(name: str, value: object, problem: str, fix: str) -> InputError:
    return InputError(OPTION.format(name), value, problem, fix=fix)
