"""What works for which family of models: the tests over all families, as a table of families and checks.

    python benchmarks/families.py [--families gemma2 phi3] [--checks loads_outside h_gsp]

Runs tests/test_encoder_families.py and tests/test_decoder_families.py, on random weights of each family's real layout.
Prints a table in markdown for each and writes results/families.json, and results/families.xml as pytest has it.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compression.config import Config, run_script
from compression.files import write_json
from compression.runtime import RESULTS, ROOT, UserError, fingerprint, log
from compression.structures import FAMILIES
from compression.tables import Column, markdown_table

TRACKS = {"encoders": "tests/test_encoder_families.py", "decoders": "tests/test_decoder_families.py"}
SYMBOLS = {"passed": "✓", "failed": "failed", "skipped": "not applicable", "untried": ""}
NAME = re.compile(r"test_(\w+)\[(.+)\]")


@dataclass
class FamiliesConfig(Config):
    families: tuple[str, ...] = ()
    """Words of the model types and variants that are tested, such as gemma2; none: all of them."""
    checks: tuple[str, ...] = ()
    """Words of the tests' names, such as loads_outside; none: all of them."""


def run_tests(files: list[str], results: Path, chosen: str) -> None:
    """Run the tests of some files; what they find goes to an XML file."""
    results.parent.mkdir(parents=True, exist_ok=True)
    words = [*files, "-q", "-p", "no:cacheprovider", "-W", "ignore", f"--junitxml={results}", "-k", chosen]
    subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, stdout=subprocess.DEVNULL)


def outcomes(results: Path, file: str) -> dict[str, dict[str, str]]:
    """What the tests of a file found, by family and check: passed, failed or skipped."""
    found: dict[str, dict[str, str]] = {}
    for case in ElementTree.parse(results).iter("testcase"):
        matched = NAME.fullmatch(case.get("name", ""))
        if not matched or not case.get("classname", "").endswith(Path(file).stem):
            continue
        check, family = matched.groups()
        if family.partition(",")[0] in FAMILIES:  # else it is a case of something else, no family or variant of one
            tags = {part.tag for part in case}
            outcome = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
            found.setdefault(family, {})[check] = outcome
    return found


def table(found: dict[str, dict[str, str]]) -> str:
    """Families down, checks across."""
    checks = dict.fromkeys(check for outcome in found.values() for check in outcome)
    columns = [Column("", lambda family: family)]
    for check in checks:
        columns.append(
            Column(check.replace("_", " "), lambda family, check=check: SYMBOLS[found[family].get(check, "untried")])
        )
    return markdown_table(columns, list(found), align=":---:")


def main(config: FamiliesConfig) -> None:
    chosen = " and ".join(f"({' or '.join(words)})" for words in (config.families, config.checks) if words)
    results = RESULTS / "families.xml"
    run_tests([file for file in TRACKS.values() if (ROOT / file).is_file()], results, chosen)
    tables = {track: found for track, file in TRACKS.items() if (found := outcomes(results, file))}
    for track, found in tables.items():
        log.info("%s\n\n%s\n", track.capitalize(), table(found))
    if not tables:
        raise UserError(f"--families {' '.join(config.families)}: no test is of one of these and --checks; see --help")
    path = RESULTS / "families.json"
    write_json(path, {"config": config.as_dict(), "environment": fingerprint(), "outcomes": tables})
    log.info("-> %s", path)


if __name__ == "__main__":
    run_script(FamiliesConfig, main)
