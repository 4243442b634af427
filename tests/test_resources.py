"""The committed table of resources (bench/results/resources.csv) against kernels compiled now, without a GPU."""

import sys
from collections import Counter
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parent.parent / "bench")
    import resources

linux = pytest.mark.skipif(sys.platform != "linux", reason="triton runs on Linux")


# --- reading machine code ---

STREAMING = """
        /*0000*/                   S2R R3, SR_TID.X ;                    /* 0x0000000000037919 */
                                                                         /* 0x000e620000002100 */
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/               @P0 BRA 0x10 ;
        /*0030*/              @!P0 BRA 0x1a0 ;
        /*0040*/                   MUFU.TANH R1, R2 ;
        /*0050*/                   BRA.DIV ~URZ, 0x1b0 ;
        /*0060*/              @!P1 BRA 0xb0 ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0080*/                   STL [R1+0x4], R4 ;
        /*0090*/               @P2 BRA 0x70 ;
        /*00a0*/                   BRA 0xd0 ;
        /*00b0*/                   FADD R1, R2, R3 ;
        /*00c0*/                   FADD R1, R2, R3 ;
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*00e0*/              @!P0 BRA 0xd0 ;
        /*00f0*/                   LDL R4, [R1+0x4] ;
        /*0100*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0110*/              @!P3 BRA 0x130 ;
        /*0120*/                   MUFU.SIN R1, R2 ;
        /*0130*/               @P1 STG.E desc[UR8][R4.64], R5 ;
        /*0140*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0150*/               @P6 BRA 0xf0 ;
        /*0160*/                   FADD R1, R2, R3 ;
        /*0170*/               @P0 BRA 0x40 ;
        /*0180*/                   STG.E desc[UR8][R4.64], R5 ;
        /*0190*/                   BRA 0x1a0 ;
        /*01a0*/                   EXIT ;
        /*01b0*/                   SHFL.BFLY PT, R1, R2, 0x1, 0x1f ;
        /*01c0*/                   SHFL.BFLY PT, R1, R2, 0x1, 0x1f ;
        /*01d0*/                   BRA 0x60 ;
        /*01e0*/                   BRA 0x1e0;
        /*01f0*/                   NOP;
"""


def test_the_step_of_a_streaming_kernel():
    """Prologue, rehearsal, the jump over it and the path of diverged warps do not count."""
    assert resources.executed(resources.parse(STREAMING), chunks=10) == Counter(
        {
            "MUFU.TANH": 1,
            "BRA.DIV": 1,
            "BRA": 1 + 1 + 10 + 10 + 1,
            "FADD": 3,
            "SYNCS.PHASECHK.TRANS64.TRYWAIT": 1,
            "LDL": 10,
            "HMMA.16816.F32.BF16": 20,
            "MUFU.SIN": 10,
            "STG.E": 10,
        }
    )


def test_the_step_of_a_resident_kernel():
    resident = """
        /*0000*/              @!P5 BRA 0x50 ;
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, R24, gdesc[UR8], !UPT ;
        /*0020*/              @!P0 MUFU.EX2 R1, R2 ;
        /*0030*/               @P5 CALL.REL.NOINC 0x50 ;
        /*0040*/                   BRA 0x10 ;
        /*0050*/                   MUFU.EX2 R1, R2 ;
        /*0060*/                   EXIT ;
"""
    names = resources.executed(resources.parse(resident), chunks=1)
    assert names == Counter({"HGMMA.64x128x16.F32.BF16": 1, "MUFU.EX2": 1, "CALL.REL.NOINC": 1, "BRA": 1})
    assert resources.tensor_flops(names) == 2 * 64 * 128 * 16 / 4


def test_the_step_of_a_kernel_with_whole_states():
    """Loops over chunks beside the leapfrog steps, and within one of them."""
    reduced = """
        /*0000*/                   FADD R1, R2, R3 ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/               @P0 BRA 0x10 ;
        /*0030*/                   MUFU.EX2 R1, R2 ;
        /*0040*/               @P1 BRA 0x70 ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0060*/               @P2 BRA 0x50 ;
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0080*/              @!P0 BRA 0x70 ;
        /*0090*/                   HGMMA.64x128x16.F32.BF16 R24, R24, gdesc[UR8], !UPT ;
        /*00a0*/               @P3 BRA 0x30 ;
        /*00b0*/                   LDG.E R4, desc[UR8][R4.64] ;
        /*00c0*/               @P4 BRA 0xb0 ;
        /*00d0*/                   STG.E desc[UR8][R4.64], R5 ;
        /*00e0*/               @P5 BRA 0x0 ;
        /*00f0*/                   EXIT ;
"""
    names = resources.executed(resources.parse(reduced), chunks=10, whole=25)
    assert names.pop("BRA") == 25 + 10 + 25 + 10 + 10 + 25 + 1
    assert names == Counter(
        {
            "HMMA.16816.F32.BF16": 25 + 25,
            "FADD": 1,
            "MUFU.EX2": 10,
            "SYNCS.PHASECHK.TRANS64.TRYWAIT": 10,
            "HGMMA.64x128x16.F32.BF16": 10,
            "LDG.E": 25,
            "STG.E": 1,
        }
    )


