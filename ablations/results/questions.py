"""What a study asks of its networks: contrasts, in families that are declared before anything is trained.

1. The main effects of the factors, each over the matched cells that differ in nothing else.
2. Each cell against the base, the design's first cell.
3. The contrasts that the study declares.

Everything else, interactions too, is exploratory.

Shapes: Q contrasts, U networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from expertgrid.ablations.results.stats import factors
from expertgrid.ablations.results.stats.factors import EffectContrast
from expertgrid.ablations.study.cells import Group
from expertgrid.ablations.study.levels import level_name
from expertgrid.ablations.study.study import Study


@dataclass(frozen=True)
class Questions:
    """The contrasts of a study's networks, from its cells alone. The base is the first network."""

    networks: int
    effects: list[EffectContrast]
    interactions: list[EffectContrast]

    @property
    def effect_weights_QU(self) -> np.ndarray:
        return self._weights(self.effects)

    @property
    def interaction_weights_QU(self) -> np.ndarray:
        return self._weights(self.interactions)

    def _weights(self, effects: Sequence[EffectContrast]) -> np.ndarray:
        return np.array([effect.weights_C for effect in effects]).reshape(-1, self.networks)

    @property
    def first_family_QU(self) -> np.ndarray:
        """The main effects; in a study without any, the cells against the base."""
        if self.effects or self.networks < 2:
            return self.effect_weights_QU
        return factors.against(0, self.networks)

    @property
    def in_no_effect(self) -> list[int]:
        """The networks that are in no main effect, without the base."""
        weights_QU = self.effect_weights_QU
        return [network for network in range(1, self.networks) if not weights_QU[:, network].any()]

    @property
    def race_QU(self) -> np.ndarray:
        """What a race decides: the main effects, and the cells that are in none of them against the base."""
        differences = [factors.difference(network, 0, self.networks) for network in self.in_no_effect]
        return np.vstack([self.effect_weights_QU, *differences])


def study_questions(study: Study, networks: Sequence[Group]) -> Questions:
    """What a study asks of its networks."""
    base = ["base"] if study.design == "one_at_a_time" else []
    levels = {name: [*base, *map(level_name, of)] for name, of in study.factors.items()}
    varied = [
        (cell.level_names, unit) for unit, network in enumerate(networks) for cell in network.cells if cell.levels
    ]
    design = levels, [point for point, _ in varied], [unit for _, unit in varied], len(networks)
    return Questions(len(networks), factors.main_effects(*design), factors.interactions(*design))
