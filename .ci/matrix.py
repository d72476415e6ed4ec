"""Install the package with another Python and another set of versions, run pages and commands, and
write one row of a table.

    matrix.py --python PATH --versions lowest|newest|tested [--venv FOLDER] [--again] [--failed]
    [--page GLOB ...]

`lowest` takes every lower bound of settings.ini literally, `newest` lets pip choose, `tested` is
constraints.txt.
One row at a time: two would share the cores and their minutes would mean nothing.
"""

import argparse
import csv
import fnmatch
import os
import re
import subprocess
import sys
import tempfile
import time
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "results/explain/matrix/matrix.csv"
# What the pages below need besides the base: peft, matplotlib and accelerate, and the reader of the
# Census.
EXTRAS = ("finetune", "demo", "census")
# Tools of the development that pages use; no user needs them.
PAGE_TOOLS = ("nbdev", "execnb", "fastcore", "zarr", "hypothesis", "tensorboard", "harmonypy")
PAGES = (
    "00_*",
    "01_*",
    "02*",
    "03_*",
    "04*",
    "05*",
    "06*",
    "07*",
    "08*",
    "09*",
    "10*",
    "11*",
    "18a_*",
    "99_*",
)
PAGE_SECONDS = 900
COMMAND_SECONDS = 600
SHOWN = (
    "numpy",
    "pandas",
    "scipy",
    "torch",
    "transformers",
    "anndata",
    "scanpy",
    "numba",
    "h5py",
    "pyarrow",
    "datasets",
    "peft",
    "scikit-learn",
    "typer",
    "rich",
)
COLUMNS = (
    "python",
    "set",
    *SHOWN,
    "pages_passed",
    "pages_failed",
    "failed",
    "first_error",
    "commands_passed",
    "commands_failed",
    "minutes",
)


def settings():
    "The words of settings.ini."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def lower_bound(requirement):
    "'anndata>=0.11' -> 'anndata==0.11'; a requirement without a lower bound stays as it is."
    wanted = Requirement(requirement)
    bounds = [clause.version for clause in wanted.specifier if clause.operator == ">="]
    if not bounds:
        return requirement
    return f"{wanted.name}=={bounds[0]}"


def requirements(versions):
    "(what to install, options of pip) for one set of versions."
    cfg = settings()
    users = cfg["requirements"].split()
    for extra in EXTRAS:
        users += cfg[f"{extra}_requirements"].split()
    extras = ("dev", "train", "bench")
    developers = " ".join(cfg[f"{extra}_requirements"] for extra in extras).split()
    tools = [word for word in developers if Requirement(word).name in PAGE_TOOLS]
    if versions == "lowest":
        users = [lower_bound(word) for word in users]
    options = ["-c", str(ROOT / "constraints.txt")] if versions == "tested" else []
    return sorted(set(users)) + tools, options


def call(command, seconds, cwd=ROOT, env=None):
    "(exit code, output) of a command that is stopped after so many seconds."
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return 124, f"stopped after {seconds} seconds"
    return done.returncode, done.stdout


def must(command, seconds=3600):
    "Run a step of the installation, or end with what it said."
    rc, output = call(command, seconds)
    if rc:
        last = "\n".join(output.rstrip().split("\n")[-15:])
        sys.exit(f"This step failed:\n  {' '.join(map(str, command))}\n{last}")


def build_venv(python, versions, folder):
    "A virtual environment with the wanted versions; torch first, it is the largest."
    wanted, options = requirements(versions)
    pip = [folder / "bin" / "python", "-m", "pip"]
    if not (folder / "bin" / "python").exists():
        must([python, "-m", "venv", folder])
    must([*pip, "install", "-q", "--upgrade", "pip", "setuptools", "wheel"])
    torch = [word for word in wanted if Requirement(word).name == "torch"]
    must([*pip, "install", "-q", *options, *torch])
    must([*pip, "install", "-q", *options, *wanted])


def install_package(folder):
    "A wheel of the last commit, as a user gets it."
    pip = [folder / "bin" / "python", "-m", "pip"]
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work) / "tree"
        tree.mkdir()
        must(["bash", "-c", f"git -C {ROOT} archive HEAD | tar -x -C {tree}"])
        must([*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", work, tree])
        wheel = next(Path(work).glob("*.whl"))
        must([*pip, "install", "-q", "--no-deps", "--force-reinstall", wheel])


def installed(folder):
    "Name -> version of the packages that the table shows."
    rc, output = call([folder / "bin" / "python", "-m", "pip", "list", "--format=freeze"], 120)
    found = dict(line.split("==") for line in output.split() if "==" in line)
    by_name = {
        re.sub(r"[-_.]+", "-", name).lower(): version.split("+")[0]
        for name, version in found.items()
    }
    return {name: by_name.get(name, "") for name in SHOWN}


def first_error(output):
    "The line that names the mistake: the last one that reads like an exception."
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in output.split("\n")]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Warning|Exit)\b", line)]
    said = (
        named or [line for line in lines if line] or ["no output, as of a process that was stopped"]
    )[-1]
    return re.sub(r"/\S*/(?=[\w.-]+)", "", said)[:160]


def page_environment(folder):
    "Pages see this tree, the cells inside the package and one thread; nothing is downloaded."
    kept_out = ("IN_TEST", "SCEMB_DATA")
    env = {name: value for name, value in os.environ.items() if name not in kept_out}
    env.update(
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
        NUMBA_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        PATH=f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    )
    return env


