"""Training objectives, one file each. This is their registry: what is imported here is public."""

from .base import Loss as Loss
from .base import Objective as Objective
from .contrastive_divergence import ContrastiveDivergence as ContrastiveDivergence
from .contrastive_divergence import contrastive_divergence_loss as contrastive_divergence_loss
from .cooperative import CooperativeTraining as CooperativeTraining
from .diffusion_recovery import DiffusionRecoveryLikelihood as DiffusionRecoveryLikelihood
from .hinge import HingeLoss as HingeLoss
from .jem import JEM as JEM

__all__ = sorted(name for name, value in globals().items() if callable(value))
