"""Sphinx on the pages that make_site.py writes; facts come from settings.ini."""

import sys
from configparser import ConfigParser
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # for reference.py

parsed = ConfigParser(delimiters=["="], interpolation=None)
parsed.read(HERE.parent / "settings.ini", encoding="utf-8")
settings = parsed["DEFAULT"]

project, author, copyright, release = (
    settings[key] for key in ("title", "author", "copyright", "version")
)
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "reference"]
default_role = "py:obj"
smartquotes_action = "qe"  # quotes and dots, but no dash for the -- of an option

# Pages are the notebooks as they were committed, with the outputs that they hold.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # formulas in computed prose
# the first state, a picture
nb_mime_priority_overrides = [
    ("html", "application/vnd.jupyter.widget-view+json", None)
]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
html_math_renderer = "mathml"  # of reference.py

autodoc_default_options = {
    "members": True,
    "inherited-members": True,
    "special-members": "__call__",
    "member-order": "bysource",
}
add_module_names = False
maximum_signature_line_length = 80
# Every name of the project must lead somewhere; finding others' would take a network.
nitpick_ignore_regex = [("py:.*", r"(?!bigmodel_nb\b).*")]
# Scripts make the anchors of GitHub's pages.
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]

html_theme = "sphinx_book_theme"
html_title = project
html_baseurl = settings["doc_host"] + settings["doc_baseurl"] + "/"
html_static_path = [str(HERE / "_static")]
html_css_files = ["course.css"]
html_favicon = str(HERE / "_static" / "icon.svg")
# light or dark as the reader's system says, until the switch is used
html_context = {"default_mode": "auto"}
html_domain_indices = False  # api/index is that
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "repository_url": settings["git_url"],
    "use_repository_button": True,
    "use_download_button": False,
    "navbar_persistent": [],  # the search field stands in the sidebar
    "show_toc_level": 2,
    "max_navbar_depth": 1,  # the page of modules leads to the modules
}
