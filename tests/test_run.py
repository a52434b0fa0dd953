"""Scripts in the style of the tutorials, run by python and by ``python -m pygan.run``."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import ROOT

from pygan.run import main

DCGAN = """
from __future__ import print_function
import argparse
import os
import random
import sys

import torch
import torch.nn as nn
from torch.utils.data import DataLoader

from data import Images

parser = argparse.ArgumentParser()
parser.add_argument("--niter", type=int, default=1)
parser.add_argument("--outf", default=".")
parser.add_argument("--quiet", action="store_true")
opt = parser.parse_args()
print(opt, sys.argv, os.getcwd(), sys.path[0], __file__, __name__)
random.seed(1)
torch.manual_seed(1)


def weights_init(m):
    classname = m.__class__.__name__
    if classname.find("Conv") != -1:
        torch.nn.init.normal_(m.weight, 0.0, 0.02)
    elif classname.find("BatchNorm") != -1:
        torch.nn.init.normal_(m.weight, 1.0, 0.02)
        torch.nn.init.zeros_(m.bias)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 4, 1, 0, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, input):
        return self.main(input)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(3, 8, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(8, 16, 4, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(16, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, input):
        return self.main(input).view(-1, 1).squeeze(1)


def watched(net):
    # What prints a summary of the layers hooks them for one call.
    hooks = [
        m.register_forward_hook(lambda m, i, o: print(str(m.__class__).split(".")[-1], o.shape))
        for m in net.modules()
    ]
    net(torch.zeros(2, 8, 1, 1))
    for hook in hooks:
        hook.remove()


if __name__ == "__main__":
    netG = Generator()
    torch.save(netG, opt.outf + "/untrained.pth")
    watched(netG)
    netG.apply(weights_init)
    netD = Discriminator()
    netD.apply(weights_init)
    print(netD)
    criterion = nn.BCELoss()
    optimizerD = torch.optim.Adam(netD.parameters(), lr=0.0002, betas=(0.5, 0.999))
    optimizerG = torch.optim.Adam(netG.parameters(), lr=0.0002, betas=(0.5, 0.999))
    loader = DataLoader(Images(), batch_size=8, shuffle=True, num_workers=1)
    for epoch in range(opt.niter):
        for i, real in enumerate(loader):
            netD.zero_grad()
            label = torch.full((8,), 1.0)
            output = netD(real)
            errD_real = criterion(output, label)
            errD_real.backward()
            D_x = output.mean().item()
            fake = netG(torch.randn(8, 8, 1, 1))
            label.fill_(0.0)
            output = netD(fake.detach())
            errD_fake = criterion(output, label)
            errD_fake.backward()
            errD = errD_real + errD_fake
            optimizerD.step()
            netG.zero_grad()
            label.fill_(1.0)
            output = netD(fake)
            errG = criterion(output, label)
            errG.backward()
            optimizerG.step()
            print("[%d/%d][%d/%d] Loss_D: %.4f Loss_G: %.4f D(x): %.4f D(G(z)): %.4f"
                  % (epoch, opt.niter, i, len(loader), errD, errG, D_x, output.mean()))
        torch.save(fake.detach(), opt.outf + "/fake_samples_epoch_%03d.pth" % epoch)
        torch.save(netG.state_dict(), opt.outf + "/netG_epoch_%d.pth" % epoch)
        torch.save(netG, opt.outf + "/whole.pth")
    print(netG, [type(m) is nn.Sequential for m in netG.children()], vars(netG).keys())
    again = torch.load(opt.outf + "/whole.pth", weights_only=False)
    print(type(again), (again.eval()(torch.ones(1, 8, 1, 1)) ** 2).sum())
    netD.apply(weights_init)
    print(netD.main[0].weight.std(), torch.rand(2), random.random(), file=sys.stderr)
    print(netD.main[0].weight.std(), torch.rand(2), random.random())
"""

DATA = """
import torch


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        return torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(i)) * 2 - 1
"""

WGAN = """
import copy
import pickle
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 4, 2, 1)

    def forward(self, x):
        return self.conv2(F.relu(self.bn1(self.conv1(x))))


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 8 * 4 * 4)
        self.up = nn.ConvTranspose2d(8, 8, 4, 2, 1)
        self.bn = nn.BatchNorm2d(8)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, z):
        x = self.fc(z).view(-1, 8, 4, 4)
        x = F.interpolate(F.relu(self.bn(self.up(x))), scale_factor=2)
        return torch.tanh(self.out(x))


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 2, 1)
        self.norm = nn.InstanceNorm2d(8, affine=True)
        self.block = Block(8, 8)
        self.out = nn.Conv2d(8, 1, 4)

    def features(self, x):
        return self.block(F.leaky_relu(self.norm(self.conv(x)), 0.2))

    def forward(self, x):
        return self.out(self.features(x)).flatten(1), torch.ones(1)


