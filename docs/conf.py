"""Configuration of Sphinx: ``make docs`` builds the site from this folder, offline and strictly."""

from __future__ import annotations

import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

sys.path.insert(0, str(Path(__file__).parent))
from site_build import gallery, pictures, reference

project = "alphabar"
author = "The alphabar authors"
project_copyright = "The alphabar authors"
version = release = installed_version("alphabar")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "site_build"]
nitpicky = False  # types of other projects have no page here
suppress_warnings = ["ref.python"]  # one class under its public and its defining module

html_theme = "furo"
pygments_dark_style = "github-dark"  # furo's own underlines the names of modules
html_title = f"alphabar {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app: Any) -> None:
    """Generate the pages of registries and public names, and draw formulas without a script."""
    app.connect("builder-inited", _generate)
    app.connect("source-read", _figures_of_the_site)
    app.connect("autodoc-process-docstring", _plain_text, priority=100)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))


def _generate(app: Any) -> None:
    reference.write(Path(app.srcdir, "reference"))
    gallery.write(Path(app.srcdir, "gallery"))
    pictures.write(Path(app.srcdir, "pictures"))
    for file in Path(app.srcdir).parent.glob("benchmarks/*.[mp][dn]*"):
        reference.write_bytes(Path(app.srcdir, "figures", file.name), file.read_bytes())


def _figures_of_the_site(app: Any, name: str, source: list[str]) -> None:
    """Lead links to benchmarks/ to the copies in the site."""
    pattern = r"(\]\()\.\./((?:\.\./)*)benchmarks/(\w+\.md)"
    source[0] = re.sub(pattern, r"\1\2figures/\3", source[0])


def _plain_text(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep the bars and stars of formulas, such as |x_0|, which mark something in reST."""
    example = False
    for i, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if not example:
            parts = re.split(r"(``.*?``|:\w+:`.*?`)", line)
            parts[::2] = [re.sub(r"(?<!\\)([|*])", r"\\\1", part) for part in parts[::2]]
            lines[i] = "".join(parts)


def _inline_math(writer: Any, node: nodes.math) -> None:
    writer.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block_math(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode
