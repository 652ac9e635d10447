"""Whether this package's files are its own: the distribution effdet has files of the same names, and pip mixes them.

Which one comes last wins, and uninstalling either deletes what both have; pip says nothing. No import of ours here: it
runs first.
"""

import sys
import warnings
from pathlib import Path

_REMEDY = "Remove both and install one: pip uninstall effdet effdet-ascend, then pip install effdet-ascend"


def check_installation() -> None:
    """Warn when the distribution effdet lies in the same folder.

    Raises:
        ImportError: files of this package are effdet's, or gone with it.
    """
    package = Path(__file__).resolve().parents[1]
    beside = sorted(entry.name for entry in package.parent.glob("effdet-[0-9]*-info"))  # ours is effdet_ascend-...
    door = getattr(sys.modules["effdet"], "__file__", None)  # None: a folder without __init__.py
    if door is None or not hasattr(sys.modules["effdet"], "_IS_EFFDET_ASCEND"):
        state = "has files of the distribution effdet among its own" if door else "lacks files"
        raise ImportError(f"the package effdet in {package.parent} {state}. {_REMEDY}")
    if beside:
        warnings.warn(
            f"the distributions effdet ({beside[0]}) and effdet-ascend are both installed in {package.parent} and have "
            f"files of the same names: uninstalling one breaks the other. {_REMEDY}",
            RuntimeWarning,
            stacklevel=3,
        )
