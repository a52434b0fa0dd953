"""The sample command: what it draws, from what, and what it writes."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training import train

from pygan import checkpoint, sample
from pygan.errors import UserError
from pygan.models import Discriminator, Generator, dcgan
from pygan.sample import generate, grid, interpolations, latents, main, slerp


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two short epochs on images of its own."""
    folder = tmp_path_factory.mktemp("run")
    np.save(folder / "images.npy", np.random.default_rng(0).integers(0, 256, (64, 16, 16), "u1"))
    assert train(f"--data={folder / 'images.npy'}", "--epochs=2", f"--outf={folder / 'run'}") == 0
    return folder / "run"


def draw(out: Path, source: Path, *flags: str) -> np.ndarray:
    assert main([str(source), "--out", str(out), "--device=cpu", *flags]) == 0
    return np.load(out)


def expected(run: Path, count: int, seed: int = 0) -> np.ndarray:
    """What the newest generator of `run` draws, by plain torch."""
    generator = Generator(16, 1, 8, 8).eval()
    generator.load_state_dict(torch.load(run / "netG_epoch_1.pth", weights_only=True))
    with torch.no_grad():
        images = generator(latents(count, 8, seed))
    return ((images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for pixels that another order of summation rounds the other way."""
    difference = np.abs(a.astype(int) - b.astype(int))
    return a.shape == b.shape and difference.max() <= 1 and (difference > 0).mean() < 0.01


@pytest.mark.parametrize(
    "name", [".", "netG_epoch_1.safetensors", "netG_epoch_1.pth"], ids=["run", "safetensors", "pth"]
)
def test_every_source_gives_the_same_images(run: Path, tmp_path: Path, name: str) -> None:
    images = draw(tmp_path / "a.npy", run / name, "-n", "10")
    assert images.dtype == np.uint8
    assert close(images, expected(run, 10))


def test_the_newest_generator_of_a_run_is_taken(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    # By number, not by name: "10" sorts before "9".
    for epoch, value in ((9, 0.0), (10, 1.0)):
        generator = Generator(16, 1, 8, 8)
        with torch.no_grad():
            generator.main[-2].weight.zero_()
        state = {**generator.state_dict(), "main.6.weight": torch.full((8, 1, 4, 4), value)}
        torch.save(state, copy / f"netG_epoch_{epoch}.pth")
    assert checkpoint.find_generator(copy).name == "netG_epoch_10.pth"
    assert draw(tmp_path / "a.npy", copy, "-n", "4").mean() > 128


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_architecture_is_found_in_the_shapes(size: int, channels: int) -> None:
    arguments = {"image_size": size, "channels": channels, "nz": 5, "ngf": 2}
    state = Generator(**arguments).state_dict()
    assert checkpoint.dcgan_arguments(state) == arguments
    assert checkpoint.dcgan_arguments(Discriminator(size, channels, 2).state_dict()) is None


def test_a_file_of_the_well_known_example_saved_under_data_parallel(
    run: Path, tmp_path: Path
) -> None:
    state = torch.load(run / "netG_epoch_1.pth", weights_only=True)
    old = OrderedDict(
        (f"module.{name}", value)
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    )
    torch.save(old, tmp_path / "netG_epoch_24.pth")
    images = draw(tmp_path / "a.npy", tmp_path / "netG_epoch_24.pth", "-n", "3")
    assert close(images, expected(run, 3))


def test_an_image_depends_on_its_number_and_the_seed_alone(run: Path, tmp_path: Path) -> None:
    many = draw(tmp_path / "a.npy", run, "-n", "300", "--seed=5")
    assert close(many[:7], draw(tmp_path / "b.npy", run, "-n", "7", "--seed=5"))
    assert close(many, draw(tmp_path / "c.npy", run, "-n", "300", "--seed=5", "--batch-size=11"))
    assert close(many, expected(run, 300, seed=5))
    assert not close(many[:7], draw(tmp_path / "d.npy", run, "-n", "7", "--seed=6"))


def test_batch_statistics_are_those_of_a_whole_batch(run: Path, tmp_path: Path) -> None:
    generator = Generator(16, 1, 8, 8)
    generator.load_state_dict(torch.load(run / "netG_epoch_1.pth", weights_only=True))
    with torch.no_grad():
        images = generator(latents(64, 8, 0)).permute(0, 2, 3, 1)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8).numpy()
    assert close(draw(tmp_path / "a.npy", run, "-n", "64", "--bn=batch"), pixels)
    assert close(draw(tmp_path / "b.npy", run, "-n", "5", "--bn=batch"), pixels[:5])
    assert not close(pixels, expected(run, 64))


@pytest.mark.parametrize("bn", ["eval", "batch"])
@pytest.mark.parametrize("training", [True, False])
def test_drawing_leaves_the_generator_as_it_was(bn: str, training: bool) -> None:
    generator = dcgan(16, 1, 8, 8, 8)[0].train(training)
    generator(torch.randn(4, 8, 1, 1))
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    generate(generator, torch.randn(4, 8, 1, 1), bn=bn)
    assert generator.training is training
    for name, value in generator.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_interpolation_runs_from_latent_to_latent(run: Path, tmp_path: Path) -> None:
    z = interpolations(20, 8, seed=3)
    ends = latents(6, 8, seed=3)
    assert z.shape == (20, 8, 1, 1)
    for row in range(2):
        torch.testing.assert_close(z[8 * row], ends[2 * row])
        torch.testing.assert_close(z[8 * row + 7], ends[2 * row + 1])
    torch.testing.assert_close(z[16], ends[4])
    steps = (z[1:8] - z[:7]).flatten(1).norm(dim=1)
    assert float(steps.max()) < 0.5 * float((ends[1] - ends[0]).norm())
    images = draw(tmp_path / "a.npy", run, "-n", "16", "--interpolate", "--seed=3")
    assert close(images[[0, 7, 8, 15]], expected(run, 4, seed=3))


def test_slerp_stays_on_the_sphere() -> None:
    start, end = torch.nn.functional.normalize(torch.randn(2, 50), dim=1) * 7
    path = slerp(start, end, torch.linspace(0, 1, 9))
    torch.testing.assert_close(path.norm(dim=1), torch.full((9,), 7.0))
    angles = torch.acos((path[:-1] * path[1:]).sum(1) / 49)
    torch.testing.assert_close(angles, angles[:1].expand(8), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(slerp(start, start, torch.tensor([0.3]))[0], start)


def test_a_grid_has_every_image_in_its_place() -> None:
    images = np.random.default_rng(0).integers(1, 256, (10, 4, 4, 3), np.uint8)
    picture = grid(images, columns=8, gap=2)
    assert picture.shape == (2 * 6 + 2, 8 * 6 + 2, 3)
    assert np.array_equal(picture[2:6, 2:6], images[0])
    assert np.array_equal(picture[2:6, 44:48], images[7])
    assert np.array_equal(picture[8:12, 8:12], images[9])
    assert picture[8:, 14:].max() == 0
    assert grid(images[:3]).shape == (8, 3 * 6 + 2, 3)


def test_a_grid_a_folder_and_an_array_hold_the_same_images(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = draw(tmp_path / "a.npy", run, "-n", "10", "--batch-size=4")
    for out in ("grid.png", "new/folder/"):
        assert main([str(run), "-n", "10", "--batch-size=4", "--out", f"{tmp_path}/{out}"]) == 0
    assert "10 images of" in capsys.readouterr().out
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), grid(images)[:, :, 0])
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert [file.name for file in files] == [f"{number:06d}.png" for number in range(10)]
    for file, image in zip(files, images, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), image[:, :, 0])
    assert {path.name for path in tmp_path.iterdir()} == {"a.npy", "grid.png", "new"}
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"folder"}


def test_colour_is_written_as_colour(tmp_path: Path) -> None:
    torch.save(Generator(16, 3, 4, 2).state_dict(), tmp_path / "netG.pth")
    assert main([str(tmp_path / "netG.pth"), "-n", "2", "--out", str(tmp_path / "a.png")]) == 0
    assert Image.open(tmp_path / "a.png").mode == "RGB"


@pytest.mark.parametrize("out", ["grid.png", "folder/", "a.npy"])
def test_a_failure_half_way_leaves_nothing(
    run: Path, tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = sample.generate, []

    def failing(*arguments: object, **keywords: object) -> np.ndarray:
        calls.append(None)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(sample, "generate", failing)
    target = tmp_path / "out"
    target.mkdir()
    assert main([str(run), "-n", "20", "--batch-size=4", "--out", f"{target}/{out}"]) == 1
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("source", "flags", "said"),
    [
        ("missing", "", "cannot be read (No such file or directory)"),
        ("empty", "", "holds no netG_epoch_*.safetensors or .pth"),
        ("text.pth", "", "is damaged or holds more than weights"),
        ("text.safetensors", "", "is damaged or holds more than weights"),
        ("pickle.pth", "", "is damaged or holds more than weights"),
        ("netD.pth", "", "does not hold a DCGAN generator (its first tensors are main.0.weight"),
        ("code.pth", "", "is damaged or holds more than weights"),
        ("packed.pth", "", "it unpacks to"),
        ("endless.pth", "", "holds something else than named tensors"),
        ("sparse.pth", "", "holds something else than named tensors"),
        ("empty.pth", "", "does not hold a DCGAN generator"),
        ("number.pth", "", "does not hold a DCGAN generator"),
        ("huge.safetensors", "", "has main.0.weight of shape [4, 4, 4, 4], but this network"),
        ("strange.safetensors", "", "does not hold a DCGAN generator"),
        ("wide.safetensors", "", "with nz 4 and ngf 268435456, which has more weights than any"),
        ("netG.pth", "-n 2147483647", "2,147,483,647 images need"),
        ("netG.pth", "-n 1 --batch-size 2147483647 --bn batch", "GiB are free"),
        ("netG.pth", "--out a.psd", "has a suffix no picture format has"),
        ("netG.pth", "--out a.xbm", ".xbm does not take a picture of"),
        ("netG.pth", "-n 8000 --out a.webp", ".webp does not take a picture of 146 x 18002"),
        ("netG.pth", "-n 0", "-n: 0 is out of range"),
        ("netG.pth", "--seed -1", "--seed: -1 is out of range"),
        ("netG.pth", "--bn train", "--bn: invalid choice"),
        ("netG.pth", "--batch-size 0", "--batch-size: 0 is out of range"),
        ("netG.pth", "--out a.xyz", "has a suffix no picture format has"),
        ("netG.pth", f"--out {'9' * 300}.png", "(File name too long); give another --out"),
        ("netG.pth", "--out full", "is not empty"),
        ("netG.pth", "--out text.pth/", "is a file, not a folder"),
        ("netG.pth", "--out text.pth/a.png", "is not a folder"),
        ("netG.pth", "--out /proc/a.png", "cannot be written"),
        ("netG.pth", "--colour", "--colour is not a flag"),
    ],
)
def test_mistakes(
    tmp_path: Path,
    source: str,
    flags: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "full"):
        Path(name).mkdir()
    Path("full", "mine.txt").write_text("mine")
    for name in ("text.pth", "text.safetensors"):
        Path(name).write_text("hello")
    torch.save({"path": Path("x")}, "pickle.pth")
    torch.save({"main.0.weight": Program()}, "code.pth")
    with zipfile.ZipFile("packed.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", bytes(1 << 20))
        declared = archive.infolist()[0]
        declared.file_size = 2**50
    weights = Generator(16, 1, 4, 2).state_dict()
    first = weights["main.0.weight"]
    for name, tensor in {
        "endless": torch.ones(1).expand(10**9, *first.shape[1:]),
        "sparse": first.to_sparse(),
        "empty": first[:0],
    }.items():
        torch.save({**weights, "main.0.weight": tensor}, f"{name}.pth")
    torch.save({f"main.{'9' * 5000}.weight": first}, "number.pth")
    altered = {"huge": {"nz": 10**9}, "strange": {"nz": "4"}, "wide": {"ngf": 2**28}}
    for name, change in altered.items():
        arguments = {"image_size": 16, "channels": 1, "nz": 4, "ngf": 2, **change}
        about = {"kind": "weights", "network": "dcgan.Generator", "arguments": arguments}
        Path(f"{name}.safetensors").write_bytes(checkpoint._pack(weights, about))
    torch.save(Discriminator(16, 1, 4).state_dict(), "netD.pth")
    torch.save(Generator(16, 1, 4, 2).state_dict(), "netG.pth")
    before = sorted(tmp_path.rglob("*"))
    assert main([source, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("python -m pygan.sample: error: ")
    assert said in error
    assert sorted(tmp_path.rglob("*")) == before


class Program:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("made",)


@pytest.mark.parametrize("whole", [True, False])
def test_names_of_tensors_break_no_line(whole: bool, tmp_path: Path) -> None:
    state = Generator(16, 1, 8, 8).state_dict() if whole else {}
    torch.save(dict(state) | {"main.\n9": torch.zeros(1)}, tmp_path / "it.pth")
    with pytest.raises(UserError, match=r"main\.\\n9") as raised:
        checkpoint.load_generator(tmp_path / "it.pth")
    assert "\n" not in str(raised.value)


def test_weights_with_a_flipped_bit_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((run / "netG_epoch_1.safetensors").read_bytes())
    data[-100] ^= 1
    (tmp_path / "netG.safetensors").write_bytes(data)
    assert main([str(tmp_path / "netG.safetensors"), "--out", str(tmp_path / "a.png")]) == 2
    assert "its digest does not match its content" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
