"""The report as a page: one file that shows what lies under the folders of models and results, from the disk alone.

Nothing is measured here, and no model is loaded: every figure is read from the JSON of the run that measured it.
"""

from pathlib import Path

from compression.outputs import new_files
from compression.runtime import UserError, log, processes, shown

PAGE = "report.html"


def write_page(models_dir: Path, results_dir: Path, flag: str = "--results_dir") -> Path:
    """Write the page of what lies in the folders of models and results now; its path.

    Args:
        flag: what named the folder of results, for error texts.

    Raises:
        UserError: a file of that name is there that this project did not write, or the disk takes no more.
    """
    # What builds the page takes a second to import, which scripts that end with it need not start with.
    from compression.page.records import read_records
    from compression.page.render import build

    text = build(read_records(models_dir, results_dir))
    with new_files(results_dir, [PAGE], flag) as temporary:
        (temporary / PAGE).write_text(text, encoding="utf-8")
    return Path(results_dir) / PAGE


def update_page(models_dir: Path, results_dir: Path) -> None:
    """Write the page anew behind a run, on the first process; the run is done, so that a page that cannot be written
    is only said."""
    if processes().is_main_process:
        try:
            log.info("The page of all results: %s", shown(write_page(models_dir, results_dir)))
        except UserError as problem:
            log.warning("The page of all results was not written: %s", problem)
    processes().wait_for_everyone()
