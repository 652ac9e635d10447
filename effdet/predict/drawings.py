"""Draw what is found into files: an image each, or a video of a video's frames."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from effdet.checkpoint.io import replacing
from effdet.report.draw import draw_detections

from .detections import Detections
from .sources import Item
from .video import VideoWriter

_PILLOW_FORMATS: Mapping[str, tuple[str, dict[str, Any]]] = {"png": ("PNG", {}), "jpg": ("JPEG", {"quality": 90})}


class Drawings:
    """Drawn images in a folder."""

    def __init__(
        self, folder: Path, kind: str, colors: Mapping[str, Any] | None = None, save_video: bool = False
    ) -> None:
        """Say where and how.

        Args:
            folder: for the files.
            kind: of image files, `png` or `jpg`.
            colors: of the classes, by name.
            save_video: write a video's frames into a video, `.mp4`, and not each into a file.
        """
        self._folder, self._kind, self._colors, self._save_video = folder, kind, colors, save_video
        self._video: VideoWriter | None = None

    def add(self, item: Item, image: Image.Image, found: Detections) -> Path:
        """Draw an image and return the file."""
        drawn = draw_detections(image, found.boxes_xyxy, found.names, found.scores.tolist(), self._colors)
        if self._save_video and item.frame is not None:
            return self._add_frame(item, drawn)
        name, options = _PILLOW_FORMATS[self._kind]
        place = self._folder / f"{item.stem}.{self._kind}"
        with replacing(place) as temporary:
            drawn.save(temporary, name, **options)
        return place

    def _add_frame(self, item: Item, drawn: Image.Image) -> Path:
        place = self._folder / f"{Path(item.stem).parent}.mp4"
        if self._video is None or self._video.path != place:
            self.close()
            self._video = VideoWriter(place, drawn.size)
        self._video.add(drawn, item.time_s or 0.0)
        return place

    def close(self) -> None:
        """End the present video."""
        if self._video is not None:
            video, self._video = self._video, None
            video.close()
