#!/bin/sh
# Builds libtokenizers.a, the project's one Rust library, into a folder:
#
#   engine/token/tokenizers-rs/build.sh OUT_DIR
#
# daulet's src/lib.rs comes unchanged from the Go module cache (the version go.mod names), so that
# it always fits the Go half. Objects go to $CARGO_TARGET_DIR, or OUT_DIR/cargo if that is unset.
# Takes about a minute on two cores the first time.
set -eu

[ $# -eq 1 ] || { echo "usage: $0 OUT_DIR" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
for tool in go cargo; do
	command -v "$tool" >/dev/null || { echo "$0: $tool is needed and was not found" >&2; exit 1; }
done

cd "$here"
module=$(go mod download -json github.com/daulet/tokenizers | sed -n 's/^[[:space:]]*"Dir": "\(.*\)",\{0,1\}$/\1/p')
[ -f "$module/src/lib.rs" ] || { echo "$0: go mod download gave no github.com/daulet/tokenizers" >&2; exit 1; }

export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$out/cargo}"
crate="$CARGO_TARGET_DIR/crate"
mkdir -p "$crate/src"
# Copied only where the bytes differ: cargo goes by modification times.
put() {
	cmp -s "$1" "$2" || { rm -f "$2" && cp "$1" "$2" && chmod u+w "$2"; }
}
for file in Cargo.toml Cargo.lock src/lib.rs src/guard.rs src/nng.rs; do
	put "$here/$file" "$crate/$file"
done
put "$module/src/lib.rs" "$crate/src/daulet.rs"

cd "$crate"
cargo fetch --locked
# Panic messages name source files; keep this machine's folders out of the archive.
sep=$(printf '\037')
flags="--remap-path-prefix=$crate=tokenizers-rs"
for index in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/; do
	flags="$flags$sep--remap-path-prefix=${index%/}=crates"
done
export CARGO_ENCODED_RUSTFLAGS="$flags"
nice cargo build --release --locked --jobs 2
put "$CARGO_TARGET_DIR/release/libtokenizers.a" "$out/libtokenizers.a"
