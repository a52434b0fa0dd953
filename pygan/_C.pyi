"""CPU kernels. Arrays are addresses, 0 for none; csrc/pygan.h says what each one holds."""

class NormActShape:
    batch: int
    channels: int
    spatial: int
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
        threads: int,
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
    scratch: int,
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
) -> None: ...
def norm_act_second_scratch(shape: NormActShape) -> int: ...
def norm_act_second(
    shape: NormActShape,
    x: int,
    dy: int,
    ddx: int,
    weight: int,
    bias: int,
    ddweight: int,
    ddbias: int,
    mean: int,
    invstd: int,
    training: bool,
    dx: int,
    ddy: int,
    dweight: int,
    scratch: int,
) -> None: ...

class StridedConvShape:
    batch: int
    height: int
    width: int
    big_height: int
    big_width: int
    small_channels: int
    big_channels: int
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
        method: int,
        normalized: int,
        threads: int,
    ) -> None: ...

def strided_conv_method(shape: StridedConvShape, conv_pass: int) -> int: ...
def strided_conv_scratch(shape: StridedConvShape, conv_pass: int) -> int: ...
def strided_conv_up(
    shape: StridedConvShape,
    small: int,
    gate: int,
    coefficients: int,
    groups: int,
    negative_slope: float,
    weight: int,
    bias: int,
    big: int,
    scratch: int,
) -> None: ...
def strided_conv_down(
    shape: StridedConvShape,
    big: int,
    coefficients: int,
    groups: int,
    weight: int,
    bias: int,
    activation: int,
    negative_slope: float,
    small: int,
    scratch: int,
) -> None: ...
def strided_conv_weight_grad(
    shape: StridedConvShape,
    small: int,
    gate: int,
    coefficients: int,
    groups: int,
    negative_slope: float,
    big: int,
    dweight: int,
    scratch: int,
) -> None: ...
def gan_loss(
    dtype: int, groups: tuple[tuple[int, int, float, float, int, int, int], ...], loss: int
) -> None: ...
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
    threads: int,
) -> None: ...
def isa() -> str: ...
def isas() -> list[str]: ...
