"""DCGAN's D+G update in JAX, as one jitted function.

Channels last, bfloat16 in the convolutions and float32 elsewhere, weights and optimizer state
donated. The transposed convolution comes in two forms: as a convolution over a map with zeros
between its pixels (``dilated``, which XLA turns into cuDNN's own), and as four 2x2 convolutions,
one for each parity of rows and columns (``phases``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import Tensor, nn

from benchmarks.same_update import Build, Models, Stepper
from benchmarks.steps import Adam, Losses, Networks, networks

FORMS = ("dilated", "phases")
_LAYOUT = ("NHWC", "HWIO", "NHWC")
Arrays = Any  # nested lists and dictionaries of jax arrays


class Layer(NamedTuple):
    """What a layer does; its numbers are in the arrays of the same index."""

    kind: str
    stride: int = 1
    padding: int = 0
    slope: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0


def layers(network: nn.Module) -> list[Layer]:
    """Of DCGAN's networks."""
    found = []
    for module in network.main:  # type: ignore[union-attr]
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            kind = "conv" if isinstance(module, nn.Conv2d) else "transposed"
            found.append(Layer(kind, module.stride[0], int(module.padding[0])))
        elif isinstance(module, nn.BatchNorm2d):
            found.append(Layer("norm", eps=module.eps, momentum=module.momentum or 0.0))
        elif isinstance(module, nn.LeakyReLU):
            found.append(Layer("leaky_relu", slope=module.negative_slope))
        else:
            found.append(Layer({nn.ReLU: "relu", nn.Tanh: "tanh"}[type(module)]))
    return found


def _conv(x: Any, w: Any, stride: int, padding: int) -> Any:
    """w as torch holds it, ``[out, in, h, w]``."""
    sides = ((padding, padding),) * 2
    return lax.conv_general_dilated(
        x, w.transpose(2, 3, 1, 0), (stride, stride), sides, dimension_numbers=_LAYOUT
    )


def _dilated(x: Any, w: Any, stride: int, padding: int) -> Any:
    """w as torch holds it, ``[in, out, h, w]``."""
    side = w.shape[2] - 1 - padding
    return lax.conv_general_dilated(
        x, w[:, :, ::-1, ::-1].transpose(2, 3, 0, 1), (1, 1), ((side, side),) * 2,
        lhs_dilation=(stride, stride), dimension_numbers=_LAYOUT,
    )  # fmt: skip


def _phases(x: Any, w: Any, stride: int, padding: int) -> Any:
    if (stride, padding, w.shape[2]) != (2, 1, 4):
        return _dilated(x, w, stride, padding)
    n, height, width, _ = x.shape
    # Even outputs see the pixel before and the pixel, odd ones the pixel and the one behind.
    taps, sides = ((3, 1), (2, 0)), ((1, 0), (0, 1))
    rows = []
    for i in range(2):
        columns = []
        for j in range(2):
            kernel = w[:, :, taps[i], :][:, :, :, taps[j]].transpose(2, 3, 0, 1)
            columns.append(
                lax.conv_general_dilated(
                    x, kernel, (1, 1), (sides[i], sides[j]), dimension_numbers=_LAYOUT
                )
            )
        rows.append(jnp.stack(columns, axis=3))
    return jnp.stack(rows, axis=2).reshape(n, 2 * height, 2 * width, w.shape[1])


def _norm(layer: Layer, arrays: Any, x: Any) -> tuple[Any, Any]:
    wide = x.astype(jnp.float32)
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    count = x.size // x.shape[3]
    share = layer.momentum
    running = {
        "mean": (1 - share) * arrays["buffers"]["mean"] + share * mean,
        "var": (1 - share) * arrays["buffers"]["var"] + share * var * count / (count - 1),
    }
    scale = arrays["weights"]["weight"] * lax.rsqrt(var + layer.eps)
    return ((wide - mean) * scale + arrays["weights"]["bias"]).astype(x.dtype), running


