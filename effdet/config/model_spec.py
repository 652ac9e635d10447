"""A model's configuration as our own code hands it on: a plain mapping that never changes.

omegaconf's nodes are for code written for effdet, which sets fields of `get_efficientdet_config`'s result before a
network is built of it, and for YAML. A network may be built of either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn


class ModelSpec(Mapping[str, Any]):
    """The fields of a model, read as `spec.image_size` or `spec["image_size"]`.

    Lists are tuples and mappings are specs, however deep they lie.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        """Take over the fields of any mapping, an omegaconf node too."""
        self.__dict__.update({key: _freeze(fields[key]) for key in fields})

    def __getitem__(self, key: str) -> Any:
        return self.__dict__[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __len__(self) -> int:
        return len(self.__dict__)

    def __getattr__(self, name: str) -> Any:  # for what is not there; the fields are found without it
        raise AttributeError(f"the model config has no field '{name}'")

    def __setattr__(self, name: str, value: Any = None) -> NoReturn:
        raise AttributeError(f"a run's model config is read-only, {name} too: make another one with replace()")

    __delattr__ = __setattr__

    def __repr__(self) -> str:
        return f"ModelSpec({self.__dict__})"

    def replace(self, **changes: Any) -> ModelSpec:
        """Return a spec with other values, or further fields."""
        return ModelSpec({**self, **changes})

    def to_plain(self) -> dict[str, Any]:
        """Return the fields as dicts, lists, numbers, texts, booleans and None, fit for a checkpoint."""
        return {key: _thaw(value) for key, value in self.items()}


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ModelSpec(value)
    return tuple(map(_freeze, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _thaw(value: Any) -> Any:
    if isinstance(value, ModelSpec):
        return value.to_plain()
    return list(map(_thaw, value)) if isinstance(value, tuple) else value


def change_config(config: Any, **changes: Any) -> Any:
    """Return a model config with other values: a new spec of a spec; an omegaconf node is its user's and stays one."""
    if isinstance(config, ModelSpec):
        return config.replace(**changes)
    config.update(changes)
    return config
