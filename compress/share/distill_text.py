"""The text of a distillation: the calibration windows, cut to its length, or windows of a source of its own."""

import json
from collections.abc import Callable

from torch import Tensor

from compress.calibrate.selfgen import fast_dtype
from compress.calibrate.source import Model, Request, check_source, prepare
from compress.model import ModelView
from compress.share.distill_settings import OPTION, Distillation, check, window_count


def check_text(settings: Distillation, samples: int, seq_len: int) -> None:
    """Preflight: settings, and whether the text is enough for them and can be read, before anything is loaded.

    Args:
        settings: of the distillation.
        samples: calibration windows.
        seq_len: tokens of each.

    Raises:
        InputError: see :func:`check`, or the source can't be read.
    """
    check(settings, window_count(settings, samples, seq_len))
    if settings.source is not None:
        check_source(_request(settings, settings.source, 0))


def windows(
    settings: Distillation, view: ModelView, calibration: Tensor, seed: int, progress: Callable[[int, int], None]
) -> tuple[Tensor, str]:
    """Windows [windows, length] and where they are from, in words.

    Args:
        settings: of the distillation.
        view: the dense model, whose tokenizer is used, and which writes text if the source is ``self``.
        calibration: windows [samples, seq_len].
        seed: of windows that are drawn or written.
        progress: told the tokens written and wanted, while the model writes.

    Raises:
        InputError: a text that can't be read or is too short.
    """
    if settings.source is None:
        count = calibration.shape[1] // settings.length
        cut = calibration[:, : count * settings.length].reshape(-1, settings.length)
        return cut, f"the calibration text, {len(cut)} windows of {settings.length} tokens"
    fingerprint = json.dumps(view.checkpoint.fingerprint(), sort_keys=True)
    writer = Model(open=lambda: view.load_dense(fast_dtype()), fingerprint=fingerprint)
    found = prepare(_request(settings, settings.source, seed), view.tokenizer(), writer, progress=progress)
    return found.ids, found.origin


def _request(settings: Distillation, source: str, seed: int) -> Request:
    samples, option = settings.windows, OPTION.format("source")
    return Request(source, samples=samples, seq_len=settings.length, seed=seed, option=option)
