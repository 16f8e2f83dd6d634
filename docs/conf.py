"""Configuration of the documentation's site: Sphinx, with pages in Markdown (MyST); warnings are errors.

sphinx-build -W docs site
"""

import lowmem_pnn

project = "lowmem-pnn"
copyright = "the lowmem-pnn authors, Apache-2.0"
version = release = lowmem_pnn.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns: list[str] = []
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
html_theme = "furo"
html_title = "lowmem-pnn"
