"""The options of a run that do not change what it samples."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ON_NONFINITE", "Settings"]

ON_NONFINITE = ("raise", "reinit", "ignore")


@dataclass(frozen=True)
class Settings:
    """The options of a run. ``fastebm.sample`` documents them.

    backend: "auto", "triton", "torch" or "reference".
    precision: of the fused kernel's products, or None.
    cuda_graph: record one step of several launches and replay it.
    on_nonfinite: "raise", "reinit" or "ignore".
    """

    backend: str = "auto"
    precision: str | None = None
    cuda_graph: bool = False
    on_nonfinite: str = "raise"

    def check(self) -> None:
        """Check on_nonfinite. ``choose`` (backends/choose.py) checks backend and precision.

        Raises:
            ValueError: an unknown on_nonfinite.
        """
        if self.on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite must be one of {', '.join(ON_NONFINITE)}, got {self.on_nonfinite!r}")
