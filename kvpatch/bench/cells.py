"""How a model's cache grows by pages, as kvpatch.estimate derives it from the file: exact for every architecture that
it knows, and nothing guessed of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvpatch import estimate
from kvpatch.bench.servers import Setup
from kvpatch.estimate.cache import DEVICES, Caches
from kvpatch.smoke.llama import STEP_CELLS

UNJUDGED = "how much this model's cache maps is not judged"


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """The caches of one slot on a device whose memory is mapped by `page` bytes."""

    caches: Caches
    device: str
    page: int

    def mapped(self, tokens: int) -> estimate.Mapped:
        """What so many tokens map."""
        return estimate.map_tokens(self.caches, DEVICES[self.device], page=self.page, tokens=tokens)

    def maps(self, cell: int) -> bool:
        """Whether the step that decodes the token of this cell is the first to read some page."""
        return cell % STEP_CELLS == 0 and self.mapped(cell + 1).mapped > self.mapped(cell).mapped

    def boundaries(self) -> Iterator[int]:
        """Cells that map, in their order."""
        return (cell for cell in range(STEP_CELLS, self.caches.context_slot, STEP_CELLS) if self.maps(cell))


def growth(setup: Setup, *, context: int, page: int) -> Growth:
    """Of the setup's model with `context` cells in one slot. Raises EstimateError where that is not known exactly."""
    model = estimate.derive(estimate.read(setup.model.path))
    settings = estimate.Settings(context=context, parallel=1, unified=False)
    return Growth(caches=estimate.plan_caches(model, settings), device=setup.device.name, page=page)
