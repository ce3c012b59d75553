#!/bin/sh
# Looks whether what the build needs is installed, before anything is built. Names everything that is
# missing or too old, each with the command that installs it. Status 0 if all is there; -q: says so
# with no words.
cd "$(dirname "$0")/../.." || exit 1

quiet=${1:-}
missing=0
lacks() { # lacks WHAT COMMAND...: one finding
	[ $missing -eq 0 ] && echo "Something the build needs is missing:" >&2
	missing=1
	echo "  $1" >&2
	shift
	for command do
		echo "      $command" >&2
	done
}

# older VERSION LEAST: whether a version such as 1.26.1 is older than one such as 1.26
older() {
	have=${1%%[!0-9.]*}
	while [ -n "$2" ]; do
		h=${have%%.*} l=${2%%.*}
		[ "${h:-0}" -lt "$l" ] && return 0
		[ "${h:-0}" -gt "$l" ] && return 1
		case $have in *.*) have=${have#*.} ;; *) have=0 ;; esac
		case $2 in *.*) set -- "$1" "${2#*.}" ;; *) return 1 ;; esac
	done
	return 1
}

has() { command -v "$1" >/dev/null 2>&1; }

[ "$(uname -s)" = Linux ] && [ "$(uname -m)" = x86_64 ] ||
	lacks "this machine is $(uname -sm); the engine is built for Linux x86_64"

go_command="see https://go.dev/doc/install"
if ! has go; then
	lacks "Go 1.26 or newer: go is not on PATH" "$go_command"
else
	version=$(go env GOVERSION 2>/dev/null) # an older Go may fetch the version that go.mod names
	if [ -z "$version" ] || older "${version#go}" 1.26; then
		lacks "Go 1.26 or newer: this is $(GOTOOLCHAIN=local go version 2>/dev/null | cut -d' ' -f3)" "$go_command"
	fi
fi

if has cargo; then
	version=$(cargo --version 2>/dev/null | cut -d' ' -f2)
	older "${version:-0}" 1.85 && lacks "cargo 1.85 or newer: this is ${version:-broken}" "see https://rustup.rs, or: rustup update stable"
else
	lacks "cargo 1.85 or newer: cargo is not on PATH" "sudo apt-get install cargo   (where that is 1.85 or newer; else https://rustup.rs)"
fi

cxx=${CXX:-g++}
cc=${CC:-gcc}
if ! has "${cxx%% *}"; then
	lacks "a C++20 compiler: ${cxx%% *} is not on PATH" "sudo apt-get install g++"
elif version=$($cxx -dumpversion 2>/dev/null) && older "$version" 11 && ! $cxx --version 2>/dev/null | grep -q clang; then
	lacks "g++ 11 or newer: this is ${version:-broken}" "sudo apt-get install g++-12, and set CXX=g++-12 CC=gcc-12"
fi
has "${cc%% *}" || lacks "a C compiler: ${cc%% *} is not on PATH" "sudo apt-get install gcc"
has make || lacks "make: it is not on PATH" "sudo apt-get install make"

if ! python=$(tools/build/python.sh); then
	found=$(python3 --version 2>&1 | grep Python || echo none)
	lacks "Python 3.11 to 3.14: python3 is $found" "sudo apt-get install python3 python3-venv python3-dev" \
		"(or name another one: make PYTHON=/path/to/python3.11 ...)"
else
	# The headers are looked for with the Python that will use them; venv needs the pip it carries.
	facts=$("$python" - <<-'END'
		import importlib.util, os, sys, sysconfig
		print("%d.%d" % sys.version_info[:2])
		print(os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
		print(all(map(importlib.util.find_spec, ("venv", "ensurepip"))))
	END
	)
	# shellcheck disable=SC2086  # three words
	set -- $facts
	[ "$2" = True ] || lacks "Python's headers (Python.h) for $python" "sudo apt-get install python$1-dev"
	[ "$3" = True ] || [ -x .venv/bin/python ] || lacks "Python's venv for $python" "sudo apt-get install python$1-venv"
fi

[ $missing -eq 0 ] || exit 1
[ "$quiet" = -q ] || echo "All prerequisites are installed."
