"""Contrastive divergence (Hinton 2002; Tieleman 2008), with the energy regulariser of Du & Mordatch (2019).

loss = mean E(data) - mean E(samples) + reg_alpha (mean E(data)^2 + mean E(samples)^2)

and, each with a weight that is 0 by default:

gradient_penalty   mean ||dE/dx||^2 at the data + the same at the samples (R1 is the first; Mescheder et al. 2018)
entropy            mean E'(y) - dim mean log min_j ||y_i - y_j||,   y = x - drift dE/dx(x)
                   (the KL term of Du, Li, Tenenbaum & Mordatch 2021): E' has the weights held fixed, and y is one more
                   step from each sample x, whose gradient with respect to the weights is kept. The second mean is the
                   entropy of the samples up to a constant (Kozachenko & Leonenko 1987; the paper leaves out its factor
                   dim). If the samples follow the model, the term has no gradient on average, for small steps.
pull_away          mean of cos(f_i, f_j)^2 over all pairs of samples i != j (Zhao, Mathieu & LeCun 2017), f the features
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..box import Bounds
from ..energies import energy as energies_of
from ..energies.conditions import unwrapped
from ..energies.eval_mode import evaluating
from ..pool import ChainPool
from ..samplers.base import Sampler, diagonal_at
from ..samplers.langevin import Langevin
from ..scalars import checked_number
from .base import Draws, Loss, calls_of, mean_energies
from .gradients import input_gradient
from .negatives import ChainObjective, energies_of_both, joined

__all__ = ["ContrastiveDivergence", "contrastive_divergence_loss"]

_NO_FEATURES = (
    "pull_away compares the inputs of the energy's last nn.Linear, and it has none that is called: leave it 0"
)


class ContrastiveDivergence(ChainObjective):
    """Contrastive divergence as an objective: it draws the negatives, and returns the loss of a batch.

        objective = ContrastiveDivergence(Langevin.ula(0.01), steps=20, pool=ChainPool(10_000, 2, clamp=(-2, 2)))
        loss, metrics, samples = objective(energy, batch)
        loss.backward()

    With ``labels`` the energy is E(x, labels), and each row's negative has its label.

    Metrics: ``energy_real`` and ``energy_samples``, the two mean energies, and each term whose weight is not 0.

    Args:
        reg_alpha: weight of the regulariser, >= 0.
        gradient_penalty, entropy, pull_away: weights >= 0 of the terms at the top of this file. entropy needs
            ``Langevin`` as the sampler, and neighbours are sought among this process' samples. pull_away takes the
            input of the energy's last nn.Linear for the features, and pairs of this process' samples; an energy has
            no generator to push, so it acts on the weights of the features.
        sampler, steps, pool, start, clamp, backend, on_nonfinite, seed: see ``ChainObjective``.
    """

    def __init__(
        self,
        sampler: Sampler,
        steps: int,
        *,
        pool: ChainPool | None = None,
        start: str = "data",
        clamp: Bounds | None = None,
        reg_alpha: float = 0.01,
        gradient_penalty: float = 0.0,
        entropy: float = 0.0,
        pull_away: float = 0.0,
        backend: str = "auto",
        on_nonfinite: str = "raise",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            sampler, steps, pool=pool, start=start, clamp=clamp, backend=backend, on_nonfinite=on_nonfinite, seed=seed
        )
        self.reg_alpha = checked_number("reg_alpha", reg_alpha, positive=False)
        self.gradient_penalty = checked_number("gradient_penalty", gradient_penalty, positive=False)
        self.entropy = checked_number("entropy", entropy, positive=False)
        self.pull_away = checked_number("pull_away", pull_away, positive=False)
        if self.entropy > 0 and not isinstance(sampler, Langevin):
            raise ValueError(f"entropy takes one more step of Langevin: the sampler must be one, got {sampler!r}")

    def loss_of(self, energy: nn.Module, batch: Tensor, labels: Tensor | None, draws: Draws) -> Loss:
        n = draws.n_rows
        linears = [m for m in energy.modules() if isinstance(m, nn.Linear)] if self.pull_away > 0 else []
        if self.pull_away > 0 and not linears:
            raise ValueError(_NO_FEATURES)
        negatives = self.negatives(energy, batch, labels, draws, n)
        with calls_of(linears) as calls:
            if self.gradient_penalty + self.entropy > 0:
                x, both = torch.cat([batch, negatives.x]), joined(labels, negatives.labels)
                _, energies, gradient = input_gradient(energy, x, labels=both)
                real, negative = energies.tensor_split([len(batch)])
            else:
                real, negative = energies_of_both(energy, batch, negatives.x, labels=(labels, negatives.labels))
        loss = contrastive_divergence_loss(real, negative, self.reg_alpha, batch_size=n)
        metrics = mean_energies(real, negative, n)
        terms: dict[str, Tensor] = {}  # sums over rows, by the names of their weights
        if self.gradient_penalty > 0:
            terms["gradient_penalty"] = gradient.square().sum()
        if self.entropy > 0:
            moved = self._moved_once(negatives.x, gradient[len(batch) :])
            terms["entropy"] = _kl_term(energy, moved, negatives.labels)
        if self.pull_away > 0:
            if not calls:
                raise ValueError(_NO_FEATURES)
            features, _ = calls[-1]
            terms["pull_away"] = _pull_away_term(features[len(batch) :])
        for name, term in terms.items():
            loss = loss + getattr(self, name) * term / n
            metrics[name] = term.detach() / n
        return Loss(loss, metrics, negatives.x)

    def _moved_once(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Samples after one more step of the sampler without noise. gradient: of their energies, with its graph."""
        sampler, rows = self.sampler, x.flatten(1)
        assert isinstance(sampler, Langevin)  # __init__
        drift, _ = sampler.coefficients(len(rows), max(self.steps, 1), dtype=x.dtype, device=x.device)
        c = diagonal_at("preconditioner", sampler.preconditioner, rows)
        return self.clamped(rows - drift[:, -1:] * c * sampler.clip(gradient.flatten(1))).reshape(x.shape)


