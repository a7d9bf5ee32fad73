"""Data of the demo: the digits, folders of images, and the split."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff_kernels.demo.data import load_digits, load_folder, stratified_split


@pytest.fixture(scope="module")
def digits():
    return load_digits()


def make_folder(root, classes, each=40, size=(20, 14), grey=False):
    rng = np.random.default_rng(0)
    for name in classes:
        folder = root / name if name else root
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(each):
            pixels = rng.integers(0, 256, (size[1], size[0]) if grey else (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:03d}.png")
    return root


def test_digits_have_the_scale_the_networks_expect(digits):
    assert digits.images.shape == (1797, 1, 8, 8)
    assert digits.num_classes == 10
    assert abs(float(digits.images.mean())) < 1e-5
    assert abs(float(digits.images.std()) - 0.5) < 1e-4


def test_pixels_come_back(digits):
    pixels = digits.to_pixels(digits.images) * 16
    assert float((pixels - pixels.round()).abs().max()) < 1e-4
    assert float(pixels.max()) == 16
    assert float(pixels.min()) == 0


@pytest.mark.parametrize("seed", [0, 3])
def test_a_third_of_every_class_is_held_out_and_matched_in_the_training_part(digits, seed):
    split = stratified_split(digits.labels, seed)
    counts = digits.labels.bincount()
    assert torch.equal(digits.labels[split.held_out].bincount(), counts // 3)
    assert torch.equal(digits.labels[split.matched].bincount(), counts // 3)
    assert sorted(torch.cat((split.train, split.held_out)).tolist()) == list(range(1797))
    assert set(split.matched.tolist()) <= set(split.train.tolist())
    assert torch.equal(split.train, stratified_split(digits.labels, seed).train)


def test_another_seed_splits_otherwise(digits):
    assert not torch.equal(stratified_split(digits.labels, 0).held_out, stratified_split(digits.labels, 1).held_out)


def test_subfolders_are_classes(tmp_path):
    data = load_folder(make_folder(tmp_path, ["cat", "dog"]), size=12)
    assert data.images.shape == (80, 3, 12, 12)
    assert data.class_names == ("cat", "dog")
    assert data.labels.bincount().tolist() == [40, 40]
    assert abs(float(data.images.std()) - 0.5) < 1e-3


def test_a_flat_folder_is_one_class_and_grey_stays_grey(tmp_path):
    data = load_folder(make_folder(tmp_path, [""], each=70, grey=True), size=8)
    assert data.images.shape == (70, 1, 8, 8)
    assert data.num_classes == 1


def test_the_centre_is_cropped(tmp_path):
    make_folder(tmp_path, [""], each=64)
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).save(tmp_path / "000.png")
    data = load_folder(tmp_path, size=8)
    torch.testing.assert_close(data.to_pixels(data.images)[0], torch.ones(3, 8, 8))


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must be a folder of images, got .* which is no folder"):
        load_folder(tmp_path / "missing")
    make_folder(tmp_path / "few", [""], each=5)
    with pytest.raises(ValueError, match=r"at least \d+ images, got 5 in"):
        load_folder(tmp_path / "few")
    make_folder(tmp_path / "mixed", ["a", ""], each=40)
    with pytest.raises(ValueError, match="40 images beside them"):
        load_folder(tmp_path / "mixed")
    make_folder(tmp_path / "lonely", ["a"], each=70)
    make_folder(tmp_path / "lonely", ["b"], each=2)
    with pytest.raises(ValueError, match="images of each class, got 2 of 'b'"):
        load_folder(tmp_path / "lonely")
    with pytest.raises(ValueError, match="size must be a multiple of 4, at least 8, got 10"):
        load_folder(tmp_path / "mixed", size=10)


@pytest.mark.parametrize(("suffix", "stored"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("pgm", "<u2")])
def test_sixteen_bits_keep_their_range(tmp_path, suffix, stored):
    values = np.random.default_rng(0).integers(0, 65536, (64, 8, 8)).astype(stored)
    for index, value in enumerate(values):
        Image.fromarray(value).save(tmp_path / f"{index:02d}.{suffix}")
    data = load_folder(tmp_path, size=8)
    expected = torch.from_numpy(values.astype(np.float32) / 65535).unsqueeze(1)
    torch.testing.assert_close(data.to_pixels(data.images), expected)


def test_sixteen_bits_and_eight_have_one_white(tmp_path):
    for index in range(32):
        Image.new("RGB", (8, 8), (255, 0, 128)).save(tmp_path / f"{index:02d}.png")
        Image.fromarray(np.full((16, 16), 65535, np.uint16)).save(tmp_path / f"{index + 32}.png")
    data = load_folder(tmp_path, size=8)
    assert data.images.shape == (64, 3, 8, 8)
    torch.testing.assert_close(data.to_pixels(data.images)[[0, 32], :, 0, 0], torch.tensor([[1, 0, 128 / 255], [1, 1, 1]]))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    make_folder(tmp_path, [""], each=70)
    whole = (tmp_path / "007.png").read_bytes()
    for content in (b"no image", whole[: len(whole) // 2]):
        (tmp_path / "007.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"data must hold images that can be read, got '.*007\.png': "):
            load_folder(tmp_path, size=8)
    (tmp_path / "007.png").unlink()
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "007.tif")
    with pytest.raises(ValueError, match=r"data must hold images of 8 or 16 bits a channel, got '.*007\.tif' of 32"):
        load_folder(tmp_path, size=8)


def test_images_that_are_all_equal_are_refused(tmp_path):
    for index in range(64):
        Image.new("L", (8, 8), 7).save(tmp_path / f"{index}.png")
    with pytest.raises(ValueError, match="every pixel"):
        load_folder(tmp_path, size=8)
