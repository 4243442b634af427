"""Training objectives, one file each. This is their registry: what is imported here is public."""

from .augment import RandomAffine as RandomAffine
from .base import Loss as Loss
from .base import Objective as Objective
from .contrastive_divergence import ContrastiveDivergence as ContrastiveDivergence
from .contrastive_divergence import contrastive_divergence_loss as contrastive_divergence_loss
from .cooperative import CooperativeTraining as CooperativeTraining
from .denoising import DenoisingScoreMatching as DenoisingScoreMatching
from .denoising import MultiLevelDenoisingScoreMatching as MultiLevelDenoisingScoreMatching
from .denoising import VariancePreservingScoreMatching as VariancePreservingScoreMatching
from .diffusion_recovery import DiffusionRecoveryLikelihood as DiffusionRecoveryLikelihood
from .energy_discrepancy import EnergyDiscrepancy as EnergyDiscrepancy
from .flow import CouplingFlow as CouplingFlow
from .flow_contrastive import FlowContrastiveEstimation as FlowContrastiveEstimation
from .hinge import HingeLoss as HingeLoss
from .infonce import InfoNCE as InfoNCE
from .jem import JEM as JEM
from .noise import GaussianNoise as GaussianNoise
from .noise import MixtureNoise as MixtureNoise
from .noise import NoiseDistribution as NoiseDistribution
from .noise import UniformNoise as UniformNoise
from .noise_contrastive import NoiseContrastiveEstimation as NoiseContrastiveEstimation
from .noise_contrastive import RankingNoiseContrastiveEstimation as RankingNoiseContrastiveEstimation
from .score_matching import ExactScoreMatching as ExactScoreMatching
from .score_matching import SlicedScoreMatching as SlicedScoreMatching

__all__ = sorted(name for name, value in globals().items() if callable(value))