def _kl_term(energy: nn.Module, moved: Tensor, labels: Tensor | None) -> Tensor:
    """The sum over samples of E' - dim log distance to the nearest other sample. moved: (m, *shape), with a graph."""
    model = unwrapped(energy)
    fixed = {name: p.detach() for name, p in model.named_parameters()}
    with evaluating(model):
        energies = energies_of(model, moved, fixed, labels=labels)
    if len(moved) < 2:  # of a pool that processes share, this one may have drawn a single chain, or none
        return energies.sum()
    rows = moved.flatten(1)
    states = rows.detach().to(torch.promote_types(rows.dtype, torch.float32))  # cdist takes no half precision
    nearest = torch.cdist(states, states).fill_diagonal_(torch.inf).argmin(dim=1)
    # Samples at a corner of the clamp may be equal: their distance has no gradient, and a finite log with this.
    distance = torch.linalg.vector_norm(rows - rows[nearest], dim=1).clamp(min=torch.finfo(rows.dtype).eps)
    term: Tensor = energies.sum() - rows.shape[1] * distance.log().sum()
    return term


def _pull_away_term(features: Tensor) -> Tensor:
    """The sum over rows i of the mean over the other rows j of cos(f_i, f_j)^2. features: (m, ...)."""
    rows = nn.functional.normalize(features.flatten(1), dim=1)
    cosines = rows @ rows.T
    return (cosines.square().sum() - cosines.diagonal().square().sum()) / max(len(rows) - 1, 1)


def contrastive_divergence_loss(
    real_energy: Tensor, neg_energy: Tensor, reg_alpha: float = 0.01, *, batch_size: int | None = None
) -> Tensor:
    """mean E+ - mean E- + reg_alpha (mean E+^2 + mean E-^2), a scalar.

    If the negatives follow the model, the first two terms have the gradient of the negative log-likelihood. The last
    one keeps energies near zero: the likelihood does not depend on their level.

    Args:
        real_energy: energies of data, (batch,) or (batch, 1).
        neg_energy: energies of samples, (batch,) or (batch, 1), computed as ``energy(samples)``. The energies that a
            sampler or a pool returns with its samples carry no gradient, so they can't be used here.
        reg_alpha: weight of the regulariser, finite and >= 0.
        batch_size: what the sums of each side are divided by to give its means. None: the number of its energies.
            Processes that each hold a part of a batch, which may be empty, pass the size of the whole batch: the sum
            of their losses is then the loss of the whole batch.

    Warns:
        UserWarning: one side carries no gradient, so half of the loss would have no effect.
    """
    reg_alpha = checked_number("reg_alpha", reg_alpha, positive=False)
    if batch_size is None and (real_energy.numel() == 0 or neg_energy.numel() == 0):
        raise ValueError("contrastive_divergence_loss needs at least one energy on each side, got an empty tensor")

    sides = {"real_energy": real_energy, "neg_energy": neg_energy}
    without = [name for name, e in sides.items() if e.numel() > 0 and not e.requires_grad]
    if len(without) == 1 and torch.is_grad_enabled() and min(e.numel() for e in sides.values()) > 0:
        phase, argument = ("negative", "samples") if without == ["neg_energy"] else ("positive", "data")
        warnings.warn(
            f"{without[0]} carries no gradient, so the {phase} phase is lost and the loss trains on the other side "
            f"alone: pass energy({argument}), computed with gradients, not what a sampler or a pool returned",
            stacklevel=2,
        )

    def mean(values: Tensor) -> Tensor:
        return values.mean() if batch_size is None else values.sum() / batch_size

    regulariser = mean(real_energy.square()) + mean(neg_energy.square())
    return mean(real_energy) - mean(neg_energy) + reg_alpha * regulariser
