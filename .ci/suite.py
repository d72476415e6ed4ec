"""The whole test suite, in the order in which a mistake is cheapest to find; `make test` calls it.

    suite.py [--fast] [--flags "slow gpu"] [--page GLOB] [--processor "no AVX2"]

Every check and every page is one test. The last line of the output counts them.
"""

import argparse
import fnmatch
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import docs
import one_page
import processors
from checks import ROOT, STATIC, TAGGED, changed, directives, files, pages, snapshot, text

BIN = Path(sys.executable).parent
TIMEOUT = 900  # seconds for one page
WORKERS = 2
HISTORY = ROOT / "runs" / "page_seconds.json"  # ignored by git; only orders the pages
KEPT_OUT = ("torch", "scanpy", "transformers", "jax", "deepspeed", "tiledbsoma")
# One thread a worker: numba and OpenMP would otherwise fight over the cores. IN_TEST would turn
# nbdev_export off.
ENV = {
    **{k: v for k, v in os.environ.items() if k != "IN_TEST" and (k, v) != ("SCEMB_DATA", "")},
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}",
}


class Tally:
    "Counts and prints; safe to call from several threads."

    def __init__(self):
        self.passed = self.failed = self.skipped = 0
        self.lock = threading.Lock()

    def add(self, name, complaints, seconds=None, skips=()):
        with self.lock:
            took = "" if seconds is None else f"  {seconds:.1f} s"
            print(f"{'FAIL' if complaints else 'ok  '}  {name}{took}", flush=True)
            for line in [*complaints, *skips]:
                print("      " + line.replace("\n", "\n      "), flush=True)
            self.failed += bool(complaints)
            self.passed += not complaints
            self.skipped += len(skips)

    def skip(self, line):
        with self.lock:
            print(f"      skipped: {line}", flush=True)
            self.skipped += 1

    def check(self, name, run, *args):
        start = time.time()
        try:
            complaints = run(*args)
        except Exception as e:
            complaints = [f"{type(e).__name__}: {e}"]  # a check that breaks has not passed
        self.add(name, complaints, time.time() - start)

    def __str__(self):
        return f"{self.passed} passed, {self.failed} failed" + (
            f", {self.skipped} skipped" if self.skipped else ""
        )


RUNNING = set()  # process groups to stop when the suite is interrupted


def tail(output, n=40):
    return "\n".join(output.rstrip().split("\n")[-n:])


