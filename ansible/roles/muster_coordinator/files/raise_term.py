"""Lifts the term of a restored event log above every term the fleet may have seen: raise_term.py EVENTS HEARD.

A coordinator's term rises with each start, and devices take no order of a lower one. HEARD is the last that the broker
retains; starts that it no longer tells of are covered by the leap.
"""

import contextlib
import sqlite3
import sys

LEAP = 1000
with contextlib.closing(sqlite3.connect(sys.argv[1])) as log, log:
    log.execute("UPDATE facts SET value = max(value, ?) + ? WHERE name = 'term'", (int(sys.argv[2]), LEAP))
