"""CUDA kernels. Arrays are device addresses, 0 for none, and ``stream`` is a cudaStream_t;
csrc/pygan_cuda.h says what each one holds."""

_Groups = tuple[tuple[int, int, float, float, int, int, int], ...]

class NormActShape:
    def __init__(
        self,
        dtype: int,
        layout: int,
        batch: int,
        channels: int,
        spatial: int,
        groups: int,
        activation: int,
        negative_slope: float,
    ) -> None: ...

def norm_act_scratch(shape: NormActShape) -> int: ...
def norm_act_forward(
    shape: NormActShape,
    x: int,
    weight: int,
    bias: int,
    training: bool,
    eps: float,
    momentum: float,
    running_mean: int,
    running_var: int,
    y: int,
    mean: int,
    invstd: int,
    coefficients: int,
    variance: int,
    scratch: int,
    stream: int,
) -> None: ...
def norm_act_backward(
    shape: NormActShape,
    x: int,
    dy: int,
    weight: int,
    bias: int,
    mean: int,
    invstd: int,
    training: bool,
    dx: int,
    dweight: int,
    dbias: int,
    scratch: int,
    stream: int,
) -> None: ...

class StridedConvShape:
    def __init__(
        self,
        dtype: int,
        weight_layout: int,
        batch: int,
        height: int,
        width: int,
        big_height: int,
        big_width: int,
        small_channels: int,
        big_channels: int,
    ) -> None: ...

def image_conv_scratch(shape: StridedConvShape) -> int: ...
def image_conv_up(
    shape: StridedConvShape,
    small: int,
    gate: int,
    negative_slope: float,
    weight: int,
    bias: int,
    activation: int,
    big: int,
    stream: int,
) -> None: ...
def image_conv_down(
    shape: StridedConvShape,
    big: int,
    weight: int,
    bias: int,
    activation: int,
    negative_slope: float,
    small: int,
    stream: int,
) -> None: ...
def image_conv_weight_grad(
    shape: StridedConvShape,
    small: int,
    gate: int,
    negative_slope: float,
    big: int,
    dweight: int,
    scratch: int,
    stream: int,
) -> None: ...
def gan_loss_scratch(dtype: int, groups: _Groups) -> int: ...
def gan_loss(dtype: int, groups: _Groups, loss: int, scratch: int, stream: int) -> None: ...
def image_batch(
    images: int,
    count: int,
    height: int,
    width: int,
    channels: int,
    index: int,
    flip: int,
    batch: int,
    dtype: int,
    out: int,
    stream: int,
) -> None: ...
def unusable() -> str: ...
def architectures() -> str: ...
