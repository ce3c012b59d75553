#!/bin/sh
# Prints what Go needs in its environment to build and run this checkout:
#
#	eval "$(tools/build/env.sh)"
#	go test ./engine/...
#
# It is the command `nnsight-go env` (cmd/nnsight-go), run from the checkout.
set -eu
cd "$(dirname "$0")/../.."
CGO_ENABLED=0 exec go run ./cmd/nnsight-go env "$@"
