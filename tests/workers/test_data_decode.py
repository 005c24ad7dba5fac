"""Pictures of every mode that a folder of photographs may hold, against Pillow."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images

from workers.data import DataError, Unreadable
from workers.data.decode import read_rgb, shrink

CHINA, FLOWER = (Image.fromarray(each).resize((213, 142)) for each in load_sample_images().images)


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.fixture(params=["simplejpeg", "Pillow"], autouse=True)
def decoder(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr("workers.data.decode.simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 97}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_decode_to_the_pixels_of_pillow(tmp_path, mode, options):
    path = tmp_path / "a.jpg"
    CHINA.convert(mode).save(path, **options)
    got = read_rgb(path)
    assert torch.equal(got, pixels(Image.open(path)))
    assert got.dtype == torch.uint8
    assert got.stride() == (1, 3 * 213, 3)  # what crops are fastest on


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_modes_of_other_files(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    CHINA.convert(mode).save(path)
    assert torch.equal(read_rgb(path), pixels(Image.open(path).convert("RGBA")))


@pytest.mark.parametrize("transparency", [3, bytes(range(200, 256))])
def test_a_palette_with_transparency_keeps_its_colours(tmp_path, transparency):
    path, flat = tmp_path / "a.png", CHINA.convert("P")
    flat.save(path, transparency=transparency)
    assert torch.equal(read_rgb(path), pixels(flat))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_the_upper_eight(tmp_path, suffix):
    values = (np.arange(64 * 48).reshape(48, 64) * 21).astype(np.uint16)
    dark = values // 300  # stays dark: no stretching by what a picture happens to hold
    for name, each in (("a", values), ("b", dark)):
        path = tmp_path / f"{name}.{suffix}"
        Image.fromarray(each).save(path)
        assert torch.equal(read_rgb(path), torch.from_numpy((each >> 8).astype(np.uint8)).expand(3, -1, -1))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, orientation, suffix):
    path, exif = tmp_path / f"a.{suffix}", Image.Exif()
    exif[0x0112] = orientation
    CHINA.save(path, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    assert torch.equal(read_rgb(path), pixels(upright))
    assert upright.size == ((213, 142) if orientation < 5 else (142, 213))


def damaged() -> dict[str, bytes]:
    def encode(form: str) -> bytes:
        file = io.BytesIO()
        CHINA.save(file, form)
        return file.getvalue()

    jpeg, png, tiff = encode("JPEG"), encode("PNG"), encode("TIFF")
    return {
        "empty.jpg": b"",
        "text.jpg": b"<html>404 not found</html>",
        "head.jpg": jpeg[:200],
        "half.jpg": jpeg[: len(jpeg) // 2],
        "nearly.jpg": jpeg[:-2],
        "half.png": png[: len(png) // 2],
        "half.tif": tiff[: len(tiff) // 2],
        "renamed.jpg": png[:1000],
    }


@pytest.mark.parametrize("name", damaged())
def test_a_damaged_file_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(damaged()[name])
    with pytest.raises(Unreadable) as error:
        read_rgb(path)
    assert str(error.value).startswith(f"{path}: not a readable picture (")
    assert "\n" not in str(error.value)
    assert "BytesIO" not in str(error.value)


def test_other_things_that_are_no_pictures(tmp_path):
    with pytest.raises(Unreadable, match=r"gone\.jpg: no such file"):
        read_rgb(tmp_path / "gone.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(Unreadable, match=r"folder\.jpg: Is a directory"):
        read_rgb(tmp_path / "folder.jpg")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(Unreadable, match="no known range"):
        read_rgb(tmp_path / "f.tif")


def test_a_failing_disk_is_no_damaged_picture(monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(DataError, match=r"a\.jpg: Input/output error") as error:
        read_rgb(Path("a.jpg"))
    assert not isinstance(error.value, Unreadable)


def test_a_suffix_may_lie(tmp_path):
    CHINA.save(tmp_path / "a.jpg", "PNG")  # ImageNet has one of these
    assert torch.equal(read_rgb(tmp_path / "a.jpg"), pixels(CHINA))


def test_shrinking():
    image = pixels(FLOWER)
    small = shrink(image, 64)
    assert small.shape == (3, 64, 96)
    assert small.stride() == (1, 3 * 96, 3)
    assert shrink(image, 142) is image
    assert shrink(image, 1000) is image
    reference = pixels(FLOWER.resize((96, 64), Image.Resampling.BICUBIC)).int()
    assert (small - reference).abs().max() <= 2
