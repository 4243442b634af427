"""Training objectives, one file each. This is their registry: what is imported here is public."""

from .base import Loss as Loss
from .base import Objective as Objective
from .contrastive_divergence import ContrastiveDivergence as ContrastiveDivergence
from .contrastive_divergence import contrastive_divergence_loss as contrastive_divergence_loss
from .denoising import DenoisingScoreMatching as DenoisingScoreMatching
from .denoising import MultiLevelDenoisingScoreMatching as MultiLevelDenoisingScoreMatching
from .denoising import VariancePreservingScoreMatching as VariancePreservingScoreMatching
from .energy_discrepancy import EnergyDiscrepancy as EnergyDiscrepancy
from .score_matching import ExactScoreMatching as ExactScoreMatching
from .score_matching import SlicedScoreMatching as SlicedScoreMatching

__all__ = sorted(name for name, value in globals().items() if callable(value))