def noise(i):
    return torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(i))


def gradient_penalty(critic, real, fake):
    alpha = torch.rand(real.size(0), 1, 1, 1)
    between = (alpha * real + (1 - alpha) * fake).requires_grad_()
    grads = torch.autograd.grad(critic(between)[0].sum(), between, create_graph=True)[0]
    return ((grads.flatten(1).norm(2, 1) - 1) ** 2).mean()


def main():
    torch.manual_seed(0)
    generator, critic = Generator(), Critic()
    try:
        generator(torch.randn(2, 5))
    except RuntimeError as error:
        print("caught", str(error)[:30])
    before = copy.deepcopy(generator)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.stack([noise(i) for i in range(16)])), batch_size=4,
        num_workers=1, multiprocessing_context="spawn", collate_fn=collate)
    optG = torch.optim.SGD(generator.parameters(), 0.01)
    optD = torch.optim.SGD(critic.parameters(), 0.01)
    ema = None
    for i, real in enumerate(loader):
        fake = generator(torch.randn(4, 6))
        loss = critic(fake.detach())[0].mean() - critic(real)[0].mean()
        loss = loss + 10 * gradient_penalty(critic, real, fake.detach())
        optD.zero_grad()
        loss.backward()
        optD.step()
        lossG = -critic(fake)[0].mean()
        optG.zero_grad()
        lossG.backward()
        optG.step()
        if ema is None:
            ema = copy.deepcopy(generator)
        for p, q in zip(ema.parameters(), generator.parameters()):
            p.data.mul_(0.9).add_(q.data, alpha=0.1)
        print("loss %.5f %.5f" % (loss.item(), lossG.item()), critic.features(real).abs().mean())
    with torch.no_grad():
        z = torch.ones(2, 6)
        print([m.eval()(z).abs().mean() for m in (generator, ema, before)])
    print(critic, sorted({type(m).__module__ for m in critic.modules()}))
    print(b"pygan" in pickle.dumps(critic), [vars(m).keys() for m in critic.modules()])
    torch.save({"G": generator.state_dict(), "D": critic.state_dict()}, sys.argv[1])


def collate(rows):
    return torch.stack([row for row, in rows]) + len(sys.argv)


if __name__ == "__main__":
    main()
"""

SURROUNDINGS = """
import gc
import tempfile
import threading
import weakref

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from torch.utils.flop_counter import FlopCounterMode


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4, 2, 1)
        self.rest = nn.Sequential(nn.BatchNorm2d(8), nn.LeakyReLU(0.2), nn.Conv2d(8, 4, 4, 2, 1))

    def forward(self, x):
        return self.rest(self.conv(x))


class Checkpointed(Net):
    reentrant = False

    def forward(self, x):
        y = checkpoint(self.rest, self.conv(x), use_reentrant=self.reentrant)
        return checkpoint(lambda y: torch.relu(y) * 2, y, use_reentrant=self.reentrant)


def made(kind=Net, called=True):
    torch.manual_seed(1)
    net = kind()
    if called:
        net(x)
    return net


def trained(net):
    for _ in range(3):
        net.zero_grad()
        net(x).square().mean().backward()
    return [p.grad.norm() for p in net.parameters()]


def flops(net):
    with FlopCounterMode(display=False) as mode:
        net(x)
    return mode.get_total_flops()


def lazy():
    net = nn.Sequential(nn.LazyConv2d(8, 4, 2, 1), nn.LazyBatchNorm2d(), nn.ReLU())
    return [net(x).mean() for _ in range(3)], type(net[0])


def grown():
    net = made()
    net.rest.append(nn.Conv2d(4, 6, 3, 1, 1))
    net.rest.append(nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()))
    return [net(x).mean() for _ in range(3)]


def normed():
    net = made()
    nn.utils.parametrizations.spectral_norm(net.conv)
    nn.utils.spectral_norm(net.rest[2])
    return [net(x).mean() for _ in range(3)], type(net.conv).__name__


def backward_hook():
    net, seen = made(), []
    net.register_full_backward_hook(lambda m, i, o: seen.append((type(o[0]), o[0].sum())))
    net.register_forward_hook(lambda m, i, o: seen.append((type(o), o.stride())))
    for _ in range(3):
        net(x.clone().requires_grad_()).sum().backward()
    return seen


def forgotten():
    nets = [made(), made(nn.Sequential, called=False)]
    nets[1].append(nn.BatchNorm2d(3))
    nets[1](x)
    nets = [weakref.ref(net) for net in nets]
    gc.collect()
    return [net() for net in nets]


