"""Real structures and alignments, or a skip where they are not."""

import functools

import numpy as np
import pytest

from jaxlab.core import DataUnavailable, data_path
from jaxlab.megafold.data import featurize, read_mmcif


@functools.cache
def af3(name):
    """The path of `af3/<name>`."""
    try:
        return data_path(f"af3/{name}", download=False)
    except DataUnavailable as missing:
        pytest.skip(str(missing).splitlines()[0])


@functools.cache
def structure(name):
    return read_mmcif(af3(f"mmcif/{name}"))


@functools.cache
def features(name, chain=None, msa=None):
    af3("ccd")
    msas = {chain: af3(f"msa/{msa}")} if chain else None
    return featurize(structure(name), msas=msas)


def ras():
    """H-Ras, two copies, with the alignment of 15,953 rows."""
    return features("721p-assembly1.cif", "A", "721p-assembly1A_protein.a3m")


def assert_same(ours, theirs):
    """Two dictionaries of the same arrays, to the bit."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
