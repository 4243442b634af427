"""``fastebm score``: find the rows of a file that are unlike the training data."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import evaluate
from ..data import inspection
from ..data.files import find, read, read_images
from ..data.table import Table
from ..train.atomic import write_atomically
from ..train.scoring import TrainedRun, load
from .options import check_writable, need
from .progress import Progress

_WORDS = """Compute the energies of rows in the units of the training data: the higher, the less likely. --out gets one
line per row, the least likely first: its number from 0, its energy, the percentage of training rows whose energy is no
higher (100: unlike all of them), and the number of its columns beyond the range of the training data."""

# The least likely rows are printed.
_N_SHOWN = 5


def add(commands: Any) -> None:
    command = commands.add_parser("score", help="find the anomalies in a file", description=_WORDS)
    command.set_defaults(run=_score)
    command.add_argument("source", type=Path, metavar="RUN", help="a run folder of fastebm train")
    command.add_argument(
        "file", type=Path, metavar="FILE",
        help="rows in the units of the training data: CSV, TSV, Parquet (columns are found by their names) or .npy; "
        "images: .npy with values in [0, 1]",
    )  # fmt: skip
    command.add_argument("--out", type=Path, default=None, metavar="FILE", help="a .csv file to write")
    command.add_argument(
        "--label", default=None, metavar="NAME=VALUE",
        help="a column of FILE and its value in ordinary rows: prints the AUROC against the other rows",
    )  # fmt: skip
    command.add_argument(
        "--header", action=argparse.BooleanOptionalAction, default=None,
        help="of text files: whether the first line holds names (default: detected)",
    )  # fmt: skip
    command.add_argument(
        "--check-units", action=argparse.BooleanOptionalAction, default=True,
        help="refuse rows that are in other units than the training data",
    )  # fmt: skip


def _score(arguments: argparse.Namespace) -> int:
    if arguments.out is not None:
        check_writable(arguments.out, (".csv",))
        if arguments.out.resolve() == arguments.file.resolve():
            raise ValueError(f"--out would write over the rows to score, {arguments.file}: name another file")
    need("safetensors", "pandas", "sklearn")
    if arguments.label is not None and "=" not in arguments.label:
        raise ValueError(f"--label takes NAME=VALUE, what ordinary rows hold, got {arguments.label!r}")
    with Progress() as progress:
        progress.show(f"reading {arguments.source}")
        run = load(arguments.source)
        progress.show(f"reading {arguments.file}")
        table = _table(run, arguments)
        for note in table.notes:
            progress.note(f"{arguments.file.name}: {note}")
        progress.show("scoring")
        energies = run.energy(table.x, check_units=arguments.check_units).numpy()
    order = np.argsort(-energies, kind="stable")
    percentiles, outside = run.percentile(energies), run.outside(table.x)
    if arguments.out is not None:
        write_atomically(arguments.out, _csv(table, energies, percentiles, outside, order))
    _print(arguments, table, energies, percentiles, order)
    return 0


def _table(run: TrainedRun, arguments: argparse.Namespace) -> Table:
    path = find(arguments.file)
    if run.data.kind == "images" and path.suffix.lower() == ".npy":
        return read_images(path, run.data.shape)
    names = run.data.columns or tuple(map(str, range(run.data.dim)))
    table = read(path, columns=names, header=arguments.header, label=arguments.label, by_position=True)
    return inspection.complete(path, table)


def _csv(
    table: Table, energies: NDArray[Any], percentiles: NDArray[Any], outside: NDArray[Any], order: NDArray[Any]
) -> bytes:
    import pandas as pd

    columns = {
        "row": table.numbers[order],
        "energy": [f"{e:.9g}" for e in energies[order]],  # float32 is read back exactly
        "percentile": [f"{p:.6g}" for p in percentiles[order]],
        "columns_outside": outside[order],
    }
    text: str = pd.DataFrame(columns).to_csv(index=False, lineterminator="\n")
    return text.encode()


def _print(
    arguments: argparse.Namespace, table: Table, energies: NDArray[Any], percentiles: NDArray[Any], order: NDArray[Any]
) -> None:
    where = "" if arguments.out is None else f"{arguments.out}: "
    print(f"{where}{len(energies):,} rows, of which {(percentiles >= 99).sum():,} are above 99 % of the training rows")
    if len(energies) >= 10 and (percentiles >= 99).mean() > 0.9:
        print("  nearly all of them: is a column in other units than in the training data?")
    for i in order[:_N_SHOWN]:
        print(
            f"  row {table.numbers[i]} ({table.place(int(i))}): energy {energies[i]:.4g}, above {percentiles[i]:.1f} %"
        )
    if arguments.label is not None and table.labels is not None:
        value = table.layout.value
        is_known = table.labels != ""
        ordinary = table.labels == value
        auroc = evaluate.auroc(energies[ordinary], energies[is_known & ~ordinary])
        print(f"  AUROC of the energy, {arguments.label} against the others: {auroc:.3f}")
