"""Training objectives, one file each."""

from .base import Loss, Objective
from .contrastive_divergence import ContrastiveDivergence, contrastive_divergence_loss

__all__ = ["ContrastiveDivergence", "Loss", "Objective", "contrastive_divergence_loss"]
