"""What the four proofs stand on: the readout and its limits, the choice of a path, the launches."""

import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compress.kernels import aot, dispatch, native, proofs, triton_support
from compress.kernels.aot import Readout, problems, verify
from compress.kernels.proofs import Compiled, Limits
from compress.kernels.triton_support import Launch, jit, tl

needs_triton = pytest.mark.skipif(not triton_support.AVAILABLE, reason="Triton has no wheel for this platform")
GOOD = Readout(registers=100, stack=0, shared=1000, mma={"HGMMA": 4}, conversions=0, atomics=0)


@jit
def _careless(codes, y, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """All that a kernel of the house must not do, but for spilling."""
    i = tl.arange(0, COUNT)
    tl.atomic_add(y + i // 2, tl.load(codes + i).to(tl.float32))


def _launch() -> Launch:
    codes = torch.empty(256, dtype=torch.int32, device="meta")
    y = torch.empty(128, device="meta")
    return Launch(_careless, (1,), {"codes": codes, "y": y}, {"COUNT": 256})


@pytest.mark.parametrize(
    ("readout", "limits", "to", "problem"),
    [
        (GOOD, Limits(), "sm_90", None),
        (replace(GOOD, stack=8), Limits(), "sm_90", "spills: 8 bytes"),
        (replace(GOOD, spills=2), Limits(), "gfx942", "spills: 2 vector registers or moves"),
        (replace(GOOD, scalar_spills=129), Limits(), "gfx942", "spills: 129 scalar registers, at most 128"),
        (replace(GOOD, scalar_spills=128), Limits(), "gfx942", None),
        (replace(GOOD, atomics=1), Limits(), "sm_90", "1 atomic"),
        (GOOD, Limits(registers=99), "sm_80", "100 registers, at most 99"),
        (GOOD, Limits(registers=99), "gfx942", None),
        (GOOD, Limits(shared=999), "sm_90", "1000 bytes of shared memory, at most 999"),
        (replace(GOOD, shared=70000), Limits(), "gfx942", "70000 bytes of shared memory, at most 65536"),
        (replace(GOOD, shared=70000), Limits(), "sm_80", None),
        (replace(GOOD, mma={}), Limits(), "sm_90", "no tensor-core"),
        (replace(GOOD, mma={}), Limits(mma=False), "sm_90", None),
        (replace(GOOD, mma={"HMMA": 4}), Limits(wgmma=True), "sm_90", "no warp-group"),
        (replace(GOOD, mma={"HMMA": 4}), Limits(wgmma=True), "sm_80", None),
        (replace(GOOD, conversions=3), Limits(conversions=2), "sm_90", "3 integer-to-float conversions, at most 2"),
        (replace(GOOD, conversions=3), Limits(), "sm_90", None),
    ],
)
def test_limits(readout: Readout, limits: Limits, to: str, problem: str | None):
    found = problems(readout, limits, aot.target(to))
    assert found == () if problem is None else len(found) == 1 and problem in found[0]


@pytest.mark.parametrize(
    ("line", "count", "problem"),
    [
        ("v_mfma_f32_32x32x8_f16 a[0:15], v[0:1], v[2:3], a[0:15]", 0, None),
        ("v_accvgpr_write_b32 a0, 0", 0, None),
        ("v_accvgpr_write_b32 a255, v17", 0, "spills: 1 vector registers or moves"),
        ("v_accvgpr_read_b32 v17, a255 ;  Reload Reuse", 0, "spills: 1 vector registers or moves"),
        ("v_accvgpr_mov_b32 a3, a4", 0, "spills: 1 vector registers or moves"),
        ("v_add_u32_e32 v1, v2, v3", 7, "spills: 7 vector registers or moves"),
    ],
)
def test_spills_on_amd_are_seen_wherever_they_go(line: str, count: int, problem: str | None):
    text = f"""
kernel:
        {line}
        s_endpgm
amdhsa.kernels:
  - .agpr_count:     4
    .private_segment_fixed_size: 0
    .sgpr_spill_count: 3
    .vgpr_count:     260
    .vgpr_spill_count: {count}
"""
    found = aot.read(SimpleNamespace(asm={"amdgcn": text}, metadata=SimpleNamespace(shared=0)))
    assert found.scalar_spills == 3
    broken = problems(found, Limits(mma=False), aot.target("gfx942"))
    assert broken == () if problem is None else len(broken) == 1 and problem in broken[0]


@needs_triton
def test_another_reader_does_not_serve_what_this_one_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = Compiled("careless", _launch, Limits(mma=False))
    fresh = aot.check("op", made, aot.TARGETS[0], tmp_path)
    assert fresh.problems
    (kept,) = tmp_path.glob("*.json")
    kept.write_text(json.dumps(asdict(GOOD)))
    assert aot.check("op", made, aot.TARGETS[0], tmp_path).readout == GOOD  # it is served while the reader is the same
    monkeypatch.setattr(verify, "version", lambda: "another")
    assert aot.check("op", made, aot.TARGETS[0], tmp_path).readout == fresh.readout


@needs_triton
@pytest.mark.parametrize("to", aot.TARGETS, ids=lambda to: to.name)
def test_readout_sees_what_is_forbidden(to: aot.Target, tmp_path: Path):
    row = aot.check("op", Compiled("careless", _launch, Limits(conversions=0)), to, tmp_path)
    assert row.readout is not None
    assert row.readout.atomics > 0
    assert row.readout.conversions > 0
    assert row.readout.registers > 0
    assert len(row.problems) == 3  # and it has no tensor-core instructions
    again = aot.check("op", Compiled("careless", _launch, Limits(conversions=0)), to, tmp_path)
    assert again == replace(row, seconds=again.seconds)


@needs_triton
def test_a_kernel_that_does_not_compile_is_a_row(tmp_path: Path):
    wrong = replace(_launch(), constexprs={"COUNT": 3})  # not a power of two
    row = aot.check("op", Compiled("wrong", lambda: wrong, Limits()), aot.TARGETS[0], tmp_path)
    assert row.readout is None
    assert "doesn't compile" in row.problems[0]


@needs_triton
def test_targets_do_not_share_binaries(tmp_path: Path):
    kernels = [aot.compiled(_launch(), to, tmp_path) for to in aot.TARGETS]
    assert [kernel.metadata.target.arch for kernel in kernels] == [80, 90, "gfx942"]


@needs_triton
def test_triton_without_a_gpu():
    launch = replace(_launch(), arguments={"codes": torch.zeros(256, dtype=torch.int32), "y": torch.zeros(128)})
    with pytest.raises(ValueError, match="need a GPU, but the tensors are on cpu"):
        launch.start()


def test_gpu_without_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_support, "AVAILABLE", False)
    with pytest.raises(ValueError, match="cuda:0 need it: pip install triton"):
        dispatch.pick(torch.device("cuda", 0))


@needs_triton
@pytest.mark.parametrize(("capability", "supported"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], supported: bool):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    device = torch.device("cuda", 50 + capability[0])  # its own number, because answers are kept
    if supported:
        assert dispatch.pick(device) == "triton"
    else:
        with pytest.raises(ValueError, match=r"compute capability 7\.5; the kernels need 8\.0"):
            dispatch.pick(device)


def test_paths_without_a_gpu(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    assert dispatch.pick(cpu) == "reference"
    assert dispatch.pick(torch.device("cuda", 0), has_triton=False) == "reference"
    assert dispatch.pick(torch.device("meta"), has_native=True) == "reference"
    monkeypatch.setattr(native, "library", lambda: None)
    assert dispatch.pick(cpu, has_native=True) == "reference"


@pytest.mark.skipif(native.built("portable") is None, reason="no C++ compiler was there")
def test_native_path():
    library = native.library()
    assert library is not None
    assert dispatch.pick(torch.device("cpu"), has_native=True) == f"native-{library.name}"


def test_error_of_results():
    exact = torch.tensor([1.0, -4.0, float("inf")])
    assert proofs.error(exact.half(), exact) == 0
    assert proofs.error(torch.tensor([1.0, -3.0, float("inf")]), exact) == 0.25
    assert proofs.error(torch.tensor([1.0, -4.0, float("nan")]), exact) == float("inf")
    assert proofs.error(torch.tensor([1.0, -4.0]), exact) == float("inf")
    assert proofs.error(torch.empty(0, 3), torch.empty(0, 3)) == 0


def test_same_bits():
    zero = torch.zeros(2)
    assert proofs.same_bits(zero, zero.clone())
    assert not proofs.same_bits(zero, -zero)


def test_every_operation_is_proved():
    """Every folder that is an operation has a spec; the two without a GPU kernel are named in docs/kernels.md."""
    folders = {path.parent.name for path in Path(proofs.__file__).parent.glob("*/__init__.py")}
    assert {op.name for op in proofs.specs()} == folders - {"aot", "native"}
    assert {op.name for op in proofs.specs() if op.triton is None} == {"block", "packing"}
    for op in proofs.specs():
        assert bool(op.configurations) == (op.triton is not None), op.name
        package = importlib.import_module(f"compress.kernels.{op.name}")
        assert callable(getattr(package, "path", None)) or op.name == "packing", op.name


def test_names_are_unique():
    for op in proofs.specs():
        assert len({case.name for case in op.cases}) == len(op.cases)
        assert len({made.name for made in op.configurations}) == len(op.configurations)
