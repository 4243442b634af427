"""Tables of GPUs: what kernels compile to, their precision, and what a visit to a GPU measured."""

from __future__ import annotations

from fastebm.bench.markdown import chains_of, committed, milliseconds, rows_of, table_of, versions

# -- without a GPU -----------------------------------------------------------------------------------------------


def resources() -> str:
    rows = committed("resources.csv")
    cases = [(row["architecture"], row["case"], row["precision"]) for row in rows]
    # sorted so that both versions of triton stand next to each other
    rows.sort(key=lambda row: (cases.index((row["architecture"], row["case"], row["precision"])), row["triton"]))
    body = []
    for row in rows:
        if row["refused"]:
            continue
        rates = [f"{float(row[name]) / 1e9:.2f}" for name in ("issue_bound", "roofline")]
        body.append(
            [
                f"{row['architecture']}, {row['machine']}",
                row["case"],
                row["precision"],
                row["triton"],
                f"{row['regime']}, {row['block_chains']} x {row['block_dim']}, {row['warps']} warps",
                row["registers"],
                f"{int(row['shared_bytes']) // 1024} of {int(row['shared_limit']) // 1024}",
                f"{row['spill_loads']} + {row['spill_stores']}",
                f"{float(row['warp_instructions_per_chain_step']):.0f}",
                *rates,
                row["binds"],
            ]
        )
    table = table_of(
        [
            "GPU",
            "energy",
            "precision",
            "triton",
            "tile (chains x dims)",
            "registers",
            "shared KiB",
            "spills (loads + stores)",
            "instructions per chain-step",
            "issue bound",
            "roofline",
            "binds",
        ],
        body,
    )
    refused: dict[str, dict[str, dict[str, None]]] = {}  # the inner keys are the precisions, each once
    for row in rows:
        if row["refused"] and not row["case"].startswith("evaluate"):  # it has the launch of the fused kernel
            refused.setdefault(row["architecture"], {}).setdefault(row["case"], {})[row["precision"]] = None
    lines = "\n".join(
        f"- {architecture}: " + "; ".join(f"{case} at {', '.join(precisions)}" for case, precisions in cases.items())
        for architecture, cases in refused.items()
    )
    runs = dict.fromkeys(f"triton {row['triton']}, {row['date']}, commit {row['commit']}" for row in rows)
    return (
        f"{table}\n\nRefused, because a block has too little shared memory (there PyTorch computes the gradient, and "
        "one kernel does noise, update and clamp):"
        f"\n\n{lines}\n\nCompiled by {'; '.join(runs)} "
        "(`bench/results/resources.csv`, which has more columns and the reason for each refusal). Rates are in "
        "1e9 chain-steps/s, computed and not measured."
    )


def precision() -> str:
    rows = committed("precision.csv")
    first = rows[0]
    names = ("kernel_error", "plain_error", "plain_error_on_gpu")
    where = "on a GPU" if first["device"] == "cuda" else "in the interpreter"
    table = table_of(
        [
            "energy",
            "precision",
            f"kernel, {where}",
            "plain PyTorch, the same roundings",
            "plain PyTorch, tensor cores' roundings",
        ],
        [[row["case"].replace(" ", ""), row["precision"], *(row[name] for name in names)] for row in rows],
    )
    return (
        f"{table}\n\nRoot-mean-square error of the gradient against float64, relative, by `python bench/precision.py`: "
        f"torch {first['torch']}, triton {first['triton']}, {first['date']}, commit {first['commit']} "
        "(`bench/results/precision.csv`)."
    )


# -- a visit to a GPU --------------------------------------------------------------------------------------------

_NO_VISIT = (
    "No rows are committed yet: `bash bench/on_gpu.sh` and `python bench/gpu.py rows runs/gpu --out bench/results` "
    "make them."
)


def _visited(what: str, name: str = "gpu.csv") -> list[dict[str, str]]:
    return [row for row in rows_of(name) if row["what"] == what]


def _of_visit(rows: list[dict[str, str]], name: str = "gpu.csv") -> str:
    first = rows[0]
    runs = "; ".join(dict.fromkeys(f"{row['date']}, commit {row['commit']}" for row in rows))
    return (
        f"Measured by `bash bench/on_gpu.sh` on one {first['gpu']} (driver {first['driver']}, {first['cores']} cores "
        f"of {first['cpu']}), {versions(first, 'triton')}, {runs} (`bench/results/{name}`)."
    )


def rate(text: str) -> str:
    return f"{float(text) / 1e9:.3g}"


