"""lm-eval's model interface over a loaded model. Importing this module imports lm-eval, which takes seconds."""

from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

from compress.evalsuite.settings import EvalSettings
from lm_eval.models.huggingface import HFLM

_ROLLING_LOGITS_BYTES = 2**30


class LoadedModel(HFLM):
    """``HFLM`` around a model and tokenizer in memory, whose forward passes keep the caller's output streams.

    lm-eval prints and draws bars in places that can't be switched off; the harness redirects both streams around the
    evaluation, and this class gives them back while the model runs.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; lm-eval may add a padding token to it.
        settings: batch size, longest sequence, and whether a bar is drawn.
        streams: stdout and stderr while the model runs.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: EvalSettings, streams: tuple[TextIO, TextIO]) -> None:
        self._streams = streams
        self._silent = not settings.progress
        self._batch_size = settings.batch_size
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text in nats; the batch is kept small enough for logits over full windows."""
        silent = self._silent
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        # Logits and log-probabilities exist together, in float32 at most.
        fitting = _ROLLING_LOGITS_BYTES // (2 * 4 * vocabulary * self.max_length)
        self.batch_size_per_gpu = max(1, min(self._batch_size, fitting))
        self._silent = True  # lm-eval draws one bar per batch here
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu, self._silent = self._batch_size, silent

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generated text for each prompt, cut at its stop strings."""
        with self._own_streams():
            return super().generate_until(requests, disable_tqdm=disable_tqdm or self._silent)

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        with self._own_streams():
            return super()._loglikelihood_tokens(
                requests, disable_tqdm=disable_tqdm or self._silent, override_bs=override_bs
            )

    @contextmanager
    def _own_streams(self) -> Iterator[None]:
        out, err = self._streams
        with redirect_stdout(out), redirect_stderr(err):
            yield
