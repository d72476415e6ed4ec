"""Run one page as nbdev_test does, in a process of its own; exit code 1 when a cell fails.

    one_page.py PAGE [FLAG...]

The suite runs every page; `warm` keeps it from importing and compiling the same libraries for
each of them.
"""

import atexit
import faulthandler
import multiprocessing
import os
import resource
import sys
from multiprocessing import forkserver
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)


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


def forked(page, flags, out, err, env):
    "Run a page in this process, just forked: a session of its own, output into two files."
    os.setsid()
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = [folder for folder in sys.path if folder != HERE]
    multiprocessing.current_process().name = "MainProcess"  # what libraries ask before they draw
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
        os.close(file)
    faulthandler.enable(file=2)  # a crash says where every thread was
    try:
        code = main(page, *flags)
    except SystemExit as stop:
        code = stop.code
    atexit._run_exitfuncs()  # a forked process leaves without them
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def warm(env):
    """A context whose processes are forked from one that has imported `shared_libraries`.

    That first process runs nothing else, so every page still starts from the same clean state.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shared_libraries"])
    before = dict(os.environ)
    os.environ.update(env)
    os.environ["PYTHONPATH"] = os.pathsep.join([HERE, *filter(None, [env.get("PYTHONPATH")])])
    # Of numba's ways to run threads, this is the one that survives a fork.
    os.environ["NUMBA_THREADING_LAYER"] = "workqueue"
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)
    return context


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
