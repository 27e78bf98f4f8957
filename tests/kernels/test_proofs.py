"""The four proofs of every operation; a new one is found by its ``spec.py`` and needs no line here.

Triton decides between compiler and interpreter when it is imported, for the whole process. The tests therefore leave it
the compiler, as users have it, and run the interpreter in one child process a session with ``TRITON_INTERPRET=1``.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import bfloat16_canary
import pytest
import torch
from compress.kernels import aot, native, triton_support
from compress.kernels.proofs import Case, OpSpec, error, same_bits, specs, triton_error, triton_repeats

needs_triton = pytest.mark.skipif(not triton_support.AVAILABLE, reason="Triton has no wheel for this platform")


def _cases(with_triton: bool = False, one_dtype: bool = False, little_bfloat16: bool = False) -> list[object]:
    """Operations, cases and dtypes; with ``little_bfloat16`` only an operation's first case is in bfloat16, too."""
    return [
        pytest.param(op, case, dtype, id=f"{op.name}-{case.name}-{str(dtype).removeprefix('torch.')}")
        for op in specs()
        for number, case in enumerate(op.cases)
        for dtype in case.dtypes[: 1 if one_dtype else None]
        if op.triton is not None or not with_triton
        if not (little_bfloat16 and number and dtype == torch.bfloat16)
    ]


@pytest.fixture(scope="session")
def compiled(pytestconfig: pytest.Config) -> Callable[[str, str, str], aot.Row]:
    """Compiled once, then kept by Triton under a hash of source, options and its own version."""
    cache = Path(pytestconfig.cache.mkdir("triton"))
    return lambda op, configuration, target: aot.row(op, configuration, target, cache)


@pytest.mark.reference
@pytest.mark.parametrize(("op", "case", "dtype"), _cases())
def test_reference(op: OpSpec, case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    exact = op.exact(*arguments)
    assert error(op.reference(*arguments), exact) <= op.tolerances[dtype]
    assert error(op.public(*arguments), exact) <= op.tolerances[dtype]
    for library in native.runnable() if op.cpu else ():
        assert error(op.cpu(library.name, *arguments), exact) <= op.tolerances[dtype], library.name


@needs_triton
@pytest.mark.interpreter
@pytest.mark.parametrize(("op", "case", "dtype"), _cases(with_triton=True, little_bfloat16=True))
def test_interpreter(op: OpSpec, case: Case, dtype: torch.dtype, interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(triton_error, op.name, case.name, dtype).result() <= op.tolerances[dtype]


@needs_triton
@pytest.mark.interpreter
def test_interpreter_is_still_wrong_in_bfloat16(interpreter: ProcessPoolExecutor) -> None:
    """triton-lang/triton#11584. If this fails, the interpreter has changed: let `compute_type` keep bfloat16 in it."""
    found = interpreter.submit(bfloat16_canary.errors).result()
    assert found["dot"] > 1
    assert found["dot of upcast operands"] < 1e-6
    assert found["copy"] == 0


@needs_triton
@pytest.mark.aot
@pytest.mark.parametrize("place", aot.matrix(), ids="-".join)
def test_ahead_of_time(place: tuple[str, str, str], compiled: Callable[[str, str, str], aot.Row]) -> None:
    row = compiled(*place)
    assert not row.problems, row


@pytest.mark.determinism
@pytest.mark.parametrize(("op", "case", "dtype"), _cases())
def test_same_bits(op: OpSpec, case: Case, dtype: torch.dtype) -> None:
    arguments = case.arguments(dtype)
    assert same_bits(op.public(*arguments), op.public(*arguments))


@needs_triton
@pytest.mark.determinism
@pytest.mark.parametrize(("op", "case", "dtype"), _cases(with_triton=True, one_dtype=True))
def test_same_bits_of_triton(op: OpSpec, case: Case, dtype: torch.dtype, interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(triton_repeats, op.name, case.name, dtype).result()