def threads():
    net, same = made().eval(), []
    expected = net(x)
    def work():
        same.extend(torch.allclose(net(x), expected, atol=1e-6) for _ in range(20))
    workers = [threading.Thread(target=work) for _ in range(3)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    return all(same), len(same), type(net.rest)


torch.distributed.init_process_group(
    "gloo", init_method=f"file://{tempfile.mkdtemp()}/store", rank=0, world_size=1)
x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
for called in (False, True):
    print(torch.jit.script(made(called=called).eval())(x).mean())
    traced = torch.jit.trace(made(called=called).eval(), x)
    print(traced.rest.original_name, traced(x).mean())
    print(torch.fx.symbolic_trace(made(called=called).eval())(x).mean())
    print(flops(made(called=called)))
    values = {name: p * 2 for name, p in made().named_parameters()}
    print(torch.func.functional_call(made(called=called), values, x).mean())
    print(torch.vmap(made(called=called).eval())(x[None]).mean())
    print(nn.DataParallel(made(called=called))(x).mean())
    net = made(called=called).eval()
    print(torch.compile(net, backend="eager", fullgraph=True)(x).mean(), net(x).mean())
    net.compile(backend="eager", fullgraph=True)
    print(net(x).mean())
    parallel = nn.parallel.DistributedDataParallel(made(called=called))
    print(trained(parallel))
for Checkpointed.reentrant in (False, True):
    print(trained(made(Checkpointed)))
print(trained(made()))
print(lazy(), grown(), normed())
print(backward_hook(), forgotten(), threads())
torch.distributed.destroy_process_group()
"""

ENDS = {
    "status": "import sys; print('out'); sys.exit(3)",
    "text": "import sys; sys.exit('no data')",
    "interrupt": "import atexit; atexit.register(print, 'bye'); raise KeyboardInterrupt",
    "error": """
import torch
from torch import nn
def step():
    try:
        net = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 1), nn.Flatten(), nn.ReLU(), Broken())
        net(torch.ones(1, 3, 4, 4))
    except KeyError as error:
        raise ValueError('bad step') from error
class Broken(nn.Module):
    def forward(self, x):
        return {}['x']
