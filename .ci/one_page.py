"""Run one page as nbdev_test does, in a process of its own; exit code 1 when a cell fails.

    one_page.py PAGE [FLAG...]

The suite runs every page; `warm` keeps it from importing the same libraries a hundred times.
"""
import atexit
import multiprocessing
import os
import resource
import sys
from pathlib import Path

# What nearly every page imports, and nothing that starts threads or is imported by few pages.
SHARED = [
    "nbdev.test",
    "anndata",
    "scanpy",
    "sklearn.linear_model",
    "torch",
    "transformers.modeling_utils",
    "transformers.trainer",
]


def main(page, *flags):
    "Run a page, and say on stderr how much processor time it and its children took."
    from nbdev.config import get_config
    from nbdev.test import test_nb

    cfg = get_config()
    passed, _ = test_nb(
        Path(page).absolute(),
        skip_flags=cfg.tst_flags.split(),
        force_flags=list(flags),
        basepath=cfg.config_path,
    )
    spent = 0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        spent += used.ru_utime + used.ru_stime
    print(f"processor seconds: {spent:.1f}", file=sys.__stderr__)
    return 0 if passed else 1


def forked(page, flags, out, err):
    "Run a page in this process, just forked: a session of its own, output into two files."
    os.setsid()
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
        os.close(file)
    try:
        code = main(page, *flags)
    except SystemExit as stop:
        code = stop.code
    atexit._run_exitfuncs()     # a forked process leaves without them
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def warm(env):
    """A context whose processes are forked from one that has imported `SHARED`.

    Forking saves four seconds of imports a page. That first process runs nothing else, so every
    page still starts from the same clean state. It is started by the first `Process(...).start()`.
    """
    os.environ.clear()
    os.environ.update(env)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SHARED)
    return context


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
