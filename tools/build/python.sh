#!/bin/sh
# Prints the Python to make .venv with: $PYTHON, or the first on PATH that is 3.11 or newer.
# Prints nothing, with status 1, if there is none.
for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
	path=$(command -v "$candidate" 2>/dev/null) || continue
	if "$path" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
		echo "$path"
		exit 0
	fi
done
exit 1
