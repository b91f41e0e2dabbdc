"""The report as a page: one file that shows what lies under the folders of models and results, from the disk alone.

Nothing is measured here, and no model is loaded: every figure is read from the JSON of the run that measured it.
"""

from compression.page.render import PAGE, update_page, write_page

__all__ = ["PAGE", "update_page", "write_page"]
