"""A command of speed-engine on the null device; run by the tests beside this file.

Usage: ``command.py COMMAND OPTIONS...``. What the books say of it is JSON in the last line.
"""

import json
import sys

import books

from speed_engine.cli import main

main(sys.argv[1:])
written = books.read()
print(json.dumps({"launches": written.launches(), "host_copies": written.host_copies()}))
