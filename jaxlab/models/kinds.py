"""The kinds of networks that folders hold, by `model_type`: what loading and saving have to know of each."""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flax import linen as nn

from jaxlab.models.decoder import Decoder, DecoderConfig
from jaxlab.models.decoder.model import abstract_params
from jaxlab.models.decoder.weights import decoder_table, ignorable
from jaxlab.models.load import Leaf


class Kind(NamedTuple):
    """A kind of network.

    Attributes:
        read: content of a `config.json` -> configuration, with `to_hf()` and `param_dtype`.
        override: (configuration, fields of `DecoderConfig` to replace) -> configuration.
        make: (configuration, mlp protocol) -> module, with `config`.
        table: (configuration, names that a file holds) -> its key table.
        ignorable: (configuration, name) -> whether a file may hold it for no parameter.
        abstract_params: module -> parameters as shapes, boxed with logical axis names.
    """

    read: Callable[[Mapping[str, Any]], Any]
    override: Callable[[Any, Mapping[str, Any]], Any]
    make: Callable[[Any, Any], nn.Module]
    table: Callable[..., list[Leaf]]
    ignorable: Callable[[Any, str], bool]
    abstract_params: Callable[[Any], Any]


def override(config: DecoderConfig, changes: Mapping[str, Any]) -> DecoderConfig:
    """Replaces fields.

    Raises:
        ValueError: an unknown field; the message names the nearest.
    """
    known = [field.name for field in dataclasses.fields(config)]
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
            raise ValueError(f"unknown configuration field {name!r}; the nearest is {near!r}")
    return dataclasses.replace(config, **changes)


_DECODER = Kind(DecoderConfig.from_hf, override, Decoder, decoder_table, ignorable, abstract_params)


def kind_of(model_type: Any) -> Kind:
    """The kind of a `model_type`; unknown ones are left to the decoder, which names what it knows."""
    if model_type == "qwen2_5_vl":
        from jaxlab.models.qwen2_5_vl.weights import KIND

        return KIND
    return _DECODER
