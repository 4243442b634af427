"""Training objectives, one small file each."""

from .contrastive_divergence import contrastive_divergence_loss

__all__ = ["contrastive_divergence_loss"]