def _apply(
    network: Sequence[Layer], weights: Arrays, buffers: Arrays, x: Any, form: str, dtype: Any
) -> tuple[Any, Arrays]:
    """Output and the running statistics that follow."""
    transposed = _dilated if form == "dilated" else _phases
    after = []
    for layer, w, b in zip(network, weights, buffers, strict=True):
        if layer.kind in ("conv", "transposed"):
            run = _conv if layer.kind == "conv" else transposed
            x = run(x.astype(dtype), w["weight"].astype(dtype), layer.stride, layer.padding)
        elif layer.kind == "norm":
            x, b = _norm(layer, {"weights": w, "buffers": b}, x)
        elif layer.kind == "tanh":
            x = jnp.tanh(x)
        else:
            x = jnp.where(x > 0, x, layer.slope * x)
        after.append(b)
    return x, after


def _bce(logits: Any, target: float) -> Any:
    x = logits.astype(jnp.float32)
    return (jnp.maximum(x, 0) - x * target + jnp.log1p(jnp.exp(-jnp.abs(x)))).mean()


def _adam(adam: Adam, weights: Arrays, grads: Arrays, moments: Arrays, step: Any) -> Any:
    first, second = adam.betas
    m = jax.tree.map(lambda m, g: first * m + (1 - first) * g, moments["m"], grads)
    v = jax.tree.map(lambda v, g: second * v + (1 - second) * g * g, moments["v"], grads)
    length = adam.lr / (1 - first**step)
    root = jnp.sqrt(1 - second**step)
    new = jax.tree.map(
        lambda w, m, v: w - length * m / (jnp.sqrt(v) / root + adam.eps), weights, m, v
    )
    return new, {"m": m, "v": v}


def update(
    g: Sequence[Layer], d: Sequence[Layer], form: str, dtype: Any, adam: Adam
) -> Callable[[Arrays, Any, Any], tuple[Arrays, tuple[Any, ...]]]:
    """``state, (losses as of Losses) = update(state, real, z)``, to be jitted; images and latents
    ``[N, H, W, C]``. The order is that of `benchmarks.steps`."""

    def loss_of_d(weights: Arrays, buffers: Arrays, x: Any, target: float) -> Any:
        logits, after = _apply(d, weights, buffers, x, form, dtype)
        probability = jax.nn.sigmoid(logits.astype(jnp.float32)).mean()
        return _bce(logits, target), (after, probability)

    both = jax.value_and_grad(loss_of_d, argnums=0, has_aux=True)
    of_images = jax.value_and_grad(loss_of_d, argnums=2, has_aux=True)

    def run(state: Arrays, real: Any, z: Any) -> tuple[Arrays, tuple[Any, ...]]:
        of_g, of_d, step = state["G"], state["D"], state["step"] + 1

        def generate(weights: Arrays) -> Any:
            return _apply(g, weights, of_g["buffers"], z, form, dtype)

        fake, backward, g_buffers = jax.vjp(generate, of_g["weights"], has_aux=True)
        (loss_real, (buffers, d_real)), grads_real = both(
            of_d["weights"], of_d["buffers"], real, 1.0
        )
        (loss_fake, (buffers, d_fake)), grads_fake = both(of_d["weights"], buffers, fake, 0.0)
        grads = jax.tree.map(jnp.add, grads_real, grads_fake)
        d_weights, d_moments = _adam(adam, of_d["weights"], grads, of_d["moments"], step)
        (loss_g, (buffers, after)), of_fake = of_images(d_weights, buffers, fake, 1.0)
        (grads,) = backward(of_fake)
        g_weights, g_moments = _adam(adam, of_g["weights"], grads, of_g["moments"], step)
        new = {
            "G": {"weights": g_weights, "buffers": g_buffers, "moments": g_moments},
            "D": {"weights": d_weights, "buffers": buffers, "moments": d_moments},
            "step": step,
        }
        return new, (loss_real + loss_fake, loss_g, d_real, d_fake, after)

    return run


def _array(tensor: Tensor) -> Any:
    return jnp.asarray(tensor.detach().cpu().numpy())


def _last(maps: Tensor) -> Any:
    return _array(maps.float().permute(0, 2, 3, 1).contiguous())


