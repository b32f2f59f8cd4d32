"""The site: Markdown pages, executed notebooks, and an API reference from the docstrings."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jaxlab  # noqa: E402

project = "jaxlab"
author = "the jaxlab authors"
project_copyright = "the jaxlab authors, Apache-2.0"
version = release = jaxlab.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "docstrings", "public_api"]
exclude_patterns = ["_build", "_ext", "evidence", "**.ipynb_checkpoints"]
templates_path: list[str] = []

myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
# `make notebooks` has executed them; a page of the site shows what came out.
nb_execution_mode = "off"
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False
napoleon_use_ivar = True
default_role = "code"
add_module_names = False
python_maximum_signature_line_length = 88
# Links from one notebook page to a file of the repository, and lexers that notebooks name by version.
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "sphinx_book_theme"
html_title = "jaxlab"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"show_toc_level": 2, "navigation_with_keys": False, "navbar_persistent": []}
# `site.py` builds several versions, between which a menu leads; a build by itself has none.
if switcher := os.environ.get("JAXLAB_DOCS_SWITCHER"):
    release = os.environ["JAXLAB_DOCS_VERSION"]
    html_theme_options |= {"switcher": {"json_url": switcher, "version_match": release}, "check_switcher": False}
    html_sidebars = {
        "**": ["navbar-logo.html", "version-switcher.html", "search-button-field.html", "sbt-sidebar-nav.html"]
    }
