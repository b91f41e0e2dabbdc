"""The report as a page: one file to look at, of all that lies in the folders of models and results.

    python report.py [--models_dir models] [--results_dir results]

Reads what the other scripts have written there; measures nothing and loads no model. Writes results/report.html, which
opens from the disk without a network. Stage 7 and the runs of the language-model track write it, too.
"""

import compression  # noqa: F401  # isort: skip (first: Ctrl-C ends in one line from here on)
from dataclasses import dataclass
from pathlib import Path

from compression.config import Config, run_script
from compression.outputs import check_files
from compression.page import PAGE, write_page
from compression.runtime import MODELS, RESULTS, UserError, log, shown


@dataclass
class ReportConfig(Config):
    models_dir: Path = MODELS
    """Folder of checkpoints."""
    results_dir: Path = RESULTS
    """Folder of results, which the page goes to."""


def main(config: ReportConfig) -> None:
    for flag in ("models_dir", "results_dir"):
        if (folder := getattr(config, flag)).exists() and not folder.is_dir():
            raise UserError(f"--{flag} {folder}: is a file; name a folder")
    check_files(config.results_dir, [PAGE], "--results_dir")
    log.info("-> %s", shown(write_page(config.models_dir, config.results_dir)))


if __name__ == "__main__":
    run_script(ReportConfig, main)
