"""Figures of a compiled kernel, read from its binary with the tools in Triton's wheel; no GPU is asked."""

import hashlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# `v_accvgpr_write_b32 a3, v7`, `v_accvgpr_read_b32 v7, a3`, `v_accvgpr_mov_b32 a3, a4`; a constant is no spilled value
_AMD_MOVE = r"^\s+v_accvgpr_(?:write|read|mov)_b32(?:_e\d+)?\s+[av]\S+,\s*[av]\S*"


@dataclass(frozen=True)
class Readout:
    """What one compiled kernel takes.

    Attributes:
        registers: 32-bit registers a thread.
        stack: bytes of stack a thread; spilled registers live there, on NVIDIA all of them.
        shared: bytes of shared memory a program.
        mma: tensor-core instructions, by their family: HMMA and IMMA, HGMMA and IGMMA (warp groups), MFMA (AMD).
        conversions: integer-to-float conversions.
        atomics: atomic operations on memory.
        spills: vector registers that AMD's compiler says it spilled, wherever to, and moves between vector and
            accumulation registers: it takes those as space to spill to before it takes the stack, and as plain copies
            it doesn't count them.
        scalar_spills: scalar registers that AMD's compiler keeps in lanes of vector registers.
    """

    registers: int
    stack: int
    shared: int
    mma: dict[str, int]
    conversions: int
    atomics: int
    spills: int = 0
    scalar_spills: int = 0


@cache
def version() -> str:
    """A hash of this file: figures that another version of it read may be wrong or lack some."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def read(kernel: Any) -> Readout:
    """The figures of a kernel that Triton compiled."""
    shared = int(kernel.metadata.shared)
    return _amd(kernel.asm["amdgcn"], shared) if "amdgcn" in kernel.asm else _nvidia(kernel.asm["cubin"], shared)


def _nvidia(cubin: bytes, shared: int) -> Readout:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _cuobjdump(file.name)
    # `REG:89 STACK:0 SHARED:0 ...`; instructions are `/*0a50*/   @!P0 HMMA.16816.F32 R4, R8, R12, R4 ;`
    figures = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", text)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", text, re.MULTILINE)
    return Readout(
        registers=figures["REG"],
        stack=figures["STACK"],
        shared=shared,
        mma=_counted(opcodes, ("HMMA", "IMMA", "HGMMA", "IGMMA")),
        conversions=sum(code in ("I2F", "I2FP") for code in opcodes),
        atomics=sum(code in ("ATOM", "ATOMG", "RED", "REDG") for code in opcodes),
    )


def _amd(text: str, shared: int) -> Readout:
    opcodes = re.findall(r"^\s+([a-z]\w+)", text, re.MULTILINE)
    return Readout(
        registers=_amd_figure(text, "vgpr_count"),
        stack=_amd_figure(text, "private_segment_fixed_size"),
        shared=shared,
        mma={"MFMA": count} if (count := sum(code.startswith("v_mfma_") for code in opcodes)) else {},
        conversions=sum(bool(re.match(r"v_cvt_(pk_)?f(16|32|64)_[iu]", code)) for code in opcodes),
        atomics=sum("_atomic_" in code for code in opcodes),
        spills=_amd_figure(text, "vgpr_spill_count") + len(re.findall(_AMD_MOVE, text, re.MULTILINE)),
        scalar_spills=_amd_figure(text, "sgpr_spill_count"),
    )


def _amd_figure(text: str, name: str) -> int:
    match = re.search(rf"^\s+\.{name}:\s+(\d+)", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"the assembler text of a kernel has no .{name}")
    return int(match[1])


def _counted(opcodes: list[str], families: tuple[str, ...]) -> dict[str, int]:
    counts = {family: opcodes.count(family) for family in families}
    return {family: count for family, count in counts.items() if count}


def _cuobjdump(path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-res-usage", "-sass", path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
