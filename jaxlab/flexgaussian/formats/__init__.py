"""Scenes on disk: what a file is, told by its content first; one module a format."""

from jaxlab.flexgaussian.formats.files import load_scene, save_scene

__all__ = ["load_scene", "save_scene"]
