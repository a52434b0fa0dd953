"""Operations: one file each, with reference, support predicates, autograd and dispatch."""

from __future__ import annotations

from pygan.ops import cuda_native, dispatch, native

# Fastest first, as dispatch tries them.
_OFFERED = {
    "strided_conv": ("cuda", "triton", "cpu", "torch"),
    "folded_conv": ("cpu", "torch"),
    "norm_act": ("cuda", "triton", "cpu", "torch"),
    "gan_loss": ("cuda", "triton", "cpu", "torch"),
    "image_batch": ("cuda", "triton", "cpu", "torch"),
}


def implementations() -> dict[str, dict[str, str | None]]:
    """For each operation and implementation, None where it runs here, else the reason."""
    reasons = {
        "cuda": cuda_native.reason(),
        "triton": dispatch.triton_reason(),
        "cpu": native.reason(),
        "torch": None,
    }
    return {
        operation: {
            name: reasons[name] if name in offered else "not written for this operation"
            for name in dispatch.NAMES
        }
        for operation, offered in _OFFERED.items()
    }


def chosen(operation: str, device: str = "cpu") -> str:
    """The implementation that ``impl="auto"`` takes for float32 tensors on ``device``."""
    reasons = implementations()[operation]
    home = {"cpu": "cpu", "cuda": "cuda", "triton": "cuda", "torch": device}
    for name in _OFFERED[operation]:
        if home[name] == device and reasons[name] is None:
            return name
    return "torch"
