"""The command `effdet VERB`, also `python -m effdet VERB`: it finds the command line that a verb stands for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from effdet.config.options import nearest
from effdet.runtime.console import AS_COMMAND
from effdet.version import __version__

VERBS = {
    "train": ("effdet.commands.train", "train a detector on a folder of labelled images"),
    "validate": ("effdet.commands.validate", "evaluate a checkpoint on labelled images"),
    "predict": ("effdet.commands.predict", "find objects in images, draw them, write them down"),
    "check": ("effdet.datacheck.check", "look at the data a training would have, without training"),
    "export": ("effdet.export", "write a checkpoint's network for other runtimes"),
    "compare": ("effdet.commands.compare", "put runs side by side: settings, AP, how sure the difference is"),
    "average": ("effdet.commands.average", "average the weights of checkpoints"),
    "convert": ("effdet.commands.convert", "make a checkpoint of effdet 0.4.1's weights"),
    "clean": ("effdet.commands.clean", "keep of a checkpoint what prediction needs"),
    "data convert": ("effdet.data.formats.__main__", "write COCO jsons of a folder of any known form"),
    "data synthetic": ("effdet.data.synthetic.dataset", "make the embedded data set"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that the first argument names, with the others, and return the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    length = 2 if words[:1] == ["data"] else 1
    verb, rest = " ".join(words[:length]), words[length:]
    if verb in ("", "-h", "--help", "help"):
        print("usage: effdet VERB [arguments]    (effdet VERB --help lists them)\n")
        print("\n".join(f"  {name:<15} {text}" for name, (_, text) in VERBS.items()))
        return 0 if words else 2
    if verb == "--version":
        print(f"effdet-ascend {__version__}")
        return 0
    if verb not in VERBS:
        sys.stderr.write(f"effdet: error: unknown verb {verb}{nearest(verb, VERBS)} (effdet --help)\n")
        return 2
    os.environ[AS_COMMAND] = "1"  # read when the command's module is imported
    return importlib.import_module(VERBS[verb][0]).main(rest) or 0


if __name__ == "__main__":
    sys.exit(main())
