"""Linear layers that take quantized activations as they are."""

from .calibration import Calibration
from .convert import quantize_model
from .experts import QuantExperts, QuantGroupedLinear
from .linear import QuantLinear, QuantMethod, ScaledLinearMethod
from .scheme import SCHEMES, Scheme

__all__ = [
    "SCHEMES",
    "Calibration",
    "QuantExperts",
    "QuantGroupedLinear",
    "QuantLinear",
    "QuantMethod",
    "ScaledLinearMethod",
    "Scheme",
    "quantize_model",
]
