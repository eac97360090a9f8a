"""ImageNet (Russakovsky et al., 2015), or any part of it, from its usual folders `train` and `val`."""

from typing import Any

from baton.data.image_folder import ImageFolder


class ImageNet(ImageFolder):
    """ImageNet: `root/train/<class>/*.JPEG` and `root/val/<class>/*.JPEG`; the classes are the folders' names.

    Training cuts out a random area and flips; evaluation resizes the shorter side to 256 and cuts out the centre.
    The validation split is the test split as well, since the true one has no labels; `val_size` takes validation
    samples from the training split instead.

    Args:
        root: folder that holds `train` and `val`.
        image_size: side of the square images, in pixels.
        scale: range of the area of a random crop, as a fraction of the image.
        resize: length of the shorter side before the centre is cut out, in pixels; None: 256 / 224 of `image_size`.
        num_workers: processes that decode.
        kwargs: see `ImageFolder`.
    """

    def __init__(
        self,
        root: str = "data/imagenet",
        image_size: int = 224,
        scale: tuple[float, float] = (0.08, 1.0),
        resize: int | None = None,
        num_workers: int = 8,
        **kwargs: Any,
    ) -> None:
        resize = round(image_size * 256 / 224) if resize is None else resize
        super().__init__(
            root=root, image_size=image_size, scale=scale, resize=resize, num_workers=num_workers, **kwargs
        )

    def prepare_data(self) -> None:
        """Check that the folders are there; ImageNet cannot be downloaded without an account."""
        if not all((self.root / split).is_dir() for split in ("train", "val")):
            raise FileNotFoundError(
                f"ImageNet needs {self.root}/train/<class>/*.JPEG and {self.root}/val/<class>/*.JPEG; "
                "download ILSVRC2012 from image-net.org and unpack one folder a class."
            )

    def sources(self) -> tuple[Any, Any, Any]:
        """Return the training split, and the validation split as validation and test."""
        self.prepare_data()
        train, val = self._split("train"), self._split("val")
        return train, val, val
