#!/usr/bin/env bash
# Clones the committed state into a temporary folder and runs the two commands there with an empty environment, as a
# stranger would. Used by hand before a release: scripts/fresh_clone.sh [make target ...], by default demo and test.
# The clone is removed when all passed, and kept (and named) when something failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

targets=("$@")
[ "${#targets[@]}" -gt 0 ] || targets=(demo test)
if [ -n "$(git status --porcelain)" ]; then
    echo "fresh clone: note: what is not committed is not part of it" >&2
fi
folder=$(mktemp -d "${TMPDIR:-/tmp}/muster-clone-XXXXXX")
git clone --quiet . "$folder/muster"
for target in "${targets[@]}"; do
    echo "fresh clone: make $target in $folder/muster"
    started=$SECONDS
    if ! env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME="$HOME" \
        make -C "$folder/muster" "$target" </dev/null; then
        echo "fresh clone: make $target failed after $((SECONDS - started)) s; it is kept in $folder/muster" >&2
        exit 1
    fi
    echo "fresh clone: make $target passed in $((SECONDS - started)) s"
done
rm -rf "$folder"