def test_a_whole_kernel():
    """Without steps: what runs before a loop over chunks counts too, and so does such a loop without stores."""
    kernel = """
        /*0000*/                   FADD R1, R2, R3 ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/               @P0 BRA 0x10 ;
        /*0030*/               @P1 BRA 0x50 ;
        /*0040*/                   MUFU.EX2 R1, R2 ;
        /*0050*/                   STG.E desc[UR8][R4.64], R5 ;
        /*0060*/                   EXIT ;
        /*0070*/                   BRA 0x70 ;
"""
    names = resources.executed(resources.parse(kernel), chunks=10, steps=False)
    assert names == Counter({"FADD": 1, "HMMA.16816.F32.BF16": 10, "BRA": 11, "MUFU.EX2": 1, "STG.E": 1, "EXIT": 1})


def test_code_that_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="can't follow"):
        resources.executed(resources.parse("  /*0000*/   BRX R2 -0x10 ;\n  /*0010*/   EXIT ;\n"), 1)
    calls = "  /*0000*/   CALL.REL.NOINC 0x30 ;\n  /*0010*/   @P0 BRA 0x0 ;\n  /*0020*/   EXIT ;\n"
    with pytest.raises(ValueError, match="a function is called"):
        resources.executed(resources.parse(calls + "  /*0030*/   RET.REL R4 0x0 ;\n"), 1)
    with pytest.raises(ValueError, match="no loop"):
        resources.executed(resources.parse("  /*0000*/   EXIT ;\n"), 1)
    with pytest.raises(ValueError, match="one function"):
        resources.parse("  /*0000*/   EXIT ;\n  /*0000*/   EXIT ;\n")


# --- the table ---

CASES = {resources.key(case): case for case in resources.all_cases()}
QUICK = [
    ("sm_80", "64-[128,128]", "bf16"),
    ("sm_80", "64-[128,128]", "bf16x3"),
    ("sm_90", "2-[128,128]", "bf16"),
    ("sm_90", "64-[128,128]", "bf16"),
    ("sm_90", "64-[128,128]", "bf16x3"),
    ("sm_90", "evaluate 64-[128,128]", "bf16x3"),
    ("sm_90", "hmc 64-[128,128]", "bf16"),
]
SLOW = [key for key in CASES if key not in QUICK]


@pytest.fixture(scope="session")
def quick():
    return dict(zip(QUICK, resources.compile_rows([CASES[key] for key in QUICK]), strict=True))


@pytest.fixture(scope="session")
def slow():
    return dict(zip(SLOW, resources.compile_rows([CASES[key] for key in SLOW]), strict=True))


@pytest.fixture
def committed():
    """The committed rows. They say nothing about the code of another triton."""
    if resources.TRITON not in resources.MAY_SPILL:
        pytest.skip(f"rows are for triton {' and '.join(resources.MAY_SPILL)}, and this is {resources.TRITON}")
    return resources.read_committed()


def rows(keys):
    return pytest.mark.parametrize("key", keys, ids="-".join)


@linux
@rows(QUICK)
def test_fits_in_shared_memory(quick, key):
    assert not resources.over_limit(quick[key])


@linux
@rows(QUICK)
def test_spills_no_more_than_it_may_in_the_step_loop(quick, committed, key):
    assert not resources.spills(quick[key])


@linux
@rows(QUICK)
def test_takes_no_more_instructions_than_committed(quick, committed, key):
    assert not resources.worse(quick[key], committed.get(key))


@linux
@pytest.mark.slow
def test_what_a_normal_costs(quick, committed):
    """A step against one without noise: 16 instructions per normal, plus the keys of ten rounds per thread's 32."""
    keys, column = [key for key in QUICK if key[:2] == ("sm_90", "64-[128,128]")], "warp_instructions_per_chain_step"
    silent = resources.compile_rows([{**CASES[key], "silent": True} for key in keys])
    for key, without in zip(keys, silent, strict=True):
        cost = 32 / 64 * (float(quick[key][column]) - float(without[column]))  # per thread and dim
        assert 10 < cost <= 16 + 20 / 32


