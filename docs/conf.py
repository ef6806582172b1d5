"""Configure Sphinx, which `make docs` runs: pages in Markdown (MyST), the API from docstrings (autodoc)."""

import re

from tdpo_kernels import __version__

project, author, release = "tdpo-kernels", "the tdpo-kernels authors", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
# The tree's other Markdown is rendered too, so that links between it and the pages are links, and are checked.
root_doc = "docs/index"
include_patterns = ["docs/*.md", "*.md", "python/*/*.md", "bench/results/*/*.md"]
exclude_patterns = [".*", "build", "dist", "tdpo_kernels", "tests"]
html_theme, html_title = "furo", "tdpo-kernels"
html_show_copyright = html_copy_source = False

default_role = "py:obj"  # a name in single backquotes is code, and a link where the API has it
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
myst_heading_anchors, myst_enable_extensions = 3, ["attrs_inline"]

PICTURE = re.compile(r'<picture><source [^>]*srcset="([^"]+)"><img alt="([^"]+)" src="([^"]+)"></picture>')


def both_papers(app: object, name: str, source: list[str]) -> None:
    """Replace each `<picture>` by two images, of which the theme shows that of its paper."""
    source[0] = PICTURE.sub(r"![\2](\1){.only-dark}![\2](\3){.only-light}", source[0])


def setup(app: object) -> None:
    app.connect("source-read", both_papers)
