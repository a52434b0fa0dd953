"""What training is suffering from, in words.

>>> monitor = pygan.Monitor(G, D, real=images)
>>> monitor.update(loss_d, loss_g, d_real, d_fake)      # every step, reads nothing back
>>> for finding in monitor.check(step):                 # now and then, reads once
...     print(finding)
"""

from pygan.monitor.findings import FAULTS, Finding
from pygan.monitor.fixes import AutoFix, halve
from pygan.monitor.tensors import nonfinite
from pygan.monitor.variety import Variety
from pygan.monitor.watch import Monitor

__all__ = ["FAULTS", "AutoFix", "Finding", "Monitor", "Variety", "halve", "nonfinite"]
