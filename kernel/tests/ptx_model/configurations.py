"""The configurations in which the GEMM kernels are verified: real K, few weight rows and experts, ragged batches."""

from __future__ import annotations

from dataclasses import dataclass

from nvfp4_megamoe.backends.sm100.layout import FEW_SLOTS
from nvfp4_megamoe.numerics import metrics

from .layer_cases import (
    agreement_of,
    expected_output,
    few_slots,
    gemm1,
    gemm2,
    make_case,
    oracle_images,
    quantize,
    sum_slots,
)

GEMM2_LIMIT = 5e-3
# Slots by expert: ragged, none, more than a tile, and for pairs a second block without slots at the very end.
RAGGED, PAIRED = (37, 0, 130, 5), (3, 0, 140, 300)
# For few tokens: less than a part, none, several parts, more than an image.
FEW = (1, 0, 70, 130, 16)


@dataclass(frozen=True)
class Configuration:
    """One kernel on one shape of batch.

    counts: slots of each expert; a token's other choices have no expert here. hidden, inter: of the layer, so that K is
    ``hidden`` in GEMM 1 and ``inter`` in GEMM 2. one_scale: a token is quantized once; None: by the seed.
    """

    name: str
    kernel: str
    counts: tuple[int, ...]
    hidden: int
    inter: int
    blocks: int
    one_scale: bool | None = None

    def run(self, seed: int | None = None) -> dict[str, float]:
        """Execute on the model; ``passed`` says whether the result is within the project's bounds."""
        one_scale = bool((seed or 0) % 2) if self.one_scale is None else self.one_scale
        case = make_case(list(self.counts), self.hidden, self.inter, one_scale, seed=seed)
        if self.kernel.startswith("gemm1"):
            out, out_scale, machine = gemm1(case, *quantize(case), self.kernel, self.blocks)
            found = agreement_of(case, out, out_scale)
            numbers = {
                "codes": found.total,
                "different": found.different,
                "unexplained": found.unexplained,
                "band_needed": found.nearest,
            }
            passed = found.right
        else:
            rows, machine = gemm2(case, *oracle_images(case, few_slots(self.kernel)), self.kernel, self.blocks)
            y = rows if self.kernel.endswith("add") else sum_slots(case, rows)
            numbers = {"relative_l2": metrics.relative_l2(y, expected_output(case))}
            passed = numbers["relative_l2"] <= GEMM2_LIMIT
        return {"passed": passed, **numbers, "instructions": machine.executed}


REDUCED = (
    Configuration("ragged-n128", "gemm1_n128", RAGGED, 512, 256, 3, False),
    Configuration("ragged-n256", "gemm1_n256", (3, 140), 512, 256, 2, True),
    Configuration("ragged-pair", "gemm1_pair", PAIRED, 512, 256, 4, False),
    Configuration("k7168-n128", "gemm1_n128", (9,), 7168, 256, 2, False),
    Configuration("ragged", "gemm2_n128", RAGGED, 256, 512, 3, False),
    Configuration("ragged-add", "gemm2_n128_add", RAGGED, 256, 512, 3, False),
    Configuration("ragged-pair", "gemm2_pair", PAIRED, 256, 512, 4, False),
    Configuration("ragged-pair-add", "gemm2_pair_add", PAIRED, 256, 512, 4, False),
    Configuration("k3072", "gemm2_n128", (9,), 256, 3072, 2, False),
    *(Configuration("ragged", f"gemm1_few{slots}", FEW, 512, 256, 3, slots == 32) for slots in FEW_SLOTS),
    *(Configuration("ragged", f"gemm2_few{slots}", FEW, 256, 512, 3, False) for slots in FEW_SLOTS),
    Configuration("ragged-add", "gemm2_few16_add", FEW, 256, 512, 3, False),
    Configuration("k7168", "gemm1_few16", (9,), 7168, 256, 2, False),
    Configuration("k3072", "gemm2_few16", (9,), 256, 3072, 2, False),
)
# K of V4-Pro, 7168 and 3072, and of V4-Flash, 4096 and 2048.
FULL = (
    *(
        Configuration(f"k{k}", f"gemm1_{tile}", PAIRED if tile == "pair" else RAGGED, k, 256, blocks)
        for k in (7168, 4096)
        for tile, blocks in (("n128", 3), ("n256", 3), ("pair", 4))
    ),
    *(
        Configuration(f"k{k}", f"gemm2_{tile}{mode}", PAIRED if tile == "pair" else RAGGED, 512, k, blocks)
        for k in (3072, 2048)
        for tile, blocks in (("n128", 3), ("pair", 4))
        for mode in ("", "_add")
    ),
    *(Configuration(f"k{k}", f"gemm1_few{slots}", FEW, k, 256, 3) for k in (7168, 4096) for slots in FEW_SLOTS),
    *(
        Configuration(f"k{k}", f"gemm2_few{slots}{mode}", FEW, 512, k, 3)
        for k in (3072, 2048)
        for slots in FEW_SLOTS
        for mode in ("", "_add")
    ),
)