class JaxStep:
    """JAX's step beside torch networks, which hold its state between the steps of a check."""

    def __init__(self, nets: Networks, form: str, dtype: Any, adam: Adam) -> None:
        self.nets, self._count = nets, 0
        run = update(layers(nets.generator), layers(nets.discriminator), form, dtype, adam)

        def step(state: Arrays, key: Any, real: Any, z: Any, given: Any) -> Any:
            key, own = jax.random.split(key)
            drawn = jnp.where(given, z, jax.random.normal(own, z.shape))
            return *run(state, real, drawn), key

        # One function for the check and for timing: compiling takes long.
        self._run = jax.jit(step, donate_argnums=0)

    def _parts(self) -> list[tuple[str, Any, torch.optim.Optimizer]]:
        nets = self.nets
        return [("G", nets.generator, nets.opt_g), ("D", nets.discriminator, nets.opt_d)]

    def _state(self) -> Arrays:
        state: Arrays = {"step": jnp.asarray(float(self._count), jnp.float32)}
        for letter, network, optimizer in self._parts():
            of: dict[str, Any] = {"weights": [], "buffers": [], "moments": {"m": [], "v": []}}
            for module in network.main:
                named = dict(module.named_parameters())
                kept = {name: optimizer.state.get(p) or {} for name, p in named.items()}
                of["weights"].append({name: _array(p) for name, p in named.items()})
                for letter_of, name_of in (("m", "exp_avg"), ("v", "exp_avg_sq")):
                    of["moments"][letter_of].append(
                        {n: _array(kept[n].get(name_of, torch.zeros_like(p)))
                         for n, p in named.items()}
                    )  # fmt: skip
                norm = isinstance(module, nn.BatchNorm2d)
                of["buffers"].append(
                    {"mean": _array(module.running_mean), "var": _array(module.running_var)}
                    if norm
                    else {}
                )
            state[letter] = of
        return state

    def _keep(self, state: Arrays) -> None:
        for letter, network, optimizer in self._parts():
            of = state[letter]
            for i, module in enumerate(network.main):
                for name, parameter in module.named_parameters():
                    _fill(parameter, of["weights"][i][name])
                    kept = optimizer.state[parameter]
                    for key, moments in (("exp_avg", "m"), ("exp_avg_sq", "v")):
                        _fill(
                            kept.setdefault(key, torch.zeros_like(parameter)),
                            of["moments"][moments][i][name],
                        )
                if of["buffers"][i]:
                    _fill(module.running_mean, of["buffers"][i]["mean"])
                    _fill(module.running_var, of["buffers"][i]["var"])

    def step(self, real: Tensor, z: Tensor) -> Losses:
        """One update of the state in the torch networks."""
        key = jax.random.key(0)
        state, losses, _ = self._run(self._state(), key, _last(real), _last(z), jnp.asarray(True))
        self._keep(state)
        self._count += 1
        return Losses(*(torch.tensor(float(each), device=real.device) for each in losses))

    def timed(self, real: Tensor) -> JaxSteps:
        """Steps that stay on the device."""
        nz = self.nets.generator.main[0].in_channels  # type: ignore[index, union-attr]
        return JaxSteps(self._run, self._state(), _last(real), int(nz))


def _fill(tensor: Tensor, array: Any) -> None:
    with torch.no_grad():
        tensor.copy_(torch.from_numpy(np.array(array)))


class JaxSteps:
    """``steps()`` queues an update with latents of its own; ``wait`` is until all are done."""

    def __init__(self, run: Any, state: Arrays, real: Any, nz: int) -> None:
        self._run, self._state, self._real = run, state, real
        self._losses: Any = None
        self._key, self._given = jax.random.key(0), jnp.asarray(False)
        self._z = jnp.zeros((real.shape[0], 1, 1, nz))

    def __call__(self) -> None:
        self._state, self._losses, self._key = self._run(
            self._state, self._key, self._real, self._z, self._given
        )

    def wait(self) -> None:
        jax.block_until_ready((self._state, self._losses))


def builder(form: str, dtype: str = "bfloat16") -> Build:
    """A step of one of `FORMS`."""

    def build(models: Models, device: torch.device, adam: Adam) -> Stepper:
        wanted = "gpu" if device.type == "cuda" else "cpu"
        if jax.default_backend() != wanted:
            raise RuntimeError(f"JAX runs on {jax.default_backend()}, torch on {device.type}")
        nets = networks(models, device, adam=adam)
        step = JaxStep(nets, form, jnp.dtype(dtype), adam)
        return Stepper(nets, step.step, step.timed)

    return build
