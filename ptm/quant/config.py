"""Settings of quantization-aware training: the grid that the export will have, and the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ptm.common.config import Choice, config, ranged
from ptm.common.errors import RecipeError, line

if TYPE_CHECKING:
    from ptm.quant.grid import Grid


class QatGrid(Choice):
    """Grids to train on; none trains as usual."""

    none = "none"
    int4 = "int4"
    int8 = "int8"
    fp6_e3m2 = "fp6_e3m2"
    fp6_e2m3 = "fp6_e2m3"


class Layers(Choice):
    """Which linears are quantized."""

    default = "default"
    published = "published"


@config
class QatConfig:
    grid: QatGrid = QatGrid.none
    "Grid that weights of attention and experts are put on in every forward; none: they are not."
    group: int = ranged(128, least=0, most=2**16)
    "Inputs that share a scale; 0 is one scale for each output."
    symmetric: bool = True
    "Grids without zero points."
    layers: Layers = Layers.default
    "default: attention and experts; published: the router too."
    distill: float = ranged(0.0, least=0.0, most=1.0)
    "Part of the loss that is the KL divergence from the predictions of train.init_from, in bf16."

    def check(self) -> None:
        """Raise RecipeError for zero points on a grid that has none."""
        if not self.symmetric and self.grid in (QatGrid.fp6_e3m2, QatGrid.fp6_e2m3):
            raise RecipeError(line("qat.symmetric", "false", "fp6 has no zero points", "give true"))

    def made(self) -> Grid | None:
        """The grid, or None."""
        if self.grid is QatGrid.none:
            return None
        from ptm.quant.grid import Grid, GridKind  # late: a wrong word is answered without torch

        return Grid(GridKind(str(self.grid)), self.group, self.symmetric)
