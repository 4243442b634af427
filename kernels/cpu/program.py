"""Kernels that call other kernels, or BLAS, without Python in between: threads would wait for the GIL at every call.

Written in LLVM IR, which compiles within milliseconds; Numba takes 100 ms for the same. Like every kernel, each takes
the address of a block of 64-bit values, named by ``ARGUMENTS``. A list of calls is an array of pairs of addresses: a
kernel's, and its block's.
"""

__all__ = ["ARGUMENTS", "SOURCE"]

ARGUMENTS = {
    # For each step from first to last - 1: set t[0] to it, then make all calls in ``even`` or ``odd``.
    "run": {"even": "i64s", "odd": "i64s", "n_calls": "int", "t": "i64s", "first": "int", "last": "int"},
    # Make every call once, on as many threads as run this: each takes the next call until none is left.
    # taken: (1,), 0.
    "share": {"calls": "i64s", "n_calls": "int", "taken": "i64s"},
    # out = scale a w + kept out by BLAS' sgemm, whose address is ``function``. BLAS is column-major, so it computes
    # out^T = w^T a^T. It takes pointers to its numbers (Fortran's convention), here to the block's own values, of which
    # most builds read the low 32 bits. letters: 'N' or 'T' for w, and 'N' for a.
    "gemm": {
        "function": "int", "w": "int", "a": "int", "out": "int", "letters": "int", "n_out": "int", "n": "int",
        "n_in": "int", "scale": "float", "w_stride": "int", "a_stride": "int", "kept": "float", "out_stride": "int",
    },
}  # fmt: skip


def _loads(name: str) -> str:
    """LLVM IR that loads a block's values as %names."""
    lines = []
    for i, (value, kind) in enumerate(ARGUMENTS[name].items()):
        lines += [f"  %at_{value} = getelementptr i64, ptr %block, i64 {i}"]
        lines += [f"  %{value} = load {'ptr' if kind == 'i64s' else 'i64'}, ptr %at_{value}"]
    return "\n".join(lines)


SOURCE = f"""
define internal void @make(ptr %calls, i64 %i) alwaysinline {{
  %first = shl i64 %i, 1
  %second = or i64 %first, 1
  %at_kernel = getelementptr ptr, ptr %calls, i64 %first
  %at_block = getelementptr ptr, ptr %calls, i64 %second
  %kernel = load ptr, ptr %at_kernel
  %block = load ptr, ptr %at_block
  call void %kernel(ptr %block)
  ret void
}}

define void @run(ptr %block) {{
start:
{_loads("run")}
  br label %steps
steps:
  %step = phi i64 [ %first, %start ], [ %next_step, %stepped ]
  %left = icmp slt i64 %step, %last
  br i1 %left, label %begin, label %end
begin:
  store i64 %step, ptr %t
  %is_odd = trunc i64 %step to i1
  %calls = select i1 %is_odd, ptr %odd, ptr %even
  br label %each
each:
  %i = phi i64 [ 0, %begin ], [ %next, %made ]
  %more = icmp slt i64 %i, %n_calls
  br i1 %more, label %made, label %stepped
made:
  call void @make(ptr %calls, i64 %i)
  %next = add i64 %i, 1
  br label %each
stepped:
  %next_step = add i64 %step, 1
  br label %steps
end:
  ret void
}}

define void @share(ptr %block) {{
start:
{_loads("share")}
  br label %each
each:
  %i = atomicrmw add ptr %taken, i64 1 monotonic
  %more = icmp slt i64 %i, %n_calls
  br i1 %more, label %made, label %end
made:
  call void @make(ptr %calls, i64 %i)
  br label %each
end:
  ret void
}}

define void @gemm(ptr %block) {{
{_loads("gemm")}
  %sgemm = inttoptr i64 %function to ptr
  %to_w = inttoptr i64 %w to ptr
  %to_a = inttoptr i64 %a to ptr
  %to_out = inttoptr i64 %out to ptr
  %at_second = getelementptr i8, ptr %at_letters, i64 1
  call void %sgemm(ptr %at_letters, ptr %at_second, ptr %at_n_out, ptr %at_n, ptr %at_n_in, ptr %at_scale, ptr %to_w,
                   ptr %at_w_stride, ptr %to_a, ptr %at_a_stride, ptr %at_kept, ptr %to_out, ptr %at_out_stride)
  ret void
}}
"""
