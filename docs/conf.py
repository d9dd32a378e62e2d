"""Settings of the documentation site (`make docs`)."""

from __future__ import annotations

from importlib import metadata

release = metadata.version("pytest-llmload")

project = "pytest-llmload"
author = "The pytest-llmload maintainers"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"{project} {release}"
html_theme_options = {"source_repository": "https://github.com/pytest-llmload/pytest-llmload", "source_branch": "main"}
html_theme_options["source_directory"] = "docs/"

#: Headings that another page can link to, as GitHub makes them.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_class_signature = "separated"
