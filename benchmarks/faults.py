"""Attack the scripts: bad inputs, damaged files, kills, crowds, containers, a full disk, files of the user.

    python benchmarks/faults.py [--sections bad_inputs damage kills crowds container full_disk user_files] [--jobs 2]

Every case runs the project's real command lines on tiny random models, in a copy of the project and of a small world in
a temporary folder that stands for the repository and the home folder. Prints what was tried and what held of each
section, and every case that did not hold with its command; writes results/faults.json. Takes less than 15 minutes on 2
cores. Exits 0 whatever held; another status means that the harness itself failed.
"""

import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

# The project's package is imported from the copy that is attacked, and only once the environment is set.
from faults import bad_inputs, container, crowds, damage, full_disk, kills, user_files
from faults.process import World, import_all, remove, run_cases
from faults.world import REPOSITORY, build, copy_code, copy_of, set_environment

SECTIONS = {
    "bad_inputs": bad_inputs.cases,
    "damage": damage.cases,
    "kills": kills.cases,
    "crowds": crowds.cases,
    "container": container.cases,
    "full_disk": full_disk.cases,
    "user_files": user_files.cases,
}


@dataclass
class FaultsConfig:
    sections: tuple[str, ...] = tuple(SECTIONS)
    """What is tried."""
    jobs: int = 2
    """Cases that run side by side."""
    seed: int = 0
    """Fixes the places of random damage, and which cases --limit takes."""
    limit: int = 0
    """At most so many cases of each section, drawn at random; 0: all."""
    only: str = ""
    """A regular expression: only cases with such a name."""
    results_dir: Path = REPOSITORY / "results"
    """Where faults.json goes."""
    keep: bool = False
    """Keep the work folder, with a folder for each case that did not hold and what it said in NUMBER.notes."""


def choose(section: str, context: "Context", config: FaultsConfig) -> list:
    """The section's cases that are to be tried."""
    make = SECTIONS[section]
    cases = make(context) if make.__code__.co_argcount else make()
    cases = [case for case in cases if re.search(config.only, case.name)]
    if config.limit and len(cases) > config.limit:
        draw = random.Random(f"{config.seed} {section}")
        cases = [cases[place] for place in sorted(draw.sample(range(len(cases)), config.limit))]
    return cases


@dataclass(eq=False)
class Context:
    """What a section may need to make its cases.

    Attributes:
        template: the world that each case gets a copy of.
        new_world: makes such a copy.
    """

    work: Path
    template: Path
    code: Path
    seed: int

    def new_world(self, folder: Path) -> World:
        return copy_of(self.template, self.code)(folder)


def run_section(section: str, context: Context, config: FaultsConfig) -> dict:
    """Try a section's cases and print what did not hold."""
    started = time.perf_counter()
    counts, failed = Counter(), []
    folder = context.work / section
    folder.mkdir()
    for found in run_cases(choose(section, context, config), config.jobs, folder, context.new_world):
        if "broken" in found:
            counts["broken"] += 1
            print(f"  BROKEN {found['case']}\n    {found['broken'].strip().splitlines()[-1]}", flush=True)
            failed.append(found)
        elif found["problems"] is None:
            counts["skipped"] += 1
        else:
            counts["tried"] += 1
            counts["held"] += not found["problems"]
            if found["problems"]:
                failed.append(found)
                print(f"  {section}: {found['case']}\n    {'; '.join(found['problems'])[:400]}", flush=True)
        if not (config.keep and (found.get("problems") or "broken" in found)):
            remove(Path(found["folder"]))
    result = {name: counts[name] for name in ("tried", "held", "skipped", "broken")}
    return result | {"seconds": round(time.perf_counter() - started, 1), "not_held": failed}


def main(config: FaultsConfig) -> None:
    unknown = set(config.sections) - set(SECTIONS)
    if unknown:
        sys.exit(f"error: --sections {' '.join(unknown)}: unknown; allowed are {', '.join(SECTIONS)}")
    started = time.perf_counter()
    work = Path(tempfile.mkdtemp(prefix="faults."))
    try:
        set_environment(work)
        code = copy_code(work)
        import_all(code)
        from compression.tables import Column, at, text_table

        context = Context(work, build(work, code), code, config.seed)
        print(f"Work folder {work}; {time.perf_counter() - started:.0f} s to get ready", flush=True)
        results = {section: run_section(section, context, config) for section in config.sections}
    finally:
        if not config.keep:
            remove(work)
    names = ("tried", "held", "skipped", "broken", "seconds")
    total = {name: sum(result[name] for result in results.values()) for name in names}
    columns = [Column("section", at("section")), *(Column(name, at(name), "{:.0f}") for name in names)]
    rows = [{"section": name} | found for name, found in (results | {"all": total}).items()]
    print(f"\n{text_table(columns, rows)}")
    config.results_dir.mkdir(parents=True, exist_ok=True)
    path = config.results_dir / "faults.json"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"total": total, "sections": results}, indent=2) + "\n")
    os.replace(temporary, path)
    print(f"{time.perf_counter() - started:.0f} s in all -> {path}")
    if total["broken"]:
        sys.exit("error: the harness itself failed in some cases (BROKEN above)")


if __name__ == "__main__":
    main(tyro.cli(FaultsConfig, description=__doc__, use_underscores=True))
