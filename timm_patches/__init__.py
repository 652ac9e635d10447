"""Adapt timm to devices and installs it does not expect.

Lives here: changes to what timm builds or imports. Imports torch and timm only, never effdet.
Importing this package does one thing: it makes `import timm` work beside a torchvision whose compiled library cannot be
loaded (see `timm_patches/torchvision_ops.py`). Everything else is applied by an explicit call.
"""

from . import torchvision_ops  # noqa: F401  (imported for its effect, and before any timm import)
