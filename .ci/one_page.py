"Run one page as nbdev_test does, in a process of its own: `one_page.py PAGE [FLAG...]`; exit code 1 when a cell fails."
import sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.test import test_nb


def main(page, *flags):
    cfg = get_config()
    passed, _ = test_nb(Path(page).absolute(), skip_flags=cfg.tst_flags.split(), force_flags=list(flags), basepath=cfg.config_path)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
