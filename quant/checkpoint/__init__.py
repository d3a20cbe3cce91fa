"""Quantized checkpoints: reading those of others into `QuantLinear` layers, and writing compressed-tensors."""

from ..methods.calibration import Calibration
from .calibrate import calibrate
from .load import load_quantized
from .save import save_quantized

__all__ = ["Calibration", "calibrate", "load_quantized", "save_quantized"]
