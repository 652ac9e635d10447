"""What stands for no class in labels, and the IoU that makes an anchor positive: plain numbers, for every room.

Two kinds of label meet here. A row of a target has in `cls` its class_idx + 1, so 1..K; an anchor's class target is the
class_idx, 0..K-1.
"""

from __future__ import annotations

PADDING = -1  # in `cls`: a slot without an object
BACKGROUND = -1  # of an anchor: no class; another idea than PADDING that has the same value
IGNORE = -2  # of both: a region whose content is unknown, and an anchor that the loss leaves out for one

MATCH_IOU = 0.5  # an anchor is positive from this IoU with an object. Source: RetinaNet, section 4
