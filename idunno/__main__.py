# idunno/__main__.py: `python -m idunno` is the command `idunno`.
from __future__ import annotations

from idunno.cli.main import main

if __name__ == "__main__":
    main()
