"""The layer test: is a layer, on the backend and device that will serve it, what the checkpoint's tensors say?"""

from nvfp4_megamoe.selftest.layer_test import LayerTest, Options
from nvfp4_megamoe.selftest.report import LayerReport, LayerTestError, Measurement

__all__ = ["LayerReport", "LayerTest", "LayerTestError", "Measurement", "Options"]