@linux
@pytest.mark.slow
@rows(SLOW)
def test_the_rest_fits_in_shared_memory(slow, key):
    assert not resources.over_limit(slow[key])


@linux
@pytest.mark.slow
@rows(SLOW)
def test_the_rest_spills_no_more_than_it_may_in_the_step_loop(slow, committed, key):
    assert not resources.spills(slow[key])


@linux
@pytest.mark.slow
@rows(SLOW)
def test_the_rest_takes_no_more_instructions_than_committed(slow, committed, key):
    assert not resources.worse(slow[key], committed.get(key))


def test_every_row_is_committed_and_nothing_else(committed):
    assert list(committed) == list(CASES)


def test_each_way_to_fall_behind_is_found():
    good = {
        "architecture": "sm_90",
        "case": "64-[128,128]",
        "precision": "bf16",
        "refused": "",
        "shared_bytes": 10,
        "shared_limit": 20,
        "spill_loads": 0,
        "spill_stores": 0,
        "warp_instructions_per_chain_step": "100.00",
    }
    refused = {**good, "refused": "needs too much shared memory"}
    slower = {**good, "warp_instructions_per_chain_step": "103.01"}
    spilling = {**good, "spill_stores": 17}
    for row in (good, refused):
        assert [resources.over_limit(row), resources.worse(row, row)] == [None] * 2
        assert [resources.spills(row, triton) for triton in resources.MAY_SPILL] == [None] * 2
    assert resources.over_limit({**good, "shared_bytes": 21})
    for triton in resources.MAY_SPILL:
        assert resources.spills(spilling, triton)
        assert not resources.spills({**spilling, "architecture": "sm_86"}, triton)
    few = {**good, "spill_stores": 1}
    assert resources.spills(few, "3.9.0")
    assert not resources.spills(few, "3.6.0")
    evaluation = {**few, "case": "evaluate 64-[128,128]"}
    assert resources.spills(evaluation, "3.6.0")
    assert not resources.spills({**evaluation, "precision": "bf16x3"}, "3.9.0")
    for case in ("hmc 64-[128,128]", "reduced hmc 784-[128,128]"):
        of_hmc = {**few, "case": case}
        assert resources.spills(of_hmc, "3.6.0")
        assert not resources.spills({**of_hmc, "precision": "bf16x3"}, "3.9.0")
    some = {**good, "precision": "bf16x3", "spill_loads": 60, "spill_stores": 40}
    assert not resources.spills(some, "3.6.0")
    assert resources.spills({**some, "spill_loads": 61}, "3.6.0")
    assert resources.spills(some, "3.9.0")
    assert resources.worse(slower, good)
    assert not resources.worse(good, slower)
    assert resources.worse(refused, good)
    assert resources.worse(good, refused)
    assert resources.worse(good, None)


def test_a_triton_without_rows_is_reported(monkeypatch):
    monkeypatch.setattr(resources, "TRITON", "0.0.0")
    (words,) = resources.problems([])
    assert "no rows of triton 0.0.0" in words


def test_a_run_keeps_the_rows_of_other_versions_and_a_check_writes_nothing(tmp_path, monkeypatch, capsys):
    before = resources.COMMITTED.read_bytes()
    file = tmp_path / "resources.csv"
    file.write_text("triton,case\n0.0.0,another\n")
    monkeypatch.setattr(resources, "compile_rows", lambda cases: [{"case": "mine"}])
    assert resources.main(["--out", str(tmp_path)]) == 0
    assert [(row["triton"], row["case"]) for row in resources.read(file)] == [
        ("0.0.0", "another"), (resources.TRITON, "mine"),
    ]  # fmt: skip

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(resources, "problems", lambda rows: ["slower"])
    assert resources.main(["--check"]) == 1
    assert capsys.readouterr().out == "slower\n"
    assert list(tmp_path.iterdir()) == [file]
    assert resources.COMMITTED.read_bytes() == before


def test_the_committed_rows_are_within_the_rules():
    """Of both versions of triton, whichever is installed."""
    found = [row for row in resources.read(resources.COMMITTED) if resources.spills(row, row["triton"])]
    assert not found
    assert {row["triton"] for row in resources.read(resources.COMMITTED)} == set(resources.MAY_SPILL)