step()
""",
    "syntax": "print('a'\nx = = 2\n",
}


def run(
    folder: Path, *words: str, fused: bool, status: int = 0
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    way = ["-m", "pygan.run"] if fused else []
    result = subprocess.run(
        [sys.executable, *way, *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == status, result.stderr
    return result


def both(folder: Path, *words: str, status: int = 0) -> tuple[str, str]:
    """Standard error by python and by pygan.run, whose standard output is the same."""
    plain = run(folder, *words, fused=False, status=status)
    fused = run(folder, *words, fused=True, status=status)
    assert_same_text(plain.stdout, fused.stdout)
    return plain.stderr, fused.stderr


NUMBER = re.compile(r"-?\d+\.\d*(?:e[-+]\d+)?")


def assert_same_text(a: str, b: str) -> None:
    assert NUMBER.sub("#", a).splitlines() == NUMBER.sub("#", b).splitlines()
    numbers = [[float(n) for n in NUMBER.findall(text)] for text in (a, b)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-3)


def report(stderr: str) -> str:
    """What is printed at the end."""
    head, _, tail = stderr.partition("python -m pygan.run: what was fused\n")
    assert tail, head
    return tail


def test_a_dcgan_script(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "data.py").write_text(DATA)
    (tmp_path / "project" / "main.py").write_text(DCGAN)
    saved = []
    for fused in (False, True):
        (tmp_path / "out").mkdir()
        words = ("project/main.py", "--niter", "2", "--outf", "out", "--quiet")
        result = run(tmp_path, *words, fused=fused)
        saved.append((result, (tmp_path / "out").rename(tmp_path / f"out{fused:d}")))
    (plain, plain_files), (fused_run, fused_files) = saved
    assert_same_text(plain.stdout, fused_run.stdout)
    shown = report(fused_run.stderr)
    assert re.findall(r"^\w+.*", shown, re.M) == ["Generator (2 of them)", "Discriminator"]
    for name in (
        "main.1 BatchNorm2d + main.2 ReLU",
        "main.6 ConvTranspose2d",
        "main.3 BatchNorm2d",
    ):
        assert re.search(rf"{re.escape(name)}.* fused", shown)
    assert "BCELoss" not in shown
    names = sorted(path.name for path in plain_files.iterdir())
    assert names == sorted(path.name for path in fused_files.iterdir())
    a, b = (torch.load(f / "netG_epoch_1.pth") for f in (plain_files, fused_files))
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    a, b = (torch.load(f / "fake_samples_epoch_001.pth") for f in (plain_files, fused_files))
    assert type(a) is type(b) and a.stride() == b.stride()
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    for name in ("untrained.pth", "whole.pth"):
        # The pickles are the same, byte by byte; the numbers are in other parts of the file.
        a, b = (torch._C.PyTorchFileReader(str(f / name)) for f in (plain_files, fused_files))
        assert a.get_record("data.pkl") == b.get_record("data.pkl")


def test_a_wgan_script_with_layers_of_its_own_forward(tmp_path: Path) -> None:
    script = tmp_path / "wgan.py"
    script.write_text(WGAN)
    plain = run(tmp_path, "wgan.py", "a.pth", fused=False)
    fused = run(tmp_path, "wgan.py", "b.pth", fused=True)
    assert_same_text(plain.stdout, fused.stdout)
    shown = report(fused.stderr)
    assert "Generator (3 of them)\n" in shown
    assert "Critic\n" in shown
    assert "block.bn1 BatchNorm2d (with what follows it)" in shown
    a, b = torch.load(tmp_path / "a.pth"), torch.load(tmp_path / "b.pth")
    for name in ("G", "D"):
        assert list(a[name]) == list(b[name])
        for key in a[name]:
            torch.testing.assert_close(a[name][key], b[name][key], rtol=1e-3, atol=1e-4)


def test_what_else_scripts_do_with_networks(tmp_path: Path) -> None:
    (tmp_path / "surroundings.py").write_text(SURROUNDINGS)
    plain, fused = both(tmp_path, "surroundings.py")
    assert plain == ""
    assert re.search(r"rest.4.0 BatchNorm2d \+ rest.4.1 ReLU +fused", report(fused))


@pytest.mark.parametrize(
    ("end", "status"),
    [("status", 3), ("text", 1), ("interrupt", -signal.SIGINT), ("error", 1), ("syntax", 1)],
)
def test_a_script_ends_as_by_python(end: str, status: int, tmp_path: Path) -> None:
    (tmp_path / "end.py").write_text(ENDS[end])
    plain, fused = both(tmp_path, "end.py", status=status)
    said, _, shown = fused.partition("python -m pygan.run: what was fused\n")
    if end == "error":
        # In a fused network it is other lines that call the script's.
        calls = re.compile(r'  File ".*/(?:site-packages/torch|pygan)/.*\n(?:    .*\n)*')
        assert "0 Conv2d" in shown
        assert "pygan/run.py" not in said and "first_call" not in said
        assert calls.sub("", said) == calls.sub("", plain)
        assert said.endswith("ValueError: bad step\n")
    else:
        assert said == plain
    assert bool(shown) == (end != "syntax")


def test_a_saturated_discriminator_learns(tmp_path: Path) -> None:
    (tmp_path / "saturated.py").write_text(
        """
import torch
from torch import nn

for criterion in (nn.BCELoss(), nn.functional.binary_cross_entropy):
    logit = torch.tensor([80.0], requires_grad=True)
    criterion(nn.Sigmoid()(logit), torch.zeros(1)).backward()
    print(logit.grad.item())
"""
    )
    assert run(tmp_path, "saturated.py", fused=False).stdout.split() == ["0.0", "0.0"]
    assert run(tmp_path, "saturated.py", fused=True).stdout.split() == ["1.0", "1.0"]


def test_modules_run_as_by_python(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text("value = 4")
    (package / "__main__.py").write_text(
        "import sys\nfrom .part import value\n"
        "print(value, sys.argv, sys.path[0], __name__, __package__, __file__, __spec__.name)\n"
    )
    plain, fused = both(tmp_path, "-m", "package", "-m", "x", "--help")
    assert plain == ""
    assert report(fused) == "no network was called\n"


def test_nothing_is_said_when_quiet(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys; print(sys.argv)")
    result = run(tmp_path, "--quiet", "script.py", "--quiet", fused=True)
    assert (result.stdout, result.stderr) == ("['script.py', '--quiet']\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no script was given; python -m pygan.run script.py ... runs one"),
        (["/does/not/exist.py"], "/does/not/exist.py cannot be read (No such file or directory)"),
        (["--fast", "script.py"], "--fast is not a flag of python -m pygan.run"),
        (["-m"], "-m: expected one argument"),
        (["-m", "no.such.module"], "there is no module no.such.module that can run"),
        (["-m", "pygan.kernels"], "there is no module pygan.kernels that can run"),
        (["-"], "- cannot be read"),
        ([str(ROOT)], "is a folder; give the script in it that is to run"),
    ],
)
def test_bad_input(
    words: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m pygan.run: error: ")
    assert said in line


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "python -m pygan.run [--quiet] (script.py | -m MODULE)" in capsys.readouterr().out