def run(command, timeout=TIMEOUT, cwd=ROOT, env=ENV):
    """(exit code, stdout, stderr) of a command; it and all that it started are stopped after
    `timeout` seconds."""
    proc = subprocess.Popen(
        [str(c) for c in command],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    RUNNING.add(proc.pid)
    try:
        out, err = proc.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        stop(proc.pid)
        out, err = proc.communicate()
        return 124, out, f"{err}\nstopped after {timeout} seconds"
    except BaseException:
        stop(proc.pid)
        raise
    finally:
        RUNNING.discard(proc.pid)
    return proc.returncode, out, err


def stop(pid):
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def succeeds(*command, **kw):
    "Complaints when a command fails: the end of what it printed."
    rc, out, err = run(command, **kw)
    return [tail(f"{out}\n{err}")] if rc else []


def export_and_clean(root=ROOT, env=ENV):
    "nbdev_export and nbdev_clean leave the pages and modules as they are."
    bad, before = [], snapshot(root)
    for tool, meaning in [
        ("nbdev_export", "page and module disagreed"),
        ("nbdev_clean", "the page held metadata that git should not see"),
    ]:
        bad += succeeds(BIN / tool, cwd=root, env=env)
        after = snapshot(root)
        bad += [
            f"{tool} changed {p}: {meaning}. It is mended now; look at it and commit it."
            for p in changed(before, after)
        ]
        before = after
    return bad


# --- package --------------------------------------------------------------------------------------


# What users import: names that load their modules on first use.
SHORT_NAMES = ["__init__", "pp", "tl", "pl", "datasets", "model/__init__"]
IMPORTS = "import scemb, scemb.pp, scemb.tl, scemb.pl, scemb.datasets, scemb.app.cli"


def types(root=ROOT):
    """A type checker sees the short names with their signatures, and finds the mistakes that
    short_names.py holds."""
    modules = [f"scemb/{name}.py" for name in SHORT_NAMES]
    options = ["--no-error-summary", "--config-file", "pyproject.toml"]
    command = [sys.executable, "-m", "mypy", *options, *modules, ".ci/short_names.py"]
    rc, out, err = run(command, cwd=root, env={**ENV, "MYPYPATH": str(root)})
    return [] if rc == 0 else [tail(out + err)]


def light_import(root=ROOT, imports=IMPORTS, repeats=5, limit=1.5):
    """Importing the package and its command line loads no slow library and takes under 1.5x of
    `import torch`."""
    env = {**ENV, "PYTHONPATH": str(root)}
    code = f"{imports}; import sys; print(' '.join(m for m in {KEPT_OUT!r} if m in sys.modules))"
    rc, out, err = run([sys.executable, "-c", code], cwd=root, env=env)
    if rc:
        return [tail(err)]
    if out.strip():
        return [f"`{imports}` loads {out.strip()}; import them inside the functions that use them."]
    seconds = {imports: [], "import torch": []}
    for _ in range(repeats):
        for line, times in seconds.items():
            start = time.perf_counter()
            run([sys.executable, "-c", line], cwd=root, env=env)
            times.append(time.perf_counter() - start)
    ours, torch = (statistics.median(t) for t in seconds.values())
    return (
        []
        if ours < limit * torch
        else [
            f"`{imports}` takes {ours:.2f} s, wanted under {limit} x {torch:.2f} s (`import "
            "torch`)."
        ]
    )


def wheel_contents(wheel, root=ROOT):
    """Complaints about a built wheel: every asset is a real file with the content that the tree
    shows."""
    bad = []
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        for folder, _, found in os.walk(root / "scemb", followlinks=True):
            for n in found:
                f = Path(folder) / n
                rel = f.relative_to(root).as_posix()
                if "__pycache__" in rel or ".ipynb_checkpoints" in rel:
                    continue
                if not f.exists():
                    bad.append(f"{rel} is a link to a file that does not exist.")
                elif rel not in names:
                    bad.append(f"the wheel lacks {rel}.")
                elif z.read(rel) != f.read_bytes():
                    bad.append(f"the wheel's {rel} differs from the tree's.")
        bad += [
            f"the wheel holds {n}, which is not part of the package."
            for n in sorted(names)
            if not n.startswith(("scemb/", "scemb-"))
        ]
        points = next((z.read(n).decode() for n in names if n.endswith("entry_points.txt")), "")
        if "scemb = scemb.app.cli:app" not in points:
            bad.append("the wheel installs no `scemb` command.")
    return bad


def wheel(root=ROOT):
    with tempfile.TemporaryDirectory() as tmp:
        tree = Path(tmp) / "tree"
        for f in files(root):
            (tree / f.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(f, tree / f.relative_to(root), follow_symlinks=False)
        for link in (p for p in (root / "scemb").rglob("*") if p.is_symlink() and p.is_dir()):
            to = tree / link.relative_to(root)
            if not to.is_symlink():
                to.symlink_to(os.readlink(link))
        bad = succeeds(
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp,
            tree,
        )
        return bad or wheel_contents(next(Path(tmp).glob("*.whl")), root)


# --- pages ----------------------------------------------------------------------------------------


def run_forked(context, page, flags, timeout):
    "(exit code, stdout, stderr) of a page that starts as a copy of a process with warm imports."
    with tempfile.TemporaryDirectory() as tmp:
        out, err = Path(tmp) / "out", Path(tmp) / "err"
        proc = context.Process(target=one_page.forked, args=(page, flags, str(out), str(err), ENV))
        proc.start()
        RUNNING.add(proc.pid)
        try:
            proc.join(timeout)
            late = proc.is_alive()
            # What the page has started and left behind ends with it.
            stop(proc.pid)
            proc.join()
        finally:
            RUNNING.discard(proc.pid)
        out, err = (f.read_text(errors="replace") if f.exists() else "" for f in (out, err))
    if late:
        return 124, out, f"{err}\nstopped after {timeout} seconds"
    return proc.exitcode, out, err


def test_page(page, flags, root=ROOT, timeout=TIMEOUT, context=None):
    """(complaints, seconds, processor seconds, skipped lines) of one page, run in a process of its
    own."""
    start, forks_that_died = time.time(), []
    by_itself = [sys.executable, ROOT / ".ci" / "one_page.py", page.path, *flags]
    if context:
        rc, out, err = run_forked(context, page.path, flags, timeout)
        if (rc or 0) < 0:
            # Killed by a signal, which the fork may have caused: a process of its own decides.
            print(f"      {page.rel} died of signal {-rc} after the fork:\n{tail(err)}", flush=True)
            forks_that_died = [
                f"skipped: the fork of {page.rel}, which died of signal {-rc}; it was run by itself"
            ]
            rc, out, err = run(by_itself, cwd=root, timeout=timeout)
    else:
        rc, out, err = run(by_itself, cwd=root, timeout=timeout)
    skips = forks_that_died + [
        s.strip() for s in err.split("\n") if s.strip().startswith("skipped: ")
    ]
    complaints = []
    if rc:
        cell = re.search(r"While Executing Cell #(\d+)", err)
        where = f"nbs/{page.rel}" + (f" cell {int(cell[1]) - 1}" if cell else "")
        complaints = [f"{where} failed (exit code {rc}):", tail(f"{out}\n{err}")]
    spent = re.findall(r"^processor seconds: ([\d.]+)$", err, re.M)
    return complaints, time.time() - start, float(spent[-1]) if spent else None, skips


def slowest(spent, n=10):
    "Lines that name the pages which take most processor time; wall time depends on what else runs."
    known = {page: s for page, s in spent.items() if s is not None}
    top = sorted(known, key=known.get, reverse=True)[:n]
    share = sum(known[p] for p in top) / max(sum(known.values()), 1e-9)
    return [
        f"{len(known)} pages took {sum(known.values()):.0f} s of processor time, the {len(top)} "
        f"slowest {share:.0%} of it:",
        *(f"  {known[p]:6.1f} s  {p}" for p in top),
    ]


def longest_first(found, flags):
    """Pages in the order of their last time, or of their size where none is known, so that the two
    workers end together."""
    known = json.loads(HISTORY.read_text()) if HISTORY.exists() else {}
    key = "+".join(flags) or "fast"

    def weight(p):
        slow = sum(any(d.split()[0] in flags for d in directives(c)) for c in p.cells)
        return known.get(key, {}).get(p.rel, 10 * slow + p.path.stat().st_size / 2**14)

    return sorted(found, key=weight, reverse=True), known.setdefault(key, {}), known


def test_pages(tally, found, flags, context=None, others=()):
    """Run the pages and the other jobs, each (name, check, arguments of the check ...).

    The other jobs come first, but for the last of them: it works with two processes, so it is
    what keeps both cores busy at the end.
    """
    order, seconds, known = longest_first(found, flags)
    spent = {}

    def one(page):
        complaints, took, spent[page.rel], skips = test_page(page, flags, context=context)
        seconds[page.rel] = round(took, 1)
        tally.add(f"page {page.rel}", complaints, took, skips)

    pool = ThreadPoolExecutor(WORKERS)
    try:
        jobs = [pool.submit(tally.check, *job) for job in others[:-1]]
        jobs += [pool.submit(one, page) for page in order]
        jobs += [pool.submit(tally.check, *job) for job in others[-1:]]
        for job in jobs:
            job.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    HISTORY.parent.mkdir(exist_ok=True)
    HISTORY.write_text(json.dumps(known, indent=1))
    if spent:
        print("      " + "\n      ".join(slowest(spent)), flush=True)


PARAMETRISED = """
import ast, sys, nbformat, papermill
source, out, name, cwd = sys.argv[1:]
nb = nbformat.read(source, as_version=4)
head = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
lines = ast.parse(head.source).body
stated = {ast.unparse(s).split("=")[0].split(":")[0].strip(): s for s in lines}
default = ast.literal_eval(stated[name].value)
nb.cells.append(nbformat.v4.new_code_cell(f"print('seen:', {name})"))
nbformat.write(nb, out)
done = papermill.execute_notebook(
    out, out, parameters={name: default + 1}, kernel_name="python3", progress_bar=False, cwd=cwd
)
seen = "".join(o.get("text", "") for o in done.cells[-1].outputs).strip()
wanted = f"seen: {default + 1}"
sys.exit(0 if seen == wanted else f"{name} was {seen!r} at the end of the page, wanted {wanted!r}")
"""


def papermill_page(found):
    "The lightest launch page that has a whole-number `seed`; None where there is none."
    seeded = [
        p
        for p in found
        if p.folder == "launch"
        and any(
            "parameters" in (c["metadata"].get("tags") or [])
            and re.search(r"^seed\s*(:\s*int\s*)?=\s*\d+", text(c["source"]), re.M)
            for c in p.cells
        )
    ]
    return longest_first(seeded, ["slow"])[0][-1] if seeded else None


def papermill_wins(page):
    "A value that papermill injects is the one that the page runs with."
    with tempfile.TemporaryDirectory() as tmp:
        return succeeds(
            sys.executable,
            "-c",
            PARAMETRISED,
            page.path,
            Path(tmp) / "out.ipynb",
            "seed",
            page.path.parent,
        )


# --- the suite ------------------------------------------------------------------------------------


def self_test(tally):
    "The checks themselves: each has to see the mistake that it is for."
    todo = [unittest.defaultTestLoader.discover(str(ROOT / ".ci"), "test_*.py")]
    while todo:
        test = todo.pop()
        if isinstance(test, unittest.TestSuite):
            todo += reversed(list(test))
            continue
        start, result = time.time(), unittest.TestResult()
        test.run(result)
        tally.add(
            f"self-test: {test.shortDescription() or test.id()}",
            [tail(t) for _, t in result.errors + result.failures],
            time.time() - start,
        )


def git_status():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        return None
    return run(["git", "status", "--porcelain", "--untracked-files=all"])[1]


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument(
        "--fast",
        action="store_true",
        help="cells without flags only; no tutorials, launch and benchmark pages, documentation, "
        "wheel, papermill run and processors",
    )
    ap.add_argument(
        "--flags",
        default="slow",
        help="flags of the cells to run besides the unflagged ones (default: slow)",
    )
    ap.add_argument(
        "--warm",
        action="store_true",
        help="with --page: fork the pages from a process with warm imports, as the whole suite "
        "does",
    )
    ap.add_argument(
        "--page",
        default="*",
        help="only pages whose path below nbs/ fits this pattern, and no other check",
    )
    ap.add_argument(
        "--processor",
        default=None,
        help="run as if on a lesser processor: a setting of processors.py, such as 'no AVX2'",
    )
    args = ap.parse_args()
    if args.processor:
        known = processors.settings(processors.numpy_features())
        if args.processor not in known:
            ap.error(f"--processor {args.processor!r}: known are {', '.join(known)}")
        ENV.update(known[args.processor])
        # Torch keeps what it compiled by its text, whatever instructions it was compiled for.
        kept = tempfile.TemporaryDirectory(prefix="torch_compiled_")
        ENV["TORCHINDUCTOR_CACHE_DIR"] = kept.name
    flags, start, tally = [] if args.fast else args.flags.split(), time.time(), Tally()
    if "net" in flags:
        ENV.pop("HF_HUB_OFFLINE")
    try:
        found = pages(ROOT)
    except ValueError as e:
        return print(f"FAIL  {e}\n0 passed, 1 failed") or 1
    if args.page != "*":
        test_pages(
            tally,
            [p for p in found if fnmatch.fnmatch(p.rel, args.page)],
            flags,
            one_page.warm(ENV) if args.warm else None,
        )
        print(tally)
        return 1 if tally.failed else 0

    status = git_status()
    # Imports and compiles while the checks below run. A process that has started threads of OpenMP
    # is not copied: the copy would wait for threads that it does not have.
    context = one_page.warm(ENV) if ENV.get("OMP_NUM_THREADS") == "1" else None
    self_test(tally)
    tally.check("nbdev_export and nbdev_clean change nothing", export_and_clean)
    tree = snapshot(ROOT, ("nbs", "scemb", "data_manifests", "results"))
    found = pages(ROOT)
    for name, check in STATIC.items():
        tally.check(name, check, ROOT)
    tally.check(
        "ruff check",
        lambda: succeeds(BIN / "ruff", "check", "--no-cache", "--output-format=concise", "."),
    )
    tally.check(
        "ruff format", lambda: succeeds(BIN / "ruff", "format", "--no-cache", "--check", "-q", ".")
    )
    tally.check("README.md equals nbs/index.ipynb", docs.check_readme, ROOT)
    tally.check("importing scemb is light", light_import)
    others = [("types of the short names", types)]
    if args.fast:
        # What tutorials, launch and benchmark pages do is tested by the pages that they are made
        # of.
        found = [p for p in found if p.folder not in ("tutorials", "launch", "benchmarks")]
    else:
        page = papermill_page(found)
        if page:
            others.append((f"papermill sets a parameter of {page.rel}", papermill_wins, page))
        elif any(p.folder in TAGGED for p in found):
            tally.add(
                "papermill sets a parameter",
                ["no launch page has `seed = <whole number>` in its parameters cell."],
            )
        else:
            tally.skip("papermill, there is no launch page yet")
        others += [
            ("documentation renders", succeeds, sys.executable, ROOT / ".ci" / "docs.py", "build"),
            ("wheel holds the whole package", wheel),
            ("answers depend neither on the processor nor on threads", processors.same_everywhere),
        ]
    test_pages(tally, found, flags, context, others)
    if args.fast:
        print(
            "      left out of the fast suite: slow cells, tutorials, launch and benchmark "
            "pages, papermill, processors, wheel, documentation"
        )
    after = snapshot(ROOT, ("nbs", "scemb", "data_manifests", "results"))
    left = [f"{p} was changed or left behind by a test." for p in changed(tree, after)]
    if status is not None and not left and git_status() != status and not status:
        left = [f"the tests changed the work tree:\n{git_status()}"]
    tally.add("tests leave the tree as they found it", left)
    print(f"{time.time() - start:.0f} s in all")
    print(tally)
    return 1 if tally.failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        for pid in list(RUNNING):
            stop(pid)
        sys.exit("interrupted")
