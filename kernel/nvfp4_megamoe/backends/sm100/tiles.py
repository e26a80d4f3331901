"""Which tile comes when: index to expert, slots and columns, from the plan's table."""

from __future__ import annotations

from dataclasses import dataclass

import cutlass
from cutlass import Int32, Int64, cute

from nvfp4_megamoe.backends.sm100 import ptx
from nvfp4_megamoe.backends.sm100.layout import IMAGE_ROWS


@dataclass
class Tile:
    """One tile of one expert.

    expert: local expert. column: tile of weight rows. image: tile of slots, counted over all experts. slot: first slot.
    rows: slots in the tile, 0 to 128.
    """

    expert: Int32
    column: Int32
    image: Int32
    slot: Int32
    rows: Int32

    @staticmethod
    def find(tiles: Int64, index: Int32, columns: Int32, rank: Int32, blocks: int) -> Tile:
        """Tiles of an expert are consecutive, those with the same weights next to each other.

        A pair's tile has 256 slots, of which ``rank`` says the half; ``rows`` is 0 where that has none.
        """
        return Tile(*_find(tiles, index, columns, rank, blocks))

    def part(self, number: Int32 | int, slots: int) -> Tile:
        """``slots`` slots of the tile, from ``number * slots``; ``rows`` may pass ``slots`` or be negative."""
        return Tile(self.expert, self.column, self.image, self.slot + number * slots, self.rows - number * slots)


@cute.jit
def _find(tiles: Int64, index: Int32, columns: Int32, rank: Int32, blocks: cutlass.Constexpr):
    expert, first, count, first_image = ptx.load_4xi32(tiles + Int64(index // columns) * 32)
    begin, end = (ptx.load_i32(tiles + Int64(index // columns) * 32 + offset) for offset in (16, 20))
    inside = index - first * columns
    column, tile = inside // count, inside % count
    part = tile * blocks + rank
    slot = begin + part * IMAGE_ROWS
    rows = end - slot
    if rows < 0:
        rows = Int32(0)
    if rows > IMAGE_ROWS:
        rows = Int32(IMAGE_ROWS)
    return expert, column, first_image + part, slot, rows


@cute.jit
def tile_count(num_tiles: Int64, columns: Int32):
    """Tiles of the whole problem."""
    return ptx.load_i32(num_tiles) * columns
