"""Linear layers that take quantized activations as they are."""

from .calibration import Calibration
from .convert import quantize_model
from .linear import QuantLinear, QuantMethod, ScaledLinearMethod
from .scheme import SCHEMES, Scheme

__all__ = ["SCHEMES", "Calibration", "QuantLinear", "QuantMethod", "ScaledLinearMethod", "Scheme", "quantize_model"]
