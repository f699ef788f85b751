"""Image sets that fit in memory: scikit-learn's digits, Fashion-MNIST, or a folder of images."""

import gzip
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from learnables.errors import DataError, need_extra

FASHION_CLASSES = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
#: Where Debian's package dataset-fashion-mnist puts the four IDX files.
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".webp"})
_TEST_NAMES = ("test", "val", "validation")
_SHOWN = 3  # how many names an error message lists


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Attributes:
        images: uint8 of shape ``(N, C, H, W)``.
        labels: int64 of shape ``(N,)``, indices into the set's classes.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A labelled image set with a fixed test split.

    Attributes:
        name: What it was loaded as.
        classes: Label → name.
        train: What is learned from.
        test: What is only measured on.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the training images, in [0, 1]."""
        x = self.train.images.double().div(255).transpose(0, 1).flatten(1)  # (C, N·H·W)
        return x.mean(1).float(), x.std(1).clamp_min(1e-3).float()


def load_images(
    name: str, folder: "Path | str | None" = None, *, image_size: int = 32, channels: int = 3
) -> ImageSet:
    """Load a whole image set into memory.

    Args:
        name: ``"digits"`` (1797 images of 8×8, shipped inside scikit-learn), ``"fashion-mnist"``
            (the four IDX files, gzipped or not), or the path of a folder of images.
        folder: Where the IDX files lie; Debian's place for them when None.
        image_size: Height and width that images of a folder are resized to, in pixels.
        channels: 1 for grey, 3 for colour; for images of a folder.

    Returns:
        Train and test images. Digits, and folders without a test part, are split 80 : 20 per
        class, always in the same way.

    Raises:
        DataError: The set is unknown, missing or damaged; a broken image is named.
        MissingExtraError: scikit-learn (digits) or pillow (folders) is not installed.

    Example:
        >>> digits = load_images("digits")
        >>> digits.shape, len(digits.train), len(digits.test)
        ((1, 8, 8), 1438, 359)
    """
    if name == "digits":
        return _digits()
    if name == "fashion-mnist":
        return _fashion_mnist(DEBIAN_FASHION if folder is None else Path(folder))
    if Path(name).is_dir():
        return _folder(Path(name), image_size, channels)
    raise DataError(
        "this data set is unknown",
        found=f"{name!r}, which is no folder here either",
        wanted="'digits', 'fashion-mnist', or the path of a folder of images",
        mend="learnables train vit --data digits",
    )


def stratified_split(labels: Tensor, fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices of a training and a test part that hold every class in the same proportion.

    Args:
        labels: int64 of shape ``(N,)``.
        fraction: Share of each class that goes to the test part, rounded, at least 1 image.
        seed: Which split; the same seed gives the same split everywhere.

    Returns:
        Two sorted, disjoint index tensors that cover ``range(N)``.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    test = []
    for label in range(int(labels.max()) + 1):
        members = order[labels[order] == label]
        test.append(members[: max(1, round(fraction * len(members)))])
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[torch.cat(test)] = True
    return (~is_test).nonzero().flatten(), is_test.nonzero().flatten()


def _split(name: str, images: Tensor, labels: Tensor, classes: Sequence[str]) -> ImageSet:
    train, test = stratified_split(labels, 0.2)
    return ImageSet(
        name,
        tuple(classes),
        Split(images[train], labels[train]),
        Split(images[test], labels[test]),
    )


# --- digits ------------------------------------------------------------------------------------


def _digits() -> ImageSet:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise need_extra("scikit-learn", "train", "the data set 'digits'") from error
    bunch = load_digits()
    levels = torch.from_numpy(bunch.images)[:, None]  # (1797, 1, 8, 8), 0 … 16
    images = (levels * (255 / 16)).round().to(torch.uint8)
    return _split(
        "digits", images, torch.from_numpy(bunch.target).long(), [str(d) for d in range(10)]
    )


# --- Fashion-MNIST: the IDX format of yann.lecun.com/exdb/mnist ----------------------------------


def _fashion_mnist(folder: Path) -> ImageSet:
    train = _idx_pair(folder, "train")
    test = _idx_pair(folder, "t10k")
    return ImageSet("fashion-mnist", FASHION_CLASSES, train, test)


def _idx_pair(folder: Path, prefix: str) -> Split:
    images = _read_idx(_find_idx(folder, f"{prefix}-images-idx3-ubyte"), dims=3)
    labels = _read_idx(_find_idx(folder, f"{prefix}-labels-idx1-ubyte"), dims=1)
    if len(images) != len(labels) or (len(labels) and int(labels.max()) > 9):
        raise DataError(
            "images and labels of a data set do not belong together",
            where=str(folder),
            found=f"{len(images)} images, {len(labels)} labels in {prefix}-*",
            wanted="as many labels as images, each in 0 … 9",
        )
    return Split(images[:, None].contiguous(), labels.long())


def _find_idx(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise DataError(
        "a file of Fashion-MNIST is missing",
        where=str(folder),
        found=f"neither {stem} nor {stem}.gz",
        wanted="the four IDX files of github.com/zalandoresearch/fashion-mnist",
        mend="apt-get install dataset-fashion-mnist, or name their folder with --data-dir",
    )


def _read_idx(path: Path, dims: int) -> Tensor:
    try:
        raw = path.read_bytes()
        data = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise _broken_idx(path, f"{type(error).__name__}: {error}") from error
    head = 4 + 4 * dims
    if len(data) < head or data[:4] != bytes([0, 0, 8, dims]):
        raise _broken_idx(path, f"{len(data)} bytes that begin with {data[:4].hex(' ')}")
    shape = struct.unpack(f">{dims}I", data[4:head])
    count = 1
    for size in shape:
        count *= size
    if len(data) - head != count:
        raise _broken_idx(path, f"{len(data) - head} bytes of data for shape {shape}")
    if count == 0:
        raise _broken_idx(path, f"no data: shape {shape}")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=head).view(shape)


def _broken_idx(path: Path, found: str) -> DataError:
    return DataError(
        "a data file is damaged",
        where=str(path),
        found=found,
        wanted="a whole IDX file of unsigned bytes",
        mend="fetch the file again",
    )


# --- a folder of images: root/CLASS/*.png, or root/train/CLASS/*.png and root/test/CLASS/*.png ---


def _folder(root: Path, image_size: int, channels: int) -> ImageSet:
    test_root = next((root / n for n in _TEST_NAMES if (root / n).is_dir()), None)
    if (root / "train").is_dir() and test_root is not None:
        classes = _class_names(root / "train")
        unknown = sorted(set(_class_names(test_root)) - set(classes))
        if unknown:
            raise DataError(
                "the test part has classes that the training part lacks",
                where=str(test_root),
                found=", ".join(unknown[:_SHOWN]),
                wanted=f"folders among: {', '.join(classes)}",
            )
        train = _read_folder(root / "train", classes, image_size, channels)
        return ImageSet(
            root.name, classes, train, _read_folder(test_root, classes, image_size, channels)
        )
    classes = _class_names(root)
    both = _read_folder(root, classes, image_size, channels)
    counts = both.labels.bincount(minlength=len(classes))
    if int(counts.min()) < 2:
        raise DataError(
            "a class has too few images to be split into training and test",
            where=str(root / classes[int(counts.argmin())]),
            found=f"{int(counts.min())} image",
            wanted="at least 2, or folders train/ and test/",
        )
    return _split(root.name, both.images, both.labels, classes)


def _class_names(root: Path) -> tuple[str, ...]:
    names = sorted(
        folder.name for folder in root.iterdir() if folder.is_dir() and any(_pictures(folder))
    )
    if not names:
        raise DataError(
            "the folder holds no images",
            where=str(root),
            found=f"no sub-folder with a file ending in {', '.join(sorted(IMAGE_SUFFIXES))}",
            wanted="one sub-folder per class: FOLDER/cat/1.png, FOLDER/dog/2.jpg",
        )
    return tuple(names)


def _pictures(folder: Path) -> Iterator[Path]:
    return (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())


def _read_folder(root: Path, classes: Sequence[str], image_size: int, channels: int) -> Split:
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted(_pictures(root / name)):
            images.append(_read_picture(path, image_size, channels))
            labels.append(label)
    return Split(torch.stack(images), torch.tensor(labels))


def _read_picture(path: Path, size: int, channels: int) -> Tensor:
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise need_extra("pillow", "train", "a folder of images") from error
    try:
        with Image.open(path) as opened:
            picture = opened.convert("RGB" if channels == 3 else "L")
            fitted = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            "an image cannot be read",
            where=str(path),
            found=f"{type(error).__name__}: {error}",
            wanted=f"a whole {path.suffix.lstrip('.').upper()} file",
            mend="replace the file or delete it",
        ) from error
    flat = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
    return flat.view(size, size, channels).permute(2, 0, 1).contiguous()