def chosen_pages(globs):
    "Pages of the walk whose names fit one of the patterns."
    names = [path.name for path in sorted((ROOT / "nbs").glob("*.ipynb"))]
    return [name for name in names if any(fnmatch.fnmatch(name, glob) for glob in globs)]


def run_page(folder, name, log):
    "The first error of the fast cells of a page, or nothing."
    start = time.time()
    command = [folder / "bin" / "python", ROOT / ".ci" / "one_page.py", ROOT / "nbs" / name]
    rc, output = call(command, PAGE_SECONDS, env=page_environment(folder))
    error = f"exit code {rc}: {first_error(output)}" if rc else ""
    if rc:
        log.write(f"=== {name}\n{output}\n")
        log.flush()
    print(f"{'FAIL' if rc else 'ok  '}  {name}  {time.time() - start:.0f} s  {error}", flush=True)
    return error


CELLS = """
from scemb.data import datasets
datasets.load("baron_pancreas")[:30].copy().write_h5ad("cells.h5ad")
"""
CHECK = """
import anndata, numpy
vectors = anndata.read_h5ad("embedded.h5ad").obsm["X_scemb"]
assert len(vectors) == 30 and numpy.isfinite(vectors).all(), vectors.shape
"""


def run_commands(folder, log):
    "(passed, {command: first error}) of the installed package in a shell, away from this tree."
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env.pop("PYTHONPATH", None)
    python, scemb = folder / "bin" / "python", folder / "bin" / "scemb"
    steps = {
        "import": [python, "-c", "import scemb, scemb.app.cli"],
        "scemb --help": [scemb, "--help"],
        "scemb embed --help": [scemb, "embed", "--help"],
        "cells of the package": [python, "-c", CELLS],
        "scemb doctor": [scemb, "doctor", "cells.h5ad"],
        "scemb embed": [scemb, "embed", "cells.h5ad", "--out", "embedded.h5ad"],
        "vectors are finite": [python, "-c", CHECK],
    }
    passed, failed = 0, {}
    with tempfile.TemporaryDirectory() as work:
        for name, command in steps.items():
            rc, output = call(command, COMMAND_SECONDS, cwd=work, env=env)
            if rc:
                failed[name] = first_error(output)
                log.write(f"=== {name}\n{output}\n")
                log.flush()
            else:
                passed += 1
            print(f"{'FAIL' if rc else 'ok  '}  {name}  {failed.get(name, '')}", flush=True)
    return passed, failed


def read_rows():
    "The table as it stands."
    if not TABLE.exists():
        return []
    with TABLE.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def former_row(python, versions):
    "The row of this Python and set, or the end with what there is instead."
    rows = read_rows()
    for row in rows:
        if (row["python"], row["set"]) == (python, versions):
            return row
    there = ", ".join(f"{row['python']} {row['set']}" for row in rows) or "no row"
    sys.exit(
        f"{TABLE.name} has no row {python} {versions} to mend; it has {there}. Leave --failed away."
    )


def write_row(row):
    "Put a row into the table in place of the one with the same Python and set."
    key = row["python"], row["set"]
    rows = [old for old in read_rows() if (old["python"], old["set"]) != key] + [row]
    rows.sort(key=lambda r: ([int(part) for part in r["python"].split(".")], r["set"]))
    with TABLE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    from scemb.data.records import write_record

    write_record(TABLE.parent, ".ci/matrix.py", {}, shown="nbs/explain/matrix.ipynb")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python", required=True, help="the interpreter to make the environment with"
    )
    parser.add_argument("--versions", required=True, choices=("lowest", "newest", "tested"))
    parser.add_argument(
        "--venv", help="folder of the environment, kept afterwards; default: a temporary one"
    )
    parser.add_argument(
        "--again", action="store_true", help="the environment in --venv stands: install nothing"
    )
    parser.add_argument(
        "--failed",
        action="store_true",
        help="run only the pages that failed in the row of the table",
    )
    parser.add_argument("--page", nargs="*", default=PAGES, help="patterns of pages below nbs/")
    parser.add_argument(
        "--log", default=os.devnull, help="file for the whole output of what failed"
    )
    args = parser.parse_args()
    kept = tempfile.TemporaryDirectory()
    folder = Path(args.venv).absolute() if args.venv else Path(kept.name) / "venv"
    if not args.again:
        build_venv(args.python, args.versions, folder)
    install_package(folder)
    version = call(
        [folder / "bin" / "python", "-c", "import platform; print(platform.python_version())"], 60
    )[1].strip()
    passed, minutes, failed, globs = 0, 0.0, [], args.page
    if args.failed:
        former = former_row(version, args.versions)
        passed, minutes = int(former["pages_passed"]), float(former["minutes"])
        failed = former["failed"].split()
        globs = [f"{name}.ipynb" for name in failed]
    start = time.time()
    row = dict(python=version, set=args.versions, **installed(folder))
    with open(args.log, "w", encoding="utf-8") as log:
        commands_passed, errors = run_commands(folder, log)
        row.update(commands_passed=commands_passed, commands_failed=len(errors))
        for name in chosen_pages(globs):
            page = name.removesuffix(".ipynb")
            failed = [other for other in failed if other != page]
            error = run_page(folder, name, log)
            if error:
                errors[page] = error
                failed.append(page)
            else:
                passed += 1
            row.update(
                pages_passed=passed,
                pages_failed=len(failed),
                failed=" ".join(failed),
                first_error=next(iter(errors.values()), ""),
                minutes=round(minutes + (time.time() - start) / 60, 1),
            )
            write_row(row)  # after each page: a run that is stopped leaves what it knows
    print(f"{commands_passed + passed} passed, {len(errors)} failed")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
