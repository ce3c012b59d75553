#!/bin/sh
# The linker that Go calls for libnnsight_go.so: the C compiler, but with the library's own run path
# in place of all others. gotorch's #cgo lines name folders of the module cache, and `nnsight-go env`
# names this machine's torch; neither may get into a library that is shipped.
drop_next=
for arg do
	shift
	if [ -n "$drop_next" ]; then
		drop_next=
		continue
	fi
	case $arg in
	-Wl,-rpath) drop_next=1 ;; # the path is the next word
	-Wl,-rpath,* | -Wl,-rpath=*) ;;
	*) set -- "$@" "$arg" ;;
	esac
done
exec ${NNSIGHT_GO_CC:-gcc} "$@" '-Wl,-rpath,$ORIGIN:$ORIGIN/../../torch/lib'
