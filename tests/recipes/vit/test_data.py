import gzip
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learnables.errors import DataError, MissingExtraError
from learnables.recipes.vit.data import DEBIAN_FASHION, load_images, stratified_split


def test_digits_are_whole_and_split_the_same_way_every_time():
    digits = load_images("digits")
    assert digits.shape == (1, 8, 8)
    assert digits.train.images.dtype == torch.uint8
    assert int(digits.train.images.max()) == 255
    share = (
        digits.test.labels.bincount()
        / torch.cat([digits.train.labels, digits.test.labels]).bincount()
    )
    torch.testing.assert_close(share, torch.full((10,), 0.2), atol=0.003, rtol=0)
    # The published figures are measured on exactly this split.
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert digits.test.labels[:10].tolist() == load_images("digits").test.labels[:10].tolist()
    assert int(digits.test.images.sum()) == 1778125


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60),
    fraction=st.floats(0.05, 0.9),
    seed=st.integers(0, 99),
)
def test_split_covers_everything_once_and_every_class_in_proportion(labels, fraction, seed):
    labels = torch.tensor(labels)
    train, test = stratified_split(labels, fraction, seed)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    for label in labels.unique():
        count = int((labels == label).sum())
        assert int((labels[test] == label).sum()) == max(1, round(fraction * count))


def test_moments_are_those_of_the_training_images():
    digits = load_images("digits")
    mean, std = digits.moments()
    x = digits.train.images.double() / 255
    torch.testing.assert_close(mean.double(), x.mean().view(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(std.double(), x.std().view(1), atol=1e-6, rtol=0)


# --- Fashion-MNIST ------------------------------------------------------------------------------


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.numpy().tobytes()


@pytest.fixture
def fashion(tmp_path):
    for prefix, count in (("train", 6), ("t10k", 4)):
        pixels = torch.arange(count * 28 * 28).remainder(256).to(torch.uint8).view(count, 28, 28)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        labels = torch.arange(count).to(torch.uint8)
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def test_idx_files_are_read_gzipped_or_not(fashion):
    images = load_images("fashion-mnist", fashion)
    assert images.train.images.shape == (6, 1, 28, 28)
    assert images.train.images.flatten()[:3].tolist() == [0, 1, 2]
    assert images.test.labels.tolist() == [0, 1, 2, 3]
    assert images.classes[9] == "Ankle boot"


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian_is_found_where_the_package_puts_it():
    images = load_images("fashion-mnist")
    assert (len(images.train), len(images.test)) == (60_000, 10_000)
    assert images.train.labels.bincount().tolist() == [6000] * 10


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "t10k-labels-idx1-ubyte").unlink(), "t10k-labels-idx1-ubyte.gz"),
        (lambda f: (f / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01"), "4 bytes"),
        (lambda f: (f / "t10k-labels-idx1-ubyte").write_bytes(b"PNG-------"), "50 4e 47 2d"),
        (
            lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(
                (f / "train-images-idx3-ubyte.gz").read_bytes()[:-9]
            ),
            "train-images-idx3-ubyte.gz",
        ),
        (
            lambda f: (f / "train-images-idx3-ubyte.gz").write_bytes(
                gzip.compress(idx(torch.zeros(6, 28, 28, dtype=torch.uint8))[:-1])
            ),
            r"4703 bytes of data for shape \(6, 28, 28\)",
        ),
        (
            lambda f: (f / "t10k-labels-idx1-ubyte").write_bytes(idx(torch.zeros(3).byte())),
            "4 images, 3 labels",
        ),
    ],
)
def test_missing_or_damaged_idx_file_is_named(fashion, damage, said):
    damage(fashion)
    with pytest.raises(DataError, match=said):
        load_images("fashion-mnist", fashion)


# --- folders ------------------------------------------------------------------------------------


def paint(path, color, size=(20, 14)):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


@pytest.fixture
def pets(tmp_path):
    for i in range(5):
        paint(tmp_path / "cat" / f"{i}.png", (200, 0, 0))
        paint(tmp_path / "dog" / "deeper" / f"{i}.JPG", (0, 0, 200))
    (tmp_path / "dog" / "notes.txt").write_text("not an image")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_folder_is_read_resized_and_split(pets):
    images = load_images(str(pets), image_size=16)
    assert images.classes == ("cat", "dog")
    assert images.shape == (3, 16, 16)
    assert (len(images.train), len(images.test)) == (8, 2)
    cat = images.train.images[images.train.labels == 0][0]
    assert cat[:, 8, 8].tolist() == [200, 0, 0]
    assert load_images(str(pets), channels=1).shape == (1, 32, 32)


def test_train_and_test_folders_are_kept_apart(tmp_path):
    for part, count in (("train", 3), ("val", 2)):
        for i in range(count):
            paint(tmp_path / part / "a" / f"{i}.png", (i, i, i))
            paint(tmp_path / part / "b" / f"{i}.png", (i, i, i))
    images = load_images(str(tmp_path))
    assert (len(images.train), len(images.test)) == (6, 4)
    paint(tmp_path / "val" / "c" / "0.png", (0, 0, 0))
    with pytest.raises(DataError, match="classes that the training part lacks") as caught:
        load_images(str(tmp_path))
    assert caught.value.found == "c"


@pytest.mark.parametrize("damage", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", None])
def test_one_broken_image_is_named(pets, damage):
    victim = pets / "cat" / "3.png"
    victim.write_bytes(victim.read_bytes()[:-30] if damage is None else damage)
    with pytest.raises(DataError, match="an image cannot be read") as caught:
        load_images(str(pets))
    assert caught.value.where == str(victim)


def test_folder_without_images_and_class_with_one_are_refused(tmp_path, pets):
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        load_images(str(tmp_path / "bare"))
    paint(pets / "fish" / "1.png", (0, 0, 0))
    with pytest.raises(DataError, match="too few images") as caught:
        load_images(str(pets))
    assert caught.value.where == str(pets / "fish")


def test_unknown_set_is_refused_with_the_known_ones():
    with pytest.raises(DataError) as caught:
        load_images("cifar")
    assert str(caught.value) == (
        "this data set is unknown\n"
        "  found: 'cifar', which is no folder here either\n"
        "  wanted: 'digits', 'fashion-mnist', or the path of a folder of images\n"
        "  mend: learnables train vit --data digits"
    )


def test_missing_packages_are_named_with_their_extra(monkeypatch, pets):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'learnables\[train\]'"):
        load_images("digits")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match="pillow"):
        load_images(str(pets))
