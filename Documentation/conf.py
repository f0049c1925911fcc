# SPDX-License-Identifier: GPL-2.0-or-later
"""What sphinx needs to know of these pages: make docs"""
# pylint: disable=invalid-name # sphinx names them

project = "dm-qcow2"
author = "the dm-qcow2 authors"
copyright = author  # pylint: disable=redefined-builtin

# Nothing but what sphinx has by itself, and no theme that has to be installed or fetched.
extensions = []
html_theme = "classic"
html_theme_options = {"nosidebar": True, "body_max_width": "60em"}
html_use_index = False
html_copy_source = False

# As in the kernel's documents: literal blocks are text, and are not coloured.
highlight_language = "none"
# Two dashes are an option's, and quotes are those that a shell takes.
smartquotes = False
# A reference that leads nowhere is a mistake.
nitpicky = True
