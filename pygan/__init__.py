"""pygan: fused kernels, a fast step and a trainer for generative adversarial networks.

>>> report = pygan.fuse(G)                      # same network, faster blocks
>>> step = pygan.AdversarialStep(G, D, opt_g, opt_d)
>>> result = step(real)                         # one update of D and of G
"""

from pygan import functional, losses, models, nn
from pygan.compile import compile_backend
from pygan.errors import UserError
from pygan.fuse import FuseReport, fuse, unfuse
from pygan.monitor import Finding, Monitor
from pygan.step import AdversarialStep, ReferenceStep, StepResult
from pygan.tricks import Ema, Tricks

__version__ = "0.1.0"

__all__ = [
    "AdversarialStep",
    "Ema",
    "Finding",
    "FuseReport",
    "Monitor",
    "ReferenceStep",
    "StepResult",
    "Tricks",
    "UserError",
    "compile_backend",
    "functional",
    "fuse",
    "losses",
    "models",
    "nn",
    "unfuse",
]
