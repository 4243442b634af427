"""Parts of the tables: committed rows, a Markdown table, where its rows were measured, and formats of numbers."""

from __future__ import annotations

from pathlib import Path

from fastebm.bench.rows import RESULTS, read

ROOT = Path(__file__).parent.parent


def committed(name: str) -> list[dict[str, str]]:
    """The rows of a file that is always there."""
    return read(RESULTS / name)


def rows_of(name: str) -> list[dict[str, str]]:
    """The rows of a file, none if it is not there."""
    return committed(name) if (RESULTS / name).exists() else []


def none_yet(command: str) -> str:
    """The text in place of a table without rows."""
    return f"No rows are committed yet: `python bench/{command} --out bench/results` makes them."


def table_of(header: list[str], body: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(rows: list[dict[str, str]], name: str, digits: int) -> str:
    """The range of a column, or one number if both ends round to it."""
    low, high = (f"{f(float(row[name]) for row in rows):.{digits}f}" for f in (min, max))
    return low if low == high else f"{low} to {high}"


def source_of(rows: list[dict[str, str]], command: str, name: str) -> str:
    """The sentence below a table: how, where and when its rows were measured."""
    first = rows[0]
    runs = "; ".join(dict.fromkeys(f"{row['date']}, commit {row['commit']}" for row in rows))
    machine = f"{first['cores']} cores of {first['cpu']}"
    return f"Measured by `{command}` on {machine}, torch {first['torch']}, {runs} (`bench/results/{name}`)."


def threads_of(row: dict[str, str]) -> str:
    return f"{row['threads']} threads of {row['cpu']}"


def versions(row: dict[str, str], *more: str) -> str:
    """Versions of torch, of ``more``, and of the peers that were installed."""
    names = ("torch", *more, "jax", "torchebm", "ebmkit", "blackjax")
    return ", ".join(f"{name} {row[name]}" for name in names if row.get(name) not in (None, "", "absent"))


def not_timed(rows: list[dict[str, str]]) -> str:
    """A list of the contestants without a time, by reason."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons.setdefault((row["contestant"], row["status"], row["note"]), []).append(row["case"])
    lines = [f"- {who}, {status} in {', '.join(cases)}: {note}" for (who, status, note), cases in reasons.items()]
    return "\n\nNot timed:\n\n" + "\n".join(lines) if lines else ""


def chains_of(row: dict[str, str]) -> str:
    return f"{int(row['n_chains']):,}"


def number(text: str) -> str:
    return f"{float(text):.3g}"


def milliseconds(text: str) -> str:
    return f"{1e3 * float(text):.3g}"


def ratio(text: str) -> str:
    return f"{float(text):.2f}" if text else ""


def percent(text: str) -> str:
    return f"{100 * float(text):.0f} %"
