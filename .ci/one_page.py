"Run one page as nbdev_test does, in a process of its own: `one_page.py PAGE [FLAG...]`; exit code 1 when a cell fails."
import resource
import sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.test import test_nb


def main(page, *flags):
    cfg = get_config()
    passed, _ = test_nb(Path(page).absolute(), skip_flags=cfg.tst_flags.split(), force_flags=list(flags), basepath=cfg.config_path)
    own, started = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    spent = own.ru_utime + own.ru_stime + started.ru_utime + started.ru_stime
    print(f"processor seconds: {spent:.1f}", file=sys.__stderr__)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