def gpu() -> str:
    """For the README: whole calls and captured ones, compared with the eager loop and the fastest peer."""
    rows = [row for row in _visited("timings") if row["status"] == "ok"]
    if not rows:
        return _NO_VISIT
    cases = list(dict.fromkeys((row["energy"], row["n_chains"]) for row in rows))
    body = []
    for energy, n_chains in cases:
        of_case = {
            (row["contestant"], row["precision"]): row
            for row in rows
            if (row["energy"], row["n_chains"]) == (energy, n_chains)
        }
        for precision in ("bf16x3", "bf16"):
            call, graph = (of_case.get((name, precision)) for name in ("fastebm-triton", "fastebm-graph"))
            if call is None or not call["times_peer"]:
                continue
            chain_steps = float(call["n_chains"]) * float(call["steps"])
            peer = f"{call['peer']}, {rate(str(chain_steps / float(call['peer_seconds'])))}"
            times = [f"{float(row['times_peer']):.1f}" if row else "" for row in (call, graph)]
            body.append(
                [energy.replace(" ", ""), f"{int(n_chains):,}", precision, rate(call["chain_steps_per_s"])]
                + [f"{float(call['times_eager']):.1f}", peer, *times]
            )
    headings = [
        "energy",
        "chains",
        "precision",
        "1e9 chain-steps/s",
        "times eager",
        "fastest peer, 1e9/s",
        "times the peer",
    ]
    return (
        f"{table_of([*headings, 'captured, times the peer'], body)}\n\nWhole calls of `langevin_sample`; *captured*: "
        "replayed from a CUDA graph. The peer is the fastest whose products are at least as exact: bf16x3 is compared "
        f"with float32 only. {_of_visit(rows)}"
    )


def gpu_kernels() -> str:
    """The shipped kernels: their errors, registers, and times without the rest of the call."""
    checked, alone = _visited("shipped"), [row for row in _visited("alone") if row["status"] == "ok"]
    if not checked or not alone:
        return _NO_VISIT
    body = []
    for row in alone:
        on_gpu, call = (1e3 * float(row[k]) for k in ("kernel_seconds", "call_seconds"))
        seconds = [f"{ms:.3g}" for ms in (on_gpu, call, call - on_gpu)]
        body.append(
            [
                row["kernel"].replace(", ", ","),
                chains_of(row),
                row["steps"],
                rate(row["kernel_chain_steps_per_s"]) if row["kernel_chain_steps_per_s"] else "",
                *seconds,
            ]
        )
    headings = ["energy and precision", "chains", "steps", "1e9 chain-steps/s in the kernel"]
    times = table_of([*headings, "kernel, ms", "whole call, ms", "of it beside the kernel, ms"], body)
    body = [
        [row["kernel"].replace(", ", ","), chains_of(row), row["path"], row["registers"], row["spills"]]
        + [
            f"{float(row['error']) / float(row['allowed']):.2f}",
            f"{float(row['noisy_error']) / float(row['noisy_allowed']):.2f}",
        ]
        + [row["same_bits"], row["status"]]
        for row in checked
    ]
    headings = ["energy and precision", "chains", "path", "registers", "words spilled", "error, of the allowed"]
    errors = table_of([*headings, "three steps with noise", "same bits twice", "status"], body)
    return f"{times}\n\n{errors}\n\n{_of_visit(checked)}"


def gpu_race() -> str:
    rows = [row for row in _visited("timings") if row["status"] in ("ok", "FAILED")]
    if not rows:
        return _NO_VISIT
    body = [
        [row["energy"].replace(" ", ""), chains_of(row), row["steps"], f"{row['contestant']} {row['precision']}"]
        + [milliseconds(row["seconds"] or row["untrusted_seconds"]) + ("" if row["seconds"] else " (FAILED)")]
        + [f"{float(row[k]):.2f}" if row[k] else "" for k in ("times_eager", "times_peer")]
        for row in rows
    ]
    headings = ["energy", "chains", "steps", "contestant", "ms", "times eager", "times the fastest peer"]
    return f"{table_of(headings, body)}\n\n{_of_visit(rows)}"


def gpu_sweep() -> str:
    """For each case the shipped launch configuration and the fastest others."""
    rows = [row for row in _visited("sweep", "gpu_sweep.csv") if row["status"] == "ok"]
    if not rows:
        return _NO_VISIT
    body = []
    for case in dict.fromkeys((row["energy"], row["precision"]) for row in rows):
        timed = [row for row in rows if (row["energy"], row["precision"]) == case]
        timed.sort(key=lambda row: -float(row["times_shipped"]))
        shown = [row for i, row in enumerate(timed) if i < 4 or row["shipped"] == "yes"]
        for row in shown:
            launch = f"{row['regime']}, {row['block_chains']} x {row['block_dim']}, {row['num_warps']} warps"
            launch += f", {row['num_stages']} stages" if row["num_stages"] != "1" else ""
            launch += ", in memory" if row["in_memory"] == "True" else ""
            launch += " (shipped)" if row["shipped"] == "yes" else ""
            body.append(
                [
                    case[0].replace(" ", ""),
                    case[1],
                    launch,
                    rate(row["chain_steps_per_s"]),
                    f"{float(row['times_shipped']):.2f}",
                ]
            )
        body[-1][2] += f"; {len(timed)} tried"
    headings = ["energy", "precision", "launch (chains x dims)", "1e9 chain-steps/s", "times the shipped"]
    return f"{table_of(headings, body)}\n\n{int(rows[0]['n_chains']):,} chains. {_of_visit(rows, 'gpu_sweep.csv')}"
