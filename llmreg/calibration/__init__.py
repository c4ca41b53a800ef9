"""Statistics of layer inputs over data, streamed: exact second moments or sketches, means, counts.

One pass over any iterable of batches serves every method that asks. Sums merge over batches and processes.
"""

from llmreg.calibration.cache import CalibrationCache, load_statistics, save_statistics
from llmreg.calibration.calibrate import calibrate
from llmreg.calibration.report import CalibrationReport
from llmreg.calibration.results import Statistics
from llmreg.calibration.statistics import InputStatistics, Need

__all__ = [
    "CalibrationCache",
    "CalibrationReport",
    "InputStatistics",
    "Need",
    "Statistics",
    "calibrate",
    "load_statistics",
    "save_statistics",
]
