#!/bin/bash
# Builds the image and runs the demo in it as its own user, who is not root; no Docker is needed.
#
#   workflows/container/check.sh [FOLDER]
#
# As root, with Debian's packages buildah and debootstrap. FOLDER (default: a new temporary one) gets
# the demo's slide and results. Where no registry answers, a small Debian stands in for the base image.
#   BUILD_ARGS   more arguments of `buildah bud`: --build-arg TORCH_INDEX=URL, -v HOST:CONTAINER:ro
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
folder=${1:-$(mktemp -d)}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export BUILDAH_ISOLATION=chroot
base=docker.io/library/python:3.11-slim-bookworm image=localhost/wsi-pipeline:check

if ! buildah pull -q "$base" 2>/dev/null; then
  base=localhost/wsi-base:bookworm
  if ! buildah inspect "$base" >/dev/null 2>&1; then
    rootfs=$(mktemp -d)
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$rootfs"
    scratch=$(buildah from scratch)
    buildah add -q "$scratch" "$rootfs" /
    buildah commit -q "$scratch" "$base"
    buildah rm "$scratch" >/dev/null
    rm -rf "$rootfs"
  fi
fi

# shellcheck disable=SC2086 - several arguments on purpose
buildah bud --pull-never -t "$image" --build-arg BASE="$base" ${BUILD_ARGS:-} "$here"
container=$(buildah from --pull-never "$image")
trap 'buildah rm "$container" >/dev/null' EXIT
inside() { buildah run -v "$folder:/data" "$container" -- "$@"; }
chown 1000:1000 "$folder"

user=$(inside id -u)
[ "$user" != 0 ] || { echo "the image runs as root" >&2; exit 1; }
inside wsi synth slides/mucosa.svs --width 4096 --height 3072 --mpp 0.5 --seed 7
inside tini -- wsi-run 'slides/*.svs' --out results
inside wsi summary results --check
[ -s "$folder/results/objects/mucosa.parquet" ]
echo "built, and the demo ran as user $user: look at $folder/results"
